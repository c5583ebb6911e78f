"""Clients of all manners at once: some leave, some stall, some send garbage. Answers stay right, nothing leaks."""

import json
import os
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from layerskip_kernels import GenerationConfig, generate
from support.random_walks import times_further
from support.servers import Server

REQUESTS = times_further(60)
PROMPTS = ["def add(a, b):", "class Stack:", "import os\n", "for i in range(", "x = [", "# sort a list\ndef sort("]
LARGEST_GROWTH = 48 << 20  # bytes of resident memory, from the first tenth of the requests to the end


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def raw(server: Server, payload: bytes, read: int = 0, wait: float = 0) -> None:
    """Send bytes, perhaps read some of the answer, do nothing for ``wait`` seconds, and leave."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(payload)
        if read:
            client.recv(read)
        time.sleep(wait)


def http(body: bytes) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def one_client(server: Server, seed: int, expected: dict[tuple[str, int], str]) -> str:
    """One client's visit. Returns what it did; raises AssertionError for a wrong answer."""
    rng = random.Random(seed)
    prompt, tokens = rng.choice(PROMPTS), rng.choice([3, 17, 40])
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "exit_layer": rng.choice([3, 4])}
    match rng.choice(["ask", "ask", "stream", "leave", "stall", "garbage", "wrong"]):
        case "ask":
            assert server.text(**body)["text"] == expected[prompt, tokens]
            return "asked"
        case "stream":
            with httpx.stream(
                "POST", server.url + "/v1/completions", json={**body, "stream": True}, timeout=60
            ) as answer:
                lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
            texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
            assert "".join(texts) == expected[prompt, tokens]
            return "streamed"
        case "leave":
            long = {**body, "max_tokens": 800, "ignore_eos": True, "stream": bool(seed % 2)}
            raw(server, http(json.dumps(long).encode()), read=seed % 3)
            return "left"
        case "stall":
            raw(server, http(json.dumps(body).encode())[: rng.randrange(1, 90)], wait=rng.random() / 2)
            return "stalled"
        case "garbage":
            raw(server, http(rng.randbytes(rng.randrange(1, 200))))
            return "garbage"
        case _:
            assert server.post("/v1/completions", **{**body, "temperature": -1}).status_code == 400
            return "wrong"


@pytest.mark.parametrize("seed", [1])
def test_clients_of_all_manners(server, seed):
    expected = {
        (prompt, tokens): generate(server.model, [prompt], GenerationConfig(max_new_tokens=tokens))[0].text
        for prompt in PROMPTS
        for tokens in (3, 17, 40)
    }
    done: list[str] = []
    resident: list[int] = []  # after each tenth of the requests
    with ThreadPoolExecutor(6) as clients:
        for tenth in range(10):
            numbers = range(REQUESTS * tenth // 10, REQUESTS * (tenth + 1) // 10)
            done += clients.map(lambda i: one_client(server, seed * 10**6 + i, expected), numbers)
            resident.append(resident_bytes())
    assert server.all_pages_free()
    print(f"{dict(Counter(done))}; resident MiB by tenths: {[size >> 20 for size in resident]}; all pages free")
    assert {"asked", "streamed", "left", "stalled", "garbage", "wrong"} == set(done)
    assert resident[-1] - resident[0] < LARGEST_GROWTH
    assert server.text(prompt=PROMPTS[0], max_tokens=3, temperature=0)["text"] == expected[PROMPTS[0], 3]
