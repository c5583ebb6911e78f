"""The command line as a program: what needs no torch, what goes wrong in one line, what is written where."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import layerskip_kernels
from layerskip_kernels import GenerationConfig, generate
from layerskip_kernels.cli import main as cli
from layerskip_kernels.cli.main import main
from layerskip_kernels.cli.options import counted
from layerskip_kernels.cli.parser import build_parser
from support.commands import error_of, last_line

pytestmark = pytest.mark.usefixtures("one_thread")

PROGRAM = [sys.executable, "-m", "layerskip_kernels.cli"]
TINY_CODE = ["--model", "layerskip-tiny-code", "--threads", "1", "--max-new-tokens", "2"]


def run(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(Path(layerskip_kernels.__file__).parents[1])}
    return subprocess.run([*PROGRAM, *arguments], env=env, capture_output=True, text=True, timeout=120, **options)


# ---- what needs no torch ----


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], "usage: layerskip"),
        (["--help"], "usage: layerskip"),
        (["sweep", "--help"], "usage: layerskip sweep"),
        (["--version"], f"layerskip_kernels {layerskip_kernels.__version__}\n"),
    ],
    ids=str,
)
def test_help_and_version_load_no_large_package(arguments, shown):
    code = (
        "import sys\nfrom layerskip_kernels.cli.main import main\nstatus = main(sys.argv[1:])\n"
        "print({'torch', 'numpy', 'transformers', 'tokenizers'} & sys.modules.keys(), file=sys.stderr)\n"
        "sys.exit(status)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(layerskip_kernels.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and ran.stdout.startswith(shown)
    assert ran.stderr == "set()\n"


# ---- what goes wrong ----


def test_an_error_has_its_traceback_on_request(tiny, capsys):
    for arguments in (
        ["--debug", "generate", "a", "--exit-layer", "9"],
        ["generate", "--debug", "a", "--exit-layer", "9"],
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback") and err.splitlines()[-1].startswith("layerskip: error: exit_layer must")


def test_a_fault_of_the_package_says_that_it_is_one(tiny, capsys, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(layerskip_kernels, "generate", broken)
    assert main(["generate", "a"]) == 70
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("layerskip: internal error: KeyError: 'lost'") and "--debug" in line


def test_a_long_message_is_cut_in_the_middle(tiny, capsys, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("begin " + "x" * 1_000_000 + " end")

    monkeypatch.setattr(layerskip_kernels, "generate", broken)
    assert main(["generate", "a"]) == 2
    err = capsys.readouterr().err
    assert len(err) < 700 and "begin x" in err and err.endswith("x end\n")


@pytest.mark.parametrize("threads", ["5000", "1" + "0" * 30, "9" * 5000, "-1"])
def test_too_many_threads_are_refused_before_anything_is_loaded(capsys, threads):
    message = error_of(["generate", "--threads", threads, "--model", "/none"], capsys)
    assert "argument --threads: must be" in message and len(message) < 300


@pytest.mark.parametrize("option", ["--output"])
def test_a_result_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path, option):
    for command in (["generate"], ["verify"], ["bench"], ["draft-vocab"]):
        assert "does not exist" in error_of([*command, option, str(tmp_path / "none/x"), "--model", "/none"], capsys)
        assert "is a directory" in error_of([*command, option, str(tmp_path), "--model", "/none"], capsys)


def test_a_full_disk_is_an_error():
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [*PROGRAM, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(Path(layerskip_kernels.__file__).parents[1])},
        )  # fmt: skip
    assert ran.returncode == 2 and ran.stderr == "layerskip: error: No space left on device\n"


def test_a_full_disk_names_the_file(tiny, capsys):
    """Where the line of JSON goes, that of generated texts and that of a report."""
    for command in (["generate", "a b", "--max-new-tokens", "2"], ["verify", "--num-prompts", "1"]):
        assert main([*command, "--output", "/dev/full"]) == 2
        assert capsys.readouterr().err.endswith("layerskip: error: /dev/full: No space left on device\n")


# ---- Ctrl-C ----


def cpu_seconds(pid: int) -> float:
    """What a process has computed: beside other work it comes less far in the same time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_ctrl_c_is_one_line_at_any_time():
    """While torch is imported, while the model is loaded, while it generates: no traceback, and status 130."""
    env = {**os.environ, "PYTHONPATH": str(Path(layerskip_kernels.__file__).parents[1])}
    for seconds in (0.3, 0.7, 1.1, 1.6, 2.2, 3.0):
        command = [*PROGRAM, "generate", "a", "--model", "layerskip-tiny-code", "--max-new-tokens", "1000"]
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and cpu_seconds(process.pid) < seconds:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=300)[1]
        # After the work is done, while Python shuts down, it is the signal that ends it: a shell says 130, too.
        assert "Traceback" not in err and process.returncode in (0, 130, -signal.SIGINT), err
        if process.returncode == 130:
            assert re.search(r"^layerskip: interrupted", err, re.MULTILINE) and len(err.splitlines()) <= 2


# ---- prompts ----


def test_prompts_are_arguments_or_options(tiny, capsys):
    assert main(["generate", "a b", "-p", "c d", "-m", "any", "--max-new-tokens", "3", "--json"]) == 0
    out = capsys.readouterr().out
    assert "==> prompt 1 <==" in out and "==> prompt 2 <==" in out
    outputs = last_line(out)["outputs"]
    config = GenerationConfig(max_new_tokens=3)
    expected = [generate(tiny, [prompt], config)[0].token_ids for prompt in ("a b", "c d")]
    assert [output["token_ids"] for output in outputs] == expected


