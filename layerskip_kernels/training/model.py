"""A model that can be trained for early exit: Transformers' own of any family, with a training forward that drops and
exits."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import ModelOutput

from layerskip_kernels.model.families import FAMILIES
from layerskip_kernels.training.exit_loss import exit_losses

__all__ = ["EarlyExitOutput", "EarlyExitTraining", "ExitPlan", "trainable_class"]

IGNORED = -100  # the label of a position that no loss counts


@dataclass
class ExitPlan:
    """What one forward pass does.

    ``weights``: layer -> e~(t, l); the layers above the last of them do not run. ``dropped``: bool [L, B], the samples
    that skip each layer (None: none). ``residual_scale``: what each layer's contribution is multiplied by (None: 1).
    ``draft_vocab``: the tokens that exits below the whole model choose from, int64 [n] (None: all). ``anchor``: how
    much these exits' states are held to those without adapters.
    """

    weights: dict[int, float]
    distillation: float = 0.0
    draft_vocab: Tensor | None = None
    anchor: float = 0.0
    dropped: Tensor | None = None
    residual_scale: list[float] | None = None
    rows_per_chunk: int = 1024


@dataclass
class EarlyExitOutput(ModelOutput):
    """``loss``: 0-d, what is trained. ``exit_cross_entropy``, ``exit_agreement``: fp32 [exits], in the order of the
    plan's layers. ``num_rows``: 0-d, the positions they are means over."""

    loss: Tensor | None = None
    exit_cross_entropy: Tensor | None = None
    exit_agreement: Tensor | None = None
    num_rows: Tensor | None = None


@functools.cache
def trainable_class(model_type: str) -> Any:
    """Transformers' causal language model of a family (a key of FAMILIES), with ``EarlyExitTraining`` before it."""
    theirs = getattr(transformers, FAMILIES[model_type].class_name)
    return type(f"LayerSkip{theirs.__name__}", (EarlyExitTraining, theirs), {})


