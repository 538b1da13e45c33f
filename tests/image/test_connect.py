"""Where a fetch connects to, how, and through whom: addresses, names, proxies, TLS.

See support.fetching for the resolver and the hosts.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.fetching import ALLOWED, PNG, PUBLIC, Names, fetch, fetcher
from support.http_server import Connection, Handler, HttpServer, Request, redirect, tunnel

from llava_engine.errors import BlockedAddress, FetchFailed, FetchTimeout, ImageFetchError
from llava_engine.image.connect import is_public
from llava_engine.image.fetch import Fetcher

TLS = Path(__file__).parent / "tls"


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer({"/a.png": PNG}) as server:
        yield server


def test_the_system_resolver_and_literals_by_name(server: HttpServer) -> None:
    with_system = Fetcher(max_bytes=1 << 20, timeout=10, allow_hosts=("127.0.0.1",))
    assert with_system.fetch(server.url("/a.png")) == PNG
    with pytest.raises(BlockedAddress):  # the switch names hosts as they stand in the URL
        with_system.fetch(server.url("/a.png", "2130706433"))
    with_system.close()
    assert server.connections == 1


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


def test_of_all_ways_to_loopback_none_gets_there() -> None:
    """Counted: connections that reached a forbidden address. The control allows the host."""
    with HttpServer({"/a.png": PNG}, host="0.0.0.0") as forbidden, HttpServer() as front:
        ways = 0
        for address in ("127.0.0.1", "127.9.9.9", "0.0.0.0", "::ffff:127.0.0.1"):
            names = Names(evil_test=[address], half_test=[PUBLIC, address])
            names.answers["other-half.test"] = [address, PUBLIC]
            text = f"[{address}]" if ":" in address else address
            for host in ("evil.test", "half.test", "other-half.test", text):
                url = forbidden.url("/a.png", host)
                front.routes["/to"] = redirect(url)
                for way in (url, front.url("/to", ALLOWED)):
                    ways += 1
                    with pytest.raises(BlockedAddress):
                        fetch(way, resolver=names)
            assert fetch(forbidden.url("/a.png", "evil.test"), resolver=names, allow=("evil.test",))
            assert forbidden.connections == 1, address
            forbidden.connections = 0
        assert front.connections == ways // 2 == 16


def test_a_second_address_is_tried_when_the_first_fails(server: HttpServer) -> None:
    # nothing listens on 127.0.0.2
    names = Names(pictures_test=["127.0.0.2", "127.0.0.1"])
    assert fetch(server.url("/a.png", ALLOWED), resolver=names) == PNG


def test_a_kept_connection_goes_on_to_the_address_that_was_checked(server: HttpServer) -> None:
    names = Names()
    with contextlib.closing(fetcher(resolver=names)) as kept:
        for answer in (["127.0.0.1"], ["127.0.0.2"], []):  # what DNS says later changes nothing
            names.answers[ALLOWED] = answer
            assert kept.fetch(server.url("/a.png", ALLOWED)) == PNG
    assert names.asked == [ALLOWED] and server.connections == 1


def test_hosts_of_one_address_share_no_connection(server: HttpServer) -> None:
    names = Names(other_test=["127.0.0.1"])
    with contextlib.closing(fetcher(resolver=names, allow=(ALLOWED, "other.test"))) as kept:
        for host in (ALLOWED, "other.test", ALLOWED, "other.test"):
            assert kept.fetch(server.url("/a.png", host)) == PNG
        with pytest.raises(BlockedAddress):  # allowed is a host, not what it leads to
            kept.fetch(server.url("/a.png", "127.0.0.1"))
    assert server.connections == 2
    assert [request.headers["host"].split(":")[0] for request in server.requests] == [
        ALLOWED,
        "other.test",
        ALLOWED,
        "other.test",
    ]


def test_a_kept_connection_that_the_server_closes_is_replaced(server: HttpServer) -> None:
    def once(request: Request, connection: Connection) -> None:
        """Answers the first request of each connection, and closes it at the second."""
        if connection.sock in seen:
            connection.sock.shutdown(socket.SHUT_RDWR)
        else:
            connection.respond(PNG)
            seen.append(connection.sock)

    seen: list[socket.socket] = []
    server.routes["/once"] = once
    server.routes["/never"] = lambda _, connection: connection.sock.shutdown(socket.SHUT_RDWR)
    with contextlib.closing(fetcher()) as kept:
        for i in range(3):
            assert kept.fetch(server.url("/once", ALLOWED)) == PNG
            assert (server.connections, len(server.requests)) == (i + 1, 2 * i + 1)
        with pytest.raises(FetchFailed):  # asked once of the kept connection and once of a new one
            kept.fetch(server.url("/never", ALLOWED))
    assert (server.connections, len(server.requests)) == (4, 7)


def wait_for_a_read(thread: threading.Thread) -> None:
    """Until it sleeps in a socket's recv: a socket that is closed earlier fails of itself."""
    until = time.monotonic() + 10
    place = Path(f"/proc/self/task/{thread.native_id}/wchan")
    while "poll" not in place.read_text():
        assert time.monotonic() < until, "it does not read"
        time.sleep(0.001)


