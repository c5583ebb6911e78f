"""Ray: the server as a Ray Serve deployment, and texts at scale with Ray Data. Needs ``pip install "ray[serve,data]"``.

from ray import serve
from layerskip_kernels.integrations.ray import deployment

serve.run(deployment("layerskip-tiny-code", num_replicas=2))

from layerskip_kernels.integrations.ray import Generator

ray.data.read_json("prompts.jsonl").map_batches(
    Generator, fn_constructor_kwargs={"source": "layerskip-tiny-code"}, batch_size=32, concurrency=2
)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.engine.engine import Engine
from layerskip_kernels.engine.generation import generate
from layerskip_kernels.machine import usable_cores
from layerskip_kernels.model.loading import load_model

__all__ = ["Generator", "deployment"]


def deployment(
    source: str, *, num_replicas: int | None = None, ray_actor_options: dict[str, Any] | None = None, threads: int = 0,
    memory: int = 1 << 30, max_batch: int = 8, **options: Any,
) -> Any:  # fmt: skip
    """The OpenAI API of ``layerskip serve`` as an application for ``serve.run``: one model and one engine a replica.

    ``threads``: of each replica (0: the cores it may use). ``options``: others of ``serve.deployment``, such as
    autoscaling_config. Several models are several deployments, each with a route_prefix of its own.
    """
    from ray import serve

    from layerskip_kernels.serving.app import ServerSettings, build_app

    def build() -> Any:
        torch.set_num_threads(threads or usable_cores())
        model = load_model(source)
        engine = Engine(model, memory=memory, max_batch=max_batch)
        return build_app(engine, ServerSettings(model_name=model.name))

    settings = {"num_replicas": num_replicas, "ray_actor_options": ray_actor_options, **options}
    given = {name: value for name, value in settings.items() if value is not None}

    @serve.deployment(**given)
    @serve.ingress(build)
    class LayerSkip:
        """The application is its ingress; there is nothing besides."""

    return LayerSkip.bind()  # type: ignore[attr-defined]


class Generator:
    """Continues the texts of one column of a batch, for ``Dataset.map_batches``.

    ``source``: as in load_model. ``prompt``: the column that is read; ``output``: the one that is added. ``settings``:
    of GenerationConfig.
    """

    def __init__(
        self, source: str, prompt: str = "prompt", output: str = "generated", threads: int = 1, **settings: Any
    ) -> None:
        torch.set_num_threads(threads)
        self.model = load_model(source)
        self.config = GenerationConfig(**settings)
        self.prompt = prompt
        self.output = output

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        texts = [str(text) for text in batch[self.prompt]]
        generations = generate(self.model, texts, self.config)
        return {**batch, self.output: np.array([generation.text for generation in generations], dtype=object)}
