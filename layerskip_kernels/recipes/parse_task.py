"""A semantic-parsing task in the manner of TOPv2: an utterance -> its intent and slots, in brackets.

    wake me up at 7 am tomorrow => [IN:CREATE_ALARM [SL:DATE_TIME at 7 am tomorrow ] ]

Utterances are drawn from ``parse_grammar``, with politeness, fillers and typing errors around the slots. The splits
share no utterance and no slot value: a hash decides which split a value belongs to, whatever slot it fills.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from layerskip_kernels.recipes.parse_grammar import AFTER, BEFORE, INTENTS, NESTED, SLOTS
from layerskip_kernels.recipes.parse_values import RULES

__all__ = ["SPLITS", "Example", "Node", "draw_example", "draw_examples", "split_of", "write_parse_data"]

SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}  # each split's share of the slot values
PROMPT_END = " =>"
TOKEN = re.compile(r"\(|\)|\[|\]|\||<\w+>|\{[\w:]+\}|[^()\[\]|<>{}]+")
TRIES = 40  # for a slot's value that belongs to the split; after that another pattern is drawn


@dataclass
class Node:
    """An intent (``IN:...``) or a slot (``SL:...``): words, and slots or intents, in the order they are said."""

    label: str
    parts: list[str | Node] = field(default_factory=list)

    def words(self) -> str:
        """What was said."""
        return _spaced("".join(part if isinstance(part, str) else part.words() for part in self.parts))

    def brackets(self) -> str:
        """The parse. Words that are in no slot, and those around an intent inside a slot, are left out."""
        nested = [part.brackets() for part in self.parts if isinstance(part, Node)]
        inner = nested or ([self.words()] if self.label.startswith("SL:") else [])
        return " ".join([f"[{self.label}", *inner, "]"])


@dataclass(frozen=True)
class Example:
    """``prompt``: what the model is given. ``completion``: what it should say, a space first."""

    utterance: str
    tree: Node

    @property
    def prompt(self) -> str:
        return self.utterance + PROMPT_END

    @property
    def completion(self) -> str:
        return " " + self.tree.brackets()


def write_parse_data(folder: Path, sizes: dict[str, int], seed: int = 0) -> None:
    """Write SPLIT.jsonl ({"prompt", "completion"} a line) with ``sizes[SPLIT]`` different utterances each."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for example in draw_examples(split, size, seed):
                file.write(json.dumps({"prompt": example.prompt, "completion": example.completion}) + "\n")


def draw_examples(split: str, size: int, seed: int = 0) -> Iterator[Example]:
    """The first ``size`` examples of a split, no utterance twice."""
    draws, seen = random.Random(f"{seed} {split}"), set[str]()
    while len(seen) < size:
        example = draw_example(draws, split)
        if example.utterance not in seen:
            seen.add(example.utterance)
            yield example


def split_of(value: str) -> str:
    """The split that a slot value belongs to, in any slot: a function of its words alone."""
    number = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") / 2**64
    for split, share in SPLITS.items():
        if number < share:
            return split
        number -= share
    return split


def draw_example(draws: random.Random, split: str) -> Example:
    """One utterance, all of whose slot values belong to ``split``."""
    while True:
        intent = draws.choice(sorted(INTENTS))
        try:
            tree = Node(f"IN:{intent}", _expand(draws.choice(INTENTS[intent]), draws, split))
        except _NoValueError:
            continue
        return Example(_said(tree, draws), tree)


class _NoValueError(Exception):
    """No value of a slot that belongs to the split was found."""


def _expand(pattern: str, draws: random.Random, split: str) -> list[str | Node]:
    """The parts of one drawing of a pattern."""
    parts, position = _sequence(_tokens(pattern), 0, draws, split)
    assert position == len(_tokens(pattern)), f"unbalanced pattern: {pattern}"
    return parts


@cache
def _tokens(pattern: str) -> tuple[str, ...]:
    return tuple(TOKEN.findall(pattern))


def _sequence(tokens: tuple[str, ...], position: int, draws: random.Random, split: str) -> tuple[list[str | Node], int]:
    """Alternatives up to a closing bracket or the end; one of them is drawn, all are passed over."""
    branches, depth = [position], 0
    while position < len(tokens) and not (depth == 0 and tokens[position] in ")]"):
        depth += (tokens[position] in "([") - (tokens[position] in ")]")
        position += 1
        if depth == 0 and tokens[position - 1] == "|":
            branches.append(position)
    end = position
    position, parts = draws.choice(branches), []
    while position < end and tokens[position] != "|":
        found, position = _item(tokens, position, draws, split)
        parts += found
    return parts, end


def _item(tokens: tuple[str, ...], position: int, draws: random.Random, split: str) -> tuple[list[str | Node], int]:
    token = tokens[position]
    if token in ("(", "["):
        parts, end = _sequence(tokens, position + 1, draws, split)
        return ([] if token == "[" and draws.random() < 0.5 else parts), end + 1
    if token[0] == "<":
        return _expand(draws.choice(RULES[token[1:-1]]), draws, split), position + 1
    if token.startswith("{IN:"):
        name = token[4:-1]
        return [Node(f"IN:{name}", _expand(draws.choice(NESTED[name]), draws, split))], position + 1
    if token[0] == "{":
        return [_slot(token[1:-1], draws, split)], position + 1
    return [token], position + 1


def _slot(name: str, draws: random.Random, split: str) -> Node:
    """A slot whose value belongs to the split, or that holds an intent whose slots do."""
    for _ in range(TRIES):
        node = Node(f"SL:{name}", _expand(draws.choice(SLOTS[name]), draws, split))
        if any(isinstance(part, Node) for part in node.parts):
            return node
        value = node.words()
        if split_of(value) == split:
            return Node(node.label, [value])
    raise _NoValueError(name)


def _said(tree: Node, draws: random.Random) -> str:
    """The utterance: as the tree says it, perhaps with words before and after it, a typing error, a question mark."""
    before = draws.choice(BEFORE) if draws.random() < 0.3 else ""
    after = draws.choice(AFTER) if draws.random() < 0.2 else ""
    parts = [_mistyped(part, draws) if isinstance(part, str) else part.words() for part in tree.parts]
    return _spaced(f"{before} {''.join(parts)} {after}")


def _mistyped(words: str, draws: random.Random) -> str:
    """Words outside of slots, one in twenty-five times with two letters swapped or one lost or doubled."""
    places = [match.start() for match in re.finditer(r"(?<=[a-z])[a-z](?=[a-z])", words)]
    if not places or draws.random() > 0.04:
        return words
    place = draws.choice(places)
    letter, rest = words[place], words[place + 1 :]
    changed = draws.choice([rest[0] + letter + rest[1:], rest, letter + letter + rest])
    return words[:place] + changed


def _spaced(words: str) -> str:
    return " ".join(words.split())
