"""A Lens as an HTML page: one file, no script, nothing fetched."""

from __future__ import annotations

from html import escape

from torch import Tensor

from layerskip_kernels.evaluation.lens import Lens, token_text
from layerskip_kernels.evaluation.lens_plot import cell_colour, depth_colour, ink
from layerskip_kernels.model.model import Model

__all__ = ["lens_page"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .4rem; }
p, pre, details { max-width: 60rem; }
pre, td, tbody th { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { background: #f6f7f9; padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap; }
.text span { border-radius: 2px; } .note { color: #666; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 2rem; align-items: center; font-size: .9rem; }
.ramp { display: inline-block; width: 7rem; height: .9rem; vertical-align: middle; border: 1px solid #ccc; }
.sample { display: inline-block; width: 1.6rem; height: .8rem; vertical-align: middle; border: 2px solid #111; }
.table { overflow: auto; max-height: 85vh; border: 1px solid #ddd; margin-top: .8rem; }
table { border-collapse: separate; border-spacing: 1px; font-size: 12px; background: #fff; }
td { min-width: 2.6em; max-width: 5.2em; padding: 1px 3px; }
td { text-align: center; overflow: hidden; text-overflow: ellipsis; white-space: pre; }
td.settled { outline: 2px solid #111; outline-offset: -1px; }
th { background: #fff; font-weight: 600; padding: 2px 6px; position: sticky; }
thead th { top: 0; z-index: 2; } tbody th { left: 0; z-index: 1; text-align: left; white-space: pre; }
thead th:first-child { left: 0; z-index: 3; text-align: left; }
"""


def lens_page(model: Model, lens: Lens) -> str:
    """The page: what it shows in words, the text by the layers its tokens needed, and the table of all layers."""
    num_layers, needed = lens.guesses.size(1), lens.layers_needed
    title = f"What each layer of {model.name} would say"
    mean = needed.double().mean().item()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="note">{escape(lens.name)}: {len(needed)} tokens generated; {num_layers} layers.</p>
<p>A language model passes each token through its layers, one after the other, and reads the next token off the last
one. Here the same reading was taken after <em>every</em> layer. A token that a layer already has right, and that no
later layer changes, could have been said there: on average after layer <strong>{mean:.2f} of {num_layers}</strong>.</p>
<h2>The text, by the layers it needed</h2>
<div class="legend"><span>1 {_ramp([depth_colour(i / 6) for i in range(7)])} {num_layers} layers</span></div>
<pre class="text">{_text(model, lens)}</pre>
<details><summary>What came before it (the prompt)</summary><pre>{escape(_prompt(model, lens))}</pre></details>
<h2>What each layer would say</h2>
<p>A row for each generated token, from top to bottom; a column for each layer, from left to right. A cell shows the
token that the layer would say (<code>·</code>: a blank, <code>↵</code>: the end of a line); point at it for more.</p>
<div class="legend">
<span>the final token, probability 0 {_ramp([cell_colour(True, i / 6) for i in range(7)])} 1</span>
<span>another token, probability 0 {_ramp([cell_colour(False, i / 6) for i in range(7)])} 1</span>
<span><span class="sample"></span> from here on it no longer changes</span>
</div>
<div class="table"><table>
<thead><tr><th scope="col">final token</th>{_layer_titles(lens)}</tr></thead>
<tbody>
{_rows(model, lens)}
</tbody></table></div>
</body>
</html>
"""


def _ramp(colours: list[str]) -> str:
    return f'<span class="ramp" style="background:linear-gradient(to right,{",".join(colours)})"></span>'


def _prompt(model: Model, lens: Lens) -> str:
    return model.tokenizer.decode(lens.prompt) if model.tokenizer is not None else str(lens.prompt)


def _text(model: Model, lens: Lens) -> str:
    """The generated text, each token in the colour of the layers it needed."""
    num_layers, spans = lens.guesses.size(1), []
    for token, needed in zip(lens.token_ids, lens.layers_needed.tolist(), strict=True):
        colour = depth_colour((needed - 1) / max(1, num_layers - 1))
        shown = escape(token_text(model, token).replace("·", " ").replace("↵", "↵\n"))
        style = f"background:{colour};color:{ink(colour)}"
        spans.append(f'<span style="{style}" title="needs {needed} of {num_layers} layers">{shown}</span>')
    return "".join(spans)


def _layer_titles(lens: Lens) -> str:
    """The layers, and exit adapters after those that they follow."""
    titles = [str(layer) for layer in range(1, lens.guesses.size(1) + 1)]
    for adapter in reversed(lens.adapters):
        titles.insert(adapter.exit_layer, f"{adapter.exit_layer} + adapter")
    return "".join(f'<th scope="col">{title}</th>' for title in titles)


def _rows(model: Model, lens: Lens) -> str:
    return "\n".join(_row(model, lens, t) for t in range(len(lens.guesses)))


def _row(model: Model, lens: Lens, t: int) -> str:
    final, needed = lens.token_ids[t], int(lens.layers_needed[t])
    cells = []
    for layer, (guess, probability) in enumerate(
        zip(lens.guesses[t].tolist(), lens.probabilities[t].tolist(), strict=True), 1
    ):
        title = f"layer {layer}: " + _likeliest(
            model, lens.alternatives[t, layer - 1], lens.alternative_probabilities[t, layer - 1]
        )
        cells.append(_cell(model, guess, final, probability, title, layer == needed))
    for adapter in reversed(lens.adapters):  # each place counts layers alone
        likeliest = _likeliest(model, adapter.alternatives[t], adapter.alternative_probabilities[t])
        title = f"layer {adapter.exit_layer} and the exit adapter: {likeliest}"
        cell = _cell(model, int(adapter.guesses[t]), final, float(adapter.probabilities[t]), title)
        cells.insert(adapter.exit_layer, cell)
    return f'<tr><th scope="row">{escape(token_text(model, final))}</th>{"".join(cells)}</tr>'


def _cell(model: Model, guess: int, final: int, probability: float, title: str, settled: bool = False) -> str:
    colour, outlined = cell_colour(guess == final, probability), ' class="settled"' if settled else ""
    style = f"background:{colour};color:{ink(colour)}"
    return f'<td{outlined} style="{style}" title="{escape(title)}">{escape(token_text(model, guess))}</td>'


def _likeliest(model: Model, tokens: Tensor, probabilities: Tensor) -> str:
    """The likeliest tokens [3] in words."""
    pairs = zip(tokens.tolist(), probabilities.tolist(), strict=True)
    return ", ".join(f"{token_text(model, token)} {probability:.1%}" for token, probability in pairs)
