"""The command line of sampling: options, several prompts, drafts in colour, and what Ctrl-C leaves."""

import json
import os
import signal
from dataclasses import replace

import pytest
import tokenizers

import layerskip_kernels
from layerskip_kernels import GenerationConfig, generate
from layerskip_kernels.cli import generation as cli
from layerskip_kernels.cli.main import main
from layerskip_kernels.cli.screen import GREEN, PLAIN, RED, Screen
from layerskip_kernels.model.tokenizer import Tokenizer
from support.commands import error_of, last_line
from support.models import threads, tiny_model
from support.tokenizers import PlainTokenizer, Words

SAMPLED = ["--temperature", "1", "--seed", "3", "--exit-layer", "1", "--max-new-tokens", "12"]
CONFIG = GenerationConfig(temperature=1.0, seed=3, exit_layer=1, max_new_tokens=12)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def tiny(monkeypatch):
    model = replace(tiny_model(), tokenizer=Words())
    monkeypatch.setattr(layerskip_kernels, "load_model", lambda *_: model)
    return model


def test_every_option_arrives(tiny, monkeypatch):
    asked = []

    def noting(model, prompts, config, **_):
        asked.append(config)
        return generate(model, prompts, GenerationConfig(max_new_tokens=1, num_samples=config.num_samples))

    monkeypatch.setattr(layerskip_kernels, "generate", noting)
    options = (
        "--temperature 0.7 --top-k 5 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --presence-penalty 0.3 "
        "--frequency-penalty 0.4 --logit-bias 3=1.5 --logit-bias 4=-2 --seed 11 --min-new-tokens 2 --stop x --stop yz "
        "--stop-token-id 8 --acceptance rejection --logprobs 2 --num-samples 4 --max-new-tokens 9"
    )
    assert main(["generate", *options.split()]) == 0
    assert asked == [
        GenerationConfig(
            max_new_tokens=9, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2,
            presence_penalty=0.3, frequency_penalty=0.4, logit_bias={3: 1.5, 4: -2.0}, seed=11, min_new_tokens=2,
            stop=("x", "yz"), stop_token_ids=(8,), acceptance="rejection", logprobs=2, num_samples=4,
        )
    ]  # fmt: skip
    main(["generate"])
    assert asked[1] == GenerationConfig(), "without options, the defaults"


def test_a_sampled_text_streams_up_to_its_stop_string(tiny, capsys):
    [free] = generate(tiny, ["a b"], CONFIG)
    stop = free.text[5:8]
    assert main(["generate", "--prompt", "a b", *SAMPLED, "--stop", stop, "--json"]) == 0
    out = capsys.readouterr().out
    text = free.text[: free.text.index(stop)]
    assert out.splitlines()[0] == text == last_line(out)["outputs"][0]["text"]
    assert last_line(out)["outputs"][0]["finish_reason"] == "stop"


def test_samples_of_one_prompt(tiny, capsys):
    expected = generate(tiny, ["a b"], replace(CONFIG, num_samples=3, logprobs=1))
    assert main(["generate", "--prompt", "a b", *SAMPLED, "--num-samples", "3", "--logprobs", "1", "--json"]) == 0
    out = capsys.readouterr().out
    outputs = last_line(out)["outputs"]
    assert [(o["sample"], o["seed"], o["token_ids"]) for o in outputs] == [(g.sample, 3, g.token_ids) for g in expected]
    assert outputs[0]["logprobs"][0]["logprob"] == expected[0].logprobs[0].logprob
    for sample, generation in enumerate(expected):
        assert f"==> sample {sample} <==\n{generation.text}\n" in out


@pytest.fixture
def prompt_file(tmp_path):
    lines = [json.dumps("a b"), "", json.dumps({"task_id": "second", "prompt": "c ü"}), json.dumps({"prompt": "d"})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path / "prompts.jsonl")


