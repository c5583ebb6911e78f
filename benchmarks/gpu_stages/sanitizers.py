"""Stage 5: compute-sanitizer over the cache's ops and over cycles of a tiny model, replayed ones among them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

from stage import DEVICE, REHEARSING, ROOT, Stage, StageError, main

CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")


def cache_ops() -> None:
    """Every op of the cache on small tensors."""
    import torch

    from layerskip_kernels.ops import cache_ops
    from layerskip_kernels.ops.staging import Staging

    pages = 9
    k = torch.randn(2, pages, 3, 10, 7, device=DEVICE).bfloat16()
    v = torch.randn(2, pages, 3, 7, 10, device=DEVICE).bfloat16()
    hidden = torch.randn(pages, 7, 33, device=DEVICE).bfloat16()
    error = cache_ops.new_error(torch.device(DEVICE))
    table = torch.arange(pages - 1, -1, -1, device=DEVICE).int()
    cache_ops.copy_pages(table[:2], table[4:6], k, v, hidden, error)
    moved = cache_ops.gather_kv(table, 20, k, v, error)
    cache_ops.scatter_kv(table[3:], 5, *moved, k, v, error)
    staging = Staging()
    staging.bring(table[3:], 5, *staging.fetch(table, 20, k, v, error), k, v, error)
    cache_ops.check_error(error)


def cycles() -> None:
    """A text with drafts: steps that are launched, captured and replayed."""
    from layerskip_kernels import GenerationConfig, generate
    from support.models import SMALL, agreeing_model, random_tokens

    model = agreeing_model(backend="triton", **(dict(SMALL, num_layers=2) if REHEARSING else {}))
    config = GenerationConfig(exit_layer=1, num_speculations=2, max_new_tokens=2 if REHEARSING else 24)
    [generation] = generate(model, [random_tokens(3)], config)
    assert len(generation.token_ids) == config.max_new_tokens


WATCHED = {"cache_ops": cache_ops, "cycles": cycles}


def checked(tool: str | None, check: str, name: str, seconds: float) -> dict[str, Any]:
    """One of WATCHED in a process of its own under one tool; without the tool, on its own."""
    command = [sys.executable, __file__, "--watched", name, *(["--rehearse"] * REHEARSING)]
    if tool is not None:
        command = [tool, "--tool", check, "--error-exitcode", "9", *command]
    try:
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=seconds, env=dict(os.environ))
    except subprocess.TimeoutExpired:
        return {"status": None, "said": f"stopped after {seconds:.0f} s"}
    last = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
    said = last[-1] if last else (done.stdout + done.stderr)[-1500:]
    return {"status": done.returncode, "said": said if tool or done.returncode else "not watched"}


def run(stage: Stage) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not REHEARSING and tool is None:
        raise StageError("compute-sanitizer is not on the PATH")
    stage.note(tool=tool)
    found: dict[str, Any] = {}
    for check in CHECKS[:1] if REHEARSING else CHECKS:
        for name in WATCHED:
            if stage.left() > 30:
                found[f"{check} of {name}"] = checked(None if REHEARSING else tool, check, name, stage.left() - 15)
                stage.note(found=found)
    if wrong := [name for name, said in found.items() if said["status"] != 0]:
        raise StageError(f"{', '.join(wrong)}")


if __name__ == "__main__":
    if "--watched" in sys.argv:
        WATCHED[sys.argv[sys.argv.index("--watched") + 1]]()
    else:
        main(__file__, run)
