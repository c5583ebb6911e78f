"""The page pool: each move and error, and a failing call changes nothing."""

import hashlib
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from layerskip_kernels._kv import CacheFull, PagePool

from support.pools import assert_raises_unchanged, snapshot


def make_pool(num_pages=8, page_size=4, num_layers=3, lengths=(), **options):
    """A pool with one sequence per entry of `lengths`, all rows pending at depth 0; ids are 0, 1, ..."""
    pool = PagePool(num_pages, page_size, num_layers, **options)
    for length in lengths:
        pool.append([pool.add_sequence()], [length])
    return pool


def commit_rows(pool, seq, stop):
    pool.raise_rows([seq], [stop], pool.num_layers)
    pool.commit([seq], [stop])


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
    "fork": lambda pool, seq: pool.fork(seq),
    "publish": lambda pool, seq: pool.publish(seq, []),
    "num_published": lambda pool, seq: pool.num_published(seq),
    "pages_needed": lambda pool, seq: pool.pages_needed([0, seq], [1, 1]),
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
        for read in (pool.ref_count, pool.page_name):
            with pytest.raises(ValueError, match=f"page must be in 0..7, got {page}"):
                read(page)


# ---- forks and copies ----


def copying_pool(**options):
    """A pool with the list of the copies it made."""
    copies = []
    return make_pool(copy_page=lambda source, target: copies.append((source, target)), **options), copies


def test_fork_shares_all_pages():
    pool, copies = copying_pool(lengths=[6])
    commit_rows(pool, 0, 6)
    fork = pool.fork(0)
    assert pool.pages(fork) == pool.pages(0) == [0, 1]
    assert (pool.committed(fork), pool.depths(fork), pool.num_free, copies) == (6, [], 6, [])
    assert [pool.ref_count(page) for page in (0, 1, 2)] == [2, 2, 0]
    pool.free_sequence(0)
    assert (pool.num_free, pool.pages(fork)) == (6, [0, 1])
    pool.check_integrity()


def test_fork_refuses_pending_rows():
    pool = make_pool(lengths=[6])
    match = "sequence 0 has 6 pending rows; commit or roll back before a fork"
    assert_raises_unchanged(ValueError, match, pool, [0], lambda: pool.fork(0))


def test_a_write_into_a_shared_page_copies_it():
    pool, copies = copying_pool(lengths=[6])
    commit_rows(pool, 0, 6)
    fork = pool.fork(0)
    pool.append([fork], [0])
    assert copies == []
    pool.append([fork], [1])
    assert copies == [(1, 2)]
    assert (pool.pages(0), pool.pages(fork)) == ([0, 1], [0, 2])
    pool.append([0], [3])  # page 1 is its own again; the ninth row begins a page
    assert (copies, pool.pages(0)) == ([(1, 2)], [0, 1, 3])
    assert pool.stats()["num_copies"] == 1
    pool.check_integrity()


def test_a_new_page_needs_no_copy():
    pool, copies = copying_pool(lengths=[8])
    commit_rows(pool, 0, 8)
    fork = pool.fork(0)
    pool.append([0, fork], [1, 1])
    assert (copies, pool.pages(0), pool.pages(fork)) == ([], [0, 1, 2], [0, 1, 3])


def test_a_batch_of_forks_copies_for_all_but_one():
    pool, copies = copying_pool(lengths=[6])
    commit_rows(pool, 0, 6)
    forks = [pool.fork(0) for _ in range(3)]
    seqs = [*forks, 0]
    assert pool.pages_needed(seqs, [1] * 4) == 3
    assert pool.pages_needed(seqs[:2], [3, 1]) == 3  # copies for both, and the ninth row of one
    pool.append(seqs, [1] * 4)
    assert copies == [(1, 2), (1, 3), (1, 4)]
    assert [pool.pages(seq)[1] for seq in seqs] == [2, 3, 4, 1]
    assert pool.num_free == 3
    pool.check_integrity()


