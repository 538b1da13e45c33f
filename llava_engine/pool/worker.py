"""A worker: one thread with a mailbox that gets requests ready for its device's runtime.

A Backend is what the workers of a model on one device share (backend.py has the one that is not a
test's). Knows nothing of other models, of limits or of routing.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue
from typing import Protocol

from llava_engine.errors import ShuttingDown
from llava_engine.image.budget import Body
from llava_engine.pool.crew import Crew
from llava_engine.pool.request import Request, as_llava_error

logger = logging.getLogger(__name__)

_FETCHES_PER_THREAD = 4  # a fetch mostly waits, so more of them run at once
_JOIN_S = 2.0


class WorkerState(enum.StrEnum):
    """Where a worker is in its life."""

    SPAWNING = "spawning"  # memory is reserved, the thread not running yet
    LOADING = "loading"
    READY = "ready"
    PROCESSING = "processing"  # has requests
    IDLE = "idle"  # has had none for the idle timeout
    EVICTING = "evicting"
    DEAD = "dead"  # evicted, shut down, or ended by a fault
    FAILED = "failed"  # could not load, or its device was lost


_S = WorkerState
_NEXT = {
    _S.SPAWNING: {_S.LOADING, _S.FAILED},
    _S.LOADING: {_S.READY, _S.FAILED},
    _S.READY: {_S.PROCESSING, _S.IDLE, _S.EVICTING, _S.DEAD, _S.FAILED},
    _S.PROCESSING: {_S.READY, _S.DEAD, _S.FAILED},
    _S.IDLE: {_S.PROCESSING, _S.EVICTING, _S.DEAD, _S.FAILED},
    _S.EVICTING: {_S.DEAD, _S.FAILED},
    _S.DEAD: set(),
    _S.FAILED: set(),
}
LIVE = frozenset({_S.READY, _S.PROCESSING, _S.IDLE})
"""The states in which a worker takes requests."""
ENDED = frozenset({_S.DEAD, _S.FAILED})


class Backend(Protocol):
    """One model on one device, as its workers see it; tests bring their own."""

    def add_worker(self, name: str) -> None:
        """Make room for a worker's sequences. Raises MemoryExhausted."""

    def remove_worker(self, name: str) -> None:
        """Give that room back."""

    def fetch(self, request: Request) -> bytes:
        """What the request's URL leads to. Raises ImageError."""

    def start(self, request: Request, worker: str) -> None:
        """Decode, preprocess, tokenise and run. Raises LlavaError."""

    def memory_mb(self) -> int:
        """What the model takes on its device now."""

    def on_death(self, callback: Callable[[BaseException], None]) -> None:
        """Call `callback` when it can run nothing any more."""

    def close(self) -> None:
        """Free everything; what still runs ends with WorkerDied."""


Loader = Callable[[str, Callable[[], None]], Backend]
"""Loads a model onto the device of that name ("cuda:N" or "cpu"). The second argument is to be
called now and then while loading; it raises if nobody waits for the model any more."""


class Owner(Protocol):
    """Whom a worker reports to, from its own thread."""

    def worker_loading(self, worker: Worker) -> Backend | None:
        """The thread runs; returns the model if the device has it, and the worker shares it."""

    def worker_loaded(self, worker: Worker, backend: Backend) -> bool:
        """The worker can take requests; False if nobody waits for it any more."""

    def worker_ended(self, worker: Worker, cause: BaseException | None) -> None:
        """The thread is about to end; `cause` is None if it was asked to."""


