"""A circuit breaker: after repeated failures of a model, refuse at once instead of trying.

Errors that will not go away by themselves open it, too: a checkpoint that is broken may take a
minute to be found so each time. What it opened for is kept, for those that are refused to be told.
Pure state over a clock; knows nothing of models, threads or requests.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from llava_engine.errors import LlavaError


class BreakerState(StrEnum):
    """closed: all pass. open: none pass. half_open: a few pass, and decide."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Opens after `failures` in a row, lets trials pass after `reset` seconds, closes after
    `successes` of them; a failed trial opens it again. Not thread-safe.

    cause: the last failure; None once the model has answered again.
    """

    def __init__(
        self, *, failures: int, reset: float, successes: int, clock: Callable[[], float]
    ) -> None:
        self._failures = failures
        self._reset = reset
        self._successes = successes
        self._clock = clock
        self.cause: LlavaError | None = None
        self._in_a_row = 0
        self._passed = 0
        self._opened: float | None = None

    @property
    def state(self) -> BreakerState:
        """The state now."""
        if self._opened is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self.retry_after() > 0 else BreakerState.HALF_OPEN

    def retry_after(self) -> float:
        """Seconds until a request may pass; 0 when one may now."""
        if self._opened is None:
            return 0.0
        return max(0.0, self._opened + self._reset - self._clock())

    def success(self) -> None:
        """A request was answered."""
        self._in_a_row = 0
        if self._opened is None:
            self.cause = None
        elif self.state is BreakerState.HALF_OPEN:
            self._passed += 1
            if self._passed >= self._successes:
                self._opened = None
                self.cause = None

    def failure(self, cause: LlavaError) -> None:
        """The model failed on a request, or could not be loaded. `cause` may be kept for long: it
        should come without a traceback, whose frames hold pictures or weights."""
        self.cause = cause
        self._in_a_row += 1
        half_open = self.state is BreakerState.HALF_OPEN
        if half_open or (self._opened is None and self._in_a_row >= self._failures):
            self._opened = self._clock()
            self._passed = 0
