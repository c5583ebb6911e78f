"""A model as it was stored: what every reader of a source gives, and what a Model is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_kernels.model.defaults import DraftDefaults
from layerskip_kernels.model.tokenizer import Tokenizer
from layerskip_kernels.model_config import ModelConfig

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was stored, every value checked and of one dtype.

    ``tensors``: Hugging Face names (Llama's where families differ), row-major [out, in], all of ``dtype``, on the CPU;
    ``lm_head.weight`` is absent when the embedding is used for it (``config.tie_word_embeddings``).
    ``tokenizer``: None when the source has no tokenizer.json. ``defaults``: None when there is no layerskip.json.
    ``model_type``: its family, a key of families.FAMILIES.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    name: str
    dtype: torch.dtype
    defaults: DraftDefaults | None = None
    model_type: str = "llama"
