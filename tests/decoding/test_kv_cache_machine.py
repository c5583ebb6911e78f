"""The cache with its tensors in random walks: whatever was shared, copied, evicted, swapped and cut, each sequence
reads back the K and V of its own tokens. ``make fuzz`` walks further."""

import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from random import Random
from types import SimpleNamespace

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from layerskip_kernels import CacheFull, PagedKVCache, SwapError
from support.models import tiny_model
from support.random_walks import times_further, walk

STEPS = times_further(2000)
STEPS_PER_WALK = 80
SALTS = [None, "", "tenant"]
MODEL = tiny_model(torch.float32)
taken = Counter()


SHAPE = (MODEL.config.num_layers, 2 * MODEL.config.num_kv_heads, MODEL.config.head_dim)


@lru_cache(maxsize=100_000)
def row(tokens):
    """What the last one's k and v hold, [L, 2 * G, K]: numbers that depend on all tokens."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(hash(tokens) % 2**31))


def kv(tokens):
    """k and v, [L, positions, G, K] each."""
    rows = [row(tuple(tokens[: i + 1])) for i in range(len(tokens))]
    both = torch.stack(rows, 1) if rows else torch.empty(SHAPE[0], 0, *SHAPE[1:])
    return both.chunk(2, dim=2)


class CacheMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(1, 12), page_size=st.sampled_from([3, 2, 4, 1]))
    def start(self, num_pages, page_size):
        self.cache = PagedKVCache(MODEL, num_pages, page_size, prefix_sharing=True)
        for tensor in self.cache.tensors:
            tensor.fill_(torch.nan)
        self.sequences, self.swapped = [], {}
        self.folder = tempfile.TemporaryDirectory()
        for _ in range(2):
            self.add(Random(0))

    def teardown(self):
        if hasattr(self, "cache"):
            stats = self.cache.stats()
            taken.update(evictions=stats.num_evictions, copies=stats.num_copies, hits=stats.hit_tokens)
            self.folder.cleanup()

    @rule(number=st.integers(0, 2**20))
    def step(self, number):
        random = Random(number)
        more = [self.add, self.add_known, self.fork] if len(self.sequences) < 8 else []
        fewer = [self.free] if len(self.sequences) > 2 else []
        move = random.choice(
            [*more, *fewer, self.grow, self.grow, self.grow, self.truncate, self.swap_out, self.swap_in]
        )
        taken[move.__name__] += 1
        move(random)

    def new_tokens(self, random, low, high):
        return [random.randint(0, 1) for _ in range(random.randint(low, high))]

    def add(self, random):
        self.sequences.append(self.cache.add_sequence(self.new_tokens(random, 1, 12), random.choice(SALTS)))

    def add_known(self, random):
        tokens = random.choice(self.sequences).tokens + self.new_tokens(random, 0, 3)
        self.sequences.append(self.cache.add_sequence(tokens, random.choice(SALTS)))

    def fork(self, random):
        sequence = random.choice(self.sequences)
        self.sequences.append(self.cache.fork(sequence))
        self.grow_one(random, random.choice([sequence, self.sequences[-1]]))

    def free(self, random):
        sequence = self.sequences.pop(random.randrange(len(self.sequences)))
        self.swapped.pop(sequence.id, None)
        self.cache.free(sequence)

    def grow(self, random):
        self.grow_one(random, random.choice(self.sequences))

    def grow_one(self, random, sequence):
        """The known tokens that are missing, then a few more, of which some are rejected: as the steps do it."""
        cache, pool, start = self.cache, self.cache.pool, self.cache.length(sequence)
        known = len(sequence.tokens)
        tokens = sequence.tokens + self.new_tokens(random, 0, 4)
        try:
            pool.append([sequence.id], [len(tokens) - start])
        except CacheFull:
            taken["full"] += 1
            return
        positions = torch.arange(start, len(tokens))
        page = torch.tensor(pool.pages(sequence.id))[positions // pool.page_size]
        offset = positions % pool.page_size
        k, v = kv(tokens)
        cache.k[:, page, :, :, offset] = k[:, start:].transpose(0, 1)
        cache.v[:, page, :, offset, :] = v[:, start:].transpose(0, 1)
        pool.raise_rows([sequence.id], [len(tokens)], pool.num_layers)
        if random.random() < 0.2:
            cache.rollback([sequence])
            return
        accepted = random.randint(0, len(tokens) - known)
        draft = SimpleNamespace(sequences=[sequence], num_waiting=[0])
        gained = [*tokens[known : known + accepted], random.randint(0, 1)]
        cache.commit(SimpleNamespace(draft=draft, accepted=[accepted], new_tokens=lambda b: gained))

    def truncate(self, random):
        sequence = random.choice(self.sequences)
        self.cache.truncate(sequence, random.randint(0, self.cache.length(sequence)))
        self.forget(sequence)

    def forget(self, sequence):
        """A swap of tokens that are no longer the sequence's."""
        swapped = self.swapped.get(sequence.id)
        if swapped and swapped[0] != sequence.tokens[: len(swapped[0])]:
            del self.swapped[sequence.id]

    def swap_out(self, random):
        sequence = random.choice(self.sequences)
        tokens = sequence.tokens[: self.cache.length(sequence)]
        to = Path(self.folder.name) / str(sequence.id) if random.random() < 0.3 else None
        before = self.cache.num_free_pages
        self.swapped[sequence.id] = tokens, self.cache.swap_out(sequence, to)
        assert self.cache.length(sequence) == 0 and sequence.tokens[: len(tokens)] == tokens
        assert self.cache.num_free_pages >= before

    def swap_in(self, random):
        sequence = random.choice(self.sequences)
        if sequence.id not in self.swapped:
            return
        tokens, swapped = self.swapped[sequence.id]
        length = self.cache.length(sequence)
        try:
            self.cache.swap_in(sequence, swapped)
        except CacheFull:
            taken["full"] += 1
            assert self.cache.length(sequence) == length
            return
        assert self.cache.length(sequence) == max(length, len(tokens))
        taken["swapped_in"] += 1
        other = next((s for s in self.sequences if s.tokens[: len(tokens)] != tokens), None)
        if other is not None:
            try:
                self.cache.swap_in(other, swapped)
            except SwapError:
                return
            raise AssertionError("swapped the tokens of another sequence in")

    @invariant()
    def each_reads_its_own(self):
        taken["steps"] += 1
        self.cache.check_integrity()
        for sequence in self.sequences:
            length = self.cache.length(sequence)
            assert len(sequence.tokens) >= length
            for got, expected in zip(self.cache.export(sequence), kv(sequence.tokens[:length]), strict=True):
                assert torch.equal(got, expected)


def test_random_walks():
    moves = "add add_known copies evictions fork free full grow hits swap_out swapped_in truncate"
    walk(CacheMachine, taken, STEPS, STEPS_PER_WALK, moves)
