"""The sweep: what it measures, that other tokens stop it, and what it writes."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest

from layerskip_kernels import Generation, GenerationConfig, Model, generate, load_model
from layerskip_kernels.cli.main import main
from layerskip_kernels.evaluation import exit_sweep
from layerskip_kernels.evaluation.equality import BitsDiffer
from layerskip_kernels.evaluation.exit_layers import exit_layers_of
from layerskip_kernels.evaluation.exit_sweep import (
    COLUMNS,
    PLAIN,
    as_text,
    best,
    check_worth_saving,
    defaults_of,
    measure,
    settings_of,
    sweep,
)
from layerskip_kernels.evaluation.facts import machine_facts
from layerskip_kernels.evaluation.trust import OtherWork, doubt_of
from layerskip_kernels.model.defaults import DraftDefaults, find_defaults
from layerskip_kernels.model.exit_adapter import write_exit_adapter
from support.clock import LayerClock
from support.commands import error_of
from support.models import early_model, tiny_model
from support.tokenizers import Words

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN_CONFIG = GenerationConfig("autoregressive", max_new_tokens=9, eos_token_ids=())


def test_the_exit_layers_tried_by_default():
    assert exit_layers_of(32) == [4, 8, 11, 16]
    assert exit_layers_of(30) == [4, 8, 10, 15]
    assert exit_layers_of(12) == [2, 3, 4, 6]
    assert exit_layers_of(2) == [1]


def test_the_settings():
    settings = settings_of(PLAIN_CONFIG, [1, 2], [4])
    assert list(settings) == [PLAIN, "exit 1, 4 drafts", "exit 2, 4 drafts"]
    assert settings["exit 2, 4 drafts"] == replace(
        PLAIN_CONFIG, strategy="self_speculative", exit_layer=2, num_speculations=4
    )


def test_measure_counts_what_generate_counts():
    model, prompts = tiny_model(), [[1, 2, 3], [4, 5]]
    settings = settings_of(PLAIN_CONFIG, [2], [3])
    measured = measure(model, prompts, settings, rounds=2)
    config = settings["exit 2, 3 drafts"]
    expected = generate(model, [[1, 2, 3]], config) + generate(model, [[4, 5]], config)
    drafting = measured["exit 2, 3 drafts"]
    assert [g.token_ids for g in drafting.generations] == [g.token_ids for g in expected]
    assert drafting.acceptance_rate == sum(g.accepted for g in expected) / sum(g.drafted for g in expected)
    assert drafting.tokens_per_cycle == 2 * 8 / sum(g.cycles for g in expected)
    assert measured[PLAIN].acceptance_rate is None and measured[PLAIN].tokens_per_cycle == 1
    assert measured[PLAIN].speedup == 1.0
    assert len(drafting.seconds) == 2 and drafting.tokens_per_second > 0


def timed(seconds: dict[str, Iterator[float]]):
    """A generate whose plain and drafting decodings take such seconds, one after the other."""

    def run(model: Model, prompts: list, config: GenerationConfig) -> list[Generation]:
        return [Generation(1, [5, 6, 7], "length", cycles=2, verify_seconds=next(seconds[config.strategy]))]

    return run


def test_medians_of_rounds_and_of_prompts(monkeypatch):
    # Of each prompt: one to compare, one to warm up, then three rounds.
    plain = iter([99, 99, 4.0, 8.0, 100.0, 99, 99, 6.0, 6.0, 6.0, 99, 99, 9.0, 9.0, 9.0])
    drafting = iter([99, 99, 2.0, 2.0, 50.0, 99, 99, 1.0, 2.0, 3.0, 99, 99, 9.0, 18.0, 18.0])
    monkeypatch.setattr(exit_sweep, "generate", timed({"autoregressive": plain, "self_speculative": drafting}))
    measured = measure(tiny_model(), [[1], [2], [3]], settings_of(PLAIN_CONFIG, [1], [2]), rounds=3)
    setting = measured["exit 1, 2 drafts"]
    assert measured[PLAIN].seconds == [8.0, 6.0, 9.0]
    assert setting.seconds == [2.0, 2.0, 18.0]
    assert setting.speedups == [4.0, 3.0, 0.5] and setting.speedup == 3.0
    assert setting.tokens_per_second == 2 / 2.0
    # Round by round, of the prompts 2, 6, 1; 4, 3, 0.5; 2, 2, 0.5.
    assert setting.speedups_by_round == [2.0, 3.0, 2.0]
    assert (setting.speedup_low, setting.speedup_high) == (2.0, 3.0)
    assert next(plain, None) is next(drafting, None) is None


@pytest.mark.parametrize("call", [2, 4], ids=["compared", "timed"])
def test_other_tokens_stop_it(monkeypatch, call):
    calls = count(1)

    def wrong(model: Model, prompts: list, config: GenerationConfig) -> list[Generation]:
        [generation] = generate(model, prompts, config)
        if next(calls) == call:
            generation.token_ids[-1] ^= 1
        return [generation]

    monkeypatch.setattr(exit_sweep, "generate", wrong)
    with pytest.raises(BitsDiffer, match="token"):
        measure(tiny_model(), [[1, 2, 3]], settings_of(PLAIN_CONFIG, [1], [2]), rounds=1)


def test_a_setting_that_always_gives_other_tokens_stops_it(monkeypatch):
    def wrong(model: Model, prompts: list, config: GenerationConfig) -> list[Generation]:
        [generation] = generate(model, prompts, config)
        generation.token_ids[-1] ^= config.strategy == "self_speculative"
        return [generation]

    monkeypatch.setattr(exit_sweep, "generate", wrong)
    with pytest.raises(BitsDiffer, match="exit 1, 2 drafts gave other tokens"):
        measure(tiny_model(), [[1, 2, 3]], settings_of(PLAIN_CONFIG, [1], [2]), rounds=1)


def test_prompts_that_are_over_at_once_are_left_out():
    model = tiny_model()
    first = {prompt: generate(model, [list(prompt)], PLAIN_CONFIG)[0].token_ids[0] for prompt in ((1, 2, 3), (4, 5))}
    assert first[1, 2, 3] != first[4, 5]
    config = replace(PLAIN_CONFIG, eos_token_ids=(first[1, 2, 3],))
    measured = measure(model, [[1, 2, 3], [4, 5]], settings_of(config, [1], [2]), rounds=1)
    assert len(measured[PLAIN].generations) == 1
    with pytest.raises(ValueError, match="give other prompts"):
        measure(model, [[1, 2, 3]], settings_of(config, [1], [2]), rounds=1)


@pytest.fixture
def quiet(monkeypatch):
    """A machine that does nothing else."""
    monkeypatch.setattr(exit_sweep, "OtherWork", lambda: SimpleNamespace(cpus=lambda: 0.0))


def test_the_report_has_the_keys_promised(quiet):
    model = tiny_model().with_draft_vocab(range(50))
    report = sweep(model, [("p", [1, 2, 3])], [1, 2], [2, 3], max_new_tokens=6, rounds=1)
    assert list(report) == ["model", "machine", "results"]
    assert [list(result) for result in report["results"]] == [list(COLUMNS)] * (4 + 1)
    assert (report["results"][-1]["exit_layer"], report["results"][-1]["num_speculations"]) == ("auto", "auto")
    assert list(COLUMNS) == [
        "exit_layer", "num_speculations", "acceptance_rate", "tokens_per_cycle", "tokens_per_second", "speedup",
        "speedup_low", "speedup_high", "doubt",
    ]  # fmt: skip
    assert report["machine"]["settings"]["plain_tokens_per_second"] > 0
    assert report["machine"]["other_cpus"] == 0.0
    assert all(result["doubt"] is not None for result in report["results"])  # of one round
    json.dumps(report)
    assert defaults_of(model, report["results"][1]) == DraftDefaults(1, 3, tuple(range(50)))


# ---- speed-ups stand on the seconds of the two stages ----


@pytest.mark.parametrize("make", [tiny_model, early_model], ids=["drafts rejected", "drafts accepted"])
def test_a_speedup_is_layers_over_layers(monkeypatch, quiet, make):
    """End to end, with generate itself: the engine's clock is moved by the steps alone."""
    clock, model, prompt = LayerClock(monkeypatch), make(), [1, 2, 3]
    report = sweep(model, [("p", prompt)], [1, 2], [2, 3], max_new_tokens=9, rounds=3)
    assert clock.seconds > 0
    *fixed, auto = report["results"]
    for row in fixed:
        exit_layer, drafts = row["exit_layer"], row["num_speculations"]
        config = GenerationConfig(exit_layer=exit_layer, num_speculations=drafts, max_new_tokens=9)
        [g] = generate(model, [prompt], config)
        seconds = g.drafted * exit_layer + g.cycles * 3
        assert (g.draft_seconds, g.verify_seconds) == (g.drafted * exit_layer, g.cycles * 3)
        assert row["speedup"] == row["speedup_low"] == row["speedup_high"] == (len(g.token_ids) - 1) * 3 / seconds
        assert row["tokens_per_second"] == (len(g.token_ids) - 1) / seconds
        assert row["doubt"] is None and g.drafted > 0
    assert report["machine"]["settings"]["plain_tokens_per_second"] == 1 / 3
    assert (best(report)["speedup"] > 1) == (make is early_model)
    assert auto["speedup"] > 0.5, "a text of nine tokens, of which some try what drafting is worth"


