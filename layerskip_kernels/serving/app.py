"""The routes: an ASGI application around one engine."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from layerskip_kernels.decoding.sampling import TokenLogprobs
from layerskip_kernels.engine.engine import Engine
from layerskip_kernels.engine.request import check_length
from layerskip_kernels.errors import shown
from layerskip_kernels.model.tokenizer import Tokenizer
from layerskip_kernels.serving.answers import Answer
from layerskip_kernels.serving.bodies import read
from layerskip_kernels.serving.errors import ApiError, as_api_error
from layerskip_kernels.serving.job import Job
from layerskip_kernels.serving.metrics import Metrics
from layerskip_kernels.serving.openapi import openapi_document
from layerskip_kernels.serving.protocol import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingRequest,
    TokenizeRequest,
)
from layerskip_kernels.serving.scoring import layers_at_the_end, prompt_logprobs
from layerskip_kernels.serving.worker import EngineWorker

__all__ = ["ServerSettings", "build_app"]

Asked = TypeVar("Asked", bound=AnyRequest)
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows. ``timeout``: seconds for one request; ``drain``: for those that run at SIGTERM."""

    model_name: str
    api_key: str | None = None
    max_queue: int = 256
    max_body: int = 8 << 20
    timeout: float | None = None
    drain: float = 30.0


def build_app(engine: Engine, settings: ServerSettings) -> Starlette:
    """The application; its lifespan starts and ends the engine's thread. Raises ValueError without a tokenizer."""
    if engine.model.tokenizer is None:
        raise ValueError("this model came without a tokenizer, so texts can't be served; use a source that has one")
    server = _Server(engine, settings, engine.model.tokenizer)
    app = Starlette(routes=server.routes(), lifespan=server.lifespan, exception_handlers={HTTPException: _http_error})
    app.state.server = server
    return app


