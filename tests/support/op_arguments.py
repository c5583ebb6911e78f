"""Valid arguments of every op, at odd sizes."""

import functools

import torch

from layerskip_kernels.model.quantise import quantise
from layerskip_kernels.operands import CacheTensors
from layerskip_kernels.ops import cache_ops, reference
from layerskip_kernels.ops.cpu import model_number
from support.exit_adapters import random_adapter
from support.models import random_tokens, tiny_model

HIDDEN, HEADS, KV_HEADS = 50, 6, 2


def qkv_arguments(dtype, rows, head_dim=18, page_size=7, bias=True, pack=reference.pack_weight):
    generator = torch.Generator().manual_seed(rows)

    def random(*shape):
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    sizes = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim]
    cos, sin = reference.rope_tables(torch.rand(head_dim // 2, generator=generator), 64)
    pages = -(-64 // page_size)
    slots = torch.randperm(pages * page_size, generator=generator)[:rows]
    slots[rows // 2] = -1 if rows > 1 else slots[0]
    return dict(
        hidden=random(rows, HIDDEN),
        norm_weight=random(HIDDEN),
        **{name: pack(random(size, HIDDEN)) for name, size in zip(("wq", "wk", "wv"), sizes, strict=True)},
        qkv_bias=random(sum(sizes)) if bias else None,
        cos=cos,
        sin=sin,
        positions=torch.arange(rows) * 3,
        slot_mapping=slots,
        k_pages=torch.zeros(pages, KV_HEADS, head_dim, page_size, dtype=dtype),
        v_pages=torch.zeros(pages, KV_HEADS, page_size, head_dim, dtype=dtype),
        num_heads=HEADS,
        eps=1e-5,
    )


def attention_arguments(dtype, contexts, rows, head_dim=18, heads=6, kv_heads=2, page_size=16, seed=0):
    """Sequence b has contexts[b] positions; its last rows[b] are queries. Pages are dealt at random."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-context // page_size) for context in contexts]
    order = torch.randperm(sum(blocks), generator=generator).int()
    table = torch.full((len(contexts), max(blocks)), -1, dtype=torch.int32)
    for b, pages in enumerate(order.split(blocks)):
        table[b, : len(pages)] = pages
    shape = (sum(blocks), kv_heads, head_dim, page_size)
    return dict(
        q=torch.randn(sum(rows), heads, head_dim, generator=generator).to(dtype),
        k_pages=torch.randn(*shape, generator=generator).to(dtype),
        v_pages=torch.randn(*shape, generator=generator).transpose(2, 3).contiguous().to(dtype),
        block_table=table,
        query_start_loc=torch.tensor([0, *torch.tensor(rows).cumsum(0)], dtype=torch.int32),
        positions=torch.cat([torch.arange(c - r, c) for c, r in zip(contexts, rows, strict=True)]),
        scale=head_dim**-0.5,
    )


NOT_TENSOR_OPS = {
    "empty_huge", "forget_model", "pass_threads", "instruction_set", "instruction_sets", "set_instruction_set",
}  # fmt: skip


@functools.cache
def tiny(weights=None):
    return tiny_model(weights=weights)


def step_arguments(weights=None):
    model = tiny(weights)
    c = model.config
    cache = (
        torch.zeros(c.num_layers, 4, c.num_kv_heads, c.head_dim, 16, dtype=model.dtype),
        torch.zeros(c.num_layers, 4, c.num_kv_heads, 16, c.head_dim, dtype=model.dtype),
        torch.zeros(4, 16, c.hidden_size, dtype=model.dtype),
    )
    rows = (
        torch.tensor(random_tokens(5)),
        torch.arange(5),
        torch.zeros(5, dtype=torch.int32),
        torch.tensor([0, 5]).int(),
    )
    table = torch.arange(4, dtype=torch.int32)[None]
    return model, cache, rows, table


def arguments(name, quantised=None):
    """Arguments for one op, on a small model (``quantised``: with weights of that type). To be changed when an op is
    added; test_opcheck asks for all."""
    model, cache, rows, table = step_arguments(quantised)
    c = model.config
    x, residual = torch.randn(3, 50).bfloat16(), torch.randn(3, 50).bfloat16()
    weights, sizes = model.weights, (model.sizes.ints, model.sizes.floats)
    w = weights.layers[0]
    number = model_number(weights, model.sizes, CacheTensors(*cache))
    match name:
        case "exp" | "log" | "silu" | "gelu" | "tanh" | "inverse_sqrt":
            return (torch.rand(7, 5),)
        case "pack_weight":
            weight = torch.randn(20, 30).half()
            return (quantise(weight, quantised) if quantised else weight,)
        case "select_rows":
            return w.wq, torch.tensor([3, 1, 90])
        case "embed_tokens":
            return rows[0], weights.embedding, 50, weights.final_norm.dtype
        case "linear":
            return x, w.w_gate, None, 75
        case "rms_norm":
            return x, w.attn_norm, 1e-5
        case "norm_qkv_rope_append":
            return tuple(qkv_arguments(torch.bfloat16, 3, pack=torch.ops.layerskip.pack_weight).values())
        case "paged_attention":
            return tuple(attention_arguments(torch.bfloat16, [20], [3]).values())
        case "out_residual":
            return torch.randn(3, 108).bfloat16(), w.wo, torch.randn(50).bfloat16(), residual
        case "norm_gate_up_act":
            return x, w.mlp_norm, w.w_gate, w.w_up, 75, 1e-5
        case "down_residual":
            return torch.randn(3, 75).bfloat16(), w.w_down, residual
        case "norm_head_argmax":
            return x, weights.final_norm, weights.lm_head, 101, 1e-5
        case "accept_draft":
            starts = torch.tensor([0, 2]).int()
            return torch.tensor([9, 1]), torch.tensor([1, 2]), starts, torch.tensor([1]), torch.tensor([True])
        case "philox":
            return torch.arange(12).view(3, 4), 5
        case "gumbel":
            return (torch.arange(5),)
        case "edit_logits":
            edits = [torch.ones(2), *torch.rand(2, 2), torch.tensor([4, 0]), torch.tensor([[2, 6, 5], [1, -1, -1]]),
                     torch.rand(2, 3), torch.tensor([[-1, 0, 2], [-1] * 3]), torch.rand(2, 3) > 0.5]  # fmt: skip
            return (
                torch.randn(3, 7),
                torch.tensor([0, 0, 1]),
                torch.arange(3),
                torch.tensor([[-1, -1], [2, 3], [5, 1]]),
                edits,
            )
        case "filter_logits":
            return torch.rand(2, 7), torch.ones(2), torch.tensor([3, 0]), torch.ones(2).double(), torch.zeros(2)
        case "gumbel_argmax":
            return torch.rand(2, 7), *[torch.tensor([1, 2])] * 3, torch.tensor([True, False])
        case "rejection_sample":
            return torch.rand(2, 7), torch.rand(2, 7), *[torch.tensor([1, 2])] * 4
        case "run_layers":
            return number, *cache, *rows, table, 3
        case "keep_model":
            return weights.flat, c.num_kv_heads, c.head_dim, *sizes
        case "draft_pass":
            one = (rows[0][:1], torch.tensor([0]), torch.tensor([3]))
            head = model.with_draft_vocab(range(0, 101, 3)).draft_head
            sampling = [
                torch.ones(1), torch.tensor([5]), torch.ones(1).double(), torch.zeros(1), *[torch.tensor([1])] * 2
            ]  # fmt: skip
            listed = torch.tensor([[4, 9]]), torch.rand(1, 2), torch.tensor([[0, 3]]), torch.tensor([[False, True]])
            sampling += [torch.full((1,), 1.5), torch.rand(1), torch.rand(1), torch.tensor([2]), *listed]
            stops = [torch.tensor([0.5]), torch.ones(1, 2), torch.zeros(1, 3)]
            drawn = number, *cache, *one, table, head.weight, head.ids, sampling, stops, 2, 3, True
            return *drawn, *adapter_arguments(cache)
        case "verify_pass":
            judging = torch.tensor([2]), torch.tensor([True])
            return number, *cache, *rows, *judging, table, *adapter_arguments(cache)
        case "decode_pass":
            one = (rows[0][:1], torch.tensor([0]), torch.tensor([2]))
            stops = [torch.tensor([0.5]), torch.ones(1, 2), torch.zeros(1, 2)]
            head = model.with_draft_vocab(range(0, 101, 3)).draft_head
            settings = stops, torch.tensor([[5, -1]]), 2, 2, 3
            return number, number, *cache, *one, table, head.weight, head.ids, *settings, *adapter_arguments(cache)
        case "copy_pages":
            return torch.tensor([0, 1]).int(), torch.tensor([2, 3]).int(), *cache, cache_ops.new_error()
        case "gather_kv":
            k, v = cache[0].new_zeros(2, c.num_layers, 40, c.num_kv_heads, c.head_dim)
            return table[0], *cache[:2], k, v, cache_ops.new_error()
        case "scatter_kv":
            k, v = cache[0].new_ones(2, c.num_layers, 40, c.num_kv_heads, c.head_dim)
            return table[0], 3, k, v, *cache[:2], cache_ops.new_error()
    raise AssertionError(f"no arguments for {name}: add them here")


@functools.cache
def adapter():
    model = tiny()
    return model.with_exit_adapter(2, random_adapter(model)).exit_adapters[0]


def adapter_arguments(cache):
    """What the two passes take of an exit adapter at exit 2."""
    k, v = (torch.zeros_like(kept[:2]) for kept in cache[:2])
    return [2], [model_number(adapter().weights, adapter().sizes, CacheTensors(k, v, cache[2]))], [k], [v]


def registered() -> list[str]:
    names = {schema.name.removeprefix("layerskip::") for schema in torch._C._jit_get_all_schemas()
             if schema.name.startswith("layerskip::")}  # fmt: skip
    return sorted(names - NOT_TENSOR_OPS)