def test_prompts_go_to_a_file_with_a_progress_bar(tiny, capsys, monkeypatch, prompt_file, tmp_path):
    together = []

    def noting(model, prompts, config, **hooks):
        together.append(prompts)
        return generate(model, prompts, config, **hooks)

    monkeypatch.setattr(layerskip_kernels, "generate", noting)
    monkeypatch.setattr(cli, "PROMPTS_AT_ONCE", 2)
    output = str(tmp_path / "out.jsonl")
    assert main(["generate", "--prompt-file", prompt_file, "--output", output, *SAMPLED, "--num-samples", "2"]) == 0
    out, err = capsys.readouterr()
    with open(output, encoding="utf-8") as lines:
        results = [json.loads(line) for line in lines]
    assert out == "" and "3/3" in err
    assert together == [["a b", "c ü"], ["d"]]
    assert [(r["prompt"], r["sample"]) for r in results] == [
        (name, sample) for name in ("line 1", "second", "line 4") for sample in (0, 1)
    ]
    expected = generate(tiny, ["a b", "c ü", "d"], replace(CONFIG, num_samples=2))
    assert [r["token_ids"] for r in results] == [g.token_ids for g in expected]


def test_prompts_stream_one_after_the_other(tiny, capsys, prompt_file):
    assert main(["generate", "--prompt-file", prompt_file, *SAMPLED]) == 0
    expected = generate(tiny, ["a b", "c ü", "d"], CONFIG)
    names = ("line 1", "second", "line 4")
    assert capsys.readouterr().out == "".join(
        f"==> {name} <==\n{generation.text}\n" for name, generation in zip(names, expected, strict=True)
    )


def test_accepted_drafts_are_green_and_corrections_red(tiny, capsys):
    events = []
    [generation] = generate(
        tiny, ["a b"], CONFIG,
        on_draft=lambda _, drafts, accepted: events.append((len(drafts), accepted)),
    )  # fmt: skip
    assert main(["generate", "--prompt", "a b", *SAMPLED, "--show-drafts"]) == 0
    out = capsys.readouterr().out
    assert out.replace(GREEN, "").replace(RED, "").replace(PLAIN, "").rstrip("\n") == generation.text
    assert out.count(GREEN) == generation.accepted > 0
    assert out.count(RED) == sum(accepted < drafted for drafted, accepted in events) > 0


def test_a_screen_colours_what_a_stop_string_held_back():
    """Token n of this tokenizer is the n-th letter."""

    class Alphabet(PlainTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            return "".join(chr(97 + i) for i in ids)

    written = []
    screen = Screen(Alphabet(), written.append, stop=("bcx",), show_drafts=True)
    screen.on_tokens(0, [0])
    screen.on_draft(0, [1, 9], 1)
    screen.on_tokens(0, [1, 2])
    assert written == ["a"], "bc may become a stop string"
    screen.on_tokens(0, [3])
    assert written == ["a", f"{GREEN}b{PLAIN}", f"{RED}c{PLAIN}", "d"]
    screen.on_tokens(0, [1])
    screen.finish()
    assert written[-1] == "b"


def test_ctrl_c_keeps_what_was_generated(tiny, capsys, monkeypatch, prompt_file, tmp_path):
    """An interrupt in the middle of the second prompt, where each is on its own."""
    monkeypatch.setattr(cli, "PROMPTS_AT_ONCE", 1)
    seen = []

    def interrupting(model, prompts, config, **hooks):
        def on_tokens(_, tokens):
            seen.extend(tokens)
            if prompts == ["c ü"]:
                os.kill(os.getpid(), signal.SIGINT)

        return generate(model, prompts, config, **{**hooks, "on_tokens": on_tokens})

    monkeypatch.setattr(layerskip_kernels, "generate", interrupting)
    before = signal.getsignal(signal.SIGINT)
    output = tmp_path / "out.jsonl"
    assert main(["generate", "--prompt-file", prompt_file, "--output", str(output), *SAMPLED, "--json"]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["prompt"], r["finish_reason"]) for r in results] == [("line 1", "length"), ("second", "cancelled")]
    assert len(results[1]["token_ids"]) < 12
    assert last_line(out)["outputs"] == results
    assert err.endswith("layerskip: interrupted; 2 texts so far\n") and "Traceback" not in err


