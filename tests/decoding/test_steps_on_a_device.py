"""The steps where the backend's tensors are on another device than the host's (tests/support/two_devices.py)."""

import threading
from dataclasses import replace

import pytest
import torch

from layerskip_kernels import (
    Draft,
    GenerationConfig,
    PagedKVCache,
    draft_step,
    make_sampler,
    ops,
    prefill,
    verify_step,
)
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.operands import PendingRows
from layerskip_kernels.ops import cache_ops, staging
from layerskip_kernels.ops.triton import TritonOps
from layerskip_kernels.triton_ops import graphs, launch, tuned, workspace
from support.exit_adapters import random_adapter
from support.models import SMALL, agreeing_model, random_tokens, tiny_model
from support.two_devices import DEVICE, Copy, on_device

PROMPTS = [random_tokens(4, seed=1), random_tokens(2, seed=2)]
TWO_LAYERS = dict(SMALL, num_layers=2)


def prefilled(model, prompts=PROMPTS, page_size=16):
    cache = PagedKVCache.with_room_for(model, [len(prompt) + 40 for prompt in prompts], page_size)
    sequences = [cache.add_sequence(prompt) for prompt in prompts]
    cache.commit(prefill(model, cache, sequences))
    return cache, sequences


def same_bits(a, b):
    return len(a) == len(b) and all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


def on_both(run, sizes=TWO_LAYERS):
    """What ``run(model)`` gives on the device and on the CPU backend."""
    return [run(agreeing_model(backend=backend, **sizes)) for backend in ("triton", "cpu")]


# ---- what is computed ----


def test_cycles_with_mixed_exits_a_chunk_and_plain_decoding(two_devices):
    """Eager, captured and replayed: one draft of two exits, joined, beside a chunk of a prompt."""

    def run(model):
        cache, (one, two) = prefilled(model)
        new, found, accepted = cache.add_sequence(random_tokens(7, seed=3)), [], 0
        for cycle in range(3):
            parts = [draft_step(model, cache, [one], 1, 2), draft_step(model, cache, [two], 2, 1)]
            left = 5 - cycle
            draft = Draft.joined([new, two, one], parts, [left, 0, 0])
            assert draft.tokens.device == cache.k.device  # not read on the host
            verdict = verify_step(model, cache, draft)
            cache.commit(verdict)
            accepted += sum(max(0, count) for count in verdict.accepted)
            found += [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits]
        assert accepted > 0
        return [*found, *cache.export(one), *cache.export(new)]

    device, cpu = on_both(run, SMALL)
    assert same_bits(device, cpu)


def test_quantised_weights(two_devices):
    """Launched, captured and replayed."""

    def run(model):
        cache, sequences = prefilled(model)
        found = []
        for _ in range(3):
            verdict = verify_step(model, cache, draft_step(model, cache, sequences, 1, [1, 2]))
            cache.rollback(sequences)
            found += [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits]
        assert model.backend == "cpu" or model.ops.captured_steps() > 0
        return found

    device, cpu = (run(tiny_model(backend=name, weights="q4_k", **TWO_LAYERS)) for name in ("triton", "cpu"))
    assert same_bits(device, cpu)


