"""The heat map of a sweep: speed-up and acceptance by exit layer and number of drafts. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from layerskip_kernels.plots import new_figure, save_figure
from layerskip_kernels.sweep import best

__all__ = ["draw_sweep"]

TICKS = (0.1, 0.2, 0.33, 0.5, 0.7, 0.85, 1, 1.2, 1.4, 2, 3, 5, 10)


def draw_sweep(report: dict[str, Any], path: Path) -> None:
    """Two panels over the same settings; the best one is outlined in both. Raises ValueError for a bad ending."""
    results, settings = report["results"], report["machine"]["settings"]
    exits = sorted({row["exit_layer"] for row in results})
    drafts = sorted({row["num_speculations"] for row in results})
    figure = new_figure(3.2 + 1.9 * len(drafts), 2.0 + 0.5 * len(exits))
    left, right = figure.subplots(1, 2)
    speedups = _grid(results, exits, drafts, "speedup")
    # White is plain decoding, so that a glance tells what is faster and what is slower.
    reach = max(max(abs(math.log2(value)) for row in speedups for value in row), 0.05)
    image = left.imshow(
        [[math.log2(value) for value in row] for row in speedups], cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto"
    )
    bar = figure.colorbar(image, ax=left)
    ticks = [factor for factor in TICKS if abs(math.log2(factor)) <= reach]
    bar.set_ticks([math.log2(factor) for factor in ticks], labels=[f"{factor:.3g}x" for factor in ticks])
    _label(left, speedups, lambda value: f"{value:.2f}x", lambda value: abs(math.log2(value)) > 0.6 * reach)
    left.set_title("speed-up over plain decoding", fontsize=10)

    rates = _grid(results, exits, drafts, "acceptance_rate")
    image = right.imshow(rates, cmap="Greens", vmin=0, vmax=1, aspect="auto")
    bar = figure.colorbar(image, ax=right)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
    _label(right, rates, lambda value: f"{100 * value:.{int(value < 0.1)}f} %", lambda value: value > 0.6)
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
        f"{report['model']}, {settings['dtype']}, {settings['prompts']} prompts, "
        f"plain decoding {settings['plain_tokens_per_second']:.1f} tokens/s\n"
        f"{report['machine']['cpu']}, {report['machine']['threads']} threads; outlined: the fastest",
        fontsize=10, parse_math=False,
    )  # fmt: skip
    save_figure(figure, path)


def _grid(results: list[dict[str, Any]], exits: list[int], drafts: list[int], name: str) -> list[list[float]]:
    values = {(row["exit_layer"], row["num_speculations"]): row[name] for row in results}
    return [[math.nan if values[e, d] is None else values[e, d] for d in drafts] for e in exits]


def _label(axis: Any, grid: list[list[float]], text: Any, is_dark: Any) -> None:
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            shown = "-" if math.isnan(value) else text(value)
            axis.text(x, y, shown, ha="center", va="center", color="white" if is_dark(value) else "#111111")


def _outline(axis: Any, x: int, y: int) -> None:
    from matplotlib.patches import Rectangle

    box = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="none", edgecolor="#111111", linewidth=2, clip_on=False)
    axis.add_patch(box)
