"""Drafts through an exit adapter: what a model of those layers says, beside a model that is bit for bit what it was."""

from dataclasses import replace

import pytest
import torch

from layerskip_kernels import (
    Draft,
    Engine,
    GenerationConfig,
    Model,
    PagedKVCache,
    draft_step,
    generate,
    make_sampler,
    prefill,
    verify_step,
)
from layerskip_kernels.errors import SwapError
from layerskip_kernels.model.exit_adapter import AdapterKind
from layerskip_kernels.model.quantise import quantise
from support.exit_adapters import all_kv, cut_model, greedy, lm_head, own_checkpoint, prefilled_kv, random_adapter
from support.generations import KEEP, all_free, alone, drafts_accepted, same_as_alone
from support.models import GPU, SMALL, cache_for, random_tokens

EXIT = 2
BACKENDS = ["reference", "cpu", "triton"]


def sizes_for(backend: str) -> dict[str, int]:
    return SMALL if backend == "triton" and not GPU else {}


def models(
    backend: str = "cpu", dtype=torch.bfloat16, kind: AdapterKind = 1, exit_layer: int = EXIT, head: bool = False
):
    """A model on the CPU, with an adapter on ``backend``, and the model on the CPU that drafts are to follow.

    ``head``: the adapter has a head of its own, of all tokens."""
    changes = sizes_for(backend)
    plain = Model.from_checkpoint(own_checkpoint(dtype, **changes))
    adapter = random_adapter(plain, kind, lm_head=lm_head(dtype, **changes) if head else None)
    cut = cut_model(own_checkpoint(dtype, **changes), exit_layer, adapter)
    own = plain if backend == "cpu" else Model.from_checkpoint(own_checkpoint(dtype, **changes), backend)
    return plain, own.with_exit_adapter(exit_layer, adapter), cut


def assert_cache_is_whole(cache: PagedKVCache, sequence, plain: Model, cut: Model, exit_layer: int = EXIT) -> None:
    """The model's own K and V are those without an adapter; the adapter's are those of the model that it makes."""
    k, v = all_kv(cache, sequence)
    known = sequence.tokens[: cache.length(sequence)]
    own, adapted = prefilled_kv(plain, known), prefilled_kv(cut, known)
    layers = plain.config.num_layers
    for got, expected, added in zip((k, v), own, adapted, strict=True):
        assert torch.equal(got[:layers], expected)
        kept = got.size(0) - layers  # none of an adapter without attention
        assert torch.equal(got[layers:], added[exit_layer : exit_layer + kept])


