"""What is to be reached, as rows of one table: ours, the peer's and the limit's figures from the same run.

Where instruction sets are asked for different figures, there is a row for each: what the machine's own gave, and on a
machine with AVX-512 also what AVX2 gave, whose results have a name of their own (timing.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Results = dict[str, dict[str, Any]]
OURS, OURS_EARLY_EXIT = "layerskip_kernels bf16", "layerskip_kernels early exit"


@dataclass(frozen=True)
class Row:
    """A target and what came of it. ``value`` is what is compared with ``bound``; None: this run did not measure it."""

    what: str
    bound: float
    value: float | None
    at_least: bool = True
    unit: str = "x"
    ours: str = ""
    peer: str = ""
    limit: str = ""

    @property
    def target(self) -> str:
        return f"{'>=' if self.at_least else '<='} {shown(self.bound, self.unit)}"

    @property
    def reached(self) -> str:
        return "not measured" if self.value is None else shown(self.value, self.unit)

    @property
    def met(self) -> str:
        if self.value is None:
            return "-"
        return "yes" if (self.value >= self.bound if self.at_least else self.value <= self.bound) else "NO"


def shown(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "%" else f"{value:.2f}{unit}"


def rows(results: Results) -> list[Row]:
    """All rows; those whose result is not there say that they were not measured."""
    return [row(results) for row in ROWS]


AVX512, AVX2 = "AVX-512", "AVX2"
OF_AVX2 = ("avx2", "avx_vnni")


def measured_on(results: Results, name: str, isa: str) -> dict[str, Any]:
    """The result that was made with kernels for ``isa``; empty where there is none."""
    own = results.get(name, {})
    kernels = own["machine"]["instruction_set"] if own else ""
    if isa == AVX512:
        return own if kernels.startswith("avx512") else {}
    return own if kernels in OF_AVX2 else results.get(f"{name}_avx2", {})


# ---- beside others ----


def contender(results: Results, name: str) -> dict[str, Any]:
    found = results.get("peers", {}).get("results", [])
    return next((result for result in found if result["name"] == name), {})


def over(what: str, bound: float, ours: str, peers: tuple[str, ...], key: str = "tokens_per_second",
         limit: Callable[[Results], float | None] = lambda _: None) -> Callable[[Results], Row]:  # fmt: skip
    """Our tokens per second over the best of some peers'."""

    def row(results: Results) -> Row:
        mine = contender(results, ours).get(key)
        theirs = {name: contender(results, name)[key] for name in peers if key in contender(results, name)}
        if mine is None or not theirs:
            return Row(what, bound, None)
        best = max(theirs, key=lambda name: theirs[name])
        most = limit(results)
        return Row(what, bound, mine / theirs[best], ours=f"{mine:.1f} tokens/s", peer=f"{best}: {theirs[best]:.1f}",
                   limit=f"{most:.1f} tokens/s" if most else "")  # fmt: skip

    return row


def decoding_limit(name: str) -> Callable[[Results], float | None]:
    """Tokens per second where weights and KV were read at the measured bandwidth."""

    def limit(results: Results) -> float | None:
        num_bytes = contender(results, name).get("bytes")
        return results["peers"]["read_bandwidth_gb_s"] * 1e9 / num_bytes if num_bytes else None

    return limit


def prompt_limit(results: Results) -> float:
    """Tokens per second where all products and sums ran at the measured peak."""
    peers = results["peers"]
    return peers["prompt_tokens"] * peak(peers) * 1e9 / peers["prompt_flop"]


def peak(limits: dict[str, Any]) -> float:
    """GFLOP/s that products of bf16 numbers and their sums may take."""
    return max(limits["fma_peak_gflop_s"], limits.get("bf16_peak_gflop_s") or 0.0)


def ours_on(results: Results, isa: str) -> str:
    """Who of the contenders we are with kernels for ``isa``; none, where nobody is."""
    kernels = results["peers"]["machine"]["instruction_set"] if "peers" in results else ""
    if isa == AVX512:
        return OURS if kernels.startswith("avx512") else ""
    return OURS if kernels in OF_AVX2 else f"{OURS} on AVX2"


def bandwidth(isa: str) -> Callable[[Results], Row]:
    def row(results: Results) -> Row:
        what = f"autoregressive bf16, {isa}: bytes read per second over the read bandwidth (this or the next)"
        mine = contender(results, ours_on(results, isa))
        if "bytes" not in mine:
            return Row(what, 0.92, None, unit="")
        gb_s = mine["bytes"] * mine["tokens_per_second"] / 1e9
        limit = f"{results['peers']['read_bandwidth_gb_s']:.1f} GB/s"
        return Row(what, 0.92, mine["fraction_of_limit"], unit="", ours=f"{gb_s:.1f} GB/s", limit=limit)

    return row


def over_llama_cpp(isa: str, bound: float) -> Callable[[Results], Row]:
    def row(results: Results) -> Row:
        mine = ours_on(results, isa)
        what = f"autoregressive bf16, {isa}, over llama.cpp BF16"
        return over(what, bound, mine, ("llama.cpp BF16",), limit=decoding_limit(mine))(results)

    return row


