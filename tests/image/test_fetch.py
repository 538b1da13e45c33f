"""Time, size and content of a fetch, against a real server on loopback.

See support.fetching for the resolver and the hosts, test_url.py for URLs and redirects, and
test_connect.py for addresses.
"""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
import zlib
from collections.abc import Iterator

import pytest
from support.fetching import ALLOWED, PNG, Names, fetch, fetcher
from support.http_server import Connection, HttpServer, Request

from llava_engine.errors import (
    FetchFailed,
    FetchTimeout,
    ImageDecodeError,
    ImageTooLarge,
)
from llava_engine.image.budget import ByteBudget
from llava_engine.image.connect import DeadlineStream


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read of a fetch brought in, heads of answers and chunks included."""
    sizes: list[int] = []
    read = DeadlineStream.read

    def counting(self: DeadlineStream, max_bytes: int, timeout: float | None = None) -> bytes:
        data = read(self, max_bytes, timeout)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(DeadlineStream, "read", counting)
    return sizes


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a fetch has taken its share of the budget, which no server can see."""
    event = threading.Event()
    take = ByteBudget.take

    def taking(self: ByteBudget, size: int, timeout: float) -> int:
        taken = take(self, size, timeout)
        event.set()
        return taken

    monkeypatch.setattr(ByteBudget, "take", taking)
    return event


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer({"/a.png": PNG}) as server:
        yield server


def hold_back(server: HttpServer) -> threading.Event:
    """A route /hold, whose last byte comes when the event is set."""
    release = threading.Event()

    def hold(request: Request, connection: Connection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG[:-1])
        release.wait(30)
        connection.send(PNG[-1:])

    server.routes["/hold"] = hold
    return release


def test_a_picture_arrives_and_connections_are_kept(server: HttpServer) -> None:
    fetch = fetcher()
    for _ in range(3):
        assert fetch.fetch(server.url("/a.png", ALLOWED)) == PNG
    fetch.close()
    assert server.connections == 1
    request = server.requests[0]
    assert request.headers["host"] == f"{ALLOWED}:{server.port}"
    assert request.headers["accept-encoding"] == "identity"
    assert not {"cookie", "authorization", "referer"} & request.headers.keys()


# --- time and size ----------------------------------------------------------------------------


def test_a_byte_at_a_time_does_not_extend_the_deadline(server: HttpServer) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(PNG)}\r\n\r\n".encode()

    def slow_body(request: Request, connection: Connection) -> None:
        connection.send(head)
        connection.drip(PNG, 0.02)

    server.routes["/body"] = slow_body
    server.routes["/head"] = lambda request, connection: connection.drip(head * 100, 0.02)
    for path in ("/body", "/head"):
        started = time.monotonic()
        with pytest.raises(FetchTimeout):
            fetch(server.url(path, ALLOWED), timeout=0.3)
        assert time.monotonic() - started < 2  # the drip itself would last minutes


def test_the_callers_deadline_counts_where_it_is_nearer(server: HttpServer) -> None:
    server.routes["/silent"] = lambda request, connection: connection.drip(b"", 0)
    fetch = fetcher(timeout=60)
    with pytest.raises(FetchTimeout):
        fetch.fetch(server.url("/silent", ALLOWED), deadline=time.monotonic() + 0.2)
    with pytest.raises(FetchTimeout):
        fetch.fetch(server.url("/a.png", ALLOWED), deadline=time.monotonic() - 1)
    assert fetch.fetch(server.url("/a.png", ALLOWED)) == PNG
    fetch.close()


