"""``layerskip adapt``: an exit adapter for a model that stays as it is, trained on what the model itself says."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerskip_kernels.checks import check_int
from layerskip_kernels.errors import shown
from layerskip_kernels.model.defaults import DraftDefaults, write_defaults
from layerskip_kernels.model.exit_adapter import (
    HEAD_IDS,
    MLP,
    AdapterKind,
    adapter_depth,
    adapter_kind,
    adapter_numbers,
    adapter_shapes,
    check_adapter_weights,
    model_norms,
    num_adapter_layers,
    quantised_adapter,
    read_exit_adapter,
    write_exit_adapter,
)
from layerskip_kernels.model.files import write_whole
from layerskip_kernels.model.json_file import JsonObject, json_object, read_json
from layerskip_kernels.model.model import Model
from layerskip_kernels.training.adapter_choice import StepCosts, measure_costs
from layerskip_kernels.training.adapter_start import OwnWeights
from layerskip_kernels.training.adapter_training import AdapterTraining, AdaptSettings, say
from layerskip_kernels.training.exit_states import ExitStates
from layerskip_kernels.training.kept import Origin, check_checkpoints, only_one
from layerskip_kernels.training.written_texts import NOT_ASKED, Text, judged_texts, pieces, write_texts

__all__ = ["adapt", "read_choice"]

MOST_SEED = 2**24 - 1  # the model's prompts are drawn with seeds of their own, made of it


@dataclass(frozen=True)
class Candidate:
    """An exit, an adapter's layers and a draft vocabulary's size; what a short training promises of them."""

    exit_layer: int
    num_layers: AdapterKind
    num_words: int
    acceptance: float
    speed_up: float
    num_speculations: int


def adapt(
    model: Model,
    source: Any,
    output: Path,
    settings: AdaptSettings,
    prompts: Sequence[str] = (),
    given: Sequence[str] = (),
    start_from: Path | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Train an adapter for ``model``, or go on with the training that ``output`` holds; returns what came of it.

    ``prompts``: what the model is to continue, beside prompts that it draws itself; ``given``: texts to judge as well.
    ``source``: what ``load_model`` loaded, read again for the layers that the adapter starts as; ``start_from``: an
    adapter to start as instead, whose exit, layers and words stay; ``weights``: what its matrices are written as, one
    of ops.reference.BLOCK_TYPES (None: the model's dtype). The adapter, its ``layerskip.json`` and what was
    found (``adapt.json``) go into ``output``, all else into ``output / "training"``. Raises ValueError where ``output``
    holds a training of something else or another process trains there, and for exits that the model does not have.
    """
    if weights is not None:  # refused before anything is trained
        check_adapter_weights(adapter_shapes(model.config, 1, 1), weights)
    check_int("seed", settings.seed, 0, MOST_SEED)
    kept = output / "training"
    kept.mkdir(parents=True, exist_ok=True)
    with only_one(kept):
        return _adapt(model, source, output, settings, prompts, given, start_from, weights)


def _adapt(
    model: Model,
    source: Any,
    output: Path,
    settings: AdaptSettings,
    prompts: Sequence[str],
    given: Sequence[str],
    start_from: Path | None,
    weights: str | None,
) -> dict[str, Any]:
    start = words = None
    if start_from is not None:
        exit_layer, start = read_exit_adapter(start_from, model.config, torch.float32, model.name, model.weights)
        start = adapter_numbers(start)
        words = start.pop(HEAD_IDS).tolist() if HEAD_IDS in start else None
        settings = replace(settings, exits=(exit_layer,), adapter_layers=(adapter_kind(start),))
    exits = settings.exits or default_exits(model.config.num_layers)
    for exit_layer in exits:
        model.check_exit(exit_layer)
    norms = hashlib.sha256(model_norms(model.weights).view(torch.uint8).numpy().tobytes()).hexdigest()
    made_from: Origin = {"model": model.name, "norms": norms, "dtype": str(model.dtype)}
    made_from |= {"prompts": list(prompts), "given": list(given)}
    made_from |= {"start_from": start_from and str(start_from), **json.loads(json.dumps(asdict(settings)))}
    kept = output / "training"
    written = kept / "texts"
    check_checkpoints(kept, written if written.exists() else None, made_from)  # states and choice follow from texts
    show = sys.stderr.isatty()
    encode = model.tokenizer.encode if model.tokenizer is not None else None
    ids = [encode(prompt) for prompt in prompts] if encode is not None else []
    length, seed = settings.max_new_tokens, settings.seed
    texts = write_texts(model, ids, written, settings.num_tokens, length, seed, show)
    others, last = pieces(model, given), model.config.num_layers
    states = ExitStates(model, {*exits, last}, [*(text.tokens for text in texts), *others], kept, show)
    at_end = (states.at(last, i) for i in range(len(texts), len(texts) + len(others)))
    texts += judged_texts(model, others, at_end, kept / "given.jsonl")
    say(f"{sum(text.num_targets for text in texts):,} tokens in {len(texts):,} texts")
    deepest = max(map(num_adapter_layers, settings.adapter_layers))
    own = OwnWeights(source, {e + n for e in exits for n in range(deepest)}, start)
    sizes = None if words is None else [len(words)]
    words = words or _frequent_words(texts, settings.most_words)
    choice_file = kept / "choice.json"
    if not choice_file.exists():
        costs = measure_costs(model, texts[0].tokens)
        found = list(_tried(own, texts, states, words, sizes or _sizes(len(words)), exits, settings, costs))
        write_whole(choice_file, json.dumps([asdict(candidate) for candidate in found]) + "\n")
    candidates = read_choice(choice_file, model.config.num_layers, len(words))
    chosen = max(candidates, key=lambda candidate: candidate.speed_up)
    say(_table(candidates, chosen))
    vocab = sorted(words[: chosen.num_words])
    training = AdapterTraining(own, texts, states, vocab, chosen.exit_layer, chosen.num_layers, settings)
    training.run(kept / "state.safetensors")
    return _export(model, training, chosen, vocab, output, weights)


