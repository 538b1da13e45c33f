"""Which URLs are fetched, and which redirects followed.

See support.fetching for the resolver and the hosts.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fetching import ALLOWED, PNG, Names, fetch
from support.http_server import HttpServer, redirect

from llava_engine.errors import BlockedAddress, FetchFailed, ImageFetchError
from llava_engine.image.url import check_url


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer({"/a.png": PNG}) as server:
        yield server


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