class EarlyExitTraining(nn.Module):
    """The family's own forward, except where it is given an ``exit_plan`` beside ``labels``."""

    model: Any
    lm_head: Any
    config: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        exit_plan: ExitPlan | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Transformers' own output, or with ``exit_plan`` an ``EarlyExitOutput`` for tokens int64 [B, T].

        ``labels``: int64 [B, T], a position's own token, -100 where it is not to be learnt. ``num_items_in_batch``:
        how many labels the whole step has, over micro-batches and ranks (None: those of this call).
        """
        if exit_plan is None or labels is None or input_ids is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        layers, last = sorted(exit_plan.weights), len(self.model.layers) - 1
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        learnt = (targets.flatten() != IGNORED).nonzero().squeeze(1)
        states = self._states(input_ids, attention_mask, exit_plan)
        losses = exit_losses(
            [self._before_head(state.flatten(0, 1).index_select(0, learnt)) for state in states.values()],
            self.lm_head.weight,
            targets.flatten()[learnt],
            [exit_plan.weights[layer] for layer in layers],
            exit_plan.distillation,
            num_items_in_batch,
            exit_plan.rows_per_chunk,
            [None if layer == last else exit_plan.draft_vocab for layer in layers],
            getattr(self.config, "final_logit_softcapping", None),
        )
        loss, num_rows = losses.total, torch.tensor(learnt.numel(), device=learnt.device)
        drafting = {layer: state for layer, state in states.items() if layer < last}
        if exit_plan.anchor and drafting:
            moved = self._moved(input_ids, attention_mask, drafting)
            loss = loss + exit_plan.anchor * moved / (num_rows if num_items_in_batch is None else num_items_in_batch)
        return EarlyExitOutput(loss, losses.cross_entropy, losses.agreement, num_rows)

    def _moved(self, ids: Tensor, attention_mask: Tensor | None, states: dict[int, Tensor]) -> Tensor:
        """How far ``states``, of layers, are from those without adapters: |x - x'|^2 / |x'|^2, summed over exits and
        positions; 0-d."""
        with torch.no_grad(), _without_adapters(self):
            before = self._states(ids, attention_mask, ExitPlan(dict.fromkeys(states, 1.0)))
        total = ids.new_zeros((), dtype=torch.float32)
        for layer, state in states.items():
            there = before[layer].float()
            moved = (state.float() - there).square().sum(-1) / there.square().sum(-1)
            total = total + (moved if attention_mask is None else moved * attention_mask).sum()
        return total

    def _before_head(self, state: Tensor) -> Tensor:
        """What the LM head multiplies, for states [rows, D] of any layer; logits are divided here where a family has
        a divisor."""
        return self.model.norm(state) / getattr(self.config, "logits_scaling", 1.0)

    def _states(self, ids: Tensor, attention_mask: Tensor | None, plan: ExitPlan) -> dict[int, Tensor]:
        """What the plan's layers put out, by layer; [B, T, D] each. Embeddings, masks and RoPE are the family's own."""
        layers = self.model.layers[: max(plan.weights) + 1]
        kept = [None] * len(layers) if plan.dropped is None else _kept_rows(plan.dropped, ids.device)
        run = _Run()
        planned = [_PlannedLayer(layer, index, plan, kept[index], run) for index, layer in enumerate(layers)]
        with _in_place_of_layers(self.model, planned):
            self.model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
        return run.states


@dataclass
class _Run:
    """``states``: what the plan asks for, by layer. ``in_tuples``: whether the family's layers put out tuples, as many
    do in Transformers 4; the first layer, which no sample skips, tells."""

    states: dict[int, Tensor] = field(default_factory=dict)
    in_tuples: bool = False


class _PlannedLayer:
    """A layer as a plan runs it, on the samples ``kept`` (None: all), which do not skip it."""

    def __init__(self, layer: Any, index: int, plan: ExitPlan, kept: Tensor | None, run: _Run) -> None:
        self.layer, self.index, self.plan, self.kept, self.run = layer, index, plan, kept, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)  # some families ask a layer for its kind

    def __call__(self, x: Tensor, **inputs: Any) -> Any:
        out = self._on_kept(x, inputs)
        if self.index in self.plan.weights:
            self.run.states[self.index] = out
        return (out,) if self.run.in_tuples else out

    def _on_kept(self, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        if self.kept is None:
            return self._contribute(x, inputs)
        if not len(self.kept):
            return x
        subset = {name: _rows(value, self.kept, len(x)) for name, value in inputs.items()}
        return x.index_copy(0, self.kept, self._contribute(x.index_select(0, self.kept), subset))

    def _contribute(self, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        out = self.layer(x, **inputs)
        if isinstance(out, tuple):
            self.run.in_tuples, out = True, out[0]
        scale = 1.0 if self.plan.residual_scale is None else self.plan.residual_scale[self.index]
        return out if scale == 1.0 else x + scale * (out - x)


@contextmanager
def _in_place_of_layers(model: nn.Module, planned: list[_PlannedLayer]) -> Iterator[None]:
    """While it lasts, ``model.forward`` calls ``planned``: an attribute of the object hides the module of that name,
    which parameters and checkpoints still know."""
    model.__dict__["layers"] = planned
    try:
        yield
    finally:
        del model.__dict__["layers"]


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


def _kept_rows(dropped: Tensor, device: torch.device) -> list[Tensor | None]:
    """For each layer the samples that do not skip it, None where none does; moved to the device all at once."""
    rows = [(~skips).nonzero().squeeze(1) for skips in dropped]
    on_device = torch.cat(rows).to(device).split([len(part) for part in rows])
    return [part if len(part) < dropped.shape[1] else None for part in on_device]


def _rows(value: Any, kept: Tensor, batch: int) -> Any:
    """The kept samples of what a layer is given, which may have one row per sample."""
    if isinstance(value, tuple):
        return tuple(_rows(part, kept, batch) for part in value)
    if not isinstance(value, Tensor) or value.shape[0] != batch or batch == 1:
        return value
    return value.index_select(0, kept)
