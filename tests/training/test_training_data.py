"""Texts to rows, a vocabulary of their own, and the Python corpus."""

import ast
import email
import json
from itertools import chain
from pathlib import Path

import pytest
import tokenizers
import torch

from layerskip_kernels.recipes.python_corpus import (
    Distribution,
    distributions,
    functions_with_docstrings,
    licence_of,
    write_corpus,
)
from layerskip_kernels.training.config import read_config
from layerskip_kernels.training.text_data import (
    END_OF_TEXT,
    Collator,
    SimilarLengths,
    packed_rows,
    prompt_rows,
    read_texts,
    train_tokenizer,
)

CODE = '''\
import os
from math import sqrt as root, pi

class Circle:
    def radius(self, area: float) -> float:
        """The radius of a circle of that area.

        >>> Circle().radius(3.0) < 1.0
        True
        """
        return root(area / pi)

    def _bare(self) -> None:
        return os.getcwd()
'''


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    train_tokenizer([CODE] * 3, 300, path)
    return tokenizers.Tokenizer.from_file(str(path))


def test_a_vocabulary_covers_any_text_and_starts_it_with_end_of_text(tokenizer: tokenizers.Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    for text in (CODE, "never seen: Ωμέγα\t\x00 ", ""):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer.encode(CODE).ids) < 0.6 * len(CODE)


def test_packed_rows_hold_every_token_in_order(tokenizer: tokenizers.Tokenizer) -> None:
    texts = ["return pi", "import os\n" * 9, "x"]
    rows = [row["input_ids"] for row in packed_rows(texts, tokenizer, 0, 7)]
    expected = [0]
    for text in texts:
        expected += [*tokenizer.encode(text, add_special_tokens=False).ids, 0]
    assert {len(row) for row in rows} == {7}
    assert list(chain.from_iterable(rows)) == expected[: len(expected) // 7 * 7]


def test_prompt_rows_learn_the_completion_alone(tokenizer: tokenizers.Tokenizer) -> None:
    record = {"prompt": "import ", "completion": "os"}
    [row] = prompt_rows([record], tokenizer, 0, 32)
    learnt = [label for label in row["labels"] if label != -100]
    assert row["input_ids"][: -len(learnt)] == tokenizer.encode("import ").ids  # as generate will tokenise it
    assert tokenizer.decode(learnt[:-1]) == "os"
    assert learnt[-1] == 0
    with pytest.raises(ValueError, match=r"data\.sequence_length must be at least"):
        list(prompt_rows([record], tokenizer, 0, 3))


def test_a_batch_is_padded_where_rows_differ_and_counts_what_is_predicted() -> None:
    batch = Collator(9)([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert Collator(9)([{"input_ids": [1, 2]}] * 2).keys() == {"input_ids", "labels"}
    assert batch["labels"].dtype == torch.int64


def test_records_are_checked_and_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "domain": "c"}\n{"completion": "b"}\n')
    records = read_texts([path])
    assert next(records) == {"prompt": "a", "completion": "b"}
    with pytest.raises(ValueError, match=r"data.jsonl:2 must be"):
        next(records)


def test_functions_come_with_the_imports_they_use() -> None:
    [text] = functions_with_docstrings(CODE, ast.parse(CODE))
    assert text.startswith("from math import sqrt as root, pi\n\n\ndef radius(self, area: float)")
    assert text.endswith("    return root(area / pi)\n")
    ast.parse(text)


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: Apache-2.0 OR BSD-2-Clause", "Apache-2.0 OR BSD-2-Clause"),
        ("License: MIT", "MIT"),
        ("Classifier: License :: OSI Approved :: BSD License\nLicense: see LICENSE", "BSD License"),
        ("License: BSD\nClassifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)", None),
        ("License-Expression: MPL-2.0 AND MIT", None),
        ("Summary: says nothing", None),
    ],
)
def test_only_permissive_licences_count(metadata: str, licence: str | None) -> None:
    assert licence_of(email.message_from_string(metadata + "\n")) == licence


def package(root: Path, name: str, version: str, licence: str, text: str) -> None:
    info = root / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\nLicense: {licence}\n")
    (root / name).mkdir(exist_ok=True)
    (root / name / "code.py").write_text(text)
    (info / "RECORD").write_text(f"{name}/code.py,,\n{name}/tests/test_code.py,,\n")


def test_a_corpus_holds_no_text_twice_and_nothing_of_human_eval(tmp_path: Path) -> None:
    from layerskip_kernels.evaluation.prompts import human_eval_prompts

    package(tmp_path / "old", "circles", "1.9", "MIT", "x = 1\n")
    package(tmp_path / "new", "circles", "1.10", "MIT", CODE)
    package(tmp_path / "new", "copies", "1", "BSD", CODE.replace("    ", "\t"))  # the same but for white space
    package(tmp_path / "new", "closed", "1", "GPL", "y = 2\n")
    package(tmp_path / "new", "leaked", "1", "MIT", human_eval_prompts(1)[0][1] + "    return False\n")
    roots = [tmp_path / "old", tmp_path / "new"]
    found = {d.name: d.version for d in distributions(roots)}
    assert found == {"circles": "1.10", "copies": "1", "leaked": "1"}
    assert isinstance(distributions(roots)[0], Distribution)

    write_corpus(tmp_path / "out", roots)
    splits = {name: (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "validation")}
    texts = [json.loads(line)["text"] for lines in splits.values() for line in lines]
    assert len(texts) == 2  # the file and its one documented function
    assert len(splits["validation"]) == 1
    sources = json.loads((tmp_path / "out" / "sources.json").read_text())
    assert sources == {"circles": {"version": "1.10", "licence": "MIT", "characters": sum(map(len, texts))}}


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("layerskip_kernels/recipes/configs/*.yaml")))
def test_the_configs_that_are_shipped_are_valid(path: Path) -> None:
    config = read_config(path)
    layers = config.model.sizes["num_hidden_layers"] if config.model.sizes else 30
    if config.early_exit is not None:
        assert sum(config.early_exit.normalised(layers, 0, 100).values()) == pytest.approx(1.0)


def test_batches_of_similar_lengths_come_in_random_order() -> None:
    lengths = torch.randint(5, 60, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = SimilarLengths(lengths, run=8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(100)) and list(sampler) == first
    runs = [[lengths[i] for i in first[start : start + 8]] for start in range(0, 96, 8)]
    assert all(max(run) - min(run) <= 10 for run in runs)  # of 55
    middles = [run[4] for run in runs]
    assert middles != sorted(middles) and middles != sorted(middles, reverse=True)
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(100)) and list(sampler) != first
