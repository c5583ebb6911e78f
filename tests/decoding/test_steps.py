"""run_layers, draft_step, verify_step: against the reference, in any order of moves, and undone without a trace."""

from dataclasses import replace

import pytest
import torch

from layerskip_kernels import CacheFull, Draft, PagedKVCache, draft_step, prefill, verify_step
from layerskip_kernels.operands import PendingRows
from support.models import cache_for, random_tokens, threads, tiny_model


def caches_equal(a: PagedKVCache, b: PagedKVCache, sequence) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.export(sequence), b.export(sequence), strict=True))


def prefilled(model, prompt, page_size=16):
    cache = cache_for(model, len(prompt) + 40, page_size)
    sequence = cache.add_sequence(prompt)
    cache.commit(prefill(model, cache, [sequence]))
    return cache, sequence


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "out_bias": True}, {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_a_cycle_equals_the_reference(dtype, isa, changes, page_size):
    verdicts, exports = [], []
    for backend in ("cpu", "reference"):
        model = tiny_model(dtype, backend, **changes)
        cache, sequence = prefilled(model, random_tokens(20), page_size)
        draft = draft_step(model, cache, [sequence], exit_layer=2, num_speculations=3)
        verdict = verify_step(model, cache, draft)
        cache.commit(verdict)
        verdicts.append(verdict)
        exports.append(cache.export(sequence))
    cpu, reference = verdicts
    assert torch.equal(cpu.draft.tokens, reference.draft.tokens)
    assert torch.equal(cpu.num_accepted, reference.num_accepted)
    assert torch.equal(cpu.next_tokens, reference.next_tokens)
    assert torch.equal(cpu.logits, reference.logits)
    for a, b in zip(*exports, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_a_ragged_batch_equals_the_reference(dtype):
    """Unlike lengths and unlike drafts, one sequence without any."""
    verdicts = []
    for backend in ("cpu", "reference"):
        model = tiny_model(dtype, backend)
        cache = cache_for(model, 500, page_size=7)
        sequences = [cache.add_sequence(random_tokens(n, seed=n)) for n in (3, 40, 270)]
        cache.commit(prefill(model, cache, sequences))
        verdicts.append(verify_step(model, cache, draft_step(model, cache, sequences, 1, [4, 0, 2])))
    cpu, reference = verdicts
    assert torch.equal(cpu.draft.tokens, reference.draft.tokens)
    assert torch.equal(cpu.next_tokens, reference.next_tokens)
    assert torch.equal(cpu.logits, reference.logits)
    assert cpu.draft.tokens[1].tolist() == [-1] * 4


def test_how_a_prompt_is_cut_does_not_matter(dtype):
    """One pass, token by token, or any staircase of moves: the same K, V and logits."""
    model, prompt = tiny_model(dtype), random_tokens(30)
    whole, sequence = prefilled(model, prompt)

    one_by_one = cache_for(model, 70)
    stepwise = one_by_one.add_sequence(prompt[:1])
    for following in [*prompt[1:], None]:
        verdict = verify_step(model, one_by_one, Draft.none([stepwise]))
        one_by_one.commit(verdict)
        if following is not None:
            stepwise.tokens[-1] = following
    assert stepwise.tokens == sequence.tokens
    assert caches_equal(whole, one_by_one, sequence)


def test_a_chunk_of_a_prompt_beside_a_draft(dtype):
    """One pass raises both; the chunk is not judged; either ends with the bits it has alone."""
    results = []
    for backend in ("cpu", "reference"):
        model, prompt = tiny_model(dtype, backend), random_tokens(30, seed=1)
        cache = cache_for(model, 150, page_size=7)
        old, new = cache.add_sequence(random_tokens(20)), cache.add_sequence(prompt)
        cache.commit(prefill(model, cache, [old]))
        drafted = draft_step(model, cache, [old], exit_layer=2, num_speculations=3)
        verdict = verify_step(model, cache, Draft.joined([new, old], [drafted], [13, 0]))
        cache.commit(verdict)
        assert (cache.length(new), verdict.new_tokens(0), verdict.new_logits(0).numel()) == (17, [], 0)
        cache.commit(verify_step(model, cache, Draft.joined([new], [], [1])))
        assert (cache.length(new), new.tokens) == (29, prompt)
        cache.commit(verify_step(model, cache, Draft.none([new])))
        results.append((old.tokens, new.tokens, verdict.logits, *cache.export(old), *cache.export(new)))
        for sequence, first in ((old, random_tokens(20)), (new, prompt)):
            alone, other = prefilled(model, first, page_size=7)
            while len(other.tokens) < len(sequence.tokens):
                alone.commit(verify_step(model, alone, Draft.none([other])))
            assert other.tokens == sequence.tokens
            assert all(torch.equal(x, y) for x, y in zip(alone.export(other), cache.export(sequence), strict=True))
    cpu, reference = results
    assert cpu[:2] == reference[:2]
    assert all(torch.equal(a, b) for a, b in zip(cpu[2:], reference[2:], strict=True))


def test_rows_may_climb_in_any_order(dtype):
    """Two rows at depth 2, one at 1, one at 0: verification ends where one straight pass ends."""
    model, prompt = tiny_model(dtype), random_tokens(4)
    straight, sequence = prefilled(model, prompt)
    climbing = cache_for(model, 44)
    other = climbing.add_sequence(prompt)
    climbing.pool.append([other.id], [4])
    table = torch.from_numpy(climbing.pool.block_table([other.id]))
    for rows, depth, stop in ((3, 0, 1), (2, 1, 2)):
        pending = PendingRows(
            tokens=torch.tensor(prompt[:rows]),
            positions=torch.arange(rows),
            depths=torch.full((rows,), depth, dtype=torch.int32),
            query_start_loc=torch.tensor([0, rows]).int(),
            block_table=table,
        )
        model.ops.run_layers(model.weights, model.sizes, climbing.tensors, pending, stop)
        climbing.pool.raise_rows([other.id], [rows], stop)
    assert climbing.pool.depths(other.id) == [2, 2, 1, 0]
    climbing.commit(verify_step(model, climbing, Draft.none([other])))
    assert other.tokens == sequence.tokens
    assert caches_equal(straight, climbing, sequence)


def test_verification_never_recomputes_a_drafted_layer():
    """After a draft, the early layers' K is overwritten: only the last draft's own row comes back."""
    model = tiny_model()
    cache, sequence = prefilled(model, random_tokens(10))
    draft = draft_step(model, cache, [sequence], exit_layer=2, num_speculations=3)
    page, offset = cache.pool.pages(sequence.id)[0], 10
    cache.k[:2, page, :, :, offset : offset + 4] = 0
    verify_step(model, cache, draft)
    assert not cache.k[:2, page, :, :, offset : offset + 3].any()
    assert cache.k[:2, page, :, :, offset + 3].any()
    assert cache.k[2, page, :, :, offset : offset + 4].any(dim=0).any(dim=0).all()


def test_rejected_drafts_leave_no_trace(dtype):
    """Rollback: the committed cache equals one that never drafted, and so does everything after it."""
    model, prompt = tiny_model(dtype), random_tokens(20)
    drafted, sequence = prefilled(model, prompt, page_size=7)
    for exit_layer in (1, 2):
        draft = draft_step(model, drafted, [sequence], exit_layer, num_speculations=8)
        wrong = (draft.tokens + 1) % model.config.vocab_size
        drafted.commit(verify_step(model, drafted, replace(draft, tokens=wrong)))
    plain, other = prefilled(model, prompt, page_size=7)
    while len(other.tokens) < len(sequence.tokens):
        plain.commit(verify_step(model, plain, Draft.none([other])))
    assert sequence.tokens == other.tokens
    assert caches_equal(drafted, plain, sequence)
    assert drafted.pool.num_free == plain.pool.num_free
    drafted.pool.check_integrity()


def test_threads_do_not_matter(dtype):
    outcomes = []
    for count in (1, 2, 3, 8):
        with threads(count):
            model = tiny_model(dtype)
            cache, sequence = prefilled(model, random_tokens(300))
            verdict = verify_step(model, cache, draft_step(model, cache, [sequence], 1, 5))
            outcomes.append((verdict.draft.tokens, verdict.logits, *cache.export(sequence)))
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))


