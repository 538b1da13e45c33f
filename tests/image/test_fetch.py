"""The URL section of safety.md, line by line, against a real server on loopback.

The server listens on 127.0.0.1, an address that may not be reached; tests that need an answer
allow the host `pictures.test`, which a stub resolver leads there. Nothing leaves the machine.
"""

from __future__ import annotations

import gzip
import io
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.http_server import Connection, HttpServer, Request, redirect

from llava_engine.errors import (
    BlockedAddress,
    FetchFailed,
    FetchTimeout,
    ImageDecodeError,
    ImageFetchError,
    ImageTooLarge,
)
from llava_engine.image.connect import is_public
from llava_engine.image.fetch import Fetcher
from llava_engine.image.url import check_url

TLS = Path(__file__).parent / "tls"
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


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer({"/a.png": PNG}) as server:
        yield server


def fetcher(
    *,
    timeout: float = 10.0,
    max_bytes: int = 1 << 20,
    resolver: Names | None = None,
    allow: tuple[str, ...] = (ALLOWED,),
    ssl_context: ssl.SSLContext | None = None,
    budget: int | None = None,
) -> Fetcher:
    return Fetcher(
        max_bytes=max_bytes,
        timeout=timeout,
        allow_hosts=allow,
        resolver=resolver or Names(),
        ssl_context=ssl_context,
        budget=budget,
    )


def fetch(url: str, **options: object) -> bytes:
    fetch = fetcher(**options)  # type: ignore[arg-type]
    try:
        return fetch.fetch(url)
    finally:
        fetch.close()


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


def test_the_system_resolver_and_literals_by_name(server: HttpServer) -> None:
    with_system = Fetcher(max_bytes=1 << 20, timeout=10, allow_hosts=("127.0.0.1",))
    assert with_system.fetch(server.url("/a.png")) == PNG
    with pytest.raises(BlockedAddress):  # the switch names hosts as they stand in the URL
        with_system.fetch(server.url("/a.png", "2130706433"))
    with_system.close()
    assert server.connections == 1


