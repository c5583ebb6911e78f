"""Perplexity and agreement by exit, drawn. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerskip_kernels.evaluation.plots import new_figure, plain_log_axis, save_figure

__all__ = ["draw_perplexities"]


def draw_perplexities(report: dict[str, Any], path: Path, note: str = "") -> None:
    """The ``exits`` of a `quality.perplexities`: perplexity on a logarithmic axis, and below it the agreement."""
    found = report["perplexity"]
    layers = [row["exit_layer"] for row in found["exits"]]
    figure = new_figure(max(6.5, 2.0 + 0.2 * len(layers)), 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    values = [row["perplexity"] for row in found["exits"]]
    above.plot(layers, values, "o-", color="#17549c", markersize=3.5)
    plain_log_axis(above)
    above.set(ylabel="perplexity")
    above.set_title(
        f"{report['model']}: perplexity of every exit\n{found['tokens']} tokens; last layer {values[-1]:.2f}",
        loc="left", fontsize=11, parse_math=False,
    )  # fmt: skip
    below.plot(layers, [100 * row["agreement"] for row in found["exits"]], "o-", color="#17549c", markersize=3.5)
    below.set(xlabel="exit layer", ylabel="says what the\nlast layer says, %", ylim=(0, 105))
    below.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, note)
