"""What sandbox.py starts, confined: the candidate, which runs a program, or the judge, which runs its tests.

    sandbox_child.py candidate|judge SETTINGS

The judge sends a line of JSON for the program and for every call, the candidate answers each with one. What comes from
the candidate is written by the program's process: the judge takes plain data and names of built-in exceptions from it.
"""

import builtins
import importlib
import json
import os
import sys
from typing import Any, BinaryIO, NoReturn

PASSED, ENDED = "passed", "ended before its tests did"
NOT_PLAIN, TOO_LARGE = "an answer is not plain data", "an answer is too large"
TESTS_NOT_PLAIN = "the tests pass something that is not plain data"
MESSAGE_BYTES = 1 << 20
# Imported before files are closed to the process; more than these a program cannot import.
MODULES = """
abc argparse array ast base64 binascii bisect calendar cmath codecs collections.abc contextlib copy csv ctypes
dataclasses datetime decimal difflib dis encodings.ascii encodings.cp1252 encodings.hex_codec encodings.idna
encodings.latin_1 encodings.rot_13 encodings.unicode_escape encodings.utf_16 encodings.utf_32 enum fractions
functools graphlib hashlib heapq hmac inspect io itertools json keyword math numbers operator os pprint queue random
re resource secrets select socket statistics string struct subprocess sys textwrap threading time timeit tokenize
traceback types typing unicodedata uuid warnings weakref zlib
""".split()


def sibling(name: str) -> Any:
    """A module beside this file, which the isolated interpreter would not find."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    try:
        return importlib.import_module(name)
    finally:
        del sys.path[0]


values = sibling("sandbox_values")


def built_in(kind: type) -> str:
    """The nearest built-in exception that a class derives from."""
    return next(base.__name__ for base in kind.__mro__ if vars(builtins).get(base.__name__) is base)


# ---- the candidate ----


def candidate(settings: dict[str, Any]) -> None:
    """Confine itself, say so, then run the program and answer calls until no more come."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    silence()
    confined = attempt_to_confine(settings)
    send(answers, confined)
    if "unconfined" in confined:
        return
    entry_point = None
    for line in questions:
        asked = json.loads(line)
        if "program" in asked:
            entry_point, answer = load(asked["program"], asked["entry_point"])
        else:
            answer = call(entry_point, asked)
        send(answers, answer)


def load(program: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The program's entry point, and what is said of it."""
    names: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(program, "program.py", "exec"), names)
    except BaseException as error:
        return None, {"raised": built_in(type(error))}
    return names.get(name), {"value": None} if name in names else {"raised": "NameError"}


def call(entry_point: Any, asked: dict[str, Any]) -> dict[str, Any]:
    args, kwargs = values.unpack(asked["args"]), values.unpack(asked["kwargs"])
    try:
        return {"value": values.pack(entry_point(*args, **kwargs))}
    except values.NotPlain:
        return {"not_plain": True}
    except BaseException as error:
        return {"raised": built_in(type(error))}


# ---- the judge ----


class StoppedError(BaseException):
    """No answer can come any more, or none that can be used."""


class Proxy:
    """Calls the program's entry point in the other process."""

    def __init__(self, questions: BinaryIO, answers: BinaryIO) -> None:
        self.questions, self.answers, self.stopped = questions, answers, ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            asked = {"args": values.pack(args), "kwargs": values.pack(kwargs)}
        except values.NotPlain:
            self.stop(TESTS_NOT_PLAIN)
        return self.ask(asked)

    def ask(self, asked: dict[str, Any]) -> Any:
        """The value that comes back. Raises what was raised there, as the built-in exception of that name."""
        if self.stopped:
            self.stop(self.stopped)  # the tests may have caught it
        try:
            send(self.questions, asked)
        except OSError:
            self.stop(ENDED)
        answer = self.receive()
        try:
            if "value" in answer:
                return values.unpack(answer["value"])
        except (values.NotPlain, RecursionError):
            self.stop(NOT_PLAIN)
        if not isinstance(answer.get("raised"), str):
            self.stop(NOT_PLAIN)
        raise exception_of(answer["raised"])

    def receive(self) -> dict[str, Any]:
        line = self.answers.readline(MESSAGE_BYTES)
        if not line.endswith(b"\n"):
            self.stop(TOO_LARGE if len(line) == MESSAGE_BYTES else ENDED)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            self.stop(NOT_PLAIN)
        return answer

    def stop(self, reason: str) -> NoReturn:
        self.stopped = reason
        raise StoppedError(reason)


def exception_of(name: str) -> BaseException:
    kind = vars(builtins).get(name)
    if kind in (
        StopIteration,
        StopAsyncIteration,
    ):  # would end the tests' own loop over map(f, ...)
        return RuntimeError()
    if isinstance(kind, type) and issubclass(kind, BaseException):
        try:
            return kind()
        except TypeError:  # such as UnicodeDecodeError, which needs to be told what it is about
            return Exception()
    return Exception()


def judge(settings: dict[str, Any]) -> None:
    """Run the tests of stdin's job on the candidate; report to stdout that both are confined, then the outcome."""
    job = json.load(sys.stdin)
    report = os.fdopen(os.dup(1), "wb")
    proxy = Proxy(os.fdopen(settings.pop("ask"), "wb"), os.fdopen(settings.pop("listen"), "rb"))
    silence()
    confined = attempt_to_confine(settings)
    if "unconfined" not in confined:
        confined = confirm(proxy)
    send(report, confined)
    if "unconfined" not in confined:
        send(report, {"outcome": outcome(job, proxy)})


def confirm(proxy: Proxy) -> dict[str, str]:
    """What the candidate says of its confinement, before the program is sent to it."""
    try:
        answer = proxy.receive()
    except StoppedError:
        return {"unconfined": "the program's process ended before it was confined"}
    return answer


def outcome(job: dict[str, str], proxy: Proxy) -> str:
    """ "passed", why no answers came, or the name of what was raised."""
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        proxy.ask({"program": job["program"], "entry_point": job["entry_point"]})
        exec(compile(job["given"], "given.py", "exec"), names)
        names[job["entry_point"]] = proxy
        exec(compile(job["tests"], "tests.py", "exec"), names)
        names["check"](proxy)
    except BaseException as error:
        return proxy.stopped or built_in(type(error))
    return proxy.stopped or PASSED


# ---- what they share ----


def attempt_to_confine(settings: dict[str, Any]) -> dict[str, Any]:
    for name in MODULES:
        importlib.import_module(name)
    try:
        sibling("sandbox_confine").confine(**settings)
    except (OSError, ValueError) as error:
        return {"unconfined": str(error)}
    return {"confined": True}


def silence() -> None:
    """What is printed goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)


def send(stream: BinaryIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    {"candidate": candidate, "judge": judge}[sys.argv[1]](json.loads(sys.argv[2]))
    os._exit(0)
