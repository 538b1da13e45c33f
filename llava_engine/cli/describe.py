"""`llava-engine describe`: one picture, one question, the answer as it comes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import llava_engine
from llava_engine.cli.where import sentence, where

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


class BadInput(Exception):
    """The caller's mistake, as a message."""


def describe(args: argparse.Namespace) -> None:
    """Print the answer, or with --json one object with what is known of it."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "timeout")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = engine_config(args)
    try:
        model = llava_engine.get(args.model, config)
        picture, is_url = _picture(args.picture, config.max_image_bytes)
        ask: Callable[..., Any] = model.describe_url if is_url else model.describe_image
        stream = ask(picture, args.query, **given)
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from error
    with stream:
        if args.json:
            text = stream.text()
        else:
            _print_chunks(stream)
    found = where(model)
    if not args.json:
        if found is not None:
            print(f"llava-engine: {sentence(found)}", file=sys.stderr)
        return
    answer = {
        "text": text,
        "finish_reason": stream.finish_reason,
        "usage": dataclasses.asdict(stream.usage),
        "timings": dataclasses.asdict(stream.timings),
        "model": args.model,
        "where": found,
    }
    print(json.dumps(answer, ensure_ascii=False))


def _picture(given: str | None, most: int) -> tuple[str | bytes, bool]:
    """What to ask about, and whether it is a URL. Of standard input no more than `most` bytes are
    wanted. Raises BadInput."""
    from llava_engine.demo import picture_path

    if given is None:
        return str(picture_path()), False
    if given == "-":
        if sys.stdin is None:
            raise BadInput("standard input is closed")
        try:
            return sys.stdin.buffer.read(most + 1), False  # one more, for the engine to refuse
        except OSError as error:
            raise BadInput(f"standard input: {error.strerror}") from error
    scheme = _SCHEME.match(given)
    if scheme is not None and scheme[1].lower() not in ("http", "https"):
        raise BadInput(f"only http and https URLs are taken, not {scheme[0]}")
    return given, scheme is not None


def engine_config(args: argparse.Namespace) -> llava_engine.EngineConfig:
    """The environment's, with what the command line sets. Raises BadInput."""
    given = {name: getattr(args, name) for name in ("device", "dtype", "quantization")}
    config, _ = settings()
    try:
        return dataclasses.replace(config, **{k: v for k, v in given.items() if v})
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from error


def settings() -> tuple[llava_engine.EngineConfig, llava_engine.PoolConfig]:
    """What the environment sets, for a model and for the pool. Raises BadInput."""
    try:
        return llava_engine.EngineConfig.from_env(), llava_engine.PoolConfig.from_env()
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from error


def _print_chunks(stream: Iterable[str]) -> None:
    begun = False
    try:
        for chunk in stream:
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
