"""Damaged files: bytes flipped, cut, moved and repeated, JSON values replaced, and things that are no files at all."""

import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip_kernels.errors import SwapError
from support.random_walks import times_further

NUM_FILES = times_further(500)  # of each kind
SECONDS_EACH = 20  # far more than any takes
MOST_WAITING = 15  # times as long by the clock, beside other work

MOST_MEMORY = 1 << 30  # what reading a damaged file may take; the files are small, but for their holes

GREAT_NUMBERS = [2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64]
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, 10**30, -(10**39), "", "x", "\ud800", "../x", "a\0b", "a" * 5000),
    *([], {}, [[]], [None], {"a": 1}, [1] * 3000, ["x"] * 3, *GREAT_NUMBERS),
]
LITERALS = [b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"[" * 50_000, b'{"a":' * 20_000, b"\xff\xfe", b""]


class Hang(BaseException):
    """A file took longer than any may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """At most so many seconds of work, and MOST_WAITING times as many by the clock, for what waits and never works."""

    def give_up(*_: object) -> None:
        raise Hang

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds)}
    timers[signal.SIGALRM] = signal.ITIMER_REAL, seconds * MOST_WAITING
    before = {number: signal.signal(number, give_up) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    except Hang:  # raised wherever it was, which may be a place that pytest cannot show
        raise AssertionError(
            f"not done after {seconds} s of work, or {seconds * MOST_WAITING} s by the clock"
        ) from None
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def damaged_bytes(raw: bytes, rng: random.Random, head: int | None = None) -> bytes:
    """One to three changes, most of them in the first ``head`` bytes."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        end = len(data) if head is None or rng.random() < 0.2 else min(head, len(data))
        at, size = rng.randrange(end + 1), rng.choice((1, 2, 8, 50, 1000))
        change: Callable[[], bytes] = rng.choice(
            [
                lambda at=at: bytes(b ^ (1 << rng.randrange(8)) for b in data[at : at + 1]),  # a bit flips
                lambda: rng.randbytes(1),
                lambda: b"",
                lambda size=size: rng.randbytes(size),
                lambda: struct.pack("<Q", rng.choice(GREAT_NUMBERS[:-1])),
                lambda: struct.pack("<I", rng.choice(GREAT_NUMBERS[:2])),
                lambda: rng.choice((b'"', b"{", b"}", b"[", b",", b"0", b"-", b"9" * 30)),
                lambda at=at, size=size: bytes(data[at : at + size]) * 2,
            ]
        )
        new = change()
        data[at : at + (rng.choice((0, size)) if not new else len(new))] = new
    return bytes(data) if rng.random() < 0.85 else bytes(data[: rng.randrange(len(data) + 1)])


def damaged_json(raw: bytes, rng: random.Random) -> bytes:
    """A value somewhere replaced by a hostile one, a field lost, added, renamed or written twice; or bytes damaged."""
    if rng.random() < 0.25:
        return damaged_bytes(raw, rng)
    contents = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2))):
        contents = _with_one_change(contents, rng)
    text = json.dumps(contents).encode()
    if rng.random() < 0.2:  # a literal that json.dumps does not write
        text = text.replace(b'"HERE"', rng.choice(LITERALS)) if b'"HERE"' in text else text + rng.choice(LITERALS)
    return b"\xef\xbb\xbf" + text if rng.random() < 0.05 else text


def _with_one_change(contents: Any, rng: random.Random) -> Any:
    spots = list(_spots(contents))
    if not spots or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(HOSTILE))
    holder, key = rng.choice(spots)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "", key + "_", "a" * 3000, "\ud800"])] = holder.pop(key)
    elif kind == 2:
        holder[key] = "HERE"
    else:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return contents


def _spots(contents: Any, most: int = 2000) -> Iterator[tuple[Any, Any]]:
    """Each place in nested lists and objects."""
    todo = [contents]
    while todo and most > 0:
        holder = todo.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else []
        for key in keys:
            most -= 1
            yield holder, key
            todo.append(holder[key])


def put_no_file(path: Path, kind: str) -> None:
    """Something else in the place of a file."""
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind in HOLES:
        with path.open("wb") as file:
            file.truncate(HOLES[kind])
    elif kind == "empty":
        path.touch()


HOLES = {"hole": 1 << 40, "hole that fits in memory": 3 << 30}
NO_FILES = ["directory", "pipe", "device", "loop", *HOLES, "empty", "nothing"]


@dataclass(frozen=True)
class Kind:
    """``make`` writes a whole folder and returns the file to damage; ``read`` takes that file."""

    make: Callable[[Path], Path]
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]


def damaged(name: str, kind: Kind, number: int, folder: Path) -> Path:
    """The file of this number, whole the first time."""
    path, rng = _original(kind, folder), random.Random(f"{name} {number}")
    if number < len(NO_FILES):
        put_no_file(path, NO_FILES[number])
    else:
        raw = path.with_name("original").read_bytes()
        path.write_bytes(kind.damage(raw, rng))
    return path


def _original(kind: Kind, folder: Path) -> Path:
    """The whole file, with a copy beside it; made once."""
    paths = [path.with_name(path.name.removesuffix(".whole")) for path in folder.glob("*.whole")]
    if not paths:
        shutil.rmtree(folder, ignore_errors=True)
        path = kind.make(folder)
        shutil.copyfile(path, path.with_name("original"))
        path.with_name(f"{path.name}.whole").touch()
        return path
    [path] = paths
    if path.is_symlink() or path.is_fifo() or path.is_file():
        path.unlink()
    elif path.is_dir():
        path.rmdir()
    shutil.copyfile(path.with_name("original"), path)
    return path


def outcome(kind: Kind, path: Path) -> str:
    """What became of it: read, or the type of the error, which must say what is wrong with the file."""
    try:
        with time_limit(SECONDS_EACH):
            kind.read(path)
    except (ValueError, FileNotFoundError, SwapError) as error:
        message = str(error)
        assert path.name in message or str(path.parent) in message, message
        assert len(message.replace(str(path.parent), "")) < 500, message
        return type(error).__name__
    return "read"


def check_damaged(name: str, kind: Kind, folder: Path, after: Callable[[], object] | None = None) -> None:
    """Every damaged file of a kind is read or refused by name, in time and in little memory; the damage shows."""
    assert outcome(kind, _original(kind, folder)) == "read"
    outcomes: Counter[str] = Counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(NUM_FILES):
        path = damaged(name, kind, number, folder)
        try:
            outcomes[outcome(kind, path)] += 1
        except BaseException:
            print(f"number {number} of kind {name}")
            raise
        if after is not None:
            after()
    print(name, dict(outcomes))
    assert outcomes.total() - outcomes["read"] >= NUM_FILES / 4, "the damage did not show"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < MOST_MEMORY >> 10, f"{grown >> 10} MB for a damaged file"
