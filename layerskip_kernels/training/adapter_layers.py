"""The layers of an exit adapter in PyTorch, to be trained: what run_layers computes of any family, in fp32 and with
gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu

from layerskip_kernels.model.exit_adapter import adapter_kind, num_adapter_layers
from layerskip_kernels.model.rope import rope_names, rope_tables
from layerskip_kernels.model.tensor_names import NORMS
from layerskip_kernels.model_config import ModelConfig

__all__ = ["AdapterInTraining"]


class AdapterInTraining(nn.Module):
    """Adapter layers after ``exit_layer`` layers of a model, the final norm and perhaps a head.

    ``tensors``: `exit_adapter.adapter_shapes`, what they start as. The layers are like the last one before the exit:
    its window, its RoPE.
    """

    def __init__(self, config: ModelConfig, exit_layer: int, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.num_layers = num_adapter_layers(adapter_kind(tensors))
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(tensor.float().clone()) for name, tensor in tensors.items()}
        )
        self._window = config.layer_windows[exit_layer - 1] if config.layer_windows else 0
        self._rope = config.layer_ropes[exit_layer - 1] if config.layer_ropes else "main"

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All of them as an adapter's file has them."""
        return {name.replace("/", "."): tensor.detach().to(dtype, copy=True) for name, tensor in self.weights.items()}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Go on with other values of the same tensors."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.weights[name.replace(".", "/")].copy_(tensor)

    def forward(self, states: Tensor) -> Tensor:
        """Hidden states [B, T, D] at the exit, of texts from their first position on -> what the LM head multiplies,
        [B, T, D]."""
        count = states.shape[1]
        positions = torch.arange(count, device=states.device)
        distance = positions[:, None] - positions
        visible = (distance >= 0) & (distance < (self._window or count))
        rope = self._tables(count, states.device)
        x = states.float()
        for layer in range(self.num_layers):
            x = self._layer(f"layers/{layer}/", x, visible, rope)
        return self.norm(x, self._weight("norm/weight"))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of x [..., D], as this family has it."""
        c = self.config
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c.rms_norm_eps) * (weight + c.norm_offset)

    def logits(self, states: Tensor, head: Tensor | None = None) -> Tensor:
        """Logits [..., N] of states [..., D] under a final norm; ``head``: rows [N, D], None: the adapter's own."""
        head = self._weight("head/weight") if head is None else head
        logits = linear(states, head) * self.config.logits_multiplier
        cap = self.config.logits_cap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _weight(self, name: str) -> Tensor:
        return self.weights[name]

    def _tables(self, count: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        names = rope_names(self.config)
        if self._rope not in names:
            return None
        cos, sin = rope_tables(self.config, count)
        table = names.index(self._rope)
        return cos[table].to(device), sin[table].to(device)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = f"{name}/bias"
        return linear(x, self._weight(f"{name}/weight"), self.weights[bias] if bias in self.weights else None)

    def _normed(self, prefix: str, x: Tensor, place: str) -> Tensor:
        """x after the norm that stands at a place, if this family has one there."""
        name = NORMS[self.config.norm_placement].get(place)
        return x if name is None else self.norm(x, self._weight(f"{prefix}{name}/weight"))

    def _layer(self, prefix: str, x: Tensor, visible: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        if f"{prefix}self_attn/q_proj/weight" in self.weights:
            attended = self._attention(f"{prefix}self_attn/", self._normed(prefix, x, "attn_norm"), visible, rope)
            x = x + self.config.residual_multiplier * self._normed(prefix, attended, "attn_post_norm")
        h = self._normed(prefix, x, "mlp_norm")
        gate, up = self._linear(h, f"{prefix}mlp/gate_proj"), self._linear(h, f"{prefix}mlp/up_proj")
        activated = silu(gate) if self.config.activation == "silu" else gelu(gate, approximate="tanh")
        down = self._linear(activated * up, f"{prefix}mlp/down_proj")
        return x + self.config.residual_multiplier * self._normed(prefix, down, "mlp_post_norm")

    def _attention(self, prefix: str, x: Tensor, visible: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        c = self.config
        q, k, v = (self._linear(x, f"{prefix}{name}_proj") for name in "qkv")
        if c.qk_norm == "whole":
            q, k = (self.norm(y, self._weight(f"{prefix}{n}_norm/weight")) for y, n in ((q, "q"), (k, "k")))
        q, k, v = (y.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for y in (q, k, v))  # [B, heads, T, K]
        if c.qk_norm == "head":
            q, k = (self.norm(y, self._weight(f"{prefix}{n}_norm/weight")) for y, n in ((q, "q"), (k, "k")))
        if rope is not None:
            q, k = (_rotated(y, *rope) for y in (q, k))
        k, v = (y.repeat_interleave(c.num_heads // c.num_kv_heads, dim=1) for y in (k, v))
        if c.score_cap:
            scores = c.score_cap * torch.tanh(q @ k.transpose(-1, -2) * c.softmax_scale / c.score_cap)
            out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
        else:
            out = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=c.softmax_scale)
        return self._linear(out.transpose(1, 2).flatten(2), f"{prefix}o_proj")


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first R numbers of each head: x [..., T, K], cos and sin [T, R / 2]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
