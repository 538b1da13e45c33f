"""Connections to public addresses only, each step of which ends by its thread's deadline.

A name is resolved once a connection, every address it has is judged, and the connection goes to one
of the addresses that were judged, through a proxy too: a second answer from DNS changes nothing.
Knows no URLs and no pictures.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import httpcore

from llava_engine.config import PROXY_URL
from llava_engine.errors import BlockedAddress, FetchFailed, FetchTimeout

Resolver: TypeAlias = Callable[[str, int], Sequence[str]]
"""From host name and port to addresses; raises OSError."""

_MAX_ADDRESSES = 8  # of one name that are tried
_MAX_LOOKUPS = 16  # at once; one that outlives its fetch holds a thread until DNS gives up
_MAX_PROXY_ANSWER = 16 << 10
_WRITE_BYTES = 4096

_Dial: TypeAlias = Callable[[str, int, float], httpcore.NetworkStream]

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # leaves out ::/96, fec0::/10, 64:ff9b:1::/48
# Special-purpose blocks that Python 3.11's is_global lets pass.
_SPECIAL = [
    ipaddress.ip_network(block)
    for block in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20")
]


def is_public(address: str) -> bool:
    """Whether an address may be reached; the IPv4 address inside an IPv6 one is judged itself."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(ip.packed[-4:])
        if inner is not None:
            return is_public(str(inner))
        if ip not in _GLOBAL_UNICAST:
            return False
    special = any(ip.version == block.version and ip in block for block in _SPECIAL)
    return ip.is_global and not ip.is_multicast and not special


def system_resolver(host: str, port: int) -> list[str]:
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in answers]


class CheckedBackend(httpcore.NetworkBackend):
    """Connects to public addresses only, and lets no step outlast the calling thread's deadline.

    httpcore does a request's I/O in the thread that asked for it, so the deadline is thread-local;
    its own timeouts are per read, and a byte a second would never meet one.
    """

    def __init__(
        self, resolver: Resolver, allow_hosts: Iterable[str], proxy: str | None = None
    ) -> None:
        self._resolver = resolver
        self._allowed = frozenset(_plain(host) for host in allow_hosts)
        self._local = threading.local()
        self._lookups = threading.BoundedSemaphore(_MAX_LOOKUPS)
        self._sockets = httpcore.SyncBackend()
        self._proxy = None if proxy is None else _Proxy(proxy)

    @property
    def deadline(self) -> float:
        """Of the calling thread, in `time.monotonic()` seconds."""
        return float(self._local.deadline)

    @deadline.setter
    def deadline(self, value: float) -> None:
        self._local.deadline = value

    @property
    def connected(self) -> bool:
        """Whether the calling thread has connected since it last cleared this."""
        return bool(self._local.connected)

    @connected.setter
    def connected(self, value: bool) -> None:
        self._local.connected = value

    def remaining(self) -> float:
        """Seconds left, above 0. Raises FetchTimeout."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise FetchTimeout("the picture did not arrive in time")
        return left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        self.connected = True
        addresses = self._resolve(host, port)
        if _plain(host) not in self._allowed and not all(map(is_public, addresses)):
            raise BlockedAddress("the URL leads to an address that is not public")
        until = time.monotonic() + self.remaining()
        dial = self._dial if self._proxy is None else self._tunnel
        return DeadlineStream(self._first(addresses, port, until, dial), self)

    def _first(
        self, addresses: Sequence[str], port: int, until: float, dial: _Dial
    ) -> httpcore.NetworkStream:
        """A connection to the first address that takes one; each has its share of the time."""
        addresses = addresses[:_MAX_ADDRESSES]
        for left in range(len(addresses), 0, -1):
            share = (until - time.monotonic()) / left
            try:
                return dial(addresses[-left], port, time.monotonic() + share)
            except (httpcore.ConnectError, httpcore.ConnectTimeout, httpcore.ProxyError):
                if left == 1:
                    raise
        raise AssertionError("unreachable")

    def _dial(self, address: str, port: int, until: float) -> httpcore.NetworkStream:
        return self._sockets.connect_tcp(address, port, _left(until))

    def _tunnel(self, address: str, port: int, until: float) -> httpcore.NetworkStream:
        """A connection through the proxy, which is the operator's and is not judged."""
        assert self._proxy is not None
        hosts = self._resolve(self._proxy.host, self._proxy.port)
        stream = self._first(hosts, self._proxy.port, until, self._dial)
        try:
            self._proxy.ask(stream, address, port, until)
        except BaseException:
            stream.close()
            raise
        return stream

    def _resolve(self, host: str, port: int) -> list[str]:
        """The addresses of a name, at least one.

        It is looked up in a thread of its own, since getaddrinfo cannot be given a timeout.
        """
        if not self._lookups.acquire(timeout=self.remaining()):
            raise FetchTimeout("too many host names are being looked up")
        answer: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                answer.put(self._resolver(host, port))
            except Exception as error:
                answer.put(error)
            finally:
                self._lookups.release()

        try:
            threading.Thread(target=look_up, name="llava-dns", daemon=True).start()
        except RuntimeError:  # the process has no thread left
            self._lookups.release()
            raise
        try:
            result = answer.get(timeout=self.remaining())
        except queue.Empty:
            raise FetchTimeout("the host name was not found in time") from None
        if isinstance(result, Exception):
            raise FetchFailed("the host name is not known") from result
        if not result:
            raise FetchFailed("the host name has no address")
        return list(dict.fromkeys(result))


