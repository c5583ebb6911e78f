"""The ``layerskip`` command: run one command, and turn whatever goes wrong into one line and an exit status.

Nothing large is imported before Ctrl-C has been taken care of.
"""

from __future__ import annotations

import os
import signal
import sys

from layerskip_kernels.cli.interrupts import INTERRUPTED, MESSAGE, exit_on_interrupt

__all__ = ["main", "run"]

FAILED, BROKEN = 2, 70  # an error of the user or the machine, a fault of this package
LONGEST_MESSAGE = 600  # characters
SECONDS_BETWEEN_BARS = "30"  # where stderr is no terminal


def run() -> None:
    """The program: ``main``, then exit. Ctrl-C while Python shuts down ends it without a traceback."""
    exit_on_interrupt()
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it, or the disk is full: Python would try again on its way out, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 2 for an error, 130 when interrupted, 70 for a fault of our own."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        _open_standard_streams()
        _write_few_progress_bars()
        status = _run_command(argv)
        sys.stdout.flush()  # here, where a full disk is still an error message
        return status
    except BrokenPipeError:  # the reader closed the pipe, `head` for instance
        return 1
    except KeyboardInterrupt:
        print(MESSAGE, end="", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, RuntimeError, OSError, MemoryError, ImportError) as error:
        return _report(f"error: {_message(error)}", FAILED, debug)
    except Exception as error:
        advice = "this is a bug in layerskip_kernels; --debug shows where"
        return _report(f"internal error: {type(error).__name__}: {_message(error)} ({advice})", BROKEN, debug)


def _run_command(argv: list[str] | None) -> int:
    from layerskip_kernels.cli.parser import build_parser

    try:
        args = build_parser().parse_args(argv)
    except SystemExit as end:  # argparse's, after --help or --version
        return int(end.code or 0)
    return args.run(args)


def _report(message: str, status: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"layerskip: {message}", file=sys.stderr)
    return status


def _message(error: Exception) -> str:
    """One line of at most LONGEST_MESSAGE characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = f"out of memory: {text}"
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE * 2 // 3]} ... {text[-LONGEST_MESSAGE // 3 :]}"
    return text


def _open_standard_streams() -> None:
    """Stand in for a stream that the caller closed: the next file opened would otherwise take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def _write_few_progress_bars() -> None:
    """A log file or a pipe gets the first and last state of a bar, and one every half minute."""
    if not sys.stderr.isatty():
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
            os.environ.setdefault(name, SECONDS_BETWEEN_BARS)


if __name__ == "__main__":
    run()