# ---- what is no result ----


def test_what_cannot_be_true_is_doubted():
    assert doubt_of(2.0, 2.82, (1.9, 2.1), 3, 0.0) is None
    assert doubt_of(67.56, 2.82, (67.0, 68.0), 3, 0.0) == "impossible: 67.56x with 2.82 tokens per verification"
    assert doubt_of(2.0, 2.82, (2.0, 2.0), 1, 0.0) == "one round shows no spread"
    assert doubt_of(2.0, 2.82, (1.6, 2.2), 3, 0.0) == "rounds differ from 1.60x to 2.20x"
    assert doubt_of(2.0, 2.82, (1.9, 2.1), 3, 0.7) == "other processes used 0.7 CPUs meanwhile"
    assert doubt_of(2.0) is None


def test_work_of_others_is_seen():
    """Processes that this one did not start: here, those of a shell that it does not wait for until the end."""
    work, spin = OtherWork(), "import time\nend = time.time() + 1.5\nwhile time.time() < end: pass"
    if work.cpus() is None:
        pytest.skip("this system has no /proc/stat")
    process = subprocess.Popen([sys.executable, "-c", spin])
    time.sleep(1.2)
    assert work.cpus() > 0.2
    process.wait()
    alone = OtherWork()
    monotonic = time.monotonic()
    while time.monotonic() < monotonic + 0.3:
        pass
    assert alone.cpus() < len(os.sched_getaffinity(0)) + 0.1


