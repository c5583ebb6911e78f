"""Programs that misbehave: none of them passes, none of them does harm, and right ones pass."""

import os
import socket
import time
from pathlib import Path

import pytest

from layerskip_kernels import sandbox
from layerskip_kernels.datasets import human_eval_problems
from layerskip_kernels.sandbox import require_sandbox, run_tests

TESTS = "def check(candidate):\n    assert candidate(1) == 2\n"
RIGHT = "def f(x):\n    return x + 1\n"

try:
    require_sandbox()
except ValueError as error:
    pytestmark = pytest.mark.skip(reason=str(error))


def reason(program: str, tests: str = TESTS, **limits: float) -> str:
    outcome = run_tests(program, tests, "f", **limits)
    assert outcome.passed == (outcome.reason == "passed")
    return outcome.reason


def in_f(*lines: str) -> str:
    """A program that does something when it is called, and then is right."""
    return "\n    ".join(["import os, socket, sys\ndef f(x):", *lines, "return x + 1"])


def test_a_right_program_passes():
    assert reason(RIGHT) == "passed"


def test_human_evals_own_solutions_pass():
    for problem in human_eval_problems(12):
        program = problem["prompt"] + problem["canonical_solution"]
        assert run_tests(program, problem["test"], problem["entry_point"]).reason == "passed", problem["task_id"]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(x):\n    return x\n", "AssertionError"),
        ("def f(x)\n", "SyntaxError"),
        ("def g(x):\n    return 2\n", "KeyError"),
        (in_f("sys.exit(0)"), "SystemExit"),
        ("import sys\nsys.exit(0)\n" + RIGHT, "SystemExit"),
        (in_f("os._exit(0)"), "ended before its tests did"),
        ("import os\nos._exit(0)\n", "ended before its tests did"),
        ("import os\nos.close(0); os.close(1); os.close(2); os.closerange(3, 64); os._exit(0)\n", None),
        (in_f("raise KeyboardInterrupt"), "KeyboardInterrupt"),
        ("def f(x):\n    return f(x)\n", "RecursionError"),
        ("import ctypes\nctypes.string_at(0)\n", "killed by signal 11"),
        (
            'import os\nos.write(3, b\'{"seal": "x", "outcome": "passed"}\')\nos._exit(0)\n',
            "ended before its tests did",
        ),
        ('print(\'{"outcome": "passed"}\')\nraise ValueError\n', "ValueError"),
    ],
)
def test_what_does_not_come_to_the_end_of_its_tests_has_not_passed(program, expected):
    found = reason(program)
    assert found != "passed" and (expected is None or found == expected)


@pytest.mark.parametrize(
    "program",
    ["while True:\n    pass\n", "import time\ntime.sleep(60)\n", "import select\nselect.select([], [], [])\n"],
)
def test_it_ends_in_time(program):
    start = time.monotonic()
    assert reason(program, seconds=0.5) == "timeout"
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "program", ["x = bytearray(1 << 34)\n", "x = []\nwhile True:\n    x.append(bytearray(1 << 20))\n"]
)
def test_memory_is_bounded(program):
    assert reason(program, memory=256 << 20) == "MemoryError"


@pytest.mark.parametrize(
    "call",
    [
        "os.fork()",
        "__import__('subprocess').run(['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",  # signal 0 does no harm, should this fail
        "os.kill(-1, 0)",
        "os.killpg(0, 0)",
        "socket.socket()",
        "socket.socketpair()",
        "socket.create_connection(('127.0.0.1', 9), 1)",
        "os.setsid()",
    ],
)
def test_no_process_no_signal_no_socket(call):
    assert reason(in_f(call)) == "PermissionError"


def test_no_thread():
    assert reason(in_f("__import__('threading').Thread(target=print).start()")) == "RuntimeError"


def test_a_fork_bomb_stays_one_process():
    program = in_f(
        "for _ in range(100):",
        "    try:",
        "        if os.fork() == 0:",
        "            os._exit(0)",
        "        return None",
        "    except OSError:",
        "        pass",
    )
    assert reason(program) == "passed"


