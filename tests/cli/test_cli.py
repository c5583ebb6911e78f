"""The command line: what it prints, the exit statuses, and that a comparison notices what differs."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import layerskip_kernels
from layerskip_kernels import Generation, GenerationConfig, Model, generate, load_model, machine, ops
from layerskip_kernels.cli import demo, doctor, options
from layerskip_kernels.cli.doctor import diagnose
from layerskip_kernels.cli.main import main
from layerskip_kernels.evaluation.equality import compare, same_bytes
from layerskip_kernels.evaluation.prompts import example_prompts, human_eval_prompts
from layerskip_kernels.model.loading import DTYPES
from support.commands import error_of, last_line
from support.models import tiny_model
from support.tokenizers import Words

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def default_model() -> Model:
    return load_model()


# ---- generate ----


def test_texts_need_a_tokenizer(monkeypatch, capsys):
    monkeypatch.setattr(layerskip_kernels, "load_model", lambda *_: tiny_model())
    for more in ([], ["--output", os.devnull]):
        assert main(["generate", "-p", "hello", *more]) == 2
        assert "came without a tokenizer" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative"])
def test_generate_prints_the_text_and_one_json_line(monkeypatch, capsys, default_model, strategy):
    monkeypatch.setattr(layerskip_kernels, "load_model", lambda *_: default_model)
    prompt = "def fibonacci(n):"
    [expected] = generate(default_model, [prompt], GenerationConfig("autoregressive", max_new_tokens=6))

    status = main(
        ["generate", "--prompt", prompt, "--strategy", strategy, "--max-new-tokens", "6", "--threads", "1", "--json"]
    )

    out, err = capsys.readouterr()
    result = last_line(out)
    [output] = result.pop("outputs")
    assert status == 0
    assert result == {
        "model": default_model.name, "backend": "cpu", "dtype": "bfloat16", "strategy": strategy,
    }  # fmt: skip
    assert list(output) == [
        "prompt", "sample", "seed", "token_ids", "text", "finish_reason", "tokens_per_second", "acceptance_rate",
        "tokens_per_cycle",
    ]  # fmt: skip
    assert output["token_ids"] == expected.token_ids
    assert output["text"] == default_model.tokenizer.decode(expected.token_ids)
    assert out.rsplit("\n", 2)[0] == output["text"]
    assert output["finish_reason"] == "length"
    assert output["tokens_per_second"] > 0
    assert (output["acceptance_rate"] is None) == (strategy == "autoregressive")
    assert "6 tokens generated (length)" in err


def test_generate_streams(tiny, monkeypatch):
    pieces = []

    class Screen(io.StringIO):
        def flush(self) -> None:
            pieces.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Screen())
    assert main(["generate", "--prompt", "a b c", "--max-new-tokens", "7", "--strategy", "autoregressive"]) == 0
    lengths = [len(piece.rstrip("\n")) for piece in pieces]
    assert lengths[:7] == [1, 2, 3, 4, 5, 6, 7]


def test_generate_takes_the_first_human_eval_problem_by_default(tiny, capsys):
    [(_, prompt)] = human_eval_prompts(1)
    [expected] = generate(tiny, [prompt], GenerationConfig(max_new_tokens=5))
    assert main(["generate", "--max-new-tokens", "5", "--json"]) == 0
    assert last_line(capsys.readouterr().out)["outputs"][0]["token_ids"] == expected.token_ids


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_generate_takes_a_prompt_file(tiny, capsys, monkeypatch, tmp_path, source):
    prompt = "naïve words\nin two lines"
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", (tmp_path / "prompt.txt").open())
    [expected] = generate(tiny, [prompt], GenerationConfig(max_new_tokens=5))
    path = str(tmp_path / "prompt.txt") if source == "file" else "-"
    assert main(["generate", "--prompt-file", path, "--max-new-tokens", "5", "--json"]) == 0
    assert last_line(capsys.readouterr().out)["outputs"][0]["token_ids"] == expected.token_ids


def test_generate_passes_its_options_on(monkeypatch, capsys):
    asked = {}

    def load(*source: object) -> Model:
        asked["source"] = source
        return replace(tiny_model(), tokenizer=Words())

    def record(model: Model, prompts: list[str], config: GenerationConfig, **_: object) -> list[Generation]:
        asked["config"], asked["threads"] = config, torch.get_num_threads()
        return [Generation(1, [2], "length")]

    monkeypatch.setattr(layerskip_kernels, "load_model", load)
    monkeypatch.setattr(layerskip_kernels, "generate", record)
    options = "--model layerskip-tiny-code --dtype fp16 --backend reference --weights int8 --threads 2 --exit-layer 2"
    more = "--strategy self_speculative --num-speculations 3 --max-new-tokens 9"
    several = ["--exit-adapter", "a-folder", "--exit-adapter", "b"]
    assert main(["generate", *options.split(), *several, *more.split()]) == 0
    assert asked["source"] == ("layerskip-tiny-code", torch.float16, "reference", "int8", ["a-folder", "b"], None)
    assert asked["config"] == GenerationConfig("self_speculative", 2, 3, 9)
    assert asked["threads"] == 2


def test_the_options_offer_what_there_is():
    assert set(options.BACKENDS) == set(ops.BACKENDS)
    assert set(options.DTYPES.values()) == set(DTYPES)


# ---- verify ----


@pytest.fixture(scope="module")
def generations() -> tuple[Generation, Generation]:
    """One prompt decoded both ways by the tiny model, everything kept."""
    model = tiny_model()
    config = GenerationConfig(max_new_tokens=9, return_logits=True, return_kv=True)
    strategies = ("autoregressive", "self_speculative")
    plain, speculative = (generate(model, [[1, 2, 3]], replace(config, strategy=s))[0] for s in strategies)
    return plain, speculative


def with_one_bit_flipped(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    changed = tensor.clone(memory_format=torch.contiguous_format)
    changed.view(torch.uint8).view(-1)[byte] ^= 1
    return changed


def test_compare_finds_both_ways_equal(generations):
    plain, speculative = generations
    comparison = compare(plain, speculative)
    assert comparison.all_equal
    assert comparison.tokens == 9
    assert comparison.logit_bytes == 9 * 101 * 4
    assert comparison.kv_bytes == 2 * 3 * (3 + 9 - 1) * 2 * 18 * 2


@pytest.mark.parametrize("position", [0, -1])
def test_compare_notices_a_changed_token(generations, position):
    plain, speculative = generations
    tokens = list(speculative.token_ids)
    tokens[position] ^= 1
    comparison = compare(plain, replace(speculative, token_ids=tokens))
    assert not comparison.tokens_equal and comparison.logits_equal and comparison.kv_equal


def test_compare_notices_a_missing_token(generations):
    plain, speculative = generations
    assert not compare(plain, replace(speculative, token_ids=speculative.token_ids[:-1])).tokens_equal


@pytest.mark.parametrize("byte", [0, 9 * 101 * 4 - 1])
def test_compare_notices_one_changed_logit_bit(generations, byte):
    plain, speculative = generations
    comparison = compare(plain, replace(speculative, logits=with_one_bit_flipped(speculative.logits, byte)))
    assert comparison.tokens_equal and not comparison.logits_equal and comparison.kv_equal


@pytest.mark.parametrize("which", [0, 1], ids=["k", "v"])
@pytest.mark.parametrize("byte", [0, -1])
def test_compare_notices_one_changed_kv_byte(generations, which, byte):
    plain, speculative = generations
    kv = list(speculative.kv)
    kv[which] = with_one_bit_flipped(kv[which], byte)
    comparison = compare(plain, replace(speculative, kv=tuple(kv)))
    assert comparison.tokens_equal and comparison.logits_equal and not comparison.kv_equal


def test_compare_refuses_to_compare_nothing(generations):
    plain, speculative = generations
    with pytest.raises(ValueError, match="return_logits=True"):
        compare(plain, replace(speculative, logits=None))
    with pytest.raises(ValueError, match="return_kv=True"):
        compare(replace(plain, kv=None), speculative)


def test_same_bytes_sees_bits_not_numbers():
    zero, nan = torch.tensor([0.0]), torch.tensor([torch.nan])
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(zero, -zero)
    assert not same_bytes(zero, zero.view(torch.int32))
    assert not same_bytes(zero, zero.view(1, 1))


def test_verify_compares_at_each_exit_layer(tiny, capsys):
    status = main(["verify", "--num-prompts", "3", "--exit-layer", "1,2", "--max-new-tokens", "5"])
    out, err = capsys.readouterr()
    result = last_line(out)
    assert status == 0
    assert list(result)[:5] == ["prompts", "tokens_compared", "tokens_equal", "logits_equal", "kv_equal"]
    assert (result["prompts"], result["tokens_compared"], result["exit_layers"]) == (3, 2 * 3 * 5, [1, 2])
    assert result["tokens_equal"] is result["logits_equal"] is result["kv_equal"] is True
    assert result["drafted"] > 0
    assert "exit layer 2: 3 prompts, 15 tokens" in out and "all equal, bit for bit" in out
    assert "9/9" in err  # the progress bar: 3 prompts, plain and at 2 exit layers


def test_verify_on_the_default_model(monkeypatch, capsys, default_model):
    monkeypatch.setattr(layerskip_kernels, "load_model", lambda *_: default_model)
    few = ["--exit-layer", "20", "--num-speculations", "2", "--max-new-tokens", "4", "--threads", "1"]
    assert main(["verify", "--prompt", "def add(a, b):", *few]) == 0
    result = last_line(capsys.readouterr().out)
    assert result["tokens_compared"] == 4
    assert result["kv_equal"] is True


@pytest.fixture(params=["tokens", "logits", "kv"])
def spoiled(request, monkeypatch) -> str:
    """Self-speculative decoding that gets one thing wrong, in the last prompt generated."""

    def wrong(model: Model, prompts: list[str], config: GenerationConfig) -> list[Generation]:
        [generation] = generate(model, prompts, config)
        if config.strategy == "self_speculative":
            if request.param == "tokens":
                generation.token_ids[-1] ^= 1
            elif request.param == "logits":
                generation.logits = with_one_bit_flipped(generation.logits, -1)
            else:
                generation.kv = (with_one_bit_flipped(generation.kv[0], -1), generation.kv[1])
        return [generation]

    monkeypatch.setattr("layerskip_kernels.evaluation.equality.generate", wrong)
    monkeypatch.setattr("layerskip_kernels.cli.demo.generate", wrong)
    return request.param


def test_verify_says_what_differs_where(tiny, capsys, spoiled):
    assert main(["verify", "--num-prompts", "1", "--max-new-tokens", "4"]) == 1
    out = capsys.readouterr().out
    result = last_line(out)
    wrong = [name for name in ("tokens", "logits", "kv") if not result[f"{name}_equal"]]
    assert wrong == [spoiled]
    assert "DIFFER IN HUMANEVAL/0" in out and "all equal" not in out


# ---- demo ----


def test_demo_shows_both_ways(tiny, capsys):
    assert main(["demo", "--num-prompts", "2", "--max-new-tokens", "5", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.endswith("equal")]
    code = ["HumanEval/0", "HumanEval/1"]  # for the default model, and for the one that was trained on code
    assert [row[:14].strip() for row in rows] == [*code, *code, "utterance 1", "utterance 2"]
    assert all(row.split()[-3:] == ["equal"] * 3 for row in rows)
    assert sum(line.startswith("median ") for line in out.splitlines()) == 3
    for _, prompt in (human_eval_prompts(1)[0], example_prompts("smollm2-135m-parse", 1).prompts[0]):
        [expected] = generate(tiny, [prompt], GenerationConfig("autoregressive", max_new_tokens=5))
        assert prompt + tiny.tokenizer.decode(expected.token_ids) in out


def test_demo_says_so_where_drafting_is_slower(tiny, capsys, monkeypatch):
    for speed_up, said in ((0.9, True), (1.1, False)):
        monkeypatch.setattr(demo.Row, "speed_up", speed_up)
        assert main(["demo", "--model", "SmolLM2-135M-Instruct", "--num-prompts", "1", "--max-new-tokens", "3"]) == 0
        assert ("speculation costs" in capsys.readouterr().out) is said


def test_demo_leaves_out_what_cannot_be_true(tiny, capsys, monkeypatch):
    monkeypatch.setattr(demo.Row, "speed_up", 67.56)
    assert main(["demo", "--model", "SmolLM2-135M-Instruct", "--num-prompts", "1", "--max-new-tokens", "3"]) == 0
    assert "HumanEval/0 is left out of the median: impossible: 67.56x with" in capsys.readouterr().out


def test_demo_fails_where_something_differs(tiny, capsys, monkeypatch, spoiled):
    monkeypatch.setattr(demo.Row, "doubt", None)  # a busy machine can give so small a model any speed
    assert main(["demo", "--model", "SmolLM2-135M-Instruct", "--num-prompts", "1", "--max-new-tokens", "5"]) == 1
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("HumanEval/")]
    assert row.split()[-3:] == ["DIFFER" if what == spoiled else "equal" for what in ("tokens", "logits", "kv")]


def test_demo_of_a_single_token_has_no_speed(tiny, capsys):
    assert main(["demo", "--model", "SmolLM2-135M-Instruct", "--num-prompts", "1", "--max-new-tokens", "1"]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("HumanEval/")]
    assert row.split() == ["HumanEval/0", "-", "-", "-", "-", "equal", "equal", "equal"]


# ---- doctor ----


@pytest.fixture
def quick_bandwidth(monkeypatch):
    monkeypatch.setattr(doctor, "measure_read_bandwidth", lambda: 12.34)


def test_doctor_reports_this_machine(quick_bandwidth, capsys):
    assert main(["doctor", "--json"]) == 0
    report = last_line(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["platform"]["instruction set"] == torch.ops.layerskip.instruction_set()
    assert report["platform"]["supported"] == torch.ops.layerskip.instruction_sets()
    assert report["cores"]["torch threads"] == 1
    assert report["cuda"]["available"] == torch.cuda.is_available()
    assert set(report["backends"]) == {*ops.BACKENDS, "cuda cache ops"}
    assert report["backends"]["cpu"] == (
        f"available: C++, running {torch.ops.layerskip.instruction_set()} of "
        f"{', '.join(torch.ops.layerskip.instruction_sets())}"
    )
    assert report["backends"]["reference"].startswith("available")
    assert report["data"]["default model"].endswith(".gguf")
    assert report["data"]["HumanEval"] == "found, 164 problems"
    assert report["memory reads"] == {"GB/s": 12.3, "threads": 1}


def test_doctor_prints_a_line_per_fact(quick_bandwidth, capsys):
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["torch", torch.__version__] in lines
    assert ["GB/s", "12.3"] in lines


def test_doctor_goes_on_where_a_part_is_missing(quick_bandwidth, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    report = diagnose()
    assert report["data"]["default model"].startswith("not available: the default model is not installed; run: pip")
    assert report["data"]["HumanEval"].startswith("not available: HumanEval.jsonl.gz is not installed; run: pip")
    assert report["triton"].startswith("not available: ")
    assert report["backends"]["triton"].endswith("pip install triton (Linux only)")
    assert any("default model is missing" in problem for problem in report["problems"])


@pytest.mark.parametrize(
    ("missing", "torch_cuda", "has_gpu", "state"),
    [
        ("not built; install it", None, False, "not built; install it (CPU tensors are served by the same code)"),
        (None, None, False, "built, but this torch is built for CPUs only"),
        (None, "13.0", False, "built, but no GPU: torch finds no driver, or no device"),
        (None, "13.0", True, "available: CUDA C++"),
    ],
)
def test_doctor_says_why_cuda_is_not_there(monkeypatch, missing, torch_cuda, has_gpu, state):
    monkeypatch.setattr(doctor.cache_ops, "CUDA_MISSING", missing)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert doctor._backends()["cuda cache ops"] == state


@pytest.mark.parametrize(
    ("interpret", "has_gpu", "state"),
    [
        ("0", False, "installed, but no GPU: torch finds no driver, or no device"),
        ("1", False, "available: on the CPU, interpreted"),
        ("0", True, "available: GPU kernels in Triton"),
    ],
)
def test_doctor_says_why_triton_is_not_there(monkeypatch, interpret, has_gpu, state):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert doctor._backends()["triton"] == state


def test_doctor_finds_a_second_openmp_runtime_a_problem(quick_bandwidth, monkeypatch):
    maps = """\
