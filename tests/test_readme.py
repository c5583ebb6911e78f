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


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)
