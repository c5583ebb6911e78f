"""How well a model does the semantic-parsing task: exact matches, and what became of its drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.engine.generation import generate
from layerskip_kernels.model.json_lines import json_lines_of, require_text
from layerskip_kernels.model.model import Model

__all__ = ["ParseScores", "evaluate_parses", "read_examples"]

AT_ONCE = 16  # prompts decoded together


@dataclass(frozen=True)
class ParseScores:
    """Over ``count`` utterances: ``exact_match``, the share of parses that are right to the last bracket;
    ``acceptance_rate``, accepted / drafted (None for plain decoding); ``tokens_per_cycle``, tokens a verification."""

    count: int
    exact_match: float
    acceptance_rate: float | None
    tokens_per_cycle: float

    def __str__(self) -> str:
        drafts = "" if self.acceptance_rate is None else f", {self.acceptance_rate:.1%} of drafts accepted"
        return (
            f"{self.count} utterances: {self.exact_match:.1%} exactly right{drafts}, "
            f"{self.tokens_per_cycle:.2f} tokens a verification"
        )


def read_examples(path: Path, limit: int | None = None) -> list[tuple[str, str]]:
    """(prompt, completion) of the first ``limit`` examples (None: all) of a file of ``write_parse_data``."""
    examples = [_example(record, where) for where, record in islice(json_lines_of(path), limit)]
    if not examples:
        raise ValueError(f"{path} has no utterances; `layerskip parse-data` writes such files")
    return examples


def _example(record: Any, where: str) -> tuple[str, str]:
    fields = record if isinstance(record, dict) else {}
    needed = 'an object with a string "prompt" and a string "completion"'
    return require_text(fields.get("prompt"), where, needed), require_text(fields.get("completion"), where, needed)


def evaluate_parses(model: Model, examples: Sequence[tuple[str, str]], config: GenerationConfig) -> ParseScores:
    """Continue every prompt as ``config`` says (its strategy changes the speed, never a parse) and compare."""
    right = drafted = accepted = cycles = tokens = 0
    for start in tqdm(range(0, len(examples), AT_ONCE), desc="parsing", unit="batch"):
        batch = examples[start : start + AT_ONCE]
        found = generate(model, [prompt for prompt, _ in batch], config)
        for generation, (_, completion) in zip(found, batch, strict=True):
            right += (generation.text or "").strip() == completion.strip()
            drafted, accepted = drafted + generation.drafted, accepted + generation.accepted
            cycles, tokens = cycles + generation.cycles, tokens + len(generation.token_ids) - 1
    return ParseScores(
        len(examples), right / len(examples), accepted / drafted if drafted else None, tokens / max(cycles, 1)
    )
