"""The cache with its tensors: sharing, forks and swaps change no bit; damage and full disks lose nothing."""

import resource
import struct
import tempfile
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from layerskip_kernels import CacheFull, PagedKVCache, SwapError, draft_step, prefill, verify_step
from support.models import cache_for, random_tokens, threads, tiny_model


def sharing_cache(model, positions, page_size=4):
    cache = PagedKVCache.with_room_for(model, [positions], page_size, prefix_sharing=True)
    for tensor in cache.tensors:
        tensor.fill_(torch.nan)
    return cache


def decode(model, cache, sequence, count):
    """Decode on, drafting; the logits that each new token was chosen by, fp32 [tokens, V]."""
    logits = []
    while sum(map(len, logits)) < count:
        verdict = verify_step(model, cache, draft_step(model, cache, [sequence], 1, 3))
        cache.commit(verdict)
        logits.append(verdict.new_logits(0))
    return torch.cat(logits)


def run(model, cache, sequence, count=20):
    """Prefill and decode: tokens, the logits of each new one, k and v."""
    verdict = prefill(model, cache, [sequence])
    cache.commit(verdict)
    logits = torch.cat([verdict.new_logits(0), decode(model, cache, sequence, count)])
    cache.check_integrity()
    return sequence.tokens, logits, *cache.export(sequence)


def run_alone(model, prompt, count=20):
    """The same in a cache of its own, without sharing."""
    cache = cache_for(model, len(prompt) + count + 10)
    return run(model, cache, cache.add_sequence(prompt), count)


def assert_same(got, expected):
    assert got[0] == expected[0]
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


# ---- prefix sharing ----


