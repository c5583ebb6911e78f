"""Plain and self-speculative generation on HumanEval prompts, over exit layers and draft lengths.

SmolLM2-135M-Instruct, not trained for early exit: its acceptance is low, so these are not the speed-ups of a model
that is. Every setting's tokens, logits and KV bytes are compared with plain decoding's first. What is timed, and how,
is that of ``layerskip sweep``.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from layerskip_kernels import GenerationConfig, Model, generate, load_model
from layerskip_kernels.evaluation.equality import compare
from layerskip_kernels.evaluation.exit_sweep import PLAIN, Measured, measure, settings_of
from layerskip_kernels.evaluation.prompts import human_eval_prompts
from timing import BitsDiffer, Timing, arguments, described, finish

EXIT_LAYERS, NUM_SPECULATIONS = (5, 10, 20), (2, 4, 8)


def main() -> None:
    args = arguments(__doc__, prompts=3, new_tokens=32)
    model = load_model(weights="16bit")
    prompts = [model.tokenizer.encode(text) for _, text in human_eval_prompts(args.prompts)]
    # None of them stops early.
    plain = GenerationConfig("autoregressive", max_new_tokens=args.new_tokens, eos_token_ids=())
    settings = settings_of(plain, EXIT_LAYERS, NUM_SPECULATIONS)
    check_bits(model, prompts, settings)
    measured = measure(model, prompts, settings, rounds=1, warmup=0)
    results = [result(name, setting) for name, setting in measured.items()]
    shown = {"model": model.name, "prompts": len(prompts), "new_tokens": args.new_tokens, "bits_equal": True}
    finish("generate", {**shown, "results": results}, args.save)


def check_bits(model: Model, prompts: list[list[int]], settings: Mapping[str, GenerationConfig]) -> None:
    """Raise BitsDiffer unless every setting gives plain decoding's bits; its tokens are compared by `measure`."""
    for prompt in tqdm(prompts, desc="comparing bits", unit="prompt"):
        keep = {name: replace(config, return_logits=True, return_kv=True) for name, config in settings.items()}
        [plain] = generate(model, [prompt], keep[PLAIN])
        for name, config in keep.items():
            if not compare(plain, generate(model, [prompt], config)[0]).all_equal:
                raise BitsDiffer(f"{name} differs from plain decoding")


def result(name: str, setting: Measured) -> dict[str, Any]:
    drafted = any(generation.drafted for generation in setting.generations)
    return {
        "name": name,
        "exit_layer": setting.config.exit_layer,
        "num_speculations": setting.config.num_speculations if drafted else 0,
        **described(Timing(tuple(setting.seconds))),
        "tokens_per_second": setting.tokens_per_second,
        "acceptance_rate": setting.acceptance_rate,
        "ratio_to_plain": setting.speedup,
    }


if __name__ == "__main__":
    main()
