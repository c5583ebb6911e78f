"""The engine in random walks: prefixes, forks, evictions, swaps, chunks, cancelling, failures and foreign pages, all in
one cache, and every request that ends has the bits that plain decoding gives it alone. ``make fuzz`` walks further."""

import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from layerskip_kernels import CacheFull, Draft, Engine, GenerationConfig, make_sampler, verify_step
from layerskip_kernels.errors import SwapError
from support.models import cache_for, threads, tiny_model
from support.random_walks import times_further, walk

STEPS = times_further(2000)
STEPS_PER_WALK = 50
MODEL = tiny_model(torch.float32, num_layers=2)
LONGEST_PROMPT, LONGEST_TEXT = 12, 16
EVERY_TOKEN = tuple(range(MODEL.config.vocab_size))
CONFIGS = {
    "plain": dict(strategy="autoregressive"),
    "drafting": dict(num_speculations=2),
    "far": dict(num_speculations=7),
    "sampled": dict(temperature=0.9, seed=5),
    "penalties": dict(temperature=0.7, seed=6, top_k=20, repetition_penalty=1.4, num_speculations=3),
    "without a choice": dict(stop_token_ids=EVERY_TOKEN, min_new_tokens=1),
}
NO_MEMORY = MemoryError("as asked")
taken = Counter()


def config_of(name: str, length: int, samples: int = 1) -> GenerationConfig:
    drafts = {} if name == "plain" else {"exit_layer": 1}
    return GenerationConfig(
        max_new_tokens=length, num_samples=samples, return_logits=True, return_kv=True, **drafts, **CONFIGS[name]
    )


@cache
def alone(prompt: tuple, name: str, sample: int):
    """Plain decoding of the longest text without an engine: tokens, logits, k and v."""
    kv = cache_for(MODEL, len(prompt) + LONGEST_TEXT)
    sequence, logits = kv.add_sequence(prompt), []
    samplers = [make_sampler(MODEL, config_of(name, LONGEST_TEXT), len(prompt), sample)]
    for _ in range(LONGEST_TEXT):
        verdict = verify_step(MODEL, kv, Draft.none([sequence]), samplers)
        kv.commit(verdict)
        logits.append(verdict.logits)
    return sequence.tokens[len(prompt) :], torch.cat(logits), *kv.export(sequence)


