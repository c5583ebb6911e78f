"""Stage 1: the machine, the build, and whether a decode and a speculative generation give the CPU's tokens."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

from stage import DEVICE, REHEARSING, ROOT, Stage, StageError, main

NEW_TOKENS = 4 if REHEARSING else 64
ASKED = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"


def machine() -> dict[str, Any]:
    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    found: dict[str, Any] = {"date": date, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    for name, command in {
        "gpu": ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"], "nvcc": ["nvcc", "--version"],
        "compiler": ["g++", "--version"],
    }.items():  # fmt: skip
        try:
            lines = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()
        except (OSError, subprocess.TimeoutExpired):
            lines = []
        found[name] = lines[-1 if name == "nvcc" else 0] if lines else None
    return found


def build() -> dict[str, Any]:
    """The extensions in place, the CUDA part for this GPU alone; without it if it cannot be built."""
    import torch

    environment = os.environ | {"MAX_JOBS": str(os.cpu_count() or 1)}
    if torch.cuda.is_available():
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    start, said = time.monotonic(), {}
    for cuda in ("auto", "0"):
        done = subprocess.run(
            command, cwd=ROOT, env=environment | {"LAYERSKIP_CUDA": cuda}, capture_output=True, text=True
        )
        if done.returncode == 0:
            return {**said, "cuda": cuda, "seconds": round(time.monotonic() - start, 1)}
        said[f"why not with cuda={cuda}"] = (done.stdout + done.stderr)[-3000:]
    raise StageError(f"the extensions cannot be built: {json.dumps(said)}")


def texts(models: dict[str, Any], prompts: list[list[int]], exit_layer: int, drafts: int) -> dict[str, Any]:
    """The same tokens by both backends, with drafts and without; StageError if not, or if no draft was accepted."""
    from layerskip_kernels import GenerationConfig, PagedKVCache, generate

    plain = GenerationConfig("autoregressive", max_new_tokens=NEW_TOKENS)
    drafting = GenerationConfig(exit_layer=exit_layer, num_speculations=drafts, max_new_tokens=NEW_TOKENS)
    expected = [g.token_ids for g in generate(models["cpu"], prompts, plain)]
    found: dict[str, Any] = {"tokens": sum(map(len, expected))}
    cache = PagedKVCache.with_room_for(models["triton"], [len(p) + NEW_TOKENS + drafts + 1 for p in prompts])
    for kind, config in (("plain", plain), ("speculative", drafting)):
        start = time.monotonic()
        generations = generate(models["triton"], prompts, config, cache=cache)
        found[f"{kind}, seconds with compiling"] = round(time.monotonic() - start, 1)
        got = [g.token_ids for g in generations]
        if got != expected:
            raise StageError(f"{kind} decoding: {got} instead of {expected}")
    for name in ("drafted", "accepted"):
        found[name] = sum(getattr(generation, name) for generation in generations)
    found["captured steps"] = models["triton"].ops.captured_steps()
    if found["accepted"] == 0:
        raise StageError(f"no draft was accepted: {found}")
    if DEVICE == "cuda" and found["captured steps"] == 0:
        raise StageError("no step was captured in a CUDA graph")
    return found


def run(stage: Stage) -> None:
    stage.note(machine=machine())
    stage.note(build="as it is" if REHEARSING else build())

    from layerskip_kernels import load_model
    from layerskip_kernels.ops import cache_ops
    from support.models import SMALL, agreeing_model, random_tokens

    stage.note(cuda_cache_ops=cache_ops.CUDA_MISSING or "built")
    changes = dict(SMALL, num_layers=2) if REHEARSING else dict(num_layers=6)
    tiny = {backend: agreeing_model(backend=backend, **changes) for backend in ("triton", "cpu")}
    prompts = [random_tokens(4)] if REHEARSING else [random_tokens(20), random_tokens(3, seed=1)]
    stage.note(tiny=texts(tiny, prompts, 1, 3))
    if not REHEARSING:
        trained = {backend: load_model("layerskip-tiny-code", backend=backend) for backend in ("triton", "cpu")}
        prompt = trained["cpu"].tokenizer.encode("def fibonacci(n):\n")
        stage.note(trained=texts(trained, [prompt], 3, 4))


if __name__ == "__main__":
    main(__file__, run)
