"""The losses of several exits at once, chunk by chunk: the logits of all rows or of all exits never exist together.

For a chunk of rows the LM head is applied to each exit's state, the cross-entropy's gradient by the logits is formed
in place of the logits, and at once multiplied into the gradients by the states and by the head. So the forward pass
leaves gradients of the states' and the head's sizes, and memory for one chunk's logits is all that the vocabulary
costs: rows_per_chunk * V floats, twice where exits learn from the last layer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ExitLosses", "exit_losses"]


@dataclass(frozen=True, slots=True)
class ExitLosses:
    """``total``: 0-d, differentiable, sum_e coefficient_e * loss_e. ``cross_entropy`` fp32 [exits]: each exit's mean
    cross-entropy with the labels, in nats. ``agreement`` fp32 [exits]: the share of rows where an exit's argmax is
    the last exit's."""

    total: Tensor
    cross_entropy: Tensor
    agreement: Tensor


def exit_losses(
    states: list[Tensor],
    head: Tensor,
    labels: Tensor,
    coefficients: list[float],
    distillation: float = 0.0,
    num_items: Tensor | int | None = None,
    rows_per_chunk: int = 1024,
    vocabularies: list[Tensor | None] | None = None,
    softcap: float | None = None,
) -> ExitLosses:
    """Weighted cross-entropy of several exits through one LM head.

    ``states``: per exit [rows, D], after the final norm, the whole model's last. ``head``: [V, D]. ``labels``: int64
    [rows], none of them ignored. ``coefficients``: per exit. ``distillation`` a: every exit but the last is trained on
    (1 - a) * label + a * softmax(last exit), through which no gradient flows. ``num_items``: what the sums over rows
    are divided by (None: rows). ``vocabularies``: per exit the tokens it chooses from, int64 [n] of 0..V-1 (None: all,
    as for the last exit); a row whose label is not among them counts as 0 there, and the last exit's prediction is
    taken among them. ``softcap`` c: logits are c tanh(logits / c) (None: as they are). The products run in autocast's
    dtype where autocast is on; sums are fp32.
    """
    vocabularies = [None] * len(states) if vocabularies is None else vocabularies
    if len(states) != len(coefficients):
        raise ValueError(f"coefficients must be one per exit, got {len(coefficients)} for {len(states)} exits")
    if len(states) != len(vocabularies):
        raise ValueError(f"vocabularies must be one per exit, got {len(vocabularies)} for {len(states)} exits")
    rows = labels.numel()
    divisor = rows if num_items is None else num_items
    grad = torch.is_grad_enabled()
    state_grad = grad and any(state.requires_grad for state in states)
    head_grad = grad and head.requires_grad
    settings = _Settings(coefficients, distillation, rows_per_chunk, vocabularies, softcap, state_grad, head_grad)
    total, sums, agreeing = _ExitLosses.apply(settings, head, labels, *states)
    return ExitLosses(total / divisor, sums / max(rows, 1), agreeing / max(rows, 1))


@dataclass(frozen=True, slots=True)
class _Settings:
    coefficients: list[float]
    distillation: float
    rows_per_chunk: int
    vocabularies: list[Tensor | None]
    softcap: float | None
    state_grad: bool
    head_grad: bool  # not where the head is frozen, as with adapters

    @property
    def needs_grad(self) -> bool:
        return self.state_grad or self.head_grad


class _Head:
    """What an exit chooses from: ``weight`` [n, D] of the tokens ``ids`` int64 [n] (None: all)."""

    def __init__(self, weight: Tensor, ids: Tensor | None) -> None:
        self.ids, self.weight = ids, weight if ids is None else weight[ids]
        if ids is not None:
            self.places = ids.new_full((len(weight),), -1)  # token -> its place in ids, -1 where it has none
            self.places[ids] = torch.arange(len(ids), device=ids.device)

    def targets(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The labels' places, int64 [rows, 1], and which rows have one, bool [rows, 1] (None: all)."""
        if self.ids is None:
            return labels.unsqueeze(1), None
        places = self.places[labels].unsqueeze(1)
        return places.clamp(min=0), places >= 0

    def tokens(self, argmax: Tensor) -> Tensor:
        return argmax if self.ids is None else self.ids[argmax]

    def among(self, probs: Tensor) -> Tensor:
        """Probabilities of all tokens -> of these, given that it is one of them."""
        if self.ids is None:
            return probs
        chosen = probs[:, self.ids]
        return chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).tiny)


