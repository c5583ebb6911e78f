"""What the command line printed."""

import json

import pytest

from layerskip_kernels.cli.main import main


def last_line(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake gives."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("layerskip: error: ") and err.count("\n") == 1
    return err
