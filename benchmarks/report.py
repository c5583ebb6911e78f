"""The results of `make bench` as tables: printed, and written into docs/performance.md between its markers.

Reads benchmarks/results/*.json. The last line of stdout is the table of targets as JSON.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from targets import Results, Row, of_ceiling, rows

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
SECTION = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="a folder (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where performance.md lies (default: %(default)s)")
    args = parser.parse_args()
    results = read(args.results)
    write(args.docs, results)
    print(as_text(rows(results)))
    print(json.dumps([described(row) for row in rows(results)]))


def read(folder: Path) -> Results:
    """All results by name. Raises ValueError where there are none, and where they are of several machines."""
    results = {path.stem: json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))}
    if not results:
        raise ValueError(f"{folder} holds no results; run `make bench`")
    machines = {(r["machine"]["cpu"], r["machine"]["threads"]) for r in results.values()}
    if len(machines) > 1:
        raise ValueError(f"{folder} holds results of several machines, {sorted(machines)}; run `make bench` anew")
    return results


def described(row: Row) -> dict[str, Any]:
    return {"target": f"{row.what} {row.target}", "reached": row.value, "met": {"yes": True, "NO": False}.get(row.met)}


def as_text(table: list[Row]) -> str:
    titles = ("target", "", "reached", "ours", "peer", "limit", "met")
    lines = [titles, *((r.what, r.target, r.reached, r.ours, r.peer, r.limit, r.met) for r in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def write(docs: Path, results: Results) -> None:
    """Replace what stands between the markers of performance.md, and draw its plots."""
    from plots import draw

    path = docs / "performance.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(filled(text, results), encoding="utf-8")
    draw(docs, results)


def filled(text: str, results: Results) -> str:
    """The page with its generated sections from these results; one whose results are missing stays as it is."""

    def section(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in SECTIONS:
            raise ValueError(f"performance.md has an unknown section {name!r}; known: {', '.join(SECTIONS)}")
        needs, make = SECTIONS[name]
        return f"{begin}{make(results)}\n{end}" if needs in results or not needs else match[0]

    return SECTION.sub(section, text)


# ---- the sections ----


def table(titles: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(titles), *lines])


def ms(timing: dict[str, float]) -> str:
    return f"{timing['median_s'] * 1e3:.2f}"


def with_spread(timing: dict[str, float]) -> str:
    return f"{timing['median_s'] * 1e3:.2f} ({timing['iqr_s'] * 1e3:.2f})"


def machine(results: Results) -> str:
    some = next(iter(results.values()))["machine"]
    dates = sorted(result["date"] for result in results.values())
    bandwidths = [r["read_bandwidth_gb_s"] for r in results.values() if "read_bandwidth_gb_s" in r]
    peaks = [r["fma_peak_gflop_s"] for r in results.values() if "fma_peak_gflop_s" in r]
    pairs = [r["bf16_peak_gflop_s"] for r in results.values() if r.get("bf16_peak_gflop_s")]
    of_pairs = f", bf16 peak {span(pairs)} GFLOP/s" if pairs else ""
    versions = ", ".join(f"{name} {number}" for name, number in some["versions"].items())
    xllamacpp = results.get("peers", {}).get("xllamacpp")
    lines = [
        f"- {some['cpu']}, {some['cores']} cores, {some['threads']} threads, {some['instruction_set']}, "
        f"{(some['last_level_cache_bytes'] or 0) >> 20} MiB of last-level cache",
        f"- Python {some['python']}, {versions}" + (f", xllamacpp {xllamacpp}" if xllamacpp else ""),
        f"- read bandwidth {span(bandwidths)} GB/s, fp32 peak {span(peaks)} GFLOP/s{of_pairs}, "
        "over the parts of the run",
        f"- from {dates[0]} to {dates[-1]} (UTC)",
    ]
    return "\n".join(lines)


def span(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}" if values else "?"


def targets(results: Results) -> str:
    titles = ["target", "at", "reached", "ours", "peer", "limit", "met"]
    return table(titles, [[r.what, r.target, r.reached, r.ours, r.peer, r.limit, r.met] for r in rows(results)])


def peers(results: Results) -> str:
    found = results["peers"]
    lines = []
    for r in found["results"]:
        a = r["agreement"]
        prompt = f"{r['prompt_tokens_per_second']:.0f}" if "process" in r else ""
        speed = f"{r['tokens_per_second']:.1f}" if "decode" in r else ""
        gap = f"{max(a['gaps']):.3f}" if a["gaps"] else ""
        decode = with_spread(r["decode"]) if "decode" in r else ""
        lines.append([r["name"], speed, decode, prompt, f"{a['first_tokens_equal']} of {a['tokens']}", gap])
    titles = ["", "tokens/s", "ms per token (IQR)", "prompt, tokens/s", "tokens until it parts from our fp32", "gap"]
    return table(titles, lines) + f"\n\nllama.cpp says of itself: `{found['llama_cpp'].strip(' |')}`"


def row_counts(found: dict[str, Any]) -> str:
    lines = [[str(r["rows"]), with_spread(r), f"{r['over_1_row']:.2f}"] for r in found["rows"]]
    return table(["rows", "ms (IQR)", "over 1 row"], lines)


def contexts(found: dict[str, Any]) -> str:
    lines = [
        [str(r["context"]), with_spread(r), f"{r['bytes'] / 1e6:.0f}",
         f"{r['kv_fraction_of_limit']:.2f}" if r["kv_fraction_of_limit"] else ""]
        for r in found["contexts"]
    ]  # fmt: skip
    return table(["positions", "ms (IQR)", "MB read", "bytes more per second more, of bandwidth"], lines)


def long(results: Results) -> str:
    found = results["long"]
    lines = []
    for r in found["contexts"]:
        some = r["kv_fraction_of_limit"] is not None
        growth = [f"{r['kv_fraction_of_limit']:.2f}", f"{r['kv_growth_over_1_row']:.2f}"] if some else ["", ""]
        lines.append([str(r["context"]), with_spread(r), f"{r['rows_s'] * 1e3:.2f}", *growth])
    steps = table(["positions", "ms (IQR)", "6 rows, ms", "growth of 1 row, of bandwidth", "of 6 rows over 1"], lines)
    lines = [
        [
            str(r["tokens"]),
            f"{r['tokens_per_second']:.0f}",
            f"{r['cache_bytes'] / 1e6:.0f}",
            f"{r['rest_bytes'] / 1e6:.0f}",
        ]
        for r in found["prompts"]
    ]
    heads = ["tokens of a prompt", "tokens/s", "MB of K and V", "MB beside weights, K and V, `import torch`"]
    return f"{steps}\n\n{table(heads, lines)}"


def contended(results: Results) -> str:
    found = results["contended"]
    lines = [
        [r["name"], *(f"{r[key]:.1f}" for key in ("tokens_per_second_alone", "tokens_per_second_busy"))]
        for r in found["busy"]
    ]
    busy = table(["", "tokens/s alone", "beside a busy process for each core"], lines)
    lines = [[name, with_spread(r), f"{r['over_1_thread']:.2f}x"] for name, r in found["one_core"].items()]
    return f"{busy}\n\n{table(['one core', 'ms per token (IQR)', 'over 1 thread'], lines)}"


def order(found: dict[str, Any]) -> str:
    lines = [
        [str(r["rows"]), with_spread(r["fixed"]), with_spread(r["free"]), f"{r['over_free']:.2f}"]
        for r in found["results"]
    ]
    return table(["rows", "the contract's order, ms (IQR)", "a free one", "over it"], lines)


def cycles(found: dict[str, Any]) -> str:
    tables = []
    for model in found["models"]:
        rates = [s["acceptance_rate"] for s in model["results"][0]["speed_ups"]]
        lines = []
        for r in model["results"]:
            speed_ups = [f"{s['speed_up']:.2f} of {s['ceiling_with_head']:.2f}" for s in r["speed_ups"]]
            lines.append([str(r["exit_layer"]), str(r["num_speculations"]), ms(r["draft_step"]), ms(r["verify_step"]),
                          *speed_ups, f"{of_ceiling(r):.2f}"])  # fmt: skip
        titles = ["exit", "drafts", "draft ms", "verify ms", *(f"a = {rate:g}" for rate in rates), "of the ceiling"]
        head = f"{model['model']}: a plain step takes {ms(model['plain'])} ms; the head is worth "
        tables.append(f"{head}{model['head_in_layers']:.1f} of {model['num_layers']} layers.\n\n{table(titles, lines)}")
    return "\n\n".join(tables)


def generation(results: Results) -> str:
    lines = []
    for r in results["generate"]["results"]:
        rate = "" if r["acceptance_rate"] is None else f"{r['acceptance_rate']:.1%}"
        lines.append([r["name"], f"{r['tokens_per_second']:.1f}", rate, f"{r['ratio_to_plain']:.2f}x"])
    return table(["", "tokens/s", "accepted", "over plain"], lines)


def serving(results: Results) -> str:
    found = results["serving"]
    lines = [[r["name"], f"{r['tokens_per_second']:.1f}", with_spread(r)] for r in found["results"]]
    streams = table([f"{found['streams']} streams", "tokens/s", "ms until all have ended (IQR)"], lines)
    turns = found["second_turn"]
    first, second = (f"{turns[key] * 1e3:.0f} ms" for key in ("first_turn_s", "second_turn_s"))
    return (
        f"{streams}\n\nThe first token after {turns['history']:,} tokens: {first}; of the second turn: {second}, "
        f"{turns['over_first']:.2f} of it."
    )


def policies(results: Results) -> str:
    found = results["policies"]["models"]
    parts = []
    for model, result in found.items():
        lines = [
            [p["policy"], f"{p['over_plain']:.2f}x", f"{p['share_of_oracle']:.0%}"]
            for p in sorted(result["policies"], key=lambda p: p["over_plain"])
        ]
        parts.append(table([f"{model}, {result['tokens']} tokens", "over plain", "of the oracle"], lines))
    return "\n\n".join(parts)


def alternatives(results: Results) -> str:
    found = results["alternatives"]
    lines = []
    for r in found["results"]:
        memory = f"{r['weights_mb']:.0f} + {r['kv_mb']:.1f}"
        same = f"{r['same_texts']} of {found['texts']}"
        rate = f"{r['tokens_per_second']:.1f}"
        lines.append([r["name"], rate, f"{r['over_plain']:.2f}x", memory, r["training"], same])
    heads = ["", "tokens/s", "over plain", f"MB: weights + K and V of {found['positions']} positions", "training"]
    shown = table([*heads, "the text of its plain decoding"], lines)
    failed = "".join(f"\n\n{name} did not run: {why}" for name, why in found["failed"].items())
    return shown + failed


def engine(results: Results) -> str:
    found = results["engine"]
    together, lines = found["together"], []
    for what, over in (("decoding", "over_one"), ("with_prompts", "over_one_with_prompts")):
        rates = [f"{together[what][name]['tokens_per_second']:.1f}" for name in ("alone", "together")]
        lines.append([what.replace("_", " "), *rates, f"{together[over]:.2f}x"])
    many = table(["tokens/s", "1 request", f"{together['requests']} requests", "over one"], lines)
    lines = []
    for batch in found["drafts"]:
        plain, *rest = f"{batch['plain']['tokens_per_second']:.1f}", *batch["results"]
        cells = [f"{r['time_over_plain']:.3f} ({r['accepted']} of {r['drafted']})" for r in rest]
        lines.append([str(batch["batch"]), plain, *cells])
    exits = [f"{r['name']}: time over plain (drafts accepted)" for r in found["drafts"][0]["results"]]
    alone = table(["requests", "plain, tokens/s", *exits], lines)
    if "mix" not in found:
        return f"{many}\n\n{alone}"
    lines = [
        [
            r["name"],
            f"{r['tokens_per_second']:.1f}",
            f"{1 / r['time_over_plain']:.2f}x",
            f"{r['accepted']} of {r['drafted']}",
        ]
        for r in found["mix"]["results"]
    ]
    mix = table([f"{found['mix']['requests']} requests of two kinds", "tokens/s", "over plain", "accepted"], lines)
    return f"{many}\n\n{alone}\n\n{mix}"


def draft_vocab(results: Results) -> str:
    found = results["draft_vocab"]
    exits = list(found["results"][0]["acceptance"])
    lines = []
    for r in sorted(found["results"], key=lambda r: r["size"]):
        accepted = [f"{r['acceptance'][e]:.1%}" for e in exits]
        lines.append([f"{r['size']}", with_spread(r["draft_step"]), f"{r['over_full']:.2f}", f"{r['coverage']:.1%}",
                      *accepted])  # fmt: skip
    titles = ["tokens in the list", f"{found['num_speculations']} drafts, ms (IQR)", "over all tokens", "coverage",
              *(f"accepted, exit {e}" for e in exits)]  # fmt: skip
    return f"Counted from {found['corpus']}.\n\n{table(titles, lines)}"


def quantised(results: Results) -> str:
    """The same files beside llama.cpp: speed, rows, perplexity; and quantisation beside early exit."""
    found = results["quantised"]
    by_name = {r["name"]: r for r in found["results"]}
    speed = []
    for label in ("Q4_0", "Q4_K_M", "Q8_0", "1B"):
        peer = by_name[f"llama.cpp {label}"]
        for name in (f"ours {label}", f"ours {label} on AVX2"):
            if name in by_name:
                speed.append(_beside_llama_cpp(name, by_name[name], peer))
    titles = ["file", "tokens/s", "over llama.cpp", "of bandwidth", "prompt tokens/s", "over llama.cpp"]
    rows = [[r["type"], r["instruction_set"], f"{r['six_over_one']:.2f}"] for r in found["rows"]]
    quality = [
        [name, *(f"{judged[who]:.4f}" if who in judged else "" for who in ("ours", "llama.cpp"))]
        for name, judged in found["perplexity"].items()
    ]
    kinds = (
        "ours parse in 16 bits",
        "ours parse",
        "ours parse in 16 bits, self-speculative",
        "ours parse, self-speculative",
        "llama.cpp parse",
    )
    times = {name: by_name[name]["tokens_per_second"] for name in kinds}
    both = [[name, f"{times[name]:.1f}", f"{times[name] / times[kinds[0]]:.2f}"] for name in kinds]
    parts = [
        f"Read bandwidth {found['read_bandwidth_gb_s']:.1f} GB/s. 1B: a Llama-3.2-1B of random numbers, Q4_K_M.",
        table(titles, speed),
        table(["file", "instruction set", "verify_step of 6 rows over 1 row"], rows),
        f"Perplexity of {found['problems']} HumanEval solutions, on the same file:",
        table(["weights", "ours", "llama.cpp"], quality),
        "Quantisation beside early exit, `smollm2-135m-parse` in 16 bits and as Q4_0 (exit layer, drafts and draft "
        "vocabulary are the model's own):",
        table(["", "tokens/s", "over plain in 16 bits"], both),
    ]
    return "\n\n".join(parts)


def _beside_llama_cpp(name: str, ours: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    cells = [name.removeprefix("ours "), f"{ours['tokens_per_second']:.1f}"]
    cells += [f"{ours['tokens_per_second'] / peer['tokens_per_second']:.2f}", f"{ours['fraction_of_limit']:.2f}"]
    if "prompt_tokens_per_second" not in ours:
        return [*cells, "", ""]
    prompt = ours["prompt_tokens_per_second"]
    return [*cells, f"{prompt:.0f}", f"{prompt / peer['prompt_tokens_per_second']:.2f}"]


def int8(results: Results) -> str:
    found = results["perplexity"]
    lines = []
    for name, value in found["perplexity"].items():
        distance = found["from_fp32"][name]
        lines.append([name, f"{value:.4f}", f"{distance['kl']:.1e}", f"{distance['agreement']:.3f}"])
    text = f"{found['problems']} HumanEval solutions, {found['tokens']} tokens; against fp32 on the same weights:\n\n"
    return text + table(["weights", "perplexity", "KL to fp32", "first choices that agree"], lines)


def memory(results: Results) -> str:
    names = ["peak_bytes", "weight_bytes", "cache_bytes", "import_torch_bytes"]
    lines = [
        [r["weights"], *(f"{r[name] / 1e6:.0f}" for name in names), f"{r['over_needed']:.2f}"]
        for r in results["memory"]["results"]
    ]
    return table(["weights", "peak, MB", "weights", "cache", "import torch", "peak over the sum"], lines)


def ops(results: Results) -> str:
    cases: dict[tuple[str, str, Any], dict[int, Any]] = {}
    for r in results["ops"]["results"]:
        cases.setdefault((r["shape"], r["name"], r.get("context", "")), {})[r["rows"]] = r
    counts = sorted({count for case in cases.values() for count in case})
    lines = []
    for (shape, name, context), case in sorted(cases.items(), key=lambda item: tuple(map(str, item[0]))):
        cells = [f"{r['median_s'] * 1e6:.0f} ({r['fraction_of_limit']:.0%})" for r in map(case.get, counts) if r]
        lines.append([shape, name, str(context), *cells])
    return table(["shape", "op", "context", *(f"{n} rows, us (of bandwidth)" for n in counts)], lines)


def commands(results: Results) -> str:
    return "\n".join(f"    {result['command']}" for result in results.values())


def of(name: str, make: Callable[[dict[str, Any]], str]) -> tuple[str, Callable[[Results], str]]:
    """A section that is made of one result."""
    return name, lambda results: make(results[name])


# Each section with the result that it needs.
SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "machine": ("", machine),
    "targets": ("", targets),
    "peers": ("peers", peers),
    "rows": of("steps", row_counts),
    "contexts": of("steps", contexts),
    "order": of("order", order),
    "rows_avx2": of("steps_avx2", row_counts),
    "contexts_avx2": of("steps_avx2", contexts),
    "order_avx2": of("order_avx2", order),
    "cycles_avx2": of("cycle_avx2", cycles),
    "long": ("long", long),
    "contended": ("contended", contended),
    "cycles": of("cycle", cycles),
    "generation": ("generate", generation),
    "engine": ("engine", engine),
    "serving": ("serving", serving),
    "policies": ("policies", policies),
    "alternatives": ("alternatives", alternatives),
    "draft_vocab": ("draft_vocab", draft_vocab),
    "quantised": ("quantised", quantised),
    "int8": ("perplexity", int8),
    "memory": ("memory", memory),
    "ops": ("ops", ops),
    "commands": ("", commands),
}


if __name__ == "__main__":
    main()
