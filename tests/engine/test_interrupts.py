"""Ctrl-C at every point of a run in turn where CPython would deliver it: the engine goes on as if nothing had happened.

``make test`` takes some of the points, spread over the run, ``make fuzz`` more of them.
"""

import signal
import threading
from dataclasses import dataclass, replace

import pytest
import torch

from layerskip_kernels import Engine, GenerationConfig, generate
from layerskip_kernels.engine.drafting import DraftPlanner
from layerskip_kernels.engine.interrupts import DeferredInterrupt
from support.generations import all_free
from support.interrupts import Interrupter
from support.models import cache_for, random_tokens, tiny_model
from support.random_walks import times_further
from support.tokenizers import Letters

pytestmark = pytest.mark.usefixtures("one_thread")

MOST_POINTS = times_further(60)
MODEL = replace(tiny_model(torch.float32, num_layers=2), tokenizer=Letters())
DRAFTING = GenerationConfig(exit_layer=1, num_speculations=2, max_new_tokens=9)
REQUESTS = [
    (random_tokens(7, seed=0), DRAFTING),
    (random_tokens(7, seed=0), replace(DRAFTING, temperature=0.9, seed=3, num_samples=2)),
    (random_tokens(6, seed=1), GenerationConfig("autoregressive", max_new_tokens=6, stop="zzzz")),
    (random_tokens(5, seed=2), GenerationConfig("early_exit", 1, max_new_tokens=4, return_kv=True)),
]
VICTIM = 3  # the request that is cancelled where one is