def report_of(*speedups: float, doubt: str | None = None) -> dict:
    settings = dict(
        num_layers=3, prompts=1, prompts_from="p.jsonl", max_new_tokens=8, plain_tokens_per_second=10.0,
        dtype="bfloat16", rounds=3,
    )  # fmt: skip
    rows = [(1, n, None, 1.5, 10.0 * s, s, 0.9 * s, 1.1 * s, doubt) for n, s in enumerate(speedups, 2)]
    facts = {**machine_facts(), "cpu": "a $CPU", "other_cpus": 0.1, "settings": settings}
    return {"model": "$m$", "machine": facts, "results": [dict(zip(COLUMNS, row, strict=True)) for row in rows]}


def test_the_best_is_among_those_that_can_be_trusted():
    report = report_of(0.8, 1.4, 1.2)
    report["results"][1]["doubt"] = "impossible: 1.40x with 1.30 tokens per verification"
    assert best(report)["num_speculations"] == 4
    assert "?: no result: impossible: 1.40x" in as_text(report) and "0.72-0.88" in as_text(report)
    check_worth_saving(report)
    with pytest.raises(ValueError, match=r"cannot|can be trusted \(busy\): measure again .* --rounds 6"):
        check_worth_saving(report_of(1.4, doubt="busy"))
    with pytest.raises(ValueError, match="none is faster than plain decoding"):
        check_worth_saving(report_of(0.9))


def test_the_text_names_prompts_and_load():
    assert "on 1 prompt (p.jsonl)" in as_text(report_of(1.0))
    assert "other processes used 0.1 CPUs meanwhile" in as_text(report_of(1.0))


