"""Stage 3: the time of steps of models of true shapes with random weights, and of generation beside Transformers.

A step's time is given as bytes of weights per second over the bandwidth of a copy measured beside it, and by kernel.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stage import DEVICE, REHEARSING, Stage, StageError, main, milliseconds

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from layerskip_kernels import GenerationConfig, Model, ModelConfig, PagedKVCache, generate
from layerskip_kernels.evaluation.datasheets import SHAPES
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.operands import DraftRows, PendingRows

TINY = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
CONTEXTS = (3,) if REHEARSING else (200, 4000)
EXIT_LAYER, DRAFTS = (1, 1) if REHEARSING else (4, 6)
ROWS = (1,) if REHEARSING else (1, 2, 4, 7, 8, 16)
PROMPTS = (2,) if REHEARSING else (256, 2048)
QUANTISED = ("q8_0",) if REHEARSING else ("int8", "q4_0", "q8_0")
COPIED = 1 << (12 if REHEARSING else 30)


def copy_bandwidth() -> float:
    """GB/s of copying, bytes read and written."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def by_kernel(run: Callable[[], Any]) -> dict[str, Any]:
    """Calls and microseconds of each of our kernels in one run; copies and clones of inputs and results are apart."""
    if REHEARSING:
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return {
        event.key: {"calls": event.count, "us": round(event.self_device_time_total, 1)}
        for event in sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
        if event.self_device_time_total
    }


