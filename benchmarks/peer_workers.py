"""One process for each contender: OpenMP runtimes that share a process fight for the cores.

A worker answers requests, one JSON list [method, arguments] a line, and sleeps in between. Every contender has
``decode(prompt, count)``, which gives wall seconds per token after the first ones (which the prompt gives),
``process(prompt)``, seconds for a prompt, and ``tokens(prompt, count)``, untimed.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal


class _Clock:
    """Notes when how many tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def note(self, count: int) -> None:
        self.times.append(perf_counter())
        self.counts.append(count)

    @property
    def seconds_per_token(self) -> float:
        """From the first token, or the first group of accepted ones, to the last."""
        return (self.times[-1] - self.times[0]) / sum(self.counts[1:])


class Ours:
    """This package, plain or self-speculative."""

    def __init__(
        self, threads: int | None, dtype: str, exit_layer: int | Literal["auto"] | None = None,
        drafts: int | Literal["auto"] = 4, weights: str | None = None,
        isa: str | None = None, source: str | None = None, draft_vocab: list[int] | None = None,
        temperature: float = 0.0,
    ) -> None:  # fmt: skip
        import torch

        from layerskip_kernels import GenerationConfig, load_model
        from layerskip_kernels.machine import usable_cores

        torch.set_num_threads(threads or usable_cores())
        if isa:
            torch.ops.layerskip.set_instruction_set(isa)
        self.model = load_model(source, dtype=getattr(torch, dtype), weights=weights).with_draft_vocab(draft_vocab)
        strategy = "autoregressive" if exit_layer is None else "self_speculative"
        drafts = drafts if exit_layer else None
        self.config = GenerationConfig(strategy, exit_layer, drafts, eos_token_ids=(), temperature=temperature, seed=7)
        self.steps = self.gained = 0  # verifications, and the tokens they gave
        self.engine: Any = None  # of ``together``
        self.salt = 0

    def decode(self, prompt: list[int], count: int) -> float:
        clock = _Clock()
        self._generate(prompt, count, on_tokens=lambda _, tokens: clock.note(len(tokens)))
        return clock.seconds_per_token

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        return self._generate(prompt, count).token_ids

    def process(self, prompt: list[int]) -> float:
        return self._generate(prompt, 1).prefill_seconds

    def together(self, prompts: list[list[int]], count: int) -> tuple[list[str], float]:
        """The texts of all prompts, decoded in one engine at once, and the seconds of it."""
        from layerskip_kernels import Engine

        if self.engine is None:
            self.engine = Engine(self.model, memory=1 << 30, max_batch=len(prompts))
        config = replace(self.config, max_new_tokens=count)
        start = perf_counter()
        self.salt += 1  # nothing is found that an earlier call left in the cache
        ids = [self.engine.add_request(prompt, config, salt=b"%d" % self.salt) for prompt in prompts]
        generations = self.engine.run()
        return [generations[request].text for request in ids], perf_counter() - start

    def same_bits(self, prompt: list[int]) -> bool:
        """Whether self-speculative decoding on this model gives the bits of plain decoding."""
        from layerskip_kernels.evaluation.step_bench import same_bits

        exit_layer = self.config.resolve_exit_layer(self.model.config.num_layers)
        return same_bits(self.model, prompt, exit_layer, self.config.num_speculations or 4, num_cycles=2)

    def bytes_read(self, length: int) -> float:
        """Of weights and KV, per token after ``length`` known ones, at the acceptance of the texts decoded so far."""
        from layerskip_kernels.evaluation.step_bytes import draft_bytes, verify_bytes

        if self.config.strategy == "autoregressive":
            return verify_bytes(self.model, 0, length)
        drafts = self.config.num_speculations
        cycle = draft_bytes(self.model, self.config.exit_layer, drafts, length)
        return (cycle + verify_bytes(self.model, drafts, length)) * self.steps / self.gained

    def memory(self) -> tuple[int, int]:
        """Bytes of the weights that steps read, and of K and V for a position."""
        from layerskip_kernels.evaluation.step_bytes import verify_bytes

        config = self.model.config
        head = self.model.draft_head
        weights = verify_bytes(self.model, 0, 0) + (0 if head is None else head.weight.nbytes)
        kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.model.dtype.itemsize
        return weights, kv

    def gap(self, tokens: list[int], token: int) -> float:
        """By how much the logit of the best next token exceeds that of ``token``."""
        from layerskip_kernels import generate

        config = replace(self.config, max_new_tokens=1, return_logits=True)
        logits = generate(self.model, [tokens], config)[0].logits[0]
        return float(logits.max() - logits[token])

    def _generate(self, prompt: list[int], count: int, **options: Any) -> Any:
        from layerskip_kernels import generate

        [generation] = generate(self.model, [prompt], replace(self.config, max_new_tokens=count), **options)
        self.steps += generation.cycles
        self.gained += count - 1
        return generation


