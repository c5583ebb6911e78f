"""Triton kernels of the fused ops, one file per op, and the steps made of them (docs/architecture.md).

Imports torch, triton and this folder only. What each op means is said in ``layerskip_kernels.reference``; the names and
signatures are the same.
"""

from .accept_draft import accept_draft
from .down_residual import down_residual
from .elementwise import embed_tokens, exp, linear, silu
from .errors import check_error
from .norm_gate_up_silu import norm_gate_up_silu
from .norm_head_argmax import norm_head_argmax
from .norm_qkv_rope_append import norm_qkv_rope_append
from .out_residual import out_residual
from .packing import pack_weight, select_rows
from .paged_attention import paged_attention
from .rms_norm import rms_norm
from .steps import draft_step, error_of, run_layers, verify_step

__all__ = [
    "accept_draft",
    "check_error",
    "down_residual",
    "draft_step",
    "embed_tokens",
    "error_of",
    "exp",
    "linear",
    "norm_gate_up_silu",
    "norm_head_argmax",
    "norm_qkv_rope_append",
    "out_residual",
    "pack_weight",
    "paged_attention",
    "rms_norm",
    "run_layers",
    "select_rows",
    "silu",
    "verify_step",
]
