"""`llava-engine describe`: one picture, one question, the answer as it comes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import llava_engine
from llava_engine.cli.where import sentence, where


class BadInput(Exception):
    """The caller's mistake, as a message."""


def describe(args: argparse.Namespace) -> None:
    """Print the answer, or with --json one object with what is known of it."""
    from llava_engine.demo import picture_path

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "timeout")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    picture = str(picture_path()) if args.picture is None else args.picture
    is_url = picture.partition("://")[0].lower() in ("http", "https") and "://" in picture
    try:
        model = llava_engine.get(args.model, engine_config(args))
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
