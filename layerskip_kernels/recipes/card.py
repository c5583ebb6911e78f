"""The card of a trained checkpoint: README.md beside its weights, every figure measured or read from the logs.

    python -m layerskip_kernels.recipes.card MODEL CONFIG.yaml [CONFIG.yaml ...] [--sources corpus/sources.json]
        [--sweep sweep.json] [--ablation NAME=parse-eval.json,sweep.json ...] [--notes notes.md]

MODEL: the folder to describe. CONFIG: the trainings it went through, in order, the last its own. The .json files are
what `layerskip sweep --json` and `layerskip parse-eval --json` wrote.
"""

import argparse
import statistics
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.engine.generation import generate
from layerskip_kernels.evaluation.facts import load_of
from layerskip_kernels.evaluation.prompts import human_eval_prompts
from layerskip_kernels.machine import usable_cores
from layerskip_kernels.model.json_file import read_json_object
from layerskip_kernels.model.json_lines import json_lines_of
from layerskip_kernels.model.loading import load_model
from layerskip_kernels.model.model import Model
from layerskip_kernels.model.tensor_names import num_parameters
from layerskip_kernels.training.config import TrainingConfig, read_config

__all__ = ["acceptance", "write_card"]

NUM_PROMPTS, NEW_TOKENS, DRAFTS = 40, 64, (4, 6)
PAUSE_SECONDS = 900  # a longer gap in the log is a training that was away


def write_card(
    folder: Path,
    config_paths: list[Path],
    sources: Path | None,
    prompts: list[str],
    sweep: Path | None = None,
    ablation: dict[str, tuple[Path, Path]] | None = None,
    notes: str = "",
) -> str:
    """Measure the model of ``folder`` on the prompts and write its README.md; returns the text.

    ``sweep``: a report to take the drafts' figures from, instead of measuring acceptance alone. ``ablation``: for each
    variant the figures of its parses and a sweep of it. ``notes``: a last section, as it is.
    """
    model = load_model(folder)
    configs = [read_config(path) for path in config_paths]
    drafts = _drafts(model, configs[-1].eval_exits, prompts) if sweep is None else _swept(_read(sweep))
    parts = [f"# {configs[-1].name}\n\n{_summary(model)}", "## Drafts\n\n" + drafts]
    if ablation:
        parts.append("## Ablation\n\n" + _ablation(ablation))
    parts.append("## Training\n\n" + "\n\n".join(map(_training, configs, config_paths)))
    if sources is not None:
        parts.append("## Data\n\n" + _data(_read(sources)))
    licence = "## Licence\n\nApache-2.0. The texts it learnt from keep their own licences."
    text = "\n\n".join([*parts, *filter(None, [notes.strip()]), licence]) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path).values


def acceptance(model: Model, prompts: list[str], exit_layer: int, drafts: int) -> dict[str, float]:
    """Over all prompts, greedy: accepted / drafted tokens, and tokens per verification."""
    config = GenerationConfig(exit_layer=exit_layer, num_speculations=drafts, max_new_tokens=NEW_TOKENS)
    found = [generate(model, [prompt], config)[0] for prompt in prompts]
    cycles, tokens = sum(g.cycles for g in found), sum(len(g.token_ids) - 1 for g in found)
    drafted = sum(g.drafted for g in found)
    return {
        "acceptance_rate": sum(g.accepted for g in found) / max(drafted, 1),
        "tokens_per_cycle": tokens / max(cycles, 1),
    }


def _summary(model: Model) -> str:
    c = model.config
    return (
        f"A Llama of {num_parameters(c) / 1e6:.1f} million parameters: {c.num_layers} layers, hidden size "
        f"{c.hidden_size}, vocabulary {c.vocab_size}, stored in {str(model.dtype).removeprefix('torch.')}. It was "
        "trained for early "
        "exit: its first layers draft what the whole model then verifies."
    )