class _Streamer(_Clock):
    """Tokens as Transformers hands them out: the prompt's first, which does not count."""

    prompt_seen = False

    def put(self, tokens: Any) -> None:
        if self.prompt_seen:
            self.note(tokens.numel())
        self.prompt_seen = True

    def end(self) -> None:
        pass


class Transformers:
    """Transformers on the same weights. With an exit layer ``assistant_early_exit``, with the folder of a second model
    ``assistant_model``; always the same draft length."""

    def __init__(
        self, threads: int, directory: str, dtype: str, exit_layer: int | None = None, drafts: int = 4,
        assistant: str | None = None,
    ) -> None:  # fmt: skip
        import torch
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        self.models = [self.model]
        self.options: dict[str, Any] = {} if exit_layer is None else {"assistant_early_exit": exit_layer}
        if assistant is not None:
            second = AutoModelForCausalLM.from_pretrained(assistant, dtype=getattr(torch, dtype)).eval()
            self.models.append(second)
            self.options["assistant_model"] = second
        for model in self.models:
            config = model.generation_config
            config.eos_token_id, config.pad_token_id = None, 0
            # Read from here, not from generate's arguments; a confidence threshold would end drafts early.
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = drafts, "constant"
            config.assistant_confidence_threshold = 0.0

    def decode(self, prompt: list[int], count: int) -> float:
        clock = _Streamer()
        self._generate(prompt, count, streamer=clock)
        return clock.seconds_per_token

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        return self._generate(prompt, count)[0, len(prompt) :].tolist()

    def process(self, prompt: list[int]) -> float:
        import torch

        with torch.inference_mode():
            start = perf_counter()
            self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            return perf_counter() - start

    def memory(self) -> tuple[int, int]:
        """Bytes of all weights (a tied one once), and of K and V for a position."""
        weights = sum(p.nbytes for model in self.models for p in model.parameters())
        configs = [model.config for model in self.models]
        kv = sum(2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim for c in configs)
        return weights, kv * self.model.dtype.itemsize

    def _generate(self, prompt: list[int], count: int, **options: Any) -> Any:
        import torch

        ids = torch.tensor([prompt])
        return self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, **self.options, **options
        )


class Economize(Transformers):
    """The package economize on a Transformers model: its early exit, with the model's own head."""

    def __init__(self, threads: int, directory: str, dtype: str, exit_layer: int, drafts: int) -> None:
        import economize
        from economize.techniques.early_exit import EarlyExitConfig

        super().__init__(threads, directory, dtype)
        # One token of a cycle is the exact pass's.
        decoding = economize.DecodeConfig(cycle_length=drafts + 1)
        self.efficient = economize.apply(self.model, EarlyExitConfig(exit_layer, head="shared"), decoding=decoding)

    def decode(self, prompt: list[int], count: int) -> float:
        seconds = []
        for length in (1, count):
            start = perf_counter()
            self.tokens(prompt, length)
            seconds.append(perf_counter() - start)
        return (seconds[1] - seconds[0]) / (count - 1)

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        import torch

        return self.efficient.decode(torch.tensor(prompt), count).tokens.tolist()[-count:]


