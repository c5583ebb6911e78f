"""Every Triton kernel against the reference, bit for bit: on a GPU where there is one, else interpreted on the CPU.

Sizes are tiny where kernels are interpreted, one NumPy call for each operation; on a GPU there are more of them.
"""

import sys
from dataclasses import replace

import pytest
import torch

from layerskip_kernels import triton_ops
from layerskip_kernels.ops import reference
from layerskip_kernels.triton_ops import launch, tuned
from layerskip_kernels.triton_ops.integer_rows import Rows
from layerskip_kernels.triton_ops.out_residual import linear_residual
from layerskip_kernels.triton_ops.rms_norm import from_segments
from support.models import GPU
from support.triton_arguments import DEVICE, assert_equal, attention_case, on_device, packed, random

ROWS = [1, 3, 8, 17] if GPU else [1, 3, 9]
SIZES = [(7, 5), (100, 33), *([(2048, 256)] if GPU else [])]


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 88.8, 89.1, -103.9, -104.1, 127.9, 128.0, -128.0, 200.0, -200.0]


@pytest.mark.parametrize("name", ["exp", "silu", "gelu", "tanh", "log", "inverse_sqrt"])
def test_elementary_functions(name):
    spread = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 40
    x = torch.cat([spread, torch.tensor([*SPECIAL, torch.inf, -torch.inf, torch.nan])])
    assert_equal(getattr(triton_ops, name)(x.to(DEVICE)), getattr(reference, name)(x))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_linear(dtype, rows, inputs, outputs):
    x, weight, bias = (
        random(rows, inputs, dtype=dtype),
        random(outputs, inputs, dtype=dtype),
        random(outputs, dtype=dtype),
    )
    got = triton_ops.linear(*on_device(x, packed(weight), bias), outputs)
    assert_equal(got, reference.linear(x, weight, bias, outputs))


