"""torch.library.opcheck on every op: schema, mutation, fakes and dispatch agree with what the op does."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from layerskip_kernels.ops import fakes
from support.op_arguments import arguments, registered

ROOT = Path(__file__).parents[2]
SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Optional[Tensor]", list[Tensor]: "List[Tensor]", int: "int", float: "float",
    torch.dtype: "int",
    bool: "bool", list[int]: "List[int]", list[float]: "List[float]",
}  # fmt: skip


def test_the_list_is_complete():
    assert len(registered()) == 32


@pytest.mark.parametrize("name", [name for name in registered() if name != "keep_model"])  # which is not traced
def test_opcheck(name):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if name != "decode_pass":  # whose seconds differ from call to call
        tests += ("test_aot_dispatch_dynamic",)
    opcheck(getattr(torch.ops.layerskip, name).default, arguments(name), test_utils=tests)


@pytest.mark.parametrize("name", registered())
def test_a_fake_has_its_schemas_parameters(name):
    fake = inspect.signature(getattr(fakes, name), eval_str=True)
    schema = getattr(torch.ops.layerskip, name).default._schema
    assert list(fake.parameters) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        assert SCHEMA_TYPES[fake.parameters[argument.name].annotation] == str(argument.type), argument.name


def test_fakes_stand_in_the_order_of_the_schemas():
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "bindings.cpp").read_text())
    assert [name for name in vars(fakes) if name in registered()] == [name for name in defined if name in registered()]
