"""Requests under load: so many at once, or arriving at random; and what was seen of each.

Every request is read on a thread of its own, as a caller would read it, and its times are those at
which that thread had the text in its hands.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import llava_engine

clock = time.perf_counter

Ask = Callable[[int], llava_engine.ChunkStream]
"""Asks the request of that number."""


@dataclass(slots=True)
class Record:
    """One request. Times in seconds of `clock`.

    arrivals: when each chunk came. token_ids: of all chunks; a chunk may bring several, and tokens
    that are no text yet come with a later one. stages: seconds from the call to the end of each
    stage, as Timings has them. error: what it failed with; then the rest is as far as it came.
    """

    number: int
    submitted: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def first_token_s(self) -> float:
        """From the call to the first chunk; to the end where no token was text."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.submitted

    @property
    def latency_s(self) -> float:
        """From the call to the end."""
        return self.ended - self.submitted

    @property
    def token_s(self) -> float:
        """Mean time of a token after the first; 0 where there is none."""
        if self.output_tokens < 2:
            return 0.0
        return (self.latency_s - self.first_token_s) / (self.output_tokens - 1)


def closed_loop(ask: Ask, count: int, concurrency: int) -> tuple[list[Record], float]:
    """`count` requests, `concurrency` at once: each reader asks the next when its last has ended.

    Returns the records in the order of their numbers, and the seconds from start to last end.
    """
    began = clock()
    with ThreadPoolExecutor(concurrency, "llava-bench") as readers:
        records = list(readers.map(lambda number: _read(ask, number), range(count)))
    return records, max(record.ended for record in records) - began


def open_loop(ask: Ask, count: int, rate: float, seed: int) -> tuple[list[Record], float]:
    """`count` requests that arrive as a Poisson process of `rate` a second, whatever still runs.

    The arrivals are the same for the same seed. Returns as closed_loop.
    """
    draw = random.Random(seed)
    began = due = clock()
    with ThreadPoolExecutor(count, "llava-bench") as readers:
        futures = []
        for number in range(count):
            due += draw.expovariate(rate)
            time.sleep(max(0.0, due - clock()))
            futures.append(readers.submit(_read, ask, number))
        records = [future.result() for future in futures]
    return records, max(record.ended for record in records) - began


def _read(ask: Ask, number: int) -> Record:
    record = Record(number, clock())
    stream = ask(number)
    with stream:
        try:
            for chunk in stream:
                record.arrivals.append(clock())
                record.token_ids.extend(chunk.token_ids)
        except llava_engine.LlavaError as error:
            record.error = f"{type(error).__name__}: {error}"
        record.ended = clock()
    times = dataclasses.asdict(stream.timings)
    record.stages = {name: seconds for name, seconds in times.items() if seconds is not None}
    usage = stream.usage
    record.prompt_tokens, record.image_tokens = usage.prompt_tokens, usage.image_tokens
    record.cached_tokens, record.output_tokens = usage.cached_tokens, usage.completion_tokens
    return record
