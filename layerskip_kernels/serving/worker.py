"""One thread that steps the engine; requests join and leave between its steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from typing import TypeVar

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.engine.engine import Engine
from layerskip_kernels.engine.request import Output

__all__ = ["EngineWorker", "QueueFullError", "Submission", "WorkerStoppedError"]

Result = TypeVar("Result")


class QueueFullError(RuntimeError):
    """The queue is full; ask again later."""


class WorkerStoppedError(RuntimeError):
    """The server is shutting down, or its engine failed."""


class Submission:
    """The samples of one prompt on their way: ``next`` gives (sample, Output) until all have ended.

    ``arrived``: when it was asked for, by the monotonic clock.
    """

    def __init__(self, request_ids: Sequence[int], arrived: float) -> None:
        self.request_ids = list(request_ids)
        self.arrived = arrived
        self._queue: asyncio.Queue[tuple[int, Output] | BaseException] = asyncio.Queue()
        self._unfinished = len(self.request_ids)

    @property
    def finished(self) -> bool:
        return self._unfinished == 0

    async def next(self) -> tuple[int, Output]:
        """The next output of any sample. Raises the request's own error, or WorkerStoppedError."""
        item = await self._queue.get()
        if isinstance(item, BaseException):
            self._unfinished = 0
            raise item
        sample, output = item
        self._unfinished -= output.finish_reason is not None
        if output.error is not None:
            raise output.error
        return sample, output

    def put(self, item: tuple[int, Output] | BaseException) -> None:
        self._queue.put_nowait(item)


class EngineWorker:
    """Owns an engine: only its thread touches it. All methods belong to one event loop.

    ``max_queue``: requests (samples counted one by one) that may be unfinished at a time.
    """

    def __init__(self, engine: Engine, max_queue: int = 256) -> None:
        self.engine = engine
        self.max_queue = max_queue
        # Called in the event loop: with each request and its arrival, then with its outputs.
        self.on_begin: Callable[[int, float], None] = lambda request_id, arrived: None
        self.on_output: Callable[[Output], None] = lambda output: None
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._submissions: dict[int, tuple[Submission, int]] = {}  # request id -> its submission and its sample
        self._pending = 0  # samples handed to the thread and not yet registered
        self._draining = False
        self._halted = False
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._work, name="layerskip-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- in the event loop ----

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._failure is None and self._thread.is_alive() and not self._draining

    @property
    def num_unfinished(self) -> int:
        """Samples that were asked for and have not ended."""
        return len(self._submissions) + self._pending

    async def submit(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, salt: bytes | None = None
    ) -> list[Submission]:
        """Queue prompts, ``config.num_samples`` texts each; all of them or none.

        Raises what Engine.add_samples raises, ValueError for more texts than the queue ever takes, QueueFullError
        when it is full, WorkerStoppedError when the server takes no more.
        """
        if not self.healthy:
            raise WorkerStoppedError(
                "the server is shutting down" if self._failure is None else "the engine has failed"
            )
        count = len(prompts) * config.num_samples
        if count > self.max_queue:
            raise ValueError(f"n and prompt ask for {count} texts; this server takes at most {self.max_queue}")
        if self.num_unfinished + count > self.max_queue:
            raise QueueFullError(f"{self.num_unfinished} requests are in progress, at most {self.max_queue} may be")
        self._pending += count
        arrived = monotonic()
        adding = asyncio.ensure_future(self.call(lambda: self._add(prompts, config, salt, arrived)))
        try:
            return await asyncio.shield(adding)
        except asyncio.CancelledError:  # the client has disconnected
            adding.add_done_callback(self._cancel_added)
            raise
        finally:
            self._pending -= count

    def cancel(self, submission: Submission) -> None:
        """End a submission's samples; its pages are free after the step that is running."""
        for request_id in submission.request_ids:
            self._orders.put(lambda request_id=request_id: self._cancel(request_id))  # type: ignore[misc]

    async def call(self, function: Callable[[], Result]) -> Result:
        """Run a function on the engine's thread, between steps."""
        future: Future[Result] = Future()

        def order() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._orders.put(order)
        return await asyncio.wrap_future(future)

    async def drain(self, seconds: float) -> None:
        """Take nothing new, let what runs come to its end for at most ``seconds``, then cancel the rest."""
        self._draining = True
        deadline = monotonic() + seconds
        while self.num_unfinished and self._thread.is_alive() and monotonic() < deadline:
            await asyncio.sleep(0.02)
        for submission in {submission for submission, _ in self._submissions.values()}:
            self.cancel(submission)
        self._orders.put(self._halt)
        await asyncio.to_thread(self._thread.join)
        await asyncio.sleep(0)  # what the thread has posted last is delivered before this returns

    def _cancel_added(self, adding: asyncio.Future[list[Submission]]) -> None:
        if adding.exception() is None:
            for submission in adding.result():
                self.cancel(submission)

    def _register(self, submissions: list[Submission]) -> None:
        for submission in submissions:
            for sample, request_id in enumerate(submission.request_ids):
                self._submissions[request_id] = submission, sample
                self.on_begin(request_id, submission.arrived)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            self.on_output(output)
            submission, sample = self._submissions[output.request_id]
            if output.finish_reason is not None:
                del self._submissions[output.request_id]
            submission.put((sample, output))

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        for submission in {submission for submission, _ in self._submissions.values()}:
            submission.put(WorkerStoppedError(f"the engine has failed: {error}"))
        self._submissions.clear()

    # ---- on the engine's thread ----

    def _work(self) -> None:
        try:
            while not self._halted:
                self._take_orders(wait=not self.engine.num_unfinished)
                if self.engine.num_unfinished:
                    self._post(self._deliver, self.engine.step())
        except BaseException as error:
            self._post(self._fail, error)
            raise

    def _take_orders(self, wait: bool) -> None:
        if wait:
            self._orders.get()()
        while not self._orders.empty():
            self._orders.get()()

    def _add(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, salt: bytes | None, arrived: float
    ) -> list[Submission]:
        added: list[Submission] = []
        try:
            for prompt in prompts:
                added.append(Submission(self.engine.add_samples(prompt, config, salt=salt), arrived))
        except Exception:
            for submission in added:
                for request_id in submission.request_ids:
                    self._cancel(request_id)
            self._post(self._register, added)  # their ends will be handed out
            raise
        self._post(self._register, added)  # before any output of theirs
        return added

    def _cancel(self, request_id: int) -> None:
        self.engine.cancel(request_id)

    def _halt(self) -> None:
        while self.engine.num_unfinished:  # cancelled ones, whose ends are still to be handed out
            self._post(self._deliver, self.engine.step())
        self._halted = True

    def _post(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)