# ---- a draft vocabulary ----


def test_a_draft_vocabulary_bounds_the_drafts_only(dtype, isa):
    """Drafts come from the list, chosen as the reference chooses; what is verified stays the full model's."""
    allowed, prompt = range(1, 101, 4), random_tokens(20)
    verdicts = []
    for backend in ("cpu", "reference"):
        model = tiny_model(dtype, backend).with_draft_vocab(allowed)
        cache, sequence = prefilled(model, prompt)
        verdicts.append(verify_step(model, cache, draft_step(model, cache, [sequence], 2, 5)))
    cpu, reference = verdicts
    assert torch.equal(cpu.draft.tokens, reference.draft.tokens)
    assert set(cpu.draft.of(0)) <= set(allowed)
    model = tiny_model(dtype)
    plain_cache, plain = prefilled(model, prompt)
    unbounded = draft_step(model, plain_cache, [plain], 2, 5)
    assert unbounded.of(0) != cpu.draft.of(0), "the list must have mattered"
    assert torch.equal(cpu.logits[0], verify_step(model, plain_cache, unbounded).logits[0])


def test_a_draft_vocabulary_of_everything_changes_nothing(dtype):
    drafts = []
    for model in (tiny_model(dtype), tiny_model(dtype).with_draft_vocab(range(101))):
        cache, sequence = prefilled(model, random_tokens(20))
        drafts.append(draft_step(model, cache, [sequence], 2, 5).tokens)
    assert torch.equal(*drafts)