class Worker:
    """Takes requests once loaded, until `stop`.

    `state`, `active`, `idle_since` and `backend` are guarded by the owner's lock.
    loaded: done when the worker can take requests; holds the exception if it cannot.
    """

    def __init__(
        self, number: int, registry_key: str, device: str, loader: Loader, *, threads: int
    ) -> None:
        self.number = number
        self.registry_key = registry_key
        self.name = f"{registry_key}#{number}"
        self.device = device
        self.state = WorkerState.SPAWNING
        self.active = 0
        self.idle_since = 0.0
        self.backend: Backend | None = None
        self.loaded: Future[None] = Future()
        self.abandoned = threading.Event()
        self._loader = loader
        self._mailbox: SimpleQueue[Request | BaseException | None] = SimpleQueue()
        self._fetchers = Crew(f"llava-fetch-{self.name}", threads * _FETCHES_PER_THREAD)
        self._preparers = Crew(f"llava-prepare-{self.name}", threads)

    def abandon(self) -> None:
        """Give up waiting for it to load; if it ever does, it frees what it took."""
        self.abandoned.set()
        self.end_loading(ShuttingDown("The pool has given this worker up."))

    def end_loading(self, error: BaseException | None) -> None:
        """Make `loaded` done, unless it is."""
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.loaded.set_result(None)
            else:
                self.loaded.set_exception(error)

    def become(self, state: WorkerState) -> None:
        """Change state. Raises RuntimeError for what is no legal transition."""
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"a worker cannot go from {self.state} to {state}")
        self.state = state

    def put(self, request: Request) -> None:
        """Hand over a request; returns at once."""
        self._mailbox.put(request)

    def stop(self) -> None:
        """End the thread after what is in the mailbox."""
        self._mailbox.put(None)

    def fail(self, cause: BaseException) -> None:
        """End the thread as if `cause` had been raised in it. Takes no lock."""
        self._mailbox.put(cause)

    @property
    def blocked(self) -> int:
        """Threads of it that requests which have ended do not let go: a picture's file object whose
        read() does not return, say. Others work in their place; see Crew."""
        return self._preparers.blocked

    def relieve(self) -> None:
        """Put threads in the place of those that are blocked; to be called now and then."""
        before, now = self._preparers.blocked, self._preparers.relieve()
        if now > before:
            logger.warning(
                "%d threads of worker %s are held by pictures of requests that have ended: their "
                "read() does not return.",
                now,
                self.name,
            )

    def run(self, owner: Owner) -> None:
        """The thread: load the model, or join it where it is, and serve until `stop` or `fail`."""
        cause: BaseException | None = None
        try:
            if self._load(owner):
                self._serve()
        except BaseException as error:  # noqa: BLE001  whatever it is, no stream may hang
            # Its frames hold what was loaded so far, for as long as a reader keeps the exception.
            traceback.clear_frames(error.__traceback__)
            cause = error
        self._fetchers.stop()
        self._preparers.stop()
        owner.worker_ended(self, cause)
        until = time.monotonic() + _JOIN_S
        self._fetchers.join(until)
        self._preparers.join(until)

    def _load(self, owner: Owner) -> bool:
        backend = owner.worker_loading(self)
        shared = backend is not None
        if backend is None:
            backend = self._loader(self.device, self._check_abandoned)
        try:
            backend.add_worker(self.name)
            if owner.worker_loaded(self, backend):
                return True
        except BaseException:
            if not shared:
                backend.close()
            raise
        if not shared:
            backend.close()
        return False

    def _check_abandoned(self) -> None:
        if self.abandoned.is_set():
            raise ShuttingDown("The pool has given this worker up.")

    def _serve(self) -> None:
        while (item := self._mailbox.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            self._dispatch(item)
            del item

    def _dispatch(self, request: Request) -> None:
        if not _wanted(request):
            return  # and its picture is gone already, which is not to look like a URL's
        if request.url is not None and request.image is None:
            crew, stage = self._fetchers, self._fetch
        else:
            crew, stage = self._preparers, self._prepare
        crew.put(lambda: self._attempt(request, stage), lambda: request.channel.cancelled)

    def _attempt(self, request: Request, stage: Callable[[Backend, Request], None]) -> None:
        request.channel.stamp("queued")
        backend = self.backend
        if backend is None or not _wanted(request):
            return
        try:
            stage(backend, request)
        except BaseException as error:  # noqa: BLE001  a caller's file object may raise SystemExit
            # A deadline that passed on the way is the reason, whatever came of it.
            if _wanted(request):
                request.channel.fail(as_llava_error(error))

    def _fetch(self, backend: Backend, request: Request) -> None:
        request.image = backend.fetch(request)
        if _wanted(request):
            self._mailbox.put(request)
        else:  # its end may have been noted before it had a picture to let go of
            request.image = None

    def _prepare(self, backend: Backend, request: Request) -> None:
        picture = request.image
        try:
            backend.start(request, self.name)
        finally:
            # An error's frames hold it for as long as a reader keeps that: others need its place.
            if isinstance(picture, Body):
                picture.let_go()


def _wanted(request: Request) -> bool:
    """Whether the request still has a reader and time; ends it if its time is up."""
    return not request.channel.overdue() and not request.channel.cancelled
