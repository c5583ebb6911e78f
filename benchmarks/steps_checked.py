"""The bits of the two steps, compared before they are timed.

Two layers of the small shape against the reference (which takes a second for a row of all 30), and a cycle of the
large one against plain decoding: row invariance. Each comparison is made once.
"""

from functools import cache

import torch

from conftest import MAX_ROWS
from layerskip_kernels import Draft, Model, draft_step, verify_step
from layerskip_kernels.evaluation.step_bench import prompt_tokens, same_bits
from shapes import SHAPES, filled_cache, random_model

CONTEXT = 20


def exit_layer(model: Model) -> int:
    """A third of the layers, the package's default."""
    return max(1, model.config.num_layers // 3)


def check_draft(model: Model, num_sequences: int) -> None:
    if SHAPES[model.name].hidden_size < 1024:
        assert _draft_equals_reference(model.name, num_sequences), "draft_step differs from the reference"
    else:
        check_verify(model, MAX_ROWS // 2)


def check_verify(model: Model, rows: int) -> None:
    if SHAPES[model.name].hidden_size < 1024:
        assert _verify_equals_reference(model.name, rows - 1), "verify_step differs from the reference"
    else:
        assert _same_bits(model.name, max(1, rows - 1)), "a cycle differs from plain decoding"


@cache
def _draft_equals_reference(shape: str, num_sequences: int) -> bool:
    results = []
    for backend in ("cpu", "reference"):
        model = random_model(shape, num_layers=2, backend=backend)
        kv, sequences = filled_cache(model, CONTEXT, num_sequences, room=1)
        draft = draft_step(model, kv, sequences, exit_layer=1, num_speculations=1)
        results.append((draft.tokens, kv.k, kv.v))
    return _equal(*results)


@cache
def _verify_equals_reference(shape: str, num_drafts: int) -> bool:
    results = []
    for backend in ("cpu", "reference"):
        model = random_model(shape, num_layers=2, backend=backend)
        kv, sequences = filled_cache(model, CONTEXT, 1, room=num_drafts + 1)
        draft = Draft.none(sequences) if num_drafts == 0 else draft_step(model, kv, sequences, 1, num_drafts)
        verdict = verify_step(model, kv, draft)
        results.append((draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits, kv.k, kv.v))
    return _equal(*results)


def _equal(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@cache
def _same_bits(shape: str, num_drafts: int) -> bool:
    model = cached_model(shape)
    return same_bits(model, prompt_tokens(model, CONTEXT), exit_layer(model), num_drafts)


@cache
def cached_model(shape: str) -> Model:
    """The whole model of a shape, made once."""
    return random_model(shape)