# ---- our own steps ----


def verify_rows(num_rows: int, isa: str, bound: float) -> Callable[[Results], Row]:
    def row(results: Results) -> Row:
        what = f"verify_step of {num_rows} rows over 1 row, {isa}"
        steps = measured_on(results, "steps", isa)
        timed = {result["rows"]: result for result in steps.get("rows", [])}
        if num_rows not in timed:
            return Row(what, bound, None, at_least=False)
        most = rows_limit(steps, num_rows) / rows_limit(steps, 1)
        ours = f"{timed[num_rows]['median_s'] * 1e3:.1f} and {timed[1]['median_s'] * 1e3:.1f} ms"
        return Row(what, bound, timed[num_rows]["over_1_row"], False, ours=ours, limit=shown(most, "x"))

    return row


def rows_limit(steps: dict[str, Any], num_rows: int) -> float:
    """Seconds a step takes at least: its bytes at the bandwidth, or its products and sums at the peak.

    A bf16 weight, 2 bytes, takes a product and a sum per row: as many operations as bytes.
    """
    num_bytes = next(row["bytes"] for row in steps["rows"] if row["rows"] == num_rows)
    return max(num_bytes / steps["read_bandwidth_gb_s"], num_rows * num_bytes / peak(steps)) / 1e9


def overhead(results: Results) -> Row:
    what = "Python and dispatch, of a decode step"
    found = results.get("steps", {}).get("overhead")
    if not found:
        return Row(what, 0.02, None, False, "%")
    return Row(what, 0.02, found["fraction_of_step"], False, "%", ours=f"{found['outside_s'] * 1e3:.3f} ms")


def order(isa: str) -> Callable[[Results], Row]:
    """The dearest of all numbers of rows."""

    def row(results: Results) -> Row:
        what = f"a step's products in the contract's order over a free one, up to 16 rows, {isa}"
        found = measured_on(results, "order", isa)
        if not found:
            return Row(what, 1.05, None, at_least=False)
        worst = max(found["results"], key=lambda result: result["over_free"])
        times = [worst[name]["median_s"] * 1e3 for name in ("fixed", "free")]
        ours, free = f"worst: {worst['rows']} rows, {times[0]:.2f} ms", f"{times[1]:.2f} ms"
        return Row(what, 1.05, worst["over_free"], False, ours=ours, limit=free)

    return row


def memory(results: Results) -> Row:
    what = "peak memory over weights + cache + `import torch`"
    found = next((row for row in results.get("memory", {}).get("results", []) if row["weights"] == "16bit"), None)
    if not found:
        return Row(what, 1.15, None, at_least=False)
    needed = found["peak_bytes"] / found["over_needed"]
    ours, limit = f"{found['peak_bytes'] / 1e6:.0f} MB", f"{needed / 1e6:.0f} MB"
    return Row(what, 1.15, found["over_needed"], False, ours=ours, limit=limit)


def context(isa: str, bound: float) -> Callable[[Results], Row]:
    def row(results: Results) -> Row:
        what = f"growth at 4,096 positions, {isa}: KV bytes per second more, over the read bandwidth"
        steps = measured_on(results, "steps", isa)
        found = next((row for row in steps.get("contexts", []) if row["context"] == 4096), None)
        if not found:
            return Row(what, bound, None, unit="")
        fraction, limit = found["kv_fraction_of_limit"], steps["read_bandwidth_gb_s"]
        return Row(what, bound, fraction, unit="", ours=f"{fraction * limit:.1f} GB/s", limit=f"{limit:.1f} GB/s")

    return row


def beside_busy(kind: str, peer: bool, bound: float) -> Callable[[Results], Row]:
    """All threads beside a busy process for each core, over one thread of ours or the peer's all."""

    def row(results: Results) -> Row:
        others = "llama.cpp" if peer else "one thread"
        what = f"beside a busy process for each core, {kind}: all threads over {others}"
        found = {r["name"]: r["tokens_per_second_busy"] for r in results.get("contended", {}).get("busy", [])}
        ours = [name for name in found if name.startswith(f"ours {kind}")]
        theirs = [name for name in found if name.startswith(f"llama.cpp {kind}")] if peer else ours[:1]
        if not ours or not theirs:
            return Row(what, bound, None)
        mine, other = found[ours[-1]], found[theirs[0]]
        return Row(what, bound, mine / other, ours=f"{mine:.1f} tokens/s", peer=f"{other:.1f} tokens/s")

    return row


def one_core(results: Results) -> Row:
    what = "on one core, threads left at their default over one thread"
    found = results.get("contended", {}).get("one_core")
    return Row(what, 0.95, found and found["default"]["over_1_thread"])


def cycles(model: str, isa: str) -> Callable[[Results], Row]:
    """The worst of all exits and draft lengths; the acceptance rate cancels out."""

    def row(results: Results) -> Row:
        what = f"cycle of {model} over its ceiling with the head counted in, {isa}"
        found = next((m for m in measured_on(results, "cycle", isa).get("models", []) if m["model"] == model), None)
        if not found:
            return Row(what, 0.9, None, unit="")
        worst = min(found["results"], key=of_ceiling)
        ours = f"worst: exit {worst['exit_layer']}, {worst['num_speculations']} drafts"
        limit = "" if found["quantised"] else f"{most_of_ceiling(found, worst):.2f}"
        return Row(what, 0.9, of_ceiling(worst), unit="", ours=ours, limit=limit)

    return row


