"""Example prompts of a trained model, drawn from the texts that it was trained for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from layerskip_kernels.model.files import write_whole
from layerskip_kernels.training.config import DataConfig
from layerskip_kernels.training.text_data import read_texts

__all__ = ["example_prompts", "write_examples"]

EXAMPLES = "prompts.jsonl"
COUNT, LENGTH = 20, 160  # prompts, and characters of one that is the beginning of a text


def write_examples(data: DataConfig, folder: Path) -> None:
    """Write prompts.jsonl to the folder of a trained model, and a layerskip.json that names it."""
    entries = [{"task_id": f"example {n}", "prompt": text} for n, text in enumerate(example_prompts(data), 1)]
    if entries:
        write_whole(folder / EXAMPLES, "".join(json.dumps(entry) + "\n" for entry in entries))
        write_whole(folder / "layerskip.json", json.dumps({"prompts": EXAMPLES}))


def example_prompts(data: DataConfig) -> list[str]:
    """Up to 20 prompts of the validation files, or of the training files where there are none: the prompts of
    examples, the beginnings of texts."""
    return list(islice(_prompts(data), COUNT))


def _prompts(data: DataConfig) -> Iterator[str]:
    for record in read_texts(map(Path, data.validation or data.train)):
        if "prompt" in record:
            yield record["prompt"]
        else:
            yield from _beginnings(record["text"])


def _beginnings(text: str) -> Iterator[str]:
    """The first words of a text; of a long one those at line starts all over it."""
    step = max(len(text) // COUNT, 4 * LENGTH)
    for position in range(0, max(len(text) - LENGTH, 1), step):
        start = text.find("\n", position) + 1 if position else 0
        words = text[start : start + LENGTH].rsplit(maxsplit=1)[0].rstrip() if text[start:].strip() else ""
        if words:
            yield words
