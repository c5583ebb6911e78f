"""The README's code runs as it stands, in order, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("one_thread")
def test_the_blocks_run_one_after_the_other(capsys):
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    parse = capsys.readouterr().out
    assert "[IN:CREATE_ALARM" in parse
    generations = names["generations"]
    assert [g.finish_reason for g in generations.values()] == ["eos", "eos"]
    assert generations[0].accepted > 0
    prompt = names["model"].tokenizer.encode(names["prompt"])
    gained = names["sequence"].tokens[len(prompt) :]
    assert gained[: len(generations[0].token_ids)] == generations[0].token_ids


def test_what_holds_a_hazard_is_there():
    """The table in docs/architecture.md: tests, functions and files by name, of which each is some file's."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*", text.split("### What the interpreter cannot show")[1].split("\n## ")[0], re.MULTILINE)
    names = {
        part for row in rows for name in re.findall(r"`([\w.]+)`", row) for part in name.removesuffix(".py").split(".")
    }
    places = [ROOT / "tests", ROOT / "triton_ops", ROOT / "benchmarks" / "compile_only"]
    files = [path for place in places for path in place.rglob("*.py")]
    code = "\n".join(f"def {path.stem}\n{path.read_text(encoding='utf-8')}" for path in files)
    defined = set(re.findall(r"\bdef (\w+)|^class (\w+)|^([A-Z_]+) =", code, re.MULTILINE))
    assert len(rows) > 15 and names - {"quality", "toml"} <= {name for found in defined for name in found}


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)
