"""How long a training takes: estimated before it starts, and shown from its first step on."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layerskip_kernels.training.duration import duration

if TYPE_CHECKING:
    from layerskip_kernels.training.trainer import LayerSkipTrainer

__all__ = ["Progress", "announce", "measured_step_seconds"]

SECONDS_BETWEEN_LINES = 30.0


def announce(trainer: LayerSkipTrainer, steps_done: int = 0) -> None:
    """Say how many steps there are and how long they will take, by the time of one that is thrown away."""
    args = trainer.args
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = trainer.num_training_steps() - steps_done
    text = f"{steps} step{'s' * (steps != 1)} of {rows} rows"
    if steps > 0 and args.world_size == 1:
        seconds = measured_step_seconds(trainer)
        text += f"; at about {seconds:.2g} s each that is about {duration(seconds * steps)}, without evaluations"
    print(f"layerskip: {text}", file=sys.stderr, flush=True)


def measured_step_seconds(trainer: LayerSkipTrainer) -> float:
    """Forward and backward passes of a step, in seconds; no weight, random state or log is changed."""
    args, dataset = trainer.args, cast(Any, trainer.train_dataset)
    rows = [dataset[i] for i in range(min(args.train_batch_size, len(dataset)))]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    steps = 1 + (trainer.early_exit.draft_steps if trainer.early_exit is not None else 0)
    passes: list[float] = []
    model, was_training = trainer._model, trainer._model.training
    model.train()
    with torch.random.fork_rng():
        for step in (0, *range(min(steps, 2))):  # the first pass is to warm up; draft steps are alike
            trainer.state.global_step = step
            passes.append(_pass_seconds(trainer, inputs))
    trainer.state.global_step = 0
    model.train(was_training)
    whole, drafting = passes[1], passes[-1]
    return (whole + (steps - 1) * drafting) / steps * args.gradient_accumulation_steps


def _pass_seconds(trainer: LayerSkipTrainer, inputs: Any) -> float:
    start = time.perf_counter()
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer._model, dict(inputs))
    loss.backward()
    float(loss.detach())  # waits for a GPU
    trainer._model.zero_grad(set_to_none=True)
    trainer.forget_exit_losses()
    return time.perf_counter() - start


class Progress(TrainerCallback):
    """A line with rate and time left after the first step and about every half minute; a terminal has a bar instead."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._start = self._shown = time.monotonic()
        self._first = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now, done = time.monotonic(), state.global_step - self._first
        if args.disable_tqdm and state.is_world_process_zero:
            if done == 1 or now - self._shown >= SECONDS_BETWEEN_LINES:
                self._shown, rate = now, (now - self._start) / done
                left = duration(rate * (state.max_steps - state.global_step))
                line = f"step {state.global_step} of {state.max_steps}; {rate:.2g} s a step, about {left} left"
                print(line, file=sys.stderr, flush=True)
