"""The sweep: what it measures, that other tokens stop it, and what it writes."""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest
from conftest import tiny_model
from test_cli import Words, error_of, one_thread, tiny  # noqa: F401

from layerskip_kernels import Generation, GenerationConfig, Model, generate, load_model, sweep
from layerskip_kernels.bench import BitsDiffer
from layerskip_kernels.cli import main
from layerskip_kernels.defaults import DraftDefaults, find_defaults
from layerskip_kernels.sweep import COLUMNS, PLAIN, as_text, best, defaults_of, exit_layers_of, measure, settings_of
from layerskip_kernels.sweep import sweep as run_sweep

PLAIN_CONFIG = GenerationConfig("autoregressive", max_new_tokens=9, eos_token_ids=())


def test_the_exit_layers_tried_by_default():
    assert exit_layers_of(32) == [4, 8, 11, 16]
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
    monkeypatch.setattr(sweep, "generate", timed({"autoregressive": plain, "self_speculative": drafting}))
    measured = measure(tiny_model(), [[1], [2], [3]], settings_of(PLAIN_CONFIG, [1], [2]), rounds=3)
    setting = measured["exit 1, 2 drafts"]
    assert measured[PLAIN].seconds == [8.0, 6.0, 9.0]
    assert setting.seconds == [2.0, 2.0, 18.0]
    assert setting.speedups == [4.0, 3.0, 0.5] and setting.speedup == 3.0
    assert setting.tokens_per_second == 2 / 2.0
    assert next(plain, None) is next(drafting, None) is None


@pytest.mark.parametrize("call", [2, 4], ids=["compared", "timed"])
def test_other_tokens_stop_it(monkeypatch, call):
    calls = count(1)

    def wrong(model: Model, prompts: list, config: GenerationConfig) -> list[Generation]:
        [generation] = generate(model, prompts, config)
        if next(calls) == call:
            generation.token_ids[-1] ^= 1
        return [generation]

    monkeypatch.setattr(sweep, "generate", wrong)
    with pytest.raises(BitsDiffer, match="token"):
        measure(tiny_model(), [[1, 2, 3]], settings_of(PLAIN_CONFIG, [1], [2]), rounds=1)


def test_a_setting_that_always_gives_other_tokens_stops_it(monkeypatch):
    def wrong(model: Model, prompts: list, config: GenerationConfig) -> list[Generation]:
        [generation] = generate(model, prompts, config)
        generation.token_ids[-1] ^= config.strategy == "self_speculative"
        return [generation]

    monkeypatch.setattr(sweep, "generate", wrong)
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


def test_the_report_has_the_keys_promised():
    model = tiny_model().with_draft_vocab(range(50))
    report = run_sweep(model, [("p", [1, 2, 3])], [1, 2], [2, 3], max_new_tokens=6, rounds=1)
    assert list(report) == ["model", "machine", "results"]
    assert [list(result) for result in report["results"]] == [list(COLUMNS)] * 4
    assert list(COLUMNS) == [
        "exit_layer", "num_speculations", "acceptance_rate", "tokens_per_cycle", "tokens_per_second", "speedup"
    ]  # fmt: skip
    assert report["machine"]["settings"]["plain_tokens_per_second"] > 0
    json.dumps(report)
    assert defaults_of(model, report["results"][1]) == DraftDefaults(1, 3, tuple(range(50)))


def report_of(*speedups: float) -> dict:
    settings = dict(num_layers=3, prompts=1, max_new_tokens=8, plain_tokens_per_second=10.0, dtype="bfloat16")
    results = [dict(zip(COLUMNS, (1, n, None, 1.5, 10.0 * s, s), strict=True)) for n, s in enumerate(speedups, 2)]
    return {"model": "$m$", "machine": {"settings": settings, "cpu": "a $CPU", "threads": 2}, "results": results}


def test_the_best_is_the_fastest():
    report = report_of(0.8, 1.4, 1.4, 1.2)
    assert best(report)["num_speculations"] == 3
    assert "best: --exit-layer 1 --num-speculations 3" in as_text(report)
    assert "No setting is faster" not in as_text(report)
    assert "No setting is faster" in as_text(report_of(0.8, 0.9))


