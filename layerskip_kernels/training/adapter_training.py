"""One exit adapter's training: steps, evaluations on held-out texts, and a state that it resumes from exactly."""

from __future__ import annotations

import json
import math
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from layerskip_kernels.errors import shown
from layerskip_kernels.model.files import whole
from layerskip_kernels.model.json_file import parse_json
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.model import Model
from layerskip_kernels.model.safetensors_file import (
    DTYPE_CODES,
    read_header,
    read_metadata,
    read_tensor,
    write_safetensors,
)
from layerskip_kernels.model.tensor_names import layer_shapes
from layerskip_kernels.training.adapter_layers import AdapterInTraining
from layerskip_kernels.training.duration import duration
from layerskip_kernels.training.exit_states import ExitStates
from layerskip_kernels.training.written_texts import NOT_ASKED, Text

__all__ = ["AdaptSettings", "AdapterTraining", "OwnWeights", "say"]

Tensors = dict[str, Tensor]
HELD_OUT = 16  # every so many texts one is not trained on
SECONDS_BETWEEN_CHECKPOINTS = 60.0
UNKNOWN = -2  # a target outside the draft vocabulary: a draft there is wrong, whatever it is
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdaptSettings:
    """``num_tokens``: how many the model writes; ``exits`` and ``adapter_layers``: among which the adapter is chosen;
    ``most_words``: of the draft vocabulary; ``pilot_steps``: of each candidate's trial; ``passes``: over the texts;
    ``patience``: evaluations, one after each pass, without a gain before the training ends."""

    num_tokens: int = 300_000
    max_new_tokens: int = 160
    exits: tuple[int, ...] = ()
    adapter_layers: tuple[int, ...] = (1,)
    most_words: int = 8192
    pilot_steps: int = 60
    passes: int = 12
    patience: int = 2
    texts_per_step: int = 16
    learning_rate: float = 1e-3
    seed: int = 0


class OwnWeights:
    """Tensors of a model as numbers, fp32: its LM head [V, D], and what an adapter starts as: ``start``, or the
    model's last layers."""

    def __init__(self, source: Any, most_layers: int, start: Tensors | None = None) -> None:
        checkpoint = read_checkpoint(source, torch.float32, on_demand=True)
        self._start = start
        self.config, tensors = checkpoint.config, checkpoint.tensors
        self.head = tensors.pop("model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight")
        self._norm = tensors.pop("model.norm.weight")
        names, last = layer_shapes(self.config), self.config.num_layers
        self._last = [{name: tensors.pop(f"model.layers.{last - n}.{name}") for name in names}
                      for n in range(most_layers, 0, -1)]  # fmt: skip

    def first_adapter(self, num_layers: int) -> Tensors:
        """What an adapter of so many layers starts as."""
        if self._start is not None:
            return self._start
        copied = enumerate(self._last[len(self._last) - num_layers :])
        layers = {f"layers.{n}.{name}": tensor for n, layer in copied for name, tensor in layer.items()}
        return {"norm.weight": self._norm, **layers}