class _Server:
    def __init__(self, engine: Engine, settings: ServerSettings, tokenizer: Tokenizer) -> None:
        self.model = engine.model
        self.settings = settings
        self.tokenizer = tokenizer
        self.worker = EngineWorker(engine, settings.max_queue)
        self.metrics = Metrics(engine.cache.stats, lambda: engine.stats.preemptions)
        self.worker.on_begin, self.worker.on_output = self.metrics.begin, self.metrics.observe
        self.started = int(time.time())

    def routes(self) -> list[Route]:
        def post(path: str, handler: Callable[[Request], Awaitable[Response]]) -> Route:
            return Route(path, self._guarded(handler), methods=["POST"])

        def get(path: str, handler: Callable[[Request], Awaitable[Response]], open_: bool = False) -> Route:
            return Route(path, handler if open_ else self._guarded(handler), methods=["GET"])

        return [
            get("/", self.page, open_=True),
            get("/health", self.health, open_=True),
            get("/openapi.json", self.openapi, open_=True),
            get("/version", self.version),
            get("/metrics", self.show_metrics),
            get("/v1/models", self.models),
            post("/v1/completions", self.completions),
            post("/v1/chat/completions", self.chat_completions),
            post("/tokenize", self.tokenize),
            post("/detokenize", self.detokenize),
            post("/lens", self.lens),
        ]

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await self.worker.drain(self.settings.drain)

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The handler behind the key, with errors as the API tells them."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                told = as_api_error(error)
                return JSONResponse(told.body, told.status, told.headers)

        return guarded

    def _check_key(self, request: Request) -> None:
        if (key := self.settings.api_key) is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    # ---- small routes ----

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self.worker.healthy else 503)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi_document(self.settings.api_key is not None))

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": version("layerskip_kernels")})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        model = {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "layerskip_kernels",
            "max_model_len": self.model.config.max_positions,
            "has_chat_template": self.tokenizer.chat_template is not None,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def tokenize(self, request: Request) -> Response:
        asked = await self._read(request, TokenizeRequest)
        if asked.messages is not None:
            ids = self._encode_chat(asked.messages, asked.add_generation_prompt)
        else:
            ids = self._encode(asked.prompt or "", "prompt", asked.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.model.config.max_positions})

    async def detokenize(self, request: Request) -> Response:
        asked = await self._read(request, DetokenizeRequest)
        self._check_ids(asked.tokens, "tokens")
        return JSONResponse({"prompt": self.tokenizer.decode(asked.tokens)})

    async def lens(self, request: Request) -> Response:
        """What each layer would say after some tokens: the page asks when one is clicked."""
        asked = await self._read(request, DetokenizeRequest)
        self._check_ids(asked.tokens, "tokens")
        try:
            found = await self.worker.call(lambda: layers_at_the_end(self.model, asked.tokens))
        except Exception as error:
            raise as_api_error(error, ("tokens",)) from error
        layers = [
            {"layer": layer, "id": token, "text": self.tokenizer.decode([token]), "probability": probability}
            for layer, token, probability in found
        ]
        return JSONResponse({"layers": layers})

    # ---- completions ----

    async def completions(self, request: Request) -> Response:
        asked = await self._read(request, CompletionRequest)
        prompts = [
            self._encode(p, "prompt", asked.add_special_tokens) if isinstance(p, str) else self._check_ids(p, "prompt")
            for p in asked.prompts
        ]
        job = await self._begin(asked, prompts, Answer(self.settings.model_name, "text_completion"), request)
        if asked.echo:
            job.echo = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in asked.prompts]
        if asked.stream:
            return _events(job.stream())
        return JSONResponse(await job.whole())

    async def chat_completions(self, request: Request) -> Response:
        asked = await self._read(request, ChatRequest)
        generation_prompt = asked.add_generation_prompt and not asked.continue_final_message
        ids = self._encode_chat(
            asked.messages, generation_prompt, asked.continue_final_message, asked.chat_template_kwargs or {}
        )
        job = await self._begin(asked, [ids], Answer(self.settings.model_name, "chat.completion"), request)
        if asked.stream:
            return _events(job.stream())
        return JSONResponse(await job.whole())

    async def _begin(
        self, asked: SamplingRequest, prompts: Sequence[Sequence[int]], answer: Answer, request: Request
    ) -> Job:
        fields = tuple(asked.model_fields_set)
        try:
            return await self._submit(asked, prompts, answer, request)
        except Exception as error:
            raise as_api_error(error, fields) from error

    async def _submit(
        self, asked: SamplingRequest, prompts: Sequence[Sequence[int]], answer: Answer, request: Request
    ) -> Job:
        longest = max(map(len, prompts))
        room = self.model.config.max_positions - longest
        if room < 0:
            raise ApiError(
                400, f"the prompt has {longest} tokens; the model has {self.model.config.max_positions} positions",
                "messages" if isinstance(asked, ChatRequest) else "prompt", code="context_length_exceeded",
            )  # fmt: skip
        job = Job(self.worker, self.tokenizer, asked, answer, request, self.settings.timeout)
        top = asked.prompt_logprobs
        if isinstance(asked, CompletionRequest) and asked.echo and asked.logprobs is not None:
            top = asked.logprobs if top is None else max(top, asked.logprobs)
        if top is not None:
            for prompt in prompts:
                job.prompt_scores.append(await self._score(prompt, top))
        job.prompts = [list(prompt) for prompt in prompts]
        if asked.max_new_tokens == 0:
            return job
        salt = None if asked.cache_salt is None else asked.cache_salt.encode(errors="surrogatepass")
        config = asked.generation_config(room)
        job.submissions = await self.worker.submit(prompts, config, salt)
        return job

    async def _score(self, prompt: Sequence[int], top: int) -> list[TokenLogprobs | None]:
        return await self.worker.call(lambda: prompt_logprobs(self.model, prompt, top))

    # ---- what was sent ----

    async def _read(self, request: Request, kind: type[Asked]) -> Asked:
        asked = await read(request, kind, self.settings.max_body)
        if asked.model not in (None, self.settings.model_name):
            raise ApiError(404, f"the model {shown(asked.model)} is not served here; {self.settings.model_name} is",
                           "model", code="model_not_found")  # fmt: skip
        return asked

    def _encode(self, text: str, field: str, add_special_tokens: bool = True) -> list[int]:
        """Refused before it is tokenised where it cannot fit: all streams wait while a text is tokenised."""
        try:
            check_length(self.model, text)
        except ValueError as error:
            raise ApiError(400, str(error), field, code="context_length_exceeded") from error
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            raise ApiError(400, str(error), field) from error

    def _encode_chat(
        self, messages: Sequence[dict[str, Any]], generation_prompt: bool, continued: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:  # fmt: skip
        if self.tokenizer.chat_template is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", "messages")
        try:
            text = self.tokenizer.chat_template.render(messages, generation_prompt, **variables)
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error), "messages") from error
        if continued:  # the text ends with the last message's own content
            last = messages[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)] if last in text else text
        return self._encode(text, "messages", add_special_tokens=False)

    def _check_ids(self, ids: list[int], field: str) -> list[int]:
        size = self.model.config.vocab_size
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise ApiError(400, f"{field} must hold token ids in 0..{size - 1}, got {shown(wrong[0])}", field)
        return ids


def _events(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Server-sent events: each chunk a line of JSON, then [DONE]."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield b"data: " + json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
            yield b"data: [DONE]\n\n"
        finally:
            with suppress(Exception):
                await chunks.aclose()  # type: ignore[attr-defined]

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)