def test_copies_count_as_pages_needed():
    pool, copies = copying_pool(num_pages=3, lengths=[6])
    commit_rows(pool, 0, 6)
    forks = [pool.fork(0), pool.fork(0)]
    call = lambda: pool.append(forks, [1, 1])  # noqa: E731 - one page is free
    error = assert_raises_unchanged(CacheFull, "2 pages needed, 1 free", pool, [0, *forks], call)
    assert ((error.needed, error.free), copies) == ((2, 1), [])
    pool.append(forks[:1], [1])


def test_a_copy_that_fails_changes_nothing():
    def copy_page(source, target):
        raise KeyboardInterrupt

    pool = make_pool(lengths=[6], copy_page=copy_page)
    commit_rows(pool, 0, 6)
    fork = pool.fork(0)
    assert_raises_unchanged(KeyboardInterrupt, None, pool, [0, fork], lambda: pool.append([fork], [1]))


def test_truncate_of_a_fork_leaves_the_others_pages():
    pool = make_pool(lengths=[9])
    commit_rows(pool, 0, 9)
    fork = pool.fork(0)
    pool.truncate(fork, 3)
    assert (pool.pages(0), pool.pages(fork), pool.num_free) == ([0, 1, 2], [0], 5)
    pool.check_integrity()


# ---- prefix sharing ----