class _Proxy:
    """An HTTP proxy, which is asked for tunnels (CONNECT) to addresses, never to names."""

    def __init__(self, url: str) -> None:
        found = PROXY_URL.fullmatch(url)
        if found is None:
            raise ValueError("proxy must be http://host:port")
        credentials, host, port = found.groups()
        self.host = host.strip("[]")
        self.port = int(port)
        self._credentials = b""
        if credentials is not None:
            pair = credentials if ":" in credentials else credentials + ":"
            encoded = base64.b64encode(urllib.parse.unquote(pair).encode())
            self._credentials = b"Proxy-Authorization: Basic " + encoded + b"\r\n"

    def ask(self, stream: httpcore.NetworkStream, address: str, port: int, until: float) -> None:
        """Make a connection to the proxy one to an address. Raises ProxyError, ConnectTimeout."""
        target = (f"[{address}]:{port}" if ":" in address else f"{address}:{port}").encode()
        answer = b""
        try:
            stream.write(
                b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (target, target, self._credentials),
                _left(until),
            )
            while b"\r\n\r\n" not in answer:
                part = stream.read(4096, _left(until))
                answer += part
                if not part or len(answer) > _MAX_PROXY_ANSWER:
                    raise httpcore.ProxyError("no answer to CONNECT")
        except (httpcore.ReadTimeout, httpcore.WriteTimeout) as error:
            raise httpcore.ConnectTimeout("no answer to CONNECT in time") from error
        except (httpcore.ReadError, httpcore.WriteError) as error:
            raise httpcore.ProxyError("no answer to CONNECT") from error
        # The server speaks second, in TLS and in HTTP: nothing of its may stand here yet.
        if not re.match(rb"HTTP/1\.[01] 2\d\d\b", answer) or not answer.endswith(b"\r\n\r\n"):
            raise httpcore.ProxyError("CONNECT was refused")


class DeadlineStream(httpcore.NetworkStream):
    """A stream whose every step takes at most what is left of the calling thread's deadline."""

    def __init__(self, stream: httpcore.NetworkStream, backend: CheckedBackend) -> None:
        self._stream = stream
        self._backend = backend

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._backend.remaining())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # A write that gets somewhere begins its timeout anew, so it is given little at a time.
        for start in range(0, len(buffer), _WRITE_BYTES):
            self._stream.write(buffer[start : start + _WRITE_BYTES], self._backend.remaining())

    def close(self) -> None:
        sock = self._stream.get_extra_info("socket")
        with contextlib.suppress(OSError):  # wakes the thread that reads, which closing does not
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        remaining = self._backend.remaining()
        stream = self._stream.start_tls(ssl_context, server_hostname, remaining)
        return DeadlineStream(stream, self._backend)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise httpcore.ConnectTimeout("no time is left")
    return left


def _plain(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()
