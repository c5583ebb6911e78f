"""The plots of docs/performance.md, as SVG."""

from pathlib import Path
from typing import Any

import matplotlib

from targets import OURS, Results, contender, decoding_limit, rows_limit

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update({"svg.hashsalt": "layerskip_kernels", "svg.fonttype": "none", "font.size": 9})
BLUE, GREY, RED = "#1f5fa8", "#a8a8a8", "#c0392b"


def draw(docs: Path, results: Results) -> None:
    """Draw every plot whose results are there."""
    for name, needs, plot in (("peers", "peers", peers), ("rows", "steps", rows), ("cycles", "cycle", cycles)):
        if needs in results:
            figure = plot(results)
            # Without a date, so that the same results give the same file.
            figure.savefig(docs / f"performance_{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)


def peers(results: Results) -> Any:
    """Tokens per second, decoding and prompt, by contender."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    timed = [r for r in results["peers"]["results"] if "decode" in r][::-1]
    names = [r["name"] for r in timed]
    colours = [BLUE if name.startswith("layerskip") else GREY for name in names]
    for axis, key, title in ((axes[0], "tokens_per_second", "decoding, tokens/s"),
                             (axes[1], "prompt_tokens_per_second", "prompt of 512, tokens/s")):  # fmt: skip
        values = [r.get(key, 0.0) for r in timed]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, labels=[f"{v:.0f}" if v else "" for v in values], padding=2)
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    limit = decoding_limit(OURS)(results) if "bytes" in contender(results, OURS) else None
    if limit:
        axes[0].axvline(limit, color=RED, linestyle="--")
        axes[0].text(limit, len(names) - 0.4, "bandwidth, bf16", color=RED, ha="center")
    return figure


def rows(results: Results) -> Any:
    """Milliseconds of a step by its rows, and what bounds it."""
    steps = results["steps"]
    counts = [r["rows"] for r in steps["rows"]]
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    axis.plot(counts, [r["median_s"] * 1e3 for r in steps["rows"]], "o-", color=BLUE, label="verify_step")
    axis.plot(counts, [rows_limit(steps, n) * 1e3 for n in counts], "--", color=RED, label="limit")
    axis.set(xlabel="rows", ylabel="ms", ylim=(0, None))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def cycles(results: Results) -> Any:
    """Speed-up by acceptance rate, each exit at its best number of drafts, beside the ceiling."""
    models = results["cycle"]["models"]
    figure, axes = plt.subplots(1, len(models), figsize=(4.5 * len(models), 3.4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        exits = sorted({r["exit_layer"] for r in model["results"]})
        for shade, exit_layer in zip((BLUE, RED, GREY), exits, strict=False):
            settings = [r["speed_ups"] for r in model["results"] if r["exit_layer"] == exit_layer]
            best = [max(same, key=lambda s: s["speed_up"]) for same in zip(*settings, strict=True)]
            rates = [s["acceptance_rate"] for s in best]
            axis.plot(rates, [s["speed_up"] for s in best], "o-", color=shade, label=f"exit {exit_layer}")
            axis.plot(rates, [s["ceiling_with_head"] for s in best], "--", color=shade)
        axis.set(title=model["model"], xlabel="accepted / drafted", ylabel="speed-up (dashed: ceiling with head)")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
