"""Texts on disk -> token ids in rows of one length, and a vocabulary of their own where one is wanted.

Sources: .jsonl files with {"text"} a line (pre-training) or {"prompt", "completion"} (fine-tuning: only the completion
is learnt), or any other file as one text. Rows of pre-training are packed: text after text, each closed by the
end-of-text token, cut into rows of the same length. Rows of fine-tuning hold one example each, padded at the end.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from torch.utils.data import Sampler

from layerskip_kernels.model.files import read_text
from layerskip_kernels.model.json_lines import json_lines_of, require_text
from layerskip_kernels.training.model import IGNORED

__all__ = [
    "END_OF_TEXT", "Collator", "SimilarLengths", "packed_rows", "prompt_rows", "read_texts",
    "train_tokenizer", "write_rows",
]  # fmt: skip

END_OF_TEXT = "<|endoftext|>"
MAX_TEXT_BYTES = 256 << 20  # of one text, which is tokenised whole, in some hundred times the memory
TEXTS_AT_ONCE = 1024  # tokenised together, on all cores


def read_texts(paths: Iterable[Path]) -> Iterator[dict[str, str]]:
    """The records of some files, in order: {"text"} or {"prompt", "completion"}."""
    for path in paths:
        if path.suffix != ".jsonl":
            yield {"text": read_text(path, MAX_TEXT_BYTES)}
            continue
        for where, record in json_lines_of(path):
            yield _record(record, where)


def _record(record: Any, where: str) -> dict[str, str]:
    for names in (("text",), ("prompt", "completion")):
        if isinstance(record, dict) and all(isinstance(record.get(name), str) for name in names):
            return {name: require_text(record[name], where, "a string") for name in names}
    raise ValueError(f'{where} must be {{"text": str}} or {{"prompt": str, "completion": str}}, got {record!r:.80}')


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Learn a byte-level BPE vocabulary and write tokenizer.json; every text then starts with ``END_OF_TEXT``, id 0.

    The end of one text is the start of the next, so one token serves for both.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def packed_rows(
    texts: Iterable[str], tokenizer: tokenizers.Tokenizer, end_of_text: int, length: int
) -> Iterator[dict[str, list[int]]]:
    """{"input_ids"} of exactly ``length`` tokens: the texts in order, an end of text after each; a rest is dropped."""
    row: list[int] = [end_of_text]
    texts = iter(texts)
    while batch := list(islice(texts, TEXTS_AT_ONCE)):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            row += [*encoding.ids, end_of_text]
            whole = len(row) - len(row) % length
            for start in range(0, whole, length):
                yield {"input_ids": row[start : start + length]}
            row = row[whole:]


def prompt_rows(
    records: Iterable[dict[str, str]], tokenizer: tokenizers.Tokenizer, end_of_text: int, length: int
) -> Iterator[dict[str, list[int]]]:
    """{"input_ids", "labels"} of each example; labels are -100 over the prompt, and the completion ends the text.

    The prompt is tokenised by itself, as it will be when it is given to the model. Raises ValueError for an example
    longer than ``length``.
    """
    for record in records:
        prompt = tokenizer.encode(record["prompt"]).ids
        completion = [*tokenizer.encode(record["completion"], add_special_tokens=False).ids, end_of_text]
        if len(prompt) + len(completion) > length:
            raise ValueError(
                f"data.sequence_length must be at least {len(prompt) + len(completion)} for the example "
                f"{record['prompt']!r:.60}, got {length}"
            )
        yield {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def write_rows(rows: Iterable[dict[str, list[int]]], path: Path) -> None:
    """Write rows to ``path`` as Arrow."""
    writer = ArrowWriter(path=str(path))
    for row in rows:
        writer.write(row)
    writer.finalize()


class SimilarLengths(Sampler[int]):
    """The places of rows of ``lengths``, in runs of ``run`` about as long as each other; the runs in random order.

    A function of seed and epoch. Not Trainer's ``group_by_length``, which goes through 50 batches at a time from long
    to short: the weights then follow the lengths (docs/log.md).
    """

    def __init__(self, lengths: list[int], run: int, seed: int = 0) -> None:
        self.lengths, self.run, self.seed, self.epoch = torch.tensor(lengths), run, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self), generator=draws)
        runs = shuffled[self.lengths[shuffled].argsort(stable=True)].split(self.run)
        whole = len(self) // self.run
        for i in [*torch.randperm(whole, generator=draws).tolist(), *range(whole, len(runs))]:
            yield from runs[i].tolist()


class Collator:
    """Rows of a data set -> a batch: input_ids, labels and, where lengths differ, attention_mask; int64 [B, T]."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids = _padded([row["input_ids"] for row in rows], length, self.pad_token_id)
        labels = _padded([row.get("labels", row["input_ids"]) for row in rows], length, IGNORED)
        labels[:, 0] = IGNORED  # nothing predicts the first token, so it must not be counted either
        batch = {"input_ids": ids, "labels": labels}
        if any(len(row["input_ids"]) < length for row in rows):
            batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], length, 0)
        return batch


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.int64)
