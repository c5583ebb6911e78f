"""Each GGUF file is converted once, into a directory named after the file's contents."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["cache_directory", "converted_directory"]

# Part of the directory's name: raise it when what the conversion writes changes.
FORMAT = "v1"


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/layerskip_kernels``, or ``~/.cache/layerskip_kernels``; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip_kernels"


def converted_directory(path: Path) -> Path:
    """The Hugging Face directory with the contents of a GGUF file, converted now if it is not there yet.

    It lies in the cache directory. Raises what the conversion raises; nothing is left behind then.
    """
    directory = cache_directory() / f"{_sha256(path)}-{FORMAT}"
    if not directory.is_dir():
        _convert_atomically(path, directory)
    return directory


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _convert_atomically(path: Path, directory: Path) -> None:
    from layerskip_kernels.gguf_convert import convert_gguf

    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=directory.parent))
    try:
        convert_gguf(path, temporary)
        _rename_unless_there(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_unless_there(temporary: Path, directory: Path) -> None:
    try:
        temporary.rename(directory)
    except OSError:
        # Another process converted the same file meanwhile: its result is as good.
        if not directory.is_dir():
            raise
