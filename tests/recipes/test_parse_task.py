"""The semantic-parsing task: what it says is what was meant, and its splits share nothing."""

import json
import random
import re

import pytest

pytest.importorskip("yaml", reason="needs the extra 'train'")

from layerskip_kernels.cli import main as cli
from layerskip_kernels.recipes.parse_grammar import INTENTS, NESTED, SLOTS
from layerskip_kernels.recipes.parse_task import (
    SPLITS,
    Node,
    draw_example,
    split_of,
    write_parse_data,
)
from layerskip_kernels.recipes.parse_values import RULES


def slot_values(brackets: str) -> list[str]:
    """The words of every slot of a parse that holds no intent."""
    return [value.strip() for value in re.findall(r"\[SL:\w+ ([^\[\]]*)\]", brackets)]


SIZES = {"train": 3000, "validation": 1500, "test": 1500}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parse")
    write_parse_data(folder, SIZES)
    return {split: [json.loads(line) for line in (folder / f"{split}.jsonl").open()] for split in SIZES}


def test_brackets_of_a_tree():
    home = Node("IN:GET_LOCATION_HOME", [Node("SL:CONTACT", ["my aunt"]), " 's house"])
    goal = Node("SL:DESTINATION", [home])
    tree = Node("IN:GET_DIRECTIONS", ["directions to ", goal, " by ", Node("SL:METHOD_TRAVEL", ["bus"])])
    assert tree.words() == "directions to my aunt 's house by bus"
    assert tree.brackets() == (
        "[IN:GET_DIRECTIONS [SL:DESTINATION [IN:GET_LOCATION_HOME [SL:CONTACT my aunt ] ] ] [SL:METHOD_TRAVEL bus ] ]"
    )
    assert slot_values(tree.brackets()) == ["my aunt", "bus"]


def test_every_name_in_a_pattern_exists():
    patterns = [pattern for rules in (INTENTS, NESTED, SLOTS, RULES) for rule in rules.values() for pattern in rule]
    for pattern in patterns:
        assert set(re.findall(r"<(\w+)>", pattern)) <= RULES.keys(), pattern
        assert set(re.findall(r"\{(\w+)\}", pattern)) <= SLOTS.keys(), pattern
        assert set(re.findall(r"\{IN:(\w+)\}", pattern)) <= NESTED.keys(), pattern


def test_splits_share_no_utterance_and_no_slot_value(records):
    prompts = {split: {record["prompt"] for record in found} for split, found in records.items()}
    values = {
        split: {value for record in found for value in slot_values(record["completion"])}
        for split, found in records.items()
    }
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert prompts[one].isdisjoint(prompts[other])
        assert values[one].isdisjoint(values[other])
    for split, found in records.items():
        assert len(prompts[split]) == len(found) == SIZES[split]
        assert {split_of(value) for value in values[split]} == {split}


def test_every_split_has_every_intent_and_every_slot(records):
    for split, found in records.items():
        labels = {label for record in found for label in re.findall(r"(?:IN|SL):\w+", record["completion"])}
        assert labels == {f"IN:{name}" for name in INTENTS | NESTED} | {f"SL:{name}" for name in SLOTS}, split


def test_values_are_said_in_order_and_brackets_close(records):
    for record in records["validation"]:
        position = 0
        assert slot_values(record["completion"]), record
        for value in slot_values(record["completion"]):
            position = record["prompt"].index(value, position) + len(value)
        assert record["completion"].startswith(" [IN:") and record["prompt"].endswith(" =>")
        assert record["completion"].count("[") == record["completion"].count("]") == record["completion"].count(" ]")


def test_many_intents_and_some_nesting(records):
    assert len(INTENTS) >= 20
    depth = [len(re.findall(r"\[IN:", record["completion"])) for record in records["train"]]
    assert 0.1 < sum(count > 1 for count in depth) / len(depth) < 0.5


def test_a_seed_draws_the_same_and_another_does_not(tmp_path):
    sizes = {"validation": 20}
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_parse_data(tmp_path / folder, sizes, seed)
    a, b, c = ((tmp_path / folder / "validation.jsonl").read_text() for folder in "abc")
    assert a == b != c


def test_shares_of_the_splits():
    draws = random.Random(0)
    splits = [split_of(str(draws.random())) for _ in range(4000)]
    for split, share in SPLITS.items():
        assert splits.count(split) / len(splits) == pytest.approx(share, abs=0.03)


def test_typing_errors_stay_outside_of_slots():
    draws = random.Random(2)
    for _ in range(300):
        example = draw_example(draws, "test")
        assert all(value in example.utterance for value in slot_values(example.completion))


def test_the_command_writes_the_splits(tmp_path):
    assert cli.main(["parse-data", str(tmp_path), "--train", "30", "--validation", "5", "--test", "7"]) == 0
    counts = {split: len((tmp_path / f"{split}.jsonl").read_text().splitlines()) for split in SPLITS}
    assert counts == {"train": 30, "validation": 5, "test": 7}