@pytest.mark.parametrize("page_size", [1, 4, 7])
def test_a_prefix_hit_changes_no_bit(dtype, page_size):
    model, prompt = tiny_model(dtype), random_tokens(30)
    expected = run_alone(model, prompt)
    cache = sharing_cache(model, 160, page_size)
    for hit in (0, 29 // page_size * page_size):
        sequence = cache.add_sequence(prompt)
        assert cache.length(sequence) == hit
        assert_same(run(model, cache, sequence), expected)
        cache.free(sequence)


def test_a_prefix_hit_skips_its_prefill(monkeypatch):
    model, prompt = tiny_model(), random_tokens(30)
    cache = sharing_cache(model, 160)
    first = cache.add_sequence(prompt)
    cache.commit(prefill(model, cache, [first]))
    second = cache.add_sequence([*prompt[:20], *random_tokens(10, seed=1)])
    appended = []
    monkeypatch.setattr(cache, "pool", Recording(cache.pool, lambda seqs, counts: appended.extend(counts)))
    cache.commit(prefill(model, cache, [second]))
    assert appended == [10]
    assert cache.stats().hit_tokens == 20


class Recording:
    """A pool that tells what is appended to it."""

    def __init__(self, pool, tell):
        self._pool, self._tell = pool, tell

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def append(self, seqs, counts):
        self._tell(seqs, counts)
        self._pool.append(seqs, counts)


def test_generated_text_is_found_too():
    """The next turn of a conversation: prompt, answer and more."""
    model, prompt = tiny_model(), random_tokens(10)
    cache = sharing_cache(model, 300)
    first = cache.add_sequence(prompt)
    run(model, cache, first)
    known = len(first.tokens)
    turn = [*first.tokens, *random_tokens(9, seed=2)]
    second = cache.add_sequence(turn)
    assert cache.length(second) == (known - 1) // 4 * 4 > len(prompt)
    assert_same(run(model, cache, second), run_alone(model, turn))


def test_a_long_prompt_is_published_as_it_goes():
    """Prefill in runs of 256 rows: the pages of all of them are found."""
    model, prompt = tiny_model(), random_tokens(600)
    cache = sharing_cache(model, 1300, 16)
    expected = run_alone(model, prompt, 5)
    for hit in (0, 592):
        sequence = cache.add_sequence(prompt)
        assert cache.length(sequence) == hit
        assert_same(run(model, cache, sequence, 5), expected)


def test_salts_and_the_switch():
    model, prompt = tiny_model(), random_tokens(30)
    cache = sharing_cache(model, 400)
    run(model, cache, cache.add_sequence(prompt, salt="alice"))
    salts = ["alice", b"alice", "bob", "", None]
    assert [cache.length(cache.add_sequence(prompt, salt)) for salt in salts] == [28, 28, 0, 0, 0]
    plain = cache_for(model, 200)
    run(model, plain, plain.add_sequence(prompt))
    assert plain.length(plain.add_sequence(prompt)) == 0


def test_rejected_drafts_are_never_found():
    model, prompt = tiny_model(), random_tokens(30)
    cache = sharing_cache(model, 100, 1)
    sequence = cache.add_sequence(prompt)
    cache.commit(prefill(model, cache, [sequence]))
    draft = draft_step(model, cache, [sequence], 1, 8)
    wrong = (draft.tokens + 1) % model.config.vocab_size
    cache.commit(verify_step(model, cache, replace(draft, tokens=wrong)))
    drafted = [*sequence.tokens[:31], *wrong[0].tolist(), 0]
    assert cache.length(sequence) == 31
    for tokens in (drafted, [*sequence.tokens, 0]):
        assert cache.length(cache.add_sequence(tokens)) == 31


def test_prompts_survive_under_pressure():
    """More texts than fit: pages are evicted, and every answer is the same as alone."""
    model = tiny_model()
    cache = sharing_cache(model, 120)
    prompts = [[*random_tokens(20), *random_tokens(10, seed=i)] for i in range(5)]
    answers = [run_alone(model, prompt) for prompt in prompts]
    for prompt, answer in zip(prompts * 2, answers * 2, strict=True):
        sequence = cache.add_sequence(prompt)
        assert_same(run(model, cache, sequence), answer)
        cache.free(sequence)
    stats = cache.stats()
    assert stats.num_evictions > 0 and stats.hit_rate > 0.5
    assert stats.num_owned == 0 and cache.num_free_pages == cache.pool.num_pages


# ---- forks ----


def test_forks_go_their_own_ways():
    """Samples of one prompt: each as if alone, the last page copied at the first write."""
    model, prompt = tiny_model(), random_tokens(30)
    cache = cache_for(model, 400, page_size=7)
    first = cache.add_sequence(prompt)
    cache.commit(prefill(model, cache, [first]))
    texts = [first, *(cache.fork(first) for _ in range(3))]
    for i, text in enumerate(texts):
        text.tokens[-1] = i
    assert cache.pages_needed(texts, [4] * 4) == 3
    for _ in range(6):
        cache.commit(verify_step(model, cache, draft_step(model, cache, texts, 1, [3, 1, 2, 3])))
        cache.check_integrity()
    assert cache.stats().num_copies == 3
    for i, text in enumerate(texts):
        alone = cache_for(model, 100)
        other = alone.add_sequence([*prompt, i])
        cache_length = cache.length(text)
        run(model, alone, other, 30)
        alone.truncate(other, cache_length)
        assert_same((text.tokens, *cache.export(text)), (other.tokens, *alone.export(other)))


def test_a_fork_needs_no_pending_rows():
    model = tiny_model()
    cache = cache_for(model, 100)
    sequence = cache.add_sequence(random_tokens(30))
    cache.commit(prefill(model, cache, [sequence]))
    draft = draft_step(model, cache, [sequence], 1, 3)
    with pytest.raises(ValueError, match="4 pending rows; commit or roll back before a fork"):
        cache.fork(sequence)
    cache.commit(verify_step(model, cache, draft))
    cache.fork(sequence)


def test_a_cache_is_collected_with_its_pool():
    """The pool calls back to copy pages, and must not keep the tensors alive by it."""
    cache = cache_for(tiny_model(), 100)
    tensors = weakref.ref(cache)
    del cache
    assert tensors() is None


# ---- swaps ----


@pytest.fixture
def ready(dtype):
    """A model, a sharing cache with pages of 7, a sequence with 30 and more positions, and its k and v."""
    model = tiny_model(dtype)
    cache = sharing_cache(model, 140, 7)
    sequence = cache.add_sequence(random_tokens(30))
    cache.commit(prefill(model, cache, [sequence]))
    return model, cache, sequence, cache.export(sequence)


@pytest.fixture(params=["memory", "file"])
def place(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "swapped"


def test_swap_out_and_in(ready, place):
    model, cache, sequence, kv = ready
    draft_step(model, cache, [sequence], 1, 3)  # pending rows are dropped
    swapped = cache.swap_out(sequence, place)
    assert cache.length(sequence) == cache.pool.length(sequence.id) == 0
    assert len(sequence.tokens) == 31
    others = [cache.add_sequence(random_tokens(60, seed=seed)) for seed in (1, 2)]
    cache.commit(prefill(model, cache, others))  # all pages hold other values now
    for other in others:
        cache.free(other)
    cache.swap_in(sequence, swapped)
    assert_same((None, *cache.export(sequence)), (None, *kv))
    expected = run_alone(model, random_tokens(30), 10)
    decode(model, cache, sequence, 10)
    length = cache.length(sequence)
    assert torch.equal(cache.export(sequence)[0][:, :40], expected[2][:, :40]) and length >= 40
    cache.check_integrity()
    assert place is None or place.stat().st_mode & 0o777 == 0o600


def test_swap_in_continues_what_is_there(ready, place):
    """Into a sequence of which a beginning was found already, and into pages of another size."""
    model, cache, sequence, kv = ready
    swapped = cache.swap_out(sequence, place)
    again = cache.add_sequence(sequence.tokens)
    assert cache.length(again) == 28
    other = sharing_cache(model, 140, 4)
    for into, text in ((cache, again), (other, other.add_sequence(sequence.tokens))):
        into.swap_in(text, swapped)
        assert into.length(text) == 30
        assert_same((None, *into.export(text)), (None, *kv))
        into.swap_in(text, swapped)  # nothing is missing
        into.check_integrity()
    assert other.length(other.add_sequence(sequence.tokens)) == 28, "what was swapped in is found as well"


def test_swap_in_without_pages(ready, place):
    model, cache, sequence, kv = ready
    swapped = cache.swap_out(sequence, place)
    blocker = cache.add_sequence(random_tokens(120, seed=1))
    cache.commit(prefill(model, cache, [blocker]))
    with pytest.raises(CacheFull) as error:
        cache.swap_in(sequence, swapped)
    assert (error.value.needed, error.value.free) == (5, 2)
    assert cache.length(sequence) == cache.pool.length(sequence.id) == 0
    cache.free(blocker)
    cache.swap_in(sequence, swapped)
    assert_same((None, *cache.export(sequence)), (None, *kv))


def test_swap_in_needs_no_pending_rows(ready, place):
    _, cache, sequence, _ = ready
    swapped = cache.swap_out(sequence, place)
    cache.pool.append([sequence.id], [3])
    with pytest.raises(ValueError, match="3 pending rows"):
        cache.swap_in(sequence, swapped)


def refuses(cache, sequence, swapped, match):
    """swap_in fails, nothing changes."""
    before = cache.stats()
    with pytest.raises(SwapError, match=match):
        cache.swap_in(sequence, swapped)
    assert cache.stats() == before and cache.length(sequence) == 0
    cache.check_integrity()


def test_another_text_or_model_is_refused(ready, place):
    model, cache, sequence, _ = ready
    swapped = cache.swap_out(sequence, place)
    other = cache.add_sequence([*sequence.tokens[:29], 99], salt="nothing found")
    refuses(cache, other, swapped, "30 swapped tokens are not the beginning")
    shorter = cache.add_sequence(sequence.tokens[:29], salt="nothing found")
    refuses(cache, shorter, swapped, "30 swapped tokens are not the beginning")
    for changed in (
        tiny_model(model.dtype, seed=1),
        tiny_model(model.dtype, weights="int8"),
        tiny_model(model.dtype, rope_theta=500.0),
    ):
        elsewhere = cache_for(changed, 100)
        refuses(elsewhere, elsewhere.add_sequence(sequence.tokens), swapped, "another model's")
    deeper = cache_for(tiny_model(model.dtype, num_layers=4), 100)
    refuses(deeper, deeper.add_sequence(sequence.tokens), swapped, "expected|positions of this model")


def test_damage_in_memory_is_seen(ready):
    _, cache, sequence, _ = ready
    swapped = cache.swap_out(sequence)
    for tensor in (swapped.k, swapped.v):
        tensor.view(torch.uint8)[1, 20, 1, 5] ^= 1
        refuses(cache, sequence, swapped, "checksum")
        tensor.view(torch.uint8)[1, 20, 1, 5] ^= 1
    refuses(cache, sequence, replace(swapped, k=swapped.k[:, :29]), "swapped k has dtype and shape")
    cache.swap_in(sequence, swapped)


def test_every_bit_of_a_file_counts():
    """A flip in each byte of the header, and in some of the rest; then the text is computed again, the same."""
    model = tiny_model()
    cache = sharing_cache(model, 140, 7)
    sequence = cache.add_sequence(random_tokens(30))
    cache.commit(prefill(model, cache, [sequence]))
    tokens, kv = list(sequence.tokens), cache.export(sequence)
    with tempfile.TemporaryDirectory() as folder:
        path = cache.swap_out(sequence, f"{folder}/swapped")
        good = path.read_bytes()
        header = 8 + 4 + 32 + 4 * 8
        size = header + 30 * 4 + 2 * kv[0].nbytes + 32
        assert len(good) == size
        places = [*range(header), *torch.randint(header, size, (40,)).tolist(), size - 32, size - 1]
        for i in places:
            path.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
            refuses(cache, sequence, path, None)
        for length in (0, 7, header - 1, header, header + 1, size // 2, size - 33, size - 32, size - 1):
            path.write_bytes(good[:length])
            refuses(cache, sequence, path, "truncated")
        path.write_bytes(good + b"0")
        refuses(cache, sequence, path, "not one file")
        path.unlink()
        refuses(cache, sequence, path, "swapped is missing")
        refuses(cache, sequence, folder, "is a directory; a regular file is expected there")
    cache.commit(prefill(model, cache, [sequence]))
    again = [tensor[:, :30] for tensor in cache.export(sequence)]
    assert_same((sequence.tokens[:31], *again), (tokens, *kv))


def test_a_header_of_absurd_sizes_takes_no_memory(ready, tmp_path):
    _, cache, sequence, _ = ready
    path = cache.swap_out(sequence, tmp_path / "swapped")
    good = path.read_bytes()
    for count in (2**63, 2**40, 1025):
        path.write_bytes(good[:44] + struct.pack("<Q", count) + good[52:])
        refuses(cache, sequence, path, rf"has {count} positions; the model has 1024")
    path.write_bytes(good[:44] + struct.pack("<Q", 1000) + good[52:])
    refuses(cache, sequence, path, "1000 positions of this model")


@contextmanager
def largest_file(num_bytes):
    """As a full disk: no file can grow beyond."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fails_to_swap_out(cache, sequence, to):
    before, kv = cache.stats(), cache.export(sequence)
    with pytest.raises(SwapError, match=r"cannot be written: .*still in the cache"):
        cache.swap_out(sequence, to)
    assert cache.stats() == before
    assert_same((None, *cache.export(sequence)), (None, *kv))


@pytest.mark.parametrize("room", [0, 50, 5000])
def test_a_full_disk(ready, tmp_path, room):
    """The sequence stays, nothing is left behind, and an older file is not damaged."""
    _, cache, sequence, kv = ready
    (tmp_path / "swapped").write_bytes(b"older")
    with largest_file(room):
        fails_to_swap_out(cache, sequence, tmp_path / "swapped")
    assert [path.name for path in tmp_path.iterdir()] == ["swapped"]
    assert (tmp_path / "swapped").read_bytes() == b"older"
    path = cache.swap_out(sequence, tmp_path / "swapped")
    cache.swap_in(sequence, path)
    assert_same((None, *cache.export(sequence)), (None, *kv))


def test_no_such_folder(ready, tmp_path):
    _, cache, sequence, _ = ready
    fails_to_swap_out(cache, sequence, tmp_path / "missing" / "swapped")
    (tmp_path / "folder").mkdir()
    fails_to_swap_out(cache, sequence, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_interrupted_swap_in_leaves_the_sequence_empty(ready, monkeypatch):
    _, cache, sequence, kv = ready
    swapped = cache.swap_out(sequence)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_pages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.swap_in(sequence, swapped)
    monkeypatch.undo()
    assert cache.pool.length(sequence.id) == 0
    cache.swap_in(sequence, swapped)
    assert_same((None, *cache.export(sequence)), (None, *kv))


# ---- what tells models apart ----


def test_the_identity_of_a_model():
    same = [tiny_model().identity, tiny_model().identity, tiny_model().with_draft_vocab([1, 2]).identity]
    assert len(set(same)) == 1 and len(same[0]) == 32
    others = [
        tiny_model(seed=1),
        tiny_model(torch.float16),
        tiny_model(weights="int8"),
        tiny_model(rope_theta=500.0),
        tiny_model(rms_norm_eps=1e-6),
        tiny_model(num_layers=2),
    ]
    assert len({same[0], *(model.identity for model in others)}) == 7
    with threads(1):
        assert tiny_model().identity == same[0]


# ---- statistics ----


def test_stats():
    model = tiny_model()
    cache = sharing_cache(model, 100)
    assert (cache.stats().hit_rate, cache.stats().fragmentation) == (None, 0.0)
    first = cache.add_sequence(random_tokens(30))
    cache.commit(prefill(model, cache, [first]))
    cache.add_sequence(random_tokens(30))
    stats = cache.stats()
    assert (stats.num_free, stats.num_cached, stats.num_owned, stats.num_shared) == (17, 0, 8, 7)
    assert stats.hit_rate == 28 / 60
    assert stats.fragmentation == 2 / 32
    cache.free(first)
    assert cache.num_free_pages == 18
