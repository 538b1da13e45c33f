"""`llava-engine describe`: one picture, one question, the answer as it comes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import llava_engine


class BadInput(Exception):
    """The caller's mistake, as a message."""


def describe(args: argparse.Namespace) -> None:
    """Print the answer, or with --json one object with what is known of it."""
    from llava_engine.demo import picture_path

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "timeout")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    picture = str(picture_path()) if args.picture is None else args.picture
    is_url = picture.partition("://")[0].lower() in ("http", "https") and "://" in picture
    with Bar(sys.stderr) as bar:
        try:
            config = llava_engine.EngineConfig.from_env()
            settings = {"device": args.device, "dtype": args.dtype}
            config = dataclasses.replace(config, **{k: v for k, v in settings.items() if v})
            model = llava_engine.get(args.model, config, progress=bar.update)
            ask: Callable[..., Any] = model.describe_url if is_url else model.describe_image
            stream = ask(picture, args.query, **given)
        except (TypeError, ValueError) as error:
            raise BadInput(str(error)) from error
        with stream:
            if args.json:
                text = stream.text()
            else:
                _print_chunks(stream, bar)
                return
    answer = {
        "text": text,
        "finish_reason": stream.finish_reason,
        "usage": dataclasses.asdict(stream.usage),
        "timings": dataclasses.asdict(stream.timings),
        "model": args.model,
    }
    print(json.dumps(answer, ensure_ascii=False))


def _print_chunks(stream: Iterable[str], bar: Bar) -> None:
    begun = False
    try:
        for chunk in stream:
            bar.close()
            begun = True
            sys.stdout.write(_shown(chunk, sys.stdout))
            sys.stdout.flush()
    finally:
        # An error message that follows half an answer gets a line of its own.
        if begun:
            print(flush=True)


def _shown(text: str, stream: TextIO) -> str:
    """`text`, without control characters where they would reach a terminal."""
    if not stream.isatty():
        return text
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


class Bar:
    """A progress bar that appears on a terminal once loading has taken half a second."""

    _WIDTH = 24

    def __init__(
        self, stream: TextIO, *, delay: float = 0.5, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._next = clock() + delay
        self._enabled = stream.isatty()
        self._drawn = False
        self._lock = threading.Lock()

    def update(self, stage: str, done: int, total: int) -> None:
        """Progress of a stage in bytes; any thread may call it."""
        with self._lock:
            now = self._clock()
            if not self._enabled or now < self._next:
                return
            self._next = now + 0.1
            share = min(1.0, done / total) if total > 0 else 0.0
            full = round(share * self._WIDTH)
            line = f"{stage} [{'#' * full}{' ' * (self._WIDTH - full)}] {share:4.0%}"
            self._stream.write(f"\r\x1b[K{line}  {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB")
            self._stream.flush()
            self._drawn = True

    def close(self) -> None:
        """Wipe the bar away; nothing is drawn any more."""
        with self._lock:
            self._enabled = False
            if self._drawn:
                self._stream.write("\r\x1b[K")
                self._stream.flush()
                self._drawn = False

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