def test_the_best_is_the_fastest():
    report = report_of(0.8, 1.4, 1.4, 1.2)
    assert best(report)["num_speculations"] == 3
    assert "best: --exit-layer 1 --num-speculations 3" in as_text(report)
    assert "No setting is faster" not in as_text(report)
    assert "No setting is faster" in as_text(report_of(0.8, 0.9))


def test_an_exit_layer_that_is_not_there_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(exit_sweep, "measure", None)
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.2"):
        sweep(tiny_model(), [("p", [1])], [1, 3], [2])


# ---- the command ----

SHORT = ["sweep", "--exit-layer", "1,2", "--num-speculations", "2", "--max-new-tokens", "5", "--rounds", "1"]


def test_the_command_writes_what_it_was_asked_for(tiny, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a b c"}\n{"prompt": "d"}\n', encoding="utf-8")
    files = {ending: tmp_path / f"s.{ending}" for ending in ("csv", "json", "svg")}
    outputs = ["--csv", str(files["csv"]), "--output", str(files["json"]), "--plot", str(files["svg"])]
    model = tmp_path / "model"
    model.mkdir()
    assert main([*SHORT, "--prompt-file", str(prompts), "--model", str(model), *outputs]) == 0
    err = capsys.readouterr().err
    report = json.loads(files["json"].read_text())
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [{k: "" if v is None else str(v) for k, v in result.items()} for result in report["results"]]
    assert shown == rows
    assert "speed-up over plain decoding" in files["svg"].read_text()
    assert "24/24" in err  # the progress bar: 2 prompts, 3 settings, compared, warmed up and timed
    assert "nothing was saved; --save" in err and not list(model.iterdir())


QUICK = ["sweep", "--exit-layer", "1", "--num-speculations", "2", "--max-new-tokens", "9", "--prompt", "a b c"]


@pytest.fixture
def early(monkeypatch):
    monkeypatch.setattr("layerskip_kernels.load_model", lambda *_: replace(early_model(), tokenizer=Words()))


def test_the_best_setting_is_saved_where_that_was_asked(early, quiet, monkeypatch, capsys, tmp_path):
    LayerClock(monkeypatch)
    assert main([*QUICK, "--model", str(tmp_path), "--save"]) == 0
    assert str(tmp_path / "layerskip.json") in capsys.readouterr().err
    assert find_defaults(tmp_path, tmp_path, early_model().config) == DraftDefaults(1, 2)


def test_an_exit_adapter_has_its_own_exit_and_its_own_defaults(quiet, monkeypatch, capsys, tmp_path):
    """An adapter that is the model's own final norm alone changes nothing else."""
    model = replace(early_model(), tokenizer=Words())
    adapted = model.with_exit_adapter(2, {"norm.weight": model.weights.final_norm.clone()})
    monkeypatch.setattr("layerskip_kernels.load_model", lambda *_: adapted)
    LayerClock(monkeypatch)
    quick = [option for option in QUICK if option not in ("--exit-layer", "1")]
    where = ["--model", str(tmp_path / "model"), "--exit-adapter", str(tmp_path)]
    assert main([*quick, *where, "--save"]) == 0
    assert str(tmp_path / "layerskip.json") in capsys.readouterr().err
    assert find_defaults(tmp_path, tmp_path, model.config) == DraftDefaults(2, 2)


def test_the_best_of_several_adapters_gets_the_defaults(quiet, monkeypatch, capsys, tmp_path):
    """Each exit that has one is measured; here the first is as right as the second, in half the time."""
    model = replace(early_model(), tokenizer=Words())
    tensors, adapted, options = {"norm.weight": model.weights.final_norm.clone()}, model, []
    for exit_layer in (2, 1):
        folder = tmp_path / str(exit_layer)
        folder.mkdir()
        write_exit_adapter(folder, exit_layer, tensors, model.name, model.weights)
        adapted = adapted.with_exit_adapter(exit_layer, tensors)
        options += ["--exit-adapter", str(folder)]
    adapted = adapted.with_draft_vocab(range(90), 1)
    monkeypatch.setattr("layerskip_kernels.load_model", lambda *_: adapted)
    LayerClock(monkeypatch)
    quick = [option for option in QUICK if option not in ("--exit-layer", "1")]
    assert main([*quick, *options, "--json", "--save"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [row["exit_layer"] for row in found["results"]] == [1, 2, "auto"]
    assert found["machine"]["settings"]["draft_vocab"] == {"1": 90, "2": None}
    assert f"now the default of its exit adapter, used alone: {tmp_path / '1' / 'layerskip.json'}" in err
    assert find_defaults(tmp_path / "1", tmp_path, model.config) == DraftDefaults(1, 2, tuple(range(90)))
    assert not (tmp_path / "2" / "layerskip.json").exists()


@pytest.mark.parametrize("options", [[], ["--rounds", "1", "--save"]], ids=["not asked", "one round"])
def test_nothing_is_saved(early, quiet, monkeypatch, capsys, tmp_path, config_directory, options):
    LayerClock(monkeypatch)
    assert main([*QUICK, "--model", str(tmp_path), *options]) == (2 if options else 0)
    assert ("one round shows no spread" in capsys.readouterr().err) == bool(options)
    assert not list(tmp_path.iterdir()) and not list(config_directory.glob("defaults/*"))


def test_a_busy_machine_saves_nothing(early, monkeypatch, capsys, tmp_path):
    LayerClock(monkeypatch)
    monkeypatch.setattr(exit_sweep, "OtherWork", lambda: SimpleNamespace(cpus=lambda: 1.4))
    assert main([*QUICK, "--model", str(tmp_path), "--save"]) == 2
    assert "other processes used 1.4 CPUs meanwhile" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_impossible_speedup_is_not_saved(early, quiet, monkeypatch, capsys, tmp_path):
    """Plain decoding is timed while a neighbour has the cores."""
    clock = LayerClock(monkeypatch)

    def slowed(model: Model, prompts: list, config: GenerationConfig) -> list[Generation]:
        clock.slow = 30.0 if config.strategy == "autoregressive" else 1.0
        return generate(model, prompts, config)

    monkeypatch.setattr(exit_sweep, "generate", slowed)
    assert main([*QUICK, "--model", str(tmp_path), "--save"]) == 2
    out, err = capsys.readouterr()
    assert "impossible: 51.43x with 2.67 tokens per verification" in err and "?" in out
    assert not list(tmp_path.iterdir())


def test_the_best_setting_is_what_the_model_then_runs_with(capsys, tmp_path, one_thread):
    from support.checkpoint_files import write_directory

    write_directory(tmp_path, num_hidden_layers=3)
    model = load_model(tmp_path)
    report = sweep(model, [("p", [1, 2, 3])], [2], [6], max_new_tokens=8, rounds=1)
    (tmp_path / "layerskip.json").write_text(json.dumps({name: best(report)[name] for name in COLUMNS[:2]}))
    assert load_model(tmp_path).draft_settings(GenerationConfig()) == (2, 6)


def test_differing_tokens_are_status_1_and_keep_nothing(tiny, monkeypatch, capsys, tmp_path):
    def differing(*_: object, **__: object) -> dict:
        raise BitsDiffer("exit 1, 2 drafts gave other tokens than plain decoding")

    monkeypatch.setattr(exit_sweep, "measure", differing)
    assert main([*SHORT, "--prompt", "a b c", "--model", str(tmp_path)]) == 1
    assert "gave other tokens" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_remedy_is_named_before_the_work(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in error_of([*SHORT, "--plot", "s.png"], capsys)


def test_the_commands_take_the_models_defaults(monkeypatch, capsys):
    model = replace(tiny_model(), tokenizer=Words(), defaults=DraftDefaults(2, 3))
    monkeypatch.setattr("layerskip_kernels.load_model", lambda *_: model)
    assert main(["verify", "--prompt", "a b", "--max-new-tokens", "4"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["exit_layers"], result["num_speculations"]) == ([2], 3)
    asked = []
    monkeypatch.setattr(
        "layerskip_kernels.evaluation.step_bench.bench", lambda *arguments: asked.append(arguments[1:]) or {}
    )
    monkeypatch.setattr("layerskip_kernels.evaluation.step_bench.as_text", str)
    assert main(["bench"]) == 0
    assert main(["bench", "--exit-layer", "1", "--num-speculations", "5"]) == 0
    assert asked == [(2, 3), (1, 5)]
    assert main(["demo", "--num-prompts", "1", "--max-new-tokens", "4"]) == 0
    assert "drafting 3 tokens at a time with the first 2" in capsys.readouterr().out
