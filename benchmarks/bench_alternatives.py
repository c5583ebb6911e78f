"""Self-speculative decoding beside what else one could do, on the model that drafts well: smollm2-135m-parse.

Two models: the target, and as draft model the first layers of the same checkpoint up to its exit, which the recipe
trained to say what the whole model says. So both kinds of drafting propose much the same tokens, and what differs is
what a second model costs: its weights and its cache beside the first one's, and its own pass over every text.

Each contender decodes the utterances of the checkpoint's own prompts, as long as plain decoding's text is. All take
turns, each in its own process. ``over plain`` is over the same program's own plain decoding of the same weights.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tqdm import tqdm

from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.gguf_cache import converted_directory
from layerskip_kernels.model.gguf_write import write_gguf
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.sources import default_model_path, locate
from peer_workers import Contender, Worker
from timing import BitsDiffer, Candidate, Timing, arguments, described, finish, interleave

PARSE = "smollm2-135m-parse"
POSITIONS = 1024  # for which K and V are counted
LLAMA_CPP_DRAFTS = 3  # its own default
TEMPERATURE = 0.8
Text = tuple[list[int], int]  # a prompt, and how many tokens follow


@dataclass(frozen=True)
class Alternative:
    """A contender, the one whose plain decoding it is compared with, and what training it took."""

    contender: Contender
    plain: str
    training: str


def main() -> None:
    args = arguments(__doc__, rounds=15)
    texts = utterances(args.rounds + 1)
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        alternatives = {a.contender.name: a for a in everyone(Path(name))}
        try:
            for title, alternative in tqdm(alternatives.items(), desc="loading", unit="peer"):
                workers[title] = Worker(alternative.contender, args.threads)
                try:
                    workers[title].call("tokens", *texts[0])
                except RuntimeError as error:  # said in the result: not every peer runs everywhere
                    failed[title] = str(error)
                    workers.pop(title).stop()
            same = same_texts(workers, alternatives, texts)
            timings = interleave({n: decoding(worker, texts) for n, worker in workers.items()}, args.rounds)
            results = [result(alternatives[n], w, timings, same[n]) for n, w in workers.items()]
        finally:
            for worker in workers.values():
                worker.stop()
    facts = {name: version(name) for name in ("xllamacpp", "transformers")} | economize_version()
    shown = {"texts": len(texts), "tokens": sum(count for _, count in texts), "positions": POSITIONS}
    finish("alternatives", {**facts, **shown, "results": results, "failed": failed}, args.save)


def economize_version() -> dict[str, str]:
    try:
        return {"economize": version("economize")}
    except ImportError:
        return {}


# ---- the models and the texts ----


def utterances(count: int) -> list[Text]:
    """Prompts of the checkpoint's own task, and how long plain decoding's texts are."""
    model = load_model(PARSE, weights="16bit")
    assert model.tokenizer is not None
    lines = (locate(PARSE)[0] / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [model.tokenizer.encode(json.loads(line)["prompt"]) for line in lines[:count]]
    plain = GenerationConfig("autoregressive", max_new_tokens=96)
    return [(prompt, len(generate(model, [prompt], plain)[0].token_ids)) for prompt in prompts]


def first_layers(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The model that is a checkpoint's first layers and its head."""
    return replace(checkpoint, config=replace(checkpoint.config, num_layers=count), defaults=None)


def write_transformers(checkpoint: Checkpoint, folder: Path) -> Path:
    """A folder that Transformers reads: the default model's, with other tensors."""
    folder.mkdir()
    source = converted_directory(default_model_path())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers = checkpoint.config.num_layers
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers, "dtype": "bfloat16"}))
    kept = [name for name in checkpoint.tensors if not name.startswith("model.layers.") or _layer(name) < layers]
    save_file({name: checkpoint.tensors[name].contiguous() for name in kept}, folder / "model.safetensors")
    return folder


def _layer(name: str) -> int:
    return int(name.split(".")[2])


# ---- who takes part ----


