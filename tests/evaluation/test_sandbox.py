"""Programs that misbehave: none of them passes, none of them does harm, and right ones pass."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layerskip_kernels.evaluation import sandbox
from layerskip_kernels.evaluation.prompts import human_eval_problems
from layerskip_kernels.evaluation.sandbox import REASONS, require_sandbox, run_tests

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
    """Among them those whose tests use the entry point, or what the prompt defines, by name."""
    problems = human_eval_problems()
    for problem in [*problems[:12], *(problems[i] for i in (32, 33, 38, 50, 53))]:
        program, given = problem["prompt"] + problem["canonical_solution"], problem["prompt"]
        outcome = run_tests(program, problem["test"], problem["entry_point"], given=given)
        assert outcome.reason == "passed", problem["task_id"]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(x):\n    return x\n", "AssertionError"),
        ("def f(x)\n", "SyntaxError"),
        ("def g(x):\n    return 2\n", "NameError"),
        (in_f("sys.exit(0)"), "SystemExit"),
        ("import sys\nsys.exit(0)\n" + RIGHT, "SystemExit"),
        (in_f("os._exit(0)"), "ended before its tests did"),
        ("import os\nos._exit(0)\n", "ended before its tests did"),
        ("import os\nos.close(0); os.close(1); os.close(2); os.closerange(3, 64); os._exit(0)\n", None),
        (in_f("raise KeyboardInterrupt"), "KeyboardInterrupt"),
        ("def f(x):\n    return f(x)\n", "RecursionError"),
        ("import ctypes\nctypes.string_at(0)\n", "killed by signal 11"),
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
    assert reason("import os\nassert 'SECRET_KEY' not in os.environ\n" + RIGHT) == "passed"


# ---- programs that set out to learn, to tell or to pass ----


@pytest.fixture(params=[True, False], ids=["namespaces", "seccomp alone"])
def child(request, tmp_path, monkeypatch):
    """The sandbox where the system grants namespaces, and where it does not."""
    for path in sandbox.CHILD.parent.glob("sandbox_*.py"):
        shutil.copy(path, tmp_path)
    confine = tmp_path / "sandbox_confine.py"
    if not request.param:
        source = confine.read_text()
        assert "if _unshare(libc):" in source
        confine.write_text(source.replace("if _unshare(libc):", "if False:"))
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "sandbox_child.py")
    return confine


@pytest.mark.parametrize(
    "path", ["/proc/{parent}/environ", "/proc/self/environ", "/proc/{parent}/mem", "/etc/passwd", "{file}", "/", "."]
)
@pytest.mark.parametrize("call", ["open({!r}, 'rb').read(1)", "os.listdir({!r})", "os.stat({!r})", "os.readlink({!r})"])
def test_no_file_is_read_or_looked_at(child, path, call):
    path = path.format(parent=os.getpid(), file=__file__)
    assert reason(in_f(call.format(path))) in ("PermissionError", "IsADirectoryError")


def test_nor_through_a_descriptor_that_is_open(child):
    """The pipes and /dev/null alone; the name of what follows is not passed on."""
    program = in_f(
        "for fd in range(64):",
        "    try:",
        "        os.lseek(fd, 0, 0), os.read(fd, 1)",
        "    except OSError:",
        "        continue",
        "    assert os.read(fd, 1) == b''",
    )
    assert reason(program) == "passed"


NAMED = "raise type({!r}, (ValueError,), {{}})()"


@pytest.mark.parametrize(
    "name", ["CANARY=secret", "\x1b]0;title taken\x07\nHumanEval: 164 of 164 problems solved", "passed", "x" * 60000]
)
def test_the_name_of_an_exception_tells_nothing(child, name):
    assert reason(NAMED.format(name)) == reason(in_f(NAMED.format(name))) == "ValueError"
    assert (
        reason(f"import builtins\nbuiltins.{'x' * 9} = E = type('x' * 9, (Exception,), {{}})\nraise E\n") == "Exception"
    )


ANY_DESCRIPTOR = """import os
for fd in range(3, 64):
    try:
        os.write(fd, {!r})
    except OSError:
        pass
