"""What a model says, to train its exit adapter on: texts that it writes itself, and its choices along given ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.engine.engine import Engine
from layerskip_kernels.engine.generation import Generation
from layerskip_kernels.model.files import write_whole
from layerskip_kernels.model.json_file import json_object
from layerskip_kernels.model.json_lines import json_lines_of
from layerskip_kernels.model.model import Model
from layerskip_kernels.training.exit_states import choices_after

__all__ = ["NOT_ASKED", "Text", "judged_texts", "pieces", "write_texts"]

NOT_ASKED = -1
BATCH = 24  # texts that are written at a time
QUESTION_TOKENS, START_TOKENS, MIN_QUESTION = 64, 16, 4
PIECE = 256  # tokens of a given text that are read together


@dataclass(frozen=True)
class Text:
    """``tokens``, and after each of them the token that the model chooses next, ``targets``, or NOT_ASKED."""

    tokens: list[int]
    targets: list[int]

    @property
    def num_targets(self) -> int:
        return sum(target != NOT_ASKED for target in self.targets)


def write_texts(
    model: Model,
    prompts: Sequence[list[int]],
    folder: Path,
    num_tokens: int,
    max_new_tokens: int,
    seed: int = 0,
    show: bool = False,
) -> list[Text]:
    """Texts of at least ``num_tokens`` tokens that the model writes greedily, a file of ``folder`` for each group of
    them; those that are there are read.

    Groups continue ``prompts``, and prompts that the model draws itself with a seed, in turns: questions where it has
    a chat template, beginnings of texts where it has none. So the adapter learns the model's own words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts: list[Text] = []
    group, written = 0, 0
    with tqdm(total=num_tokens, unit=" tokens", desc="writing texts", disable=not show) as bar:
        while written < num_tokens:
            path = folder / f"{group:06}.jsonl"
            if not path.exists():
                given = prompts[BATCH * (group // 2) :][:BATCH] if group % 2 == 0 else ()
                chosen = list(given) or own_prompts(model, (seed << 32) + group)
                write_whole(path, "".join(_line(text) for text in _continued(model, chosen, max_new_tokens)))
            found = _read(path, model)
            added = sum(text.num_targets for text in found)
            if not added:
                raise ValueError(f"{path} holds no text: the model ends every text at once")
            texts, written, group = texts + found, written + added, group + 1
            bar.update(added)
    return texts


def pieces(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Given texts as pieces of at most PIECE tokens. Raises ValueError where there are texts and no tokenizer."""
    if texts and model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer, which given texts need")
    ids = [model.tokenizer.encode(text) for text in texts] if model.tokenizer is not None else []
    found = [tokens[at : at + PIECE] for tokens in ids for at in range(0, len(tokens), PIECE)]
    return [piece for piece in found if len(piece) > 1]


def judged_texts(model: Model, texts: Sequence[list[int]], last: Iterable[Tensor], path: Path) -> list[Text]:
    """Given texts with what the model chooses after each token; kept in ``path``. ``last``: the states [T, D] that its
    last layer puts out for each."""
    if not path.exists():
        chosen = (choices_after(model, states) for states in last)
        write_whole(path, "".join(_line(Text(*pair)) for pair in zip(texts, chosen, strict=True)))
    return _read(path, model)


def own_prompts(model: Model, seed: int) -> list[list[int]]:
    """Prompts that the model draws itself at temperature 1, the same for the same seed."""
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer, without which it cannot begin a text")
    template = model.tokenizer.chat_template
    drawn = dict(strategy="autoregressive", temperature=1.0, top_p=0.95, skip_special_tokens=False)
    if template is None:
        start = [model.config.bos_token_id] if model.config.bos_token_id is not None else model.tokenizer.encode("\n")
        configs = [GenerationConfig(**drawn, max_new_tokens=START_TOKENS, seed=seed * BATCH + i) for i in range(BATCH)]  # type: ignore[arg-type]
        return [[*start, *generation.token_ids] for generation in _run(model, [start] * BATCH, configs)]
    mark = "\N{WHITE SQUARE}"
    before, _, after = template.render([{"role": "user", "content": mark}]).partition(mark)
    head, tail = (model.tokenizer.encode(part, add_special_tokens=False) for part in (before, after))
    configs = [GenerationConfig(**drawn, max_new_tokens=QUESTION_TOKENS, seed=seed * BATCH + i) for i in range(BATCH)]  # type: ignore[arg-type]
    questions = [g.token_ids[:-1] for g in _run(model, [head] * BATCH, configs) if g.finish_reason == "eos"]
    return [head + question + tail for question in questions if len(question) >= MIN_QUESTION]


def _continued(model: Model, prompts: Sequence[list[int]], max_new_tokens: int) -> Iterator[Text]:
    config = GenerationConfig("autoregressive", max_new_tokens=max_new_tokens)
    for prompt, generation in zip(prompts, _run(model, prompts, [config] * len(prompts)), strict=True):
        tokens = [*prompt, *generation.token_ids]
        yield Text(tokens[:-1], [NOT_ASKED] * (len(prompt) - 1) + tokens[len(prompt) :])


def _run(model: Model, prompts: Sequence[list[int]], configs: Sequence[GenerationConfig]) -> list[Generation]:
    engine = Engine(model, max_batch=BATCH)
    ids = [engine.add_request(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
    done = engine.run()
    return [done[request_id] for request_id in ids]


def _read(path: Path, model: Model) -> list[Text]:
    """The texts of a file. Raises ValueError naming the line that is damaged, and what to do."""
    most = model.config.vocab_size - 1
    try:
        fields = [json_object(value, where) for where, value in json_lines_of(path)]
        texts = [Text([*f.integers("tokens", 0, most)], [*f.integers("targets", NOT_ASKED, most)]) for f in fields]
        for text, said in zip(texts, fields, strict=True):
            if not 0 < len(text.tokens) == len(text.targets) <= model.config.max_positions:
                said.refuse("targets", f"one for each of 1..{model.config.max_positions} tokens")
    except ValueError as error:
        raise ValueError(f"{error}; delete {path} to have it made again") from error
    return texts


def _line(text: Text) -> str:
    return json.dumps({"tokens": text.tokens, "targets": text.targets}) + "\n"
