"""Adapters of several exits: each drafts what its own adapter says, whoever brought the positions before it there."""

from collections.abc import Sequence
from dataclasses import dataclass

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
from layerskip_kernels.engine.acceptance import DraftHistory
from layerskip_kernels.engine.costs import StepRows
from layerskip_kernels.engine.draft_lengths import DraftLengths
from layerskip_kernels.engine.drafts import DraftRequest
from layerskip_kernels.errors import SwapError
from layerskip_kernels.model.exit_adapter import AdapterKind
from layerskip_kernels.model.tensor_names import layer_products
from support.exit_adapters import all_kv, cut_model, greedy, lm_head, own_checkpoint, prefilled_kv, random_adapter
from support.generations import KEEP, all_free, alone, drafts_accepted, same_as_alone
from support.models import GPU, SMALL, cache_for, random_tokens

BACKENDS = ["reference", "cpu", "triton"]
Kinds = tuple[AdapterKind, AdapterKind]


@dataclass
class Family:
    """A model with adapters at exits 1 and 2, the model without, and the models that each exit's drafts are to follow.

    All but ``adapted`` run on the CPU.
    """

    adapted: Model
    plain: Model
    cut: dict[int, Model]


def family(backend: str = "cpu", kinds: Kinds = (1, 2), dtype=torch.bfloat16) -> Family:
    """The first adapter has a head of its own, of all tokens; the second has none."""
    changes = SMALL if backend == "triton" and not GPU else {}
    plain = Model.from_checkpoint(own_checkpoint(dtype, **changes))
    adapters = {
        1: random_adapter(plain, kinds[0], seed=5, lm_head=lm_head(dtype, **changes)),
        2: random_adapter(plain, kinds[1], seed=6),
    }
    adapted = plain if backend == "cpu" else Model.from_checkpoint(own_checkpoint(dtype, **changes), backend)
    for exit_layer in (2, 1):  # in any order
        adapted = adapted.with_exit_adapter(exit_layer, adapters[exit_layer])
    cut = {e: cut_model(own_checkpoint(dtype, **changes), e, adapter) for e, adapter in adapters.items()}
    return Family(adapted, plain, cut)


def nan_cache(model: Model, positions: int, page_size: int = 4, prefix_sharing: bool = False) -> PagedKVCache:
    """cache_for, the adapters' pages being NaN as well."""
    cache = cache_for(model, positions, page_size, prefix_sharing)
    cache.all_k.fill_(torch.nan)
    cache.all_v.fill_(torch.nan)
    return cache


def assert_whole(cache: PagedKVCache, sequence, of: Family) -> None:
    """K and V of the model and of each adapter are those of a fresh prefill of the same text, by models without any."""
    k, v = all_kv(cache, sequence)
    known = sequence.tokens[: cache.length(sequence)]
    at = of.plain.config.num_layers
    expected = [prefilled_kv(of.plain, known)]
    for adapter in of.adapted.exit_adapters:
        e, count = adapter.exit_layer, adapter.num_kv_layers
        expected.append(tuple(kv[e : e + count] for kv in prefilled_kv(of.cut[e], known)))
        at += count
    assert k.size(0) == at
    for parts, got in zip(zip(*expected, strict=True), (k, v), strict=True):
        assert torch.equal(torch.cat(parts), got)


