"""A Llama that can be trained for early exit: Transformers' own, with a training forward that drops and exits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput

from layerskip_kernels.training.exit_loss import exit_losses

__all__ = ["EarlyExitOutput", "ExitPlan", "LayerSkipLlama"]

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


class LayerSkipLlama(LlamaForCausalLM):
    """``LlamaForCausalLM``, except where ``forward`` is given an ``exit_plan`` beside ``labels``."""

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
            [self.model.norm(state.flatten(0, 1).index_select(0, learnt)) for state in states.values()],
            self.lm_head.weight,
            targets.flatten()[learnt],
            [exit_plan.weights[layer] for layer in layers],
            exit_plan.distillation,
            num_items_in_batch,
            exit_plan.rows_per_chunk,
            [None if layer == last else exit_plan.draft_vocab for layer in layers],
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

    def _states(self, ids: Tensor, attention_mask: Tensor | None, plan: ExitPlan) -> dict[int, Tensor]:
        """What the plan's layers put out, by layer; [B, T, D] each."""
        x = self.model.embed_tokens(ids)
        position_ids = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        rotary = self.model.rotary_emb(x, position_ids=position_ids)
        kept = [None] * len(self.model.layers) if plan.dropped is None else _kept_rows(plan.dropped, x.device)
        states = {}
        for index in range(max(plan.weights) + 1):
            x = self._run_layer(index, x, mask, rotary, plan, kept[index])
            if index in plan.weights:
                states[index] = x
        return states

    def _run_layer(self, index: int, x: Tensor, mask: Any, rotary: Any, plan: ExitPlan, kept: Tensor | None) -> Tensor:
        """One layer, on the samples ``kept`` (None: all), which do not skip it."""
        if kept is None:
            return self._contribute(index, x, mask, rotary, plan)
        if not len(kept):
            return x
        subset = x.index_select(0, kept)
        kept_mask, kept_rotary = _rows(mask, kept, len(x)), tuple(_rows(part, kept, len(x)) for part in rotary)
        return x.index_copy(0, kept, self._contribute(index, subset, kept_mask, kept_rotary, plan))

    def _contribute(self, index: int, x: Tensor, mask: Any, rotary: Any, plan: ExitPlan) -> Tensor:
        out = self.model.layers[index](x, attention_mask=mask, position_embeddings=rotary, use_cache=False)
        scale = 1.0 if plan.residual_scale is None else plan.residual_scale[index]
        return out if scale == 1.0 else x + scale * (out - x)


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


def _rows(tensor: Tensor | None, kept: Tensor, batch: int) -> Tensor | None:
    """The kept samples of something that may have one row per sample."""
    if tensor is None or tensor.shape[0] != batch or batch == 1:
        return tensor
    return tensor.index_select(0, kept)
