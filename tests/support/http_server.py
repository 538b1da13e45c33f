"""A small HTTP server on loopback that says exactly what a test wants said, byte for byte.

Real sockets, one thread per connection; every connection and request is written down.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType


@dataclass
class Request:
    """One request as it came: method, target, headers with lower-case names."""

    method: str
    target: str
    headers: dict[str, str]


class Connection:
    """What a handler writes its answer to."""

    def __init__(self, sock: socket.socket, stopping: threading.Event) -> None:
        self.sock = sock
        self.stopping = stopping
        self.sent = 0

    def send(self, data: bytes) -> bool:
        """Send; False when the client has gone or the server stops."""
        if self.stopping.is_set():
            return False
        try:
            self.sock.sendall(data)
        except OSError:
            return False
        self.sent += len(data)
        return True

    def respond(
        self,
        body: bytes = b"",
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        """A whole answer; `length` lies about the body's."""
        lines = [f"HTTP/1.1 {status} Status"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        lines.append(f"Content-Length: {len(body) if length is None else length}")
        self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    def drip(self, data: bytes, interval: float) -> None:
        """A byte at a time, until the client leaves or the server stops."""
        for i in range(len(data)):
            if not self.send(data[i : i + 1]) or self.stopping.wait(interval):
                return


Handler = Callable[[Request, Connection], None]


@dataclass
class HttpServer:
    """Serves `routes` (path to handler, or to the body of a 200) until the `with` block ends.

    A handler that returns leaves the connection open for the next request, unless it closed it.
    """

    routes: dict[str, Handler | bytes] = field(default_factory=dict)
    ssl_context: ssl.SSLContext | None = None
    host: str = "127.0.0.1"
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    sent: int = 0

    def __enter__(self) -> HttpServer:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((self.host, 0))
        self._listener.listen(64)
        self.port: int = self._listener.getsockname()[1]
        self._stopping = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        # shutdown wakes the accepting thread, which close alone does not
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):  # the client was quicker
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def url(self, path: str = "/", host: str | None = None) -> str:
        scheme = "http" if self.ssl_context is None else "https"
        return f"{scheme}://{host or self.host}:{self.port}{path}"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._open.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, raw: socket.socket) -> None:
        sock = raw
        try:
            if self.ssl_context is not None:
                sock = self.ssl_context.wrap_socket(raw, server_side=True)
            while (request := _read_request(sock)) is not None:
                with self._lock:
                    self.requests.append(request)
                connection = Connection(sock, self._stopping)
                handler = self.routes.get(request.target.partition("?")[0])
                if handler is None:
                    connection.respond(status=404)
                elif isinstance(handler, bytes):
                    connection.respond(handler)
                else:
                    handler(request, connection)
                with self._lock:
                    self.sent += connection.sent
        except OSError:
            pass  # the client left, or its TLS handshake failed
        finally:
            with self._lock:
                self._open.discard(raw)
            sock.close()
            raw.close()


def redirect(location: str, status: int = 302) -> Handler:
    """A handler that answers with a Location."""

    def handle(request: Request, connection: Connection) -> None:
        connection.respond(status=status, headers={"Location": location})

    return handle


def tunnel(port: int) -> Handler:
    """A proxy's handler of CONNECT, which leads to a port of loopback whatever was asked for."""

    def handle(request: Request, connection: Connection) -> None:
        with socket.create_connection(("127.0.0.1", port)) as far:
            connection.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_copy, args=(far, connection.sock), daemon=True)
            back.start()
            _copy(connection.sock, far)
            back.join()

    return handle


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):  # either end may leave
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _read_request(sock: socket.socket) -> Request | None:
    head = b""
    while b"\r\n\r\n" not in head:
        part = sock.recv(4096)
        if not part:
            return None
        head += part
    first, *lines = head.decode("latin-1").split("\r\n\r\n")[0].split("\r\n")
    method, target, _ = first.split(" ", 2)
    pairs = (line.split(":", 1) for line in lines)
    return Request(method, target, {name.lower(): value.strip() for name, value in pairs})
