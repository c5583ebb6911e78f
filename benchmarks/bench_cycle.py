"""Draft and verification times over exits and draft lengths, and the speed-up they allow at given acceptance rates.

On SmolLM2-135M and on random weights of the shape of Llama-3.2-1B, for which no trained checkpoint is needed: times
do not depend on the weights, and the acceptance rate, which does, is given. It is accepted over drafted tokens, so a
cycle of d drafts gives 1 + a d tokens. Beside the speed-up over the plain step of the same run stands the ceiling
by layers, S = L (1 + a d) / (d E + L), and the one that counts the LM head in, as many layers as it has bytes.
"""

from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from layerskip_kernels import Model, load_model
from layerskip_kernels.evaluation.step_bench import prompt_tokens, same_bits, step_candidates
from layerskip_kernels.evaluation.step_bytes import head_bytes, layer_bytes
from shapes import filled_cache, random_model
from timing import (
    BitsDiffer,
    Candidate,
    Timing,
    arguments,
    ceiling,
    described,
    finish,
    interleave,
    limit_candidates,
    limits_of,
)

ACCEPTANCE_RATES = (0.5, 0.7, 0.8, 0.9, 1.0)
GRIDS = {"SmolLM2-135M": ((5, 10, 15), (2, 4, 6, 8)), "Llama-3.2-1B": ((2, 4, 8), (2, 4, 6, 8))}
CONTEXT, PLAIN = 100, "plain"


def main() -> None:
    args = arguments(__doc__, rounds=5)
    models = {"SmolLM2-135M": load_model, "Llama-3.2-1B": lambda: random_model("Llama-3.2-1B")}
    results = []
    for name, load in tqdm(models.items(), desc="models", unit="model"):
        results.append({"model": name, **measured(load(), *GRIDS[name], args.rounds)})
    finish("cycle", {"context": CONTEXT, "models": results}, args.save)


def measured(model: Model, exit_layers: tuple[int, ...], draft_counts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """One model's figures, all settings interleaved."""
    for exit_layer in exit_layers:
        if not same_bits(model, prompt_tokens(model, 20), exit_layer, draft_counts[0]):
            raise BitsDiffer(f"exit {exit_layer} differs from plain decoding")
    candidates = grid(model, exit_layers, draft_counts)
    timings = interleave({**candidates, **limit_candidates()}, rounds)
    c = model.config
    head = head_bytes(model) / layer_bytes(model)
    settings = product(exit_layers, draft_counts)
    return {
        "quantised": any(weight.dtype == torch.uint8 for weight in model.weights.flat),
        "num_layers": c.num_layers,
        "head_in_layers": head,
        **limits_of(timings),
        "plain": described(timings[PLAIN]),
        "results": [cycle(timings, e, d, c.num_layers, head) for e, d in settings],
    }


def grid(model: Model, exit_layers: tuple[int, ...], draft_counts: tuple[int, ...]) -> dict[str, Candidate]:
    """The plain step, and both steps of each setting."""
    cache, [sequence] = filled_cache(model, CONTEXT, 1, room=max(draft_counts) + 1)
    candidates = {}
    for e, d in product(exit_layers, draft_counts):
        steps = step_candidates(model, cache, sequence, e, d)
        candidates[PLAIN] = steps["autoregressive"]
        candidates |= {step_name(step, e, d): steps[step] for step in ("draft_step", "verify_step")}
    return candidates


def step_name(step: str, exit_layer: int, num_drafts: int) -> str:
    return f"{step}, exit {exit_layer}, {num_drafts} drafts"


def cycle(timings: dict[str, Timing], exit_layer: int, num_drafts: int, num_layers: int, head: float) -> dict[str, Any]:
    draft, verify = (timings[step_name(step, exit_layer, num_drafts)] for step in ("draft_step", "verify_step"))
    cycles_per_plain = timings[PLAIN].median / (draft.median + verify.median)
    return {
        "exit_layer": exit_layer,
        "num_speculations": num_drafts,
        "draft_step": described(draft),
        "verify_step": described(verify),
        "speed_ups": [
            {
                "acceptance_rate": a,
                "speed_up": (1 + a * num_drafts) * cycles_per_plain,
                "ceiling": ceiling(num_layers, exit_layer, num_drafts, a),
                "ceiling_with_head": ceiling(num_layers, exit_layer, num_drafts, a, head),
            }
            for a in ACCEPTANCE_RATES
        ],
    }


if __name__ == "__main__":
    main()
