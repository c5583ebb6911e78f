"""``layerskip lens``: what each layer would say for each generated token, and how many layers a token needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.engine.generation import generate
from layerskip_kernels.engine.request import encode
from layerskip_kernels.evaluation.equality import BitsDiffer
from layerskip_kernels.model.model import Model

__all__ = ["ALTERNATIVES", "Adapted", "Lens", "look", "look_at_all", "summary", "token_text"]

ALTERNATIVES = 3  # likeliest tokens of each layer that are kept
VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "↤"})

Place = tuple[int, bool]  # a layer, or the exit adapter after it


@dataclass(frozen=True)
class Adapted:
    """What an exit adapter says after ``exit_layer`` layers, instead of these alone: as a layer of a Lens, [T, ...]."""

    exit_layer: int
    guesses: Tensor
    probabilities: Tensor
    alternatives: Tensor
    alternative_probabilities: Tensor


@dataclass(frozen=True)
class Lens:
    """T generated tokens of a prompt, seen through L layers.

    guesses int64 [T, L]: the token that each layer would say, the last column what was generated; probabilities fp32
    [T, L]: what it gives that token; alternatives int64 and alternative_probabilities fp32 [T, L, 3]: the likeliest.
    ``adapters``: of each of the model's exit adapters.
    """

    name: str
    prompt: list[int]
    guesses: Tensor
    probabilities: Tensor
    alternatives: Tensor
    alternative_probabilities: Tensor
    adapters: tuple[Adapted, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """What was generated."""
        return self.guesses[:, -1].tolist()

    @property
    def layers_needed(self) -> Tensor:
        """int64 [T]: the layer from which on every layer says the final token."""
        layers = torch.arange(1, self.guesses.size(1) + 1)
        return ((self.guesses != self.guesses[:, -1:]) * layers).amax(1) + 1


def look(model: Model, name: str, prompt: Sequence[int] | str, max_new_tokens: int = 32) -> Lens:
    """Continue a prompt greedily, then ask every layer after each position what it would say there.

    Raises BitsDiffer if the last layer does not say what was generated, which indicates a bug.
    """
    config = GenerationConfig("autoregressive", max_new_tokens=max_new_tokens)
    ids = encode(model, prompt)
    [generation] = generate(model, [ids], config)
    text = ids + generation.token_ids[:-1]
    found = list(zip(*_cells(model, text, len(ids) - 1), strict=True))
    layers = [(layer, False) for layer in range(1, model.config.num_layers + 1)]
    guesses, said, likeliest, likelihoods = (_by_layer(cells, layers) for cells in found)
    adapters = tuple(
        Adapted(a.exit_layer, *(_by_layer(cells, [(a.exit_layer, True)])[:, 0] for cells in found))
        for a in model.exit_adapters
    )
    lens = Lens(name, ids, guesses, said, likeliest, likelihoods, adapters)
    if lens.token_ids != generation.token_ids:
        raise BitsDiffer("the last layer does not say what was generated; run `layerskip verify`")
    return lens


def _cells(model: Model, text: list[int], start: int) -> Iterator[tuple[tuple[Place, Tensor], ...]]:
    """For each run of rows at each place: the four tensors of a Lens, each with the place it belongs to."""
    for rows in each_exit(model, text, start, adapters=True):
        probabilities = rows.logits.softmax(-1)
        likelihoods, likeliest = probabilities.topk(min(ALTERNATIVES, model.config.vocab_size))
        said = probabilities.gather(1, rows.tokens[:, None])[:, 0]
        place = rows.layer, rows.adapted
        yield tuple((place, cells) for cells in (rows.tokens, said, likeliest, likelihoods))


def _by_layer(cells: Sequence[tuple[Place, Tensor]], places: Sequence[Place]) -> Tensor:
    """Runs of rows [n, ...] of some places -> [T, places, ...]."""
    return torch.stack([torch.cat([run for at, run in cells if at == place]) for place in places], 1)


def look_at_all(model: Model, prompts: Sequence[tuple[str, str]], max_new_tokens: int) -> list[Lens]:
    """Look at prompts (name, text) in turn; progress goes to stderr."""
    shown = tqdm(prompts, desc="lens", unit="prompt", disable=len(prompts) < 2)
    return [look(model, name, prompt, max_new_tokens) for name, prompt in shown]


def summary(model: Model, lenses: Sequence[Lens]) -> dict[str, Any]:
    """How many layers the tokens need.

    ``mean_layer``: of Lens.layers_needed over all tokens; ``histogram``: how many tokens need 1, 2, ... L layers;
    ``agreement``: the part of all tokens for which layer 1, 2, ... L says the final one, whatever follows it: about
    what drafts at that exit are accepted at; ``adapters``: of each exit adapter its ``exit_layer`` and ``agreement``,
    where the model has any.
    """
    num_layers = lenses[0].guesses.size(1)
    needed = torch.cat([lens.layers_needed for lens in lenses])
    agrees = torch.cat([lens.guesses == lens.guesses[:, -1:] for lens in lenses])
    found = {
        "model": model.name,
        "prompts": len(lenses),
        "tokens": len(needed),
        "num_layers": num_layers,
        "mean_layer": needed.double().mean().item(),
        "histogram": torch.bincount(needed, minlength=num_layers + 1)[1:].tolist(),
        "agreement": agrees.double().mean(0).tolist(),
    }
    adapters = []
    for i, adapted in enumerate(lenses[0].adapters):
        right = torch.cat([lens.adapters[i].guesses == lens.guesses[:, -1] for lens in lenses])
        adapters.append({"exit_layer": adapted.exit_layer, "agreement": right.double().mean().item()})
    return {**found, "adapters": adapters} if adapters else found


def token_text(model: Model, token: int) -> str:
    """A token as it can be seen: its text with blanks made visible, or its id where it has none."""
    text = model.tokenizer.decode([token]) if model.tokenizer is not None else ""
    shown = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.translate(VISIBLE)]
    return "".join(shown) or f"[{token}]"
