"""Hundreds of damaged bodies of each kind of request: answered, or refused in a sentence; the server goes on.

As in tests/model/test_damaged_files.py, whose damage is the same.
"""

import json
import random
from collections import Counter

import httpx
import pytest

from support.damage import NUM_FILES, damaged_json

SAMPLING = {
    **{"model": "tiny", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 1, "seed": 3},
    **{"stop": ["a"], "stop_token_ids": [3], "ignore_eos": False, "min_tokens": 1, "presence_penalty": 0.1},
    **{"repetition_penalty": 1.1, "logit_bias": {"5": 1.0}, "stream": False, "return_token_ids": True, "user": "u"},
    **{"prompt_logprobs": 1, "cache_salt": "x", "exit_layer": 3, "num_speculations": 2, "acceptance": "exact"},
}
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
BODIES = {
    "/v1/completions": SAMPLING | {"prompt": "def f", "logprobs": 1, "echo": False},
    "/v1/chat/completions": SAMPLING | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1},
    "/tokenize": {"prompt": "def f", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}


@pytest.mark.parametrize("path", BODIES)
def test_damaged_bodies_are_answered_or_refused(server, path):
    whole = json.dumps(BODIES[path]).encode()
    seen: Counter[int] = Counter()
    with httpx.Client(timeout=60) as client:
        assert client.post(server.url + path, content=whole).status_code == 200
        for number in range(NUM_FILES):
            body = damaged_json(whole, random.Random(f"{path} {number}"))
            answer = client.post(server.url + path, content=body)
            seen[answer.status_code] += 1
            assert answer.status_code in (200, 400, 404), f"number {number}: {answer.text[:500]}"
            if answer.status_code != 200:
                assert 0 < len(answer.json()["error"]["message"]) < 500, f"number {number}"
    print(path, dict(seen))
    assert seen[200] > 0 and seen.total() - seen[200] > NUM_FILES / 4, "the damage did not show"
    assert server.all_pages_free()