# --- where no connection may go ---------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "017700000001", "0x7f.1"]
    + ["127.0.0.1.", "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[::1]", "0.0.0.0", "[::]"]
    + ["[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::ffff:7f00:1]", "localhost", "LOCALHOST"],
)
def test_every_spelling_of_loopback_is_refused(server: HttpServer, host: str) -> None:
    names = Names(localhost=["127.0.0.1"])
    with pytest.raises(ImageFetchError) as caught:
        fetch(server.url("/a.png", host), resolver=names)
    # httpx itself refuses IPv4 addresses that Python's ipaddress does not read
    assert isinstance(caught.value, BlockedAddress) or not names.asked or host.endswith("0.0.1.")
    assert "127.0.0.1" not in str(caught.value)
    assert server.connections == 0


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.1.2.3"]
    + ["224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.0.8"]
    + ["192.0.2.1", "198.51.100.1", "203.0.113.1", "::", "::1", "::ffff:10.0.0.1", "::a00:1"]
    + ["64:ff9b::a00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:a00:1::", "2002:a9fe:a9fe::1"]
    + ["fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd12::1", "ff02::1", "ff0e::1"]
    + ["2001:db8::1", "2001::1", "100::1", "3fff::1", "5f00::1"],
)
def test_addresses_that_are_not_public(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_public(address)

    def connect(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", connect)
    for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
        with pytest.raises(BlockedAddress) as caught:
            fetch("http://evil.test/", resolver=Names(evil_test=answer))
        assert address not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"],
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_the_connection_goes_to_the_address_that_was_checked(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS answers with a public address first and with a forbidden one ever after."""
    rebinding = Names()
    first = [[PUBLIC]]
    rebinding.answers["rebind.test"] = ["127.0.0.1"]
    resolve = rebinding.__call__
    connected: list[tuple[str, int]] = []
    real = socket.create_connection

    def resolver(host: str, port: int) -> Sequence[str]:
        answer = resolve(host, port)
        return first.pop() if first else answer

    def connect(address: tuple[str, int], *args: object, **kwargs: object) -> socket.socket:
        connected.append(address)
        # the network, as it were: the public address is our server
        return real(("127.0.0.1", server.port), *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "create_connection", connect)
    checked = Fetcher(max_bytes=1 << 20, timeout=10, resolver=resolver)
    assert checked.fetch("http://rebind.test/a.png") == PNG
    assert connected == [(PUBLIC, 80)] and rebinding.asked == ["rebind.test"]
    checked.close()  # and with it the kept connection; the next one asks DNS again
    with pytest.raises(BlockedAddress):
        checked.fetch("http://rebind.test/a.png")
    assert connected == [(PUBLIC, 80)]


def test_a_second_address_is_tried_when_the_first_fails(server: HttpServer) -> None:
    # nothing listens on 127.0.0.2
    names = Names(pictures_test=["127.0.0.2", "127.0.0.1"])
    assert fetch(server.url("/a.png", ALLOWED), resolver=names) == PNG


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://pictures.test/a", "data:image/png;base64,AAAA", "gopher://a/"]
    + ["pictures.test/a.png", "//pictures.test/a.png", " http://pictures.test/", "javascript:1"]
    + ["http://user@pictures.test/", "http://user:secret@pictures.test/", "http://@pictures.test/"]
    + ["http://pictures.test\\@evil.test/", "http:\\\\pictures.test/", "http://evil.test/\\"],
)
def test_schemes_credentials_and_backslashes(url: str) -> None:
    names = Names()
    with pytest.raises(ImageFetchError) as caught:
        fetch(url, resolver=names)
    if url != "http://@pictures.test/":  # no credentials, if an odd spelling
        assert isinstance(caught.value, BlockedAddress) and not names.asked
    assert not caught.value.retryable or url == "http://@pictures.test/"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///a.png", "http://a:0/", "http://a:99999/", "http://a:b/", "http://[::1/"]
    + ["http://a\nb/", "http://\ud800/", "http://ⓔxample.test/", "http://a/" + "b" * 70_000],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(FetchFailed) as caught:
        fetch(url)
    assert not caught.value.retryable


def test_what_can_be_no_url_is_refused_at_the_call() -> None:
    for value in (None, b"http://a/", 3):
        with pytest.raises(TypeError):
            check_url(value)
    with pytest.raises(ValueError):
        check_url("")
    check_url("anything else comes through the stream")


# --- redirects --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(server: HttpServer, status: int) -> None:
    server.routes["/old"] = redirect("/a.png", status)
    assert fetch(server.url("/old", ALLOWED)) == PNG


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/a.png",
        "http://private.test:{port}/a.png",
        "//2130706433:{port}/a.png",
    ]
    + ["http://[::ffff:127.0.0.1]:{port}/a.png", "file:///etc/passwd", "ftp://pictures.test/"]
    + [
        "http://u:p@pictures.test:{port}/a.png",
        "http://pictures.test:{port}\\@a/",
        "\\\\private.test/",
    ],
)
def test_redirects_go_by_the_same_rules(server: HttpServer, location: str) -> None:
    with HttpServer({"/": redirect(location.format(port=server.port))}) as front:
        with pytest.raises(BlockedAddress):
            fetch(front.url("/", ALLOWED), resolver=Names(private_test=["127.0.0.1"]))
        assert front.connections == 1
    assert server.connections == 0


def test_five_redirects_and_no_more(server: HttpServer) -> None:
    server.routes["/0"] = PNG
    for i in range(1, 7):
        server.routes[f"/{i}"] = redirect(f"/{i - 1}")
    assert fetch(server.url("/5", ALLOWED)) == PNG
    with pytest.raises(FetchFailed, match="redirects"):
        fetch(server.url("/6", ALLOWED))
    server.routes["/loop"] = redirect("/loop")
    before = len(server.requests)
    with pytest.raises(FetchFailed, match="redirects"):
        fetch(server.url("/loop", ALLOWED))
    assert len(server.requests) == before + 6


def test_broken_redirects(server: HttpServer) -> None:
    server.routes["/nowhere"] = redirect("")
    server.routes["/bytes"] = redirect("/\xff")
    for path in ("/nowhere", "/bytes"):
        with pytest.raises(FetchFailed, match="redirect"):
            fetch(server.url(path, ALLOWED))


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


def test_slow_dns_meets_the_deadline() -> None:
    answer = threading.Event()

    def resolver(host: str, port: int) -> Sequence[str]:
        answer.wait(60)
        return ["127.0.0.1"]

    slow = Fetcher(max_bytes=1, timeout=0.2, resolver=resolver)
    with pytest.raises(FetchTimeout):
        slow.fetch("http://slow.test/")
    answer.set()
    slow.close()


def test_an_endless_body_is_stopped_near_the_cap(server: HttpServer) -> None:
    piece = b"%x\r\n%b\r\n" % (4096, bytes(4096))

    def endless(request: Request, connection: Connection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.send(b"8\r\n" + PNG[:8] + b"\r\n")
        while connection.send(piece):
            pass

    server.routes["/endless"] = endless
    with pytest.raises(ImageTooLarge):
        fetch(server.url("/endless", ALLOWED), max_bytes=200_000)


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


def test_fetches_share_a_budget_of_bytes(server: HttpServer) -> None:
    held, release = threading.Event(), threading.Event()

    def hold(request: Request, connection: Connection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG[:-1])
        held.set()
        release.wait(30)
        connection.send(PNG[-1:])

    server.routes["/hold"] = hold
    shared = fetcher(max_bytes=len(PNG), budget=len(PNG))
    results: list[bytes] = []
    holder = threading.Thread(
        target=lambda: results.append(shared.fetch(server.url("/hold", ALLOWED)))
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
    with pytest.raises(ValueError, match="budget"):
        fetcher(max_bytes=10, budget=9)


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


@pytest.mark.parametrize(
    "encoding", ["gzip", "br", "zstd", "deflate", "x-unknown", "identity, gzip"]
)
def test_compressed_answers_are_refused(server: HttpServer, encoding: str) -> None:
    bomb = gzip.compress(bytes(10 << 20)) if encoding == "gzip" else zlib.compress(PNG)

    def compressed(request: Request, connection: Connection) -> None:
        connection.respond(bomb, headers={"Content-Encoding": encoding})

    server.routes["/z"] = compressed
    with pytest.raises(FetchFailed, match="compressed") as caught:
        fetch(server.url("/z", ALLOWED))
    assert not caught.value.retryable


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


def test_proxies_of_the_environment_are_not_used(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HttpServer() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url())
        assert fetch(server.url("/a.png", ALLOWED)) == PNG
        assert proxy.connections == 0


# --- TLS --------------------------------------------------------------------------------------


@pytest.fixture
def tls_server() -> Iterator[HttpServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    seen: list[str | None] = []
    context.sni_callback = lambda sock, name, ctx: seen.append(name)
    with HttpServer({"/a.png": PNG}, ssl_context=context) as server:
        server.routes["/down"] = redirect(f"http://{ALLOWED}:{server.port}/a.png")
        server.names = seen  # type: ignore[attr-defined]
        yield server


def test_tls_verifies_the_hosts_name_not_the_address(tls_server: HttpServer) -> None:
    trusting = ssl.create_default_context(cafile=TLS / "ca.pem")
    assert fetch(tls_server.url("/a.png", ALLOWED), ssl_context=trusting) == PNG
    assert tls_server.names == [ALLOWED]  # type: ignore[attr-defined]
    names = Names(other_test=["127.0.0.1"])
    with pytest.raises(FetchFailed) as caught:
        fetch(
            tls_server.url("/a.png", "other.test"),
            ssl_context=trusting,
            resolver=names,
            allow=("other.test",),
        )
    assert "other.test" in str(caught.value.__cause__)
    with pytest.raises(FetchFailed):
        fetch(tls_server.url("/a.png", ALLOWED))  # an authority that the world does not trust
    assert len(tls_server.requests) == 1


def test_no_redirect_from_https_to_http(tls_server: HttpServer) -> None:
    trusting = ssl.create_default_context(cafile=TLS / "ca.pem")
    with pytest.raises(BlockedAddress, match="https to http"):
        fetch(tls_server.url("/down", ALLOWED), ssl_context=trusting)
    assert tls_server.connections == 1
