"""A URL to the bytes of a picture, under the rules of a hostile internet.

Every hop is judged: its URL here, its addresses in image.connect. httpx.URL is the only URL parser;
environment variables (proxies, certificates) are not read. Decodes nothing.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterable

import httpcore
import httpx

from llava_engine.errors import (
    BlockedAddress,
    FetchFailed,
    FetchTimeout,
    ImageDecodeError,
    ImageError,
    ImageTooLarge,
)
from llava_engine.image.budget import Body, ByteBudget
from llava_engine.image.connect import CheckedBackend, Resolver, system_resolver
from llava_engine.image.header import FORMATS, MAGIC_BYTES, sniff
from llava_engine.image.url import check_url

MAX_REDIRECTS = 5
_MAX_CONNECTIONS = 32
_KEEPALIVE = 5.0  # seconds
_REDIRECTS = (301, 302, 303, 307, 308)
_RETRYABLE_STATUS = (408, 425, 429)


class Fetcher:
    """Fetches pictures, keeps connections open between fetches; safe to share between threads.

    max_bytes: of one body. timeout: seconds for one fetch, with DNS, redirects and body.
    allow_hosts: host names or addresses, as they stand in URLs, that may be reached although their
        addresses are not public.
    resolver: for tests; the system's by default. ssl_context: for private certificate authorities.
    budget: for all bodies, from their fetch until they are let go of, of other Fetchers too where
        it is shared; None is one of 4 x max_bytes. A fetch that does not fit waits, within its
        deadline.
    proxy: as in EngineConfig.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout: float,
        allow_hosts: Iterable[str] = (),
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
        budget: ByteBudget | None = None,
        proxy: str | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._budget = budget or ByteBudget(4 * max_bytes)
        self._backend = CheckedBackend(resolver or system_resolver, allow_hosts, proxy)
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl_context or httpx.create_ssl_context(trust_env=False),
            max_connections=_MAX_CONNECTIONS,
            keepalive_expiry=_KEEPALIVE,
            network_backend=self._backend,
        )

    def fetch(self, url: str, deadline: float | None = None) -> Body:
        """The body that a URL leads to, which begins as a picture does.

        deadline: in `time.monotonic()` seconds, where it is nearer than the timeout.
        Raises BlockedAddress, FetchFailed, FetchTimeout, ImageTooLarge, or ImageDecodeError when
        the first bytes, whatever the headers say, are of no supported format.
        """
        check_url(url)
        limit = time.monotonic() + self._timeout
        self._backend.deadline = limit if deadline is None else min(deadline, limit)
        try:
            return self._follow(url)
        except ImageError:
            raise
        except httpcore.TimeoutException as error:
            raise FetchTimeout("the picture did not arrive in time") from error
        except httpcore.ProxyError as error:
            raise FetchFailed("the proxy refuses, or cannot reach the server") from error
        except httpcore.ConnectError as error:
            raise FetchFailed("the server cannot be reached, or its certificate fails") from error
        except Exception as error:
            raise FetchFailed("the connection to the server failed") from error

    def close(self) -> None:
        """Close the kept connections; fetches in flight fail."""
        self._pool.close()

    def _follow(self, given: str) -> Body:
        url = _parse(given, None)
        for _ in range(1 + MAX_REDIRECTS):
            answer = self._get(url)
            if isinstance(answer, Body):
                return answer
            url = answer
        raise _failed(f"more than {MAX_REDIRECTS} redirects", retryable=False)

    def _get(self, url: httpx.URL) -> Body | httpx.URL:
        """One hop: the body, or where the server sends us."""
        while True:
            answered = False
            try:
                with self._ask(url) as response:
                    answered = True
                    return self._read(url, response)
            except (httpcore.NetworkError, httpcore.RemoteProtocolError):
                # A server may close a kept connection just as it is used again.
                if answered or self._backend.connected:
                    raise

    def _ask(self, url: httpx.URL) -> contextlib.AbstractContextManager[httpcore.Response]:
        remaining = self._backend.remaining()
        self._backend.connected = False
        return self._pool.stream(
            "GET",
            httpcore.URL(
                scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
            ),
            headers=[
                (b"Host", url.netloc),
                (b"User-Agent", b"llava-engine"),
                (b"Accept", b"image/*"),
                (b"Accept-Encoding", b"identity"),
            ],
            # The backend bounds reads and writes by the deadline itself.
            extensions={"timeout": {"connect": remaining, "pool": remaining}},
        )

    def _read(self, url: httpx.URL, response: httpcore.Response) -> Body | httpx.URL:
        headers = {name.lower(): value for name, value in response.headers}
        if response.status in _REDIRECTS:
            return _redirect(url, headers.get(b"location", b""))
        if response.status != 200:
            status = response.status
            raise _failed(
                f"the server answered {status}",
                retryable=status >= 500 or status in _RETRYABLE_STATUS,
            )
        for name, value in response.headers:
            if name.lower() == b"content-encoding" and value.strip().lower() != b"identity":
                raise _failed("the server compressed its answer unasked", retryable=False)
        # Beside a Transfer-Encoding, a Content-Length says nothing about the body.
        announced = b"content-length" in headers and b"transfer-encoding" not in headers
        return self._body(response, int(headers[b"content-length"]) if announced else None)

    def _body(self, response: httpcore.Response, announced: int | None) -> Body:
        size = self._max_bytes if announced is None else announced
        if size > self._max_bytes:
            raise self._too_large()
        taken = self._budget.take(size, self._backend.remaining())
        try:
            body = bytearray()
            for part in response.iter_stream():  # of at most 64 KiB
                known = len(body) >= MAGIC_BYTES
                body += part
                if len(body) > self._max_bytes:
                    raise self._too_large()
                if not known and len(body) >= MAGIC_BYTES:
                    _check_magic(body)
            if len(body) < MAGIC_BYTES:
                _check_magic(body)
            kept = min(taken, len(body))
            whole = Body(body, self._budget, kept)
            taken -= kept
            return whole
        finally:
            self._budget.give(taken)

    def _too_large(self) -> ImageTooLarge:
        return ImageTooLarge(f"the picture has more than the {self._max_bytes} bytes allowed")


