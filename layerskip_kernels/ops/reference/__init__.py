"""What each op means, in plain PyTorch: the arithmetic contract (docs/arithmetic.md), line by line.

Clear before fast. Every backend gives these bits (``torch.equal``). ``arithmetic`` has the rules, ``blocks`` that of
quantised weights, ``layers`` the ops of a layer, ``steps`` the passes made of them, ``sampling`` random numbers and
what is chosen by them. Shape suffixes: B sequences, T rows, L layers, D hidden, F ffn, H query heads, G KV heads, K
head dim, V vocab, P pages, S positions per page.
"""

from layerskip_kernels.ops.cycling import cycles_by_passes
from layerskip_kernels.ops.memory import HostMemory
from layerskip_kernels.ops.reference.arithmetic import (
    dot,
    exp,
    fold,
    gelu,
    inverse_sqrt,
    linear,
    log,
    rms_norm,
    rope,
    rope_tables,
    silu,
    tanh,
    tree,
)
from layerskip_kernels.ops.reference.blocks import (
    BLOCK_TYPES,
    BlockType,
    block_type,
    dequantise,
    has_finite_scales,
    integer_dot,
    is_quantised,
    quantise_int8,
    quantise_int15,
    quantise_rows,
)
from layerskip_kernels.ops.reference.layers import (
    down_residual,
    embed_tokens,
    norm_gate_up_act,
    norm_head_argmax,
    norm_qkv_rope_append,
    out_residual,
    pack_weight,
    paged_attention,
    select_rows,
)
from layerskip_kernels.ops.reference.sampling import (
    MASS_ONE,
    edit_logits,
    filter_logits,
    gumbel,
    gumbel_argmax,
    philox,
    rejection_sample,
)
from layerskip_kernels.ops.reference.steps import accept_draft, confidence, draft_pass, run_layers, verify_pass

__all__ = [
    "BLOCK_TYPES",
    "MASS_ONE",
    "BlockType",
    "ReferenceOps",
    "accept_draft",
    "block_type",
    "confidence",
    "dequantise",
    "dot",
    "down_residual",
    "draft_pass",
    "edit_logits",
    "embed_tokens",
    "exp",
    "filter_logits",
    "fold",
    "gelu",
    "gumbel",
    "gumbel_argmax",
    "has_finite_scales",
    "integer_dot",
    "inverse_sqrt",
    "is_quantised",
    "linear",
    "log",
    "norm_gate_up_act",
    "norm_head_argmax",
    "norm_qkv_rope_append",
    "out_residual",
    "pack_weight",
    "paged_attention",
    "philox",
    "quantise_int8",
    "quantise_int15",
    "quantise_rows",
    "rejection_sample",
    "rms_norm",
    "rope",
    "rope_tables",
    "run_layers",
    "select_rows",
    "silu",
    "tanh",
    "tree",
    "verify_pass",
]


class ReferenceOps(HostMemory):
    """The ``reference`` backend."""

    drafts_adapt = True
    draws_in_verification = True
    runs_cycles = True

    exp = staticmethod(exp)
    log = staticmethod(log)
    silu = staticmethod(silu)
    gelu = staticmethod(gelu)
    tanh = staticmethod(tanh)
    inverse_sqrt = staticmethod(inverse_sqrt)
    linear = staticmethod(linear)
    rms_norm = staticmethod(rms_norm)
    pack_weight = staticmethod(pack_weight)
    select_rows = staticmethod(select_rows)
    embed_tokens = staticmethod(embed_tokens)
    norm_qkv_rope_append = staticmethod(norm_qkv_rope_append)
    paged_attention = staticmethod(paged_attention)
    out_residual = staticmethod(out_residual)
    norm_gate_up_act = staticmethod(norm_gate_up_act)
    down_residual = staticmethod(down_residual)
    norm_head_argmax = staticmethod(norm_head_argmax)
    accept_draft = staticmethod(accept_draft)
    philox = staticmethod(philox)
    gumbel = staticmethod(gumbel)
    edit_logits = staticmethod(edit_logits)
    filter_logits = staticmethod(filter_logits)
    gumbel_argmax = staticmethod(gumbel_argmax)
    rejection_sample = staticmethod(rejection_sample)
    run_layers = staticmethod(run_layers)
    draft_pass = staticmethod(draft_pass)
    verify_pass = staticmethod(verify_pass)
    decode_pass = cycles_by_passes
