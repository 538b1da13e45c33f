"""What is judged of a URL at the call, without an HTTP client, which is slow to import."""

from __future__ import annotations


def check_url(url: object) -> None:
    """Refuse what can be no URL. Raises TypeError or ValueError; does no I/O."""
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, not {type(url).__name__}")
    if not url:
        raise ValueError("url must not be empty")