def test_closing_wakes_a_fetch_in_flight(server: HttpServer) -> None:
    asked = threading.Event()

    def silent(request: Request, connection: Connection) -> None:
        asked.set()
        connection.stopping.wait(60)

    server.routes["/silent"] = silent
    closed = fetcher(timeout=50)
    errors: list[Exception] = []

    def work() -> None:
        try:
            closed.fetch(server.url("/silent", ALLOWED))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert asked.wait(10)
    wait_for_a_read(thread)
    closed.close()
    thread.join(25)  # well before the fetch's own deadline
    assert [type(error) for error in errors] == [FetchFailed]


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


# --- proxies -------------------------------------------------------------------------------------


def test_a_proxy_is_asked_for_the_address_that_was_checked(server: HttpServer) -> None:
    names = Names(public_test=[PUBLIC], six_test=["2606:4700::1111"])
    with HttpServer({f"{PUBLIC}:80": tunnel(server.port)}) as proxy:
        proxy.routes["[2606:4700::1111]:8080"] = tunnel(server.port)
        with_password = proxy.url("", "user:p%40ss@127.0.0.1")
        with contextlib.closing(fetcher(resolver=names, proxy=with_password)) as proxied:
            assert proxied.fetch("http://public.test/a.png") == PNG
            assert proxied.fetch("http://public.test/a.png") == PNG
            assert proxied.fetch("http://six.test:8080/a.png") == PNG
    asked = [(request.method, request.target) for request in proxy.requests]
    assert asked == [("CONNECT", f"{PUBLIC}:80"), ("CONNECT", "[2606:4700::1111]:8080")]
    hosts = [request.headers["host"] for request in server.requests]
    assert hosts == ["public.test", "public.test", "six.test:8080"]
    for request in proxy.requests:
        scheme, credentials = request.headers["proxy-authorization"].split()
        assert scheme == "Basic" and base64.b64decode(credentials) == b"user:p@ss"
    assert not any("proxy-authorization" in request.headers for request in server.requests)


def test_a_proxy_is_never_asked_for_what_is_forbidden(server: HttpServer) -> None:
    names = Names(public_test=[PUBLIC], evil_test=["127.0.0.1"], half_test=[PUBLIC, "10.0.0.1"])
    server.routes["/to"] = redirect("http://evil.test/a.png")
    with HttpServer({f"{PUBLIC}:80": tunnel(server.port)}) as proxy:
        for host in ("evil.test", "half.test", "127.0.0.1", "169.254.169.254", "[::1]"):
            with pytest.raises(BlockedAddress):
                fetch(f"http://{host}/a.png", resolver=names, proxy=proxy.url(""))
        assert proxy.connections == 0
        with pytest.raises(BlockedAddress):
            fetch("http://public.test/to", resolver=names, proxy=proxy.url(""))
    assert [request.target for request in proxy.requests] == [f"{PUBLIC}:80"]


