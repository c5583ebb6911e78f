"""The page pool: each move and error, a failing call changes nothing, and random walks against a model."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from layerskip_kernels._kv import CacheFull, PagePool

ROOT = Path(__file__).parents[1]


def make_pool(num_pages=8, page_size=4, num_layers=3, lengths=()):
    """A pool with one sequence per entry of `lengths`, all rows pending at depth 0; ids are 0, 1, ..."""
    pool = PagePool(num_pages, page_size, num_layers)
    for length in lengths:
        pool.append([pool.add_sequence()], [length])
    return pool


def commit_rows(pool, seq, stop):
    pool.raise_rows([seq], [stop], pool.num_layers)
    pool.commit([seq], [stop])


def snapshot(pool, seqs):
    """All that can be seen of a pool."""
    return (
        pool.num_free,
        pool.num_sequences,
        [(seq, pool.length(seq), pool.committed(seq), pool.depths(seq), pool.pages(seq)) for seq in seqs],
        [pool.ref_count(page) for page in range(pool.num_pages)],
    )


def assert_raises_unchanged(error, match, pool, seqs, call):
    before = snapshot(pool, seqs)
    with pytest.raises(error, match=match) as caught:
        call()
    assert snapshot(pool, seqs) == before
    pool.check_integrity()
    return caught.value


def test_properties():
    pool = make_pool(lengths=[5])
    assert (pool.num_pages, pool.page_size, pool.num_layers) == (8, 4, 3)
    assert (pool.num_free, pool.num_sequences) == (6, 1)
    assert repr(pool) == "PagePool(num_pages=8, page_size=4, num_layers=3; num_free=6, num_cached=0, num_sequences=1)"


@pytest.mark.parametrize("name", ["num_pages", "page_size", "num_layers"])
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_sizes_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be in 1..2147483647, got {value}"):
        PagePool(**{"num_pages": 1, "page_size": 1, "num_layers": 1, name: value})


def test_positions_fit_int32():
    with pytest.raises(ValueError, match="num_pages \\* page_size must be at most 2147483647"):
        PagePool(2**16, 2**15, 1)


def test_sequence_ids_are_never_reused():
    pool = make_pool()
    first = pool.add_sequence()
    pool.free_sequence(first)
    assert pool.add_sequence() != first
    assert pool.num_sequences == 1


def test_free_sequence_gives_back_all_pages():
    pool = make_pool(lengths=[9, 5])
    commit_rows(pool, 0, 6)
    pool.free_sequence(0)
    assert (pool.num_free, pool.num_sequences) == (6, 1)
    pool.check_integrity()


UNKNOWN_SEQUENCE_CALLS = {
    "free_sequence": lambda pool, seq: pool.free_sequence(seq),
    "append": lambda pool, seq: pool.append([0, seq], [1, 1]),
    "raise_rows": lambda pool, seq: pool.raise_rows([0, seq], [1, 0], 1),
    "commit": lambda pool, seq: pool.commit([0, seq], [0, 0]),
    "truncate": lambda pool, seq: pool.truncate(seq, 0),
    "rollback": lambda pool, seq: pool.rollback(seq),
    "length": lambda pool, seq: pool.length(seq),
    "committed": lambda pool, seq: pool.committed(seq),
    "depths": lambda pool, seq: pool.depths(seq),
    "pages": lambda pool, seq: pool.pages(seq),
    "lengths": lambda pool, seq: pool.lengths([0, seq]),
    "committed_lengths": lambda pool, seq: pool.committed_lengths([0, seq]),
    "block_table": lambda pool, seq: pool.block_table([0, seq]),
    "pending_depths": lambda pool, seq: pool.pending_depths([0, seq]),
}


@pytest.mark.parametrize("seq", [1, 7, -1], ids=["freed", "never added", "negative"])
@pytest.mark.parametrize("call", UNKNOWN_SEQUENCE_CALLS.values(), ids=UNKNOWN_SEQUENCE_CALLS.keys())
def test_unknown_sequence(call, seq):
    pool = make_pool(lengths=[5, 1])
    pool.free_sequence(1)
    match = f"sequence {seq} is not in the pool"
    assert_raises_unchanged(ValueError, match, pool, [0], lambda: call(pool, seq))


BATCH_CALLS = {
    "counts": lambda pool, seqs, values: pool.append(seqs, values),
    "stops": lambda pool, seqs, values: pool.raise_rows(seqs, values, 1),
    "lengths": lambda pool, seqs, values: pool.commit(seqs, values),
}


@pytest.mark.parametrize("name", BATCH_CALLS)
def test_batch_lists_are_checked(name):
    pool = make_pool(lengths=[5, 5])
    call = BATCH_CALLS[name]
    match = f"{name} must have one value per sequence, got 1 for 2 seqs"
    assert_raises_unchanged(ValueError, match, pool, [0, 1], lambda: call(pool, [0, 1], [0]))
    match = "seqs must be distinct, sequence 1 comes more than once"
    assert_raises_unchanged(ValueError, match, pool, [0, 1], lambda: call(pool, [1, 0, 1], [0, 0, 0]))
    assert_raises_unchanged(TypeError, name, pool, [0, 1], lambda: call(pool, [0, 1], [0, 0.5]))
    before = snapshot(pool, [0, 1])
    call(pool, [], [])
    assert snapshot(pool, [0, 1]) == before


def test_append_takes_pages_in_order():
    pool = make_pool()
    a, b = pool.add_sequence(), pool.add_sequence()
    pool.append([a, b], [5, 4])
    assert (pool.pages(a), pool.pages(b)) == ([0, 1], [2])
    assert (pool.depths(a), pool.length(a), pool.committed(a)) == ([0] * 5, 5, 0)
    pool.append([b, a], [1, 3])  # the last page of a has room for three
    assert (pool.pages(a), pool.pages(b)) == ([0, 1], [2, 3])
    pool.append([a], [0])
    assert pool.length(a) == 8


def test_append_needs_whole_batch():
    pool = make_pool(num_pages=3, lengths=[3, 0])
    call = lambda: pool.append([0, 1], [5, 5])  # noqa: E731 - one page fits, three do not
    error = assert_raises_unchanged(CacheFull, "3 pages needed, 2 free; free or truncate", pool, [0, 1], call)
    assert (error.needed, error.free) == (3, 2)
    assert isinstance(error, RuntimeError)
    pool.append([0, 1], [5, 4])
    assert pool.num_free == 0
    error = assert_raises_unchanged(CacheFull, "1 pages", pool, [0, 1], lambda: pool.append([0, 1], [0, 1]))
    assert (error.needed, error.free) == (1, 0)


def test_append_of_huge_counts_does_not_overflow():
    pool = make_pool(page_size=1, lengths=[1, 1, 0])
    huge = 2**63 - 1
    call = lambda: pool.append([0, 1, 2], [huge] * 3)  # noqa: E731
    assert assert_raises_unchanged(CacheFull, "full", pool, [0, 1, 2], call).needed == huge


def test_append_rejects_negative_count():
    pool = make_pool(lengths=[3, 3])
    match = r"counts\[1\] must be at least 0, got -1"
    assert_raises_unchanged(ValueError, match, pool, [0, 1], lambda: pool.append([0, 1], [2, -1]))


def test_raise_rows_makes_a_staircase():
    pool = make_pool(lengths=[6])
    pool.raise_rows([0], [4], 2)
    assert pool.depths(0) == [2, 2, 2, 2, 0, 0]
    pool.raise_rows([0], [5], 1)  # deeper rows keep their depth
    assert pool.depths(0) == [2, 2, 2, 2, 1, 0]
    pool.raise_rows([0], [2], 3)
    assert pool.depths(0) == [3, 3, 2, 2, 1, 0]
    pool.raise_rows([0], [0], 3)
    assert pool.depths(0) == [3, 3, 2, 2, 1, 0]


def test_raise_rows_counts_positions_from_the_start_of_the_sequence():
    pool = make_pool(lengths=[6])
    commit_rows(pool, 0, 2)
    pool.append([0], [3])
    pool.raise_rows([0], [4], 1)
    assert (pool.committed(0), pool.depths(0)) == (2, [1, 1, 0])


def test_raise_rows_over_a_batch():
    pool = make_pool(lengths=[2, 3])
    pool.raise_rows([1, 0], [2, 1], 3)
    assert (pool.depths(0), pool.depths(1)) == ([3, 0], [3, 3, 0])


@pytest.mark.parametrize("depth", [0, 4, -1, 2**32 + 1])
def test_raise_rows_checks_depth(depth):
    pool = make_pool(lengths=[2])
    match = rf"depth must be in 1..3 \(num_layers\), got {depth}"
    assert_raises_unchanged(ValueError, match, pool, [0], lambda: pool.raise_rows([0], [1], depth))


@pytest.mark.parametrize("stop", [0, 6], ids=["below committed", "beyond length"])
def test_raise_rows_checks_stop(stop):
    pool = make_pool(lengths=[2, 5])
    commit_rows(pool, 1, 1)
    pool.append([1], [4])
    match = rf"stops\[1\] must be in 1..5 \(committed..length of sequence 1\), got {stop}"
    assert_raises_unchanged(ValueError, match, pool, [0, 1], lambda: pool.raise_rows([0, 1], [2, stop], 1))


def test_commit_drops_rows_beyond_and_their_pages():
    pool = make_pool(lengths=[10, 5])
    pool.raise_rows([0, 1], [10, 5], 3)
    pool.commit([0, 1], [4, 5])
    assert (pool.committed(0), pool.length(0), pool.depths(0), pool.pages(0)) == (4, 4, [], [0])
    assert (pool.committed(1), pool.length(1), pool.pages(1)) == (5, 5, [3, 4])
    assert pool.num_free == 5
    pool.check_integrity()


def test_commit_of_nothing_is_a_rollback():
    pool = make_pool(lengths=[5])
    pool.commit([0], [0])
    assert (pool.length(0), pool.num_free) == (0, 8)


def test_commit_needs_all_layers():
    pool = make_pool(lengths=[4, 4])
    pool.raise_rows([0, 1], [4, 2], 3)
    pool.raise_rows([1], [3], 2)
    match = r"lengths\[1\] = 3 commits a row of sequence 1 at depth 2; a committed row has passed all 3 layers"
    assert_raises_unchanged(ValueError, match, pool, [0, 1], lambda: pool.commit([0, 1], [4, 3]))
    pool.commit([0, 1], [4, 2])
    assert pool.committed_lengths([0, 1]).tolist() == [4, 2]


@pytest.mark.parametrize("length", [1, 6, -1], ids=["below committed", "beyond length", "negative"])
def test_commit_checks_length(length):
    pool = make_pool(lengths=[3, 5])
    commit_rows(pool, 1, 2)
    pool.append([1], [3])
    pool.raise_rows([0, 1], [3, 5], 3)
    match = rf"lengths\[1\] must be in 2..5 \(committed..length of sequence 1\), got {length}"
    assert_raises_unchanged(ValueError, match, pool, [0, 1], lambda: pool.commit([0, 1], [3, length]))


@pytest.mark.parametrize(
    "new_length, committed, depths, num_free",
    [
        (9, 5, [1, 1, 0, 0], 5),
        (8, 5, [1, 1, 0], 6),
        (6, 5, [1], 6),
        (5, 5, [], 6),
        (4, 4, [], 7),
        (0, 0, [], 8),
    ],
)
def test_truncate(new_length, committed, depths, num_free):
    pool = make_pool(lengths=[5])
    commit_rows(pool, 0, 5)
    pool.append([0], [4])
    pool.raise_rows([0], [7], 1)
    pool.truncate(0, new_length)
    assert (pool.length(0), pool.committed(0), pool.depths(0)) == (new_length, committed, depths)
    assert pool.num_free == num_free
    pool.check_integrity()


@pytest.mark.parametrize("new_length", [-1, 6])
def test_truncate_checks_length(new_length):
    pool = make_pool(lengths=[5])
    match = rf"new_length must be in 0..5 \(length of sequence 0\), got {new_length}"
    assert_raises_unchanged(ValueError, match, pool, [0], lambda: pool.truncate(0, new_length))


def test_truncate_then_append_takes_the_same_pages():
    pool = make_pool(lengths=[2, 13])
    pages = pool.pages(1)
    pool.truncate(1, 2)
    pool.append([1], [11])
    assert pool.pages(1) == pages


def test_rollback_drops_pending_rows_only():
    pool = make_pool(lengths=[5])
    commit_rows(pool, 0, 5)
    pool.append([0], [9])
    pool.raise_rows([0], [8], 2)
    pool.rollback(0)
    assert (pool.length(0), pool.committed(0), pool.depths(0), pool.num_free) == (5, 5, [], 6)
    pool.check_integrity()


def test_batch_reads():
    pool = make_pool(lengths=[9, 1, 0])
    pool.raise_rows([0], [3], 2)
    commit_rows(pool, 1, 1)
    seqs = [2, 0, 1, 0]
    depths, query_start_loc = pool.pending_depths(seqs)
    expected = {
        "lengths": (pool.lengths(seqs), np.int64, [0, 9, 1, 9]),
        "committed": (pool.committed_lengths(seqs), np.int64, [0, 0, 1, 0]),
        "table": (pool.block_table(seqs), np.int32, [[-1] * 3, [0, 1, 2], [3, -1, -1], [0, 1, 2]]),
        "depths": (depths, np.int32, [2, 2, 2, 0, 0, 0, 0, 0, 0] * 2),
        "query_start_loc": (query_start_loc, np.int32, [0, 0, 9, 9, 18]),
    }
    for name, (array, dtype, values) in expected.items():
        assert (name, array.dtype, array.tolist()) == (name, dtype, values)


def test_batch_reads_of_nothing():
    pool = make_pool(lengths=[0])
    assert pool.lengths([]).shape == (0,)
    assert pool.block_table([]).shape == (0, 1)
    assert pool.block_table([0]).tolist() == [[-1]]
    assert [array.tolist() for array in pool.pending_depths([])] == [[], [0]]


def test_reads_are_copies():
    pool = make_pool(lengths=[5])
    pool.pages(0).clear()
    pool.depths(0).clear()
    pool.block_table([0])[:] = 99
    assert (pool.pages(0), pool.depths(0), pool.block_table([0]).tolist()) == ([0, 1], [0] * 5, [[0, 1]])


def test_ref_count():
    pool = make_pool(lengths=[5])
    assert [pool.ref_count(page) for page in range(8)] == [1, 1] + [0] * 6
    for page in (-1, 8):
        with pytest.raises(ValueError, match=f"page must be in 0..7, got {page}"):
            pool.ref_count(page)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_check_integrity_sees_damage(tmp_path):
    program = tmp_path / "page_pool_test"
    core = [path for path in (ROOT / "csrc/kv").glob("*.cpp") if path.name != "python.cpp"]
    sources = [ROOT / "tests/cpp/page_pool_test.cpp", *core]
    # Whatever the C++ test does wrong with memory, the sanitizers turn into a failure.
    flags = ["-std=c++17", "-O1", "-g", "-D_GLIBCXX_ASSERTIONS", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, *sources, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


class Model:
    """One sequence in plain Python."""

    def __init__(self):
        self.committed, self.depths, self.marks = 0, [], []

    @property
    def length(self):
        return self.committed + len(self.depths)

    def cut(self, new_length):
        self.committed = min(self.committed, new_length)
        del self.depths[new_length - self.committed :]
        del self.marks[new_length:]


class PagePoolMachine(RuleBasedStateMachine):
    """Random moves, wrong ones too, against the model.

    `storage` plays the K/V tensors: each appended row writes a mark of its own into its slot, so that a page
    given to two sequences, or moved under a row, shows as a row that reads back another mark.
    """

    @initialize(num_pages=st.integers(1, 16), page_size=st.integers(1, 5), num_layers=st.integers(1, 3))
    def start(self, num_pages, page_size, num_layers):
        self.pool = PagePool(num_pages, page_size, num_layers)
        self.models, self.storage, self.num_marks, self.last_id = {}, {}, 0, -1
        for _ in range(3):
            self.add()

    def draw_batch(self, data, low, high):
        """Distinct live sequences and one value each; low and high give the range for a model."""
        seqs = data.draw(st.permutations(sorted(self.models)), label="order")
        seqs = seqs[: data.draw(st.integers(1, len(seqs)), label="size")]
        ranges = [(low(self.models[seq]), high(self.models[seq])) for seq in seqs]
        values = [data.draw(st.integers(*bounds), label="value") for bounds in ranges]
        return seqs, values

    def call(self, error, method, *args):
        """Calls a method that must raise `error` (None: nothing); True when the move was made."""
        if error is None:
            method(*args)
            return True
        assert_raises_unchanged(error, None, self.pool, self.models, lambda: method(*args))
        return False

    def num_pages_for(self, length):
        return -(-length // self.pool.page_size)

    @rule()
    def add(self):
        seq = self.pool.add_sequence()
        assert seq > self.last_id
        self.models[seq], self.last_id = Model(), seq

    @precondition(lambda self: len(self.models) > 2)  # so that a batch stays a batch
    @rule(data=st.data())
    def free(self, data):
        seq = data.draw(st.sampled_from(sorted(self.models)))
        self.pool.free_sequence(seq)
        del self.models[seq]

    @rule(data=st.data(), low=st.sampled_from([0, 0, 0, -1]))
    def append(self, data, low):
        seqs, counts = self.draw_batch(data, lambda _: low, lambda _: 9)
        lengths = [(self.models[seq].length, n) for seq, n in zip(seqs, counts, strict=True)]
        needed = sum(self.num_pages_for(length + n) - self.num_pages_for(length) for length, n in lengths)
        error = CacheFull if needed > self.pool.num_free else None
        if self.call(ValueError if min(counts) < 0 else error, self.pool.append, seqs, counts):
            for seq, count in zip(seqs, counts, strict=True):
                self.write(seq, count)

    def slots(self, seq, start, stop):
        """Where the rows of a sequence are kept, by its page table."""
        pages, size = self.pool.pages(seq), self.pool.page_size
        return [pages[position // size] * size + position % size for position in range(start, stop)]

    def write(self, seq, count):
        model = self.models[seq]
        marks = range(self.num_marks, self.num_marks + count)
        self.storage |= dict(zip(self.slots(seq, model.length, model.length + count), marks, strict=True))
        self.num_marks += count
        model.marks += marks
        model.depths += [0] * count

    @rule(data=st.data(), depth=st.integers(0, 4), slack=st.sampled_from([0, 0, 0, 1]))
    def raise_rows(self, data, depth, slack):
        seqs, stops = self.draw_batch(data, lambda m: m.committed - slack, lambda m: m.length + slack)
        models = [self.models[seq] for seq in seqs]
        good = 1 <= depth <= self.pool.num_layers
        good &= all(m.committed <= stop <= m.length for m, stop in zip(models, stops, strict=True))
        if self.call(None if good else ValueError, self.pool.raise_rows, seqs, stops, depth):
            self.raise_models(models, stops, depth)

    @staticmethod
    def raise_models(models, stops, depth):
        for model, stop in zip(models, stops, strict=True):
            for row in range(stop - model.committed):
                model.depths[row] = max(model.depths[row], depth)

    @rule(data=st.data(), slack=st.sampled_from([0, 0, 0, 1]), raise_first=st.booleans())
    def commit(self, data, slack, raise_first):
        seqs, lengths = self.draw_batch(data, lambda m: m.committed - slack, lambda m: m.length + slack)
        models = [self.models[seq] for seq in seqs]
        if raise_first:
            stops = [data.draw(st.integers(m.committed, m.length), label="stop") for m in models]
            self.pool.raise_rows(seqs, stops, self.pool.num_layers)
            self.raise_models(models, stops, self.pool.num_layers)
        good = all(m.committed <= n <= m.length for m, n in zip(models, lengths, strict=True)) and all(
            depth == self.pool.num_layers
            for m, n in zip(models, lengths, strict=True)
            for depth in m.depths[: n - m.committed]
        )
        if self.call(None if good else ValueError, self.pool.commit, seqs, lengths):
            for model, length in zip(models, lengths, strict=True):
                model.cut(length)
                model.committed, model.depths = length, []

    @rule(data=st.data(), slack=st.sampled_from([0, 0, 0, 1]))
    def truncate(self, data, slack):
        seq = data.draw(st.sampled_from(sorted(self.models)))
        model = self.models[seq]
        new_length = data.draw(st.integers(-slack, model.length + slack))
        good = 0 <= new_length <= model.length
        if self.call(None if good else ValueError, self.pool.truncate, seq, new_length):
            model.cut(new_length)

    @rule(data=st.data())
    def rollback(self, data):
        seq = data.draw(st.sampled_from(sorted(self.models)))
        self.pool.rollback(seq)
        self.models[seq].cut(self.models[seq].committed)

    @invariant()
    def matches_the_model(self):
        self.pool.check_integrity()
        seqs, pool = sorted(self.models), self.pool
        assert pool.num_sequences == len(seqs)
        owned = [page for seq in seqs for page in pool.pages(seq)]
        assert len(set(owned)) == len(owned) == pool.num_pages - pool.num_free
        assert [pool.ref_count(page) for page in range(pool.num_pages)] == [
            owned.count(page) for page in range(pool.num_pages)
        ]
        assert pool.lengths(seqs).tolist() == [self.models[seq].length for seq in seqs]
        assert pool.committed_lengths(seqs).tolist() == [self.models[seq].committed for seq in seqs]
        depths, starts = pool.pending_depths(seqs)
        for row, seq in enumerate(seqs):
            model = self.models[seq]
            assert depths[starts[row] : starts[row + 1]].tolist() == model.depths == pool.depths(seq)

    @invariant()
    def rows_are_where_they_were_written(self):
        seqs = sorted(self.models)
        for seq, row in zip(seqs, self.pool.block_table(seqs).tolist(), strict=True):
            model, pages = self.models[seq], self.pool.pages(seq)
            assert row == pages + [-1] * (len(row) - len(pages))
            assert [self.storage[slot] for slot in self.slots(seq, 0, model.length)] == model.marks


TestPagePoolMachine = PagePoolMachine.TestCase
TestPagePoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
