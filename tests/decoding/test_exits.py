"""What each layer would say is what decoding says: layer L as generate does, layer E as draft_step does."""

import pytest
import torch

from layerskip_kernels import GenerationConfig, Model, draft_step, generate, prefill
from layerskip_kernels.decoding import exits
from layerskip_kernels.decoding.exits import each_exit
from support.exit_adapters import own_checkpoint, random_adapter
from support.models import SMALL, cache_for, random_tokens, tiny_model

PROMPT = random_tokens(9)


def columns(
    model: Model, text: list[int], start: int = 0, **asked: object
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Tokens [n] and logits [n, V] by layer."""
    found: dict[int, list] = {}
    for rows in each_exit(model, text, start, **asked):
        assert rows.position == start + sum(len(run.tokens) for run in found.get(rows.layer, []))
        found.setdefault(rows.layer, []).append(rows)
    return {
        layer: (torch.cat([run.tokens for run in runs]), torch.cat([run.logits for run in runs]))
        for layer, runs in found.items()
    }


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_last_layer_says_what_generate_says(backend, dtype):
    model = tiny_model(dtype, backend)
    config = GenerationConfig("autoregressive", max_new_tokens=12, eos_token_ids=(), return_logits=True)
    [generation] = generate(model, [PROMPT], config)
    tokens, logits = columns(model, PROMPT + generation.token_ids[:-1], len(PROMPT) - 1)[3]
    assert tokens.tolist() == generation.token_ids
    assert torch.equal(logits, generation.logits)


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_exit_e_says_what_draft_step_drafts_there(exit_layer):
    model = tiny_model()
    text = random_tokens(14, seed=3)
    said, _ = columns(model, text)[exit_layer]
    drafted = []
    for length in range(1, len(text) + 1):
        cache = cache_for(model, length + 1)
        sequence = cache.add_sequence(text[:length])
        if length > 1:  # all but the last token go through all layers, as in decoding
            sequence.tokens = text[: length - 1]
            cache.commit(prefill(model, cache, [sequence]))
            sequence.tokens[:] = text[:length]
        drafted.append(draft_step(model, cache, [sequence], exit_layer, 1).of(0)[0])
    assert said.tolist() == drafted
    assert said.tolist() != columns(model, text)[3][0].tolist()  # or this would show nothing


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize(("num_layers", "every"), [(1, 0), (2, 2), (0, 1)])
def test_an_adapter_says_what_draft_step_drafts_through_it(backend, num_layers, every, monkeypatch):
    """After positions whose K and V of the adapter come from a prefill, from the run before, and from the same run."""
    if backend == "triton" and every != 2:
        pytest.skip("one of them, interpreted")
    sizes = SMALL if backend == "triton" else {}
    plain = Model.from_checkpoint(own_checkpoint(torch.bfloat16, **sizes), backend)
    tensors = own_checkpoint(torch.bfloat16, **sizes).tensors
    lm_head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]) if every else None
    model = plain.with_exit_adapter(2, random_adapter(plain, num_layers, lm_head=lm_head, every=every or 1))
    text, start = random_tokens(9, seed=3), 4
    monkeypatch.setattr(exits, "EXIT_ROWS", 3)
    rows = list(each_exit(model, text, start, adapters=True))
    layers = [(1, False), (2, False), (2, True), (3, False)]
    assert [(run.layer, run.adapted) for run in rows] == layers * 2
    bare = list(each_exit(model, text, start))
    assert [run.layer for run in bare] == [1, 2, 3] * 2
    for run, other in zip([run for run in rows if not run.adapted], bare, strict=True):
        assert torch.equal(run.tokens, other.tokens) and torch.equal(run.logits, other.logits)
    said = torch.cat([run.tokens for run in rows if run.adapted])
    logits = torch.cat([run.logits for run in rows if run.adapted])
    head = model.exit_at(2).head
    words = range(101) if head is None else head.ids
    others = sorted({*range(101)} - {int(word) for word in words})
    assert torch.equal(logits.argmax(-1), said) and (logits[:, others] == -torch.inf).all()
    assert logits[:, list(words)].isfinite().all()
    for at in range(start, len(text), 2):
        cache = cache_for(model, len(text) + 1)
        sequence = cache.add_sequence(text[:at])
        cache.commit(prefill(model, cache, [sequence]))
        sequence.tokens[:] = text[: at + 1]
        assert draft_step(model, cache, [sequence], 2, 1).of(0) == [said[at - start]]


@pytest.mark.parametrize("start", [0, 1, 5, 12])
def test_runs_of_rows_change_nothing(monkeypatch, start):
    model, text = tiny_model(), random_tokens(13, seed=1)
    whole = columns(model, text)
    monkeypatch.setattr(exits, "EXIT_ROWS", 3)
    for layer, (tokens, logits) in columns(model, text, start).items():
        assert torch.equal(tokens, whole[layer][0][start:])
        assert torch.equal(logits, whole[layer][1][start:])


def test_some_exits_alone(monkeypatch):
    model, text = tiny_model(), random_tokens(13, seed=1)
    whole = columns(model, text)
    monkeypatch.setattr(exits, "EXIT_ROWS", 4)
    for asked in ([2], [3], [1, 3]):
        some = columns(model, text, exits=asked)
        assert list(some) == asked
        assert all(torch.equal(some[layer][1], whole[layer][1]) for layer in asked)


def test_a_draft_vocabulary_does_not_restrict_what_layers_say():
    model, text = tiny_model(), random_tokens(7)
    plain, restricted = columns(model, text), columns(model.with_draft_vocab([1, 2]), text)
    assert all(torch.equal(plain[layer][1], restricted[layer][1]) for layer in plain)


@pytest.mark.parametrize(("start", "asked"), [(-1, None), (4, None), (0, [0]), (0, [4]), (0, [])])
def test_what_is_not_there_is_refused(start, asked):
    with pytest.raises(ValueError, match=r"must be"):
        list(each_exit(tiny_model(), [1, 2, 3, 4], start, asked))
