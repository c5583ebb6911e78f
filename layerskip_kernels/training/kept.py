"""What a training keeps in its output folder, and notes of what each was made from.

A vocabulary or tokenised rows are used again only when every file, setting and version that they were made from is the
same; checkpoints are continued only with the data and the model that they belong to.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from layerskip_kernels.model.files import open_regular, whole, write_whole
from layerskip_kernels.model.json_file import read_json_object

__all__ = ["Origin", "check_checkpoints", "contents_of", "holds", "keep", "only_one", "origin"]

Origin = dict[str, Any]  # JSON: what something was made from
ROWS = 2  # to be raised when rows are made in another way
CHUNK = 1 << 20


def origin(files: Iterable[Path], **settings: Any) -> Origin:
    """The contents of some files, settings, and the versions that turn the ones into the other.

    Raises FileNotFoundError or ValueError naming a file that cannot be read.
    """
    versions = {"tokenizers": version("tokenizers"), "rows": ROWS}
    made_from = {"files": {str(path): _sha256(path) for path in files}, **settings, "versions": versions}
    return json.loads(json.dumps(made_from))  # as it will be read again: keys are strings, tuples are lists


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder of a training, which must exist, for this process.

    Raises ValueError while another one of this machine holds it: both would write into the same files. The processes
    that `accelerate launch` starts for one training count as the first of them.
    """
    with (folder / ".lock").open("a") as lock:  # closing it lets go, and so does the end of the process
        if os.environ.get("RANK", "0") == "0":
            try:
                fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"{folder} is in use: another process trains there; wait for it, or name another folder"
                ) from error
            except OSError:  # a file system without locks
                pass
        yield


def keep(path: Path, made_from: Origin, make: Callable[[Path], object]) -> None:
    """Let ``make`` write ``path``, unless it is there already, as it was written, and was made from the same.

    It is written under another name first, so that a process killed meanwhile leaves nothing half made.
    """
    note = _note(path)
    if path.is_file():
        known = _read(note) or {}
        contents = known.pop("contents", None)
        if known == made_from and holds(path, contents):
            return
        if known:
            changed = "its contents" if known == made_from else _differences(known, made_from)
            print(f"layerskip: {changed} changed; making {path} again", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    with whole(path) as unfinished:
        make(unfinished)
        contents = contents_of(unfinished)
    write_whole(note, json.dumps({**made_from, "contents": contents}, indent=1) + "\n")


def contents_of(path: Path) -> Origin:
    """The size and the SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def holds(path: Path, contents: Any) -> bool:
    """Whether there is a file with the ``contents`` that `contents_of` said when it was written.

    What reads Arrow, for one, ends the process where a byte of it is wrong.
    """
    said = contents if isinstance(contents, dict) else {}
    return path.is_file() and said.get("bytes") == path.stat().st_size and said == contents_of(path)


def check_checkpoints(output: Path, checkpoint: Path | None, made_from: Origin) -> None:
    """Note what the checkpoints of a folder are made from. Raises ValueError when those there belong to other data or
    another model than ``made_from``."""
    note = output / "checkpoints.made_from.json"
    known = _read(note)
    if checkpoint is not None and os.path.lexists(note) and known != made_from:
        raise ValueError(
            f"{checkpoint} belongs to a training with other data or another model ({_differences(known, made_from)} "
            f"changed); delete {output}, or name another output_dir, to train anew"
        )
    if known != made_from:
        write_whole(note, json.dumps(made_from, indent=1) + "\n")


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.made_from.json")


def _read(note: Path) -> Origin | None:
    """What a note says; None when there is none, or none that can be read."""
    try:
        return read_json_object(note).values
    except (OSError, ValueError):
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _differences(known: Origin | None, made_from: Origin) -> str:
    """The names of what differs: settings, and files by their last name."""
    names = ", ".join(dict.fromkeys(_changed(known, made_from))) or "something"
    return names if len(names) < 200 else f"{names[:200]}..."


def _changed(ours: Any, theirs: Any, name: str = "") -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        return [part for key in keys for part in _changed(ours.get(key), theirs.get(key), Path(key).name)]
    return [] if ours == theirs else [name]