def _drafts(model: Model, exits: list[int], prompts: list[str]) -> str:
    rows = ["| exit layer | drafts | acceptance | tokens per verification |", "|---|---|---|---|"]
    for exit_layer in tqdm(exits, desc="exits", disable=len(prompts) < 2):
        for drafts in DRAFTS:
            figures = acceptance(model, prompts, exit_layer, drafts)
            rate, tokens = figures["acceptance_rate"], figures["tokens_per_cycle"]
            rows.append(f"| {exit_layer} of {model.config.num_layers} | {drafts} | {rate:.1%} | {tokens:.2f} |")
    plain = GenerationConfig("autoregressive", max_new_tokens=NEW_TOKENS)
    distinct = [len(set(g.token_ids)) for g in generate(model, list(prompts), plain)]
    lead = f"Greedy, {len(prompts)} HumanEval prompts, at most {NEW_TOKENS} tokens each, in this package.\n\n"
    middle = statistics.median(distinct)
    tail = f"\n\nDistinct tokens among those after a prompt, median: {middle:.0f} (repetition is easy to draft)."
    return lead + "\n".join(rows) + tail


def _swept(report: dict[str, Any]) -> str:
    used = report["machine"]["settings"]
    rows = ["| exit layer | drafts | acceptance | tokens per verification | speed-up |", "|---|---|---|---|---|"]
    for r in report["results"]:
        rows.append(
            f"| {r['exit_layer']} of {used['num_layers']} | {r['num_speculations']} | {r['acceptance_rate']:.1%} | "
            f"{r['tokens_per_cycle']:.2f} | {_speedup(r)} |"
        )
    vocab = "" if used["draft_vocab"] is None else f", drafts from {used['draft_vocab']} tokens"
    lead = (
        f"`layerskip sweep`: {used['prompts']} prompts, at most {used['max_new_tokens']} tokens each{vocab}, all equal "
        f"to plain decoding's, which wrote {used['plain_tokens_per_second']:.0f} tokens/s on {_machine(report)}. "
        f"Times are medians of {used['rounds']} rounds in turn.\n\n"
    )
    return lead + "\n".join(rows)


def _speedup(result: dict[str, Any]) -> str:
    """With its slowest and fastest round; none that was doubted when it was measured."""
    if result["doubt"] is not None:
        return f"not measured ({result['doubt']})"
    return f"{result['speedup']:.2f}x ({result['speedup_low']:.2f}-{result['speedup_high']:.2f})"


def _machine(report: dict[str, Any]) -> str:
    facts = report["machine"]
    return f"{facts['cpu']}, {facts['threads']} threads ({load_of(facts)})"


