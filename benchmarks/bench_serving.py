"""The server: what HTTP, JSON and SSE cost, beside llama.cpp's server, and what a second turn saves.

Three processes with SmolLM2-135M-Instruct in 16 bits take turns: an engine without HTTP, ``layerskip serve``, and
llama.cpp's own server on a BF16 file of the same weights. Eight prompts at once are decoded greedily, without drafts
and without an end; over HTTP they are eight streams, read by one client. Then a conversation of 1,000 tokens goes on
for a second turn: the time to its first token over the first turn's, each pair under a salt of its own.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from gguf_files import write_gguf
from layerskip_kernels.evaluation.prompts import human_eval_prompts
from layerskip_kernels.model.sources import locate
from layerskip_kernels.model.tokenizer import Tokenizer
from peer_workers import Contender, Worker
from timing import BitsDiffer, Candidate, arguments, described, finish, interleave

STREAMS = 8
HISTORY, ANSWER, QUESTION = 1000, 32, 24  # tokens of the first turn's prompt, of its answer, of what the second adds
ENGINE, HTTP, LLAMA_CPP = "engine", "layerskip serve", "llama.cpp server BF16"
Prompt = str | list[int]


class Client:
    """Streams over HTTP as simply as can be: what it costs counts against the server.

    ``unseen``: fields that keep a server from finding what it computed before in its cache.
    """

    def __init__(self, url: str, unseen: Callable[[], dict[str, Any]], **fields: Any) -> None:
        host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
        self.host, self.port, self.unseen = host, int(port), unseen
        self.fields = {"temperature": 0, "stream": True, "ignore_eos": True, **fields}

    def together(self, prompts: list[Prompt], count: int) -> tuple[list[str], float]:
        """The texts of all prompts, asked for at once, and the seconds until the last has come."""
        fields = self.unseen()

        async def all_of_them() -> list[tuple[str, float]]:
            return await asyncio.gather(*(self._stream(prompt, count, **fields) for prompt in prompts))

        start = perf_counter()
        texts = [text for text, _ in asyncio.run(all_of_them())]
        return texts, perf_counter() - start

    def first_token(self, prompt: Prompt, count: int, **fields: Any) -> tuple[str, float]:
        """A text, and the seconds until its first piece."""
        return asyncio.run(self._stream(prompt, count, **fields))

    async def _stream(self, prompt: Prompt, count: int, **fields: Any) -> tuple[str, float]:
        body = json.dumps({"prompt": prompt, "max_tokens": count, **self.fields, **fields}).encode()
        head = (
            f"POST /v1/completions HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        start, first, pieces = perf_counter(), None, []
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(head.encode() + b"\r\n\r\n" + body)
        status = (await reader.readline()).split()[1]
        while (line := await reader.readline()) and line.strip() != b"data: [DONE]":
            if status != b"200":
                raise RuntimeError(f"the server at port {self.port} answers {(await reader.read()).decode()[:500]}")
            if line.startswith(b"data: "):
                choices = json.loads(line[6:])["choices"]
                text = choices[0]["text"] if choices else ""
                first = perf_counter() if first is None and text else first
                pieces.append(text)
        writer.close()
        if not line:
            raise RuntimeError(f"the server at port {self.port} ended a stream without [DONE]")
        return "".join(pieces), (first or perf_counter()) - start


def salted() -> dict[str, str]:
    return {"cache_salt": uuid.uuid4().hex}


@contextmanager
def our_server(threads: int) -> Iterator[str]:
    """``layerskip serve`` in a process of its own; gives its address."""
    command = [sys.executable, "-m", "layerskip_kernels.cli", "serve", "--weights", "16bit", "--port", "0"]
    command += ["--threads", str(threads), "--max-batch", str(STREAMS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " on http://" not in line:
            raise RuntimeError(f"layerskip serve ended with status {process.wait()}; see stderr above")
        yield line.split(" on ")[1].split(" ")[0]
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    args = arguments(__doc__ or "", rounds=7, new_tokens=64)
    tokenizer = Tokenizer.from_directory(locate(None)[0])
    prompts: list[Prompt] = [tokenizer.encode(text) for _, text in human_eval_prompts(STREAMS)]
    with tempfile.TemporaryDirectory() as folder, our_server(args.threads) as url:
        path = Path(folder, "BF16.gguf")
        write_gguf(path, "BF16")
        ours = Contender(ENGINE, "ours", {"dtype": "bfloat16", "weights": "16bit"}, args.new_tokens)
        theirs = Contender(LLAMA_CPP, "llama.cpp", {"path": str(path), "streams": STREAMS}, args.new_tokens)
        workers = {contender.name: Worker(contender, args.threads) for contender in (ours, theirs)}
        try:
            clients = {
                HTTP: Client(url, salted, strategy="autoregressive"),
                LLAMA_CPP: Client(
                    workers[LLAMA_CPP].call("address"), dict, cache_prompt=False, samplers=["temperature"]
                ),
            }
            agreement = check(workers[ENGINE], clients, prompts, args.new_tokens)
            streams = compete(workers[ENGINE], clients, prompts, args)
            turns = second_turns(clients[HTTP], tokenizer, args.rounds)
        finally:
            for worker in workers.values():
                worker.stop()
    facts = {"streams": STREAMS, "new_tokens": args.new_tokens, "bits_equal": True, "agreement": agreement}
    finish("serving", {**facts, **streams, "second_turn": turns}, args.save)


def check(engine: Worker, clients: dict[str, Client], prompts: list[Prompt], count: int) -> list[int]:
    """Raises BitsDiffer unless the server's texts are the engine's. How many characters llama.cpp's begin with."""
    expected, _ = engine.call("together", prompts, count)
    if clients[HTTP].together(prompts, count)[0] != expected:
        raise BitsDiffer("a text over HTTP differs from the engine's")
    theirs, _ = clients[LLAMA_CPP].together(prompts, count)
    return [common_prefix(a, b) for a, b in zip(expected, theirs, strict=True)]


