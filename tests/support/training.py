"""A training of seconds: its config and its data."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sentence(rng: random.Random) -> str:
    """Letters at equal distances round the alphabet: two of them say what comes next."""
    start, step = rng.randrange(26), rng.choice((1, 5))
    return "".join(" " + LETTERS[(start + i * step) % 26] for i in range(30))


def write_config(folder: Path, **changes: Any) -> Path:
    rng = random.Random(0)
    texts = [json.dumps({"text": sentence(rng)}) for _ in range(400)]
    (folder / "train.jsonl").write_text("\n".join(texts[:-16]) + "\n")
    (folder / "validation.jsonl").write_text("\n".join(texts[-16:]) + "\n")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2)
    training = dict(max_steps=150, per_device_train_batch_size=8, learning_rate=6e-3, warmup_steps=10)
    training |= dict(save_steps=1000, logging_steps=50)
    config = {
        "name": "toy",
        "output_dir": "run",
        "model": {"sizes": {**sizes, "num_key_value_heads": 2, "max_position_embeddings": 128}, "vocab_size": 300},
        "data": {"train": ["train.jsonl"], "validation": ["validation.jsonl"], "sequence_length": 64},
        "eval_exits": [1],
        **changes,
    }
    config["training"] = {**training, **changes.get("training", {})}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