@pytest.mark.parametrize(
    ("backend", "kinds"),
    [
        *((b, kinds) for b in BACKENDS for kinds in ((1, 2), (1, "mlp"))),
        ("cpu", ("mlp", 1)),
        ("reference", (0, 1)),
        ("cpu", (2, 0)),
    ],
    ids=str,
)
def test_exits_that_change_in_the_middle_of_a_text(backend: str, kinds: Kinds):
    """The drafts are those of the exit's own model each time, and the verdicts the whole model's."""
    of = family(backend, kinds)
    cache, accepted = nan_cache(of.adapted, 60, page_size=7), {1: 0, 2: 0}
    sequence = cache.add_sequence(random_tokens(9, seed=1))
    cache.commit(prefill(of.adapted, cache, [sequence]))
    logits = []
    for exit_layer in (1, 2, 2, 1):
        draft = draft_step(of.adapted, cache, [sequence], exit_layer, 2)
        assert draft.of(0) == greedy(of.cut[exit_layer], sequence.tokens, 2)
        verdict = verify_step(of.adapted, cache, draft)
        logits.append(verdict.new_logits(0))
        accepted[exit_layer] += int(verdict.num_accepted[0])
        cache.commit(verdict)
    cache.commit(verify_step(of.adapted, cache, Draft.none([sequence])))  # plainly
    new = sequence.tokens[9:]
    tokens, expected, *_ = alone(of.plain, sequence.tokens[:9], GenerationConfig(max_new_tokens=len(new), **KEEP))
    assert new == tokens and torch.equal(torch.cat(logits).cpu(), expected[1:-1])
    assert all(accepted.values())
    assert_whole(cache, sequence, of)
    if backend == "cpu":
        for got, fresh in zip(all_kv(cache, sequence), prefilled_kv(of.adapted, sequence.tokens[:-1]), strict=True):
            assert torch.equal(got, fresh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ragged_batch_of_different_exits(backend: str):
    """Drafts of both exits, none, and a chunk of a prompt in one verification; then the exits change places."""
    of = family(backend, dtype=torch.float32)
    cache = nan_cache(of.adapted, 120)
    first, second, third, fourth = (cache.add_sequence(random_tokens(n, seed=n)) for n in (3, 12, 7, 10))
    cache.commit(prefill(of.adapted, cache, [first, second, third]))
    for waiting, exits in ((6, (1, 2)), (0, (2, 1))):
        drafts = []
        for exit_layer, sequence, count in zip(exits, (first, second), (3, 2), strict=True):
            drafts.append(draft_step(of.adapted, cache, [sequence], exit_layer, count))
            assert drafts[-1].of(0) == greedy(of.cut[exit_layer], sequence.tokens, count)
        batch = Draft.joined([fourth, first, third, second], drafts, [waiting, 0, 0, 0])
        cache.commit(verify_step(of.adapted, cache, batch))
    for sequence, length in ((first, 3), (second, 12), (third, 7), (fourth, 10)):
        new = sequence.tokens[length:]
        assert new == greedy(of.plain, sequence.tokens[:length], len(new))
        assert_whole(cache, sequence, of)


def test_kept_steps_of_both_exits_are_the_references():
    """Greedy and sampled on the Triton backend; the second of a kind runs the kept pass of the first."""
    drafts = {}
    for backend in ("reference", "triton"):
        plain = Model.from_checkpoint(own_checkpoint(torch.bfloat16, **SMALL), backend)
        own_head = lm_head(torch.bfloat16, **SMALL)
        model = plain.with_exit_adapter(1, random_adapter(plain, lm_head=own_head, every=2))
        model = model.with_exit_adapter(2, random_adapter(plain, seed=6))
        cache = cache_for(model, 70, page_size=7)
        sequences = [cache.add_sequence(random_tokens(n, seed=n)) for n in (4, 9)]
        samplers = [None, make_sampler(model, GenerationConfig(temperature=0.8, seed=5), 9)]
        cache.commit(prefill(model, cache, sequences))
        drafts[backend] = []
        for exit_layer in (1, 2, 1, 2):
            draft = draft_step(model, cache, sequences, exit_layer, [2, 2], samplers)
            drafts[backend] += [draft.of(b) for b in range(2)]
            cache.commit(verify_step(model, cache, draft, samplers))
            drafts[backend] += [tensor for s in sequences for tensor in all_kv(cache, s)]
    for one, other in zip(*drafts.values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_swaps_forks_and_shared_prefixes_move_all_of_them(tmp_path):
    of = family()
    cache = nan_cache(of.adapted, 240, prefix_sharing=True)
    sequence = cache.add_sequence(random_tokens(11))
    cache.commit(prefill(of.adapted, cache, [sequence]))
    fork = cache.fork(sequence)
    for one, exit_layer in ((fork, 1), (sequence, 2)):
        cache.commit(verify_step(of.adapted, cache, draft_step(of.adapted, cache, [one], exit_layer, 3)))
    sharer = cache.add_sequence([*sequence.tokens[:9], 1, 2, 3])
    assert cache.length(sharer) == 8 and cache.stats().num_copies > 0
    cache.commit(prefill(of.adapted, cache, [sharer]))
    for one, to in ((fork, None), (sharer, tmp_path / "swapped")):
        cache.swap_in(one, cache.swap_out(one, to))
    for one in (fork, sequence, sharer):
        assert_whole(cache, one, of)
        for exit_layer in (2, 1):
            drafts = draft_step(of.adapted, cache, [one], exit_layer, 3).of(0)
            assert drafts == greedy(of.cut[exit_layer], one.tokens, 3)
            cache.rollback([one])
    others = of.adapted.with_exit_adapters([1]).with_exit_adapter(2, random_adapter(of.plain, 2, seed=9))
    for model in (others, of.adapted.with_exit_adapters([2]), of.plain):
        assert model.identity != of.adapted.identity
        foreign = cache_for(model, 40, page_size=4)
        with pytest.raises(SwapError):
            foreign.swap_in(foreign.add_sequence(sharer.tokens), tmp_path / "swapped")
        with pytest.raises(ValueError, match="another model"):
            verify_step(model, cache, Draft.none([sharer]))


def configs() -> list[GenerationConfig]:
    """Both exits, either one as it pays, none; greedy, sampled, with penalties."""
    return [
        GenerationConfig(max_new_tokens=12, exit_layer=1, num_speculations=3, **KEEP),
        GenerationConfig(max_new_tokens=12, exit_layer=2, num_speculations=2, **KEEP),
        GenerationConfig(max_new_tokens=12, exit_layer="auto", num_speculations="auto", **KEEP),
        GenerationConfig("autoregressive", max_new_tokens=12, **KEEP),
        GenerationConfig(max_new_tokens=12, exit_layer=2, temperature=0.8, seed=3, **KEEP),
        GenerationConfig(max_new_tokens=12, exit_layer=1, temperature=0.7, seed=4, repetition_penalty=1.2, **KEEP),
    ]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_engine_writes_the_texts_of_plain_decoding(backend: str):
    """In a batch that is preempted; all kinds of requests together."""
    of = family(backend)
    prompts = [random_tokens(n, seed=n) for n in (4, 18, 30, 9, 11, 5)]
    engine = Engine(of.adapted, PagedKVCache(of.adapted, 16, page_size=8), drafts="fixed")
    ids = [engine.add_request(prompt, config) for prompt, config in zip(prompts, configs(), strict=True)]
    done = engine.run()
    found = [done[request_id] for request_id in ids]
    for prompt, config, generation in zip(prompts, configs(), found, strict=True):
        assert same_as_alone(generation, alone(of.plain, prompt, config))
    assert drafts_accepted(found[:1]) > 0 and drafts_accepted(found[1:2]) > 0 and engine.stats.preemptions > 0
    assert all_free(engine)


def test_what_is_not_needed_is_not_paid(monkeypatch):
    """generate takes the adapters of the exits that may draft alone, unless a cache is given, which is for all."""
    of, seen = family(kinds=(1, 1)), []
    adapters_to = PagedKVCache.adapters_to

    def noted(cache: PagedKVCache, layer: int):
        seen.append([adapter.exit_layer for adapter in cache.model.exit_adapters])
        return adapters_to(cache, layer)

    monkeypatch.setattr(PagedKVCache, "adapters_to", noted)
    expected = alone(of.plain, random_tokens(5), configs()[0])
    wanted: Sequence[list[int]] = ([1], [2], [1, 2], [])
    seen.clear()
    for config, exits in zip(configs()[:4], wanted, strict=True):
        [found] = generate(of.adapted, [random_tokens(5)], config)
        assert same_as_alone(found, expected) and {*map(tuple, seen)} == {tuple(exits)}
        seen.clear()
    cache = cache_for(of.adapted, 40)
    generate(of.adapted, [random_tokens(5)], configs()[0], cache=cache)
    assert {*map(tuple, seen)} == {(1, 2)}


def test_words_are_limited_by_exit():
    """A head of its own and the LM head; of one exit, and of all."""
    plain = family().plain
    adapted = plain.with_exit_adapter(1, random_adapter(plain, lm_head=lm_head(torch.bfloat16), every=3))
    adapted = adapted.with_exit_adapter(2, random_adapter(plain, seed=6))
    few = list(range(0, 90, 6))
    for model, words in (
        (adapted, (34, None)),
        (adapted.with_draft_vocab(few), (15, 15)),
        (adapted.with_draft_vocab(few, 2), (34, 15)),
        (adapted.with_draft_vocab(few, 1), (15, None)),
        (adapted.with_draft_vocab(few).with_draft_vocab(None, 1), (34, 15)),
    ):
        heads = [model.exit_at(e).head for e in (1, 2)]
        assert tuple(head and len(head.ids) for head in heads) == words
        assert model.exit_at(3).head is None and model.has_kv_of(adapted)
        cache = cache_for(model, 30)
        sequence = cache.add_sequence(random_tokens(9))
        cache.commit(prefill(model, cache, [sequence]))
        for exit_layer, head in zip((1, 2), heads, strict=True):
            drafts = draft_step(model, cache, [sequence], exit_layer, 3).of(0)
            assert head is None or set(drafts) <= set(head.ids.tolist())
            cache.rollback([sequence])
    with pytest.raises(ValueError, match="among the 34 tokens of the exit adapter's own head"):
        adapted.with_draft_vocab([1, 2])
    assert adapted.with_draft_vocab([1, 2], 2).exit_at(2).head.ids.tolist() == [1, 2]


def test_exits_are_chosen_among_the_adapters_by_what_they_cost():
    """A draft at the second exit pays for the first's layers, if they attend; so does a row that none took there."""
    config = family().plain.config
    layer, head = layer_products(config), 101 * 50
    mlp = layer_products(config, False)
    both, light = family(kinds=(1, 2)).adapted, family(kinds=("mlp", 2)).adapted
    assert both.draft_products[1:3] == (2 * layer + head, 5 * layer + head)
    assert light.draft_products[1:3] == (layer + mlp + head, 4 * layer + head)
    rows = StepRows(((1, 3), (2, 2), (1, 0)), prompt=10, judged=1)
    passes = [*rows.verify_passes(both)]
    assert (layer, 3 + 10) in passes and (2 * layer, 3 + 3 + 10) in passes
    assert len(rows.verify_passes(light)) == len(passes) - 1
    assert sorted(rows.draft_passes(both)) == sorted([(2 * layer + head, 1)] * 3 + [(5 * layer + head, 1)] * 2)
    lengths = DraftLengths(both)
    request = DraftRequest(both.draft_exits(GenerationConfig(exit_layer="auto")), 8, 8, DraftHistory())
    assert request.exits == both.draft_exits(GenerationConfig()) == (1, 2)
    assert both.draft_exits(GenerationConfig(exit_layer=2)) == (2,)
    assert both.draft_exits(GenerationConfig("autoregressive")) == ()
    for right in (0, 1):  # in turns: the first exit is seldom right, the second always
        for _ in range(40):
            drafted = (2, 4) if right else (1, 4)
            verified = 4 if right else 0
            passes = StepRows((drafted,))
            seconds = [sum(w * max(1.0, r / 5) for w, r in p) * 1e-9
                       for p in (passes.draft_passes(both), passes.verify_passes(both))]  # fmt: skip
            lengths.learn([request], [drafted], [verified], (0, 0), *seconds, [[0.9] * 4])
    chosen = [lengths.choose([request])[0] for _ in range(60)]
    assert {drafts.exit_layer for drafts in chosen if drafts.count} == {2}


def test_a_second_adapter_of_an_exit_and_an_exit_without_one_are_refused():
    of = family()
    with pytest.raises(ValueError, match="exit_layer 2 has an exit adapter already; an exit has at most one"):
        of.adapted.with_exit_adapter(2, random_adapter(of.plain))
    deep = Model.from_checkpoint(own_checkpoint(torch.bfloat16, num_layers=4))
    for exit_layer in (3, 1):
        deep = deep.with_exit_adapter(exit_layer, random_adapter(deep))
    cache = cache_for(deep, 20)
    sequence = cache.add_sequence([1, 2])
    cache.commit(prefill(deep, cache, [sequence]))
    message = "exit_layer must be 1 or 3, which this model's exit adapters follow, got 2; leave it None, or use"
    with pytest.raises(ValueError, match=message):
        draft_step(deep, cache, [sequence], 2, 2)
    with pytest.raises(ValueError, match=message):
        deep.draft_settings(GenerationConfig(exit_layer=2))
    assert deep.draft_settings(GenerationConfig())[0] == 1
    assert [a.exit_layer for a in deep.with_exit_adapters([3]).exit_adapters] == [3]
    assert deep.with_exit_adapters(range(4)) is deep