def everyone(folder: Path) -> list[Alternative]:
    defaults = json.loads((locate(PARSE)[0] / "layerskip.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((locate(PARSE)[0] / defaults["draft_vocab"]).read_text(encoding="utf-8"))
    exit_layer, drafts = defaults["exit_layer"], defaults["num_speculations"]
    whole = read_checkpoint(PARSE)
    target = str(write_transformers(whole, folder / "target"))
    draft = str(write_transformers(first_layers(whole, exit_layer), folder / "draft"))
    files = {name: folder / f"{name}.gguf" for name in ("target", "draft")}
    write_gguf(read_checkpoint(PARSE, on_demand=True), files["target"], "q4_0")
    write_gguf(first_layers(read_checkpoint(PARSE, on_demand=True), exit_layer), files["draft"], "q4_0")
    recipe, second = "early exit", "early exit, or a draft model"
    fixed = {"exit_layer": exit_layer, "drafts": drafts, "draft_vocab": vocabulary}
    auto = {"exit_layer": "auto", "drafts": "auto", "draft_vocab": vocabulary}
    found = []
    for kind, options in (
        ("16 bit", {"dtype": "bfloat16", "source": PARSE, "weights": "16bit"}),
        ("Q4_0", {"dtype": "bfloat16", "source": str(files["target"])}),
    ):
        plain = f"ours {kind}, plain"
        found += [
            Alternative(Contender(plain, "ours", options, 0), plain, "none"),
            Alternative(Contender(f"ours {kind}, exit {exit_layer}, {drafts} drafts", "ours", {**options, **fixed}, 0),
                        plain, recipe),
            Alternative(Contender(f"ours {kind}, auto", "ours", {**options, **auto}, 0), plain, recipe),
        ]  # fmt: skip
    sampled = {"dtype": "bfloat16", "source": PARSE, "weights": "16bit", "temperature": TEMPERATURE}
    plain = f"ours 16 bit, temperature {TEMPERATURE}, plain"
    found += [
        Alternative(Contender(plain, "ours", sampled, 0), plain, "none"),
        Alternative(Contender(f"ours 16 bit, temperature {TEMPERATURE}, exit {exit_layer}, {drafts} drafts", "ours",
                              {**sampled, **fixed}, 0), plain, recipe),
    ]  # fmt: skip
    plain, hf = "Transformers bf16, plain", {"directory": target, "dtype": "bfloat16"}
    exits = {"exit_layer": exit_layer, "drafts": drafts}
    found += [
        Alternative(Contender(plain, "transformers", hf, 0), plain, "none"),
        Alternative(Contender("Transformers bf16, assistant_early_exit", "transformers", {**hf, **exits}, 0), plain,
                    recipe),
        Alternative(Contender("Transformers bf16, assistant_model", "transformers",
                              {**hf, "assistant": draft, "drafts": drafts}, 0), plain, second),
        Alternative(Contender("economize bf16, early_exit", "economize", {**hf, **exits}, 0), plain, recipe),
    ]  # fmt: skip
    plain, cpp = "llama.cpp Q4_0, plain", {"path": str(files["target"])}
    found += [Alternative(Contender(plain, "llama.cpp", cpp, 0), plain, "none")]
    found += [
        Alternative(Contender(f"llama.cpp Q4_0, draft model, {count} drafts", "llama.cpp",
                              {**cpp, "draft": str(files["draft"]), "drafts": count}, 0), plain, second)
        for count in (LLAMA_CPP_DRAFTS, drafts)
    ]  # fmt: skip
    return found


# ---- what is compared and timed ----


def same_texts(workers: dict[str, Worker], alternatives: dict[str, Alternative], texts: list[Text]) -> dict[str, int]:
    """On how many texts each contender says what its own plain decoding says. Raises BitsDiffer where ours do not."""
    said = {name: [w.call("tokens", *text) for text in texts] for name, w in tqdm(workers.items(), desc="texts")}
    same = {}
    for name in workers:
        plain = said[alternatives[name].plain]
        same[name] = sum(a == b for a, b in zip(said[name], plain, strict=True))
        if alternatives[name].contender.kind == "ours" and same[name] < len(texts):
            raise BitsDiffer(f"{name}: {len(texts) - same[name]} texts differ from plain decoding's")
    return same


def decoding(worker: Worker, texts: list[Text]) -> Candidate:
    """Another text in each round, the same one for all."""
    turns = cycle(texts)
    return Candidate(worker.call, prepare=lambda: ("decode", *next(turns)), seconds=float)


def result(alternative: Alternative, worker: Worker, timings: dict[str, Timing], same: int) -> dict[str, Any]:
    name = alternative.contender.name
    weights, position = worker.call("memory")
    return {
        "name": name,
        "decode": described(timings[name]),
        "tokens_per_second": 1 / timings[name].median,
        "over_plain": timings[alternative.plain].median / timings[name].median,
        "weights_mb": weights / 1e6,
        "kv_mb": position * POSITIONS / 1e6,
        "training": alternative.training,
        "same_texts": same,
    }


if __name__ == "__main__":
    main()