@pytest.fixture(autouse=True)
def python_handles_sigint():
    """Also where the tests run in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@dataclass
class Seen:
    """What was handed out about each request."""

    tokens: dict[int, list[int]]
    texts: dict[int, str]
    ends: dict[int, object]

    def note(self, output) -> None:
        assert output.request_id not in self.ends, "an output after the end"
        self.tokens.setdefault(output.request_id, []).extend(output.tokens)
        self.texts[output.request_id] = self.texts.get(output.request_id, "") + output.text
        if output.finish_reason is not None:
            self.ends[output.request_id] = output


def new_engine(tmp_path, preemption) -> Engine:
    """So little room that requests are preempted, and prompts in chunks."""
    cache = cache_for(MODEL, 24, page_size=4, prefix_sharing=True)
    folder = tmp_path if preemption == "swap" else None
    return Engine(MODEL, cache, max_batch=3, chunk_size=5, drafts="fixed", preemption=preemption, swap_dir=folder)


def by_steps(engine, interrupter, seen):
    added = []
    for prompt, config in REQUESTS:
        added += interrupter.until_done(lambda p=prompt, c=config: engine.add_samples(p, c))
        for output in interrupter.until_done(lambda: engine.step()):
            seen.note(output)
    interrupter.until_done(lambda: engine.cancel(added[VICTIM]))
    while engine.num_unfinished:
        for output in interrupter.until_done(lambda: engine.step()):
            seen.note(output)
    return added


def by_run(engine, interrupter, seen):
    added = []
    for prompt, config in REQUESTS:
        added += interrupter.until_done(lambda p=prompt, c=config: engine.add_samples(p, c))
    for request_id, generation in interrupter.until_done(lambda: engine.run()).items():
        seen.tokens[request_id], seen.texts[request_id] = generation.token_ids, generation.text
        seen.ends[request_id] = generation
    return added


def by_streams(engine, interrupter, seen):
    added = []
    for prompt, config in REQUESTS:
        added += interrupter.until_done(lambda p=prompt, c=config: engine.add_samples(p, c))
    for request_id in added:
        while request_id not in seen.ends:
            stream = engine.stream(request_id)
            while request_id not in seen.ends:
                try:
                    # A loop, since next() is itself a call that a Ctrl-C can follow.
                    seen.note(interrupter.once(lambda s=stream: first_of(s)))
                except KeyboardInterrupt:
                    break
    return added


def first_of(stream):
    for output in stream:
        return output
    raise AssertionError("a stream ended without its last output")


def outcome(drive, tmp_path, preemption, *at, within=None, number=signal.SIGINT):
    """Requests in the order of arrival: tokens, text, reason; and the number of events."""
    engine, interrupter, seen = (
        new_engine(tmp_path, preemption),
        Interrupter(*at, within=within, number=number),
        Seen({}, {}, {}),
    )
    added = drive(engine, interrupter, seen)
    assert seen.ends.keys() == set(added), f"at {at}"
    for request_id, end in seen.ends.items():
        generation = getattr(end, "generation", end)
        assert (seen.tokens[request_id], seen.texts[request_id]) == (generation.token_ids, generation.text), f"at {at}"
    assert engine.num_unfinished == 0 and engine.step() == []
    assert (engine.stats.draft_errors, engine.stats.batch_errors) == (0, 0), "rows that nobody rolled back"
    assert all_free(engine) and not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert torch.is_grad_enabled() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    found = [(seen.tokens[i], seen.texts[i], seen.ends[i].finish_reason) for i in added]
    return found, interrupter, engine


def interrupted_everywhere(drive, tmp_path, preemption, most, presses=1, within=None, number=signal.SIGINT):
    """The run with a Ctrl-C at its points in turn, which must have the outcome of one without."""
    outcome(drive, tmp_path, preemption)  # what is computed once is not counted
    expected, counting, engine = outcome(drive, tmp_path, preemption, within=within, number=number)
    assert engine.stats.preemptions > 0
    points, fired = range(1, counting.events + 1, max(1, counting.events // most)), 0
    for at in points:
        found, interrupter, _ = outcome(
            drive, tmp_path, preemption, *range(at, at + presses), within=within, number=number
        )
        fired += interrupter.fired > 0
        if drive is by_steps:  # a step that is made again comes later, so the victim may have gained less or more
            compare_with_victim(found, expected)
        else:
            assert found == expected, f"at {at}"
    assert len(points) > 20
    # With swaps, a run has more or fewer points as it waits longer or less for the file.
    assert fired > (0.7 if preemption == "swap" else 0.9) * len(points)


@pytest.fixture(autouse=True)
def calls_of_the_same_length(monkeypatch):
    """How many cycles a call has must not depend on the time they take, or each run has points of its own."""
    monkeypatch.setattr(DraftPlanner, "CALL_SECONDS", 1e9)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("drive", [by_steps, by_run, by_streams])
def test_ctrl_c_at_every_point_of_a_run(drive, preemption, tmp_path):
    interrupted_everywhere(drive, tmp_path, preemption, MOST_POINTS)


@pytest.mark.parametrize("presses", [2, 4, 6])
def test_ctrl_c_again_at_once(presses, tmp_path):
    """While the first one is being dealt with."""
    interrupted_everywhere(by_run, tmp_path, "recompute", MOST_POINTS, presses)


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM])
def test_a_time_limit_at_every_point_of_a_run(number, tmp_path):
    """Any signal whose handler raises: of an alarm that ends what takes too long, of a service that is told to stop."""
    interrupted_everywhere(by_steps, tmp_path, "swap", MOST_POINTS, number=number)


@pytest.mark.parametrize("drive", [by_steps, by_run])
def test_ctrl_c_while_outputs_are_handed_out(drive, tmp_path):
    """All points of the one function where an output leaves the engine."""
    interrupted_everywhere(drive, tmp_path, "recompute", 10**9, within="_hand_out")


def compare_with_victim(found, expected):
    for i, (ours, whole) in enumerate(zip(found, expected, strict=True)):
        if i == VICTIM:
            shorter, longer = sorted([ours[0], whole[0]], key=len)
            assert longer[: len(shorter)] == shorter and ours[2] == "cancelled"
        else:
            assert ours == whole


@pytest.mark.parametrize("presses", [1, 2, 3])
def test_ctrl_c_at_every_point_of_generate(presses):
    """The cache that it was given is left empty, and is as good as before."""
    cache = cache_for(MODEL, 48, page_size=4)
    prompts, config = [random_tokens(5), random_tokens(9, seed=1)], replace(DRAFTING, max_new_tokens=3)
    counting = Interrupter()
    expected = [g.token_ids for g in counting.once(lambda: generate(MODEL, prompts, config, cache=cache))]
    asked = 0
    for at in range(1, counting.events + 1, max(1, counting.events // MOST_POINTS)):
        interrupter = Interrupter(*range(at, at + presses))
        try:
            interrupter.once(lambda: generate(MODEL, prompts, config, cache=cache))
        except KeyboardInterrupt:
            asked += 1
        cache.check_integrity()
        assert (cache.num_free_pages, cache.pool.num_sequences) == (cache.pool.num_pages, 0), f"at {at}"
    assert asked > 40
    assert [g.token_ids for g in generate(MODEL, prompts, config, cache=cache)] == expected


def test_without_the_deferral_it_would_break(tmp_path, monkeypatch):
    """The test notices: the same points, with nothing deferred."""
    monkeypatch.setattr(DeferredInterrupt, "__enter__", lambda self: self)
    expected, counting, _ = outcome(by_run, tmp_path, "recompute")
    broken = 0
    for at in range(1, counting.events + 1, counting.events // 60):
        try:
            with torch.enable_grad():  # an interrupted torch.no_grad() leaves gradients off
                broken += outcome(limited(by_run), tmp_path, "recompute", at)[0] != expected
        except Exception:
            broken += 1
    assert broken > 2


def limited(drive):
    """Steps instead of run(), which would go on for ever."""

    def driven(engine, interrupter, seen):
        engine.run = lambda: None
        added = drive_adds(engine, interrupter)
        for _ in range(60):
            for output in interrupter.until_done(lambda: engine.step()):
                seen.note(output)
        return added

    return driven


def drive_adds(engine, interrupter):
    added = []
    for prompt, config in REQUESTS:
        added += interrupter.until_done(lambda p=prompt, c=config: engine.add_samples(p, c))
    return added


# ---- the deferral itself ----


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_a_deferred_ctrl_c_comes_at_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt():
        interrupt()
        done.append(1)
    assert done == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_not_held_is_interrupted_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt() as deferred:
        deferred.held = False
        interrupt()
        done.append(1)
    assert not done


def test_nested_deferrals_deliver_at_the_outermost():
    done = []
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt():
        with DeferredInterrupt():
            interrupt()
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_a_deferred_ctrl_c_reaches_the_handler_there_is():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        with DeferredInterrupt():
            interrupt()
            assert not seen
        assert seen == [True]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_defer_nothing():
    def work():
        with DeferredInterrupt() as deferred:
            handlers.append(signal.getsignal(signal.SIGINT))
            deferred.deliver()

    handlers = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_what_ended_before_an_interrupt_is_not_lost(monkeypatch):
    """run() is interrupted after some requests ended; the next one returns them all."""
    engine = Engine(MODEL, cache_for(MODEL, 400))
    ids = [engine.add_request([i], replace(DRAFTING, max_new_tokens=3 * i + 1)) for i in range(4)]
    advance, count = engine._advance, 0

    def interrupted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 6:
            interrupt()
        return advance(*args, **kwargs)

    monkeypatch.setattr(engine, "_advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert 0 < len(engine._requests) < 4
    assert sorted(engine.run()) == ids
