"""This package beside Transformers and llama.cpp: the same weights, prompts, lengths and threads, in one run.

All contenders take turns, each in its own process, and the machine's limits among them. The prompts are HumanEval
problems; decoding is greedy, without an end. Early exit, ours and Transformers', gets fewer tokens than the others:
Transformers recomputes what it drafts on, and is slow. llama.cpp runs the weights as BF16, F16 and Q8_0 files; its
wheel is built for AVX2, so this package runs on AVX2 as well.
"""

import tempfile
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from gguf_files import TYPES, write_gguf
from layerskip_kernels import ModelConfig
from layerskip_kernels.evaluation.prompts import human_eval_prompts
from layerskip_kernels.model.gguf_cache import converted_directory
from layerskip_kernels.model.sources import default_model_path
from layerskip_kernels.model.tensor_names import layer_products
from layerskip_kernels.model.tokenizer import Tokenizer
from peer_workers import Contender, Worker
from shapes import SMOLLM2
from timing import (
    BitsDiffer,
    Candidate,
    Limits,
    Timing,
    arguments,
    described,
    finish,
    interleave,
    limit_candidates,
)

EXIT_LAYER, NUM_SPECULATIONS = 10, 4
WARM = 4  # tokens
PROMPT_TOKENS, COMPARED_PROMPTS = 512, 3
MAX_GAP = 2.0  # of logits
OURS, OURS_FP32, OURS_SPECULATIVE = "layerskip_kernels bf16", "layerskip_kernels fp32", "layerskip_kernels early exit"
Workers = dict[str, Worker]


def main() -> None:
    args = arguments(__doc__, rounds=7, new_tokens=32, early_exit_new_tokens=12)
    contenders = ours(args.new_tokens, args.early_exit_new_tokens)
    contenders += transformers(args.new_tokens, args.early_exit_new_tokens)
    workers: Workers = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders += llama_cpp(Path(folder), args.new_tokens)
        try:
            workers |= {c.name: Worker(c, args.threads) for c in contenders}
            runtimes = {name: workers[name].call("runtimes") for name in tqdm(workers, desc="loading", unit="peer")}
            measured = compete(workers, args.rounds)
        finally:
            for worker in workers.values():
                worker.stop()
    facts = {
        "xllamacpp": version("xllamacpp"),
        "prompt_tokens": PROMPT_TOKENS,
        "prompt_flop": prompt_flop(SMOLLM2, PROMPT_TOKENS),
        "exit_layer": EXIT_LAYER,
        "num_speculations": NUM_SPECULATIONS,
        "openmp_runtimes": runtimes,
    }
    finish("peers", {**facts, **measured}, args.save)


# ---- who takes part ----


def ours(new_tokens: int, early_exit_new_tokens: int) -> list[Contender]:
    bf16 = {"dtype": "bfloat16", "weights": "16bit"}
    exits = {"exit_layer": EXIT_LAYER, "drafts": NUM_SPECULATIONS}
    contenders = [
        Contender(OURS, "ours", bf16, new_tokens),
        Contender("layerskip_kernels int8", "ours", {**bf16, "weights": "int8"}, new_tokens),
        Contender(OURS_SPECULATIVE, "ours", {**bf16, **exits}, early_exit_new_tokens, ("decode",)),
        Contender(OURS_FP32, "ours", {"dtype": "float32", "weights": "16bit"}, new_tokens, ()),
    ]
    if "avx2" in torch.ops.layerskip.instruction_sets() and torch.ops.layerskip.instruction_set() != "avx2":
        contenders.append(Contender(f"{OURS} on AVX2", "ours", {**bf16, "isa": "avx2"}, new_tokens))
    return contenders


def transformers(new_tokens: int, early_exit_new_tokens: int) -> list[Contender]:
    directory = str(converted_directory(default_model_path()))
    contenders = []
    for name, dtype in (("bf16", "bfloat16"), ("fp32", "float32")):
        plain = {"directory": directory, "dtype": dtype}
        exits = {"exit_layer": EXIT_LAYER, "drafts": NUM_SPECULATIONS}
        contenders += [
            Contender(f"Transformers {name}", "transformers", plain, new_tokens),
            Contender(f"Transformers {name}, early exit", "transformers", plain | exits, early_exit_new_tokens,
                      ("decode",)),
        ]  # fmt: skip
    return contenders


def llama_cpp(folder: Path, new_tokens: int) -> list[Contender]:
    """llama.cpp on files that lie in ``folder`` for as long as it runs."""
    contenders = []
    for name in tqdm(TYPES, desc="writing GGUF files", unit="file"):
        path = folder / f"{name}.gguf"
        write_gguf(path, name)
        contenders.append(Contender(f"llama.cpp {name}", "llama.cpp", {"path": str(path)}, new_tokens))
    return contenders