def test_a_proxy_that_fails(server: HttpServer) -> None:
    answers = [b"HTTP/1.1 407 No\r\n\r\n", b"SSH-2.0\r\n\r\n", b"", b"x" * 100_000]
    answers += [b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n", b"HTTP/1.1 2000 OK\r\n\r\n"]
    names = Names(public_test=[PUBLIC], two_test=["1.1.1.1", PUBLIC])

    def saying(answer: bytes) -> Handler:
        def handle(request: Request, connection: Connection) -> None:
            connection.send(answer)
            connection.sock.shutdown(socket.SHUT_WR)

        return handle

    with HttpServer() as proxy:
        for answer in answers:
            proxy.routes[f"{PUBLIC}:80"] = saying(answer)
            with pytest.raises(FetchFailed, match="proxy"):
                fetch("http://public.test/a.png", resolver=names, proxy=proxy.url(""))
        proxy.routes[f"{PUBLIC}:80"] = lambda _, connection: connection.drip(b"x" * 9999, 0.02)
        with pytest.raises(FetchTimeout):
            fetch("http://public.test/a.png", resolver=names, proxy=proxy.url(""), timeout=0.3)
        proxy.routes["1.1.1.1:80"] = saying(b"HTTP/1.1 502 Unreachable\r\n\r\n")
        proxy.routes[f"{PUBLIC}:80"] = tunnel(server.port)
        assert fetch("http://two.test/a.png", resolver=names, proxy=proxy.url("")) == PNG
    with pytest.raises(FetchFailed):  # nobody listens there any more
        fetch("http://public.test/a.png", resolver=names, proxy=proxy.url(""))
    with pytest.raises(ValueError):
        fetcher(proxy="socks5://127.0.0.1:1")


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


def test_tls_is_verified_for_each_host_of_one_address(tls_server: HttpServer) -> None:
    trusting = ssl.create_default_context(cafile=TLS / "ca.pem")
    names = Names(other_test=["127.0.0.1"])
    allow = (ALLOWED, "other.test")
    with contextlib.closing(fetcher(resolver=names, allow=allow, ssl_context=trusting)) as kept:
        for _ in range(2):
            assert kept.fetch(tls_server.url("/a.png", ALLOWED)) == PNG
            with pytest.raises(FetchFailed):
                kept.fetch(tls_server.url("/a.png", "other.test"))
    assert len(tls_server.requests) == 2
    # one connection for both pictures, and one for each failed handshake
    assert tls_server.connections == 3


def test_authorities_of_the_environment_are_not_trusted(
    tls_server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "ca.pem"))
    with pytest.raises(FetchFailed, match="certificate"):
        fetch(tls_server.url("/a.png", ALLOWED))
    assert not tls_server.requests


def test_tls_through_a_proxy(tls_server: HttpServer) -> None:
    """Of failed handshakes more than the pool has connections: none may be held for good."""
    trusting = ssl.create_default_context(cafile=TLS / "ca.pem")
    names = Names(pictures_test=[PUBLIC], other_test=[PUBLIC])
    with (
        HttpServer({f"{PUBLIC}:443": tunnel(tls_server.port)}) as proxy,
        contextlib.closing(
            fetcher(resolver=names, allow=(), ssl_context=trusting, proxy=proxy.url(""))
        ) as proxied,
    ):
        for _ in range(40):
            with pytest.raises(FetchFailed, match="certificate"):
                proxied.fetch("https://other.test/a.png")
        assert not tls_server.requests
        assert proxied.fetch(f"https://{ALLOWED}/a.png") == PNG
        assert tls_server.names[-1] == ALLOWED  # type: ignore[attr-defined]


def test_a_tls_handshake_a_byte_at_a_time_meets_the_deadline(server: HttpServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def handshake() -> None:
            sock, _ = listener.accept()
            # the head of a record of 16 KiB, then some of it, slowly; closed long past the deadline
            Connection(sock, stopping).drip(b"\x16\x03\x03\x40\x00\x02" + bytes(150), 0.02)
            sock.close()

        stopping = threading.Event()
        thread = threading.Thread(target=handshake)
        thread.start()
        with pytest.raises(FetchTimeout):
            fetch(f"https://{ALLOWED}:{listener.getsockname()[1]}/", timeout=0.3)
        stopping.set()
        thread.join()


def test_no_redirect_from_https_to_http(tls_server: HttpServer) -> None:
    trusting = ssl.create_default_context(cafile=TLS / "ca.pem")
    with pytest.raises(BlockedAddress, match="https to http"):
        fetch(tls_server.url("/down", ALLOWED), ssl_context=trusting)
    assert tls_server.connections == 1
