"""The chunked losses of several exits, against autograd on whole logits, and what they hold in memory."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from layerskip_kernels.training.exit_loss import exit_losses

ROWS, WIDTH, VOCAB = 23, 7, 31


def inputs(exits: int = 3, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype).requires_grad_() for _ in range(exits)]
    head = torch.randn(VOCAB, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    return states, head, torch.randint(VOCAB, (ROWS,), generator=generator)


def plain(states: list[Tensor], head: Tensor, labels: Tensor, coefficients: list[float], share: float) -> Tensor:
    logits = [state @ head.T for state in states]
    target = logits[-1].detach().softmax(-1)
    losses = [(1 - share) * cross_entropy(x, labels) + share * cross_entropy(x, target) for x in logits[:-1]]
    return sum(c * loss for c, loss in zip(coefficients, [*losses, cross_entropy(logits[-1], labels)], strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, ROWS, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(share: float, rows_per_chunk: int) -> None:
    states, head, labels = inputs()
    coefficients = [0.1, 0.2, 0.7]
    found = exit_losses(states, head, labels, coefficients, share, rows_per_chunk=rows_per_chunk)
    (2.0 * found.total).backward()
    grads = [tensor.grad.clone() for tensor in (*states, head)]
    for tensor in (*states, head):
        tensor.grad = None
    expected = plain(states, head, labels, coefficients, share)
    (2.0 * expected).backward()
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=0)
    for grad, tensor in zip(grads, (*states, head), strict=True):
        torch.testing.assert_close(grad, tensor.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rows_per_chunk", [4, 1000])
def test_an_exit_may_choose_among_some_tokens(rows_per_chunk: int) -> None:
    states, head, labels = inputs()
    ids = torch.tensor([1, 4, 5, 9, 12, 13, 17, 20, 21, 22, 28, 30])
    counted = (labels[:, None] == ids).any(1)
    assert 0 < counted.sum() < ROWS
    vocabularies = [ids, ids, None]
    found = exit_losses(
        states, head, labels, [0.1, 0.2, 0.7], 0.3, rows_per_chunk=rows_per_chunk, vocabularies=vocabularies
    )
    found.total.backward()
    grads = [tensor.grad.clone() for tensor in (*states, head)]
    for tensor in (*states, head):
        tensor.grad = None
    logits = [state @ head.T for state in states]
    places = (labels[counted, None] == ids).int().argmax(1)
    target = logits[-1].detach()[counted][:, ids].softmax(-1)
    expected = 0.7 * cross_entropy(logits[-1], labels)
    for coefficient, exit_logits in zip((0.1, 0.2), logits, strict=False):
        chosen = exit_logits[counted][:, ids]
        loss = 0.7 * cross_entropy(chosen, places, reduction="sum")
        loss = loss + 0.3 * cross_entropy(chosen, target, reduction="sum")
        expected = expected + coefficient * loss / ROWS
    expected.backward()
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=0)
    for grad, tensor in zip(grads, (*states, head), strict=True):
        torch.testing.assert_close(grad, tensor.grad, rtol=1e-10, atol=1e-14)
    agreeing = (ids[logits[0][:, ids].argmax(-1)] == logits[-1].argmax(-1)).double().mean().item()
    assert found.agreement[0].item() == pytest.approx(agreeing)


def test_gradcheck() -> None:
    states, head, labels = inputs()

    # without distillation: its target is held constant, which finite differences do not do
    def loss(head: Tensor, *states: Tensor) -> Tensor:
        return exit_losses(list(states), head, labels, [0.1, 0.2, 0.7], rows_per_chunk=5).total

    assert torch.autograd.gradcheck(loss, (head, *states))


def test_cross_entropy_and_agreement_of_each_exit() -> None:
    states, head, labels = inputs()
    found = exit_losses(states, head, labels, [0.0, 0.0, 1.0], rows_per_chunk=4)
    logits = [state @ head.T for state in states]
    expected = [cross_entropy(x, labels).item() for x in logits]
    assert found.cross_entropy.tolist() == pytest.approx(expected)
    best = [x.argmax(-1) for x in logits]
    assert found.agreement.tolist() == pytest.approx([(b == best[-1]).double().mean().item() for b in best])


def test_num_items_divides_the_sum() -> None:
    states, head, labels = inputs()
    mean = exit_losses(states, head, labels, [0.2, 0.3, 0.5])
    parts = exit_losses(states, head, labels, [0.2, 0.3, 0.5], num_items=2 * ROWS)
    torch.testing.assert_close(parts.total * 2, mean.total)
    assert parts.cross_entropy.tolist() == mean.cross_entropy.tolist()


def test_autocast_products_are_in_bf16_and_gradients_keep_their_dtype() -> None:
    states, head, labels = inputs(dtype=torch.float32)
    exact = exit_losses(states, head, labels, [0.2, 0.3, 0.5]).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = exit_losses(states, head, labels, [0.2, 0.3, 0.5]).total
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)
    rounded.backward()
    assert {tensor.grad.dtype for tensor in (*states, head)} == {torch.float32}


def test_no_gradient_for_a_frozen_head() -> None:
    states, head, labels = inputs()
    frozen = head.detach()
    exit_losses(states, frozen, labels, [0.2, 0.3, 0.5]).total.backward()
    grads = [state.grad.clone() for state in states]
    for state in states:
        state.grad = None
    exit_losses(states, head, labels, [0.2, 0.3, 0.5]).total.backward()
    assert frozen.grad is None
    assert all(torch.equal(grad, state.grad) for grad, state in zip(grads, states, strict=True))


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of operations held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_memory_is_a_chunk_of_logits_whatever_the_rows_and_exits(share: float) -> None:
    rows, width, vocab, chunk, exits = 512, 8, 4096, 32, 6
    states = [torch.randn(rows, width).requires_grad_() for _ in range(exits)]
    head, labels = torch.randn(vocab, width).requires_grad_(), torch.randint(vocab, (rows,))
    with LiveBytes() as memory:
        exit_losses(states, head, labels, [1.0] * exits, share, rows_per_chunk=chunk).total.backward()
    logits = 4 * chunk * vocab
    kept = 4 * (2 * exits * rows * width + 3 * vocab * width)  # gradients and their scaled copies
    assert memory.peak < 4 * logits + kept
    with LiveBytes() as memory:
        plain(states, head, labels, [1.0] * exits, share).backward()
    assert memory.peak > exits * 4 * rows * vocab  # what it would be, and that the measure sees it
