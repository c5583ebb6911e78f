"""draft_pass: the reference's drafts, confidences and stops, bit for bit, and what each of them means."""

from dataclasses import replace

import pytest
import torch

from layerskip_kernels.model.exit_adapter import DraftExit
from layerskip_kernels.operands import AdapterLayers, CacheTensors, DraftRows, DraftSampling, DraftStops, LogitEdits
from layerskip_kernels.ops import reference
from support.exit_adapters import random_adapter
from support.models import random_tokens, threads, tiny_model

SEQUENCES, MOST, PAGE_SIZE = 4, 5, 7
COUNTS = (5, 0, 3, 5)
NAN_FROM = -3  # a score that is not finite


def draft(model, counts=COUNTS, sampling=None, stops=None, keep_scores=False, exit_layer=2, pages_of_adapter=None):
    """Drafts of some sequences at positions 0, 1, 2, ..., whose earlier K and V are random, and the cache after it."""
    c, pages = model.config, SEQUENCES * 2
    generator = torch.Generator().manual_seed(3)
    cache = CacheTensors(
        torch.randn(c.num_layers, pages, c.num_kv_heads, c.head_dim, PAGE_SIZE, generator=generator).to(model.dtype),
        torch.randn(c.num_layers, pages, c.num_kv_heads, PAGE_SIZE, c.head_dim, generator=generator).to(model.dtype),
        torch.full((pages, PAGE_SIZE, c.hidden_size), torch.nan, dtype=model.dtype),
    )
    rows = DraftRows(
        torch.tensor(random_tokens(SEQUENCES)),
        torch.arange(SEQUENCES),
        torch.tensor(counts),
        torch.arange(pages, dtype=torch.int32).view(SEQUENCES, 2),
    )
    weights, head, adapters = model.exit_at(exit_layer)
    passed = [with_pages(adapter, cache, pages_of_adapter) for adapter in adapters]
    drafted = model.ops.draft_pass(
        weights, model.sizes, cache, rows, head, exit_layer, MOST, sampling, stops, keep_scores, passed
    )
    return drafted, (*cache, *(pages for adapter in passed for pages in adapter.cache[:2]))


def with_pages(adapter, cache, count=None):
    """The layers of an exit adapter, and pages for ``count`` of them (None: those that attend, and one more) that hold
    what the last layers' hold."""
    k, v = (pages[-(count or 1 + adapter.num_kv_layers) :].clone() for pages in cache[:2])
    return AdapterLayers(adapter.weights, adapter.sizes, CacheTensors(k, v, cache.hidden), adapter.exit_layer)


def sampling(temperatures=(0.7, 1.0, 0.0, 1.5), top_ks=(0, 0, 0, 20), top_ps=(1.0, 1.0, 1.0, 0.9), min_p=0.01):
    return DraftSampling(
        torch.tensor(temperatures),
        torch.tensor(top_ks),
        torch.tensor(top_ps, dtype=torch.float64),
        torch.full((SEQUENCES,), min_p),
        torch.arange(SEQUENCES) + 2**40,
        torch.tensor([0, 1, 0, 2]),
    )


def edits():
    """A list that is full, none, one token, and penalties alone."""
    return LogitEdits(
        repetitions=torch.tensor([1.7, 1.0, 1.0, 0.6]),
        frequencies=torch.tensor([0.0, 0.0, 0.5, -0.4]),
        presences=torch.tensor([0.3, 0.0, 0.0, 0.25]),
        least_positions=torch.tensor([4, 0, 0, 90]),
        ids=torch.tensor([[3, 99, 51, 0], [-1] * 4, [7, -1, -1, -1], [-1] * 4]),
        biases=torch.tensor([[2.0, -0.0, -0.0, 60.0], [-0.0] * 4, [50.0, -0.0, -0.0, -0.0], [-0.0] * 4]),
        counts=torch.tensor([[-1, 0, 3, -1], [-1] * 4, [-1] * 4, [-1] * 4]),
        ends=torch.tensor([[False, False, True, True], [False] * 4, [False] * 4, [False] * 4]),
    )


def stops(least=0.2, edges=(0.1, 0.3, 0.5)):
    acceptance = torch.linspace(0.1, 0.95, len(edges) + 1).repeat(SEQUENCES, 1)
    acceptance[3] = 0.8  # whatever the confidence
    return DraftStops(torch.tensor(edges), acceptance, torch.full((SEQUENCES, MOST), least))


def assert_same(one, other):
    for a, b in zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True):
        assert torch.equal(a.nan_to_num(nan=NAN_FROM), b.nan_to_num(nan=NAN_FROM))