def default_exits(num_layers: int) -> tuple[int, ...]:
    """A fifteenth, an eighth and a quarter of the layers."""
    return tuple(sorted({max(1, round(num_layers * part)) for part in (1 / 15, 1 / 8, 1 / 4)} - {num_layers}))


def _frequent_words(texts: Sequence[Text], most: int) -> list[int]:
    """What the model says in the texts, the most frequent first."""
    counts = Counter(target for text in texts for target in text.targets if target != NOT_ASKED)
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]


def _sizes(most: int) -> list[int]:
    """Of a draft vocabulary, to be tried."""
    return [2**n for n in range(9, 20) if 2**n < most] + [most]


def _tried(
    own: OwnWeights,
    texts: Sequence[Text],
    states: ExitStates,
    words: Sequence[int],
    sizes: Sequence[int],
    exits: Sequence[int],
    settings: AdaptSettings,
    costs: StepCosts,
) -> Iterator[Candidate]:
    """Train each exit with each kind of layers for a short while; with each size of draft vocabulary, what it
    promises."""
    for exit_layer in exits:
        for kind in settings.adapter_layers:
            training = AdapterTraining(own, texts, states, words, exit_layer, kind, settings)
            for _ in range(settings.pilot_steps):
                training.take_step(settings.pilot_steps)
            for size in sizes:
                acceptance = training.acceptance(size)
                depth, attending = exit_layer + adapter_depth(own.config, kind), 0 if kind == MLP else int(kind)
                gain, count = costs.speed_up(acceptance, depth, size, attending)
                yield Candidate(exit_layer, kind, size, acceptance, gain, count)
            say(f"exit {exit_layer}, layers {kind}: {acceptance:.1%} of held-out drafts right after a trial")


def read_choice(path: Path, num_layers: int, num_words: int) -> list[Candidate]:
    """The candidates of a file. Raises ValueError naming the field that is damaged, and what to do."""
    try:
        entries = read_json(path)
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{path} must hold a JSON list of candidates, got {shown(entries)}")
        return [_candidate(json_object(entry, str(path)), num_layers, num_words) for entry in entries]
    except ValueError as error:
        raise ValueError(f"{error}; delete {path} to have it made again") from error


def _candidate(said: JsonObject, num_layers: int, num_words: int) -> Candidate:
    acceptance = said.required("acceptance")
    if type(acceptance) not in (int, float) or not 0 <= acceptance <= 1:
        said.refuse("acceptance", "a number in 0..1")
    is_mlp = said.get("num_layers") == MLP
    return Candidate(
        exit_layer=said.integer("exit_layer", 1, num_layers - 1),
        num_layers=MLP if is_mlp else said.integer("num_layers", 0, num_layers),
        num_words=said.integer("num_words", 1, num_words),
        acceptance=acceptance,
        speed_up=said.positive("speed_up"),
        num_speculations=said.integer("num_speculations", 0),
    )


def _table(candidates: Sequence[Candidate], chosen: Candidate) -> str:
    lines = ["exit  layers  words  right  predicted speed-up"]
    for c in candidates:
        mark = "  <- chosen" if c == chosen else ""
        lines.append(
            f"{c.exit_layer:4}  {c.num_layers:>6}  {c.num_words:5}  {c.acceptance:5.1%}  {c.speed_up:.2f} with "
            f"{c.num_speculations} drafts{mark}"
        )
    return "\n".join(lines)


def _export(
    model: Model, training: AdapterTraining, chosen: Candidate, vocab: Sequence[int], output: Path, weights: str | None
) -> dict[str, Any]:
    """Write the best adapter with its defaults, and say what it does on held-out texts."""
    tensors = {name: tensor.to(model.dtype) for name, tensor in training.best.items()}
    ordered = {name: tensors[name] for name in adapter_shapes(model.config, chosen.num_layers, len(vocab))}
    ordered = ordered if weights is None else quantised_adapter(ordered, weights)
    ordered[HEAD_IDS] = torch.tensor(vocab, dtype=torch.int32)
    write_exit_adapter(output, chosen.exit_layer, ordered, model.name, model.weights)
    write_defaults(output, DraftDefaults(chosen.exit_layer))
    found = {**asdict(chosen), "acceptance": max(training.acceptances), "steps": training.step}
    write_whole(output / "adapt.json", json.dumps(found) + "\n")
    return found
