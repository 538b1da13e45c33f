"""A Fetcher for tests: a resolver that knows what it is told, and one host that is allowed.

The servers of the tests listen on loopback, where no fetch may go; tests that need an answer allow
the host `pictures.test`, which the stub resolver leads there. Nothing leaves the machine.
"""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
from collections.abc import Sequence

import numpy as np
from PIL import Image

from llava_engine.image.budget import ByteBudget
from llava_engine.image.connect import Resolver
from llava_engine.image.fetch import Fetcher

ALLOWED = "pictures.test"
PUBLIC = "93.184.215.14"


def png(size: int = 64) -> bytes:
    array = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


PNG = png()


class Names:
    """A resolver that knows what it is told, counts, and takes literals as the system does."""

    def __init__(self, **answers: Sequence[str]) -> None:
        self.answers = {name.replace("_", "."): answer for name, answer in answers.items()}
        self.answers.setdefault(ALLOWED, ["127.0.0.1"])
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host in self.answers:
            return self.answers[host]
        answers = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
        return [str(answer[4][0]) for answer in answers]


def fetcher(
    *,
    timeout: float = 10.0,
    max_bytes: int = 1 << 20,
    resolver: Resolver | None = None,
    allow: tuple[str, ...] = (ALLOWED,),
    ssl_context: ssl.SSLContext | None = None,
    budget: int | None = None,
    proxy: str | None = None,
) -> Fetcher:
    return Fetcher(
        max_bytes=max_bytes,
        timeout=timeout,
        allow_hosts=allow,
        resolver=resolver or Names(),
        ssl_context=ssl_context,
        budget=None if budget is None else ByteBudget(budget),
        proxy=proxy,
    )


def fetch(url: str, **options: object) -> bytes:
    with contextlib.closing(fetcher(**options)) as fetch:  # type: ignore[arg-type]
        return fetch.fetch(url)