# ---- what is compared and timed ----


def compete(workers: Workers, rounds: int) -> dict[str, Any]:
    texts = prompts(rounds + 1)
    check_bits(workers, texts[0])
    agreed = agreements(workers, texts[:COMPARED_PROMPTS])
    long = [token for text in prompts(20) for token in text][:PROMPT_TOKENS]
    timings = interleave({**candidates(workers, texts, long), **limit_candidates()}, rounds)
    limits = Limits.of(timings)
    results = [result(w, timings, agreed[name], limits, mean(map(len, texts))) for name, w in workers.items()]
    return {**vars(limits), "llama_cpp": workers["llama.cpp BF16"].call("facts"), "results": results}


def prompt_flop(config: ModelConfig, tokens: int) -> int:
    """Products and sums that a prompt takes: all layers for all tokens, attention, and the head for the last one."""
    weights = config.num_layers * layer_products(config)
    attention = tokens * (tokens + 1) * config.num_layers * config.num_heads * config.head_dim
    return 2 * (tokens * weights + attention + config.vocab_size * config.hidden_size)


def prompts(count: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_directory(converted_directory(default_model_path()))
    assert tokenizer is not None
    return [tokenizer.encode(text) for _, text in human_eval_prompts(count)]


def check_bits(workers: Workers, prompt: list[int]) -> None:
    for name, worker in workers.items():
        if worker.contender.kind == "ours" and not worker.call("same_bits", prompt):
            raise BitsDiffer(f"{name}: self-speculative decoding gives other bits than plain decoding")


def candidates(workers: Workers, texts: list[list[int]], long: list[int]) -> dict[str, Candidate]:
    found = {}
    for name, worker in workers.items():
        if "decode" in worker.contender.timed:
            found[f"decode {name}"] = decoding(worker, texts)
        if "process" in worker.contender.timed:
            found[f"process {name}"] = Candidate(worker.call, prepare=lambda: ("process", long), seconds=float)
    return found


def decoding(worker: Worker, texts: list[list[int]]) -> Candidate:
    """Another prompt in each round, the same one for all. The worker says how long it took: the pipe is left out.

    It has slept while the others had their turns, and decodes a few tokens first, which are not timed.
    """
    turns = cycle(texts)

    def prepare() -> tuple[str, list[int], int]:
        text = next(turns)
        worker.call("decode", text, WARM)
        return "decode", text, worker.contender.new_tokens

    return Candidate(worker.call, prepare, seconds=float)


def agreements(workers: Workers, texts: list[list[int]]) -> dict[str, dict[str, Any]]:
    """How far each contender's greedy tokens are ours in fp32, and how close the choice was where they part.

    ``gaps``: by how much, in our fp32 logits, the best token is above the one that the contender chose. Rounding
    explains hundredths, 8-bit weights tenths. Raises ValueError beyond MAX_GAP: that is another model.
    """
    expected = [workers[OURS_FP32].call("tokens", text, workers[OURS_FP32].contender.new_tokens) for text in texts]
    found = {}
    for name, worker in tqdm(workers.items(), desc="comparing tokens", unit="peer"):
        equal, compared, gaps = 0, 0, []
        for text, wanted in zip(texts, expected, strict=True):
            got = worker.call("tokens", text, worker.contender.new_tokens)
            same = common_prefix(got, wanted)
            equal, compared = equal + same, compared + len(got)
            if same < len(got):
                gaps.append(workers[OURS_FP32].call("gap", text + wanted[:same], got[same]))
        if max(gaps, default=0.0) > MAX_GAP:
            raise ValueError(f"{name} does not compute the same model: it chose tokens {max(gaps):.2f} below the best")
        found[name] = {"first_tokens_equal": equal, "tokens": compared, "gaps": gaps}
    return found


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def result(
    worker: Worker, timings: dict[str, Timing], agreed: dict[str, Any], limits: Limits, prompt_length: float
) -> dict[str, Any]:
    contender = worker.contender
    found: dict[str, Any] = {"name": contender.name, "new_tokens": contender.new_tokens, "agreement": agreed}
    if decode := timings.get(f"decode {contender.name}"):
        found |= {"decode": described(decode), "tokens_per_second": 1 / decode.median}
    if process := timings.get(f"process {contender.name}"):
        found |= {"process": described(process), "prompt_tokens_per_second": PROMPT_TOKENS / process.median}
    if decode and contender.kind == "ours":
        num_bytes = worker.call("bytes_read", round(prompt_length + contender.new_tokens / 2))
        fraction = num_bytes / decode.median / (limits.read_bandwidth_gb_s * 1e9)
        found |= {"bytes": num_bytes, "fraction_of_limit": fraction}
    return found


if __name__ == "__main__":
    main()
