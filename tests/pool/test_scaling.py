"""How many workers a pool keeps: evicted when idle, one more when all are busy."""

from __future__ import annotations

from support.pool_fakes import (
    Clock,
    FakeModel,
    ask,
    model_of,
    wait_for,
    warm,
)


def test_idle_workers_are_evicted_down_to_the_minimum() -> None:
    clock, model = Clock(), FakeModel(weights=100, share=10)
    with warm(model, clock, min_workers=1) as pool:
        assert pool.total_memory_mb() == 120
        clock.now += 299
        pool.maintain()
        assert [str(w.state) for w in model_of(pool).workers] == ["ready", "ready"]
        clock.now += 1
        pool.maintain()
        states = {str(w.state) for w in model_of(pool).workers}
        assert states <= {"idle", "evicting"}
        pool.maintain()
        wait_for(pool, lambda: len(model_of(pool).workers) == 1)
        assert pool.total_memory_mb() == 110
        clock.now += 1000
        pool.maintain()
        pool.maintain()
        assert pool.has_workers("fake") and not model.backend.closed
        assert ask(pool).text() == "7"  # idle ones still answer


def test_an_evicted_model_comes_back() -> None:
    clock, model = Clock(), FakeModel(weights=100, share=10)
    with warm(model, clock) as pool:
        clock.now += 300
        pool.maintain()
        pool.maintain()
        wait_for(pool, lambda: not model_of(pool).workers)
        assert pool.total_memory_mb() == 0 and model.backend.closed
        clock.now += 1000
        pool.maintain()
        assert not model_of(pool).spawning  # nobody asks for it
        assert ask(pool).text() == "7"
        assert pool.total_memory_mb() == 120 and len(model.loads) == 2


def test_one_more_worker_when_all_are_busy_and_requests_wait() -> None:
    clock, model = Clock(), FakeModel(hold=True, share=10)
    with warm(model, clock, max_workers=3) as pool:
        first = ask(pool)
        model.backend.await_held(1)
        pool.maintain()
        assert not model_of(pool).spawning  # one worker is free
        second = ask(pool)
        model.backend.await_held(1)
        pool.maintain()
        wait_for(pool, lambda: len(model_of(pool).live_workers) == 3)
        third = ask(pool)
        model.backend.await_held(1)
        pool.maintain()
        assert not model_of(pool).spawning  # max_workers
        model.backend.release()
        assert first.text() == second.text() == third.text() == "7"
