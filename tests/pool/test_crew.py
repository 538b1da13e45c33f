"""Threads for jobs: no more than are allowed, and others in the place of those that block."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from llava_engine.pool.crew import _MOST_REPLACED, Crew

PATIENCE = 20


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew("llava-test", 2)
    yield crew
    crew.stop()
    crew.join(time.monotonic() + PATIENCE)


class Job:
    """Returns when the test says so."""

    def __init__(self, crew: Crew) -> None:
        self.began, self.gate = threading.Event(), threading.Event()
        self.over = False
        self.thread: threading.Thread | None = None
        crew.put(self._run, lambda: self.over)

    def _run(self) -> None:
        self.thread = threading.current_thread()
        self.began.set()
        assert self.gate.wait(60)

    def begins(self) -> bool:
        return self.began.wait(PATIENCE)


def threads(crew: Crew) -> int:
    return len(crew._threads)


def test_jobs_that_are_wanted_wait_for_a_thread(crew: Crew) -> None:
    jobs = [Job(crew) for _ in range(3)]
    assert jobs[0].begins() and jobs[1].begins()
    for _ in range(3):
        assert crew.relieve() == 0
    assert threads(crew) == 2 and not jobs[2].began.is_set()
    jobs[0].gate.set()
    assert jobs[2].begins()
    for job in jobs:
        job.gate.set()


def test_a_job_that_is_over_gets_some_time_to_return(crew: Crew) -> None:
    jobs = [Job(crew) for _ in range(3)]
    assert jobs[0].begins() and jobs[1].begins()
    jobs[0].over = True
    assert crew.relieve() == 0 and threads(crew) == 2
    assert crew.relieve() == 1 and threads(crew) == 3
    assert jobs[2].begins()
    for job in jobs:
        job.gate.set()


def test_the_thread_of_a_job_that_comes_back_at_last_ends(crew: Crew) -> None:
    blocking = [Job(crew) for _ in range(2)]
    for job in blocking:
        assert job.begins()
        job.over = True
    crew.relieve()
    assert crew.relieve() == crew.blocked == 2
    others = [Job(crew) for _ in range(2)]
    assert all(job.begins() for job in others) and threads(crew) == 4
    for job in blocking:
        job.gate.set()
        assert job.thread is not None
        job.thread.join(PATIENCE)
        assert not job.thread.is_alive()
    assert crew.blocked == 0 and threads(crew) == 2
    last = Job(crew)
    for job in (*others, last):
        job.gate.set()
    assert last.begins()


def test_so_many_are_replaced_and_no_more(crew: Crew) -> None:
    most = 2 + 2 * _MOST_REPLACED
    jobs: list[Job] = []
    while len(jobs) < most:
        jobs += [Job(crew), Job(crew)]
        for job in jobs[-2:]:
            assert job.begins()
            job.over = True
        crew.relieve()
        crew.relieve()
    waits = Job(crew)
    assert crew.relieve() == threads(crew) == most and not waits.began.is_set()
    jobs[0].gate.set()
    assert waits.begins()
    for job in (*jobs, waits):
        job.gate.set()