def test_limits_cannot_be_raised():
    program = (
        "import resource\ntry:\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nexcept ValueError:\n    pass\n"
    )
    check = "def check(f):\n    assert f(0) == (1 << 28, 1 << 28)\n"
    program += "def f(x):\n    return resource.getrlimit(resource.RLIMIT_AS)\n"
    assert reason(program, check, memory=1 << 28) == "passed"


@pytest.mark.parametrize(
    "call",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+')",
        "os.open({path!r}, os.O_CREAT)",
        "os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "os.remove({path!r})",
        "os.rename({path!r}, {path!r} + 'x')",
        "os.truncate({path!r}, 0)",
        "os.chmod({path!r}, 0)",
        "os.utime({path!r})",
        "os.symlink('/', {path!r} + 'x')",
        "os.link({path!r}, {path!r} + 'x')",
        "os.mkdir({path!r} + 'x')",
        "os.mkfifo({path!r} + 'x')",
        "open('here', 'w')",
    ],
)
def test_no_file_is_written(tmp_path, call):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    before = kept.stat()
    assert reason(in_f(call.format(path=str(kept)))) == "PermissionError"
    assert kept.read_text() == "as it was" and os.listdir(tmp_path) == ["kept"]
    after = kept.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_ino) == (before.st_mode, before.st_mtime_ns, before.st_ino)


def test_system_calls_through_ctypes_are_refused_as_well(tmp_path):
    """Not Python is confined but the process: what no module guards is refused, too."""
    path = str(tmp_path / "new")
    program = in_f(
        "import ctypes",
        "libc = ctypes.CDLL(None, use_errno=True)",
        f"assert libc.creat({path!r}.encode(), 0o600) == -1 and ctypes.get_errno() == 1",
        "assert libc.socket(2, 1, 0) == -1 and ctypes.get_errno() == 1",
        "assert libc.fork() == -1 and libc.mount(None, b'/', None, 32, None) == -1",
    )
    assert reason(program) == "passed"
    assert not os.path.exists(path)


def test_a_listener_hears_nothing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert reason(in_f(f"socket.create_connection(('127.0.0.1', {port}))")) == "PermissionError"
        with pytest.raises(TimeoutError):
            server.accept()


def test_output_is_bounded_and_goes_nowhere(capfd):
    assert reason("import os\nwhile True:\n    os.write(3, b'x' * 4096)\n", seconds=5) != "passed"
    assert reason("import sys\nprint('x' * 100000)\nprint('y', file=sys.stderr)\n" + RIGHT) == "passed"
    assert capfd.readouterr() == ("", "")


def test_it_starts_with_nothing(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hidden")
    program = "import os\nassert os.listdir('.') == [] and 'SECRET_KEY' not in os.environ\n" + RIGHT
    assert reason(program) == "passed"
    assert "PermissionError" == reason("open('/proc/self/oom_score_adj', 'w')\n" + RIGHT)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reason("while True:\n    pass\n", seconds=0.3)
    assert list(tmp_path.iterdir()) == []
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if children.exists():
        running = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split()]
        assert not any(b"sandbox_child" in line for line in running)


def test_without_a_sandbox_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox, "LIBRARY", "libnothing.so.2")
    monkeypatch.setattr(sandbox.subprocess, "Popen", None)
    with pytest.raises(ValueError, match="apt-get install libseccomp2"):
        run_tests(RIGHT, TESTS, "f")


def test_a_sandbox_that_cannot_be_set_up_raises(tmp_path, monkeypatch):
    """And the program is not run: it would have said that it passed."""
    broken = tmp_path / "child.py"
    source = sandbox.CHILD.read_text().replace("seccomp_init(REFUSE)", "seccomp_init(12345)")
    broken.write_text(source)
    monkeypatch.setattr(sandbox, "CHILD", broken)
    with pytest.raises(RuntimeError, match="could not be set up"):
        run_tests(RIGHT, TESTS, "f")
