"""Peak memory of loading the default model and decoding, over weights + cache + a process that only imports torch.

Each figure is the peak of resident memory of a process of its own. The model is read from its converted directory,
as it is every time but the first. Pages of the mapped weight file count for as long as they are mapped.
"""

import json
import subprocess
import sys
from typing import Any

from tqdm import tqdm

from layerskip_kernels.model.gguf_cache import converted_directory
from layerskip_kernels.model.sources import default_model_path
from timing import BitsDiffer, arguments, finish

EMPTY = "import torch"
DECODING = """
import torch
from layerskip_kernels import GenerationConfig, PagedKVCache, generate, load_model
torch.set_num_threads({threads})
model = load_model(weights={weights!r})
cache = PagedKVCache.with_room_for(model, [{length}])
prompt = torch.randint(model.config.vocab_size, ({prompt},), generator=torch.Generator().manual_seed(0)).tolist()
config = GenerationConfig("autoregressive", max_new_tokens={length} - {prompt}, eos_token_ids=())
[generation] = generate(model, [prompt], config, cache=cache)
report["token_ids"] = generation.token_ids
report["weight_bytes"] = sum({{t.data_ptr(): t.nbytes for t in model.weights.flat}}.values())
report["cache_bytes"] = sum(t.nbytes for t in cache.tensors)
"""
PEAK = """
report = {{}}
{work}
with open("/proc/self/status") as status:
    report["peak_bytes"] = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
import json; print(json.dumps(report))
"""
PROMPT, LENGTH = 512, 544


def main() -> None:
    args = arguments(__doc__, rounds=2)
    for keep_quantised in (False, True):
        converted_directory(default_model_path(), keep_quantised=keep_quantised)
    results = []
    for weights in tqdm((None, "16bit", "int8"), desc="peak memory", unit="model"):
        work = DECODING.format(threads=args.threads, weights=weights, prompt=PROMPT, length=LENGTH)
        results.append(result(weights or "as in the file", [peak(work) for _ in range(args.rounds)], peak(EMPTY)))
    finish("memory", {"prompt": PROMPT, "positions": LENGTH, "results": results}, args.save)


def peak(work: str) -> dict[str, Any]:
    """What a process of this source says about itself."""
    output = subprocess.run(
        [sys.executable, "-c", PEAK.format(work=work)], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(output.stdout.splitlines()[-1])


def result(weights: str, runs: list[dict[str, Any]], empty: dict[str, Any]) -> dict[str, Any]:
    if any(run["token_ids"] != runs[0]["token_ids"] for run in runs):
        raise BitsDiffer(f"with weights {weights}, two processes gave different tokens")
    worst = max(runs, key=lambda run: run["peak_bytes"])
    needed = worst["weight_bytes"] + worst["cache_bytes"] + empty["peak_bytes"]
    return {
        "weights": weights,
        "peak_bytes": worst["peak_bytes"],
        "weight_bytes": worst["weight_bytes"],
        "cache_bytes": worst["cache_bytes"],
        "import_torch_bytes": empty["peak_bytes"],
        "over_needed": worst["peak_bytes"] / needed,
    }


if __name__ == "__main__":
    main()