def test_an_exit_layer_that_is_not_there_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(sweep, "measure", None)
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.2"):
        run_sweep(tiny_model(), [("p", [1])], [1, 3], [2])


# ---- the command ----

SHORT = ["sweep", "--exit-layer", "1,2", "--num-speculations", "2", "--max-new-tokens", "5", "--rounds", "1"]


def test_the_command_writes_what_it_was_asked_for(tiny, capsys, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a b c"}\n{"prompt": "d"}\n', encoding="utf-8")
    files = {ending: tmp_path / f"s.{ending}" for ending in ("csv", "json", "svg")}
    outputs = ["--csv", str(files["csv"]), "--json", str(files["json"]), "--plot", str(files["svg"])]
    model = tmp_path / "model"
    model.mkdir()
    assert main([*SHORT, "--prompt-file", str(prompts), "--model", str(model), *outputs]) == 0
    out, err = capsys.readouterr()
    report = json.loads(files["json"].read_text())
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in result.items()} for result in report["results"]] == rows
    assert "speed-up over plain decoding" in files["svg"].read_text()
    assert "18/18" in err  # the progress bar: 2 prompts, 3 settings, compared, warmed up and timed
    chosen = best(report)
    found = find_defaults(model, model, tiny.config)
    assert found == DraftDefaults(chosen["exit_layer"], chosen["num_speculations"])
    assert str(model / "layerskip.json") in out


def test_the_best_setting_is_what_the_model_then_runs_with(capsys, tmp_path, one_thread):  # noqa: F811
    from checkpoint_files import write_directory

    write_directory(tmp_path, num_hidden_layers=3)
    model = load_model(tmp_path)
    report = run_sweep(model, [("p", [1, 2, 3])], [2], [6], max_new_tokens=8, rounds=1)
    (tmp_path / "layerskip.json").write_text(json.dumps({name: best(report)[name] for name in COLUMNS[:2]}))
    assert load_model(tmp_path).draft_settings(GenerationConfig()) == (2, 6)


def test_nothing_is_kept_where_that_was_asked(tiny, tmp_path, config_directory):  # noqa: F811
    assert main([*SHORT, "--prompt", "a b c", "--model", str(tmp_path), "--no-save"]) == 0
    assert not list(tmp_path.iterdir()) and not list(config_directory.glob("defaults/*"))


def test_differing_tokens_are_status_1_and_keep_nothing(tiny, monkeypatch, capsys, tmp_path):  # noqa: F811
    def differing(*_: object, **__: object) -> dict:
        raise BitsDiffer("exit 1, 2 drafts gave other tokens than plain decoding")

    monkeypatch.setattr(sweep, "measure", differing)
    assert main([*SHORT, "--prompt", "a b c", "--model", str(tmp_path)]) == 1
    assert "gave other tokens" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_remedy_is_named_before_the_work(tiny, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in error_of([*SHORT, "--plot", "s.png"], capsys)


def test_the_commands_take_the_models_defaults(monkeypatch, capsys):
    model = replace(tiny_model(), tokenizer=Words(), defaults=DraftDefaults(2, 3))
    monkeypatch.setattr("layerskip_kernels.load_model", lambda *_: model)
    assert main(["verify", "--prompt", "a b", "--max-new-tokens", "4"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["exit_layers"], result["num_speculations"]) == ([2], 3)
    asked = []
    monkeypatch.setattr("layerskip_kernels.bench.bench", lambda *arguments: asked.append(arguments[1:]) or {})
    monkeypatch.setattr("layerskip_kernels.bench.as_text", str)
    assert main(["bench"]) == 0
    assert main(["bench", "--exit-layer", "1", "--num-speculations", "5"]) == 0
    assert asked == [(2, 3), (1, 5)]
    assert main(["demo", "--num-prompts", "1", "--max-new-tokens", "4"]) == 0
    assert "drafting 3 tokens at a time with the first 2" in capsys.readouterr().out