def most_of_ceiling(model: dict[str, Any], setting: dict[str, Any]) -> float:
    """What a cycle can reach of its ceiling, which counts bytes alone: many rows' products and sums may take longer.

    A bf16 weight, 2 bytes, takes a product and a sum for each row.
    """
    exit_layer, drafts = (setting[key] for key in ("exit_layer", "num_speculations"))
    head = model["head_in_layers"]
    drafting, verifying = drafts * (exit_layer + head), model["num_layers"] + head
    over_bytes = max(1.0, (drafts + 1) * model["read_bandwidth_gb_s"] / peak(model))
    return (drafting + verifying) / (drafting + verifying * over_bytes)


def of_ceiling(setting: dict[str, Any]) -> float:
    some = setting["speed_ups"][0]
    return some["speed_up"] / some["ceiling_with_head"]


# ---- the engine ----


def together(results: Results) -> Row:
    what = "8 requests at once over one: tokens per second of decoding"
    found = results.get("engine", {}).get("together")
    if not found:
        return Row(what, 3, None)
    many, one = (found["decoding"][name]["tokens_per_second"] for name in ("together", "alone"))
    return Row(what, 3, found["over_one"], ours=f"{many:.1f} and {one:.1f} tokens/s")


def drafts(results: Results) -> Row:
    """The slowest of all batches and exits."""
    what = "drafts by measured costs where they don't pay: time over plain decoding"
    found = [(batch["batch"], r) for batch in results.get("engine", {}).get("drafts", []) for r in batch["results"]]
    if not found:
        return Row(what, 1.05, None, at_least=False)
    batch, worst = max(found, key=lambda pair: pair[1]["time_over_plain"])
    return Row(what, 1.05, worst["time_over_plain"], False, ours=f"worst: batch {batch}, {worst['name']}")


def serving(what: str, key: str, bound: float) -> Callable[[Results], Row]:
    """A ratio of tokens per second over HTTP."""

    def row(results: Results) -> Row:
        found = results.get("serving")
        if not found:
            return Row(what, bound, None)
        rates = {r["name"]: f"{r['tokens_per_second']:.1f} tokens/s" for r in found["results"]}
        peer = rates["llama.cpp server BF16"] if key == "http_over_llama_cpp" else rates["engine"]
        return Row(what, bound, found[key], ours=rates["layerskip serve"], peer=peer)

    return row


def second_turn(results: Results) -> Row:
    what = "time to first token of a second turn over the first's, 1,000 tokens of history"
    found = results.get("serving", {}).get("second_turn")
    if not found:
        return Row(what, 0.2, None, at_least=False)
    ours = f"{found['second_turn_s'] * 1e3:.0f} and {found['first_turn_s'] * 1e3:.0f} ms"
    return Row(what, 0.2, found["over_first"], False, ours=ours)


TRANSFORMERS = ("Transformers bf16", "Transformers fp32")
EARLY_EXIT = ("Transformers bf16, early exit", "Transformers fp32, early exit")
INSTRUCTION_SETS = (AVX512, AVX2)
ROWS: list[Callable[[Results], Row]] = [
    bandwidth(AVX512),
    over_llama_cpp(AVX512, 1.3),
    bandwidth(AVX2),
    over_llama_cpp(AVX2, 1.5),
    over("autoregressive bf16 over Transformers", 5, OURS, TRANSFORMERS, limit=decoding_limit(OURS)),
    over("self-speculative over Transformers assistant_early_exit", 20, OURS_EARLY_EXIT, EARLY_EXIT,
         limit=decoding_limit(OURS_EARLY_EXIT)),
    over("prompt of 512 tokens over llama.cpp BF16", 2.5, OURS, ("llama.cpp BF16",), "prompt_tokens_per_second",
         prompt_limit),
    verify_rows(6, AVX512, 1.2),
    verify_rows(12, AVX512, 1.7),
    verify_rows(6, AVX2, 1.35),
    verify_rows(12, AVX2, 2.6),
    *map(order, INSTRUCTION_SETS),
    overhead,
    memory,
    context(AVX512, 0.7),
    context(AVX2, 0.6),
    beside_busy("BF16", False, 1.0),
    beside_busy("BF16", True, 3.0),
    one_core,
    over("autoregressive int8 over llama.cpp Q8_0", 1.3, "layerskip_kernels int8", ("llama.cpp Q8_0",),
         limit=decoding_limit("layerskip_kernels int8")),
    *(cycles(model, isa) for isa in INSTRUCTION_SETS for model in ("SmolLM2-135M", "Llama-3.2-1B")),
    together,
    drafts,
    serving("8 streams over HTTP over the engine alone", "http_over_engine", 0.95),
    serving("8 streams over HTTP over llama.cpp's server, BF16", "http_over_llama_cpp", 1.5),
    second_turn,
]  # fmt: skip