@pytest.mark.parametrize("vocab", [None, range(0, 101, 3)], ids=["all tokens", "a draft vocabulary"])
@pytest.mark.parametrize("arguments", [
    {}, dict(sampling=sampling()), dict(stops=stops()), dict(sampling=sampling(), stops=stops(), keep_scores=True),
    dict(sampling=replace(sampling(temperatures=(0.0,) * 4), edits=edits())),
    dict(sampling=replace(sampling(), edits=edits()), stops=stops(), keep_scores=True),
], ids=["greedy", "sampled", "stops", "all", "edits", "all with edits"])  # fmt: skip
def test_same_bits_as_the_reference(dtype, isa, vocab, arguments):
    cpu, slow = (draft(tiny_model(dtype, name).with_draft_vocab(vocab), **arguments) for name in ("cpu", "reference"))
    assert_same(cpu, slow)
    assert cpu[0].counts[0] > 0


@pytest.mark.parametrize("kind", [1, 2, "mlp"])
@pytest.mark.parametrize("arguments", [
    {}, dict(sampling=sampling(), stops=stops(), keep_scores=True),
], ids=["greedy", "all"])  # fmt: skip
def test_same_bits_as_the_reference_through_an_exit_adapter(dtype, isa, kind, arguments):
    """The states that the cache keeps, and K and V of the model, are those without it."""
    bare = tiny_model(dtype)
    adapter = random_adapter(bare, kind)
    cpu, slow = (
        draft(tiny_model(dtype, name).with_exit_adapter(2, adapter), **arguments) for name in ("cpu", "reference")
    )
    assert_same(cpu, slow)
    without = draft(bare, **arguments)
    assert cpu[0].counts[0] > 0 and not torch.equal(cpu[0].confidences, without[0].confidences)
    first = torch.arange(SEQUENCES)[torch.tensor(COUNTS) > 0]
    assert torch.equal(cpu[1][2][first * 2, first], without[1][2][first * 2, first])


@pytest.mark.parametrize("kinds", [(1, 2), (2, "mlp"), (1, 0), ("mlp", 1)], ids=str)
@pytest.mark.parametrize("arguments", [
    {}, dict(sampling=sampling(), stops=stops(), keep_scores=True),
], ids=["greedy", "all"])  # fmt: skip
def test_same_bits_as_the_reference_past_adapters_of_lower_exits(dtype, kinds, arguments):
    """Drafts are those with the exit's own adapter alone; a lower one that attends leaves K and V as its do."""
    bare = tiny_model(dtype)
    lower, own = (random_adapter(bare, kind, seed=seed) for seed, kind in enumerate(kinds))
    cpu, slow = (
        draft(tiny_model(dtype, name).with_exit_adapter(2, own).with_exit_adapter(1, lower), **arguments)
        for name in ("cpu", "reference")
    )
    assert_same(cpu, slow)
    alone, first = bare.with_exit_adapter(2, own), bare.with_exit_adapter(1, lower)
    expected = draft(alone, **arguments)
    attends = kinds[0] != "mlp"
    assert len(cpu[1]) == 3 + 2 * attends + 2 * (kinds[1] != 0) and cpu[0].counts[0] > 0
    others = (*cpu[1][:3], *cpu[1][5:]) if attends else cpu[1]
    assert_same((cpu[0], others), expected)
    if attends and not arguments:
        one = torch.ones(SEQUENCES, dtype=torch.int64)
        of_first, of_both = (
            draft(first, counts=one.tolist(), exit_layer=1),
            draft(first.with_exit_adapter(2, own), counts=one.tolist()),
        )
        assert all(torch.equal(a, b) for a, b in zip(of_first[1][3:5], of_both[1][3:5], strict=True))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_threads_do_not_matter(count):
    """A vocabulary of several pieces, whose probabilities are summed by whichever thread comes."""
    model = tiny_model(vocab_size=9001)
    with threads(1):
        alone = draft(model, sampling=sampling(), stops=stops(), keep_scores=True)
    with threads(count):
        assert_same(draft(model, sampling=sampling(), stops=stops(), keep_scores=True), alone)


def test_confidence_is_the_greatest_probability():
    model = tiny_model(torch.float32)
    drafted, cache = draft(model, counts=(1, 1, 1, 1))
    first = cache[2][torch.arange(SEQUENCES) * 2, torch.arange(SEQUENCES)]
    weights, sizes = model.weights, model.sizes
    _, logits = model.ops.norm_head_argmax(first, weights.final_norm, weights.lm_head, sizes.vocab_size, sizes.eps)
    torch.testing.assert_close(drafted.confidences[:, 0], logits.softmax(1).amax(1))
    assert drafted.confidences[:, 1:].eq(0).all()


def test_confidence_of_logits_that_are_not_finite():
    assert reference.confidence(torch.tensor([1.0, torch.inf])) == 0
    assert reference.confidence(torch.full((3,), -torch.inf)) == 0
    assert reference.confidence(torch.tensor([2.0, -torch.inf])) == 1
    assert reference.confidence(torch.tensor([2.0, 2.0, -torch.inf])) == 0.5


