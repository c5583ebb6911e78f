"""Heads of deep layers put into the layers that draft."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip_kernels.model.sources import locate
from layerskip_kernels.training.heads import Transplant, copying_heads, transplant_heads

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 8, 4
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapted(rank: int = 16) -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=HEADS * HEAD_DIM, intermediate_size=48, num_hidden_layers=LAYERS, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS))
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.input_layernorm.weight, 0.5, 2.0)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=list(NAMES)))


def merged(model: Any) -> list[dict[str, Tensor]]:
    """Every layer's four weights, adapters added, with each head's part by itself: [heads, head_dim, in]."""
    layers = [layer.self_attn for layer in model.merge_and_unload().model.layers]
    return [{name: _by_head(getattr(layer, name).weight, name) for name in NAMES} for layer in layers]


def _by_head(weight: Tensor, name: str) -> Tensor:
    return (weight.T if name == "o_proj" else weight).unflatten(0, (-1, HEAD_DIM))


def test_a_head_replaces_another_and_nothing_else() -> None:
    before, model = merged(adapted()), adapted()
    norms = [layer.input_layernorm.weight for layer in model.base_model.model.model.layers]
    transplant_heads(model, [Transplant((3, 1), (0, 2))])
    after = merged(model)
    moves = {"q_proj": (1, 2), "k_proj": (0, 1), "v_proj": (0, 1), "o_proj": (1, 2)}
    for layer, weights in enumerate(before):
        for name, expected in weights.items():
            head, place = moves[name]
            if layer == 0:
                part = before[3][name][head]
                expected = expected.clone()
                expected[place] = part if name == "o_proj" else part * (norms[3] / norms[0])
            torch.testing.assert_close(after[layer][name], expected)


def test_a_head_says_in_its_new_layer_what_it_said_in_the_old() -> None:
    model = adapted()
    transplant_heads(model, [Transplant((2, 0), (1, 2))])
    layers = model.base_model.model.model.layers
    x = torch.randn(1, 5, HEADS * HEAD_DIM)
    values = []
    for layer, projection, head in ((2, "base_layer", 0), (1, None, 2)):
        query = layers[layer].self_attn.q_proj
        query = getattr(query, projection) if projection else query
        values.append(query(layers[layer].input_layernorm(x)).unflatten(-1, (HEADS, HEAD_DIM))[..., head, :])
    torch.testing.assert_close(*values)


def test_query_heads_of_one_group_bring_their_k_and_v_once() -> None:
    before, model = merged(adapted()), adapted()
    norms = [layer.input_layernorm.weight for layer in model.base_model.model.model.layers]
    transplant_heads(model, [Transplant((3, 2), (1, 0)), Transplant((3, 3), (1, 1))])
    after = merged(model)
    torch.testing.assert_close(after[1]["k_proj"][0], before[3]["k_proj"][1] * (norms[3] / norms[1]))
    torch.testing.assert_close(after[1]["q_proj"][:2], before[3]["q_proj"][2:] * (norms[3] / norms[1]))
    torch.testing.assert_close(after[1]["o_proj"][:2], before[3]["o_proj"][2:])


@pytest.mark.parametrize(
    ("transplants", "complaint"),
    [
        ([Transplant((4, 0), (0, 0))], r"layer below 4 and a head below 4, got \[4, 0\]"),
        ([Transplant((3, 0), (0, 4))], r"got \[0, 4\]"),
        ([Transplant((3, 0), (0, 0)), Transplant((3, 2), (0, 1))], "can't both be the k_proj"),
        ([Transplant((3, 0), (0, h)) for h in (0, 2)] + [Transplant((3, 1), (0, 1))], "early_rank must be at least 24"),
    ],
)
def test_what_cannot_be_moved(transplants: list[Transplant], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        transplant_heads(adapted(), transplants)


def test_the_heads_that_copy_work_in_the_first_layers_of_smollm2() -> None:
    folder, _ = locate("SmolLM2-135M-Instruct")
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, attn_implementation="eager"
    )
    previous, induction = copying_heads(model)
    assert previous[16, 0] > 0.8 and induction[17, 3] > 0.6
    assert induction[:4].max() < 0.1
    with_adapters = get_peft_model(model, LoraConfig(r=64, lora_alpha=64, target_modules=list(NAMES)))
    transplant_heads(with_adapters, [Transplant((16, 0), (2, 3)), Transplant((17, 3), (3, 3))])
    previous, induction = copying_heads(model)
    assert previous[2, 3] > 0.6 and induction[3, 3] > 0.5
