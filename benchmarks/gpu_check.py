"""Everything that only a GPU can show, in one command: `make gpu-check`, or python benchmarks/gpu_check.py [--save].

First the bits: every Triton kernel, both steps and generation (eager, captured and replayed) against the reference and
the CPU backend, the cache ops on CUDA tensors, and these again under compute-sanitizer. Then the time: decode, draft
and verify steps of models of true shapes with random weights, as bytes per second over the copy bandwidth of the same
run, and generation beside Transformers on the same weights. Nothing is timed when a bit differed.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from layerskip_kernels import GenerationConfig, Model, PagedKVCache, generate
from layerskip_kernels.evaluation.roofline import SHAPES
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.operands import DraftRows, PendingRows
from layerskip_kernels.ops import cache_ops

ROOT = Path(__file__).parent.parent
TRITON_TESTS = ["tests/ops/test_triton_ops.py", "tests/decoding/test_triton_steps.py"]
CACHE_TESTS = [f"tests/ops/test_{op}.py" for op in ("copy_pages", "gather_kv")]
CONTEXTS = (200, 4000)
EXIT_LAYER, DRAFTS = 4, 6
ROWS = (1, 2, 4, 7, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gpu.json as well")
    parser.add_argument("--skip-tests", action="store_true", help="only time (the result says so)")
    parser.add_argument(
        "--skip-sanitizer", action="store_true", help="for drivers that compute-sanitizer does not know"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs a GPU that torch can use; `layerskip doctor` says what it finds")
    result: dict[str, Any] = {"machine": machine(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}"}
    result["tests"] = "skipped" if args.skip_tests else run_tests()
    result["sanitizer"] = "skipped" if args.skip_sanitizer or args.skip_tests else sanitize()
    result["copy_gb_s"] = copy_bandwidth()
    say(f"copy bandwidth {result['copy_gb_s']:.0f} GB/s")
    result["steps"] = {}
    for name in ("llama3.2-1b", "llama3-8b"):
        llama = random_llama(name)
        model = our_model(llama, name)
        if name == "llama3.2-1b":
            result["generation"] = generation(llama, model)
        del llama
        result["steps"][name] = [row for context in CONTEXTS for row in steps(model, context, result["copy_gb_s"])]
        del model
        gc.collect()
        torch.cuda.empty_cache()
    text = json.dumps(result)
    if args.save:
        (ROOT / "benchmarks/results/gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(text)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name, "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda, "torch": torch.__version__,
        "triton": triton.__version__, "transformers": transformers.__version__,
        "cuda_cache_ops": cache_ops.CUDA_MISSING or "built",
    }  # fmt: skip


# ---- the bits ----


def run_tests() -> dict[str, Any]:
    """The Triton and cache tests on the device; ends the run if one fails."""
    start = time.perf_counter()
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if _has("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:benchmark", *workers]
    done = subprocess.run([*command, *TRITON_TESTS, *CACHE_TESTS], cwd=ROOT, text=True, capture_output=True)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    say(f"tests: {summary}")
    if done.returncode != 0:
        say(done.stdout[-6000:])
        sys.exit("a test failed on this GPU: nothing is timed")
    return {"summary": summary, "seconds": round(time.perf_counter() - start, 1)}


def sanitize() -> dict[str, str]:
    """The cache ops' tests under compute-sanitizer, one report a tool."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"compute-sanitizer": "not found"}
    reports = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, "--cache-ops-once"]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        last = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        reports[check] = last[-1].strip("= ") if last else f"exit status {done.returncode}: {done.stdout[-300:]}"
        say(f"{check}: {reports[check]}")
    return reports


def cache_ops_once() -> None:
    """Every cache op on small CUDA tensors, and one cycle of a tiny model: what compute-sanitizer watches."""
    device, pages = "cuda", 9
    k = torch.randn(2, pages, 3, 10, 7, device=device).bfloat16()
    v = torch.randn(2, pages, 3, 7, 10, device=device).bfloat16()
    hidden = torch.randn(pages, 7, 33, device=device).bfloat16()
    error = cache_ops.new_error(device)
    table = torch.randperm(pages, device=device).int()
    cache_ops.copy_pages(table[:2], table[4:6], k, v, hidden, error)
    for to_host in (False, True):
        moved = cache_ops.gather_kv(table, 20, k, v, error, to_host=to_host)
        cache_ops.scatter_kv(table[3:], 5, *moved, k, v, error)
    cache_ops.check_error(error)
    torch.cuda.synchronize()


def _has(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


# ---- the time ----


def device_ms(run: Any, calls: int = 10, rounds: int = 7) -> float:
    """Milliseconds of a call on the device: the median of rounds, in each of which calls follow one another."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[rounds // 2]


def copy_bandwidth() -> float:
    """GB/s of copying 1 GiB, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / device_ms(lambda: target.copy_(source)) / 1e6


def random_llama(name: str) -> LlamaForCausalLM:
    shape = SHAPES[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
                num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
                num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, max_position_embeddings=8192,
                tie_word_embeddings=shape.tie_word_embeddings, bos_token_id=1, eos_token_id=None, pad_token_id=0,
            ),
            dtype=torch.bfloat16,
        ).eval()  # fmt: skip