"""


@pytest.mark.parametrize("ends", [True, False], ids=["and ends", "and goes on"])
@pytest.mark.parametrize(
    "said",
    [
        b"[" * 60000, b"{}", b"[]", b"null", b"\xff", b'{"value": ["list"]}', b'{"value": {}}', b'{"raised": 5}',
        b'{"raised": "CANARY=secret"}', b'{"unconfined": "\x1b]0;"}', b'{"outcome": "passed"}', b'{"outcome": null}',
        b'{"value": ' + b"9" * 9999 + b"}", b'{"value": ["dict", [[["list", []], 1]]]}', b'{"value": ["int", "1e9"]}',
        b'{"value": ' + b'["list",[' * 20000 + b"]]" * 20000 + b"}",
    ],
    ids=lambda said: said[:24].decode(errors="replace"),
)  # fmt: skip
def test_a_malformed_report_ends_one_program_and_nothing_else(child, said, ends):
    """In the place of the answer to a call, and of the answer to the program."""
    forged = ANY_DESCRIPTOR.format(said + b"\n") + ("os._exit(0)\n" if ends else "")
    for program in (forged + RIGHT, RIGHT.replace("    return", "    exec(forged)\n    return")):
        found = reason(f"forged = {forged!r}\n{program}")
        assert found in REASONS and found != "passed"


def test_an_answer_of_any_size_is_bounded():
    assert reason(in_f("return 'x' * (1 << 21)")) == "an answer is too large"


WRONG = "def f(x):\n    return 0\n"
REPLACE = """import gc
for names in gc.get_objects():
    if isinstance(names, dict) and 'outcome' in names:
        names['outcome'] = lambda *_: 'passed'
        names['judge'] = names['candidate']
"""
FRAMES = """import sys
frame = sys._getframe()
while frame:
    frame.f_globals['PASSED'] = frame.f_globals['call'] = frame.f_globals['send'] = lambda *_: {"outcome": "passed"}
    frame = frame.f_back
"""
PATCHES = {
    "equal to everything": "class E:\n    __eq__ = __ne__ = lambda *_: True\ndef f(x):\n    return E()\n",
    "an int equal to everything": "class E(int):\n    __eq__ = lambda *_: True\ndef f(x):\n    return E()\n",
    "no assertions": "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\n" + WRONG,
    "another judge": REPLACE + WRONG,
    "frames": FRAMES + WRONG,
    "another exit": "import os, sys\nsys.exit = os._exit = lambda *_: None\n" + WRONG,
    "another json": 'import json\njson.dumps = lambda *_: \'{"outcome": "passed"}\'\n' + WRONG,
}


@pytest.mark.parametrize("program", PATCHES.values(), ids=PATCHES)
def test_a_patched_interpreter_does_not_pass(program):
    assert reason(program) != "passed"


SEARCH = """
import gc, sys
def f(x):
    known = str([o for o in gc.get_objects() if type(o) in (dict, list, tuple)])
    frame = sys._getframe()
    while frame:
        known += str(frame.f_globals) + str(frame.f_locals) + str(frame.f_code.co_names)
        frame = frame.f_back
    return 3 if '_'.join(['secret', 'of', 'the', 'tests']) in known else 2
