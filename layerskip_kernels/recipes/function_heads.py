"""Prompts in the shape of HumanEval's, made up: a function's head out of lists, its docstring in a model's own words.

    python -m layerskip_kernels.recipes.function_heads OUTPUT.jsonl --count N [--seed S] [--model MODEL]

writes {"prompt"} a line, for ``layerskip adapt --prompts``: what a model will be asked for is what its drafts must be
trained on, and this way nobody's texts are needed.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count as count_from
from pathlib import Path

from tqdm import tqdm

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.engine.engine import Engine
from layerskip_kernels.model.files import write_whole
from layerskip_kernels.model.loading import load_model
from layerskip_kernels.model.model import Model

__all__ = ["function_heads", "head"]

VERBS = (
    "add all any append apply arrange balance build calculate can capitalize cast check choose chunk clean "
    "clamp closest collapse combine common compare compress compute concatenate convert correct count create "
    "cube cut decode decrypt delete derive detect difference digits divide double drop encode encrypt ensure "
    "estimate evaluate even exchange expand extract factorize fill filter find first fix flatten flip format "
    "generate get group guess has index insert interleave intersect invert join keep last leftmost length "
    "letters list locate longest make map match max maximum mean median merge min minimize minimum mirror move "
    "multiply nearest next normalize number odd order pack pair parse partition pick pluck prefix previous "
    "product prune rank read reduce remove reorder repeat replace rescale reverse rotate round sample scale "
    "search second select separate shift shortest shuffle sign simplify skip smallest solve sort specialize "
    "split square strip sum swap tally test toggle total transform translate triangle trim truncate unique "
    "unpack update validate verify weigh will words wrap zip"
).split()
ADJECTIVES = (
    "adjacent alternating balanced big closest common consecutive cumulative decimal distinct double duplicate "
    "empty even equal fibonacci first increasing integer last largest leading longest lowercase matching "
    "missing monotonic nearest negative nested next odd overlapping palindromic positive prime repeated rolling "
    "second shortest simple smallest sorted special third trailing unique uppercase valid weighted"
).split()
NOUNS = (
    "account amount anagram angle area array average bits blocks books box brackets bill bytes cells change "
    "characters circle coins collatz columns consonants coordinates cycle date days deck depth diagonal "
    "dictionary difference digits distance divisor elements expression factorial factors file flight fraction "
    "fruit game grades graph grid hash height histogram hours index intersection interval items keys letters "
    "lines list matrix maximum median message minimum multiples name neighbors nodes notes number numbers pairs "
    "palindrome parentheses password path peaks perimeter planets points polynomial positions power prefix "
    "price primes product queue range ratio rectangle remainder roots rows score sentence sequence series "
    "shapes side slope square stack steps string strings subarray substring suffix sum sums tree triangle "
    "tuples value values vector vowels water weights width words year zeros"
).split()
PARAMETERS = (
    ("lst", "list"), ("numbers", "List[int]"), ("numbers", "List[float]"), ("l", "list"), ("n", "int"),
    ("s", "str"), ("text", "str"), ("strings", "List[str]"), ("arr", "List[int]"), ("x", "int"), ("string", "str"),
    ("words", "List[str]"), ("nums", "list"), ("a", "int"), ("values", "List[Any]"), ("word", "str"), ("d", "dict"),
    ("matrix", "List[List[int]]"), ("number", "float"), ("sentence", "str"), ("points", "List[Tuple[int, int]]"),
    ("grid", "list"), ("date", "str"),
)  # fmt: skip
MORE = (
    ("k", "int"), ("b", "int"), ("m", "int"), ("t", "str"), ("threshold", "float"), ("target", "int"),
    ("substring", "str"), ("y", "int"), ("delimiter", "str"), ("c", "int"), ("prefix", "str"), ("q", "list"),
    ("base", "int"), ("other", "list"),
)  # fmt: skip
RESULTS = ("int", "bool", "str", "float", "List[int]", "List[str]", "List[float]", "Tuple[int, int]", "list", "dict")
DRAWN, BATCH = 96, 24  # heads that are drawn together, and docstrings that are written at a time
TOKENS = 80  # of a docstring, at most
QUOTES = '"""'


def head(drawn: random.Random) -> tuple[str, str]:
    """A function's head up to the quotes of its docstring, and the function's name."""
    name = "_".join(
        [drawn.choice(VERBS)]
        + [drawn.choice(ADJECTIVES)] * (drawn.random() < 0.3)
        + [drawn.choice(NOUNS)] * (drawn.random() < 0.9)
    )
    typed = drawn.random() < 0.5
    parameters = [drawn.choice(PARAMETERS), *drawn.sample(MORE, drawn.choices((0, 1, 2), (6, 5, 1))[0])]
    said = ", ".join(f"{p}: {kind}" if typed else p for p, kind in parameters)
    result = f" -> {drawn.choice(RESULTS)}" if typed else ""
    imported = sorted({kind for kind in ("Any", "List", "Tuple") if kind in said + result})
    before = f"from typing import {', '.join(imported)}\n\n\n" if imported else drawn.choice(("", "\n", "\n\n"))
    opened = drawn.choice((f"{QUOTES} ", QUOTES, f"{QUOTES}\n    "))
    return f"{before}def {name}({said}){result}:\n    {opened}", name


def function_heads(model: Model, count: int, seed: int = 0) -> Iterator[str]:
    """``count`` prompts that end with their docstring, the same for the same seed; ``model`` draws the docstrings at
    temperature 0.8. Half of them end with a doctest, whose first characters it is given."""
    drawn = random.Random(seed)
    for batch in count_from(seed << 20, 2 * DRAWN):
        heads = [head(drawn) for _ in range(DRAWN)]
        begun = [text for text, _ in heads]
        found = _with_docstrings(model, begun, batch)
        tested = []
        for i, text in found[::2]:
            sentence = text[len(begun[i]) :].partition(">>>")[0].removesuffix(QUOTES).rstrip()
            tested.append(f"{begun[i]}{sentence}\n    >>> {heads[i][1]}(")
        for _, text in [*found[1::2], *_with_docstrings(model, tested, batch + DRAWN)]:
            yield text
            count -= 1
            if not count:
                return


def _with_docstrings(model: Model, begun: Sequence[str], seed: int) -> list[tuple[int, str]]:
    """The texts whose docstring comes to an end as the model continues them, with their places."""
    drawn = GenerationConfig("autoregressive", max_new_tokens=TOKENS, temperature=0.8, top_p=0.95, stop=QUOTES)
    configs = [replace(drawn, seed=seed + i) for i in range(len(begun))]
    engine = Engine(model, max_batch=BATCH)
    ids = [engine.add_request(text, config) for text, config in zip(begun, configs, strict=True)]
    done = engine.run()
    ended = [(i, done[ids[i]]) for i in range(len(begun)) if done[ids[i]].finish_reason == "stop"]
    return [(i, f"{begun[i]}{generation.text}{QUOTES}") for i, generation in ended if (generation.text or "").strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", metavar="OUTPUT.jsonl")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="prompts (2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of heads and docstrings (0)")
    parser.add_argument("--model", metavar="MODEL", help="whose words the docstrings are (the default model)")
    args = parser.parse_args()
    model = load_model(args.model)
    prompts = tqdm(function_heads(model, args.count, args.seed), total=args.count, unit=" prompts")
    write_whole(Path(args.output), "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


if __name__ == "__main__":
    main()