@pytest.mark.parametrize("contents", [b"a b\n", b"\xef\xbb\xbfa b", b"a b\r\n"], ids=["newline", "bom", "crlf"])
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_prompt_file_is_the_text_without_what_editors_add(tiny, capsys, tmp_path, monkeypatch, contents, source):
    (tmp_path / "prompt.txt").write_bytes(contents)
    monkeypatch.setattr(sys, "stdin", (tmp_path / "prompt.txt").open())
    path = str(tmp_path / "prompt.txt") if source == "file" else "-"
    [expected] = generate(tiny, ["a b"], GenerationConfig(max_new_tokens=3))
    assert main(["generate", "--prompt-file", path, "--max-new-tokens", "3", "--json"]) == 0
    assert last_line(capsys.readouterr().out)["outputs"][0]["token_ids"] == expected.token_ids


def test_only_one_line_break_is_left_out(tiny, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("a\n\n")
    args = build_parser().parse_args(["generate", "--prompt-file", str(tmp_path / "prompt.txt")])
    from layerskip_kernels.cli.options import prompts_of

    assert prompts_of(args, 1)[0][1] == "a\n"


def test_lines_of_json_may_begin_with_a_byte_order_mark(tiny, capsys, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('\ufeff"a b"\n\n{"prompt": "c"}\n', encoding="utf-8")
    path = str(tmp_path / "prompts.jsonl")
    assert main(["generate", "--prompt-file", path, "--max-new-tokens", "2", "--json"]) == 0
    assert len(last_line(capsys.readouterr().out)["outputs"]) == 2


def test_a_prompt_file_without_end_is_refused():
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    ran = run("generate", "--prompt-file", "/dev/zero", preexec_fn=limit)
    assert ran.returncode == 2 and ran.stderr == (
        "layerskip: error: /dev/zero has more than 64 MiB, which is too long for this use\n"
    )


def test_a_large_file_is_refused_by_its_size_alone(capsys, tmp_path):
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(1 << 40)  # a hole
    assert "large.txt has more than 64 MiB" in error_of(
        ["generate", "--prompt-file", str(tmp_path / "large.txt")], capsys
    )


# ---- streams that are closed, pipes ----


def test_a_closed_stdin_holds_no_prompt():
    ran = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *PROGRAM, "generate", "--prompt-file", "-"],
        env={**os.environ, "PYTHONPATH": str(Path(layerskip_kernels.__file__).parents[1])},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 2 and ran.stderr == "layerskip: error: stdin is empty; it must hold a prompt\n"


def test_a_closed_stderr_leaves_stdout_to_the_text(tmp_path):
    """Without it the next file opened would take its number, and what is meant for stderr would go elsewhere."""
    with_stderr = run("generate", "def f(x):", *TINY_CODE)
    ran = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", *PROGRAM, "generate", "def f(x):", *TINY_CODE],
        env={**os.environ, "PYTHONPATH": str(Path(layerskip_kernels.__file__).parents[1])},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == with_stderr.returncode == 0
    assert ran.stdout == with_stderr.stdout and "generated" in with_stderr.stderr


def test_bars_are_few_where_stderr_is_no_terminal(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(f"x = {i}") + "\n" for i in range(80)))
    ran = run("generate", "--prompt-file", str(prompts), "--output", str(tmp_path / "out.jsonl"), *TINY_CODE)
    assert ran.returncode == 0, ran.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 80
    assert "80/80" in ran.stderr and ran.stderr.count("\r") <= 4


# ---- JSON ----


def test_json_means_the_last_line_and_output_a_file(tiny, capsys, tmp_path):
    path = tmp_path / "result.json"
    few = ["a b c", "--max-new-tokens", "4", "--output", str(path)]
    assert main(["verify", *few]) == 0
    shown = capsys.readouterr().out
    assert last_line(shown) == json.loads(path.read_text()) and len(shown.splitlines()) == 3
    assert main(["verify", *few, "--json"]) == 0
    only = capsys.readouterr().out
    assert only.count("\n") == 1 and json.loads(only)["all_equal" if "all_equal" in only else "kv_equal"] is True


def test_json_is_a_flag_of_every_command_that_has_it():
    parser = build_parser()
    [commands] = [action for action in parser._actions if action.choices and "generate" in action.choices]
    flags = {
        name: action
        for name, command in commands.choices.items()
        for action in command._actions
        if "--json" in action.option_strings
    }
    assert {"generate", "verify", "bench", "roofline", "doctor", "parse-eval"} <= flags.keys()
    assert all(action.nargs in (0, "?") for action in flags.values())  # none needs a value


# ---- words ----


@pytest.mark.parametrize(("count", "text"), [(0, "0 prompts"), (1, "1 prompt"), (2, "2 prompts")])
def test_counts_agree_with_their_nouns(count, text):
    assert counted(count, "prompt") == text


def test_one_token_is_one_token(tiny, capsys):
    assert main(["generate", "a", "--max-new-tokens", "1"]) == 0
    err = capsys.readouterr().err
    assert "1 token generated (length)" in err and "1 prompt token in" in err


def test_drafts_in_vain_are_said_to_be(tiny, capsys, monkeypatch):
    def generated(accepted: int) -> object:
        def generate(*_: object, **__: object) -> list[layerskip_kernels.Generation]:
            return [layerskip_kernels.Generation(1, [2], "length", drafted=40, accepted=accepted, cycles=10)]

        return generate

    for accepted, said in ((5, True), (30, False)):
        monkeypatch.setattr(layerskip_kernels, "generate", generated(accepted))
        assert main(["generate", "a"]) == 0
        assert (cli_hint() in capsys.readouterr().err) is said


def cli_hint() -> str:
    from layerskip_kernels.cli.generation import HINT

    return HINT


def test_standard_streams_that_are_missing_are_replaced(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    cli._open_standard_streams()
    assert isinstance(sys.stdin, io.TextIOBase) and sys.stderr.write("nowhere") == 7
