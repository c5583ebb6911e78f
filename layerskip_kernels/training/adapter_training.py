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

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from layerskip_kernels.errors import shown
from layerskip_kernels.machine import has_bf16_units
from layerskip_kernels.model.exit_adapter import HEAD, AdapterKind
from layerskip_kernels.model.files import whole
from layerskip_kernels.model.json_file import parse_json
from layerskip_kernels.model.safetensors_file import (
    DTYPE_CODES,
    read_header,
    read_metadata,
    read_tensor,
    write_safetensors,
)
from layerskip_kernels.training.adapter_layers import AdapterInTraining
from layerskip_kernels.training.adapter_start import OwnWeights, lens
from layerskip_kernels.training.duration import duration
from layerskip_kernels.training.exit_states import ExitStates
from layerskip_kernels.training.written_texts import NOT_ASKED, Text

__all__ = ["AdaptSettings", "AdapterTraining", "say"]

Tensors = dict[str, Tensor]
HELD_OUT = 16  # every so many texts one is not trained on
SECONDS_BETWEEN_CHECKPOINTS = 60.0
UNKNOWN = -2  # a target outside the draft vocabulary: a draft there is wrong, whatever it is
SOFT = 0.7  # of the loss: the model's probabilities; the rest: its choice
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdaptSettings:
    """``num_tokens``: how many the model writes; ``exits`` and ``adapter_layers``: among which the adapter is chosen;
    ``most_words``: of the draft vocabulary; ``pilot_steps``: of each candidate's trial; ``passes``: over the texts;
    ``patience``: evaluations, one after each pass, without a gain before the training ends."""

    num_tokens: int = 300_000
    max_new_tokens: int = 160
    exits: tuple[int, ...] = ()
    adapter_layers: tuple[AdapterKind, ...] = (1,)
    most_words: int = 8192
    pilot_steps: int = 60
    passes: int = 4
    patience: int = 2
    texts_per_step: int = 8
    learning_rate: float = 1.5e-3
    seed: int = 0


class AdapterTraining:
    """The training of one adapter; its state goes into a file, and what resumes from it goes on to the same bits.

    ``states``: of the texts, at the exit and after the last layer. At every position of a text the adapter learns the
    model's probabilities among the words of ``vocab``, and its choice.
    """

    def __init__(
        self,
        own: OwnWeights,
        texts: Sequence[Text],
        states: ExitStates,
        vocab: Sequence[int],
        exit_layer: int,
        kind: AdapterKind,
        settings: AdaptSettings,
    ) -> None:
        self.exit_layer, self.settings, self._bf16 = exit_layer, settings, has_bf16_units()
        self._own, self._texts, self._states = own, texts, states
        self._vocab = torch.tensor(vocab)
        self._word_of = torch.full((own.head.size(0),), UNKNOWN)
        self._word_of[self._vocab] = torch.arange(len(vocab))
        self._held_out = [*range(HELD_OUT // 2, len(texts), HELD_OUT)] or [len(texts) - 1]
        self._trained_on = sorted({*range(len(texts))} - {*self._held_out})
        self.layers = self._started(kind)
        self._optimizer = torch.optim.AdamW(self.layers.parameters(), settings.learning_rate, (0.9, 0.95))
        self.step, self.acceptances = 0, [self.acceptance()]
        self.best: Tensors = self.layers.tensors(torch.float32)

    def _started(self, kind: AdapterKind) -> AdapterInTraining:
        """Layers and a head of their own: the LM head's rows after a `lens`, where there is none to start as."""
        own, last = self._own, self._own.config.num_layers
        first = own.first_adapter(self.exit_layer, kind)
        if HEAD not in first:
            shuffled = random.Random(self.settings.seed).sample(self._trained_on, len(self._trained_on))
            at_exit = (self._states.at(self.exit_layer, i) for i in shuffled)
            at_end = (self._states.at(last, i) for i in shuffled)
            bare = AdapterInTraining(own.config, self.exit_layer, first)
            first = {**first, HEAD: own.head[self._vocab] @ lens(bare, at_exit, at_end, own.norm)}
        return AdapterInTraining(own.config, self.exit_layer, first)

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
        states, real = self._batch(chosen, self.exit_layer)
        last, _ = self._batch(chosen, self._own.config.num_layers)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            logits = self.layers.logits(self.layers(states)[real]).float()
            with torch.no_grad():
                normed = self.layers.norm(last[real], self._own.norm)
                told = self.layers.logits(normed, self._own.head[self._vocab]).float()
        loss = SOFT * cross_entropy(logits, told.softmax(-1)) + (1 - SOFT) * cross_entropy(logits, told.argmax(-1))
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.layers.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def acceptance(self, num_words: int | None = None) -> float:
        """The share of held-out positions at which a draft would be what the model says: among the whole draft
        vocabulary, or its first ``num_words``."""
        right = count = 0
        for at in range(0, len(self._held_out), self.settings.texts_per_step):
            chosen = self._held_out[at : at + self.settings.texts_per_step]
            states, real = self._batch(chosen, self.exit_layer)
            targets = torch.tensor([target for i in chosen for target in self._texts[i].targets])
            asked = targets != NOT_ASKED
            said = self.layers.logits(self.layers(states)[real][asked])[:, :num_words].argmax(-1)
            right += int((said == self._word_of[targets[asked]]).sum())
            count += int(asked.sum())
        return right / max(1, count)

    def _batch(self, chosen: Sequence[int], layer: int) -> tuple[Tensor, Tensor]:
        """States [B, T, D] of some texts after ``layer`` layers, and where they are real, bool [B, T]."""
        length = max(len(self._texts[i].tokens) for i in chosen)
        states = torch.zeros(len(chosen), length, self._own.head.size(1))
        real = torch.zeros(len(chosen), length, dtype=torch.bool)
        for b, i in enumerate(chosen):
            kept = self._states.at(layer, i)
            states[b, : len(kept)] = kept
            real[b, : len(kept)] = True
        return states, real

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