@pytest.mark.parametrize("framing", ["chunked", "a large chunk", "no length", "a lying length"])
def test_an_endless_body_is_stopped_within_64_kib_of_the_cap(
    server: HttpServer, received: list[int], framing: str
) -> None:
    cap = 200_000
    head = {
        "chunked": b"Transfer-Encoding: chunked\r\n\r\n",
        "a large chunk": b"Transfer-Encoding: chunked\r\n\r\n7fffffff\r\n",
        "no length": b"\r\n",
        "a lying length": b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n",
    }[framing]
    chunked = framing in ("chunked", "a lying length")

    def endless(request: Request, connection: Connection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\n" + head)
        part = PNG[:4096]
        while connection.send(b"1000\r\n%b\r\n" % part if chunked else part):
            pass

    server.routes["/endless"] = endless
    with pytest.raises(ImageTooLarge):
        fetch(server.url("/endless", ALLOWED), max_bytes=cap)
    overhead = len(head) + 100 + (cap + (64 << 10)) // 4096 * 8 * chunked
    assert cap < sum(received) <= cap + (64 << 10) + overhead


def test_endless_heads_and_trailers_are_stopped(server: HttpServer, received: list[int]) -> None:
    def head(request: Request, connection: Connection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\n")
        while connection.send(b"X-More: %b\r\n" % (b"x" * 1000)):
            pass

    def trailer(request: Request, connection: Connection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n" + PNG[:16])
        connection.send(b"\r\n0\r\n")
        while connection.send(b"X-More: %b\r\n" % (b"x" * 1000)):
            pass

    server.routes.update({"/head": head, "/trailer": trailer})
    for path in ("/head", "/trailer"):
        received.clear()
        with pytest.raises(FetchFailed):
            fetch(server.url(path, ALLOWED))
        assert sum(received) < 256 << 10


def test_content_length_is_not_believed(server: HttpServer) -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"

    def closing(extra: bytes, body: bytes) -> object:
        def handle(request: Request, connection: Connection) -> None:
            connection.send(head + extra + b"\r\n" + body)
            connection.sock.shutdown(socket.SHUT_RDWR)

        return handle

    lies = {
        "/short": closing(b"Content-Length: 10\r\n", PNG),  # ends in the middle of the picture
        "/long": closing(b"Content-Length: %d\r\n" % (len(PNG) + 9), PNG),
        "/huge": closing(b"Content-Length: 99999999\r\n", PNG),
        "/two": closing(b"Content-Length: 5\r\nContent-Length: 9\r\n", PNG),
        "/negative": closing(b"Content-Length: -1\r\n", PNG),
        "/none": closing(b"", PNG + bytes(300_000)),
    }
    server.routes.update(lies)  # type: ignore[arg-type]
    assert fetch(server.url("/short", ALLOWED)) == PNG[:10]
    for path in ("/long", "/two", "/negative"):
        with pytest.raises(FetchFailed):
            fetch(server.url(path, ALLOWED))
    for path in ("/huge", "/none"):
        with pytest.raises(ImageTooLarge):
            fetch(server.url(path, ALLOWED), max_bytes=100_000)


def test_fetches_share_a_budget_of_bytes(server: HttpServer, held: threading.Event) -> None:
    release = hold_back(server)
    shared = fetcher(max_bytes=len(PNG), budget=len(PNG))
    results: list[bytes] = []
    holder = threading.Thread(
        target=lambda: results.append(bytes(shared.fetch(server.url("/hold", ALLOWED))))
    )
    holder.start()
    assert held.wait(10)
    with pytest.raises(FetchTimeout, match="memory"):
        shared.fetch(server.url("/a.png", ALLOWED), deadline=time.monotonic() + 0.3)
    release.set()
    holder.join()
    assert results == [PNG]
    assert shared.fetch(server.url("/a.png", ALLOWED)) == PNG
    shared.close()


def test_a_body_keeps_its_place_until_it_is_let_go_of(server: HttpServer) -> None:
    url = server.url("/a.png", ALLOWED)
    with contextlib.closing(fetcher(budget=len(PNG))) as shared:
        body = shared.fetch(url)
        with pytest.raises(FetchTimeout, match="memory"):
            shared.fetch(url, deadline=time.monotonic() + 0.2)
        body.let_go()
        body.let_go()  # once is enough
        for _ in range(3):  # and so is to drop it
            assert shared.fetch(url) == body == PNG
        assert shared._budget._free == len(PNG)


def test_a_body_over_the_whole_budget_is_fetched_alone(
    server: HttpServer, held: threading.Event
) -> None:
    release = hold_back(server)
    with contextlib.closing(fetcher(budget=9)) as shared:
        results: list[bytes] = []
        holder = threading.Thread(
            target=lambda: results.append(bytes(shared.fetch(server.url("/hold", ALLOWED))))
        )
        holder.start()
        assert held.wait(10)
        with pytest.raises(FetchTimeout, match="memory"):
            shared.fetch(server.url("/a.png", ALLOWED), deadline=time.monotonic() + 0.3)
        release.set()
        holder.join()
        assert results == [PNG]
        assert shared.fetch(server.url("/a.png", ALLOWED)) == PNG


def test_a_fetch_over_the_budget_waits_and_then_succeeds(
    server: HttpServer, held: threading.Event
) -> None:
    """The body that holds it is chunked: what a Content-Length beside that says is not believed."""
    release = threading.Event()

    def hold(request: Request, connection: Connection) -> None:
        connection.send(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.send(b"%x\r\n%b\r\n" % (len(PNG), PNG))
        release.wait(30)
        connection.send(b"0\r\n\r\n")

    server.routes["/hold"] = hold
    results: list[bytes] = []
    with contextlib.closing(fetcher(max_bytes=len(PNG), budget=2 * len(PNG) - 1)) as shared:

        def work(path: str) -> threading.Thread:
            url = server.url(path, ALLOWED)
            thread = threading.Thread(target=lambda: results.append(bytes(shared.fetch(url))))
            thread.start()
            return thread

        holder = work("/hold")
        assert held.wait(10)
        with pytest.raises(FetchTimeout, match="memory"):
            shared.fetch(server.url("/a.png", ALLOWED), deadline=time.monotonic() + 0.3)
        waiter = work("/a.png")
        waiter.join(0.3)
        assert waiter.is_alive() and not results
        release.set()
        holder.join()
        waiter.join()
    assert results == [PNG, PNG]


def test_many_threads_share_a_fetcher(server: HttpServer) -> None:
    shared = fetcher(budget=2 << 20)
    results: list[bytes] = []

    def work() -> None:
        for _ in range(10):
            results.append(shared.fetch(server.url("/a.png", ALLOWED)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared.close()
    assert results == [PNG] * 80 and server.connections <= 8


# --- content ----------------------------------------------------------------------------------


# 10 MiB of zeros each, but for the last two, which are no bombs.
BOMBS = {
    "gzip": gzip.compress(bytes(10 << 20)),
    "deflate": zlib.compress(bytes(10 << 20)),
    "br": bytes.fromhex("cbffff3ff82700e2b14020f7fe2fffff3ff04f00c4611180eefd07"),
    # a frame of blocks that repeat one byte 128 Ki times
    "zstd": bytes.fromhex("28b52ffd0058" + "02001000" * 79 + "03001000"),
    "x-unknown": PNG,
    "identity, gzip": PNG,
}


@pytest.mark.parametrize("encoding", BOMBS)
def test_compressed_answers_are_refused(
    server: HttpServer, received: list[int], encoding: str
) -> None:
    bomb = BOMBS[encoding]

    def transferred(request: Request, connection: Connection) -> None:
        connection.send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: %b, chunked\r\n" % encoding.encode()
        )
        connection.send(b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(bomb), bomb))

    server.routes["/content"] = lambda request, connection: connection.respond(
        bomb, headers={"Content-Encoding": encoding}
    )
    server.routes["/transfer"] = transferred
    with pytest.raises(FetchFailed, match="compressed") as caught:
        fetch(server.url("/content", ALLOWED))
    assert not caught.value.retryable
    with pytest.raises(FetchFailed):
        fetch(server.url("/transfer", ALLOWED))
    if bomb is not PNG:  # and where no header owns up to it
        server.routes["/silent"] = bomb
        with pytest.raises(ImageDecodeError):
            fetch(server.url("/silent", ALLOWED))
    assert all(request.headers["accept-encoding"] == "identity" for request in server.requests)
    assert sum(received) < 64 << 10


def test_the_first_bytes_decide_and_not_the_header(server: HttpServer) -> None:
    def as_type(body: bytes, kind: str) -> object:
        return lambda request, connection: connection.respond(
            body, headers={"Content-Type": kind, "Content-Encoding": "identity"}
        )

    server.routes["/html"] = as_type(b"<!DOCTYPE html><html></html>", "image/png")  # type: ignore
    server.routes["/text"] = as_type(PNG, "text/plain")  # type: ignore
    server.routes["/empty"] = b""
    assert fetch(server.url("/text", ALLOWED)) == PNG
    for path in ("/html", "/empty"):
        with pytest.raises(ImageDecodeError):
            fetch(server.url(path, ALLOWED))


@pytest.mark.parametrize(
    ("status", "retryable"),
    [(404, False), (403, False), (204, False), (206, False), (429, True), (500, True), (503, True)],
)
def test_other_statuses(server: HttpServer, status: int, retryable: bool) -> None:
    server.routes["/s"] = lambda request, connection: connection.respond(PNG, status=status)
    with pytest.raises(FetchFailed, match=str(status)) as caught:
        fetch(server.url("/s", ALLOWED))
    assert caught.value.retryable is retryable


def test_failing_servers_and_names(server: HttpServer) -> None:
    server.routes["/noise"] = lambda request, connection: (
        connection.send(b"SSH-2.0\r\n\r\n") and None
    )
    server.routes["/gone"] = lambda request, connection: connection.sock.shutdown(socket.SHUT_RDWR)
    for path in ("/noise", "/gone"):
        with pytest.raises(FetchFailed):
            fetch(server.url(path, ALLOWED))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(FetchFailed) as caught:
            fetch(f"http://{ALLOWED}:{port}/")
    assert "127.0.0.1" not in str(caught.value) and caught.value.__cause__ is not None
    with pytest.raises(FetchFailed):
        fetch("http://unknown.test/")
    with pytest.raises(FetchFailed):
        fetch("http://silent.test/", resolver=Names(silent_test=[]))
