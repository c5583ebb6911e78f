"""A Llama model as the steps want it: its weights in a backend's layout, in one flat list.

``run_layers`` is the only way through the layers: early exit, the rest, and the full depth are one function,
and live in the backend (reference.run_layers says what it does).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerskip_kernels import ops, reference
from layerskip_kernels.config import NUM_SPECULATIONS, GenerationConfig, ModelConfig

if TYPE_CHECKING:
    from layerskip_kernels.defaults import DraftDefaults
    from layerskip_kernels.loading import Checkpoint
    from layerskip_kernels.tokenizer import Tokenizer

__all__ = ["Model", "inverse_frequencies"]

Placer = Callable[[Tensor], Tensor]
QUANTISED_ROWS = 4096


@dataclass(frozen=True)
class Model:
    """Weights, sizes and the backend that runs them.

    ``weights``: reference.MODEL_WEIGHTS, then reference.LAYER_WEIGHTS for each layer, in ``dtype``; linear weights
    and the embedding in the backend's layout; cos and sin fp32 [max_positions, head_dim / 2].
    """

    config: ModelConfig
    dtype: torch.dtype
    weights: list[Tensor]
    backend: str
    tokenizer: Tokenizer | None = None
    name: str = "model"
    draft_head: Tensor | None = None  # rows of the LM head for draft_ids, in the backend's layout
    draft_ids: Tensor | None = None  # int64 [N], ascending; None: drafts may be any token
    defaults: DraftDefaults | None = None  # how it is best run, where that was measured

    @property
    def ops(self) -> Any:
        return ops.backend(self.backend)

    @property
    def sizes(self) -> tuple[int, int, int, float, float]:
        """The last arguments of run_layers and the steps: what the tensors' shapes do not say."""
        c = self.config
        return c.num_heads, c.intermediate_size, c.vocab_size, c.rms_norm_eps, c.softmax_scale

    @cached_property
    def identity(self) -> bytes:
        """What a token's K and V depend on besides the tokens: SHA-256 of config, dtype, backend and weights.

        Reads all weights once, with torch's number of threads.
        """
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            digests = list(threads.map(_tensor_digest, self.weights))
        settings = repr((self.config, self.dtype, self.backend)).encode()
        return hashlib.sha256(hashlib.sha256(settings).digest() + b"".join(digests)).digest()

    def draft_settings(self, config: GenerationConfig) -> tuple[int, int]:
        """The exit layer and the number of drafts that ``config`` means for this model; (0, 0) in plain decoding.

        What it leaves open is that of ``defaults``; without it, a third of the layers and 4 drafts. Raises ValueError
        for an exit layer that this model does not have.
        """
        if config.strategy == "autoregressive":
            return 0, 0
        chosen = self.defaults
        exit_layer, num_drafts = (chosen.exit_layer, chosen.num_speculations) if chosen else (None, NUM_SPECULATIONS)
        return config.resolve_exit_layer(self.config.num_layers, exit_layer), config.num_speculations or num_drafts

    def with_draft_vocab(self, token_ids: Iterable[int] | None) -> Model:
        """The same model, drafting only tokens of a list (None: any); verification still chooses among all of them.

        The LM head recurs with every draft, so a short list of frequent tokens makes drafts cheaper. Raises
        ValueError for an empty list and for an id outside the vocabulary.
        """
        if token_ids is None:
            return replace(self, draft_head=None, draft_ids=None)
        ids = sorted(set(token_ids))
        if not ids or ids[0] < 0 or ids[-1] >= self.config.vocab_size:
            shown = f"{len(ids)} ids" + (f" from {ids[0]} to {ids[-1]}" if ids else "")
            raise ValueError(f"draft_vocab must be token ids in 0..{self.config.vocab_size - 1}, got {shown}")
        draft_ids = torch.tensor(ids)
        head = self.ops.select_rows(self.weights[2], draft_ids)
        held = self.ops.empty(*head.shape, dtype=head.dtype).copy_(head)
        return replace(self, draft_head=held, draft_ids=draft_ids)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, backend: str = "cpu", weights: str | None = None) -> Model:
        """Lay a checkpoint's tensors out for a backend, taking each out of ``checkpoint.tensors`` as it goes.

        ``weights``: None keeps them in the model's dtype; "int8" quantises the linear layers and the LM head
        (reference.quantize_int8), not the embedding and the norms.
        """
        if weights not in (None, "int8"):
            raise ValueError(f"weights must be None or 'int8', got {weights!r}")
        tensors, config = checkpoint.tensors, checkpoint.config
        pack_weight, place = ops.backend(backend).pack_weight, ops.backend(backend).placer()

        def pack(weight: Tensor) -> Tensor:
            return place(pack_weight(weight))

        def pack_linear(weight: Tensor) -> Tensor:
            if weights is None:
                return pack(weight)
            # Some rows at a time: quantising takes several times a weight's memory.
            return pack(torch.cat([reference.quantize_int8(rows) for rows in weight.split(QUANTISED_ROWS)]))

        embedding_rows = tensors.pop("model.embed_tokens.weight")
        head_rows = embedding_rows if config.tie_word_embeddings else tensors.pop("lm_head.weight")
        embedding = pack(embedding_rows)
        shared = config.tie_word_embeddings and weights is None
        lm_head = embedding if shared else pack_linear(head_rows)
        del embedding_rows, head_rows
        cos, sin = reference.rope_tables(inverse_frequencies(config), config.max_positions)
        flat = [embedding, place(tensors.pop("model.norm.weight")), lm_head, place(cos), place(sin)]
        for layer in range(config.num_layers):
            flat += _layer_weights(tensors, f"model.layers.{layer}.", pack_linear, place, config.attention_bias)
        defaults = checkpoint.defaults
        model = cls(config, checkpoint.dtype, flat, backend, checkpoint.tokenizer, checkpoint.name, defaults=defaults)
        return model.with_draft_vocab(defaults.draft_vocab) if defaults and defaults.draft_vocab else model


def _tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(repr((tensor.dtype, tuple(tensor.shape))).encode() + b"\n")
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _layer_weights(
    tensors: dict[str, Tensor], prefix: str, pack: Placer, place: Placer, attention_bias: bool
) -> list[Tensor]:
    """One layer, in the order of reference.LAYER_WEIGHTS."""

    def take(name: str) -> Tensor:
        return tensors.pop(prefix + name)

    attn_norm = take("input_layernorm.weight")
    qkv_bias = out_bias = attn_norm.new_empty(0)
    if attention_bias:
        qkv_bias = torch.cat([take(f"self_attn.{p}_proj.bias") for p in "qkv"])
        out_bias = take("self_attn.o_proj.bias")
    wq, wk, wv, wo = (pack(take(f"self_attn.{p}_proj.weight")) for p in "qkvo")
    mlp_norm = take("post_attention_layernorm.weight")
    w_gate, w_up, w_down = (pack(take(f"mlp.{p}_proj.weight")) for p in ("gate", "up", "down"))
    attn_norm, qkv_bias, out_bias, mlp_norm = map(place, (attn_norm, qkv_bias, out_bias, mlp_norm))
    return [attn_norm, wq, wk, wv, qkv_bias, wo, out_bias, mlp_norm, w_gate, w_up, w_down]


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """RoPE's frequencies, float64 [head_dim / 2], with the config's scaling applied.

    ``llama3`` scaling (Llama 3.1): wavelengths beyond original_max_positions / low_freq_factor are stretched by
    ``factor``, those below original_max_positions / high_freq_factor kept, the ones between interpolated.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_max_positions * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies
