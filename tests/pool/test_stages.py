"""What a cold start took: which stages count, and how long they are."""

from __future__ import annotations

import pytest
from support.pool_fakes import Clock, FakeModel, FakeProbe, ask, make_pool

from llava_engine.errors import SpawnFailed
from llava_engine.pool.stages import Stages


def test_stages_are_timed_in_a_cold_start_alone() -> None:
    clock = Clock()
    stages = Stages(clock)
    with stages("before"):
        clock.now += 1
    with stages.cold_start():
        clock.now += 0.5
        with stages("a"):
            clock.now += 2
        with stages("b"):
            clock.now += 3
        with stages("a"):
            clock.now += 4
    with stages("a"):
        clock.now += 1
    assert stages.seconds() == {"a": 6.0, "b": 3.0, "total": 9.5}
    with stages.cold_start(), stages("c"):
        clock.now += 1
    assert stages.seconds() == {"c": 1.0, "total": 1.0}


def test_what_threads_do_at_once_counts_once() -> None:
    clock = Clock()
    stages = Stages(clock)
    with stages.cold_start():
        one, two, three = stages("load"), stages("load"), stages("load")
        one.__enter__()  # 0 to 3
        clock.now += 1
        two.__enter__()  # 1 to 2, inside the first
        clock.now += 1
        two.__exit__(None, None, None)
        three.__enter__()  # 2 to 5, beyond it
        clock.now += 1
        one.__exit__(None, None, None)
        clock.now += 2
        three.__exit__(None, None, None)
    assert stages.seconds()["load"] == 5.0


def test_a_stage_that_fails_is_not_told() -> None:
    stages = Stages()
    with pytest.raises(ZeroDivisionError), stages.cold_start(), stages("a"):
        _ = 1 / 0
    assert stages.seconds() == {}
    with stages("late"):
        pass
    assert stages.seconds() == {}


def test_the_pool_tells_the_last_cold_start() -> None:
    model = FakeModel(RuntimeError("once"), share=10)
    spec = model.spec()
    with make_pool(FakeProbe()) as pool:
        pool.add_model(spec)
        with pytest.raises(SpawnFailed):
            ask(pool).text()
        assert "total" not in pool.health()["models"]["fake"]["cold_start"]
        assert ask(pool).text() == "7"
        told = pool.health()["models"]["fake"]["cold_start"]
        assert 0 <= told["devices"] <= told["total"]
        with spec.stages("more"):
            pass
        assert pool.health()["models"]["fake"]["cold_start"] == told
