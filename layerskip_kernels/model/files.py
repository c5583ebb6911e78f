"""Opening the files of a model: regular files only, so that a pipe or a device in their place cannot block the load.
Reading small ones, which are bounded, and writing them, whole or not at all."""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["naming", "open_regular", "read_bytes", "read_exactly", "read_text", "whole", "write_whole"]

MAX_BYTES = 64 << 20
LEFT_SECONDS = 60  # after which an unfinished file is one that a killed process left

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """``path`` opened for reading bytes.

    Raises FileNotFoundError when it is missing and ValueError, without waiting for a writer, when it is a directory, a
    pipe, a socket or a device. Links are followed: the files of the hub's cache are links.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null character
        raise ValueError(f"{str(path)!r} cannot be the name of a file: {error}") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise ValueError(f"{path} is {KINDS.get(kind, 'a special file')}; a regular file is expected there")
    return os.fdopen(descriptor, "rb", buffering)


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """A whole file. Raises as `open_regular`, and ValueError when it has more than ``max_bytes``."""
    with open_regular(path) as file:
        raw = file.read(max_bytes + 1) if os.fstat(file.fileno()).st_size <= max_bytes else None
    if raw is None or len(raw) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes} bytes, which is too long for this file")
    return raw


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """A file of UTF-8 text, without a byte order mark. Raises as `read_bytes`, and ValueError when it is not UTF-8."""
    raw = read_bytes(path, max_bytes)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is not valid") from error


def read_exactly(file: BinaryIO, buffer: memoryview, what: str) -> None:
    """Fill ``buffer`` from a file; raises ValueError, naming ``what`` is read, where the file ends before."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{what} is truncated: {done} of {len(buffer)} bytes")
        done += count


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError of the block that names no file, as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a small text: whoever reads finds what was there or all of it, whatever interrupts. Raises OSError."""
    with whole(path) as unfinished, naming(path):
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name to write a file under, this process's own, which becomes ``path`` at the end of the block.

    What processes that were killed have left beside it is cleared. Raises OSError.
    """
    for left in path.parent.glob(".*.unfinished"):
        if left.name.startswith(f".{path.name}.") and _is_abandoned(left):
            left.unlink(missing_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _is_abandoned(left: Path) -> bool:
    try:
        return time.time() - left.stat().st_mtime > LEFT_SECONDS
    except FileNotFoundError:  # another process has just finished or cleared it
        return False
