"""The timer, `layerskip bench`, the report of `make bench`, and threads beyond the cores."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from layerskip_kernels import machine
from layerskip_kernels.cli.main import main
from layerskip_kernels.evaluation import step_bench
from layerskip_kernels.evaluation.equality import BitsDiffer
from layerskip_kernels.evaluation.facts import machine_facts
from layerskip_kernels.evaluation.limits import FMA, READ
from layerskip_kernels.evaluation.step_bytes import ceiling, draft_bytes, head_bytes, layer_bytes, verify_bytes
from layerskip_kernels.evaluation.timing import Candidate, Timing, interleave, num_copies, rotating
from support.exit_adapters import random_adapter
from support.models import tiny_model

ROOT = Path(__file__).parents[2]
KEYS = {"machine", "read_bandwidth_gb_s", "fma_peak_gflop_s", "doubt", "results"}
RESULT_KEYS = {
    "name", "median_s", "iqr_s", "tokens_per_second", "bytes", "fraction_of_limit", "ratio_to_baseline",
}  # fmt: skip


# ---- the timer ----


def test_candidates_take_turns_and_only_run_counts():
    now, order = [0.0], []

    def candidate(name: str, seconds: float) -> Candidate:
        def step(what: str, seconds: float) -> None:
            order.append(what + name)
            now[0] += seconds

        return Candidate(
            lambda: step("run ", seconds), lambda: step("prepare ", 50.0) or (), lambda: step("restore ", 70.0)
        )

    timings = interleave(
        {"a": candidate("a", 1.0), "b": candidate("b", 2.0)}, min_rounds=2, warmup=1, clock=lambda: now[0]
    )
    assert timings == {"a": Timing((1.0, 1.0)), "b": Timing((2.0, 2.0))}
    assert [what for what in order if what.startswith("run")] == ["run a", "run b"] * 2 + ["run b", "run a"]
    assert order[:3] == ["prepare a", "run a", "restore a"]


def test_a_timing_is_a_median_and_the_distance_of_the_quartiles():
    measured = Timing((5.0, 1.0, 2.0, 3.0, 100.0))
    assert (measured.median, measured.iqr) == (3.0, 3.0)
    assert Timing((4.0,)).iqr == 0.0


def test_operands_rotate_through_twice_the_cache():
    assert [num_copies(n, 100) for n in (1, 99, 200, 201)] == [200, 3, 1, 1]
    made = iter("abc")
    copies = rotating(made.__next__, 70, 100)
    assert [copies() for _ in range(5)] == list("abcab")


def test_the_ceiling_of_speed_ups():
    assert ceiling(32, 8, 6, 1.0) == 32 * 7 / (6 * 8 + 32)
    assert ceiling(30, 10, 4, 0.5, head=8.0) == pytest.approx(38 * 3 / (4 * 18 + 38))


# ---- layerskip bench ----


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {READ: Candidate(lambda: 0.1, seconds=float), FMA: Candidate(lambda: 0.2, seconds=float)}
    monkeypatch.setattr(step_bench, "limit_candidates", lambda: quick)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_bench_reports_what_was_asked_for(quick_limits, weights):
    model = tiny_model(weights=weights)
    report = step_bench.bench(model, exit_layer=1, num_speculations=3, min_rounds=3, seconds=0.0)
    assert report.keys() == KEYS
    assert (report["read_bandwidth_gb_s"], report["fma_peak_gflop_s"]) == (10.0, 2 * 1536**3 / 0.2 / 1e9)
    assert report["machine"]["settings"]["bits_equal"]
    results = {row["name"]: row for row in report["results"]}
    assert list(results) == ["autoregressive", "draft_step", "verify_step", "cycle"]
    tokens = {"autoregressive": 1, "draft_step": 3, "verify_step": 4, "cycle": 4}
    plain = results["autoregressive"]
    assert plain["ratio_to_baseline"] == 1.0
    for name, row in results.items():
        assert row.keys() == RESULT_KEYS
        assert row["tokens_per_second"] == pytest.approx(tokens[name] / row["median_s"])
        assert row["ratio_to_baseline"] == pytest.approx(row["tokens_per_second"] / plain["tokens_per_second"])
        assert row["fraction_of_limit"] == pytest.approx(row["bytes"] / row["median_s"] / 10e9)
    assert json.loads(json.dumps(report)) == report
    assert "autoregressive" in step_bench.as_text(report)


def test_the_baseline_is_the_model_without_its_exit_adapter(monkeypatch):
    """Plain decoding that filled an adapter's K and V would make the cycle look faster than it is."""
    plain = tiny_model()
    model = plain.with_exit_adapter(2, random_adapter(plain))
    cache, sequence = step_bench.prefilled(model, [1, 2, 3], 4)
    steps, seen = step_bench.step_candidates(model, cache, sequence, 2, 2), []

    def noting(step):
        def noted(model, *others):
            seen.append(model.num_adapter_kv_layers)
            return step(model, *others)

        return noted

    for name in ("verify_step", "draft_step"):
        monkeypatch.setattr(step_bench, name, noting(getattr(step_bench, name)))
    verdicts = [steps["autoregressive"].run(), steps["verify_step"].run(*steps["verify_step"].prepare())]
    assert seen == [0, 1, 1] and verdicts[0].new_tokens(0) == verdicts[1].new_tokens(0)[:1]
    for step in steps.values():
        step.restore()
    assert cache.pool.length(sequence.id) == cache.length(sequence) == 3


