"""Triton kernels of the fused ops, one file per op, and the passes made of them (docs/architecture.md).

Imports torch, triton, layerskip_kernels.operands and this folder only. What each op means is said in
``layerskip_kernels.ops.reference``; the names and signatures are the same. Weights are in the model's dtype or
quantised, each of its own type (integer_dot.py, quantised.py). Imported as ``layerskip_kernels.triton_ops``, a link to
this folder.
"""

from .accept_draft import accept_draft
from .down_residual import down_residual
from .edit_logits import edit_logits
from .elementwise import embed_tokens, exp, gelu, inverse_sqrt, linear, log, silu, tanh
from .errors import check_error, error_of, raise_noted, share_error
from .norm_gate_up_act import norm_gate_up_act
from .norm_head_argmax import norm_head_argmax
from .norm_qkv_rope_append import norm_qkv_rope_append
from .out_residual import out_residual
from .packing import pack_weight, select_rows
from .paged_attention import paged_attention
from .random import gumbel, philox
from .rejection_sample import rejection_sample
from .rms_norm import rms_norm
from .sampling import filter_logits, gumbel_argmax
from .steps import run_layers
from .transfer import to_device, to_host

__all__ = [
    "accept_draft",
    "check_error",
    "down_residual",
    "edit_logits",
    "embed_tokens",
    "error_of",
    "exp",
    "filter_logits",
    "gelu",
    "gumbel",
    "gumbel_argmax",
    "inverse_sqrt",
    "linear",
    "log",
    "norm_gate_up_act",
    "norm_head_argmax",
    "norm_qkv_rope_append",
    "out_residual",
    "pack_weight",
    "paged_attention",
    "philox",
    "raise_noted",
    "rejection_sample",
    "rms_norm",
    "run_layers",
    "select_rows",
    "share_error",
    "silu",
    "tanh",
    "to_device",
    "to_host",
]