class AdapterTraining:
    """The training of one adapter; its state goes into a file, and what resumes from it goes on to the same bits."""

    def __init__(
        self,
        model: Model,
        own: OwnWeights,
        texts: Sequence[Text],
        vocab: Sequence[int],
        exit_layer: int,
        num_layers: int,
        settings: AdaptSettings,
        folder: Path,
    ) -> None:
        self.exit_layer, self.settings = exit_layer, settings
        self.layers = AdapterInTraining(own.config, exit_layer, own.first_adapter(num_layers))
        self._texts = texts
        self._states = ExitStates(
            model, exit_layer, [text.tokens for text in texts], folder / f"states-{exit_layer}.bin", sys.stderr.isatty()
        )
        self._head = own.head[torch.tensor(vocab)]
        self._word_of = torch.full((own.head.size(0),), UNKNOWN)
        self._word_of[torch.tensor(vocab)] = torch.arange(len(vocab))
        self._held_out = [*range(HELD_OUT // 2, len(texts), HELD_OUT)] or [len(texts) - 1]
        self._trained_on = sorted({*range(len(texts))} - {*self._held_out})
        self._optimizer = torch.optim.AdamW(self.layers.parameters(), settings.learning_rate, (0.9, 0.95))
        self.step, self.acceptances = 0, [self.acceptance()]
        self.best: Tensors = self.layers.tensors(torch.float32)

    @property
    def steps_per_pass(self) -> int:
        return max(1, len(self._trained_on) // self.settings.texts_per_step)

    def run(self, state_file: Path) -> None:
        """Train until the passes are over or ``patience`` of them have gained nothing."""
        if state_file.exists():
            self._resume(state_file)
        saved = begun = time.monotonic()
        first = self.step
        while self.step < self.steps_per_pass * self.settings.passes and not self.has_ended:
            self.take_step(self.steps_per_pass * self.settings.passes)
            if self.step % self.steps_per_pass == 0:
                self._evaluate()
                self._keep(state_file)
                pace = (time.monotonic() - begun) / (self.step - first)
                left = pace * (self.steps_per_pass * self.settings.passes - self.step)
                say(
                    f"pass {self.step // self.steps_per_pass} of {self.settings.passes}: "
                    f"{self.acceptances[-1]:.1%} of held-out drafts right; at most {duration(left)} left"
                )
            elif time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                self._keep(state_file)
                saved = time.monotonic()

    @property
    def has_ended(self) -> bool:
        """Whether the last evaluations gained nothing."""
        recent = self.acceptances[-self.settings.patience :]
        return len(self.acceptances) > self.settings.patience and max(recent) < max(self.acceptances)

    def take_step(self, planned: int) -> float:
        """One step on some texts, in an order that seed and pass decide; returns its loss."""
        number, within = divmod(self.step, self.steps_per_pass)
        order = random.Random(f"{self.settings.seed} {number}").sample(self._trained_on, len(self._trained_on))
        chosen = order[within * self.settings.texts_per_step :][: self.settings.texts_per_step]
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * _schedule(self.step, planned)
        states, targets = self._batch(chosen)
        asked = targets >= 0
        loss = cross_entropy(self.layers.logits(self.layers(states)[asked], self._head), targets[asked])
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.layers.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def acceptance(self, num_words: int | None = None, words: Sequence[int] = ()) -> float:
        """The share of held-out positions at which a draft would be what the model says: among the whole draft
        vocabulary, or only the rows ``words`` of it."""
        head = self._head if num_words is None else self._head[torch.tensor(words[:num_words])]
        right = count = 0
        for at in range(0, len(self._held_out), self.settings.texts_per_step):
            states, targets = self._batch(self._held_out[at : at + self.settings.texts_per_step])
            asked = targets != NOT_ASKED
            said = self.layers.logits(self.layers(states)[asked], head).argmax(-1)
            said = said if num_words is None else torch.tensor(words)[said]
            right += int((said == targets[asked]).sum())
            count += int(asked.sum())
        return right / max(1, count)

    def _batch(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """States [B, T, D] of some texts, and after each position the row of the head that is to win, [B, T]."""
        length = max(len(self._texts[i].tokens) for i in chosen)
        states = torch.zeros(len(chosen), length, self._head.size(1))
        targets = torch.full((len(chosen), length), NOT_ASKED)
        for b, i in enumerate(chosen):
            own = torch.tensor(self._texts[i].targets)
            states[b, : len(own)] = self._states[i]
            targets[b, : len(own)] = torch.where(own == NOT_ASKED, NOT_ASKED, self._word_of[own])
        return states, targets

    def _evaluate(self) -> None:
        self.acceptances.append(self.acceptance())
        if self.acceptances[-1] >= max(self.acceptances):
            self.best = self.layers.tensors(torch.float32)

    def _keep(self, path: Path) -> None:
        """Write all that the next steps depend on, so that nobody ever sees half of it."""
        tensors = {f"now.{name}": tensor for name, tensor in self.layers.tensors(torch.float32).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{number}": moments[name] for name in MOMENTS}
        shapes = {name: (DTYPE_CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        said = {"step": str(self.step), "acceptances": json.dumps(self.acceptances)}
        with whole(path) as unfinished:
            write_safetensors(unfinished, shapes, tensors.items(), said)

    def _resume(self, path: Path) -> None:
        try:
            kept = self._read(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete {path} to train from the beginning") from error
        self.best = {name: kept[f"best.{name}"] for name in self.best}
        self.layers.take({name: kept[f"now.{name}"] for name in self.best})
        state = self._optimizer.state_dict()
        state["state"] = {
            number: {
                "step": torch.tensor(float(self.step)),
                **{m: kept[f"{m}.{number}"] for m in ("exp_avg", "exp_avg_sq")},
            }
            for number in state["param_groups"][0]["params"]
        }
        self._optimizer.load_state_dict(state)

    def _read(self, path: Path) -> Tensors:
        """What `_keep` has written; step and acceptances are taken over. Raises ValueError naming the file."""
        entries, said = read_header(path), read_metadata(path)
        shapes = {
            f"{part}.{name}": tuple(tensor.shape) for part in ("now", "best") for name, tensor in self.best.items()
        }
        for number, parameter in enumerate(self.layers.parameters()):
            shapes |= {f"{name}.{number}": tuple(parameter.shape) for name in MOMENTS}
        if {name: entry.shape for name, entry in entries.items() if entry.dtype == "F32"} != shapes:
            raise ValueError(f"{path} has other tensors than the state of this training")
        acceptances = parse_json(said.get("acceptances", ""), f"{path}: acceptances")
        numbers = acceptances if isinstance(acceptances, list) else []
        if not numbers or not all(type(number) in (int, float) and 0 <= number <= 1 for number in numbers):
            raise ValueError(f"{path}: acceptances must be a list of numbers in 0..1, got {shown(acceptances)}")
        if not re.fullmatch(r"\d{1,9}", said.get("step", "")):
            raise ValueError(f"{path}: step must be a number of steps, got {shown(said.get('step'))}")
        kept = {name: read_tensor(entry) for name, entry in entries.items()}
        for name, tensor in kept.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{path} is damaged: {name} holds numbers that are not finite")
        self.step, self.acceptances = int(said["step"]), numbers
        return kept


def _schedule(step: int, planned: int) -> float:
    """Of the learning rate: a short rise, then half a cosine down to a tenth."""
    rise = max(1, min(50, planned // 10))
    return (step + 1) / rise if step < rise else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / (planned - rise)))


def say(text: str) -> None:
    print(f"layerskip: {text}", file=sys.stderr, flush=True)
