"""RoPE's frequencies and tables, with every scaling that a `RopeScaling` can ask for."""

import math

import torch
from torch import Tensor

from layerskip_kernels.model_config import ModelConfig, RopeScaling
from layerskip_kernels.ops import reference

__all__ = ["inverse_frequencies", "rope_names", "rope_tables", "scaled_frequencies"]


def rope_tables(config: ModelConfig, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the first positions, fp32 [ropes, num_positions, R / 2]: of ``rope_names``, in their order.

    R is the config's ``rotary_dim``, or its ``head_dim``.
    """
    tables = [_table(config, name, num_positions) for name in rope_names(config)]
    return torch.stack([cos for cos, _ in tables]), torch.stack([sin for _, sin in tables])


def rope_names(config: ModelConfig) -> list[str]:
    """The kinds of RoPE that have a table: "main", and "local" where a layer has it."""
    return ["main", "local"] if "local" in config.layer_ropes else ["main"]


def _table(config: ModelConfig, name: str, num_positions: int) -> tuple[Tensor, Tensor]:
    if name == "local":
        local = scaled_frequencies(config.rotary_dim or config.head_dim, config.local_rope_theta, RopeScaling())
        return reference.rope_tables(local, num_positions)
    cos, sin = reference.rope_tables(inverse_frequencies(config), num_positions)
    if config.rope_scaling.kind in ("yarn", "longrope"):
        factor = config.rope_scaling.attention_factor
        return cos * factor, sin * factor
    return cos, sin


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """The main RoPE's frequencies, float64 [R / 2], with the config's scaling applied."""
    return scaled_frequencies(config.rotary_dim or config.head_dim, config.rope_theta, config.rope_scaling)


def scaled_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """The frequencies theta^(-2i / head_dim), float64 [head_dim / 2], as `RopeScaling` changes them."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = theta**-exponents
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / torch.tensor(scaling.short_factors, dtype=torch.float64)
    if scaling.kind == "llama3":
        return _interpolated(frequencies, _llama3_kept(frequencies, scaling), scaling.factor)
    if scaling.kind == "yarn":
        return _interpolated(frequencies, _yarn_kept(head_dim, theta, scaling), scaling.factor)
    return frequencies


def _interpolated(frequencies: Tensor, kept: Tensor, factor: float) -> Tensor:
    return kept * frequencies + (1 - kept) * frequencies / factor


def _llama3_kept(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """How much of each frequency stays: all of it above high_freq_factor turns, none below low_freq_factor."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return kept.clamp(0.0, 1.0)


def _yarn_kept(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """The same over the frequencies' indices, from beta_fast to beta_slow turns, as Transformers computes it."""

    def index_of(turns: float) -> float:
        length = scaling.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)
    return 1 - ramp.clamp(0.0, 1.0)
