"""What data sheets say of GPUs, and public configs of models: the numbers behind ``layerskip roofline``."""

from dataclasses import dataclass

from layerskip_kernels.model_config import ModelConfig

__all__ = ["GPUS", "SHAPES", "Gpu"]


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: memory in GB and GB/s (10^9 bytes), peaks of fp32 outside the tensor cores in TFLOP/s and of
    int8 in them, of dense matrices, in TOP/s."""

    name: str
    memory_gb: int
    bandwidth: float
    fp32: float
    int8: float
    multiprocessors: int
    source: str


A100 = "NVIDIA A100 Tensor Core GPU data sheet; SMs: NVIDIA Ampere architecture white paper"
H100 = "NVIDIA H100 Tensor Core GPU data sheet; SMs: NVIDIA Hopper architecture white paper"
GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 80, 2039, 19.5, 624, 108, A100),
    "a100-40gb": Gpu("A100 SXM 40 GB", 40, 1555, 19.5, 624, 108, A100),
    "h100": Gpu("H100 SXM", 80, 3350, 67, 1979, 132, H100),
    "h100-pcie": Gpu("H100 PCIe", 80, 2000, 51, 1513, 114, H100),
    "h200": Gpu("H200 SXM", 141, 4800, 67, 1979, 132, "NVIDIA H200 Tensor Core GPU data sheet; SMs as in the H100"),
    "b200": Gpu(
        "HGX B200", 180, 8000, 80, 4500, 148, "NVIDIA Blackwell architecture technical brief; SMs: CUDA device query"
    ),
    "l40s": Gpu("L40S", 48, 864, 91.6, 733, 142, "NVIDIA L40S data sheet"),
    "rtx4090": Gpu("GeForce RTX 4090", 24, 1008, 82.6, 660.6, 128, "NVIDIA Ada GPU architecture white paper"),
    "mi300x": Gpu("Instinct MI300X", 192, 5300, 163.4, 2614.9, 304, "AMD Instinct MI300X data sheet (compute units)"),
}


def _llama(
    vocab_size: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, positions: int, tied: bool = False
) -> ModelConfig:
    """What matters for bytes and operations; eps and theta do not, and are those of Llama 2."""
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=ffn, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=hidden // heads, max_positions=positions, rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=tied,
    )  # fmt: skip


# From the config.json files that Meta published (meta-llama and codellama on the Hugging Face hub); the
# facebook/layerskip-* checkpoints have the shapes of the models they were trained from.
SHAPES = {
    "llama3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, 131072, tied=True),
    "llama2-7b": _llama(32000, 4096, 11008, 32, 32, 32, 4096),
    "llama2-13b": _llama(32000, 5120, 13824, 40, 40, 40, 4096),
    "llama3-8b": _llama(128256, 4096, 14336, 32, 32, 8, 8192),
    "codellama-7b": _llama(32016, 4096, 11008, 32, 32, 32, 16384),
    "codellama-34b": _llama(32000, 8192, 22016, 48, 64, 8, 16384),
    "llama2-70b": _llama(32000, 8192, 28672, 80, 64, 8, 4096),
}
