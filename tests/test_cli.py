"""The command line: what it prints, the exit statuses, and that a comparison notices what differs."""

import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import threads, tiny_model

import layerskip_kernels
from layerskip_kernels import (
    Generation,
    GenerationConfig,
    Model,
    cli_options,
    demo,
    doctor,
    generate,
    load_model,
    machine,
    ops,
)
from layerskip_kernels.cli import main
from layerskip_kernels.datasets import human_eval_prompts
from layerskip_kernels.demo import shipped_prompts
from layerskip_kernels.doctor import diagnose
from layerskip_kernels.loading import DTYPES
from layerskip_kernels.verify import compare, same_bytes


class Words:
    """A tokenizer for the tiny model: a token per word; and every token is a letter."""

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % 101 for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token % 26) for token in ids)


@pytest.fixture(scope="module")
def default_model() -> Model:
    return load_model()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The commands set the number of threads for good; other tests shall not notice."""
    with threads(1):
        yield


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A tiny model, which the commands load instead of the one they were asked for."""
    model = replace(tiny_model(), tokenizer=Words())
    monkeypatch.setattr(layerskip_kernels, "load_model", lambda *_: model)
    return model


def last_line(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


# ---- generate ----


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
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
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
    options = "--model M --dtype fp16 --backend reference --weights int8 --threads 2 --exit-layer 2"
    more = "--strategy autoregressive --num-speculations 3 --max-new-tokens 9"
    assert main(["generate", *options.split(), *more.split()]) == 0
    assert asked["source"] == ("M", torch.float16, "reference", "int8")
    assert asked["config"] == GenerationConfig("autoregressive", 2, 3, 9)
    assert asked["threads"] == 2


def test_the_options_offer_what_there_is():
    assert set(cli_options.BACKENDS) == set(ops.BACKENDS)
    assert set(cli_options.DTYPES.values()) == set(DTYPES)


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

    monkeypatch.setattr("layerskip_kernels.verify.generate", wrong)
    monkeypatch.setattr("layerskip_kernels.demo.generate", wrong)
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
    assert [row[:14].strip() for row in rows] == ["HumanEval/0", "HumanEval/1", "utterance 1", "utterance 2"]
    assert all(row.split()[-3:] == ["equal"] * 3 for row in rows)
    assert out.count("median") == 2
    for _, prompt in (human_eval_prompts(1)[0], shipped_prompts("smollm2-135m-parse", 1)[0]):
        [expected] = generate(tiny, [prompt], GenerationConfig("autoregressive", max_new_tokens=5))
        assert prompt + tiny.tokenizer.decode(expected.token_ids) in out


def test_demo_says_so_where_drafting_is_slower(tiny, capsys, monkeypatch):
    for speed_up, said in ((0.9, True), (1.1, False)):
        monkeypatch.setattr(demo.Row, "speed_up", speed_up)
        assert main(["demo", "--model", "any", "--num-prompts", "1", "--max-new-tokens", "3"]) == 0
        assert ("speculation costs" in capsys.readouterr().out) is said


def test_demo_fails_where_something_differs(tiny, capsys, spoiled):
    assert main(["demo", "--model", "any", "--num-prompts", "1", "--max-new-tokens", "5"]) == 1
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("HumanEval/")]
    assert row.split()[-3:] == ["DIFFER" if what == spoiled else "equal" for what in ("tokens", "logits", "kv")]


def test_demo_of_a_single_token_has_no_speed(tiny, capsys):
    assert main(["demo", "--model", "any", "--num-prompts", "1", "--max-new-tokens", "1"]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("HumanEval/")]
    assert row.split() == ["HumanEval/0", "-", "-", "-", "-", "equal", "equal", "equal"]


# ---- doctor ----


@pytest.fixture
def quick_bandwidth(monkeypatch):
    monkeypatch.setattr(machine, "measure_read_bandwidth", lambda: 12.34)


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
    assert not any("OpenMP" in problem for problem in diagnose()["problems"])
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: found)
    assert any("more than one OpenMP runtime" in problem for problem in diagnose()["problems"])


def test_this_process_has_one_openmp_runtime():
    assert len(machine.openmp_runtimes()) == 1


# ---- the machine ----


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "400000 100000"}, "0::/seen/only/outside/the/container", 4.0),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 3.0),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "300000 100000"}, "0::/a/b", 2.0),
        ({"other/cpu.max": "200000 100000"}, "0::/a", None),
        ({"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/a", 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/\n0::/", None),
        ({}, "", None),
    ],
)
def test_cpu_quota(tmp_path, files, membership, expected):
    for name, contents in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(contents + "\n")
    (tmp_path / "membership").write_text(membership + "\n")
    assert machine.cpu_quota(tmp_path, tmp_path / "membership") == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 3), (8.0, 3), (2.9, 2), (0.5, 1)])
def test_usable_cores_are_physical_and_within_the_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(machine, "usable_cpus", lambda: {0, 1, 2})
    monkeypatch.setattr(machine, "physical_cores", len)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.usable_cores() == expected


def test_physical_cores_counts_siblings_once(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(siblings)
    assert machine.physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert machine.physical_cores({0, 2}, tmp_path) == 1
    assert machine.physical_cores({7, 8}, tmp_path) == 2  # the system does not say


def test_last_level_caches_are_counted_once(tmp_path):
    for cpu, shared in enumerate(["0-1", "0-1", "2"]):
        for level, size, cpus in ((2, "1024K", str(cpu)), (3, "32768K", shared)):
            index = tmp_path / f"cpu{cpu}/cache/index{level}"
            index.mkdir(parents=True)
            for name, value in (("level", str(level)), ("size", size), ("shared_cpu_list", cpus)):
                (index / name).write_text(value)
    assert machine.last_level_cache_bytes({0, 1, 2}, tmp_path) == 2 * (32 << 20)
    assert machine.last_level_cache_bytes({0, 1}, tmp_path) == 32 << 20
    assert machine.last_level_cache_bytes({9}, tmp_path) is None


def test_read_bandwidth_is_of_the_order_of_memory():
    assert 0.1 < machine.measure_read_bandwidth(0.1, machine.read_buffer(64 << 20)) < 10_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
@pytest.mark.parametrize("keep", [False, True])
def test_freed_memory_is_kept_where_wanted(keep):
    program = f"""
from pathlib import Path
from layerskip_kernels.machine import keep_freed_memory
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * {os.sysconf("SC_PAGE_SIZE")}
if {keep}:
    keep_freed_memory()
before = resident()
block = bytearray(256 << 20)
del block
print(resident() - before)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (int(ran.stdout) > 200 << 20) == keep


# ---- mistakes ----


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake gives."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("layerskip: error: ") and err.count("\n") == 1
    return err


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
        (["generate", "--threads", "0"], "--threads: must be a whole number of at least 1, got '0'"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "not allowed with argument --prompt"),
        (["generate", "--prompt-file", "no/such/file"], "No such file or directory: 'no/such/file'"),
        (["generate", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["verify", "--exit-layer", "1,x"], "--exit-layer: must be a whole number of at least 1, got 'x'"),
        (["verify", "--exit-layer", "1,3"], "exit_layer must be in 1..2 for this model of 3 layers, got 3"),
        (["verify", "--num-prompts", "165"], "--num-prompts must be in 1..164, got 165"),
        (["demo", "--exit-layer", "3"], "exit_layer must be in 1..2 for this model of 3 layers, got 3"),
        ([], "the following arguments are required: command"),
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
    command = [sys.executable, "-m", "layerskip_kernels.cli", "generate", "--max-new-tokens", "2", "--threads", "1"]
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
