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
) -> ExitLosses:
    """Weighted cross-entropy of several exits through one LM head.

    ``states``: per exit [rows, D], after the final norm, the whole model's last. ``head``: [V, D]. ``labels``: int64
    [rows], none of them ignored. ``coefficients``: per exit. ``distillation`` a: every exit but the last is trained on
    (1 - a) * label + a * softmax(last exit), through which no gradient flows. ``num_items``: what the sums over rows
    are divided by (None: rows). The products run in autocast's dtype where autocast is on; sums are fp32.
    """
    if len(states) != len(coefficients):
        raise ValueError(f"coefficients must be one per exit, got {len(coefficients)} for {len(states)} exits")
    rows = labels.numel()
    divisor = rows if num_items is None else num_items
    grad = torch.is_grad_enabled()
    state_grad = grad and any(state.requires_grad for state in states)
    settings = _Settings(coefficients, distillation, rows_per_chunk, state_grad, grad and head.requires_grad)
    total, sums, agreeing = _ExitLosses.apply(settings, head, labels, *states)
    return ExitLosses(total / divisor, sums / max(rows, 1), agreeing / max(rows, 1))


@dataclass(frozen=True, slots=True)
class _Settings:
    coefficients: list[float]
    distillation: float
    rows_per_chunk: int
    state_grad: bool
    head_grad: bool  # not where the head is frozen, as with adapters

    @property
    def needs_grad(self) -> bool:
        return self.state_grad or self.head_grad


class _ExitLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _Settings, head: Tensor, labels: Tensor, *states: Tensor) -> Any:
        dtype = _compute_dtype(head)
        weight = head.detach().to(dtype)
        inputs = [state.detach().to(dtype) for state in states]
        ctx.head_grad = weight.new_zeros(head.shape, dtype=_sum_dtype(dtype)) if settings.head_grad else None
        ctx.state_grads = [torch.empty_like(state) if settings.state_grad else None for state in states]
        sums = torch.zeros(len(states), dtype=_sum_dtype(dtype), device=head.device)
        agreeing, total = torch.zeros_like(sums), sums.new_zeros(())
        for start in range(0, labels.numel(), settings.rows_per_chunk):
            chunk = slice(start, start + settings.rows_per_chunk)
            total += _chunk(ctx, settings, weight, labels[chunk], inputs, chunk, sums, agreeing)
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
    weight: Tensor,
    labels: Tensor,
    inputs: list[Tensor],
    chunk: slice,
    sums: Tensor,
    agreeing: Tensor,
) -> Tensor:
    """The weighted loss of one chunk of rows; the last exit goes first, as the others learn from it."""
    total = sums.new_zeros(())
    index, last = labels.unsqueeze(1), len(inputs) - 1
    teacher = best = None
    for exit_index in range(last, -1, -1):
        state, coefficient = inputs[exit_index][chunk], settings.coefficients[exit_index]
        logits = (state @ weight.T).to(_sum_dtype(weight.dtype))
        argmax = logits.argmax(-1)
        best = argmax if best is None else best
        agreeing[exit_index] += (argmax == best).sum()
        log_probs = logits.log_softmax(-1)
        del logits
        hard = -log_probs.gather(1, index).sum()
        sums[exit_index] += hard
        share = settings.distillation if exit_index < last else 0.0
        soft = -(teacher * log_probs).sum() if share and teacher is not None else hard
        total += coefficient * ((1.0 - share) * hard + share * soft)
        probs = log_probs.exp_()
        if exit_index == last and settings.distillation and last > 0:
            teacher = probs.clone() if settings.needs_grad else probs
        if settings.needs_grad:
            _accumulate(ctx, exit_index, chunk, state, weight, _logit_grad(probs, index, teacher, share, coefficient))
    return total


def _logit_grad(probs: Tensor, index: Tensor, teacher: Tensor | None, share: float, coefficient: float) -> Tensor:
    """d loss / d logits = coefficient * (softmax - target), in the memory of ``probs``."""
    if share and teacher is not None:
        probs.sub_(teacher, alpha=share)
    probs.scatter_add_(1, index, torch.full_like(index, share - 1.0, dtype=probs.dtype))
    return probs.mul_(coefficient)


def _accumulate(ctx: Any, exit_index: int, chunk: slice, state: Tensor, weight: Tensor, grad: Tensor) -> None:
    grad = grad.to(weight.dtype)
    if ctx.state_grads[exit_index] is not None:
        ctx.state_grads[exit_index][chunk] = grad @ weight
    if ctx.head_grad is not None:
        ctx.head_grad += grad.T @ state