@pytest.mark.parametrize("ids", [[], [-1, 3], [101]])
def test_bad_draft_vocabularies(ids):
    with pytest.raises(ValueError, match=r"draft_vocab must be token ids in 0\.\.100"):
        tiny_model().with_draft_vocab(ids)


# ---- bad input: a clear error, and the cache as before ----


@pytest.fixture
def ready():
    model = tiny_model()
    return model, *prefilled(model, random_tokens(20))


def unchanged(cache, sequence):
    cache.pool.check_integrity()
    return cache.pool.length(sequence.id) == cache.length(sequence) == 20 and len(sequence.tokens) == 21


@pytest.mark.parametrize("exit_layer", [-1, 0, 3, 99])
def test_exit_layer_outside_the_model(ready, exit_layer):
    model, cache, sequence = ready
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.2"):
        draft_step(model, cache, [sequence], exit_layer, 3)
    assert unchanged(cache, sequence)


@pytest.mark.parametrize("count", [0, -1, [0], [-1], [1, 1]])
def test_counts_that_draft_nothing(ready, count):
    model, cache, sequence = ready
    with pytest.raises(ValueError, match="num_speculations must"):
        draft_step(model, cache, [sequence], 1, count)
    assert unchanged(cache, sequence)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([5, 101], "token 1 is 101, outside"),
        ([-1], "token 0 is -1, outside"),
        ([1] * 1025, "has 1025 tokens"),
    ],
)
def test_bad_prompts(ready, prompt, message):
    _, cache, sequence = ready
    with pytest.raises(ValueError, match=message):
        cache.add_sequence(prompt)
    assert unchanged(cache, sequence)


def test_a_full_cache(ready):
    model, cache, sequence = ready
    with pytest.raises(CacheFull, match="pages"):
        draft_step(model, cache, [sequence], 1, 100)
    assert unchanged(cache, sequence)
    big = cache.add_sequence(random_tokens(500))
    with pytest.raises(CacheFull) as error:
        prefill(model, cache, [big])
    assert error.value.needed > error.value.free
    assert unchanged(cache, sequence)
    cache.commit(verify_step(model, cache, draft_step(model, cache, [sequence], 1, 3)))


