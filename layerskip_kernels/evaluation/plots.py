"""What the package's plots share: a figure to draw on, and a file to write it to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure", "plain_log_axis", "require_matplotlib", "save_figure"]

ENDINGS = (".png", ".svg", ".pdf")
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "layerskip_kernels"}


def require_matplotlib(*paths: str | Path | None) -> None:
    """Raise ValueError, before hours of work, where one of these pictures (None: not asked for) can't be drawn."""
    for path in paths:
        if path is None:
            continue
        if Path(path).suffix.lower() not in ENDINGS:
            raise ValueError(f"a picture's name must end with {', '.join(ENDINGS)}, got {path}")
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise ValueError(f"drawing {path} needs matplotlib; run: pip install matplotlib") from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches that needs no screen; `require_matplotlib` first."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain_log_axis(axis: Any) -> None:
    """A logarithmic y axis whose numbers are written out: 6, 10, 20."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low > 20 else (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    axis.yaxis.set_major_locator(LogLocator(subs=steps if high / low < 1e4 else (1.0,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: Path, note: str = "") -> None:
    """Write a figure with a small ``note`` below it; the name's ending says the format (.png, .svg, .pdf).

    Raises ValueError for another one.
    """
    require_matplotlib(path)
    import matplotlib

    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=6.5, color="#666666", parse_math=False)

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a token's characters may be in no font here: boxes, then
        # Without a date, so that the same results give the same file.
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        figure.savefig(path, dpi=150, metadata=metadata)