SETTINGS = {
    "exact": dict(temperature=0.8),
    "rejection": dict(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, acceptance="rejection"),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_sampled_drafts(two_devices, settings):
    """Drawn and judged on the device, beside a greedy sequence: eagerly, captured and replayed."""

    def run(model):
        cache, sequences = prefilled(model)
        samplers = [make_sampler(model, GenerationConfig(seed=3, **SETTINGS[settings]), 5), None]
        found, accepted = [], 0
        for _ in range(3):
            draft = draft_step(model, cache, sequences, 1, [2, 1], samplers)
            assert on_device(draft.tokens) == (model.backend == "triton")
            verdict = verify_step(model, cache, draft, samplers)
            cache.commit(verdict)
            accepted += sum(verdict.accepted)
            found += [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits]
        assert accepted > 0
        return found

    device, cpu = on_both(run, TWO_LAYERS)
    assert same_bits(device, cpu)


EDITING = {
    "sampled": dict(temperature=0.8, top_k=50, acceptance="rejection", repetition_penalty=1.5, logit_bias={8: -3.0}),
    "greedy": dict(presence_penalty=0.3, frequency_penalty=0.2, min_new_tokens=6, eos_token_ids=(2, 60)),
}


@pytest.mark.parametrize("vocab", [None, range(1, 101)], ids=["all tokens", "a draft vocabulary"])
@pytest.mark.parametrize("name", EDITING)
def test_samplers_that_edit_logits(two_devices, name, vocab):
    """Beside one that does not, eagerly, captured and replayed; each draft counts those before it."""

    def run(model):
        cache, sequences = prefilled(model)
        model = model.with_draft_vocab(vocab)
        other = GenerationConfig(temperature=0.8, seed=3, acceptance="rejection")
        samplers = [make_sampler(model, GenerationConfig(seed=3, **EDITING[name]), 4), make_sampler(model, other, 2)]
        found, accepted = [], 0
        for _ in range(3):
            verdict = verify_step(model, cache, draft_step(model, cache, sequences, 1, [3, 1], samplers), samplers)
            cache.commit(verdict)
            accepted += verdict.accepted[0]
            found += [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits]
        assert accepted > 0
        return found

    device, cpu = on_both(run, TWO_LAYERS)
    assert same_bits(device, cpu)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_draft_vocabulary(two_devices, sampled):
    def run(model):
        model = model.with_draft_vocab(range(0, 101, 2))
        cache, sequences = prefilled(model)
        samplers = [make_sampler(model, GenerationConfig(temperature=0.7, seed=1), 5), None] if sampled else None
        found = []
        for _ in range(2):
            verdict = verify_step(model, cache, draft_step(model, cache, sequences, 1, 2, samplers), samplers)
            cache.commit(verdict)
            assert not (verdict.draft.tokens % 2).any()
            found += [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens]
        return found

    device, cpu = on_both(run)
    assert same_bits(device, cpu)


def test_forks_copy_on_write(two_devices):
    def run(model):
        cache, sequences = prefilled(model, PROMPTS[:1], page_size=3)
        fork = cache.fork(sequences[0])
        fork.tokens[-1] = 7
        for _ in range(2):
            cache.commit(verify_step(model, cache, draft_step(model, cache, [fork], 1, 2)))
        cache.commit(verify_step(model, cache, Draft.none(sequences)))
        assert cache.stats().num_copies > 0
        return [*cache.export(fork), *cache.export(sequences[0]), torch.tensor(fork.tokens)]

    device, cpu = on_both(run)
    assert same_bits(device, cpu)


@pytest.mark.parametrize("to_file", [False, True])
def test_swapping_out_and_in(two_devices, tmp_path, to_file):
    def run(model):
        cache, (sequence, other) = prefilled(model)
        before = [tensor.clone() for tensor in cache.export(sequence)]
        swapped = cache.swap_out(sequence, tmp_path / "kv" if to_file else None)
        cache.commit(verify_step(model, cache, draft_step(model, cache, [other], 1, 2)))  # other pages' owner
        cache.swap_in(sequence, swapped)
        assert same_bits(before, cache.export(sequence))
        verdict = verify_step(model, cache, draft_step(model, cache, [sequence], 1, 2))
        return [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits]

    device, cpu = on_both(run)
    assert same_bits(device, cpu)


@pytest.mark.parametrize("buffer_bytes", [staging.BUFFER_BYTES, 1])
def test_what_a_swap_costs(two_devices, monkeypatch, buffer_bytes):
    """Pinned memory that is used again, and one wait each way; a wait for each page where no more fits."""
    monkeypatch.setattr(staging, "BUFFER_BYTES", buffer_bytes)
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    cache, [sequence] = prefilled(model, [random_tokens(19)], page_size=4)
    length, pinned = cache.length(sequence), set()
    pieces = 1 if buffer_bytes > 1 else 5
    for first in (0, 6, 17):  # what stays in the cache
        kept = [tensor.cpu() for tensor in cache.export(sequence)]
        with two_devices.watched() as out:
            swapped = cache.swap_out(sequence)
        assert not swapped.k.is_pinned() and same_bits(kept, (swapped.k, swapped.v))
        if first:
            cache.pool.append([sequence.id], [first])
            cache.pool.raise_rows([sequence.id], [first], TWO_LAYERS["num_layers"])
            cache.pool.commit([sequence.id], [first])
        with two_devices.watched() as back:
            cache.swap_in(sequence, swapped)
        assert not any(copy.blocking for copy in out.copies + back.copies)
        skipped = first // 4 if pieces > 1 else 0
        assert (out.launches, back.launches) == (["gather_kv"] * pieces, ["scatter_kv"] * (pieces - skipped))
        assert 1 <= out.waits <= pieces and 1 <= back.waits <= pieces - skipped
        got = [tensor[:, first:] for tensor in cache.export(sequence)]
        assert same_bits(got, [tensor[:, first:] for tensor in kept]) and cache.length(sequence) == length
        pinned |= {buffer._memory.data_ptr() for buffer in cache._staging._buffers if buffer._memory is not None}
        cache.pool.truncate(sequence.id, 0)
        cache.swap_in(sequence, swapped)
    assert len(pinned) == min(2, pieces)


def test_refused_pages_of_one_cache_are_not_blamed_on_another(two_devices):
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    (one, [first]), (other, [second]) = (prefilled(model, PROMPTS[:1]) for _ in "ab")
    pages = torch.tensor([99], dtype=torch.int32).to(DEVICE)
    cache_ops.copy_pages(pages, pages * 0, *one.tensors, one._error)
    other.swap_in(second, other.swap_out(second))
    other.export(second)
    with pytest.raises(ValueError, match="refused bad data"):
        one.swap_out(first)
    one.swap_in(first, one.swap_out(first))  # noted once


def test_what_an_adapters_layers_note_is_noted_of_their_cache(two_devices):
    """Here: a position beyond its tables. The host would not know, and drafts would be made of what nobody wrote."""
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    model = model.with_exit_adapter(1, random_adapter(model))
    cache, sequences = prefilled(model, PROMPTS[:1])
    adapter = model.exit_adapters[0].weights
    adapter.replace_tables(adapter.cos[:, :2], adapter.sin[:, :2])
    with pytest.raises(ValueError, match="positions holds one outside"):
        verify_step(model, cache, draft_step(model, cache, sequences, 1, 1))


def test_every_exit_of_a_text(two_devices):
    def run(model):
        rows = list(each_exit(model, random_tokens(6), 2, [1, 2]))
        assert not any(on_device(tensor) for row in rows for tensor in (row.tokens, row.logits))
        return [tensor for row in rows for tensor in (row.tokens, row.logits)]

    device, cpu = on_both(run)
    assert same_bits(device, cpu)


# ---- what it costs ----


def test_copies_and_waits_of_a_greedy_cycle(two_devices):
    """The counts and tokens alone come to the host, and it waits for them once; nothing waits between the steps."""
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    cache, sequences = prefilled(model)
    for cycle in range(3):
        with two_devices.watched() as drafting:
            draft = draft_step(model, cache, sequences, 1, 1)
        with two_devices.watched() as joining:
            draft = Draft.joined(sequences, [draft])
        with two_devices.watched() as verifying:
            verdict = verify_step(model, cache, draft)
        cache.rollback(sequences)
        assert (joining.copies, joining.waits) == ([], 0)
        assert not any(copy.blocking for copy in drafting.copies + verifying.copies)
        # num_accepted and next_tokens int64 [2], drafts int64 [2, 1], the error word: each in 16 bytes
        assert drafting.to_host() + verifying.to_host() == [Copy(False, (4 * 16,), False)]
        if cycle == 2:  # a kind that is captured by now: its inputs are copied, and which rows they are
            assert (len(drafting.to_device()), len(verifying.to_device())) == (1, 2)
            assert (drafting.waits, verifying.waits) == (0, 1)
    assert on_device(verdict.logits) and not on_device(verdict.next_tokens)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
@pytest.mark.parametrize("acceptance", ["exact", "rejection"])
def test_a_sampled_cycle_copies_no_logits(two_devices, acceptance, penalty):
    """The counts, tokens and the error word come to the host, in one copy, as in a greedy cycle."""
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    cache, sequences = prefilled(model)
    config = GenerationConfig(
        temperature=0.8, top_p=0.95, seed=3, acceptance=acceptance, presence_penalty=penalty
    )  # fmt: skip
    samplers, rejecting = [make_sampler(model, config, 5), None], acceptance == "rejection"
    for cycle in range(3):
        with two_devices.watched() as seen:
            verify_step(model, cache, draft_step(model, cache, sequences, 1, 1, samplers), samplers)
        cache.rollback(sequences)
        assert seen.to_host() == [Copy(False, (4 * 16,), False)]
        assert not any(copy.blocking for copy in seen.copies)
        assert seen.launches.count("_edit_kernel") == 2 * bool(penalty)
        assert seen.launches.count("_choose_kernel") == 2 and ("_settle_kernel" in seen.launches) == rejecting
        if cycle == 2:
            assert seen.waits == 1
            assert len(seen.to_device()) == 3  # what the steps read, and how they draw


def test_a_kind_of_step_is_launched_the_same_whether_captured_or_not(two_devices):
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    cache, sequences = prefilled(model, PROMPTS[:1])
    launches = []
    for _ in range(3):
        with two_devices.watched() as seen:
            verify_step(model, cache, draft_step(model, cache, sequences, 1, 2))
        cache.rollback(sequences)
        launches.append(seen.launches)
    assert launches[0] == launches[1] == launches[2] and len(launches[0]) > 20


# ---- passes and graphs ----


def test_steps_that_differ_in_the_exit_layer_or_the_head_alone(two_devices):
    """Each gets a pass of its own: three rounds over them, so that all are captured and replayed."""

    def run(model):
        cache, sequences = prefilled(model, PROMPTS[:1])
        narrow, found = model.with_draft_vocab(range(50)), []
        for _ in range(3):
            for drafting, exit_layer in ((model, 1), (model, 2), (narrow, 1)):
                found.append(draft_step(drafting, cache, sequences, exit_layer, 2).tokens)
                cache.rollback(sequences)
        return found

    device, cpu = on_both(run, SMALL)
    assert same_bits(device, cpu)
    assert len({tuple(tokens.flatten().tolist()) for tokens in cpu}) > 2  # the drafts differ


def test_a_table_shorter_than_the_last_leaves_no_page_behind(two_devices):
    """Position 9 is outside a table of two pages of 4: refused, whatever sequence used the pass before."""
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    cache = PagedKVCache(model, 8, page_size=4)
    for tensor in cache.tensors:
        tensor.zero_()
    one, starts = torch.tensor([1]), torch.tensor([0, 1]).int()

    def verify(position, pages):
        table = torch.tensor([pages]).int()
        rows = PendingRows(one, torch.tensor([position]), torch.tensor([0]).int(), starts, table)
        counts = torch.tensor([0]), torch.tensor([True])
        model.ops.verify_pass(model.weights, model.sizes, cache.tensors, rows, *counts)
        model.ops.to_host(cache.k, one.to(DEVICE))

    verify(9, [5, 6, 7])
    written = cache.k[:, 7].clone()
    with pytest.raises(ValueError, match="block_table names a page outside the cache"):
        verify(9, [1, 2])
    assert torch.equal(cache.k[:, 7], written)


def test_a_failed_capture_leaves_steps_that_run(two_devices):
    def run(model):
        cache, sequences = prefilled(model, PROMPTS[:1])
        found = []
        for _ in range(3):
            verdict = verify_step(model, cache, draft_step(model, cache, sequences, 1, 1))
            cache.rollback(sequences)
            found += [verdict.draft.tokens, verdict.next_tokens, verdict.logits]
        return found

    cpu = run(agreeing_model(**TWO_LAYERS))
    two_devices.failing_captures = 1
    with pytest.warns(RuntimeWarning, match="could not be captured .* out of memory"):
        device = run(agreeing_model(backend="triton", **TWO_LAYERS))
    assert same_bits(device, cpu)
    assert two_devices.capture_error_mode == "thread_local"


@pytest.mark.parametrize("split", [False, True], ids=["whole trees", "split"])
def test_aborted_launches_do_not_spoil_later_ones(two_devices, split):
    """Arrival counters that an aborted launch left standing: the sums and norms after it are there all the same."""

    def run(model):
        cache, sequences = prefilled(model, PROMPTS[:1])
        found = []
        for _ in range(3):
            verdict = verify_step(model, cache, draft_step(model, cache, sequences, 1, 2))
            cache.rollback(sequences)
            found += [verdict.draft.tokens, verdict.next_tokens, verdict.logits]
            for move in moves:
                move.buffers.arrivals.fill_(1)
        return found

    moves = []
    make = graphs.VerifyPass.__init__

    def noting(verify, *args):
        make(verify, *args)
        moves.append(verify.move)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs.VerifyPass, "__init__", noting)
        patch.setattr(launch, "config_of", lambda op: replace(tuned.config_of(op), split=split))
        device = run(agreeing_model(backend="triton", **TWO_LAYERS))
    assert moves and all((move.buffers.partials is not None) == split for move in moves)
    moves.clear()
    assert same_bits(device, run(agreeing_model(**TWO_LAYERS)))