def _failed(message: str, *, retryable: bool) -> FetchFailed:
    error = FetchFailed(message)
    error.retryable = retryable
    return error


def _check_magic(body: bytearray) -> None:
    if sniff(bytes(body[:MAGIC_BYTES])) is None:
        raise ImageDecodeError(f"the URL gave no picture of a format in {', '.join(FORMATS)}")


def _parse(text: str, base: httpx.URL | None) -> httpx.URL:
    """A URL or a Location that may be followed. Raises BlockedAddress or FetchFailed."""
    if "\\" in text:  # the character on which parsers disagree about where the host ends
        raise BlockedAddress("the URL holds a backslash")
    try:
        url = httpx.URL(text) if base is None else base.join(text)
        port = url.port
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        raise _failed("the URL is not valid", retryable=False) from error
    if url.scheme not in ("http", "https"):
        raise BlockedAddress("only http and https URLs are fetched")
    if url.userinfo or b"@" in url.netloc:
        raise BlockedAddress("the URL holds credentials")
    if base is not None and base.scheme == "https" and url.scheme == "http":
        raise BlockedAddress("a redirect leads from https to http")
    if not url.raw_host or (port is not None and not 0 < port < 1 << 16):
        raise _failed("the URL is not valid", retryable=False)
    return url


def _redirect(url: httpx.URL, location: bytes) -> httpx.URL:
    try:
        text = location.decode()
    except UnicodeDecodeError as error:
        raise _failed("the server sent a broken redirect", retryable=False) from error
    if not text:
        raise _failed("the server sent a redirect to nowhere", retryable=False)
    return _parse(text, url)