def _ablation(variants: dict[str, tuple[Path, Path]]) -> str:
    """Exact match and what became of the drafts, for each variant of a training."""
    rows = [
        "| trained with | utterances | exact match | acceptance | tokens per verification | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for name, (scored, swept) in variants.items():
        scores, report = _read(scored), _read(swept)
        rows.append(
            f"| {name} | {scores['count']} | {scores['exact_match']:.1%} | {scores['acceptance_rate']:.1%} | "
            f"{scores['tokens_per_cycle']:.2f} | {_speedup(report['results'][0])} |"
        )
    result, used = report["results"][0], report["machine"]["settings"]
    lead = (
        "The same training with neither, one or both of layer dropout and the early-exit loss. `layerskip parse-eval`: "
        f"the first utterances of the test split, with drafts of exit {result['exit_layer']}, "
        f"{result['num_speculations']} at a time, of any token. `layerskip sweep`: speed-up on the first "
        f"{used['prompts']} of them, {report['machine']['threads']} thread(s), {used['rounds']} round(s), drafts of "
        f"{used['draft_vocab']} tokens.\n\n"
    )
    return lead + "\n".join(rows)


def _training(config: TrainingConfig, path: Path) -> str:
    entries = [entry for _, entry in json_lines_of(Path(config.output_dir) / "metrics.jsonl")]
    steps = max(entry["step"] for entry in entries)
    devices = dict.fromkeys(entry["device"] for entry in entries if "device" in entry) or ["an unnamed device"]
    rows = config.training.get("per_device_train_batch_size", 8) * config.training.get("gradient_accumulation_steps", 1)
    lines = [f"{config.name}: {steps} steps of {rows} rows of at most {config.data.sequence_length} tokens"]
    lines[0] += f", {_seconds(entries) / 60:.1f} minutes of wall time on {', then '.join(devices)}: "
    lines[0] += f"`layerskip train {path.name}`."
    evaluated = [entry for entry in entries if "eval_loss" in entry]
    if evaluated:
        lines.append(f"\nValidation text after step {evaluated[-1]['step']}:\n\n{_exits(evaluated[-1])}")
    lines.append(f"\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```")
    return "\n".join(lines)


def _seconds(entries: list[dict[str, Any]]) -> float:
    times = [entry["time"] for entry in entries if "time" in entry]
    gaps = [after - before for before, after in pairwise(times)]
    return sum(gap for gap in gaps if gap < PAUSE_SECONDS)


def _exits(entry: dict[str, float]) -> str:
    rows = ["| exit layer | cross-entropy, nats per token | says what the whole model says |", "|---|---|---|"]
    prefix = "eval_loss_exit_"
    for exit_layer in sorted(int(key.removeprefix(prefix)) for key in entry if key.startswith(prefix)):
        loss, agreement = entry[f"{prefix}{exit_layer}"], entry[f"eval_agreement_exit_{exit_layer}"]
        rows.append(f"| {exit_layer} | {loss:.3f} | {agreement:.1%} |")
    return "\n".join(rows)


def _data(sources: dict[str, dict[str, Any]]) -> str:
    """Distributions by licence, the largest first."""
    by_licence: dict[str, list[str]] = defaultdict(list)
    for name, fields in sorted(sources.items(), key=lambda item: -item[1]["characters"]):
        by_licence[fields["licence"]].append(f"{name} {fields['version']}")
    total = sum(fields["characters"] for fields in sources.values())
    lead = (
        f"{total / 1e6:.0f} million characters of Python from {len(sources)} distributions, as "
        "`python -m layerskip_kernels.recipes.python_corpus` takes them: whole files and single functions with "
        "docstrings, no text twice, none with a line of a HumanEval problem. By the licence in their metadata:\n\n"
    )
    return lead + "\n".join(f"- **{licence}**: {', '.join(names)}" for licence, names in by_licence.items())


def _variant(text: str) -> tuple[str, tuple[Path, Path]]:
    name, _, paths = text.partition("=")
    scored, _, swept = paths.partition(",")
    return name, (Path(scored), Path(swept))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a trained checkpoint and write its card.")
    parser.add_argument("model", type=Path)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG.yaml")
    parser.add_argument("--sources", type=Path, help="the sources.json of its corpus")
    parser.add_argument("--sweep", type=Path, metavar="SWEEP.json", help="figures of `layerskip sweep --json`")
    parser.add_argument(
        "--ablation", type=_variant, action="append", default=[], metavar="NAME=SCORES.json,SWEEP.json",
        help="a variant of the training: figures of `layerskip parse-eval --json` and of a sweep",
    )  # fmt: skip
    parser.add_argument("--notes", type=Path, metavar="NOTES.md", help="a section to add")
    args = parser.parse_args()
    torch.set_num_threads(usable_cores())
    prompts = [prompt for _, prompt in human_eval_prompts(NUM_PROMPTS)] if args.sweep is None else []
    notes = args.notes.read_text(encoding="utf-8") if args.notes else ""
    print(write_card(args.model, args.configs, args.sources, prompts, args.sweep, dict(args.ablation), notes))


if __name__ == "__main__":
    main()