def test_passes_of_a_cache_share_attentions_memory(two_devices, monkeypatch):
    """What the largest kind of step needs, not as much for each kind."""
    made = []

    class Noted(workspace.AttentionScratch):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(workspace, "AttentionScratch", Noted)
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    cache, sequences = prefilled(model)
    for count in (1, 2):
        verify_step(model, cache, draft_step(model, cache, sequences, 1, count))
        cache.rollback(sequences)
    addresses = {scratch.scores.untyped_storage().data_ptr() for scratch in made[1:]}  # the first: the prompts
    assert len(made) == 4 and len(addresses) == 1
    assert all(scratch.scores.data_ptr() != scratch.o.data_ptr() for scratch in made)


def test_a_smaller_batch_replays_the_steps_of_a_larger_one(two_devices):
    """Three sequences in the place of four: the fourth's rows, which the replayed launches had before, are no row's."""

    def run(model):
        cache, sequences = prefilled(model, [random_tokens(n, seed=n) for n in (3, 1, 4, 2)], page_size=4)
        found = []
        for counts in ([2, 2, 1, 2], [1, 2, 2, 2], [2, 1, 2]):
            batch = sequences[: len(counts)]
            before, graphs_before = cache.pool.block_table([sequences[3].id]), captured(model)
            pages = [cache.k[:, before[0, 0]].clone(), cache.v[:, before[0, 0]].clone()]
            verdict = verify_step(model, cache, draft_step(model, cache, batch, 1, counts))
            if len(counts) == 3:
                assert captured(model) == graphs_before
                assert same_bits(pages, [cache.k[:, before[0, 0]], cache.v[:, before[0, 0]]])
            cache.rollback(batch)
            found += [verdict.draft.tokens, verdict.num_accepted, verdict.next_tokens, verdict.logits]
        return found

    def captured(model):
        return model.ops.captured_steps() if model.backend == "triton" else None

    device, cpu = on_both(run)
    assert same_bits(device, cpu)