def test_a_sum_in_another_order_is_noticed():
    """The negative control: what a plain matrix product gives differs somewhere."""
    x, weight = random(9, 576, dtype=torch.float32), random(48, 576, dtype=torch.float32)
    assert not torch.equal(triton_ops.linear(*on_device(x, packed(weight), None), 48).cpu(), x @ weight.T)


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 5), (64, 16), (100, 33), (584, 40)])
def test_packing(dtype, inputs, outputs):
    weight, rows = random(outputs, inputs, dtype=dtype), torch.tensor([outputs - 1, 0, 3])
    assert torch.equal(triton_ops.packing.unpack_weight(packed(weight), outputs, inputs).cpu(), weight)
    assert torch.equal(triton_ops.select_rows(packed(weight), rows), packed(weight[rows]))
    assert torch.equal(
        triton_ops.embed_tokens(rows.to(DEVICE), packed(weight), inputs, weight.dtype).cpu(), weight[rows]
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [50, 300, 1088, *([2048, 8256] if GPU else [])])
def test_rms_norm(dtype, rows, size):
    x, weight = random(rows, size, dtype=dtype), random(size, dtype=dtype)
    assert_equal(triton_ops.rms_norm(*on_device(x, weight), 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_out_residual_and_down_residual(dtype, rows, bias):
    x, weight, residual = (random(*s, dtype=dtype, seed=rows) for s in ((rows, 100), (33, 100), (rows, 33)))
    added = random(33, dtype=dtype) if bias else None
    got = triton_ops.out_residual(*on_device(x, packed(weight), added, residual))
    assert_equal(got, reference.out_residual(x, weight, added, residual))
    got = triton_ops.down_residual(*on_device(x, packed(weight), residual))
    assert_equal(got, reference.down_residual(x, weight, residual))


@pytest.fixture(params=[False, True], ids=["whole tree", "split"])
def programs_of_tiles(request, monkeypatch):
    """How many programs have a tile of the output projection: as configured, and as launched, one after the other."""
    monkeypatch.setattr(launch, "config_of", lambda op: replace(tuned.config_of(op), split=request.param))
    launched = []
    out_residual = sys.modules[linear_residual.__module__]

    class Kernel:
        def __getitem__(self, grid, kernel=out_residual._linear_residual_kernel):
            def run(**arguments):
                launched.append(grid[1] // -(-arguments["N"] // arguments["C"]))
                kernel[grid](**arguments)

            return run

    monkeypatch.setattr(out_residual, "_linear_residual_kernel", Kernel())
    return 4 if request.param else 1, launched


@pytest.mark.parametrize("rows", [*range(1, 9), 17])
@pytest.mark.parametrize(("size", "bias"), [(33, True), (128, False)], ids=["segments filled up", "whole"])
def test_a_residual_sum_and_the_norm_after_it(programs_of_tiles, dtype, rows, size, bias):
    expected_programs, launched = programs_of_tiles
    x, weight, hidden = (random(*s, dtype=dtype, seed=rows) for s in ((rows, 100), (size, 100), (rows, size)))
    norm, wo, added = random(size, dtype=dtype), packed(weight), random(size, dtype=dtype) if bias else None
    got, next_x = hidden.to(DEVICE, copy=True), Rows(rows, size, (), torch.device(DEVICE))
    arrivals, partials = launch.split_memory(rows, size, torch.device(DEVICE))
    linear_residual(
        Rows.of_numbers(x.to(DEVICE), wo), wo, *on_device(added), got, rows, arrivals, norm.to(DEVICE), next_x,
        eps=1e-5, partials=partials,
    )  # fmt: skip
    expected = reference.out_residual(x, weight, added, hidden)
    assert_equal(got, expected)
    assert_equal(from_segments(next_x.numbers, size, dtype), reference.rms_norm(expected, norm, 1e-5))
    assert not arrivals.any() and launched == [expected_programs]
    assert_equal(triton_ops.out_residual(*on_device(x, wo, added, hidden)), expected)  # without a norm
    assert launched == 2 * [expected_programs]


@pytest.mark.parametrize("rows", ROWS)
def test_norm_gate_up_act(dtype, rows):
    hidden, norm = random(rows, 100, dtype=dtype) * 10, random(100, dtype=dtype)
    gate, up = random(33, 100, dtype=dtype, seed=1) * 50, random(33, 100, dtype=dtype, seed=2)
    got = triton_ops.norm_gate_up_act(*on_device(hidden, norm, packed(gate), packed(up)), 33, 1e-5)
    assert_equal(got, reference.norm_gate_up_act(hidden, norm, gate, up, 33, 1e-5))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("vocab_size", [5, 101, *([20_000] if GPU else [])])
def test_norm_head_argmax(dtype, rows, vocab_size):
    hidden, norm, head = random(rows, 50, dtype=dtype), random(50, dtype=dtype), random(vocab_size, 50, dtype=dtype)
    head[-1] = head[0]  # equal logits: the lowest index wins
    tokens, logits = triton_ops.norm_head_argmax(*on_device(hidden, norm, packed(head)), vocab_size, 1e-5)
    expected_tokens, expected_logits = reference.norm_head_argmax(hidden, norm, head, vocab_size, 1e-5)
    assert_equal(tokens, expected_tokens)
    assert_equal(logits, expected_logits)


def test_among_equal_logits_the_lowest_token_wins():
    hidden, norm, head = torch.ones(2, 8), torch.ones(8), torch.ones(1001, 8)
    tokens, _ = triton_ops.norm_head_argmax(*on_device(hidden, norm, packed(head)), 1001, 1e-5)
    assert tokens.tolist() == [0, 0]


def test_nan_logits_raise():
    hidden, norm, head = (random(*s, dtype=torch.float32) for s in ((3, 50), (50,), (101, 50)))
    head[70, 3] = torch.nan
    with pytest.raises(RuntimeError, match="a logit is NaN"):
        triton_ops.norm_head_argmax(*on_device(hidden, norm, packed(head)), 101, 1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_norm_qkv_rope_append(dtype, rows, page_size, bias):
    case = attention_case(dtype, rows, 6, 2, 10, page_size)
    slots = case["slots"].clone()
    if rows > 2:
        slots[1] = -1  # this row's K and V are not kept
    results = []
    for ops, pack, device in ((triton_ops, packed, DEVICE), (reference, reference.pack_weight, "cpu")):
        k, v = case["k_pages"].to(device, copy=True), case["v_pages"].to(device, copy=True)
        rest = (case["cos"], case["sin"], case["positions"], slots)
        q = ops.norm_qkv_rope_append(
            case["hidden"].to(device), case["norm_weight"].to(device), *map(pack, case["weights"]),
            case["bias"].to(device) if bias else None, *(tensor.to(device) for tensor in rest), k, v, 6, 1e-5,
        )  # fmt: skip
        results.append((q, k, v))
    for got, expected in zip(*results, strict=True):
        assert_equal(got, expected)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"),
    [(3, 1, 6, 1), (6, 2, 10, 16), (4, 4, 8, 64), *([(32, 8, 64, 16), (32, 8, 128, 7)] if GPU else [])],
)
@pytest.mark.parametrize("start", [0, 700] if GPU else [0, 250])
@pytest.mark.parametrize("rows", [1, 5, 17 if GPU else 9])
def test_paged_attention(dtype, heads, kv_heads, head_dim, page_size, start, rows):
    if not GPU and start and (rows == 5 or dtype == torch.float16):
        pytest.skip("long contexts are interpreted for minutes: two dtypes, 1 and 9 rows are enough")
    case = attention_case(dtype, rows, heads, kv_heads, head_dim, page_size, start)
    q = random(rows, heads, head_dim, dtype=dtype) * 3
    table, starts = case["block_table"], torch.tensor([0, rows], dtype=torch.int32)
    if rows > 1:  # a second sequence on the same pages, whose rows come first
        table, starts = torch.cat([table, table.flip(1)]), torch.tensor([0, 1, rows], dtype=torch.int32)
    args = (q, case["k_pages"], case["v_pages"], table, starts, case["positions"], 0.3)
    assert_equal(triton_ops.paged_attention(*on_device(*args)), reference.paged_attention(*args))


@pytest.mark.parametrize(("page_size", "window"), [(4, 0), (7, 0), (16, 0), (16, 5)])
def test_several_positions_at_once(monkeypatch, page_size, window):
    """As on a GPU, where pages are looked up for as many as are loaded at once; the interpreter takes one by one."""
    monkeypatch.setattr(sys.modules[triton_ops.paged_attention.__module__], "at_once", lambda *_: 8)
    case = attention_case(torch.bfloat16, 5, 2, 1, 6, page_size, 250)
    q = random(5, 2, 6, dtype=torch.bfloat16) * 20
    rest = (case["block_table"], torch.tensor([0, 5], dtype=torch.int32), case["positions"], 0.4, window)
    results = []
    for ops, device in ((triton_ops, DEVICE), (reference, "cpu")):
        moved = [
            t.to(device) if isinstance(t, torch.Tensor) else t for t in (q, case["k_pages"], case["v_pages"], *rest)
        ]
        results.append(ops.paged_attention(*moved))
    assert_equal(*results)


@pytest.mark.parametrize("window", [1, 3, 8, 300])
def test_windows_and_caps(window):
    """Across a border of chunks: some rows see nothing of the first one."""
    case = attention_case(torch.bfloat16, 9, 3, 1, 6, 16, 250)
    q = random(9, 3, 6, dtype=torch.bfloat16) * 3
    starts = torch.tensor([0, 9], dtype=torch.int32)
    args = (q, case["k_pages"], case["v_pages"], case["block_table"], starts, case["positions"], 0.3, window, 2.0)
    assert_equal(triton_ops.paged_attention(*on_device(*args)), reference.paged_attention(*args))


@pytest.mark.parametrize(("enough", "most"), [(1, 1), (1000, 1), (1000, 4)], ids=["in turn", "one", "two"])
@pytest.mark.parametrize("window", [0, 270])
def test_programs_with_several_chunks(monkeypatch, enough, most, window):
    """Three chunks of two sequences: a program has all of them and merges them, or all, or every second one."""
    attention = sys.modules[triton_ops.paged_attention.__module__]
    monkeypatch.setattr(attention, "ENOUGH_PROGRAMS", enough)
    monkeypatch.setattr(attention, "MOST_PROGRAMS", most)
    case = attention_case(torch.bfloat16, 3, 2, 1, 4, 64, 511)  # the last row is the first to see a third chunk
    q = random(3, 2, 4, dtype=torch.bfloat16) * 10
    table, starts = torch.cat([case["block_table"]] * 2), torch.tensor([0, 1, 3], dtype=torch.int32)
    args = (q, case["k_pages"], case["v_pages"], table, starts, case["positions"], 0.3, window)
    assert_equal(triton_ops.paged_attention(*on_device(*args)), reference.paged_attention(*args))


def test_pages_outside_the_cache_are_not_read():
    case = attention_case(torch.bfloat16, 3, 4, 2, 8, 16)
    table = torch.tensor([[10_000]], dtype=torch.int32)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    q = random(3, 4, 8, dtype=torch.bfloat16)
    args = on_device(q, case["k_pages"], case["v_pages"], table, starts, case["positions"], 0.3)
    assert not triton_ops.paged_attention(*args).any(), "what is not there counts as zero"


@pytest.mark.parametrize(
    ("drafts", "judged"),
    [([3, 0], [1, 1]), ([0, 3], [1, 1]), ([2, 0], [1, 0]), ([0, 1], [0, 1]), ([1, 1], [1, 1])],
)
def test_accept_draft(drafts, judged):
    tokens = torch.tensor([5, 7, 8, 9, 1, 7, 8, 9])
    targets = torch.tensor([7, 8, 4, 3, 3])[: sum(d + 1 for d, j in zip(drafts, judged, strict=True) if j)]
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    args = tokens, targets, starts, torch.tensor(drafts), torch.tensor(judged, dtype=torch.bool)
    for got, expected in zip(triton_ops.accept_draft(*on_device(*args)), reference.accept_draft(*args), strict=True):
        assert_equal(got, expected)