def test_bytes_are_those_of_the_packed_weights_and_the_kv():
    model, small = tiny_model(), tiny_model(weights="int8")
    packed = sum(weight.nbytes for weight in model.weights.flat) - sum(
        w.nbytes for w in (model.weights.embedding, model.weights.cos, model.weights.sin)
    )
    kv = 3 * 2 * 11 * 2 * 18 * 2  # layers, k and v, positions, heads, head size, bytes
    assert verify_bytes(model, 0, 11) == packed + kv
    assert verify_bytes(model, 4, 7) == packed + kv
    assert layer_bytes(small) < 0.9 * layer_bytes(model)  # rows of 50 are filled up to 64
    assert draft_bytes(model, 1, 2, 0) == 2 * layer_bytes(model) + 144 + 2 * head_bytes(model)
    adapted = model.with_exit_adapter(1, random_adapter(model, 2))
    added = sum(layer.nbytes + 2 * 5 * 2 * 18 * 2 for layer in adapted.exit_adapters[0].weights.layers[1:])
    assert draft_bytes(adapted, 1, 1, 5) == draft_bytes(model, 1, 1, 5) + added
    listed = model.with_draft_vocab(range(16))
    assert head_bytes(listed, 1) == 50 * 2 * (1 + 16) < head_bytes(listed)


def test_a_cycle_that_cannot_be_true_is_doubted(monkeypatch, quick_limits):
    """A verification as fast as a hundredth of plain decoding; and one that is noisy."""
    monkeypatch.setattr(step_bench, "OtherWork", lambda: SimpleNamespace(cpus=lambda: 0.0))
    plain, fast = Timing((1.0, 1.0)), Timing((0.01, 0.01))
    times = {"autoregressive": plain, "draft_step": fast, "verify_step": fast, READ: plain, FMA: plain}
    monkeypatch.setattr(step_bench, "interleave", lambda *_: times)
    report = step_bench.bench(tiny_model(), 1, 3)
    assert report["doubt"] == "impossible: 200.00x with 4.00 tokens per verification"
    assert "no result: impossible" in step_bench.as_text(report)
    noisy = Timing((0.5, 2.0, 1.0, 1.5))
    times |= {"draft_step": noisy, "verify_step": noisy}
    assert step_bench.bench(tiny_model(), 1, 3)["doubt"].startswith("rounds differ from")