def test_a_second_ctrl_c_does_not_wait(tiny, capsys, monkeypatch):
    def hanging(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second interrupt must get here first")

    monkeypatch.setattr(layerskip_kernels, "generate", hanging)
    assert main(["generate", "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "layerskip: interrupted\n"


def test_verify_compares_sampled_text(tiny, capsys):
    options = ["--num-prompts", "2", "--exit-layer", "1,2", "--max-new-tokens", "6"]
    assert main(["verify", *options, "--temperature", "0.9", "--top-p", "0.95", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    result = last_line(out)
    assert (result["temperature"], result["seed"], result["tokens_compared"]) == (0.9, 5, 24)
    assert result["tokens_equal"] is result["logits_equal"] is result["kv_equal"] is True
    assert "temperature 0.9 with seed 5" in out
    assert main(["verify", *options, "--temperature", "0.9"]) == 0
    assert last_line(capsys.readouterr().out)["seed"] == 0


def test_verify_notices_another_seed(tiny, capsys, monkeypatch):
    def reseeded(model, prompts, config):
        seed = config.seed + (config.strategy == "self_speculative")
        return generate(model, prompts, replace(config, seed=seed))

    monkeypatch.setattr("layerskip_kernels.evaluation.equality.generate", reseeded)
    assert main(["verify", "--num-prompts", "1", "--max-new-tokens", "6", "--temperature", "1", "--seed", "5"]) == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--temperature", "inf"], "temperature must be in 0..1e+06, got inf"),
    (["--logit-bias", "three=1"], "--logit-bias: must be a token id and a number, such as 17=-2.5, got 'three=1'"),
    (["--logit-bias", "999=1", "--temperature", "1"], "must name tokens in 0..100, got 999"),
    (["--stop", "x" * 10_000], "each of stop must have 1..1000 characters, got 10000"),
    (["--acceptance", "often"], "argument --acceptance: invalid choice: 'often'"),
    (["--show-drafts", "--num-samples", "2"], "leave out --output and --num-samples"),
    (["--show-drafts", "--output", "x"], "leave out --output and --num-samples"),
    (["--prompt-file", "no.jsonl"], "no.jsonl: No such file or directory"),
], ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "")  # fmt: skip
def test_a_mistake_is_one_line(tiny, capsys, arguments, message):
    assert message in error_of(["generate", *arguments], capsys)


@pytest.mark.parametrize(("text", "message"), [
    ("", "bad.jsonl is empty"),
    ('"a"\n{"prompt": 3}', 'bad.jsonl:2 must be a string or an object with a string "prompt"'),
    ('"a', "bad.jsonl:1 is not valid JSON"),
])  # fmt: skip
def test_a_bad_prompt_file_is_named(tiny, capsys, tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    assert message in error_of(["generate", "--prompt-file", str(tmp_path / "bad.jsonl")], capsys)


def test_text_that_is_not_unicode_is_an_error(monkeypatch, capsys, tmp_path):
    """A lone surrogate, which JSON can spell and UTF-8 can't."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    monkeypatch.setattr(layerskip_kernels, "load_model", lambda *_: replace(tiny_model(), tokenizer=Tokenizer(words)))
    (tmp_path / "odd.jsonl").write_text(r'"\ud800"')
    assert "odd.jsonl:1 has a lone surrogate at character 0" in error_of(
        ["generate", "--prompt-file", str(tmp_path / "odd.jsonl")], capsys
    )


def test_odd_unicode_streams_whole(capsys):
    """On the real tokenizer: joined emoji, right-to-left text, combining marks."""
    prompt = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u05e9\u05dc\u05d5\u05dd e\u0301\u0000\ufeff"
    assert main(["generate", "--prompt", prompt, "--temperature", "1.5", "--seed", "1", "--max-new-tokens", "8",
                 "--stop", "\u05dd", "--json", "--threads", "1"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert out.rsplit("\n", 2)[0] == last_line(out)["outputs"][0]["text"]
