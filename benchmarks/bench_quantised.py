"""Quantised files beside llama.cpp: the same GGUF files, decoding, prompts, six rows over one, perplexity.

The files are written by ``layerskip quantise`` from the default model, from a Llama-3.2-1B of random numbers, and from
the parse checkpoint, and lie in a temporary folder. All contenders take turns, each in its own process, and the
machine's limits among them. llama.cpp's wheel is built for AVX2, so this package runs on AVX2 as well.
"""

import json
import math
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from bench_steps import row_candidates, row_name
from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.evaluation.quality import perplexities, solution_texts
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.gguf_write import write_gguf
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.sources import locate
from peer_workers import Contender, Worker
from peers import PROMPT_TOKENS, candidates, check_bits, decoding, prompts
from shapes import LLAMA_1B, RandomTensors
from timing import BitsDiffer, Limits, Timing, arguments, described, finish, interleave, limit_candidates

TYPES = {"Q4_0": "q4_0", "Q4_K_M": "q4_k_m", "Q8_0": "q8_0"}
PARSE = "smollm2-135m-parse"
LLAMA_PROBABILITIES = (
    4000  # of each token, that llama.cpp is asked for: a token that is not among them counts as the last
)


def main() -> None:
    args = arguments(__doc__, rounds=7, new_tokens=48, problems=20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_files(folder)
        timed = time_all(files, args)
        judged = {label: perplexity(files[label], args.problems, args.threads) for label in TYPES}
    facts = {"xllamacpp": version("xllamacpp"), "prompt_tokens": PROMPT_TOKENS, "problems": args.problems}
    whole = {name: own_perplexity(weights, args.problems) for name, weights in (("bf16", "16bit"), ("int8", "int8"))}
    finish("quantised", {**facts, **timed, "perplexity": {**whole, **judged}}, args.save)


def write_files(folder: Path) -> dict[str, Path]:
    """A file for each label, all with the default model's vocabulary."""
    files = {label: folder / f"smollm2-{kind}.gguf" for label, kind in TYPES.items()}
    for label, path in files.items():
        write_gguf(read_checkpoint(on_demand=True), path, TYPES[label])
    files["1B"], files["parse"] = folder / "llama-1b-q4_k_m.gguf", folder / "parse-q4_0.gguf"
    tokenizer = read_checkpoint(on_demand=True).tokenizer
    config = replace(LLAMA_1B, eos_token_ids=(2,))
    random = Checkpoint(config, RandomTensors(config), tokenizer, "Llama-3.2-1B of random numbers", torch.bfloat16)
    write_gguf(random, files["1B"], "q4_k_m")
    write_gguf(read_checkpoint(PARSE, on_demand=True), files["parse"], "q4_0")
    return files


# ---- time ----


def contenders(files: dict[str, Path], new_tokens: int) -> list[Contender]:
    found = []
    sets = torch.ops.layerskip.instruction_sets()
    isas = {None: "", **({"avx2": " on AVX2"} if "avx2" in sets and sets[-1] != "avx2" else {})}
    for label, path in files.items():
        if label == "parse":
            continue
        timed = ("decode", "process") if label in TYPES else ("decode",)
        source = {"dtype": "bfloat16", "source": str(path)}
        for isa, suffix in isas.items():
            found.append(Contender(f"ours {label}{suffix}", "ours", {**source, "isa": isa}, new_tokens, timed))
        found.append(Contender(f"llama.cpp {label}", "llama.cpp", {"path": str(path)}, new_tokens, timed))
    defaults = json.loads((locate(PARSE)[0] / "layerskip.json").read_text())
    vocabulary = json.loads((locate(PARSE)[0] / defaults["draft_vocab"]).read_text())
    drafting = {"exit_layer": defaults["exit_layer"], "drafts": defaults["num_speculations"], "draft_vocab": vocabulary}
    parse = {"dtype": "bfloat16", "source": str(files["parse"])}
    return [
        *found,
        Contender("ours 16-bit", "ours", {"dtype": "bfloat16", "weights": "16bit"}, new_tokens, ("decode",)),
        Contender("ours parse", "ours", parse, 16, ()),
        Contender("ours parse, self-speculative", "ours", {**parse, **drafting}, 16, ()),
        Contender("ours parse in 16 bits", "ours", {"dtype": "bfloat16", "source": PARSE}, 16, ()),
        Contender("ours parse in 16 bits, self-speculative", "ours",
                  {"dtype": "bfloat16", "source": PARSE, **drafting}, 16, ()),
        Contender("llama.cpp parse", "llama.cpp", {"path": str(files["parse"])}, 16, ()),
    ]  # fmt: skip


def time_all(files: dict[str, Path], args: Any) -> dict[str, Any]:
    workers: dict[str, Worker] = {}
    try:
        workers |= {c.name: Worker(c, args.threads) for c in contenders(files, args.new_tokens)}
        texts = prompts(args.rounds + 1)
        check_bits({n: w for n, w in workers.items() if "parse" in n}, parse_prompts(1)[0])
        check_bits({n: w for n, w in workers.items() if "parse" not in n}, texts[0])
        long = [token for text in prompts(20) for token in text][:PROMPT_TOKENS]
        turns = candidates(workers, texts, long)
        utterances = parse_prompts(args.rounds + 1)
        turns |= {f"decode {n}": decoding(w, utterances) for n, w in workers.items() if "parse" in n}
        timings = interleave({**turns, **limit_candidates()}, args.rounds)
        limits = Limits.of(timings)
        length = round(mean(map(len, texts)) + args.new_tokens / 2)
        results = [result(worker, timings, limits, length) for worker in workers.values()]
    finally:
        for worker in workers.values():
            worker.stop()
    return {**vars(limits), "results": results, "rows": row_counts(files, args.rounds)}


def parse_prompts(count: int) -> list[list[int]]:
    tokenizer = read_checkpoint(PARSE, on_demand=True).tokenizer
    assert tokenizer is not None
    lines = (locate(PARSE)[0] / "prompts.jsonl").read_text().splitlines()[:count]
    return [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]


def result(worker: Worker, timings: dict[str, Timing], limits: Limits, length: int) -> dict[str, Any]:
    name = worker.contender.name
    found: dict[str, Any] = {"name": name}
    if decode := timings.get(f"decode {name}"):
        found |= {"decode": described(decode), "tokens_per_second": 1 / decode.median}
        if worker.contender.kind == "ours" and "self-speculative" not in name:
            num_bytes = worker.call("bytes_read", length)
            fraction = num_bytes / decode.median / (limits.read_bandwidth_gb_s * 1e9)
            found |= {"bytes": num_bytes, "fraction_of_limit": fraction}
    if process := timings.get(f"process {name}"):
        found |= {"process": described(process), "prompt_tokens_per_second": PROMPT_TOKENS / process.median}
    return found


def row_counts(files: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """verify_step of six rows over one, on every instruction set that this machine is timed with."""
    found = []
    for label in ("Q4_0", "Q8_0"):
        model = load_model(files[label])
        for isa in dict.fromkeys((torch.ops.layerskip.instruction_set(), "avx2")):
            if isa not in torch.ops.layerskip.instruction_sets():
                continue
            before = torch.ops.layerskip.instruction_set()
            torch.ops.layerskip.set_instruction_set(isa)
            try:
                timed = row_candidates(model)
                timings = interleave({name: timed[name] for name in map(row_name, (1, 6))}, 3 * rounds)
            finally:
                torch.ops.layerskip.set_instruction_set(before)
            ratio = timings[row_name(6)].median / timings[row_name(1)].median
            found.append({"type": label, "instruction_set": isa, "six_over_one": ratio})
    return found


# ---- quality ----


def own_perplexity(weights: str, problems: int) -> dict[str, float]:
    model = load_model(weights=weights)
    return {"ours": perplexities(model, solution_texts(model, problems), exits=[])["exits"][-1]["perplexity"]}


def perplexity(path: Path, problems: int, threads: int) -> dict[str, float]:
    """Of HumanEval's solutions: ours, and llama.cpp's own on the same file."""
    model = load_model(path)
    texts = solution_texts(model, problems)
    _check_judged(model, *texts[0])
    ours = perplexities(model, texts, exits=[])["exits"][-1]["perplexity"]
    worker = Worker(Contender("llama.cpp", "llama.cpp", {"path": str(path)}, 0), threads)
    try:
        losses = [
            -worker.call("logprob", tokens[:i], tokens[i], LLAMA_PROBABILITIES)
            for tokens, start in tqdm(texts, desc=f"llama.cpp on {path.name}", unit="solution")
            for i in range(start, len(tokens))
        ]
    finally:
        worker.stop()
    return {"ours": ours, "llama.cpp": math.exp(mean(losses)), "tokens": len(losses)}


def _check_judged(model: Any, tokens: list[int], start: int) -> None:
    """Raise BitsDiffer unless logits judged in one pass are those of plain decoding."""
    config = GenerationConfig("autoregressive", max_new_tokens=4, eos_token_ids=(), return_logits=True)
    [plain] = generate(model, [tokens[:start]], config)
    [judged] = each_exit(model, tokens[:start] + plain.token_ids[:-1], start - 1, [model.config.num_layers])
    if not torch.equal(judged.logits, plain.logits):
        raise BitsDiffer("logits judged in one pass differ from plain decoding's")


if __name__ == "__main__":
    main()
