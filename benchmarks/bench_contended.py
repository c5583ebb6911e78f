"""Decoding on a machine that others use: two threads beside busy processes, and fewer cores than threads could have.

Beside one busy process for each core, which this benchmark starts and ends, ours with all threads, ours with one, and
llama.cpp with all take turns, in 16 bits and in Q4_0. Then the same model in a process that may run on one core only:
threads left at their default against one thread. All tokens are compared first, in company too.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

from gguf_files import write_gguf as write_unquantised
from layerskip_kernels.model.gguf_write import write_gguf
from layerskip_kernels.model.loading import read_checkpoint
from peer_workers import Contender, Worker
from peers import decoding, prompts
from timing import BitsDiffer, Timing, arguments, described, finish, interleave

SPIN = "while True: pass"
DECODE = ("decode",)


def main() -> None:
    args = arguments(__doc__, rounds=7, new_tokens=32)
    texts = prompts(args.rounds + 1)
    with tempfile.TemporaryDirectory() as folder:
        files = {"BF16": Path(folder) / "bf16.gguf", "Q4_0": Path(folder) / "q4_0.gguf"}
        write_unquantised(files["BF16"], "BF16")
        write_gguf(read_checkpoint(on_demand=True), files["Q4_0"], "q4_0")
        busy = beside_busy_processes(files, texts, args)
        one_core = on_one_core(texts, args)
    finish("contended", {"busy": busy, "one_core": one_core}, args.save)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        sleep(1)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def beside_busy_processes(files: dict[str, Path], texts: list[list[int]], args: Any) -> list[dict[str, Any]]:
    """For each type of weights: tokens per second, alone and beside busy processes."""
    ours = {
        "BF16": {"dtype": "bfloat16", "weights": "16bit"},
        "Q4_0": {"dtype": "bfloat16", "source": str(files["Q4_0"])},
    }
    workers: dict[str, Worker] = {}
    try:
        for kind, options in ours.items():
            for threads in sorted({1, args.threads}):
                contender = Contender(f"ours {kind}, {threads} threads", "ours", options, args.new_tokens, DECODE)
                workers[contender.name] = Worker(contender, threads)
            peer = Contender(f"llama.cpp {kind}, {args.threads} threads", "llama.cpp", {"path": str(files[kind])},
                             args.new_tokens, DECODE)  # fmt: skip
            workers[peer.name] = Worker(peer, args.threads)
        alone = interleave({name: decoding(worker, texts) for name, worker in workers.items()}, args.rounds)
        own = {name: worker for name, worker in workers.items() if worker.contender.kind == "ours"}
        said = {name: worker.call("tokens", texts[0], args.new_tokens) for name, worker in own.items()}
        with busy_processes(args.threads):
            for name, worker in own.items():
                kind = name.split(",")[0]
                if not worker.call("tokens", texts[0], args.new_tokens) == said[name] == said[f"{kind}, 1 threads"]:
                    raise BitsDiffer(f"{name}: other tokens beside busy processes, or than with one thread")
            busy = interleave({name: decoding(worker, texts) for name, worker in workers.items()}, args.rounds)
    finally:
        for worker in workers.values():
            worker.stop()
    return [result(name, alone[name], busy[name]) for name in workers]


def result(name: str, alone: Timing, busy: Timing) -> dict[str, Any]:
    """``mean_busy_s``: beside busy processes the slow steps count, which a median of rounds would hide."""
    return {
        "name": name,
        "alone": described(alone),
        "busy": described(busy),
        "mean_busy_s": sum(busy.seconds) / len(busy.seconds),
        "tokens_per_second_alone": 1 / alone.median,
        "tokens_per_second_busy": 1 / busy.median,
    }


def on_one_core(texts: list[list[int]], args: Any) -> dict[str, Any]:
    """In processes that may run on one core: threads by default, one, and two that the caller insists on."""
    workers = {}
    try:
        for name, threads in (("default", None), ("1 thread", 1), ("2 threads", 2)):
            contender = Contender(name, "ours", {"dtype": "bfloat16", "weights": "16bit"}, args.new_tokens, DECODE)
            workers[name] = Worker(contender, threads, cores=1)
        said = {name: worker.call("tokens", texts[0], args.new_tokens) for name, worker in workers.items()}
        if any(tokens != said["1 thread"] for tokens in said.values()):
            raise BitsDiffer("on one core, the number of threads changes tokens")
        timings = interleave({name: decoding(worker, texts) for name, worker in workers.items()}, args.rounds)
    finally:
        for worker in workers.values():
            worker.stop()
    one = timings["1 thread"]
    over = {
        name: median(a / b for a, b in zip(one.seconds, timing.seconds, strict=True))
        for name, timing in timings.items()
    }
    return {name: {**described(timing), "over_1_thread": over[name]} for name, timing in timings.items()}


if __name__ == "__main__":
    main()
