"""The LM head and rule 6: the largest logit, the lowest index among equals, never NaN."""

import pytest
import torch

from layerskip_kernels.ops import reference
from support.models import threads

cpu = torch.ops.layerskip


def arguments(dtype, rows, vocab=101, hidden=50):
    generator = torch.Generator().manual_seed(rows)
    x, norm, head = (
        torch.randn(*s, generator=generator).to(dtype) for s in ((rows, hidden), (hidden,), (vocab, hidden))
    )
    return x, norm, head


@pytest.mark.parametrize("rows", [1, 2, 6, 9, 17])
@pytest.mark.parametrize("vocab", [1, 16, 101, 1000])
def test_same_bits(dtype, isa, rows, vocab):
    x, norm, head = arguments(dtype, rows, vocab)
    tokens, logits = cpu.norm_head_argmax(x, norm, cpu.pack_weight(head), vocab, 1e-5)
    expected_tokens, expected_logits = reference.norm_head_argmax(x, norm, head, vocab, 1e-5)
    assert torch.equal(logits, expected_logits) and logits.dtype == torch.float32
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(tokens, logits.argmax(dim=1))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_lowest_of_equals_wins(count):
    x, norm, head = arguments(torch.bfloat16, 1)
    best = int(reference.norm_head_argmax(x, norm, head, 101, 1e-5)[0])
    for twins in ([0, best], [best, 100], [3, 50, 97]):
        twin_head = head.clone()
        twin_head[twins] = head[best]
        for op, weight in ((cpu, cpu.pack_weight(twin_head)), (reference, twin_head)):
            with threads(count):
                assert int(op.norm_head_argmax(x, norm, weight, 101, 1e-5)[0]) == min([best, *twins])


def test_nan_raises():
    x, norm, head = arguments(torch.bfloat16, 2)
    x[1, 3] = torch.nan
    for op, weight in ((cpu, cpu.pack_weight(head)), (reference, head)):
        with pytest.raises(RuntimeError, match="a logit is NaN"):
            op.norm_head_argmax(x, norm, weight, 101, 1e-5)
