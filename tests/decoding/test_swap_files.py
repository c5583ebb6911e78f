"""Swap files under bad conditions: special files, vanished and read-only folders, kills; nothing is lost or left."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from layerskip_kernels import PagedKVCache, SwapError, load_model, prefill
from layerskip_kernels.decoding import swap
from layerskip_kernels.decoding.swap import SwapFolder
from support.checkpoint_files import write_directory
from support.models import cache_for, random_tokens, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def filled():
    """A model, its cache and a sequence with 30 positions in it."""
    model = tiny_model()
    cache = cache_for(model, 140)
    sequence = cache.add_sequence(random_tokens(30))
    cache.commit(prefill(model, cache, [sequence]))
    return model, cache, sequence


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe"),
        (os.mkdir, "a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (unix_socket, "No such device|a socket"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
    ids=["pipe", "directory", "device", "socket", "loop"],
)
def test_what_is_not_a_file_is_refused_at_once(filled, tmp_path, make, kind):
    """Opening a pipe nobody writes to would wait for ever, and /dev/zero never ends."""
    _, cache, sequence = filled
    make(tmp_path / "swapped")
    cache.pool.truncate(sequence.id, 0)
    start = time.perf_counter()
    with pytest.raises(SwapError, match=kind):
        cache.swap_in(sequence, tmp_path / "swapped")
    assert time.perf_counter() - start < 5
    cache.check_integrity()


def test_a_folder_that_vanished(filled, tmp_path):
    _, cache, sequence = filled
    kv = cache.export(sequence)
    with pytest.raises(SwapError, match=r"gone/swapped cannot be written: .*still in the cache"):
        cache.swap_out(sequence, tmp_path / "gone" / "swapped")
    assert all(map(torch.equal, cache.export(sequence), kv))


def test_a_read_only_folder(filled, tmp_path):
    _, cache, sequence = filled
    tmp_path.chmod(0o500)
    was_root = os.geteuid() == 0
    if was_root:  # who may write anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(SwapError, match=r"cannot be written: .*Permission denied"):
            cache.swap_out(sequence, tmp_path / "swapped")
    finally:
        if was_root:
            os.seteuid(0)


def test_a_disk_that_fails_at_the_end(filled, tmp_path, monkeypatch):
    """What a network file system says at fsync alone: the pages are still there."""

    def fails(handle: int) -> None:
        raise OSError(28, "No space left on device")

    _, cache, sequence = filled
    kv = cache.export(sequence)
    monkeypatch.setattr(swap.os, "fsync", fails)
    with pytest.raises(SwapError, match="No space left"):
        cache.swap_out(sequence, tmp_path / "swapped")
    assert all(map(torch.equal, cache.export(sequence), kv))
    assert not list(tmp_path.iterdir())


# ---- kills ----

WRITER = """
import sys
from layerskip_kernels import prefill
from support.models import cache_for, random_tokens, tiny_model
model = tiny_model()
cache = cache_for(model, 1000)
sequence = cache.add_sequence(random_tokens(900))
cache.commit(prefill(model, cache, [sequence]))
print("ready", flush=True)
while True:
    cache.swap_in(sequence, cache.swap_out(sequence, sys.argv[1]))
"""


def test_a_kill_while_writing(tmp_path):
    """After kill -9 at any moment the file is absent or whole, and the next run writes over it."""
    path = tmp_path / "swapped"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    model = tiny_model()
    whole = 0
    for delay in (0.0, 0.003, 0.01, 0.02, None):  # None: as soon as there is a file
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        while delay is None and not path.exists() and writer.poll() is None:
            time.sleep(0.001)
        time.sleep(delay or 0.0)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        if path.exists():
            cache = cache_for(model, 1000)
            sequence = cache.add_sequence(random_tokens(900))
            cache.swap_in(sequence, path)
            assert cache.length(sequence) == 900
            whole += 1
    assert whole, "the last run was killed after its first file"
    assert all(left.name.startswith(".swapped-") for left in tmp_path.iterdir() if left != path)


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes(tmp_path):
    code = (
        "import os, sys; from layerskip_kernels.decoding.swap import SwapFolder\n"
        "folder = SwapFolder(sys.argv[1]); (folder.path / '0.kv').write_bytes(bytes(100))\n"
        "print(folder.path, flush=True)\n"
        "os.kill(os.getpid(), 9) if sys.argv[2] == 'die' else sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    died = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "die"], env=environment, capture_output=True, text=True
    )
    left = Path(died.stdout.strip())
    assert died.returncode == -signal.SIGKILL and (left / "0.kv").exists()
    lives = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "live"],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert lives.stdin is not None and lives.stdout is not None
    other = Path(lives.stdout.readline().strip())
    assert not left.exists()
    (tmp_path / "somebody's").mkdir()
    ours = SwapFolder(tmp_path)
    assert (other / "0.kv").exists(), "a living process keeps its folder"
    lives.stdin.close()
    lives.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["somebody's", ours.path.name])
    del ours
    assert [path.name for path in tmp_path.iterdir()] == ["somebody's"]


def test_a_forked_child_leaves_the_folder_alone(tmp_path):
    folder = SwapFolder(tmp_path)
    child = os.fork()
    if child == 0:
        del folder
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert folder.path.exists()


# ---- whose they are ----


def test_a_file_of_the_same_checkpoint_loaded_again(tmp_path):
    """In memory a model is itself; in a file it is its weights."""
    write_directory(tmp_path / "model")
    first, second = (load_model(tmp_path / "model") for _ in range(2))
    cache = cache_for(first, 100)
    sequence = cache.add_sequence(random_tokens(30, 96))
    cache.commit(prefill(first, cache, [sequence]))
    kv = cache.export(sequence)
    path = cache.swap_out(sequence, tmp_path / "swapped")
    other = cache_for(second, 100)
    text = other.add_sequence(sequence.tokens)
    other.swap_in(text, path)
    assert all(map(torch.equal, other.export(text), kv))
    cache.swap_in(sequence, path)
    swapped = cache.swap_out(sequence)
    other.free(text)
    text = other.add_sequence(sequence.tokens)
    with pytest.raises(SwapError, match="loaded twice counts as two"):
        other.swap_in(text, swapped)


def test_threads_swap_to_files_at_the_same_time(filled, tmp_path):
    model, _, _ = filled
    cache = PagedKVCache.with_room_for(model, [100] * 4)
    texts = [cache.add_sequence(random_tokens(40, seed=seed)) for seed in range(4)]
    cache.commit(prefill(model, cache, texts))
    kvs = [cache.export(text) for text in texts]

    def swap_often(i: int) -> None:
        for _ in range(20):
            cache.swap_in(texts[i], cache.swap_out(texts[i], tmp_path / f"{i}.kv"))

    workers = [threading.Thread(target=swap_often, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for text, kv in zip(texts, kvs, strict=True):
        assert all(map(torch.equal, cache.export(text), kv))
    cache.check_integrity()