def test_confidence_does_not_depend_on_how_tokens_are_drawn():
    model = tiny_model()
    greedy, _ = draft(model, counts=(1, 1, 1, 1))
    drawn, _ = draft(model, counts=(1, 1, 1, 1), sampling=sampling())
    assert torch.equal(greedy.confidences, drawn.confidences)
    assert not torch.equal(greedy.tokens, drawn.tokens)


def test_where_drafting_stops():
    """After draft i, where the product of acceptances so far is below least[i]; the drafts before are those without."""
    model = tiny_model()
    free, _ = draft(model)
    rule = stops(least=0.3)
    cut, _ = draft(model, stops=rule)
    stopped = 0
    for b, wanted in enumerate(COUNTS):
        expected, count = 1.0, 0
        for i in range(wanted):
            expected *= float(rule.acceptance[b, (rule.edges <= free.confidences[b, i]).sum()])
            count = i + 1
            if expected < 0.3:
                break
        assert cut.counts[b] == count
        assert torch.equal(cut.tokens[b, :count], free.tokens[b, :count])
        assert cut.tokens[b, count:].eq(-1).all() and cut.confidences[b, count:].eq(0).all()
        stopped += count < wanted
    assert stopped and free.counts.tolist() == list(COUNTS)
    always, _ = draft(model, stops=replace(rule, least=torch.full((SEQUENCES, MOST), 2.0)))
    assert always.counts.tolist() == [1, 0, 1, 1]
    never, _ = draft(model, stops=replace(rule, least=torch.zeros(SEQUENCES, MOST)))
    assert never.counts.tolist() == list(COUNTS)


def test_scores_are_kept_where_asked():
    model = tiny_model().with_draft_vocab(range(0, 101, 2))
    drafted, _ = draft(model, sampling=sampling(), keep_scores=True)
    assert drafted.scores.shape == (SEQUENCES, MOST, 101)
    assert drafted.scores[0, 0].isfinite().any() and drafted.scores[0, :, 1::2].eq(-torch.inf).all()
    assert drafted.scores[1:3].eq(-torch.inf).all(), "one that does not draft, one that draws nothing"
    assert draft(model, sampling=sampling())[0].scores.shape == (0, MOST, 101)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(sampling=replace(sampling(), seeds=torch.zeros(3).long())), ValueError, "seeds must have the shape"),
    (dict(sampling=replace(sampling(), min_ps=torch.zeros(4).double())), TypeError, "min_ps must be Float"),
    (dict(sampling=replace(sampling(), samples=torch.full((4,), -1))), ValueError, r"samples\[0\] is -1"),
    (dict(stops=replace(stops(), edges=torch.zeros(2))), ValueError, "acceptance must have the shape"),
    (dict(stops=replace(stops(), least=torch.zeros(4, 4))), ValueError, "least must have the shape"),
    (dict(counts=(6, 0, 0, 0)), ValueError, r"num_drafts\[0\] is 6"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        draft(tiny_model(), **arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_draw_raises(backend):
    """An overflow at the exit: +inf among the logits. The greatest logit can be taken, but nothing drawn."""
    model = tiny_model(torch.float32, backend)
    model.weights.final_norm.fill_(3e38)
    with pytest.raises(RuntimeError, match=r"no token can be chosen|a logit is NaN"):
        draft(model, sampling=sampling())


def test_attention_without_pages_is_refused():
    """A cache that ends before the adapter's layer has room for an adapter without attention alone."""
    model = tiny_model()
    model = model.with_exit_adapter(2, random_adapter(model))
    with pytest.raises(ValueError, match="k_cache has 1 layers, the model 2, of which 2 need pages"):
        draft(model, pages_of_adapter=1)


@pytest.mark.parametrize(("exits", "message"), [
    ((1, 1), r"adapter_exits\[1\] is 1, expected 2\.\.2"),
    ((2, 1), r"adapter_exits\[1\] is 1, expected 3\.\.2"),
    ((0, 2), r"adapter_exits\[0\] is 0, expected 1\.\.2"),
    ((1, 3), r"adapter_exits\[1\] is 3, expected 2\.\.2"),
], ids=str)  # fmt: skip
def test_adapters_that_do_not_ascend_to_the_exit_are_refused(exits, message, monkeypatch):
    model = tiny_model()
    for exit_layer in (1, 2):
        model = model.with_exit_adapter(exit_layer, random_adapter(model))
    wrong = [replace(a, exit_layer=e) for a, e in zip(model.exit_adapters, exits, strict=True)]
    monkeypatch.setattr(type(model), "exit_at", lambda *_: DraftExit(model.weights, None, tuple(wrong)))
    with pytest.raises(ValueError, match=message):
        draft(model)
