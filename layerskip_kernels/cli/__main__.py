"""``python -m layerskip_kernels.cli``: the ``layerskip`` command."""

from layerskip_kernels.cli.main import run

run()
