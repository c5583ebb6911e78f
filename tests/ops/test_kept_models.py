"""Passes know a model by a number: which one, for how long, and what they say where there is none."""

import gc

import pytest
import torch

from layerskip_kernels.operands import CacheTensors
from layerskip_kernels.ops.cpu import model_number
from support.models import tiny_model
from support.op_arguments import arguments, step_arguments


def pages_of(model, head_dim=None, layers=None):
    c = model.config
    head_dim, layers = head_dim or c.head_dim, layers or c.num_layers
    return CacheTensors(
        torch.zeros(layers, 4, c.num_kv_heads, head_dim, 16, dtype=model.dtype),
        torch.zeros(layers, 4, c.num_kv_heads, 16, head_dim, dtype=model.dtype),
        torch.zeros(4, 16, c.hidden_size, dtype=model.dtype),
    )


def test_a_model_keeps_its_number_until_its_rope_tables_grow():
    model = tiny_model()
    weights, sizes, cache = model.weights, model.sizes, pages_of(model)
    number = model_number(weights, sizes, cache)
    assert model_number(weights, sizes, cache) == number
    weights.replace_tables(torch.cat([weights.cos] * 2, 1), torch.cat([weights.sin] * 2, 1))
    longer = model_number(weights, sizes, cache)
    assert longer != number
    step_with(number), step_with(longer)  # whoever still holds the old one may go on with it


def step_with(number):
    model, _, rows, table = step_arguments()
    torch.ops.layerskip.run_layers(number, *pages_of(model), *rows, table, 3)


def test_a_number_is_gone_with_its_model():
    model = tiny_model(seed=7)
    number = model_number(model.weights, model.sizes, pages_of(model))
    step_with(number)
    del model
    gc.collect()
    with pytest.raises(ValueError, match=f"model {number} is not known; keep_model gives its number"):
        step_with(number)


def test_pages_of_another_model_are_refused():
    model, _, rows, table = step_arguments()
    number = model_number(model.weights, model.sizes, pages_of(model))
    for pages in (pages_of(model, head_dim=model.config.head_dim + 2), pages_of(model, layers=2)):
        with pytest.raises(ValueError, match="k_cache"):
            torch.ops.layerskip.run_layers(number, *pages, *rows, table, 2)


def test_too_few_tensors_are_refused():
    weights, *others = arguments("keep_model")
    with pytest.raises(ValueError, match="weights holds"):
        torch.ops.layerskip.keep_model(weights[:-1], *others)
