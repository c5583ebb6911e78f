"""torch.library.opcheck on every op: schema, mutation, fakes and dispatch agree with what the op does."""

import pytest
import torch
from conftest import random_tokens, tiny_model
from test_norm_qkv_rope_append import arguments as qkv_arguments
from test_paged_attention import arguments as attention_arguments
from torch.library import opcheck

cpu = torch.ops.layerskip
NOT_TENSOR_OPS = {"empty_huge", "instruction_set", "instruction_sets", "set_instruction_set"}


def step_arguments():
    model = tiny_model()
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


def arguments(name):
    """Arguments for one op, on a small model."""
    model, cache, rows, table = step_arguments()
    x, residual = torch.randn(3, 50).bfloat16(), torch.randn(3, 50).bfloat16()
    names = ("norm", "q", "k", "v", "bias", "o", "out_bias", "mlp_norm", "gate", "up", "down")
    w = dict(zip(names, model.weights[5:16], strict=True))
    match name:
        case "exp" | "log" | "silu" | "inverse_sqrt":
            return (torch.rand(7, 5),)
        case "pack_weight":
            return (torch.randn(20, 30).half(),)
        case "select_rows":
            return w["q"], torch.tensor([3, 1, 90])
        case "embed_tokens":
            return rows[0], model.weights[0], 50
        case "linear":
            return x, w["gate"], None, 75
        case "rms_norm":
            return x, w["norm"], 1e-5
        case "norm_qkv_rope_append":
            return tuple(qkv_arguments(torch.bfloat16, 3, pack=cpu.pack_weight).values())
        case "paged_attention":
            return tuple(attention_arguments(torch.bfloat16, [20], [3]).values())
        case "out_residual":
            return torch.randn(3, 108).bfloat16(), w["o"], torch.randn(50).bfloat16(), residual
        case "norm_gate_up_silu":
            return x, w["mlp_norm"], w["gate"], w["up"], 75, 1e-5
        case "down_residual":
            return torch.randn(3, 75).bfloat16(), w["down"], residual
        case "norm_head_argmax":
            return x, model.weights[1], model.weights[2], 101, 1e-5
        case "accept_draft":
            return torch.tensor([9, 1]), torch.tensor([1, 2]), torch.tensor([0, 2]).int(), torch.tensor([1])
        case "philox":
            return torch.arange(12).view(3, 4), 5
        case "gumbel":
            return (torch.arange(5),)
        case "filter_logits":
            return torch.rand(2, 7), torch.ones(2), torch.tensor([3, 0]), torch.ones(2).double(), torch.zeros(2)
        case "gumbel_argmax":
            return torch.rand(2, 7), *[torch.tensor([1, 2])] * 3, torch.tensor([True, False])
        case "rejection_sample":
            return torch.rand(2, 7), torch.rand(2, 7), *[torch.tensor([1, 2])] * 4
        case "run_layers":
            return model.weights, *cache, *rows, table, 3, *model.sizes
        case "draft_step":
            one = (rows[0][:1], torch.tensor([0]), torch.tensor([3]))
            draft = model.with_draft_vocab(range(0, 101, 3))
            return model.weights, *cache, *one, table, draft.draft_head, draft.draft_ids, 2, 3, *model.sizes
        case "verify_step":
            return model.weights, *cache, *rows, torch.tensor([2]), table, *model.sizes
    raise AssertionError(f"no arguments for {name}: add them here")


def registered() -> list[str]:
    names = {schema.name.removeprefix("layerskip::") for schema in torch._C._jit_get_all_schemas()
             if schema.name.startswith("layerskip::")}  # fmt: skip
    return sorted(names - NOT_TENSOR_OPS)


def test_the_list_is_complete():
    assert len(registered()) == 24


@pytest.mark.parametrize("name", registered())
def test_opcheck(name):
    opcheck(getattr(cpu, name).default, arguments(name))