def common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def compete(engine: Worker, clients: dict[str, Client], prompts: list[Prompt], args: Any) -> dict[str, Any]:
    """Tokens per second of all streams, prompts included, one round each in turn."""
    together = {ENGINE: lambda: engine.call("together", prompts, args.new_tokens)}
    for name, client in clients.items():
        together[name] = lambda client=client: client.together(prompts, args.new_tokens)
    candidates = {name: Candidate(run, seconds=lambda found: found[1]) for name, run in together.items()}
    timings = interleave(candidates, args.rounds)
    tokens = STREAMS * args.new_tokens
    results = [
        {"name": name, **described(timing), "tokens_per_second": tokens / timing.median}
        for name, timing in timings.items()
    ]
    return {
        "results": results,
        "http_over_engine": timings[ENGINE].median / timings[HTTP].median,
        "http_over_llama_cpp": timings[LLAMA_CPP].median / timings[HTTP].median,
    }


def second_turns(client: Client, tokenizer: Tokenizer, rounds: int) -> dict[str, Any]:
    """Time to first token of a second turn over the first's, both in turn."""
    text = "\n".join(text for _, text in human_eval_prompts(20))
    history, question = tokenizer.encode(text)[:HISTORY], tokenizer.encode(text)[-QUESTION:]
    said: dict[str, Any] = {}

    def first() -> float:
        said["salt"] = salted()
        said["text"], seconds = client.first_token(history, ANSWER, **said["salt"])
        return seconds

    def second() -> float:
        ids = [*history, *tokenizer.encode(said["text"], add_special_tokens=False), *question]
        return client.first_token(ids, 1, **said["salt"])[1]

    pairs = [(first(), second()) for _ in range(rounds + 1)][1:]
    ratios = sorted(after / before for before, after in pairs)
    return {
        "history": HISTORY,
        "first_turn_s": sorted(before for before, _ in pairs)[len(pairs) // 2],
        "second_turn_s": sorted(after for _, after in pairs)[len(pairs) // 2],
        "over_first": ratios[len(ratios) // 2],
    }


if __name__ == "__main__":
    main()
