"""Everything that threads compute, in one dictionary of tensors, and a library that changes what OpenMP gives them.

As a program: ``python -m support.teams FILE THREADS LIBRARY`` saves the bits and the size of the team OpenMP gave.
"""

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from layerskip_kernels import Model, draft_step, prefill, verify_step
from support.models import cache_for, random_tokens, tiny_model

SOURCE = Path(__file__).parents[1] / "cpp" / "openmp_teams.cpp"
ROWS, COLUMNS = 9, 211


@functools.cache
def teams_path() -> str:
    """The library, compiled once per run of the tests; skips where there is no compiler."""
    if shutil.which("g++") is None:
        import pytest

        pytest.skip("needs g++")
    path = Path(tempfile.mkdtemp(prefix="layerskip-teams-")) / "teams.so"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-fopenmp", SOURCE, "-o", path], check=True)
    return str(path)


def load_teams(path: str | None = None) -> ctypes.CDLL:
    return ctypes.CDLL(path or teams_path())


def decoded(model: Model, between: Callable[[int], object] = lambda step: None) -> dict[str, Tensor]:
    """Tokens, logits, K and V of two ragged texts; ``between(step)`` is called before each step."""
    cache = cache_for(model, 400)
    texts = [cache.add_sequence(random_tokens(count, seed=count)) for count in (37, 5)]
    between(0)
    verdict = prefill(model, cache, texts)
    cache.commit(verdict)
    logits = [verdict.logits]
    for step in range(1, 7, 2):
        between(step)
        draft = draft_step(model, cache, texts, 1 + step % 2, [3, 1])
        between(step + 1)
        verdict = verify_step(model, cache, draft)
        cache.commit(verdict)
        logits.append(verdict.logits)
    kv = [tensor for text in texts for tensor in cache.export(text)]
    tokens = torch.tensor([token for text in texts for token in text.tokens])
    return {"tokens": tokens, "logits": torch.cat(logits), **{f"kv{i}": tensor for i, tensor in enumerate(kv)}}


def sampled() -> dict[str, Tensor]:
    """The ops of sampling, whose rows are dealt to threads."""
    ops, generator = torch.ops.layerskip, torch.Generator().manual_seed(1)
    scores, others = (torch.randn(ROWS, COLUMNS, generator=generator) * 3 for _ in range(2))
    rows = torch.arange(ROWS)
    settings = torch.full((ROWS,), 0.7), rows * 5, torch.full((ROWS,), 0.9).double(), torch.full((ROWS,), 0.01)
    filtered = ops.filter_logits(scores, *settings)
    drawn = ops.gumbel_argmax(filtered, rows, rows + 7, rows, torch.ones(ROWS, dtype=torch.bool))
    kept = ops.rejection_sample(others, scores, rows, rows, rows, rows)
    return {"filtered": filtered, "drawn": drawn, "kept": kept}


def bits(between: Callable[[int], object] = lambda step: None) -> dict[str, Tensor]:
    """All of it; the models are packed by threads as well."""
    models = {str(dtype): tiny_model(dtype) for dtype in (torch.bfloat16, torch.float32)}
    models["int8"] = tiny_model(weights="int8")
    results = {
        f"{name} {key}": value for name, model in models.items() for key, value in decoded(model, between).items()
    }
    weights = {
        f"{name} weight {i}": w.clone() for name, model in models.items() for i, w in enumerate(model.weights.flat)
    }
    return {**results, **weights, **sampled()}


def assert_equal_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not different


if __name__ == "__main__":
    file, threads, library = sys.argv[1:]
    torch.set_num_threads(int(threads))
    size = load_teams(library).team_size(int(threads))
    torch.save({**bits(), "team size": torch.tensor(size)}, file)
