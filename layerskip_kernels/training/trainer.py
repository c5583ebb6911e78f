"""Transformers' ``Trainer``, with layer dropout and the early-exit loss in each step."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layerskip_kernels.machine import usable_cores
from layerskip_kernels.model.draft_vocab import read_draft_vocab
from layerskip_kernels.model.files import write_whole
from layerskip_kernels.model.json_file import read_json_object
from layerskip_kernels.training.dropout import LayerDropout, dropped_samples
from layerskip_kernels.training.early_exit import EarlyExitLoss
from layerskip_kernels.training.kept import contents_of, holds
from layerskip_kernels.training.model import ExitPlan
from layerskip_kernels.training.text_data import SimilarLengths

__all__ = ["LayerSkipTrainer", "MarkComplete", "MetricsFile", "SaveOnSignal", "check_checkpoint", "last_checkpoint"]

COMPLETE = "complete"  # in a checkpoint's folder once all of it is written: JSON, the contents of each file


class LayerSkipTrainer(Trainer):
    """``Trainer`` for a model with ``EarlyExitTraining``, or for one with LoRA adapters around it.

    ``layer_dropout``, ``early_exit``: the recipe (None: without it). ``eval_exits``: the exit layers that evaluation
    looks at, beside the last. ``similar_lengths``: batches of rows about as long as each other. Steps are optimizer
    steps, of ``args.max_steps``.
    """

    def __init__(
        self,
        *args: Any,
        layer_dropout: LayerDropout | None = None,
        early_exit: EarlyExitLoss | None = None,
        eval_exits: tuple[int, ...] = (),
        similar_lengths: bool = False,
        **kwargs: Any,
    ) -> None:
        self.similar_lengths = similar_lengths
        super().__init__(*args, **kwargs)
        self.layer_dropout = layer_dropout
        self.early_exit = early_exit
        self.num_layers = int(self._model.config.num_hidden_layers)
        self.eval_exits = tuple(sorted({*eval_exits, self.num_layers}))
        self._draft_vocab = None
        if early_exit is not None and early_exit.draft_vocab is not None:
            ids = read_draft_vocab(Path(early_exit.draft_vocab))
            if not ids or not 0 <= min(ids) <= max(ids) < self._model.config.vocab_size:
                last = self._model.config.vocab_size - 1
                raise ValueError(f"early_exit.draft_vocab: {early_exit.draft_vocab} must hold token ids in 0..{last}")
            self._draft_vocab = torch.tensor(ids, device=self.args.device)
        self._exit_losses: dict[int, list[Tensor]] = {}

    @property
    def _model(self) -> Any:
        assert self.model is not None  # Trainer's own attribute may be None before it is made
        return self.model

    @property
    def _rows_per_chunk(self) -> int:
        """A GPU wants larger pieces: up to 2^25 logits (128 MiB) at once, one launch each instead of many."""
        at_least = ExitPlan.rows_per_chunk
        return at_least if self.args.device.type == "cpu" else max(at_least, 2**25 // self._model.config.vocab_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.similar_lengths:
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(row) for row in dataset["input_ids"]]
        return SimilarLengths(lengths, self.args.train_batch_size * self.args.world_size, self.args.seed)

    def plan(self, step: int, rows: int) -> ExitPlan:
        """What the forward pass of ``rows`` samples does at ``step``."""
        plan = ExitPlan({self.num_layers - 1: 1.0}, rows_per_chunk=self._rows_per_chunk, draft_vocab=self._draft_vocab)
        if self.early_exit is not None:
            plan.anchor = self.early_exit.anchor
            plan.weights = self.early_exit.normalised(self.num_layers, step, self.state.max_steps)
            if self.num_layers - 1 in plan.weights:  # else there is no teacher
                plan.distillation = self.early_exit.distillation
        if self.layer_dropout is not None:
            probabilities = self.layer_dropout.probabilities(self.num_layers, step, self.state.max_steps)
            plan.dropped = dropped_samples(self.layer_dropout, probabilities, step, rows)
            if self.layer_dropout.inverse_density:
                plan.residual_scale = [1.0 / (1.0 - probability) for probability in probabilities]
        return plan

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted loss of the exits of this step, and their cross-entropies kept for the log."""
        plan = self.plan(self.state.global_step, len(inputs["input_ids"]))
        loss, outputs = super().compute_loss(
            model, {**inputs, "exit_plan": plan}, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        # Read when they are logged: reading them here would make the CPU wait for a GPU in every step.
        for layer, value in zip(sorted(plan.weights), outputs.exit_cross_entropy, strict=True):
            self._exit_losses.setdefault(layer + 1, []).append(value)
        return (loss, outputs) if return_outputs else loss

    def forget_exit_losses(self) -> None:
        """Leave what was computed so far out of the next log."""
        self._exit_losses.clear()

    def num_training_steps(self) -> int:
        """Optimizer steps of the whole training, as Trainer counts them."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        dataset: Any = self.train_dataset
        batches = math.ceil(len(dataset) / (self.args.train_batch_size * self.args.world_size))
        per_epoch = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        return math.ceil(self.args.num_train_epochs * per_epoch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds ``loss_exit_E``: the mean cross-entropy of each exit since the last log, on this rank."""
        if "loss" in logs:
            logs |= {f"loss_exit_{e}": float(torch.stack(v).mean()) for e, v in sorted(self._exit_losses.items())}
            self.forget_exit_losses()
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Cross-entropy of every exit of ``eval_exits`` and how often its argmax is the last layer's.

        ``{prefix}_loss_exit_E`` in nats per token, ``{prefix}_agreement_exit_E``: the acceptance of a single draft
        where the text so far is that of the data.
        """
        self._memory_tracker.start()
        model = self._wrap_model(self._model, training=False)
        model.eval()
        weights = {exit_layer - 1: 1.0 for exit_layer in self.eval_exits}
        plan = ExitPlan(weights, rows_per_chunk=self._rows_per_chunk, draft_vocab=self._draft_vocab)
        sums = torch.zeros(2, len(self.eval_exits), dtype=torch.float64, device=self.args.device)
        rows = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for batch in self.get_eval_dataloader(eval_dataset):
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                outputs = model(**self._prepare_inputs(batch), exit_plan=plan)
            sums += outputs.num_rows * torch.stack([outputs.exit_cross_entropy, outputs.exit_agreement])
            rows += outputs.num_rows
        sums, rows = self.accelerator.reduce(sums), self.accelerator.reduce(rows)
        metrics: dict[str, float] = {}
        for index, exit_layer in enumerate(self.eval_exits):
            metrics[f"{metric_key_prefix}_loss_exit_{exit_layer}"] = float(sums[0, index] / rows)
            metrics[f"{metric_key_prefix}_agreement_exit_{exit_layer}"] = float(sums[1, index] / rows)
        metrics[f"{metric_key_prefix}_loss"] = metrics[f"{metric_key_prefix}_loss_exit_{self.num_layers}"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once it is written, so that one cut short by a kill is never resumed from; with what is in it.

    (But for random states of several processes, of which each writes its own.)
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = _output(args) / f"checkpoint-{state.global_step}"
            files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.match("rng_state_*")]
            contents = {str(path.relative_to(folder)): contents_of(path) for path in files}
            write_whole(folder / COMPLETE, json.dumps(contents, indent=1) + "\n")


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is complete."""
    found = [path.parent for path in output_dir.glob(f"checkpoint-*/{COMPLETE}")]
    numbered = [path for path in found if path.name.removeprefix("checkpoint-").isdecimal()]
    return max(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def check_checkpoint(checkpoint: Path) -> None:
    """Raise ValueError naming the file of a complete checkpoint that is not as it was written."""
    written = read_json_object(checkpoint / COMPLETE).values
    for name, contents in written.items():
        if not holds(checkpoint / name, contents):
            raise ValueError(
                f"{checkpoint / name} is damaged: it is not as it was written; delete {checkpoint} to go on from the "
                "checkpoint before it, or from the beginning"
            )


def _output(args: TrainingArguments) -> Path:
    assert args.output_dir is not None  # Transformers sets it when the caller does not
    return Path(args.output_dir)


class SaveOnSignal(TrainerCallback):
    """SIGTERM and SIGINT: finish the step, save, and end the training; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.received is not None:
            control.should_save = control.should_training_stop = True
        return control


class MetricsFile(TrainerCallback):
    """Appends what is logged to ``metrics.jsonl`` in the output folder, a JSON object a line; first, where it runs."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._write(args, state, {"device": device_name(args.device), "processes": args.world_size})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs:
            self._write(args, state, logs)

    def _write(self, args: TrainingArguments, state: TrainerState, fields: Mapping[str, Any]) -> None:
        if state.is_world_process_zero:
            with (_output(args) / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "time": time.time(), **fields}) + "\n")


def device_name(device: torch.device) -> str:
    """The model of a GPU; for the CPU how many cores there are to run on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{usable_cores()} CPU cores"
