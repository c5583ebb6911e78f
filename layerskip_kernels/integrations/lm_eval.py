"""EleutherAI's lm-evaluation-harness on these kernels, any exit as the model that is judged.

    from lm_eval import simple_evaluate
    from layerskip_kernels.integrations.lm_eval import LayerSkipLM

    simple_evaluate(model=LayerSkipLM(load_model(), exit_layer=10), tasks=["arc_easy"])

Needs ``pip install lm-eval``. ``layerskip eval --tasks ...`` does the same from a shell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.engine.engine import Engine
from layerskip_kernels.model.model import Model

__all__ = ["LayerSkipLM"]


class LayerSkipLM(TemplateLM):
    """A model of this package for the harness.

    ``exit_layer``: judge the first layers alone, their log-likelihoods and their texts (None: the whole model).
    ``config``: how texts are generated beside what a task says; a whole model drafts by it. Raises ValueError for a
    model without a tokenizer and for an exit layer outside 1..L.
    """

    def __init__(
        self, model: Model, exit_layer: int | None = None, config: GenerationConfig | None = None, batch_size: int = 8
    ) -> None:
        super().__init__()
        num_layers = model.config.num_layers
        if model.tokenizer is None:
            raise ValueError(f"{model.name} came without a tokenizer; the harness needs one")
        if exit_layer is not None and not 1 <= exit_layer <= num_layers:
            raise ValueError(f"exit_layer must be in 1..{num_layers}, got {exit_layer}")
        self.model = model
        self.layer = num_layers if exit_layer is None else exit_layer
        self.batch_size = batch_size
        self._texts = model.tokenizer
        self._config = config or GenerationConfig()

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        config = self.model.config
        if config.bos_token_id is not None:
            return config.bos_token_id
        return config.eos_token_ids[0] if config.eos_token_ids else 0

    @property
    def max_length(self) -> int:
        return self.model.config.max_positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._texts.encode(string, add_special_tokens=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        progress = tqdm(requests, desc="log-likelihoods", disable=disable_tqdm)
        return [self._score(context, continuation) for _, context, continuation in progress]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text's log-likelihood, in windows of the model's length, each after as much of the text as fits."""
        sums = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            sums.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return sums

    @torch.no_grad()
    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The log-likelihood of a continuation, and whether greedy decoding would have said it."""
        ids = [*context, *continuation][-self.max_length - 1 :]
        start = len(ids) - len(continuation) - 1
        total, greedy = 0.0, True
        for rows in each_exit(self.model, ids[:-1], start=start, exits=[self.layer]):
            following = torch.tensor(ids[rows.position + 1 : rows.position + 1 + len(rows.tokens)])
            logprobs = rows.logits.to("cpu").log_softmax(-1)
            total += float(logprobs.gather(1, following[:, None]).double().sum())
            greedy &= bool(torch.equal(rows.tokens.to("cpu"), following))
        return total, greedy

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a task's stop strings; a whole model may draft, which changes no text."""
        engine = Engine(self.model, max_batch=self.batch_size)
        ids = [self._add(engine, *request.args) for request in requests]
        texts: dict[int, str] = {}
        with tqdm(total=len(ids), desc="texts", disable=disable_tqdm) as progress:
            while engine.num_unfinished:
                for output in engine.step():
                    if output.error is not None:
                        raise output.error
                    if output.generation is not None:
                        texts[output.request_id] = output.generation.text or ""
                        progress.update()
        return [texts[request] for request in ids]

    def _add(self, engine: Engine, context: str, settings: dict[str, Any]) -> int:
        until = settings.get("until") or []
        new_tokens = int(settings.get("max_gen_toks", 256))
        sampled = bool(settings.get("do_sample")) and float(settings.get("temperature") or 0) > 0
        tokens = self.tok_encode(context)[-(self.max_length - new_tokens) :]
        alone = self.layer < self.model.config.num_layers
        given: dict[str, Any] = {
            **({"strategy": "early_exit", "exit_layer": self.layer} if alone else {}),
            **({"temperature": float(settings["temperature"])} if sampled else {}),
            **({"top_p": float(settings["top_p"])} if sampled and "top_p" in settings else {}),
        }
        stops = (until,) if isinstance(until, str) else tuple(until)
        return engine.add_request(tokens, replace(self._config, max_new_tokens=new_tokens, stop=stops, **given))