def random_llama(shape: ModelConfig) -> LlamaForCausalLM:
    """Layers beyond the exit say little, so that drafts are accepted; no step takes longer or shorter for it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, max_position_embeddings=8192,
        tie_word_embeddings=shape.tie_word_embeddings, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(DEVICE):
        llama = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for layer in llama.model.layers[EXIT_LAYER:]:
            layer.self_attn.o_proj.weight *= 0.02
            layer.mlp.down_proj.weight *= 0.02
    return llama


def our_model(llama: LlamaForCausalLM, name: str, weights: str | None = None) -> Model:
    """The same weights on the Triton backend."""
    tensors = {key: value.detach() for key, value in llama.state_dict().items()}
    if weights is not None:
        tensors = {key: value.cpu() for key, value in tensors.items()}
    if llama.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    config = read_hf_config(llama.config.to_dict())
    checkpoint = Checkpoint(config=config, tensors=tensors, tokenizer=None, name=name, dtype=torch.bfloat16)
    return Model.from_checkpoint(checkpoint, "triton", weights)


def bytes_read(model: Model, layers: int, heads: int) -> int:
    """Weights that stream through a pass of so many layers and LM heads."""
    return layers * model.weights.layers[0].nbytes + heads * model.weights.lm_head.nbytes


Steps = dict[str, tuple[Callable[[], Any], int]]  # what to run, and the bytes of weights that it reads


def steps_after(model: Model, context: int) -> Steps:
    """Decode (1 row), verify (more rows, all but the last from the exit layer on), draft and prompt steps."""
    layers = model.config.num_layers
    cache = PagedKVCache(model, -(-(context + max(PROMPTS) + 32) // 16))
    cache.k.normal_()
    cache.v.normal_()
    table = torch.arange(cache.k.size(1), dtype=torch.int32)[None]

    def verify(rows: int, deep: int) -> Callable[[], Any]:
        depths = torch.tensor([EXIT_LAYER] * deep + [0] * (rows - deep), dtype=torch.int32)
        positions, starts = torch.arange(context, context + rows), torch.tensor([0, rows], dtype=torch.int32)
        pending = PendingRows(torch.ones(rows, dtype=torch.int64), positions, depths, starts, table)
        counts, judged = torch.tensor([deep]), torch.tensor([True])
        return lambda: model.ops.verify_pass(model.weights, model.sizes, cache.tensors, pending, counts, judged)

    def draft() -> Callable[[], Any]:
        rows = DraftRows(torch.ones(1, dtype=torch.int64), torch.tensor([context]), torch.tensor([DRAFTS]), table)
        return lambda: model.ops.draft_pass(model.weights, model.sizes, cache.tensors, rows, None, EXIT_LAYER, DRAFTS)

    steps: Steps = {}
    for rows in ROWS:
        name = f"verify {rows} rows" if rows > 1 else "decode"
        steps[name] = verify(rows, rows - 1), bytes_read(model, layers, 1)
    steps[f"draft {DRAFTS} tokens, exit {EXIT_LAYER}"] = draft(), bytes_read(model, DRAFTS * EXIT_LAYER, DRAFTS)
    for rows in PROMPTS:
        steps[f"prompt of {rows} tokens"] = verify(rows, 0), bytes_read(model, layers, 1)
    return steps


def timed(stage: Stage, model: Model, context: int, copy_gb_s: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, (run, read) in steps_after(model, context).items():
        if stage.left() < 30:
            break
        ms = milliseconds(run, calls=2 if name.startswith("prompt") else 10)
        row = {
            "model": model.name, "step": name, "context": context, "ms": round(ms, 4),
            "gb_s": round(read / ms / 1e6, 1), "of_copy_bandwidth": round(read / ms / 1e6 / copy_gb_s, 3),
            "kernels": by_kernel(run),
        }  # fmt: skip
        found.append(row)
    return found


def generation(llama: LlamaForCausalLM, model: Model) -> list[dict[str, Any]]:
    """Tokens per second of four ways to generate from one prompt, in turn, after ours gave equal tokens."""
    new_tokens, rounds = (3, 1) if REHEARSING else (48, 3)
    tokens = torch.randint(3, min(1000, model.config.vocab_size), (3 if REHEARSING else 100,)).tolist()
    prompt = torch.tensor([tokens], device=DEVICE)
    plain = GenerationConfig("autoregressive", max_new_tokens=new_tokens)
    drafting = GenerationConfig(exit_layer=EXIT_LAYER, num_speculations=DRAFTS, max_new_tokens=new_tokens)
    common = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    def peer(**options: Any) -> list[int]:
        with torch.inference_mode():
            found = llama.generate(prompt, attention_mask=torch.ones_like(prompt), **common, **options)
        return found[0, len(tokens) :].tolist()

    accepted = 0

    def self_speculative() -> list[int]:
        nonlocal accepted
        [found] = generate(model, [tokens], drafting)
        accepted = found.accepted
        return found.token_ids

    ways: dict[str, Callable[[], list[int]]] = {
        "layerskip_kernels, plain": lambda: generate(model, [tokens], plain)[0].token_ids,
        "layerskip_kernels, self-speculative": self_speculative,
        "Transformers, plain": peer,
        "Transformers, assistant_early_exit": lambda: peer(assistant_early_exit=EXIT_LAYER),
    }
    outputs = {name: way() for name, way in ways.items()}
    if accepted == 0:
        raise StageError("no draft was accepted")
    if outputs["layerskip_kernels, plain"] != outputs["layerskip_kernels, self-speculative"]:
        raise StageError("self-speculative decoding gave other tokens than plain decoding")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()  # lists of numbers: the device has been waited for
            seconds[name].append(time.perf_counter() - start)
    return [
        {"way": name, "tokens_per_second": round(new_tokens / sorted(times)[rounds // 2], 1),
         "first_tokens": outputs[name][:8], "accepted": accepted if "self-spec" in name else None}
        for name, times in seconds.items()
    ]  # fmt: skip


def run(stage: Stage) -> None:
    copy_gb_s = copy_bandwidth()
    stage.note(copy_gb_s=round(copy_gb_s, 1))
    rows: list[dict[str, Any]] = []
    for name in ("llama3.2-1b",) if REHEARSING else ("llama3.2-1b", "llama3-8b"):
        llama = random_llama(replace(SHAPES[name], **TINY) if REHEARSING else SHAPES[name])
        model = our_model(llama, name)
        for context in CONTEXTS:
            rows += timed(stage, model, context, copy_gb_s)
            stage.note(steps=rows)
            if name == "llama3.2-1b" and context == CONTEXTS[0]:
                stage.note(generation=generation(llama, model))
        del llama, model
        gc.collect()
        if not REHEARSING:
            torch.cuda.empty_cache()
    few_layers = replace(SHAPES["llama3.2-1b"], **(TINY if REHEARSING else {"num_layers": 2}))
    llama = random_llama(few_layers)
    for weights in QUANTISED:
        if stage.left() < 60:
            break
        model = our_model(llama, f"two layers of llama3.2-1b in {weights}", weights)
        rows += timed(stage, model, CONTEXTS[0], copy_gb_s)
        stage.note(steps=rows)
    stage.note(copy_gb_s_at_the_end=round(copy_bandwidth(), 1))


if __name__ == "__main__":
    main(__file__, run)
