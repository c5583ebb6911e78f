"""The harness: log-likelihoods of any exit, texts, a task of our own from a file; a server and HFLM beside it."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="needs lm-eval (pip install lm-eval)")

import layerskip_kernels
from layerskip_kernels import GenerationConfig, generate
from layerskip_kernels.cli.main import main
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.integrations.lm_eval import LayerSkipLM
from layerskip_kernels.model.sources import SHIPPED
from support.servers import serving

pytestmark = pytest.mark.usefixtures("one_thread")


def asked(*pairs: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=pair) for pair in pairs]


@pytest.mark.parametrize("exit_layer", [None, 3])
def test_log_likelihoods_are_those_of_the_exit(tiny_code, exit_layer):
    judge = LayerSkipLM(tiny_code, exit_layer)
    [(score, greedy)] = judge.loglikelihood(asked(("def add(a, b):\n    return", " a + b")), disable_tqdm=True)
    ids = tiny_code.tokenizer.encode("def add(a, b):\n    return a + b")
    start = len(tiny_code.tokenizer.encode("def add(a, b):\n    return"))
    [rows] = each_exit(tiny_code, ids[:-1], exits=[exit_layer or tiny_code.config.num_layers])
    logprobs = rows.logits.double().log_softmax(-1)
    expected = sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))
    assert score == pytest.approx(expected, abs=1e-4)
    assert greedy == (rows.tokens[start - 1 :].tolist() == ids[start:])


PAIRS = [
    ("import os\nimport ", "sys"),
    ("def add(a, b):\n    return", " a + b"),
    ("class Stack:\n    def ", "__init__(self):"),
    ("x = [1, 2", ", 3]"),
    ("", "import os"),
]


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """One model in fp32: in this process, over HTTP as the harness asks a server, and as Transformers computes it."""
    pytest.importorskip("tenacity", reason="needs the harness's clients (pip install 'lm-eval[api]')")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import PreTrainedTokenizerFast

    folder = SHIPPED / "layerskip-tiny-code"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    there = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(there)
    model = layerskip_kernels.load_model("layerskip-tiny-code", dtype=torch.float32)
    theirs = HFLM(pretrained=str(folder), tokenizer=tokenizer, dtype="float32", device="cpu", batch_size=1)
    with serving(model) as server:
        over_http = LocalCompletionsAPI(
            base_url=server.url + "/v1/completions", model="tiny", tokenizer=str(there),
            tokenizer_backend="huggingface",
            add_bos_token=True, max_length=model.config.max_positions, num_concurrent=2, max_retries=1,
        )  # fmt: skip
        yield LayerSkipLM(model), over_http, theirs


def test_a_server_scores_as_the_process_does_and_both_as_transformers(judges):
    said = generate(judges[0].model, ["def fibonacci(n):"], GenerationConfig(max_new_tokens=3))[0].text
    pairs = asked(*PAIRS, ("def fibonacci(n):", said))  # the last is what it says of itself
    here, over_http, theirs = (judge.loglikelihood(pairs, disable_tqdm=True) for judge in judges)
    assert [greedy for _, greedy in here] == [greedy for _, greedy in over_http] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in here} == {True, False}
    for (mine, _), (served, _), (reference, _) in zip(here, over_http, theirs, strict=True):
        assert served == pytest.approx(mine, abs=1e-4)
        assert mine == pytest.approx(reference, abs=1e-3)


def test_a_server_writes_what_the_process_writes(judges):
    settings = {"until": ["Return", "\n\n\n"], "max_gen_toks": 24, "do_sample": False}
    texts = [(prompt, dict(settings)) for prompt in ("def fibonacci(n):", "class Stack:", "import os\n")]
    requests = [SimpleNamespace(args=text) for text in texts]
    here, over_http = (judge.generate_until(requests, disable_tqdm=True) for judge in judges[:2])
    assert here == over_http and all(here)
    config = GenerationConfig("autoregressive", max_new_tokens=24, stop=("Return", "\n\n\n"))
    assert here == [g.text for g in generate(judges[0].model, [prompt for prompt, _ in texts], config)]


def test_exits_differ(tiny_code):
    pair = asked(("import os\n", "import sys"))
    scores = {e: LayerSkipLM(tiny_code, e).loglikelihood(pair, disable_tqdm=True)[0][0] for e in (1, 4, None)}
    assert len(set(scores.values())) == 3 and scores[None] > scores[1]


def test_a_long_text_is_scored_in_windows(tiny_code):
    text = "x = 1\n" * 600
    [score] = LayerSkipLM(tiny_code).loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    count = len(tiny_code.tokenizer.encode(text, add_special_tokens=False))
    assert count > tiny_code.config.max_positions and -5 * count < score < 0


def test_texts_end_at_stop_strings(tiny_code):
    prompt = "def fibonacci(n):"
    settings = {"until": ["Return"], "max_gen_toks": 24}
    [text] = LayerSkipLM(tiny_code).generate_until(asked((prompt, settings)), disable_tqdm=True)
    [free] = generate(tiny_code, [prompt], GenerationConfig(max_new_tokens=24))
    assert text == free.text[: free.text.index("Return")]


def test_the_command_runs_a_task_of_ones_own(tiny_code, tmp_path, monkeypatch, capsys):
    rows = [{"q": "import", "a": [" os", " xylophone"], "gold": 0}, {"q": "def f(", "a": ["self", "%%%%"], "gold": 0}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "imports", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{a}}",
        "doc_to_target": "gold", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "imports.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layerskip_kernels, "load_model", lambda *_: tiny_code)
    with torch.enable_grad():  # the harness switches gradients off for good
        run_the_task(tmp_path, capsys)


def run_the_task(tmp_path, capsys):
    results = tmp_path / "results.json"
    command = ["eval", "--tasks", "imports", "--include-path", str(tmp_path), "--output", str(results)]
    assert main(command) == 0
    assert json.loads(results.read_text())["imports"]["acc,none"] == 1.0
    assert "imports" in capsys.readouterr().out


def test_bad_settings_are_refused(tiny_code):
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.12, got 13"):
        LayerSkipLM(tiny_code, 13)
    with pytest.raises(ValueError, match="without a tokenizer"):
        LayerSkipLM(SimpleNamespace(config=tiny_code.config, tokenizer=None, name="m"))