class _ExitLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _Settings, head: Tensor, labels: Tensor, *states: Tensor) -> Any:
        dtype = _compute_dtype(head)
        weight = head.detach().to(dtype)
        heads = [_Head(weight, ids) for ids in settings.vocabularies]
        inputs = [state.detach().to(dtype) for state in states]
        ctx.head_grad = weight.new_zeros(head.shape, dtype=_sum_dtype(dtype)) if settings.head_grad else None
        ctx.state_grads = [torch.empty_like(state) if settings.state_grad else None for state in states]
        sums = torch.zeros(len(states), dtype=_sum_dtype(dtype), device=head.device)
        agreeing, total = torch.zeros_like(sums), sums.new_zeros(())
        for start in range(0, labels.numel(), settings.rows_per_chunk):
            chunk = slice(start, start + settings.rows_per_chunk)
            total += _chunk(ctx, settings, heads, labels[chunk], inputs, chunk, sums, agreeing)
        ctx.dtypes = head.dtype, [state.dtype for state in states]
        ctx.mark_non_differentiable(sums, agreeing)
        return total, sums, agreeing

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        head_dtype, state_dtypes = ctx.dtypes
        head = None if ctx.head_grad is None else (ctx.head_grad * grad).to(head_dtype)
        pairs = zip(ctx.state_grads, state_dtypes, strict=True)
        states = [None if state is None else (state * grad).to(dtype) for state, dtype in pairs]
        return None, head, None, *states


def _compute_dtype(head: Tensor) -> torch.dtype:
    device = head.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for the gradient checks."""
    return torch.promote_types(dtype, torch.float32)


def _chunk(
    ctx: Any,
    settings: _Settings,
    heads: list[_Head],
    labels: Tensor,
    inputs: list[Tensor],
    chunk: slice,
    sums: Tensor,
    agreeing: Tensor,
) -> Tensor:
    """The weighted loss of one chunk of rows; the last exit goes first, as the others learn from it."""
    total = sums.new_zeros(())
    last = len(inputs) - 1
    predicted: Tensor | None = None
    best: Tensor | None = None
    for exit_index in range(last, -1, -1):
        state, coefficient, head = inputs[exit_index][chunk], settings.coefficients[exit_index], heads[exit_index]
        index, counted = head.targets(labels)
        logits = (state @ head.weight.T).to(sums.dtype)
        slope: Tensor | None = None
        if settings.softcap is not None:
            logits.div_(settings.softcap).tanh_()
            slope = 1.0 - logits.square() if settings.needs_grad else None
            logits.mul_(settings.softcap)
        argmax = head.tokens(logits.argmax(-1))
        best = argmax if best is None else best
        agreeing[exit_index] += (argmax == best).sum()
        log_probs = logits.log_softmax(-1)
        del logits
        hard = -_of(counted, log_probs.gather(1, index)).sum()
        sums[exit_index] += hard
        share = settings.distillation if exit_index < last else 0.0
        teacher = head.among(predicted) if share and predicted is not None else None
        soft = hard if teacher is None else -_of(counted, (teacher * log_probs).sum(-1, keepdim=True)).sum()
        total += coefficient * ((1.0 - share) * hard + share * soft)
        probs = log_probs.exp_()
        if exit_index == last and settings.distillation and last > 0:
            predicted = probs.clone() if settings.needs_grad else probs
        if settings.needs_grad:
            grad = _logit_grad(probs, index, teacher, share, coefficient)
            grad = grad if slope is None else grad.mul_(slope)
            _accumulate(ctx, exit_index, chunk, state, head, _of(counted, grad))
    return total


def _of(counted: Tensor | None, values: Tensor) -> Tensor:
    """``values`` [rows, n], 0 in the rows that do not count."""
    return values if counted is None else values.mul_(counted)


def _logit_grad(probs: Tensor, index: Tensor, teacher: Tensor | None, share: float, coefficient: float) -> Tensor:
    """d loss / d logits = coefficient * (softmax - target), in the memory of ``probs``."""
    if teacher is not None:
        probs.sub_(teacher, alpha=share)
    probs.scatter_add_(1, index, torch.full_like(index, share - 1.0, dtype=probs.dtype))
    return probs.mul_(coefficient)


def _accumulate(ctx: Any, exit_index: int, chunk: slice, state: Tensor, head: _Head, grad: Tensor) -> None:
    grad = grad.to(head.weight.dtype)
    if ctx.state_grads[exit_index] is not None:
        ctx.state_grads[exit_index][chunk] = grad @ head.weight
    if ctx.head_grad is not None:
        part = grad.T @ state
        if head.ids is None:
            ctx.head_grad += part
        else:
            ctx.head_grad.index_add_(0, head.ids, part.to(ctx.head_grad.dtype))