class EngineMachine(RuleBasedStateMachine):
    @initialize(number=st.integers(0, 2**20))
    def start(self, number):
        random = Random(number)
        self.folder = tempfile.TemporaryDirectory()
        page_size = random.choice([1, 3, 4, 7])
        # Room for the longest request, and for little more: pages run short all the time.
        positions = LONGEST_PROMPT + LONGEST_TEXT + random.randint(0, 12)
        self.cache = cache_for(MODEL, positions, page_size, prefix_sharing=random.random() < 0.8)
        self.engine = Engine(
            MODEL,
            self.cache,
            max_batch=random.randint(2, 6),
            chunk_size=random.choice([1, 3, 8, 64]),
            drafts=random.choice(["fixed", "fixed", "measured"]),
            preemption=random.choice(["auto", "swap", "swap", "recompute"]),
            swap_dir=random.choice([None, self.folder.name, self.folder.name]),
        )
        self.asked = {}  # by id: prompt, name of the config, length, sample
        self.gained, self.ended, self.held = Counter(), set(), []
        self.faulty = self.were_held = False
        self.texts = [[0], [1, 0, 1]]  # to begin like

    @rule(number=st.integers(0, 2**20))
    def move(self, number):
        random = Random(number)
        moves = [self.add, self.add, self.add_samples, self.step, self.step, self.step, self.steps]
        moves += [self.cancel, self.stream, self.fail_once, self.hold, self.release]
        moves += 3 * [self.damage_files] if self.files else []
        chosen = random.choice(moves)
        taken[chosen.__name__] += 1
        with threads(1):
            chosen(random)

    def new_prompt(self, random):
        """Few kinds of tokens, and beginnings that came before, so that pages are found."""
        known = random.choice(self.texts)[: random.randint(0, LONGEST_PROMPT - 1)]
        return known + [random.randint(0, 1) for _ in range(random.randint(1, LONGEST_PROMPT - len(known)))]

    def add(self, random, samples=1):
        names = list(CONFIGS) if samples == 1 else ["drafting", "sampled", "penalties"]
        prompt, name, length = self.new_prompt(random), random.choice(names), random.randint(1, LONGEST_TEXT)
        ids = self.engine.add_samples(
            prompt, config_of(name, length, samples), salt=random.choice([None, None, b"tenant"])
        )
        for sample, request_id in enumerate(ids):
            assert request_id not in self.asked
            self.asked[request_id] = tuple(prompt), name, length, sample

    def add_samples(self, random):
        self.add(random, samples=random.randint(2, 4))

    def step(self, random):
        self.collect(self.engine.step())

    def steps(self, random):
        for _ in range(random.randint(2, 12)):
            self.step(random)

    def cancel(self, random):
        if self.asked:
            request_id = random.choice(sorted(self.asked))
            going = request_id in self.going
            assert self.engine.cancel(request_id) == going
            self.collect(self.engine.step())
            assert request_id in self.ended

    def stream(self, random):
        """One output of a stream, which is then left."""
        if going := sorted(self.asked.keys() - self.ended):
            outputs = self.engine.stream(random.choice(going))
            try:
                self.collect([next(outputs)])
            except StopIteration as error:
                raise AssertionError("a stream ended without its last output") from error

    def fail_once(self, random):
        """The next call of one kind fails: swaps for want of room, the others for want of memory."""
        name = random.choice(["swap_out", "swap_in", "commit", "export", "add_sequence", "_publish"])

        def failing(*args, **kwargs):
            delattr(self.cache, name)  # the method of the class is there again
            if name == "_publish":
                return None
            raise SwapError("as asked") if "swap" in name else NO_MEMORY

        setattr(self.cache, name, failing)
        self.faulty |= "swap" not in name

    def damage_files(self, random):
        for path in self.files:
            content = bytearray(path.read_bytes() or b"0")
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
            path.write_bytes(content[: random.choice([None, len(content) // 2])])
            taken["damaged"] += 1
            if random.random() < 0.2:
                path.unlink()

    @property
    def files(self):
        return sorted(Path(self.folder.name).rglob("*.kv"))

    def hold(self, random):
        """Somebody else takes pages of the same cache."""
        if not self.held and "add_sequence" not in vars(self.cache):
            self.held.append(self.cache.add_sequence([0] * random.randint(1, 9), salt="held"))
            try:
                self.cache.pool.append([self.held[0].id], [len(self.held[0].tokens)])
                self.were_held = True
            except CacheFull:
                self.release(random)

    def release(self, random):
        while self.held:
            self.cache.free(self.held.pop())

    # ---- what comes back ----

    def collect(self, outputs):
        for output in outputs:
            request_id = output.request_id
            prompt, name, length, sample = self.asked[request_id]
            assert request_id not in self.ended
            self.gained[request_id] += len(output.tokens)
            if output.finish_reason is not None:
                self.ended.add(request_id)
                taken[output.finish_reason] += 1
                assert len(output.generation.token_ids) == self.gained[request_id]
                self.check_end(output, prompt, name, length, sample)

    def check_end(self, output, prompt, name, length, sample):
        generation, count = output.generation, len(output.generation.token_ids)
        if name == "without a choice":
            assert output.finish_reason in ("error", "cancelled") and count == 0
            return
        tokens, logits, k, v = alone(prompt, name, sample)
        assert generation.token_ids == tokens[:count]
        if output.finish_reason == "error":
            fault = output.error is NO_MEMORY and self.faulty
            assert fault or (isinstance(output.error, CacheFull) and self.were_held)
            return
        assert (output.finish_reason, count) == ("length", length) or output.finish_reason == "cancelled"
        if count:
            assert torch.equal(generation.logits, logits[:count])
            self.texts = [*self.texts[-20:], [*prompt, *generation.token_ids]]
        if output.finish_reason == "length":
            stop = len(prompt) + count - 1
            assert torch.equal(generation.kv[0], k[:, :stop]) and torch.equal(generation.kv[1], v[:, :stop])

    @invariant()
    def all_is_accounted_for(self):
        if not hasattr(self, "engine"):
            return
        taken["steps"] += 1
        self.cache.check_integrity()
        assert self.engine.num_unfinished == len(self.asked.keys() - self.ended)
        assert len(self.engine._scheduler.waiting) + len(self.engine._scheduler.running) == len(self.going)
        running = len(self.engine._scheduler.running)
        assert running <= self.engine._scheduler.max_batch
        assert self.cache.pool.num_sequences >= running + len(self.held)

    @property
    def going(self):
        """Requests that have not ended; of the end of some others nobody has been told yet."""
        return set(self.engine._requests)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        with threads(1):
            self.release(None)
            for _ in range(2000):
                if not self.engine.num_unfinished:
                    break
                self.step(None)
        assert self.ended == self.asked.keys()
        stats, cache_stats = self.engine.stats, self.cache.stats()
        assert (self.cache.pool.num_sequences, self.cache.num_free_pages) == (0, self.cache.pool.num_pages)
        assert not self.files
        taken.update(preemptions=stats.preemptions, swapped_in=stats.swapped_in, swap_errors=stats.swap_errors)
        taken.update(hits=cache_stats.hit_tokens, evictions=cache_stats.num_evictions, copies=cache_stats.num_copies)
        self.folder.cleanup()


def test_random_walks():
    seen = "add add_samples cancel cancelled copies error evictions hits hold length preemptions stream "
    seen += "swap_errors swapped_in"
    walk(EngineMachine, taken, STEPS, STEPS_PER_WALK, seen)
