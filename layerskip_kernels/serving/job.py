"""One completion request on its way to an answer, whole or in chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request

from layerskip_kernels.decoding.sampling import TokenLogprobs
from layerskip_kernels.engine.request import Output
from layerskip_kernels.model.tokenizer import Tokenizer
from layerskip_kernels.serving.answers import (
    Answer,
    Piece,
    SampleText,
    chat_logprobs,
    completion_logprobs,
    timings,
    usage,
)
from layerskip_kernels.serving.errors import ApiError, as_api_error
from layerskip_kernels.serving.protocol import ChatRequest, SamplingRequest
from layerskip_kernels.serving.worker import EngineWorker, Submission

__all__ = ["Job"]


class Job:
    """One request on its way to an answer."""

    def __init__(
        self, worker: EngineWorker, tokenizer: Tokenizer, asked: SamplingRequest, answer: Answer, request: Request,
        timeout: float | None,
    ) -> None:  # fmt: skip
        self.worker = worker
        self.tokenizer = tokenizer
        self.timeout = timeout
        self.asked = asked
        self.answer = answer
        self.request = request
        self.submissions: list[Submission] = []
        self.prompts: list[list[int]] = []
        self.prompt_scores: list[list[TokenLogprobs | None]] = []
        self.echo: list[str] = []
        self._texts: dict[int, SampleText] = {}
        self._offsets: dict[int, int] = {}

    @property
    def chat(self) -> bool:
        return isinstance(self.asked, ChatRequest)

    async def outputs(self) -> AsyncIterator[tuple[int, Output, Piece]]:
        """What comes, as (choice, output, piece); all of it is cancelled when its reader leaves."""
        queue: asyncio.Queue[tuple[int, Output] | BaseException | None] = asyncio.Queue()
        numbered = enumerate(self.submissions)
        readers = [asyncio.create_task(self._read(number, submission, queue)) for number, submission in numbered]
        readers.append(asyncio.create_task(self._watch(queue)))
        try:
            left = len(self.submissions)
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item[0], item[1], self._text_of(item[0]).push(item[1])
        finally:
            for reader in readers:
                reader.cancel()
            for submission in self.submissions:
                if not submission.finished:
                    self.worker.cancel(submission)

    async def _read(self, number: int, submission: Submission, queue: asyncio.Queue[Any]) -> None:
        try:
            while not submission.finished:
                sample, output = await submission.next()
                queue.put_nowait((number * self.asked.n + sample, output))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    async def _watch(self, queue: asyncio.Queue[Any]) -> None:
        """Notice a client that has left, and a request that takes too long."""
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        while True:
            if await self.request.is_disconnected():
                queue.put_nowait(ClientDisconnect())
            if deadline is not None and time.monotonic() > deadline:
                queue.put_nowait(ApiError(504, "the request took longer than this server allows", None, "server_error"))
            await asyncio.sleep(0.1)

    def _text_of(self, choice: int) -> SampleText:
        if choice not in self._texts:
            self._texts[choice] = SampleText(
                self.tokenizer,
                self.asked.stops,
                self.asked.min_tokens,
                self.asked.include_stop_str_in_output,
                self.asked.stop_token_ids or (),
            )
        return self._texts[choice]

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        count = len(self.prompts) * self.asked.n
        pieces: list[list[Piece]] = [[] for _ in range(count)]
        async for choice, output, piece in self.outputs():
            pieces[choice].append(piece)
            if output.generation is not None:
                self.answer.generations.append(output.generation)
        choices = [self._choice(number, pieces[number]) for number in range(count)]
        return self.answer.envelope(choices) | self._figures()

    def _figures(self) -> dict[str, Any]:
        generations = self.answer.generations
        if not generations:  # echo alone
            read = sum(map(len, self.prompts))
            return {"usage": {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}}
        return {"usage": usage(generations, len(self.prompts)), "timings": timings(generations)}

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        prompt = number // self.asked.n
        last = pieces[-1] if pieces else Piece("", finish_reason="length")
        text = "".join(piece.text for piece in pieces)
        ids = [token for piece in pieces for token in piece.token_ids]
        scores = [score for piece in pieces for score in piece.logprobs]
        choice: dict[str, Any] = {"index": number}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = (self.echo[prompt] if self.echo else "") + text
        choice["logprobs"] = self._logprobs(number, scores, ids)
        choice |= {"finish_reason": last.finish_reason, "stop_reason": last.stop_reason}
        if self.asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(prompt)
        if self.asked.return_token_ids:
            choice |= {"token_ids": ids, "prompt_token_ids": self.prompts[prompt]}
        return choice

    def _logprobs(
        self, number: int, scores: Sequence[TokenLogprobs], ids: Sequence[int], chunk: bool = False
    ) -> dict[str, Any] | None:
        wanted = self.asked.top_logprobs_wanted
        if wanted is None:
            return None
        tokenizer = self.tokenizer
        if self.chat:
            return chat_logprobs(tokenizer, scores)
        prompt = number // self.asked.n
        echoed = bool(self.echo) and self._offsets.get(number, 0) == 0
        all_scores = [*(self.prompt_scores[prompt] if echoed else ()), *scores]
        all_ids = [*(self.prompts[prompt] if echoed else ()), *ids]
        found = completion_logprobs(tokenizer, all_scores, all_ids, self._offsets.get(number, 0), wanted > 0)
        if chunk:
            self._offsets[number] = self._offsets.get(number, 0) + sum(map(len, found["tokens"]))
        return found

    def _prompt_logprobs(self, prompt: int) -> list[Any]:
        tokenizer = self.tokenizer
        shown: list[Any] = []
        for score in self.prompt_scores[prompt]:
            pairs = () if score is None else (*score.top, (score.token_id, score.logprob))
            entry = {str(token): {"logprob": p, "decoded_token": tokenizer.decode([token])} for token, p in pairs}
            shown.append(entry or None)
        return shown

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in chunks; an error in the middle is the last of them."""
        try:
            for number in range(len(self.prompts) * self.asked.n):
                if self.chat:
                    yield self._chunk(number, {"role": "assistant", "content": ""})
                elif self.echo:
                    yield self._chunk(number, self.echo[number // self.asked.n], self._logprobs(number, [], [], True))
            async for choice, output, piece in self.outputs():
                if output.generation is not None:
                    self.answer.generations.append(output.generation)
                yield self._piece_chunk(choice, piece)
            if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
                yield self.answer.envelope([], chunk=True) | self._figures()
        except ClientDisconnect:
            return
        except Exception as error:
            yield as_api_error(error).body

    def _piece_chunk(self, choice: int, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(choice, piece.logprobs, piece.token_ids, True) if piece.token_ids else None
        delta = {"content": piece.text} if self.chat else piece.text
        chunk = self._chunk(choice, delta, logprobs, piece.finish_reason, piece.stop_reason)
        if self.asked.return_token_ids:
            chunk["choices"][0]["token_ids"] = list(piece.token_ids)
            if piece.drafts:  # how the page colours tokens
                texts = [self.tokenizer.decode([token]) for token in piece.drafts]
                chunk["drafts"] = {"tokens": list(piece.drafts), "texts": texts, "accepted": piece.num_accepted}
        if piece.finish_reason is not None and len(self.answer.generations) == len(self.prompts) * self.asked.n:
            chunk["timings"] = timings(self.answer.generations)
        return chunk

    def _chunk(
        self, number: int, delta: Any, logprobs: Any = None, finish: str | None = None, stop: str | int | None = None
    ) -> dict[str, Any]:
        key = "delta" if self.chat else "text"
        choice = {"index": number, key: delta, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop}
        return self.answer.envelope([choice], chunk=True)