class LlamaCpp:
    """llama.cpp's server, called without HTTP; it times prompt and decoding itself. No torch in this process.

    ``draft``: the file of a second model, which drafts. ``streams``: how many texts it decodes at a time.
    """

    def __init__(self, threads: int, path: str, draft: str | None = None, drafts: int = 4, streams: int = 1) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel = 1024 * streams, streams
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.fit_params, params.cache_ram_mib, params.verbosity = False, 0, -1
        self.files = [path]
        if draft is not None:
            self.files.append(draft)
            speculative = params.speculative
            speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            speculative.draft.mparams.path = draft
            speculative.draft.n_max, speculative.draft.n_min = drafts, 0
            speculative.draft.cpuparams.n_threads = speculative.draft.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)
        self.system = xllamacpp.get_system_info()

    def decode(self, prompt: list[int], count: int) -> float:
        # Its clock starts with the first token, so count - 1 steps are in the time (of 1 token: 0 ms).
        return self._complete(prompt, count)["timings"]["predicted_ms"] / 1e3 / (count - 1)

    def process(self, prompt: list[int]) -> float:
        return self._complete(prompt, 1)["timings"]["prompt_ms"] / 1e3

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        """Token ids come with probabilities only; one may be missing where a character is not complete."""
        choice = self._complete(prompt, count, n_probs=1)["choices"][0]
        return [token["id"] for token in choice["logprobs"]["content"]]

    def logprob(self, prompt: list[int], token: int, count: int) -> float:
        """Of ``token`` after a prompt; that of the last one where it is not among the ``count`` likeliest."""
        request = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "samplers": ["temperature"],
                   "cache_prompt": True, "n_probs": count}  # fmt: skip
        [content] = self.server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        likeliest = content["top_logprobs"]
        return next((c["logprob"] for c in likeliest if c["id"] == token), likeliest[-1]["logprob"])

    def memory(self) -> tuple[int, int]:
        """Bytes of the files' tensors, and of K and V for a position (fp16)."""
        import gguf

        weights = kv = 0
        for reader in map(gguf.GGUFReader, self.files):
            weights += sum(int(tensor.n_bytes) for tensor in reader.tensors)
            layers, heads, kv_heads, size = (
                reader.fields[f"llama.{key}"].contents()
                for key in ("block_count", "attention.head_count", "attention.head_count_kv", "embedding_length")
            )
            kv += 2 * layers * kv_heads * size // heads * 2
        return weights, kv

    def address(self) -> str:
        """Where it listens for HTTP."""
        return self.server.listening_address

    def facts(self) -> str:
        return self.system

    def _complete(self, prompt: list[int], count: int, **options: Any) -> dict[str, Any]:
        request = {
            "prompt": prompt, "max_tokens": count, "temperature": 0.0, "samplers": ["temperature"],
            "cache_prompt": False, "ignore_eos": True, **options,
        }  # fmt: skip
        answer = self.server.handle_completions(request)
        assert answer["usage"]["prompt_tokens"] == len(prompt) and answer["timings"]["predicted_n"] == count
        return answer


KINDS = {"ours": Ours, "transformers": Transformers, "economize": Economize, "llama.cpp": LlamaCpp}


@dataclass(frozen=True)
class Contender:
    """Who it is, how to make it, and how many tokens it is given time for."""

    name: str
    kind: str
    options: dict[str, Any]
    new_tokens: int
    timed: tuple[str, ...] = field(default=("decode", "process"))


class Worker:
    """A contender in its own process, which also ends when this one does.

    ``threads``: None: its default. ``cores``: on how many the process may run; None: on all that this one may.
    """

    def __init__(self, contender: Contender, threads: int | None, cores: int | None = None) -> None:
        self.contender = contender
        described = json.dumps([contender.kind, {**contender.options, "threads": threads}, cores])
        self._process = subprocess.Popen(
            [sys.executable, __file__, described], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def call(self, method: str, *args: Any) -> Any:
        """What the contender's method gives. Raises RuntimeError naming it where it fails or its process ended."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps([method, args]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.contender.name}: its process ended ({self._process.wait()}); see stderr above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.contender.name}: {answer['error']}")
        return answer["result"]

    def stop(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the peers print
    kind, options, cores = json.loads(sys.argv[1])
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    peer = KINDS[kind](**options)
    for line in sys.stdin:
        method, args = json.loads(line)
        try:
            answer = {"result": _runtimes() if method == "runtimes" else getattr(peer, method)(*args)}
        except Exception as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # llama.cpp's server has threads of its own that do not end


def _runtimes() -> list[str]:
    """The OpenMP libraries in this process, by name: there must be no more than one."""
    from layerskip_kernels.machine import openmp_runtimes

    return sorted({os.path.basename(path) for path in openmp_runtimes()})


if __name__ == "__main__":
    main()
