"""The heat map of a sweep: speed-up and acceptance by exit layer and number of drafts. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from layerskip_kernels.config import AUTO
from layerskip_kernels.evaluation.exit_sweep import best
from layerskip_kernels.evaluation.facts import caption
from layerskip_kernels.evaluation.plots import new_figure, save_figure
from layerskip_kernels.evaluation.trust import plural

__all__ = ["draw_sweep"]

TICKS = (0.1, 0.2, 0.33, 0.5, 0.7, 0.85, 1, 1.2, 1.4, 2, 3, 5, 10)


def draw_sweep(report: dict[str, Any], path: Path) -> None:
    """Two panels over the same settings; the best one is outlined in both. Raises ValueError for a bad ending."""
    results, settings = [row for row in report["results"] if row["exit_layer"] != AUTO], report["machine"]["settings"]
    notes = [_explained(results)]
    notes += [f'; "auto": {row["speedup"]:.2f}x' for row in report["results"] if row["exit_layer"] == AUTO]
    exits = sorted({row["exit_layer"] for row in results})
    drafts = sorted({row["num_speculations"] for row in results})
    figure = new_figure(3.2 + 1.9 * len(drafts), 2.4 + 0.55 * len(exits))
    left, right = figure.subplots(1, 2)
    speedups = _grid(results, exits, drafts, "speedup")
    # White is plain decoding, so that a glance tells what is faster and what is slower.
    trusted = [row["speedup"] for row in results if row["doubt"] is None] or [row["speedup"] for row in results]
    reach = max(0.05, *(abs(math.log2(value)) for value in trusted))
    image = left.imshow(
        [[math.log2(value) for value in row] for row in speedups], cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto"
    )
    bar = figure.colorbar(image, ax=left)
    ticks = [factor for factor in TICKS if abs(math.log2(factor)) <= reach]
    bar.set_ticks([math.log2(factor) for factor in ticks], labels=[f"{factor:.3g}x" for factor in ticks])
    _label(left, _texts(results, exits, drafts), speedups, lambda value: abs(math.log2(value)) > 0.6 * reach)
    left.set_title("speed-up over plain decoding", fontsize=10)

    rates = _grid(results, exits, drafts, "acceptance_rate")
    image = right.imshow(rates, cmap="Greens", vmin=0, vmax=1, aspect="auto")
    bar = figure.colorbar(image, ax=right)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
    shown = [[_percent(value) for value in row] for row in rates]
    _label(right, shown, rates, lambda value: value > 0.6)
    right.set_title("drafts accepted", fontsize=10)

    chosen = best(report)
    for axis in (left, right):
        _outline(axis, drafts.index(chosen["num_speculations"]), exits.index(chosen["exit_layer"]))
        axis.set(xlabel="drafts before each verification", ylabel=f"exit layer, of {settings['num_layers']}")
        axis.set_xticks(range(len(drafts)), drafts)
        axis.set_yticks(range(len(exits)), exits)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.suptitle(
        f"{report['model']}, {settings['dtype']}, {plural(settings['prompts'], 'prompt')} "
        f"({settings['prompts_from']}), plain decoding {settings['plain_tokens_per_second']:.1f} tokens/s\n"
        "outlined: the fastest; below each speed-up its slowest and fastest round" + "".join(notes),
        fontsize=10, parse_math=False,
    )  # fmt: skip
    save_figure(figure, path, caption(report["machine"]))


def _explained(results: list[dict[str, Any]]) -> str:
    return "; ?: not to be trusted" if any(row["doubt"] is not None for row in results) else ""


def _grid(results: list[dict[str, Any]], exits: list[int], drafts: list[int], name: str) -> list[list[float]]:
    values = {(row["exit_layer"], row["num_speculations"]): row[name] for row in results}
    return [[math.nan if values[e, d] is None else values[e, d] for d in drafts] for e in exits]


def _texts(results: list[dict[str, Any]], exits: list[int], drafts: list[int]) -> list[list[str]]:
    """The speed-up of each cell and, below it, of its slowest and fastest round; with a "?" where it is doubted."""
    texts = {
        (row["exit_layer"], row["num_speculations"]): f"{row['speedup']:.2f}x{'' if row['doubt'] is None else ' ?'}\n"
        f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}"
        for row in results
    }
    return [[texts[e, d] for d in drafts] for e in exits]


def _percent(rate: float) -> str:
    return "-" if math.isnan(rate) else f"{100 * rate:.{int(rate < 0.1)}f} %"


def _label(axis: Any, texts: list[list[str]], grid: list[list[float]], is_dark: Any) -> None:
    for y, (row, of_row) in enumerate(zip(grid, texts, strict=True)):
        for x, (value, text) in enumerate(zip(row, of_row, strict=True)):
            colour = "white" if is_dark(value) else "#111111"
            axis.text(x, y, text, ha="center", va="center", color=colour, fontsize=8.5)


def _outline(axis: Any, x: int, y: int) -> None:
    from matplotlib.patches import Rectangle

    box = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="none", edgecolor="#111111", linewidth=2, clip_on=False)
    axis.add_patch(box)