@pytest.mark.parametrize(
    ("backend", "kind", "head"),
    [
        (b, kind, h)
        for b in BACKENDS
        for kind, h in ((0, 0), (1, 0), (1, 1), (2, 1), ("mlp", 1))
        if b != "triton" or kind in (1, "mlp")
    ],
)
def test_drafts_are_the_cut_models_text_and_verdicts_the_whole_models(backend, kind, head):
    plain, adapted, cut = models(backend, kind=kind, head=bool(head))
    cache, accepted = cache_for(adapted, 60, page_size=7), 0
    sequence = cache.add_sequence(random_tokens(9))
    expected = alone(plain, list(sequence.tokens), GenerationConfig(max_new_tokens=10, **KEEP))
    cache.commit(prefill(adapted, cache, [sequence]))
    logits = []
    for _ in range(3):
        draft = draft_step(adapted, cache, [sequence], EXIT, 2)
        assert draft.of(0) == greedy(cut, sequence.tokens, 2)
        verdict = verify_step(adapted, cache, draft)
        logits.append(verdict.new_logits(0))
        accepted += int(verdict.num_accepted[0])
        cache.commit(verdict)
    new = sequence.tokens[9:]
    assert new == expected[0][: len(new)]
    assert torch.equal(torch.cat(logits).cpu(), expected[1][1 : len(new)].cpu())
    assert accepted > 0
    assert_cache_is_whole(cache, sequence, plain, cut)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_of_its_own_is_the_draft_vocabulary(backend):
    """Every third token; of these, a few; and other tokens are refused. Without the adapter, drafts are any again."""
    changes = sizes_for(backend)
    plain = Model.from_checkpoint(own_checkpoint(torch.bfloat16, **changes), backend)
    adapter = random_adapter(plain, lm_head=lm_head(torch.bfloat16, **changes), every=3)
    adapted = plain.with_exit_adapter(EXIT, adapter)
    ids = adapter["head.ids"].tolist()
    [adapter_there], head = adapted.exit_adapters, adapted.exit_at(EXIT).head
    assert head.ids.tolist() == ids and adapter_there.head is head
    assert adapted.with_draft_vocab(ids[:3]).with_draft_vocab(None).exit_at(EXIT).head is head
    every = replace(models(backend, head=True)[1], defaults=None)
    few = ids[1:9:2]
    for model, among in ((adapted, ids), (adapted.with_draft_vocab(few), few), (every.with_draft_vocab(few), few)):
        cache = cache_for(model, 20)
        sequence = cache.add_sequence(random_tokens(9))
        cache.commit(prefill(model, cache, [sequence]))
        drafts = draft_step(model, cache, [sequence], EXIT, 3).of(0)
        assert set(drafts) <= set(among)
        cache.commit(verify_step(model, cache, Draft.of_tokens([sequence], [drafts])))
    with pytest.raises(ValueError, match=r"draft_vocab must be among the \d+ tokens of the exit adapter's own head"):
        adapted.with_draft_vocab([0, 1])
    assert adapted.with_exit_adapters([]).exit_at(EXIT).head is None
    chosen = plain.with_draft_vocab(few).with_exit_adapter(EXIT, random_adapter(plain))
    for model in (chosen, chosen.with_exit_adapters([])):
        assert model.exit_at(EXIT).head.ids.tolist() == few and model.exit_at(model.config.num_layers).head is None


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("weights", ["q4_k", "int8"])
def test_a_head_of_16_bits_beside_quantised_weights(backend, weights):
    """The draft head is of its own type, whatever the LM head is: the drafts are the reference's, the text its own."""
    changes = {"hidden_size": 256, **sizes_for(backend)} if weights == "int8" else {"hidden_size": 256, "head_dim": 32}
    drafts = {}
    for name in ("reference", backend):
        plain = Model.from_checkpoint(own_checkpoint(torch.bfloat16, **changes), name, weights)
        own_head = lm_head(torch.bfloat16, **changes)
        adapted = plain.with_exit_adapter(EXIT, random_adapter(plain, lm_head=own_head, every=2))
        cache = cache_for(adapted, 20)
        sequence = cache.add_sequence(random_tokens(7))
        cache.commit(prefill(adapted, cache, [sequence]))
        drafts[name] = draft_step(adapted, cache, [sequence], EXIT, 3).of(0)
        cache.commit(verify_step(adapted, cache, Draft.of_tokens([sequence], [drafts[name]])))
        count = len(sequence.tokens) - 7
        assert sequence.tokens[7:] == greedy(plain, sequence.tokens[:7], count)
    assert drafts["reference"] == drafts[backend]


