"""A server of layerskip-tiny-code for all tests of a file."""

from collections.abc import Iterator

import pytest

from layerskip_kernels import Model
from support.servers import Server, serving


@pytest.fixture(scope="module")
def server(tiny_code: Model) -> Iterator[Server]:
    with serving(tiny_code) as started:
        yield started
