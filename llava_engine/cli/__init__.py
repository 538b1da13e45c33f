"""The command `llava-engine`: describe a picture, time it, list the models, look at the machine.

Uses what every caller of the package can use. `--help` and `models` import no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence

import llava_engine
from llava_engine.cli.bench import add_arguments, run_bench
from llava_engine.cli.describe import BadInput, describe
from llava_engine.cli.doctor import doctor
from llava_engine.cli.listing import list_models
from llava_engine.errors import (
    ImageError,
    LlavaError,
    ModelError,
    PoolError,
    RequestError,
    RequestFailed,
    RequestTimeout,
    SpawnFailed,
)

OK, USAGE, BAD_INPUT, MODEL, POOL, INTERNAL, OUTPUT, INTERRUPTED = 0, 2, 3, 4, 5, 70, 74, 130
_CODES = """\
exit codes:
  0    done
  2    the command line is wrong
  3    the picture, the question or a setting is wrong
  4    the model cannot be found, downloaded, read or run
  5    not now: out of memory, overloaded, or past --timeout
  70   an internal error
  74   what was found cannot be written
  130  interrupted
"""
_QUESTION = "Describe the picture."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see `llava-engine --help`."""
    if sys.stderr is None:  # closed: print would take stdout in its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (to the process's end)
    args = _parser().parse_args(argv)
    # A terminal that cannot show a character gets a question mark, not a crash.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "standard output is closed")
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read us has enough
        _drop_output()
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except (LlavaError, BadInput) as error:
        code = exit_code(error)
        if code == INTERNAL:
            traceback.print_exc()
        _complain(error)
        return code
    except OSError as error:  # the engine raises none: it is of a file that this command writes
        _drop_output()
        reason = error.strerror or str(error)
        _complain(f"{error.filename}: {reason}" if error.filename else reason)
        return OUTPUT
    except Exception as error:
        traceback.print_exc()
        _complain(error)
        return INTERNAL
    return OK


def exit_code(error: Exception) -> int:
    """The code of an error that a command ended with."""
    if isinstance(error, SpawnFailed) and isinstance(error.__cause__, LlavaError):
        return exit_code(error.__cause__)
    if isinstance(error, RequestFailed):
        return INTERNAL
    if isinstance(error, PoolError | RequestTimeout):
        return POOL
    if isinstance(error, ImageError | RequestError | BadInput):
        return BAD_INPUT
    if isinstance(error, ModelError):
        return MODEL
    return INTERNAL


def _complain(what: Exception | str) -> None:
    reason = what.__cause__ if isinstance(what, SpawnFailed) and what.__cause__ else what
    with contextlib.suppress(OSError):
        print(f"llava-engine: {reason or type(reason).__name__}", file=sys.stderr)


def _drop_output() -> None:
    """Forget what cannot be written: Python would complain once more when it flushes at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-engine",
        description="Describe pictures with LLaVA models, on this machine.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=llava_engine.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    description = commands.add_parser(
        "describe",
        help="say what is in a picture",
        description="Say what is in a picture, word by word as the model finds it.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    description.add_argument(
        "picture",
        nargs="?",
        help="a file, an http(s) URL, or - for standard input; the bundled picture if left out",
    )
    description.add_argument("query", nargs="?", default=_QUESTION, help=f"default: {_QUESTION}")
    description.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="end the answer after N"
    )
    description.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    description.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the likeliest P"
    )
    description.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    description.add_argument("--seed", type=int, metavar="N", help="makes sampling reproducible")
    description.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before it; may be repeated"
    )
    description.add_argument("--timeout", type=float, metavar="S", help="give up after S seconds")
    description.set_defaults(run=describe)

    timing = commands.add_parser(
        "bench",
        help="time a cold start, stage by stage, and requests under load",
        description="Time this process from its start to its first token, and then requests.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(timing)
    timing.set_defaults(run=run_bench)
    for command in (description, timing):
        command.add_argument(
            "--model", default="llava-tiny", help="a name of `models`, or a checkpoint's directory"
        )
        command.add_argument("--device", help='"auto", "cpu", "cuda" or "cuda:N"')
        command.add_argument("--dtype", help='"auto", "float32", "float16" or "bfloat16"')
        command.add_argument(
            "--quantization", help='"nf4", "int8" or "fp8"; the checkpoint\'s own if left out'
        )

    models = commands.add_parser("models", help="list the models that are known by name")
    models.set_defaults(run=list_models)
    diagnosis = commands.add_parser("doctor", help="say what is here, and what would speed it up")
    diagnosis.set_defaults(run=doctor)
    for command in (description, timing, models, diagnosis):
        command.add_argument(
            "--json",
            action="store_true",
            help="print one JSON object; a failure is told on stderr, as without",
        )
    return parser