def test_triton_drafts_through_an_adapter_in_one_call(monkeypatch):
    """Greedy and sampled drafts of a ragged batch are the reference's, step after step; nothing else runs layers."""
    drafts = {}
    for backend in ("reference", "triton"):
        plain = Model.from_checkpoint(own_checkpoint(torch.bfloat16, **SMALL), backend)
        own_head = lm_head(torch.bfloat16, **SMALL)
        model = plain.with_exit_adapter(EXIT, random_adapter(plain, 2, lm_head=own_head, every=2))
        cache = cache_for(model, 60, page_size=7)
        sequences = [cache.add_sequence(random_tokens(n, seed=n)) for n in (4, 9, 6)]
        samplers = [None, make_sampler(model, GenerationConfig(temperature=0.8, seed=5), 9), None]
        cache.commit(prefill(model, cache, sequences))
        drafts[backend] = []
        for _ in range(2):  # the second of a kind runs the kept pass of the first
            with monkeypatch.context() as patched:
                if backend == "triton":
                    patched.setattr(type(model.ops), "run_layers", None)
                draft = draft_step(model, cache, sequences, EXIT, [2, 3, 0], samplers)
            drafts[backend] += [draft.of(b) for b in range(3)]
            cache.commit(verify_step(model, cache, draft, samplers))
            drafts[backend] += [tensor.cpu() for s in sequences for tensor in all_kv(cache, s)]
    for one, other in zip(*drafts.values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(("backend", "kind"), [*((b, 1) for b in BACKENDS), ("reference", "mlp"), ("cpu", "mlp")])
def test_a_ragged_batch(backend, kind):
    """One sequence with many drafts, one without any, and a chunk of a prompt, in one verification."""
    plain, adapted, cut = models(backend, torch.float32, kind)
    cache = cache_for(adapted, 90, page_size=4)
    first, second, third = (cache.add_sequence(random_tokens(n, seed=n)) for n in (3, 12, 10))
    cache.commit(prefill(adapted, cache, [first, second]))
    for waiting in (6, 0):
        drafted = draft_step(adapted, cache, [first, second], EXIT, [3, 0])
        assert drafted.of(0) == greedy(cut, first.tokens, 3)
        cache.commit(verify_step(adapted, cache, Draft.joined([third, first, second], [drafted], [waiting, 0, 0])))
    for sequence, length in ((first, 3), (second, 12), (third, 10)):
        assert sequence.tokens[length:] == greedy(plain, sequence.tokens[:length], len(sequence.tokens) - length)
        assert_cache_is_whole(cache, sequence, plain, cut)


def test_swaps_move_the_adapters_kv(tmp_path):
    plain, adapted, cut = models()
    cache = cache_for(adapted, 40, page_size=4)
    sequence = cache.add_sequence(random_tokens(11))
    cache.commit(prefill(adapted, cache, [sequence]))
    for to in (None, tmp_path / "swapped"):
        swapped = cache.swap_out(sequence, to)
        cache.all_k.fill_(torch.nan)
        cache.all_v.fill_(torch.nan)
        cache.swap_in(sequence, swapped)
        assert_cache_is_whole(cache, sequence, plain, cut)
        assert draft_step(adapted, cache, [sequence], EXIT, 3).of(0) == greedy(cut, sequence.tokens, 3)
        cache.rollback([sequence])
    other = plain.with_exit_adapter(EXIT, random_adapter(plain, seed=6))
    for model in (other, plain):
        foreign = cache_for(model, 40, page_size=4)
        with pytest.raises(SwapError):
            foreign.swap_in(foreign.add_sequence(sequence.tokens), tmp_path / "swapped")
    with pytest.raises(ValueError, match="another model"):
        verify_step(plain, cache, Draft.none([sequence]))


def test_forks_and_shared_prefixes_have_the_adapters_kv():
    plain, adapted, cut = models()
    cache = cache_for(adapted, 160, page_size=4, prefix_sharing=True)
    sequence = cache.add_sequence(random_tokens(11))
    cache.commit(prefill(adapted, cache, [sequence]))
    fork = cache.fork(sequence)
    for one in (fork, sequence):
        cache.commit(verify_step(adapted, cache, draft_step(adapted, cache, [one], EXIT, 3)))
    assert fork.tokens == sequence.tokens and cache.stats().num_copies > 0
    sharer = cache.add_sequence([*sequence.tokens[:9], 1, 2, 3])
    assert cache.length(sharer) == 8
    cache.commit(prefill(adapted, cache, [sharer]))
    assert draft_step(adapted, cache, [sharer], EXIT, 3).of(0) == greedy(cut, sharer.tokens, 3)
    cache.rollback([sharer])
    for one in (fork, sequence, sharer):
        assert_cache_is_whole(cache, one, plain, cut)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_engine_writes_the_texts_of_plain_decoding(backend):
    """Greedy and sampled, in a batch that is preempted, with a draft vocabulary; the drafts are those of the exit."""
    plain, adapted, _ = models(backend)
    adapted = adapted.with_draft_vocab(range(3, 101))
    prompts = [random_tokens(n, seed=n) for n in (4, 18, 30)]
    configs = [
        GenerationConfig(max_new_tokens=12, num_speculations=3, **KEEP),
        GenerationConfig(max_new_tokens=12, temperature=0.8, seed=3, **KEEP),
        GenerationConfig(max_new_tokens=12, temperature=0.7, seed=4, repetition_penalty=1.2, **KEEP),
    ]  # fmt: skip
    engine = Engine(adapted, PagedKVCache(adapted, 9, page_size=8), drafts="fixed")
    ids = [engine.add_request(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
    done = engine.run()
    found = [done[request_id] for request_id in ids]
    for prompt, config, generation in zip(prompts, configs, found, strict=True):
        assert same_as_alone(generation, alone(plain, prompt, config))
    assert drafts_accepted(found) > 0 and engine.stats.preemptions > 0
    assert all_free(engine)


@pytest.mark.parametrize(
    ("backend", "weights", "kind", "of_model"),
    [
        ("cpu", "q4_0", 1, None),
        ("cpu", "q8_0", "mlp", None),
        ("cpu", "q8_0", 0, None),
        ("cpu", "q8_0", 2, "q4_1"),
        ("cpu", "int8", 1, None),
        ("triton", "q8_0", 1, None),
    ],
    ids=str,
)
def test_a_quantised_adapter(backend, weights, kind, of_model):
    """Layers and head, under a model of 16 bits and a quantised one: drafts, K and V are the reference's, the text is
    the model's."""
    sizes = {**sizes_for(backend), "hidden_size": 32, "intermediate_size": 32}
    found = {}
    for name in ("reference", backend):
        plain = Model.from_checkpoint(own_checkpoint(torch.bfloat16, **sizes), name, of_model)
        written = random_adapter(plain, kind, lm_head=lm_head(torch.bfloat16, **sizes), every=2)
        quantised = {n: quantise(t, weights) if t.dim() == 2 else t for n, t in written.items()}
        adapted = plain.with_exit_adapter(EXIT, quantised)
        cache, accepted, made = cache_for(adapted, 50, page_size=7), 0, []
        sequence = cache.add_sequence(random_tokens(6))
        cache.commit(prefill(adapted, cache, [sequence]))
        for _ in range(2):
            draft = draft_step(adapted, cache, [sequence], EXIT, 3)
            verdict = verify_step(adapted, cache, draft)
            made.append(draft.of(0))
            accepted += int(verdict.num_accepted[0])
            cache.commit(verdict)
        assert sequence.tokens[6:] == greedy(plain, sequence.tokens[:6], len(sequence.tokens) - 6)
        assert accepted > 0
        found[name] = made, *all_kv(cache, sequence)
        few = adapted.exit_at(EXIT).head.ids.tolist()[1:9:2]
        some = adapted.with_draft_vocab(few)
        assert set(draft_step(some, cache, [sequence], EXIT, 2).of(0)) <= set(few)
    (made, k, v), (expected, expected_k, expected_v) = found[backend], found["reference"]
    assert made == expected and torch.equal(k, expected_k) and torch.equal(v, expected_v)


def test_positions_grow_for_the_adapter_too():
    """A cache of the bare model lengthens the RoPE tables first; the adapter's follow with its own cache."""
    plain = Model.from_checkpoint(own_checkpoint(torch.bfloat16, max_positions=9000))
    adapted = plain.with_exit_adapter(EXIT, random_adapter(plain))
    [adapter] = adapted.exit_adapters
    assert adapter.weights.cos.size(1) == 4096
    PagedKVCache(plain, 500, page_size=16)
    cache = PagedKVCache(adapted, 2, page_size=16)
    assert adapter.weights.cos is plain.weights.cos
    assert cache.max_positions == 9000


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_adapter_without_attention_takes_no_room_and_no_row_to_it(backend):
    """Its pages are the model's; rows that draft nothing never pass it; sequences are swapped, forked and shared."""
    plain, adapted, cut = models(backend, kind="mlp", head=True)
    cache = cache_for(adapted, 120, page_size=4, prefix_sharing=True)
    assert cache.all_k.size(0) == plain.config.num_layers and len(adapted.exit_adapters[0].weights.layers) == 2
    assert PagedKVCache.with_memory(adapted, 1 << 20).pool.num_pages == (
        PagedKVCache.with_memory(plain, 1 << 20).pool.num_pages
    )
    sequence = cache.add_sequence(random_tokens(11))
    assert cache.adapters_to(plain.config.num_layers) == () and len(cache.adapters_to(EXIT)) == 1
    cache.commit(prefill(adapted, cache, [sequence]))
    fork, sharer = cache.fork(sequence), cache.add_sequence([*sequence.tokens[:9], 1, 2, 3])
    assert cache.length(sharer) == 8
    cache.commit(prefill(adapted, cache, [sharer]))
    cache.swap_in(fork, cache.swap_out(fork))
    accepted = 0
    for one in (sequence, fork, sharer):
        known = list(one.tokens)
        for _ in range(2):
            draft = draft_step(adapted, cache, [one], EXIT, 3)
            assert draft.of(0) == greedy(cut, one.tokens, 3)
            verdict = verify_step(adapted, cache, draft)
            accepted += int(verdict.num_accepted[0])
            cache.commit(verdict)
        assert one.tokens[len(known) :] == greedy(plain, known, len(one.tokens) - len(known))
        assert_cache_is_whole(cache, one, plain, cut)
    assert accepted > 0


def test_memory_counts_the_adapters_layers():
    plain, adapted, _ = models(kind=2)
    cache = PagedKVCache.with_memory(adapted, 1 << 20)
    page = sum(t.nbytes for t in (cache.all_k, cache.all_v, cache.hidden)) // cache.pool.num_pages
    assert cache.pool.num_pages == (1 << 20) // page < PagedKVCache.with_memory(plain, 1 << 20).pool.num_pages


@pytest.mark.parametrize("strategy", ["autoregressive", "early_exit", "self_speculative"])
def test_generations_that_draft_nothing_leave_the_adapter_alone(strategy, monkeypatch):
    """Their cache has no room for its K and V; one that is given is filled as ever."""
    plain, adapted, _ = models()
    seen = []

    def noted(cache, layer):
        seen.append(cache.model.num_adapter_kv_layers)
        return adapters_to(cache, layer)

    adapters_to = PagedKVCache.adapters_to
    monkeypatch.setattr(PagedKVCache, "adapters_to", noted)
    exit_layer = None if strategy == "autoregressive" else EXIT
    config = GenerationConfig(strategy, max_new_tokens=6, exit_layer=exit_layer, **KEEP)
    [found], [expected] = (generate(model, [random_tokens(5)], config) for model in (adapted, plain))
    assert found.token_ids == expected.token_ids and torch.equal(found.logits, expected.logits)
    assert (1 in seen) == (strategy == "self_speculative")
    if strategy == "early_exit":
        return  # verifies nothing
    cache = cache_for(adapted, 40)
    del seen[:]
    [again] = generate(adapted, [random_tokens(5)], config, cache=cache)
    assert again.token_ids == expected.token_ids and set(seen) == {1}


def test_another_exit_is_refused():
    plain, adapted, _ = models()
    cache = cache_for(adapted, 40)
    sequence = cache.add_sequence([1, 2])
    cache.commit(prefill(adapted, cache, [sequence]))
    with pytest.raises(ValueError, match="exit_layer must be 2, which this model's exit adapter follows, got 1"):
        draft_step(adapted, cache, [sequence], 1, 2)
    with pytest.raises(ValueError, match="exit_layer must be 2"):
        adapted.draft_settings(GenerationConfig(exit_layer=1))
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.2, got 3"):
        plain.with_exit_adapter(3, random_adapter(plain))
    assert adapted.draft_exits(GenerationConfig(exit_layer="auto")) == (EXIT,)
    assert adapted.with_exit_adapters([]) == plain