def test_what_padding_holds_is_nobodys_error(two_devices):
    """A token and a position that no model has, where a step before had its rows; and numbers that are none."""
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    cache, sequences = prefilled(model, [PROMPTS[0]] * 3)
    kept = model.ops._steps
    for batch in (sequences, sequences, sequences):
        cache.commit(verify_step(model, cache, draft_step(model, cache, batch, 1, 1)))
        for of_cache in kept._of_cache.values():
            for a_pass in of_cache.passes.values():
                a_pass.inputs.tokens.fill_(-7)
                a_pass.inputs.positions.fill_(10**6)
            for buffers in of_cache.workspace._buffers.values():
                buffers.hidden.fill_(torch.nan)
                numbers = buffers.attention.numbers  # what fills segments up stays 0
                numbers.copy_(torch.where(numbers != 0, torch.nan, numbers))
    assert all(len(sequence.tokens) > len(PROMPTS[0]) + 3 for sequence in sequences)


def test_threads_take_turns_at_a_pass(two_devices):
    """Two sequences of one cache, a thread each: steps of one kind share buffers, so one waits for the other."""
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    cache, sequences = prefilled(model, [PROMPTS[0], PROMPTS[0]])
    inside, most = [0], [0]
    copy = graphs.StaticInputs.copy

    def counting(inputs, *args):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        copy(inputs, *args)
        threading.Event().wait(0.01)
        inside[0] -= 1

    def decode(sequence):
        with two_devices:
            for _ in range(2):
                cache.commit(verify_step(model, cache, Draft.none([sequence])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs.StaticInputs, "copy", counting)
        threads = [threading.Thread(target=decode, args=(sequence,)) for sequence in sequences]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most[0] == 1
    assert sequences[0].tokens == sequences[1].tokens and len(sequences[0].tokens) == len(PROMPTS[0]) + 3


# ---- errors and devices ----


def test_an_error_is_raised_for_the_cache_it_happened_in(two_devices):
    damaged, sound = (agreeing_model(backend="triton", **TWO_LAYERS) for _ in range(2))
    caches = [prefilled(model, PROMPTS[:1]) for model in (damaged, sound)]
    damaged.weights.final_norm.fill_(torch.nan)  # the final norm
    (bad_cache, bad), (cache, good) = caches
    draft = draft_step(damaged, bad_cache, bad, 1, 1)
    cache.commit(verify_step(sound, cache, Draft.none(good)))
    with pytest.raises(RuntimeError, match="a logit is NaN"):
        verify_step(damaged, bad_cache, draft)
    assert bad_cache.pool.length(bad[0].id) == bad_cache.length(bad[0])


def test_what_an_abandoned_step_noted_is_not_raised_later(two_devices):
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    cache, sequences = prefilled(model, PROMPTS[:1])
    norm = model.weights.final_norm.clone()
    model.weights.final_norm.fill_(torch.nan)
    draft_step(model, cache, sequences, 1, 1)  # nobody waits for it
    model.weights.final_norm.copy_(norm)
    cache.rollback(sequences)
    cache.commit(verify_step(model, cache, Draft.none(sequences)))


def test_a_model_stays_on_its_device(two_devices):
    """Another GPU becomes the current one: launches go to the model's, and new models to the new one."""
    model = agreeing_model(backend="triton", **TWO_LAYERS)
    cache, sequences = prefilled(model, PROMPTS[:1])
    two_devices.current_device = 1
    for _ in range(3):
        cache.commit(verify_step(model, cache, draft_step(model, cache, sequences, 1, 2)))
    samplers = [make_sampler(model, GenerationConfig(temperature=0.7, seed=1), 5)]
    draft_step(model, cache, sequences, 1, 1, samplers)
    assert model.ops.device == DEVICE
    assert ops.backend("triton", torch.device("cuda", 1)).device.index == 1
    assert two_devices.current_device == 1


def test_amd_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(RuntimeError, match=r"does not run on AMD GPUs.*backend='cpu'"):
        TritonOps(DEVICE)