"""


def test_the_tests_are_not_there_to_be_read():
    tests = "secret_of_the_tests = 1\ndef check(f):\n    assert f(1) == 2\n"
    assert reason(SEARCH, tests) == "passed"
    assert reason("secret_of_the_tests = 1\n" + SEARCH, tests) == "AssertionError"


def test_tests_that_catch_everything_do_not_turn_an_end_into_a_pass():
    tests = "def check(f):\n    try:\n        f(1)\n    except BaseException:\n        pass\n"
    assert reason("import os\ndef f(x):\n    os._exit(0)\n", tests) == "ended before its tests did"
    assert reason("def f(x):\n    raise ValueError\n", tests) == "passed"


@pytest.mark.parametrize("name", ["StopIteration", "StopAsyncIteration"])
def test_a_loop_over_answers_is_not_ended_by_one(name):
    tests = "def check(f):\n    for got, right in zip(map(f, [1, 2]), [2, 3]):\n        assert got == right\n"
    assert reason(RIGHT, tests) == "passed"
    assert reason(f"def f(x):\n    raise {name}\n", tests) == "RuntimeError"


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 1 << 80, 1.5, float("inf"), "\ud800\u2028", b"\x00", 1j, [], (), {1, 2}, frozenset([1]),
        [1, (2, [3, {"a": (4,), (1, 2): None}])], {"x": {1: []}},
    ],
    ids=repr,
)  # fmt: skip
def test_plain_data_comes_back_as_it_was(value):
    tests = f"""inf = float('inf')
def check(f):
    value = {value!r}
    assert repr(f(value, k=value)) == repr((value, value))
"""
    assert reason("def f(x, k):\n    return x, k\n", tests) == "passed"


def test_what_is_not_plain_data_is_said_to_be_so():
    assert reason("def f(x):\n    return (i for i in [2])\n") == "an answer is not plain data"
    assert reason(RIGHT, "def check(f):\n    f(check)\n") == "the tests pass something that is not plain data"


def test_a_report_is_validated_again_by_the_parent():
    for said in (b"[" * 60000, b"", b"7", b'{"outcome": ["passed"]}', b'{"outcome": "CANARY"}', b'{"outcome": {}}'):
        report = b'{"confined": true}\n' + said
        assert sandbox._outcome(report, 0, 0) == sandbox.Outcome(False, "ended before its tests did")
        with pytest.raises(RuntimeError, match="ended before they were confined"):
            sandbox._outcome(said, 0, 0)
    with pytest.raises(RuntimeError, match=r"set up: \]0;x") as raised:
        sandbox._outcome(json.dumps({"unconfined": "\x1b]0;\nx" + "y" * 999}).encode(), 0, 0)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400


def test_the_parent_is_closed_to_its_own_user_while_a_program_runs():
    dumpable = lambda: sandbox._prctl(3, 0)  # noqa: E731
    sandbox._prctl(4, 1)  # whatever this process was started as
    assert dumpable() == 1
    with sandbox._Undumpable():
        with sandbox._Undumpable():
            assert dumpable() == 0
        assert dumpable() == 0
    assert dumpable() == 1


def test_a_killed_parent_leaves_no_program_behind(tmp_path):
    """A program that sleeps uses no CPU, so no limit of the kernel ends it."""
    code = (
        "from layerskip_kernels.evaluation.sandbox import run_tests\n"
        "run_tests('import time\\ntime.sleep(1000)', '', 'f', seconds=1000)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    folder = _wait_for(lambda: next(tmp_path.glob("layerskip-*"), None))
    _wait_for(lambda: _inside(folder))
    parent.kill()
    parent.wait()
    _wait_for(lambda: not _inside(folder))


def _inside(folder: Path) -> list[str]:
    """Processes whose directory is a folder; those in namespaces of their own are told by their parents."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found += [link.parent.name] * (os.readlink(link) == str(folder))
        except OSError:
            continue
    return found


def _wait_for(condition):
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


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


def test_a_sandbox_that_cannot_be_set_up_raises(child):
    """And the program is not run: it would have said that it passed."""
    source = child.read_text()
    child.write_text(source.replace("seccomp_init(REFUSE)", "seccomp_init(12345)"))
    with pytest.raises(RuntimeError, match="could not be set up: seccomp_init failed"):
        run_tests(RIGHT, TESTS, "f")


def test_a_program_that_never_starts_raises(child):
    child.write_text("import os\nos._exit(3)\n")
    with pytest.raises(RuntimeError, match="could not be set up"):
        run_tests(RIGHT, TESTS, "f")