def our_model(llama: LlamaForCausalLM, name: str) -> Model:
    """The same weights on the Triton backend."""
    tensors = {key: value.detach() for key, value in llama.state_dict().items()}
    if llama.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    config = read_hf_config(llama.config.to_dict())
    checkpoint = Checkpoint(config=config, tensors=tensors, tokenizer=None, name=name, dtype=torch.bfloat16)
    return Model.from_checkpoint(checkpoint, backend="triton")


def bytes_read(model: Model, layers: int, heads: int) -> int:
    """Weights that stream through a pass of so many layers and LM heads."""
    return layers * model.weights.layers[0].nbytes + heads * model.weights.lm_head.nbytes


def steps(model: Model, context: int, copy_gb_s: float) -> list[dict[str, Any]]:
    """Decode (1 row), verify (more rows, all but the last from the exit layer on) and draft steps after ``context``."""
    layers, cache = model.config.num_layers, PagedKVCache(model, -(-(context + 32) // 16))
    cache.k.normal_()
    cache.v.normal_()
    table = torch.arange(cache.k.size(1), dtype=torch.int32)[None]

    def verify(rows: int) -> Any:
        depths = torch.tensor([EXIT_LAYER] * (rows - 1) + [0], dtype=torch.int32)
        starts = torch.tensor([0, rows], dtype=torch.int32)
        positions = torch.arange(context, context + rows)
        pending = PendingRows(torch.ones(rows, dtype=torch.int64), positions, depths, starts, table)
        counts, judged = torch.tensor([rows - 1]), torch.tensor([True])
        return lambda: model.ops.verify_pass(model.weights, model.sizes, cache.tensors, pending, counts, judged)

    def draft() -> Any:
        rows = DraftRows(torch.ones(1, dtype=torch.int64), torch.tensor([context]), torch.tensor([DRAFTS]), table)
        return lambda: model.ops.draft_pass(model.weights, model.sizes, cache.tensors, rows, None, EXIT_LAYER, DRAFTS)

    kinds = [(f"verify {rows} rows" if rows > 1 else "decode", verify(rows), layers, 1) for rows in ROWS]
    kinds.append((f"draft {DRAFTS} tokens, exit {EXIT_LAYER}", draft(), DRAFTS * EXIT_LAYER, DRAFTS))
    found = []
    for kind, run, passes, heads in kinds:
        milliseconds, read = device_ms(run), bytes_read(model, passes, heads)
        gb_s = read / milliseconds / 1e6
        row = {
            "model": model.name, "step": kind, "context": context, "ms": round(milliseconds, 4), "gb_s": round(gb_s, 1),
            "of_copy_bandwidth": round(gb_s / copy_gb_s, 3), "launches": launches(run),
        }  # fmt: skip
        say(
            f"{model.name}, {kind}, context {context}: {milliseconds:.3f} ms, {gb_s:.0f} GB/s, "
            f"{row['launches']} launches"
        )
        found.append(row)
    return found


def launches(run: Any) -> int:
    """Kernels of one call, copies and clones of inputs and results not counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(
        event.count for event in profile.key_averages() if event.key.startswith("_") and event.key.endswith("_kernel")
    )


def generation(llama: LlamaForCausalLM, model: Model, new_tokens: int = 48, rounds: int = 3) -> list[dict[str, Any]]:
    """Tokens per second of four ways to generate from one prompt, in turn, after ours gave equal tokens."""
    prompt = torch.randint(3, 1000, (1, 100), device="cuda")
    tokens = prompt[0].tolist()
    plain = GenerationConfig("autoregressive", max_new_tokens=new_tokens)
    drafting = GenerationConfig(exit_layer=EXIT_LAYER, num_speculations=DRAFTS, max_new_tokens=new_tokens)
    common = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    def peer(**options: Any) -> list[int]:
        with torch.inference_mode():
            return llama.generate(prompt, attention_mask=torch.ones_like(prompt), **common, **options)[0, 100:].tolist()

    ways = {
        "layerskip_kernels, plain": lambda: generate(model, [tokens], plain)[0].token_ids,
        "layerskip_kernels, self-speculative": lambda: generate(model, [tokens], drafting)[0].token_ids,
        "Transformers, plain": peer,
        "Transformers, assistant_early_exit": lambda: peer(assistant_early_exit=EXIT_LAYER),
    }
    outputs = {name: way() for name, way in ways.items()}
    [drafted] = generate(model, [tokens], drafting)
    if drafted.drafted == 0:
        sys.exit("self-speculative decoding drafted nothing: nothing is timed")
    if outputs["layerskip_kernels, plain"] != outputs["layerskip_kernels, self-speculative"]:
        sys.exit("self-speculative decoding gave other tokens than plain decoding: nothing is timed")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    found = []
    for name, times in seconds.items():
        rate = new_tokens / sorted(times)[rounds // 2]
        say(f"{name}: {rate:.1f} tokens/s")
        found.append({"way": name, "tokens_per_second": round(rate, 1), "first_tokens": outputs[name][:8]})
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--cache-ops-once"]:
        cache_ops_once()
    else:
        main()
