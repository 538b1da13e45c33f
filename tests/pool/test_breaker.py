"""The circuit breaker over a clock that the test moves."""

from __future__ import annotations

from support.pool_fakes import Clock

from llava_engine.errors import SpawnFailed
from llava_engine.pool.breaker import BreakerState, CircuitBreaker

FAILED = SpawnFailed("planted")


def make(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(failures=5, reset=60, successes=3, clock=clock)


def test_it_opens_after_five_failures_in_a_row_only() -> None:
    breaker = make(Clock())
    for _ in range(4):
        breaker.failure(FAILED)
    breaker.success()
    for _ in range(4):
        breaker.failure(FAILED)
    assert breaker.state is BreakerState.CLOSED and breaker.retry_after() == 0
    breaker.failure(FAILED)
    assert breaker.state is BreakerState.OPEN and breaker.retry_after() == 60


def test_it_tries_again_after_a_minute_and_closes_after_three_successes() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(5):
        breaker.failure(FAILED)
    clock.now += 59
    breaker.success()  # of a request that began before: it proves nothing
    assert breaker.retry_after() == 1
    clock.now += 1
    assert breaker.state is BreakerState.HALF_OPEN and breaker.retry_after() == 0
    breaker.success()
    breaker.success()
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.success()
    assert breaker.state is BreakerState.CLOSED


def test_a_failed_trial_opens_it_for_another_minute() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(5):
        breaker.failure(FAILED)
    clock.now += 60
    breaker.success()
    breaker.success()
    breaker.failure(FAILED)
    assert breaker.retry_after() == 60
    clock.now += 60
    breaker.success()
    breaker.success()
    assert breaker.state is BreakerState.HALF_OPEN  # the earlier two do not count
    breaker.success()
    assert breaker.state is BreakerState.CLOSED


def test_it_knows_what_it_opened_for_until_the_model_works_again() -> None:
    clock = Clock()
    breaker = make(clock)
    breaker.failure(FAILED)
    breaker.success()
    assert breaker.cause is None
    for _ in range(5):
        breaker.failure(FAILED)
    breaker.success()  # of a request that began before
    assert breaker.cause is FAILED
    clock.now += 60
    for _ in range(3):
        assert breaker.cause is FAILED
        breaker.success()
    assert breaker.cause is None
