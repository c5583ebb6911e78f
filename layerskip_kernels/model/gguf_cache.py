"""Each GGUF file is converted once, into a directory that knows what it was made from."""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from layerskip_kernels.model import gguf_convert
from layerskip_kernels.model.gguf_config import own_dtype
from layerskip_kernels.model.gguf_content import GgufFile
from layerskip_kernels.model.gguf_split import joined, read_gguf_parts

__all__ = ["cache_directory", "converted_directory"]

CONVERSION = 3  # raise it when what the conversion writes changes
MANIFEST = "conversion.json"  # what a directory was made from, and what its files are
CHECKED_BYTES = 4 << 20  # of each file: all of most, and the header of the weights
TEMPORARY = ".converting-"
OLD_FORMAT = re.compile(r"[0-9a-f]{64}-v1")  # of conversion 1, which nothing reads any more
SAMPLES, SAMPLE_BYTES = 64, 1 << 16


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/layerskip_kernels``, or ``~/.cache/layerskip_kernels``; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip_kernels"


def converted_directory(path: Path, dtype: torch.dtype | None = None, keep_quantised: bool = False) -> Path:
    """The Hugging Face directory with the contents of a GGUF file, converted now if it is not there yet.

    ``path``: the file, or any part of a split one. ``dtype``: what the weights will be read as (None: the file's own,
    bfloat16 when anything is quantised); of wider weights no more than that is kept. ``keep_quantised``: quantised
    matrices stay as they are. Raises what the conversion raises; nothing is left behind then.
    """
    parts = read_gguf_parts(path)
    gguf = joined(parts)
    dtype = dtype or own_dtype(gguf)
    matrices = [t for t in gguf.tensors.values() if len(t.shape) > 1]
    keep_quantised = keep_quantised and any(tensor.block_type for tensor in matrices)
    read = [t for t in matrices if not (keep_quantised and t.block_type)]
    wide = any(tensor.dtype.itemsize > dtype.itemsize for tensor in read)
    label = str(dtype).removeprefix("torch.") if wide else "exact"
    label += "-quantised" if keep_quantised else ""
    directory = cache_directory() / f"{path.stem[:60]}-{(fingerprint := _fingerprint(parts))}-{label}"
    if not _is_whole(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _only_one_converts(directory.parent):
            if not _is_whole(directory):
                _convert(gguf, directory, fingerprint, dtype if wide else None, keep_quantised)
    return directory


def _fingerprint(parts: list[GgufFile]) -> str:
    """What the conversion depends on: its version, those of the libraries, and the files.

    Of a file: header, size, time of its last change, and 64 pieces of its data. The whole of it would take long (a
    minute for 40 GB, most of them maybe a hole).
    """
    digest = hashlib.sha256(repr([CONVERSION, *_library_versions().items()]).encode())
    for part in parts:
        with part.path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest.update(repr([status.st_size, status.st_mtime_ns]).encode() + part.header)
            for sample in range(SAMPLES):
                file.seek(sample * max(0, status.st_size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:24]


def _library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("gguf", "tokenizers")}


def _is_whole(directory: Path) -> bool:
    """Whether a converted directory is there, and its files are as they were written, as far as a quick look tells."""
    files = _manifest(directory).get("files")
    return isinstance(files, dict) and all(_identity(directory / name) == said for name, said in files.items())


def _identity(path: Path) -> list[Any] | None:
    """The size of a file and the SHA-256 of its beginning; None where there is none."""
    try:
        with path.open("rb") as file:
            return [os.fstat(file.fileno()).st_size, hashlib.sha256(file.read(CHECKED_BYTES)).hexdigest()]
    except OSError:
        return None


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        fields = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


@contextlib.contextmanager
def _only_one_converts(cache: Path) -> Iterator[None]:
    """Holds the cache's lock, and clears what conversions that were killed have left: without the lock, none runs."""
    with (cache / ".lock").open("a") as lock:
        if _lock(lock.fileno(), cache):
            for left in cache.glob(TEMPORARY + "*"):
                shutil.rmtree(left, ignore_errors=True)
        yield  # closing the file releases the lock, and so does the end of the process, however it comes


def _lock(descriptor: int, cache: Path) -> bool:
    """Waits for the lock; False on file systems that have none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Waiting for another process that converts a GGUF file in {cache}", file=sys.stderr, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _convert(
    gguf: GgufFile, directory: Path, fingerprint: str, dtype: torch.dtype | None, keep_quantised: bool
) -> None:
    _say(gguf, directory, dtype, keep_quantised)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=directory.parent))
    try:
        gguf_convert.convert_gguf(gguf, temporary, dtype, keep_quantised)
        _write_manifest(gguf, temporary)
        shutil.rmtree(directory, ignore_errors=True)  # not whole: damaged later
        _rename_unless_there(temporary, directory)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, _no_room(gguf, directory, dtype, keep_quantised)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _remove_outdated(directory, fingerprint)


def _say(gguf: GgufFile, directory: Path, dtype: torch.dtype | None, keep_quantised: bool) -> None:
    needed = gguf_convert.converted_bytes(gguf, dtype, keep_quantised)
    if needed > shutil.disk_usage(directory.parent).free:
        raise OSError(errno.ENOSPC, _no_room(gguf, directory, dtype, keep_quantised))
    read = [t for t in gguf.tensors.values() if t.is_quantised and not (keep_quantised and t.block_type)]
    quantised = sorted({tensor.type.name for tensor in read})
    if quantised:
        kept = str(dtype or torch.float32).removeprefix("torch.")
        print(
            f"{gguf.path.name}: its {', '.join(quantised)} tensors are read as {kept}, which takes {needed >> 20} MB "
            f"in {directory.parent}",
            file=sys.stderr,
            flush=True,
        )


def _no_room(gguf: GgufFile, directory: Path, dtype: torch.dtype | None, keep_quantised: bool) -> str:
    needed = gguf_convert.converted_bytes(gguf, dtype, keep_quantised)
    return (
        f"converting {gguf.path} takes {needed >> 20} MB in {directory.parent}, which has no room for them; free some, "
        "or set XDG_CACHE_HOME to another folder"
    )


def _write_manifest(gguf: GgufFile, directory: Path) -> None:
    files = {file.name: _identity(file) for file in directory.iterdir()}
    fields = {"source": str(gguf.path.resolve()), "conversion": CONVERSION, **_library_versions(), "files": files}
    (directory / MANIFEST).write_text(json.dumps(fields, indent=2) + "\n")


def _rename_unless_there(temporary: Path, directory: Path) -> None:
    try:
        temporary.rename(directory)
    except OSError:
        # Without locks, another process may have converted the same file meanwhile: its result is as good.
        if not _is_whole(directory):
            raise


def _remove_outdated(directory: Path, fingerprint: str) -> None:
    """Earlier conversions of the same file: of its earlier contents, or by earlier versions."""
    source = _manifest(directory).get("source")
    for other in directory.parent.iterdir():
        outdated = _manifest(other).get("source") == source and f"-{fingerprint}-" not in other.name
        if outdated or OLD_FORMAT.fullmatch(other.name):
            shutil.rmtree(other, ignore_errors=True)
