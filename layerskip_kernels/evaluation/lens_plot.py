"""Pictures of lenses: tokens by layers, and how many layers the tokens of many prompts need. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerskip_kernels.evaluation.lens import Lens, token_text
from layerskip_kernels.evaluation.plots import new_figure, save_figure
from layerskip_kernels.evaluation.trust import plural
from layerskip_kernels.model.model import Model

__all__ = ["cell_colour", "depth_colour", "draw_layers_needed", "draw_lens", "ink"]

# From probability 0 to 1: blue where a layer says the final token, orange where it says another one.
FINAL, OTHER = ((240, 245, 251), (23, 84, 156)), ((254, 247, 238), (196, 98, 16))
DEPTH = ((233, 244, 233), (20, 92, 60))  # from the first layer to the last
PROMPT_CHARACTERS = 60
MAX_WIDTH = 30.0  # inches of cells


def cell_colour(is_final: bool, probability: float) -> str:
    """The colour of a cell, as #rrggbb."""
    return _between(*(FINAL if is_final else OTHER), probability)


def depth_colour(depth: float) -> str:
    """The colour of a token by the layers it needed, 0 for the first and 1 for the last."""
    return _between(*DEPTH, depth)


def ink(background: str) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "#111111"


def _between(low: tuple[int, ...], high: tuple[int, ...], part: float) -> str:
    return "#" + "".join(f"{round(a + (b - a) * min(1.0, max(0.0, part))):02x}" for a, b in zip(low, high, strict=True))


def draw_lens(model: Model, lens: Lens, path: Path, note: str = "") -> None:
    """Tokens from top to bottom, layers from left to right, as in the page."""
    num_tokens, num_layers = lens.guesses.shape
    cell = min(0.62, MAX_WIDTH / num_layers)
    figure = new_figure(max(7.0, 2.0 + cell * num_layers), 1.9 + 0.25 * num_tokens)
    axis = figure.subplots()
    for t, needed in enumerate(lens.layers_needed.tolist()):
        for layer in range(1, num_layers + 1):
            _draw_cell(axis, model, lens, t, layer, max_characters=int(cell / 0.078))
        axis.add_patch(_box(needed - 1, t, facecolor="none", edgecolor="#111111", linewidth=1.6, zorder=3))
    axis.set(xlim=(0, num_layers), ylim=(num_tokens, 0), xlabel="layer")
    axis.set_xticks([layer + 0.5 for layer in range(num_layers)], [str(layer + 1) for layer in range(num_layers)])
    labels = [_shortened(token_text(model, token), 16) for token in lens.token_ids]
    axis.set_yticks([t + 0.5 for t in range(num_tokens)], labels, family="monospace", parse_math=False)
    axis.set_ylabel("generated token, from top to bottom")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    mean = lens.layers_needed.double().mean().item()
    axis.set_title(
        f"{model.name} after {prompt_shown(model, lens)}: what each layer would say\n"
        f"outlined: the layer from which the answer no longer changes, on average {mean:.2f} of {num_layers}",
        loc="left", fontsize=11, parse_math=False,
    )  # fmt: skip
    _draw_scales(figure, axis)
    save_figure(figure, path, note)


def _draw_cell(axis: Any, model: Model, lens: Lens, t: int, layer: int, max_characters: int) -> None:
    guess, probability = int(lens.guesses[t, layer - 1]), float(lens.probabilities[t, layer - 1])
    colour = cell_colour(guess == lens.token_ids[t], probability)
    axis.add_patch(_box(layer - 1, t, facecolor=colour, edgecolor="white", linewidth=0.8))
    text = _shortened(token_text(model, guess), max_characters)
    axis.text(
        layer - 0.5, t + 0.5, text, ha="center", va="center_baseline", fontsize=7.5, family="monospace",
        color=ink(colour), parse_math=False, clip_on=True,
    )  # fmt: skip


def _box(x: float, y: float, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, **style)


def prompt_shown(model: Model, lens: Lens) -> str:
    """The end of the prompt, in quotes, as a title has room for it; its name where there is no tokenizer."""
    if model.tokenizer is None:
        return lens.name
    text = " ".join(model.tokenizer.decode(lens.prompt).split())
    return f'"{text if len(text) <= PROMPT_CHARACTERS else "…" + text[-PROMPT_CHARACTERS:]}"'


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(1, length - 1)] + "…"


def _draw_scales(figure: Any, axis: Any) -> None:
    """What the two colours mean."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    for is_final, label in ((False, "probability of another token"), (True, "probability of the final token")):
        colours = LinearSegmentedColormap.from_list(label, [cell_colour(is_final, 0.0), cell_colour(is_final, 1.0)])
        bar = figure.colorbar(ScalarMappable(cmap=colours), ax=axis, fraction=0.02, pad=0.012, aspect=30, shrink=0.9)
        bar.set_label(label)
        bar.outline.set_visible(False)


def draw_layers_needed(summary: dict[str, Any], path: Path, note: str = "") -> None:
    """The histogram of a `lens.summary`, and below it how often each layer says the final token."""
    num_layers, tokens = summary["num_layers"], summary["tokens"]
    layers = range(1, num_layers + 1)
    figure = new_figure(max(6.5, 2.0 + 0.2 * num_layers), 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    above.bar(layers, [100 * count / tokens for count in summary["histogram"]], color="#17549c", width=0.85)
    mean = summary["mean_layer"]
    above.axvline(mean, color="#c46210", linestyle="--")
    above.set(ylabel="tokens, %")
    above.set_title(
        f"{summary['model']}: the layer from which the answer no longer changes\n"
        f"{tokens} tokens after {plural(summary['prompts'], 'prompt')}; mean {mean:.2f} of {num_layers} (dashed)",
        loc="left", fontsize=11, parse_math=False,
    )  # fmt: skip
    below.plot(layers, [100 * part for part in summary["agreement"]], "o-", color="#17549c", markersize=3.5)
    for adapter in (adapters := summary.get("adapters", [])):
        at, part = adapter["exit_layer"], 100 * adapter["agreement"]
        below.plot([at], [part], "D", color="#c46210", label=f"{at} with the exit adapter: {part:.0f} %")
    if adapters:
        below.legend(loc="lower right", frameon=False)
    below.set(xlabel="layer", ylabel="says the final token, %", ylim=(0, 105), xlim=(0.4, num_layers + 0.6))
    below.grid(alpha=0.3)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, note)