7f01-7f02 r-xp 00000000 fd:00 17 /venv/lib/torch/lib/libgomp.so.1
7f02-7f03 r--p 00001000 fd:00 17 /venv/lib/torch/lib/libgomp.so.1
7f04-7f05 r-xp 00000000 fd:00 18 /venv/lib/scikit_learn.libs/libgomp-a34b3233.so.1.0.0
7f06-7f07 r-xp 00000000 fd:00 19 /opt/intel/libiomp5.so
7f08-7f09 r-xp 00000000 fd:00 20 /usr/lib/llvm/libomp.so
7f0a-7f0b r-xp 00000000 fd:00 21 /usr/lib/llvm/libomptarget.so
7f0c-7f0d r-xp 00000000 fd:00 22 /usr/lib/libcompat.so"""
    found = machine.openmp_runtimes(maps)
    assert [os.path.basename(path) for path in found] == [
        "libiomp5.so", "libomp.so", "libgomp-a34b3233.so.1.0.0", "libgomp.so.1",
    ]  # fmt: skip
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: found[:1])
    assert not any("OpenMP" in problem for problem in diagnose()["problems"])
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: found)
    assert any("more than one OpenMP runtime" in problem for problem in diagnose()["problems"])


def test_this_package_brings_one_openmp_runtime():
    """In a process of its own: other packages, sentencepiece for one, bring theirs."""
    code = "import layerskip_kernels.ops.cpu; from layerskip_kernels.machine import openmp_runtimes as found\n"
    code += "print(*found(), sep=chr(10))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert len(ran.stdout.splitlines()) == 1, ran.stdout


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--exit-layer", "3"], "exit_layer must be in 1..2 for this model of 3 layers, got 3"),
        (["generate", "--exit-layer", "0"], "exit_layer must be at least 1, got 0"),
        (["generate", "--num-speculations", "0"], "num_speculations must be at least 1, got 0"),
        (["generate", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["generate", "--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
        (["generate", "--threads", "0"], "--threads: must be a whole number in 1..999999999, got '0'"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "--prompt-file is not allowed with a prompt"),
        (["generate", "--prompt-file", "no/such/file"], "no/such/file: No such file or directory"),
        (["generate", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (
            ["verify", "--exit-layer", "1,x"],
            "--exit-layer: must be a whole number in 1..999999999, got 'x'",
        ),
        (["verify", "--exit-layer", "1,3"], "exit_layer must be in 1..2 for this model of 3 layers, got 3"),
        (["verify", "--num-prompts", "0"], "--num-prompts: must be a whole number in 1..999999999, got '0'"),
        (["demo", "--exit-layer", "3"], "exit_layer must be in 1..2 for this model of 3 layers, got 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(tiny, capsys, arguments, message):
    assert message in error_of(arguments, capsys)


def test_an_unknown_model_path_is_named(capsys):
    assert "'/no/such/model'" in error_of(["generate", "--model", "/no/such/model"], capsys)


def test_a_prompt_file_that_is_not_text_is_named(tiny, capsys, tmp_path):
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe")
    assert "prompt.bin is not UTF-8 text" in error_of(
        ["generate", "--prompt-file", str(tmp_path / "prompt.bin")], capsys
    )


def test_interrupting_is_quiet(monkeypatch, capsys):
    def interrupted(*_: object) -> Model:
        raise KeyboardInterrupt

    monkeypatch.setattr(layerskip_kernels, "load_model", interrupted)
    assert main(["generate"]) == 130
    assert capsys.readouterr().err == "layerskip: interrupted\n"


def test_the_module_runs_as_a_program(tmp_path):
    command = [
        sys.executable,
        "-m",
        "layerskip_kernels.cli.main",
        "generate",
        "--max-new-tokens",
        "2",
        "--threads",
        "1",
    ]
    root = str(Path(layerskip_kernels.__file__).parents[1])
    (tmp_path / "prompt.txt").write_text("def add(a, b):\n")
    result = subprocess.run(
        [*command, "--prompt-file", str(tmp_path / "prompt.txt"), "--json"],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert len(last_line(result.stdout)["outputs"][0]["token_ids"]) == 2
    assert "Traceback" not in result.stderr
