"""GGUF models in parts, NAME-00001-of-00003.gguf and so on, as llama.cpp's gguf-split writes them."""

import re
from dataclasses import replace
from pathlib import Path

from layerskip_kernels.model.gguf_content import GgufFile, GgufTensor
from layerskip_kernels.model.gguf_file import read_gguf

__all__ = ["joined", "read_gguf_parts"]

PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
MERGE = "`llama-gguf-split --merge FIRST_PART WHOLE.gguf` makes one file of the parts"


def read_gguf_parts(path: Path) -> list[GgufFile]:
    """The file, or all parts of the model that it is a part of, the first one (which has the metadata) first.

    Raises as `read_gguf` does, and naming the file: FileNotFoundError for a part that is missing, ValueError for one
    that is another part than its name says, or of another model.
    """
    file = read_gguf(path)
    count = file.metadata.get("split.count", 1)
    if count == 1:
        return [file]
    if not (match := PART_NAME.fullmatch(path.name)) or type(count) is not int or int(match[3]) != count:
        raise ValueError(
            f"{path} is one part of {str(count)[:20]} of a split model, so its name must be "
            f"NAME-00001-of-{str(count)[:20]:0>5}.gguf and so on, beside the other parts; {MERGE}"
        )
    paths = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    parts = [_read_part(part, number, count, path) for number, part in enumerate(paths)]
    _check_together(parts)
    return parts


def _read_part(path: Path, number: int, count: int, asked: Path) -> GgufFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {asked.name} is a part of {count}; put all parts into one folder")
    part = read_gguf(path)
    said = part.metadata.get("split.no"), part.metadata.get("split.count")
    if said != (number, count):
        raise ValueError(
            f"{path} says that it is part {str(said[0])[:20]} of {str(said[1])[:20]}, counted from 0, but is named "
            f"part {number} of {count}: the parts are swapped, or of different models"
        )
    return part


def _check_together(parts: list[GgufFile]) -> None:
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise ValueError(f"{tensor} is also in {tensors[name].path.name}: they are not parts of one model")
            tensors[name] = tensor
    expected = parts[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ValueError(
            f"{parts[0].path} and its other parts hold {len(tensors)} tensors, but split.tensors.count is "
            f"{str(expected)[:20]}: a part is damaged, or of another model"
        )


def joined(parts: list[GgufFile]) -> GgufFile:
    """The parts as one file: the first one's metadata, and the tensors of all, each with the path of its part."""
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    return replace(parts[0], tensors=tensors)
