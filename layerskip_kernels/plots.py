"""What the package's plots share: a figure to draw on, and a file to write it to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure", "require_matplotlib", "save_figure"]

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
            raise ValueError(f"drawing {path} needs matplotlib; run: pip install matplotlib (extra: plots)") from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches that needs no screen; `require_matplotlib` first."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the name's ending says the format (.png, .svg, .pdf). Raises ValueError for another one."""
    require_matplotlib(path)
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a token's characters may be in no font here: boxes, then
        # Without a date, so that the same results give the same file.
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        figure.savefig(path, dpi=150, metadata=metadata)
