"""uvicorn's server, with an end for streams at SIGTERM and for clients that send no request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HttpServer"]

HEAD_SECONDS = 30.0  # for a request's head to arrive


class HttpServer(uvicorn.Server):
    """Says where it listens once it does, and lets streams end only as long as they may.

    ``config``'s protocol becomes one that closes a connection whose request is not there in time.
    ``name``: of the model. ``drain``: called at the end, while connections may still send.
    """

    def __init__(self, config: uvicorn.Config, name: str, drain: Callable[[], Awaitable[None]]) -> None:
        config.http = _Connection
        super().__init__(config)
        self._name = name
        self._drain = drain

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"serving {self._name} on http://{host}:{port} (page: /, API: /v1)", flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        draining = asyncio.ensure_future(self._drain())  # uvicorn would wait for the streams' own ends
        await super().shutdown(sockets)
        await draining


class _Connection(H11Protocol):
    """Closes itself HEAD_SECONDS after it was opened, or after a head began, if the head has not ended.

    uvicorn's own limit is for connections that are silent after an answer.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._late is None:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