def test_nothing_is_timed_where_bits_differ(monkeypatch, quick_limits, capsys):
    model = tiny_model()
    monkeypatch.setattr(step_bench, "compare", lambda *_: type("Unequal", (), {"all_equal": False}))
    monkeypatch.setattr(step_bench, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(BitsDiffer, match="layerskip verify"):
        step_bench.bench(model, 1, 3)
    monkeypatch.setattr("layerskip_kernels.load_model", lambda *_: model)
    assert main(["bench"]) == 1
    assert capsys.readouterr().out == ""


def test_bench_writes_its_json_where_it_is_told(monkeypatch, quick_limits, capsys, tmp_path):
    monkeypatch.setattr("layerskip_kernels.load_model", lambda *_: tiny_model())
    monkeypatch.setattr(step_bench.bench, "__defaults__", (1, 0.0))
    path = tmp_path / "bench.json"
    assert main(["bench", "--output", str(path)]) == 0
    assert json.loads(path.read_text()).keys() == KEYS
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == KEYS
    assert main(["bench"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == KEYS


# ---- the report of make bench ----


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("report")
    for name in ("report", "targets", "plots"):
        sys.modules.pop(name, None)


def timing(milliseconds: float) -> dict:
    return {"median_s": milliseconds / 1e3, "iqr_s": 0.0001, "rounds": 3}


@pytest.fixture
def results() -> dict:
    """A run on a machine that reads 100 GB/s and computes 1000 GFLOP/s."""
    facts = {"machine": {**machine_facts(), "instruction_set": "avx512_bf16"}, "date": "2026-01-02 03:04",
             "command": "python x.py"}  # fmt: skip
    limits = {"read_bandwidth_gb_s": 100.0, "fma_peak_gflop_s": 1000.0}
    agreement = {"first_tokens_equal": 30, "tokens": 32, "gaps": [0.01]}

    def contender(name: str, tokens_per_second: float, prompt: float, **more: object) -> dict:
        return {"name": name, "tokens_per_second": tokens_per_second, "prompt_tokens_per_second": prompt,
                "decode": timing(1e3 / tokens_per_second), "process": timing(1.0), "agreement": agreement,
                **more}  # fmt: skip

    return {
        "peers": {**facts, **limits, "xllamacpp": "1", "prompt_tokens": 512, "prompt_flop": 512 * 10**9,
                  "llama_cpp": "AVX2 = 1 | ", "results": [
                      contender("layerskip_kernels bf16", 300.0, 900.0, bytes=10**8, fraction_of_limit=0.3),
                      contender("layerskip_kernels bf16 on AVX2", 140.0, 900.0, bytes=10**8, fraction_of_limit=0.14),
                      contender("llama.cpp BF16", 100.0, 450.0),
                      contender("Transformers bf16", 20.0, 1.0),
                      contender("Transformers fp32", 75.0, 1.0)]},
        "steps": {**facts, **limits, "overhead": {**timing(0.1), "outside_s": 0.08, "fraction_of_step": 0.02},
                  "rows": [{"rows": n, "bytes": 10**8, **timing(ms), "over_1_row": ms} for n, ms in
                           ((1, 1.0), (6, 1.2), (12, 2.5))],
                  "contexts": [{"context": n, "bytes": 10**8, **timing(1.0), "kv_fraction_of_limit": f}
                               for n, f in ((100, None), (4096, 0.75))]},
        "order_avx2": {**facts, **limits, "results": [
            {"rows": n, "fixed": timing(ms), "free": timing(1.0), "over_free": ms} for n, ms in ((1, 1.01), (3, 1.25))
        ]},
        "cycle_avx2": {**facts, "models": [
            {"model": "Llama-3.2-1B", **limits, "quantised": False, "num_layers": 16, "head_in_layers": 4.0,
             "plain": timing(1.0), "results": [
                 {"exit_layer": 4, "num_speculations": 19, "draft_step": timing(1.0), "verify_step": timing(1.0),
                  "speed_ups": [{"acceptance_rate": 0.5, "speed_up": s, "ceiling_with_head": 2.0}]}
                 for s in (1.9, 1.7)]}]},
    }  # fmt: skip


def test_targets_are_met_or_not_by_the_figures_of_the_run(report, results):
    rows = {row.what: row for row in report.rows(results)}
    found = {what: (row.value, row.met) for what, row in rows.items() if row.value is not None}
    assert found == {
        "autoregressive bf16, AVX-512: bytes read per second over the read bandwidth (this or the next)": (0.3, "NO"),
        "autoregressive bf16, AVX-512, over llama.cpp BF16": (3.0, "yes"),
        "autoregressive bf16, AVX2: bytes read per second over the read bandwidth (this or the next)": (0.14, "NO"),
        "autoregressive bf16, AVX2, over llama.cpp BF16": (1.4, "NO"),
        "autoregressive bf16 over Transformers": (4.0, "NO"),  # the faster of the two
        "prompt of 512 tokens over llama.cpp BF16": (2.0, "NO"),
        "verify_step of 6 rows over 1 row, AVX-512": (1.2, "yes"),
        "verify_step of 12 rows over 1 row, AVX-512": (2.5, "NO"),
        "a step's products in the contract's order over a free one, up to 16 rows, AVX2": (1.25, "NO"),
        "Python and dispatch, of a decode step": (0.02, "yes"),
        "growth at 4,096 positions, AVX-512: KV bytes per second more, over the read bandwidth": (0.75, "yes"),
        "cycle of Llama-3.2-1B over its ceiling with the head counted in, AVX2": (0.85, "NO"),
    }
    # 19 drafts of 4 + 4 layers and a pass of 20 layers, whose 20 rows take twice as long to compute as to read.
    assert rows["cycle of Llama-3.2-1B over its ceiling with the head counted in, AVX2"].limit == "0.90"
    assert rows["autoregressive bf16, AVX-512, over llama.cpp BF16"].limit == "1000.0 tokens/s"
    assert rows["prompt of 512 tokens over llama.cpp BF16"].limit == "1000.0 tokens/s"
    assert rows["verify_step of 12 rows over 1 row, AVX-512"].limit == "1.20x"  # 12 * 10**8 operations take 1.2 ms


def test_the_page_is_made_of_the_results(report, results, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    report.write(tmp_path, results)
    text = page.read_text()
    assert "| llama.cpp BF16 | 100.0 | 10.00 (0.10) | 450 | 30 of 32 | 0.010 |" in text
    assert "| 12 | 2.50 (0.10) | 2.50 |" in text
    assert all(f"<!-- begin {name} -->" in text for name in report.SECTIONS)
    assert {path.name for path in tmp_path.glob("*.svg")} == {"performance_peers.svg", "performance_rows.svg"}
    report.write(tmp_path, results)
    assert page.read_text() == text


def test_on_a_machine_with_avx2_alone_its_own_results_are_those_of_avx2(report, results):
    for result in results.values():
        result["machine"]["instruction_set"] = "avx_vnni"
    rows = {row.what: row.value for row in report.rows(results)}
    assert rows["verify_step of 6 rows over 1 row, AVX-512"] is None
    assert rows["verify_step of 6 rows over 1 row, AVX2"] == 1.2
    assert rows["autoregressive bf16, AVX-512, over llama.cpp BF16"] is None
    assert rows["autoregressive bf16, AVX2, over llama.cpp BF16"] == 3.0


def test_results_are_of_one_machine(report, results, tmp_path):
    with pytest.raises(ValueError, match="run `make bench`"):
        report.read(tmp_path)
    results["steps"]["machine"] = {**results["steps"]["machine"], "threads": 77}
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"several machines.*77"):
        report.read(tmp_path)


def test_what_was_not_measured_has_no_figure(report, results):
    assert [row.value for row in report.rows({})] == [None] * len(report.rows(results))


# ---- more threads than cores ----


def test_more_threads_than_cores_and_more_processes_do_not_hang():
    """Two processes at once, each with three threads a core, give the tokens of one thread."""
    script = (
        "import sys, torch; from support.models import tiny_model;"
        "from layerskip_kernels import GenerationConfig, generate;"
        "torch.set_num_threads(int(sys.argv[1])); config = GenerationConfig(max_new_tokens=12, eos_token_ids=());"
        "print(generate(tiny_model(), [[1, 2, 3]], config)[0].token_ids)"
    )
    many = str(3 * machine.usable_cores() + 2)
    processes = [
        subprocess.Popen([sys.executable, "-c", script, threads], cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True)
        for threads in ("1", many, many)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert outputs[0].count(",") == 11
    assert outputs[1:] == outputs[:1] * 2