@pytest.mark.parametrize("sharing", [False, True], ids=["alone", "sharing"])
def test_a_prefill_that_fails_half_way_leaves_the_cache_as_it_was(sharing):
    """Its first runs of 256 rows are committed when pages run short in a later one."""
    model, prompt = tiny_model(), random_tokens(700)
    cache = cache_for(model, 620, prefix_sharing=sharing)
    first = cache.add_sequence([*prompt[:64], 5])
    cache.commit(prefill(model, cache, [first]))
    shared = 64 if sharing else 0
    text, other = cache.add_sequence(prompt), cache.add_sequence(random_tokens(40, seed=1))
    pages, before = cache.pool.pages(text.id), cache.stats()
    assert cache.length(text) == shared
    committed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedKVCache, "commit", lambda self, verdict, commit=PagedKVCache.commit: (
            commit(self, verdict), committed.append(self.length(text))))  # fmt: skip
        with pytest.raises(CacheFull):
            prefill(model, cache, [text, other])
    assert committed == [shared + 256, shared + 512], "it did not fail half way"
    assert text.tokens == prompt and cache.length(text) == cache.pool.length(text.id) == shared
    assert cache.pool.pages(text.id) == pages and cache.length(other) == 0
    after = cache.stats()
    assert (after.num_owned, after.num_shared) == (before.num_owned, before.num_shared)
    assert after.num_free + after.num_cached == before.num_free + before.num_cached
    cache.check_integrity()
    for sequence in (text, other, first):
        cache.free(sequence)
    assert cache.num_free_pages == cache.pool.num_pages


def test_what_a_failed_prefill_computed_is_found_by_the_next():
    """With prefix sharing its pages stay in the cache until they are needed; the bits are those of another cache."""
    model, prompt = tiny_model(), random_tokens(600)
    cache = cache_for(model, 608, prefix_sharing=True)
    blocker = cache.add_sequence([1] * 64)
    cache.commit(prefill(model, cache, [blocker]))
    with pytest.raises(CacheFull):
        prefill(model, cache, [cache.add_sequence(prompt)])
    cache.free(blocker)
    text = cache.add_sequence(prompt)
    assert cache.length(text) >= 256
    cache.commit(prefill(model, cache, [text]))
    alone = cache_for(model, 608)
    expected = alone.add_sequence(prompt)
    alone.commit(prefill(model, alone, [expected]))
    assert all(map(torch.equal, cache.export(text), alone.export(expected)))


def test_drafting_before_prefill(ready):
    model, cache, _ = ready
    fresh = cache.add_sequence([1, 2, 3])
    with pytest.raises(ValueError, match="call prefill"):
        draft_step(model, cache, [fresh], 1, 3)


def test_drafting_beyond_the_model_positions():
    model = tiny_model(max_positions=24)
    cache, sequence = prefilled(model, random_tokens(20))
    with pytest.raises(ValueError, match="24 positions"):
        draft_step(model, cache, [sequence], 1, 4)
    draft_step(model, cache, [sequence], 1, 3)


def test_nan_in_the_middle_of_a_step(ready):
    """A backend's error leaves the cache and the model usable."""
    model, cache, sequence = ready
    norm = model.weights.final_norm
    kept = norm.clone()
    for step in (
        lambda: draft_step(model, cache, [sequence], 1, 3),
        lambda: verify_step(model, cache, Draft.none([sequence])),
    ):
        norm.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="NaN"):
            step()
        norm.copy_(kept)
        assert unchanged(cache, sequence)
    cache.commit(verify_step(model, cache, draft_step(model, cache, [sequence], 1, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokens=torch.tensor([1, 2, 101])), r"tokens\[2\] is 101"),
        (dict(positions=torch.tensor([0, 1, 3])), "consecutive"),
        (dict(positions=torch.tensor([1022, 1023, 1024])), r"positions\[2\] is 1024"),
        (dict(depths=torch.tensor([0, 1, 0]).int()), "staircase"),
        (dict(depths=torch.tensor([4, 0, 0]).int()), "staircase"),
        (dict(query_start_loc=torch.tensor([0, 2]).int()), "query_start_loc must rise"),
        (dict(block_table=torch.tensor([[77]]).int()), r"block_table\[0\]\[0\] is 77"),
        (dict(stop=0), "stop is 0"),
        (dict(stop=4), "stop is 4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_run_layers_refuses(ready, change, message):
    model, cache, _ = ready
    arguments = dict(
        tokens=torch.tensor([1, 2, 3]),
        positions=torch.arange(3),
        depths=torch.zeros(3, dtype=torch.int32),
        query_start_loc=torch.tensor([0, 3]).int(),
        block_table=torch.tensor([[0]]).int(),
    )
    change = dict(change)
    stop = change.pop("stop", 3)
    before = [tensor.clone() for tensor in cache.tensors]
    with pytest.raises(ValueError, match=message):
        model.ops.run_layers(model.weights, model.sizes, cache.tensors, PendingRows(**(arguments | change)), stop)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, cache.tensors, strict=True))