def fill(pool, seq, tokens):
    """Make a sequence `tokens` long, committed and published."""
    pool.append([seq], [len(tokens) - pool.length(seq)])
    commit_rows(pool, seq, len(tokens))
    size = pool.page_size
    pool.publish(seq, tokens[pool.num_published(seq) * size : len(tokens) // size * size])


def sharing_pool(tokens=(), salt=None, **options):
    """A pool that knows `tokens`, in the cached pages of a sequence that was freed."""
    pool = make_pool(identity=b"model", **options)
    if tokens:
        seq = pool.add_sequence(tokens, salt)
        fill(pool, seq, tokens)
        pool.free_sequence(seq)
    return pool


@pytest.mark.parametrize(
    ("length", "hit"), [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (14, 12), (40, 12)]
)
def test_the_longest_chain_of_full_pages_is_found(length, hit):
    """At least the last token is left to be computed."""
    pool = sharing_pool([*range(14)])
    assert (pool.num_free, pool.num_cached, pool.num_available) == (5, 3, 8)
    seq = pool.add_sequence([*range(14), *range(100, 126)][:length])
    assert (pool.committed(seq), pool.length(seq), pool.num_published(seq)) == (hit, hit, hit // 4)
    assert (pool.num_cached, pool.num_available) == (3 - hit // 4, 8 - hit // 4)
    stats = pool.stats()
    assert (stats["hit_tokens"], stats["queried_tokens"]) == (hit, 14 + length)
    pool.check_integrity()


def test_only_equal_beginnings_are_found():
    pool = sharing_pool([*range(14)])
    for tokens in ([9, *range(1, 14)], [1, 0, *range(2, 14)], [*range(4, 14)], [*range(4), *range(8, 14)]):
        expected = 4 if tokens[:4] == [*range(4)] else 0
        assert pool.committed(pool.add_sequence(tokens)) == expected


def test_salts_keep_tenants_apart():
    """No salt, an empty one, and salts of which one begins the other."""
    salts = [None, b"", b"a", b"ab", b"b"]
    for salt in salts:
        pool = sharing_pool([*range(9)], salt)
        hits = [pool.committed(pool.add_sequence([*range(9)], other)) for other in salts]
        assert hits == [8 if other == salt else 0 for other in salts]


def test_a_name_is_the_documented_chain():
    def field(tag, value):
        return tag + struct.pack("<Q", len(value)) + value

    def digest(*fields):
        return hashlib.sha256(field(b"D", b"layerskip_kernels prefix 1") + b"".join(fields)).digest()

    for salt, salted in ((None, b""), (b"tenant", field(b"S", b"tenant"))):
        pool = make_pool(identity=b"model")
        seq = pool.add_sequence([], salt)
        fill(pool, seq, [0, 1, 2, 2**31 - 1, 5, 6, 7, 8, 9])
        first = digest(
            field(b"P", digest(field(b"M", b"model"), salted)), field(b"T", struct.pack("<4i", 0, 1, 2, 2**31 - 1))
        )
        second = digest(field(b"P", first), field(b"T", struct.pack("<4i", 5, 6, 7, 8)))
        assert [pool.page_name(page) for page in pool.pages(seq)] == [first, second, None]


def test_the_model_is_part_of_the_name():
    names = set()
    for identity in (b"", b"a", b"b"):
        pool = make_pool(identity=identity)
        seq = pool.add_sequence()
        fill(pool, seq, [1, 2, 3, 4])
        names.add(pool.page_name(0))
    assert len(names) == 3


def test_only_committed_full_pages_are_published():
    pool = make_pool(identity=b"model", lengths=[9])
    pool.raise_rows([0], [7], 3)
    match = "full committed pages from page 0 on: a multiple of 4, at most 0, got 4"
    assert_raises_unchanged(ValueError, match, pool, [0], lambda: pool.publish(0, [1, 2, 3, 4]))
    pool.commit([0], [7])
    match = "a multiple of 4, at most 7, got 8"
    assert_raises_unchanged(ValueError, match, pool, [0], lambda: pool.publish(0, [*range(8)]))
    match = "a multiple of 4, at most 7, got 3"
    assert_raises_unchanged(ValueError, match, pool, [0], lambda: pool.publish(0, [*range(3)]))
    pool.publish(0, [*range(4)])
    match = "from page 1 on: a multiple of 4, at most 3, got 4"
    assert_raises_unchanged(ValueError, match, pool, [0], lambda: pool.publish(0, [*range(4)]))


def test_no_identity_no_sharing():
    pool = make_pool(lengths=[4])
    assert not pool.shares_prefixes
    commit_rows(pool, 0, 4)
    assert_raises_unchanged(ValueError, "build it with an identity", pool, [0], lambda: pool.publish(0, [1, 2, 3, 4]))
    assert pool.committed(pool.add_sequence([1, 2, 3, 4, 5])) == 0


def test_the_first_page_of_a_name_keeps_it():
    pool = make_pool(identity=b"model", lengths=[0, 0])
    for seq in (0, 1):
        fill(pool, seq, [1, 2, 3, 4])
    assert [pool.page_name(page) is None for page in (0, 1)] == [False, True]
    pool.free_sequence(1)
    pool.free_sequence(0)
    assert (pool.num_free, pool.num_cached) == (7, 1)


def test_forks_may_publish_the_same_pages():
    pool = make_pool(identity=b"model", lengths=[9])
    commit_rows(pool, 0, 9)
    fork = pool.fork(0)
    pool.publish(0, [*range(4)])
    other = pool.fork(0)
    assert [pool.num_published(seq) for seq in (0, fork, other)] == [1, 0, 1]
    match = "tokens from 0 on are not those that page 0 was published with"
    call = lambda: pool.publish(fork, [9, *range(1, 8)])  # noqa: E731
    assert_raises_unchanged(ValueError, match, pool, [0, fork, other], call)
    pool.publish(fork, [*range(8)])
    pool.publish(0, [*range(4, 8)])
    assert pool.committed(pool.add_sequence([*range(9)])) == 8
    pool.check_integrity()


def test_found_pages_are_shared_and_outlive_their_first_owner():
    pool = make_pool(identity=b"model", lengths=[0])
    fill(pool, 0, [*range(9)])
    other = pool.add_sequence([*range(9)])
    assert pool.pages(other) == [0, 1]
    assert [pool.ref_count(page) for page in (0, 1, 2)] == [2, 2, 1]
    assert pool.stats()["num_shared"] == 2
    pool.free_sequence(0)
    assert (pool.pages(other), pool.num_free, pool.num_cached) == ([0, 1], 6, 0)
    pool.free_sequence(other)
    assert (pool.num_free, pool.num_cached) == (6, 2)


def test_a_page_that_is_overwritten_loses_its_name():
    """Cut inside a published page, then grown another way: the old tokens are not found any more."""
    pool = make_pool(identity=b"model", lengths=[0])
    fill(pool, 0, [*range(9)])
    pool.truncate(0, 6)
    assert pool.num_published(0) == 1
    assert pool.committed(pool.add_sequence([*range(9)])) == 8, "nothing was overwritten yet"
    pool.free_sequence(1)
    pool.append([0], [1])
    assert pool.committed(pool.add_sequence([*range(9)])) == 4
    pool.check_integrity()


def test_a_shared_published_page_is_copied_not_overwritten():
    pool, copies = copying_pool(identity=b"model", lengths=[0])
    fill(pool, 0, [*range(9)])
    other = pool.add_sequence([*range(9)])
    pool.truncate(other, 6)
    pool.append([other], [1])
    assert copies == [(1, 3)]
    assert pool.committed(pool.add_sequence([*range(9)])) == 8
    pool.check_integrity()


def test_the_least_recently_used_page_is_evicted():
    pool = make_pool(num_pages=6, page_size=1, identity=b"model")
    for first in (10, 20, 30):  # two pages of each are cached
        seq = pool.add_sequence()
        fill(pool, seq, [first, first + 1])
        pool.free_sequence(seq)
    pool.free_sequence(pool.add_sequence([10, 11, 0]))  # used again
    assert (pool.num_free, pool.num_cached) == (0, 6)

    seq = pool.add_sequence()
    gone = []
    for _ in range(6):
        before = {page for page in range(6) if pool.page_name(page)}
        pool.append([seq], [1])
        gone += before - {page for page in range(6) if pool.page_name(page)}
    assert gone == [3, 2, 5, 4, 1, 0], "of each chain the end goes first: without its beginning it is not found"
    assert pool.stats()["num_evictions"] == 6
    with pytest.raises(CacheFull):
        pool.append([seq], [1])
    pool.check_integrity()


def test_cached_pages_are_room():
    pool = sharing_pool([*range(32)])
    assert (pool.num_free, pool.num_available) == (0, 8)
    seq = pool.add_sequence([0, 1, 2, 3, 4])  # one page is found
    assert pool.num_available == 7
    call = lambda: pool.append([seq], [29])  # noqa: E731
    error = assert_raises_unchanged(CacheFull, "8 pages needed, 7 free", pool, [seq], call)
    assert (error.needed, error.free) == (8, 7)
    pool.append([seq], [28])
    assert pool.num_available == 0


# ---- statistics ----


def test_stats():
    pool, _ = copying_pool(identity=b"model", num_pages=10)
    fill(pool, pool.add_sequence([*range(10)]), [*range(10)])
    pool.fork(0)
    pool.append([1], [1])
    pool.append([pool.add_sequence([*range(5)])], [1])
    pool.free_sequence(0)
    assert pool.stats() == {
        "num_free": 6, "num_cached": 0, "num_owned": 4, "num_shared": 1, "num_sequences": 2,
        "used_positions": 4 + 4 + 3 + 1, "unused_positions": 4, "queried_tokens": 15, "hit_tokens": 4,
        "num_evictions": 0, "num_copies": 1,
    }  # fmt: skip


def test_less_than_a_page_per_sequence_is_unused():
    pool = make_pool(num_pages=50, page_size=7, lengths=[1, 7, 8, 13, 14, 20])
    stats = pool.stats()
    assert stats["used_positions"] == 1 + 7 + 8 + 13 + 14 + 20
    assert stats["unused_positions"] == 6 + 0 + 6 + 1 + 0 + 1 < 7 * 6


# ---- threads ----


def test_a_copy_may_let_other_threads_run():
    """The GIL changes hands inside copy_page, and another thread waits for the pool: neither waits for ever."""
    pool, copying, other_done = None, threading.Event(), []

    def copy_page(source, target):
        copying.set()
        time.sleep(0.1)  # lets go of the GIL
        other_done.append(False)

    def other():
        copying.wait()
        pool.length(0)
        other_done.append(True)

    pool = make_pool(lengths=[6], copy_page=copy_page)
    commit_rows(pool, 0, 6)
    pool.fork(0)
    thread = threading.Thread(target=other)
    thread.start()
    pool.append([1], [1])
    thread.join(timeout=60)
    assert other_done == [False, True]


# ---- the C++ core's own tests ----


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("make")), reason="needs g++ and make")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_in_cpp(sanitizer):
    """Damage that CheckIntegrity must see, memory that runs out, threads: under the sanitizers."""
    folder = Path(__file__).parents[1] / "cpp"
    result = subprocess.run(["make", "-s", sanitizer], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
