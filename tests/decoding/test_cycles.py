"""Several cycles in one call into the backend: the tokens, verdicts, K and V of as many calls."""

import pytest
import torch

from layerskip_kernels import Draft, draft_step, prefill, verify_step
from layerskip_kernels.decoding import steps
from layerskip_kernels.decoding.steps import decode_cycles
from layerskip_kernels.operands import DraftStops
from layerskip_kernels.ops.cpu import CpuOps
from layerskip_kernels.ops.reference import ReferenceOps
from support.exit_adapters import random_adapter
from support.models import agreeing_model, cache_for, early_model, random_tokens

LENGTHS = (9, 1, 20)
NO_ENDS = ((), (), ())


def begun(model):
    """Three sequences after their prompts."""
    cache = cache_for(model, 400)
    sequences = [cache.add_sequence(random_tokens(length, seed=length)) for length in LENGTHS]
    cache.commit(prefill(model, cache, sequences))
    return cache, sequences


def in_one_call(model, counts, num_cycles, ends=NO_ENDS, stops=None, exit_layer=1):
    cache, sequences = begun(model)
    cycles = decode_cycles(model, cache, sequences, exit_layer, counts, num_cycles, ends, stops)
    verdicts = [verdict for verdict, *_ in cycles]
    cache.commit(*verdicts)
    assert all(min(seconds) >= 0 and seconds[1] > 0 for _, *seconds in cycles)
    return cache, sequences, verdicts


def in_calls(model, counts, num_cycles, stops=None, exit_layer=1):
    cache, sequences = begun(model)
    verdicts = []
    for _ in range(num_cycles):
        drafting = [s for s, count in zip(sequences, counts, strict=True) if count]
        parts = []
        if drafting:
            parts = [draft_step(model, cache, sequences, exit_layer, counts, stops=stops)]
        verdicts.append(verify_step(model, cache, Draft.joined(sequences, parts)))
        cache.commit(verdicts[-1])
    return cache, sequences, verdicts


def assert_same(one, other):
    (cache, sequences, verdicts), (others_cache, others_sequences, others_verdicts) = one, other
    assert [s.tokens for s in sequences] == [s.tokens for s in others_sequences]
    for sequence, others in zip(sequences, others_sequences, strict=True):
        assert cache.length(sequence) == len(sequence.tokens) - 1 == others_cache.length(others)
        for kept, others_kept in zip(cache.export(sequence), others_cache.export(others), strict=True):
            assert torch.equal(kept, others_kept)
    for verdict, others_verdict in zip(verdicts, others_verdicts, strict=True):
        assert verdict.accepted == others_verdict.accepted
        for b in range(len(LENGTHS)):
            assert verdict.new_tokens(b) == others_verdict.new_tokens(b)
            assert verdict.draft.of(b) == others_verdict.draft.of(b)
            assert list(verdict.draft.confidences.get(b, [])) == list(others_verdict.draft.confidences.get(b, []))
    cache.check_integrity()


def adapted(model, kind):
    return model if kind is None else model.with_exit_adapter(1, random_adapter(model, kind))


@pytest.mark.parametrize("kind", [None, 1, "mlp"])
@pytest.mark.parametrize("counts", [(0, 0, 0), (3, 0, 1), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_same_as_in_calls_of_their_own(dtype, backend, counts, kind):
    model = adapted(agreeing_model(dtype, backend), kind)
    one = in_one_call(model, counts, 5)
    assert_same(one, in_calls(adapted(agreeing_model(dtype), kind), counts, 5))
    accepted = sum(sum(verdict.accepted) for verdict in one[2])
    assert len(one[2]) == 5 and (accepted > 0) == (sum(counts) > 0)


def test_the_same_with_a_draft_vocabulary_and_stops(dtype, isa):
    model = agreeing_model(dtype).with_draft_vocab(range(0, 101, 2))
    rule = DraftStops(torch.tensor([0.3]), torch.tensor([[0.2, 0.9]]).repeat(3, 1), torch.full((3, 4), 0.5))
    counts = (4, 4, 2)
    one = in_one_call(model, counts, 4, stops=rule)
    assert_same(one, in_calls(model, counts, 4, stops=rule))
    drafted = [verdict.draft.counts for verdict in one[2]]
    assert any(count < most for counted in drafted for count, most in zip(counted, counts, strict=True))


@pytest.mark.parametrize("ops", [CpuOps, ReferenceOps])
@pytest.mark.parametrize("counts", [(0, 0, 0), (2, 2, 2)], ids=str)
def test_a_token_that_ends_a_text_ends_the_call(ops, counts, monkeypatch):
    monkeypatch.setattr(CpuOps, "decode_pass", ops.decode_pass)
    model = early_model()  # all drafts are right, so that ends are among drafts, too
    *_, verdicts = in_one_call(model, counts, 6)
    gained = [token for verdict in verdicts for token in verdict.new_tokens(1)]
    for at in (1, 2, 3):
        if gained[at] in gained[:at]:
            continue
        *_, ended = in_one_call(model, counts, 6, ends=((), (gained[at], 101, 5000), ()))
        expected = next(n for n, verdict in enumerate(verdicts, 1) if gained[at] in verdict.new_tokens(1))
        assert len(ended) == expected < 6
        assert [v.new_tokens(0) for v in ended] == [v.new_tokens(0) for v in verdicts[:expected]]


def test_what_cannot_be_is_refused():
    model = agreeing_model()
    cache, sequences = begun(model)
    before = [cache.pool.length(s.id) for s in sequences]
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.\d, got 9"):
        decode_cycles(model, cache, sequences, 9, (1, 1, 1), 2, NO_ENDS)
    most = model.config.max_positions
    with pytest.raises(ValueError, match=f"would pass the model's {most} positions"):
        decode_cycles(model, cache, sequences, 1, (0, 0, 0), most, NO_ENDS)
    fresh = cache.add_sequence([3, 4, 5])
    with pytest.raises(ValueError, match="call prefill and commit its verdict"):
        decode_cycles(model, cache, [fresh], 1, (0,), 2, ((),))
    assert [cache.pool.length(s.id) for s in sequences] == before


def test_a_call_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    model = agreeing_model()
    cache, sequences = begun(model)
    before = [cache.pool.length(s.id) for s in sequences]
    weights = model.weights.lm_head.clone()
    model.weights.lm_head.fill_(torch.nan)
    try:
        with pytest.raises(RuntimeError, match="NaN"):
            decode_cycles(model, cache, sequences, 1, (2, 2, 2), 3, NO_ENDS)
    finally:
        model.weights.lm_head.copy_(weights)
    assert [cache.pool.length(s.id) for s in sequences] == before
    assert steps.decode_cycles(model, cache, sequences, 1, (2, 2, 2), 3, NO_ENDS)
    cache.check_integrity()
