"""The commands of ``layerskip`` that train."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from layerskip_kernels.cli_options import add_command, add_threads_option

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of `cli`."""
    train = add_command(commands, "train", _train, "train a model for early exit, or go on with a training")
    train.add_argument("config", metavar="CONFIG.yaml", help="what to train on what (see docs/training.md)")
    train.add_argument("--export", metavar="DIR", help="train nothing: write the newest checkpoint's model to DIR")
    add_threads_option(train)


def _train(args: argparse.Namespace) -> int:
    missing = [name for name in ("accelerate", "datasets", "peft", "yaml") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"training needs {', '.join(missing)}; run: pip install 'layerskip_kernels[train]'")
    import torch

    from layerskip_kernels.machine import usable_cores
    from layerskip_kernels.training.config import read_config
    from layerskip_kernels.training.run import export_checkpoint, train

    torch.set_num_threads(args.threads or usable_cores())
    config = read_config(Path(args.config))
    if args.export:
        checkpoint = export_checkpoint(config, Path(args.export))
        print(f"{checkpoint} written to {args.export}")
        return 0
    folder = train(config)
    if folder is None:
        print(f"saved; go on with: layerskip train {args.config}")
        return 143
    print(f"trained; try: layerskip generate --model {folder} --prompt ...")
    return 0
