"""llama.cpp on a file beside us, where it is installed."""

import importlib.util
import json
import urllib.request
from pathlib import Path

import pytest
import torch

LIVE = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


def first_probabilities(path: Path, prompt: list[int]) -> dict[int, float]:
    """What llama.cpp gives each token after a prompt, by token id."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.fit_params, params.cache_ram_mib, params.verbosity = False, 0, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    body = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": 101,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
    }
    request = urllib.request.Request(
        server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.loads(urllib.request.urlopen(request, timeout=120).read())
    [first] = answer["completion_probabilities"]
    return {top["id"]: torch.tensor(top["logprob"]).exp().item() for top in first["top_logprobs"]}
