"""`llava-engine bench`: a cold start, stage by stage, and then requests under load.

Closed loops by concurrency or open loops with Poisson arrivals, beside other engines if asked, as
lines, JSON, an HTML report and a trace. Only what every caller of the package can use is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llava_engine
from llava_engine.cli.bench.cold_start import age, measure_cold_start
from llava_engine.cli.bench.comparison import NAMES, Plan, agree, measure_peers
from llava_engine.cli.bench.loops import Record, closed_loop, open_loop
from llava_engine.cli.bench.machine import machine, versions
from llava_engine.cli.bench.metrics import GOALS, detailed, summarize
from llava_engine.cli.bench.peers import Setting
from llava_engine.cli.bench.random_checkpoint import write_random_checkpoint
from llava_engine.cli.bench.report import report
from llava_engine.cli.bench.workload import QUESTION, Workload, files, noise, question_of
from llava_engine.cli.describe import BadInput, engine_config
from llava_engine.cli.listing import print_table
from llava_engine.cli.where import sentence, where

_WARM_UP_TOKENS = 16
_TRACED = 4
_TRACED_FROM = 1 << 24  # the number of the first; no other request has it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `bench` can be told, besides what all commands can."""
    add = parser.add_argument
    add("--concurrency", type=_counts, default=[1], metavar="N,N", help="at once; default: 1")
    add("--rate", type=_rates, default=[], metavar="R,R", help="arrivals a second, Poisson")
    add("--requests", type=int, metavar="N", help="of each run; default: 12, or 3 x concurrency")
    add("--new-tokens", type=int, default=32, metavar="N", help="of each answer; default: 32")
    add("--prompt-tokens", type=int, metavar="N", help="of text; default: a short question's")
    add("--images", type=Path, metavar="DIR", help="take these pictures; default: random pixels")
    add("--image-size", type=_size, metavar="WxH", help="of random pixels; default: the model's")
    add("--random-weights", action="store_true", help="the model's shape without its download")
    add("--kv-cache-mb", type=int, metavar="N", help="a worker's share of the KV cache, in MiB")
    add("--seed", type=int, default=0, metavar="N", help="of pictures, weights and arrivals")
    add("--goodput", type=_goals, metavar="ttft:MS,tpot:MS,e2el:MS", help="count what meets these")
    add("--detailed", action="store_true", help="every request's own times in the JSON, too")
    add("--peers", type=_peers, nargs="?", const=list(NAMES), default=[], metavar="NAME,NAME",
        help=f"measure other engines too, of {', '.join(NAMES)}; all if none is named")  # fmt: skip
    add("--report", type=Path, metavar="FILE", help="write an HTML page")
    add("--ops", type=Path, metavar="FILE", help="show what bench/kernels.py found in the report")
    add("--trace", type=Path, metavar="FILE", help="write a Chrome trace of a few more requests")


def run_bench(args: argparse.Namespace) -> None:
    """Measure, and print what was found."""
    started = age()
    # What would fail after minutes of measuring fails now.
    ops = None if args.ops is None else _read_ops(args.ops)
    for path in (args.report, args.trace):
        if path is not None and not path.parent.is_dir():
            raise BadInput(f"{path}: there is no such folder")
        if path is not None and path.is_dir():
            raise BadInput(f"{path} is a folder")
    record = measure(args, started)
    if args.json:
        print(json.dumps(record))
    else:
        _print(record)
    if args.report is not None:
        args.report.write_text(report(record, ops), encoding="utf-8")


def measure(args: argparse.Namespace, started: float | None = None) -> dict[str, Any]:
    """Everything that was asked for, as one JSON-able record."""
    if args.new_tokens < 1 or (args.requests is not None and args.requests < 0):
        raise BadInput("--new-tokens must be at least 1, --requests not below 0")
    if not 0 <= args.seed < 2**63:
        raise BadInput(f"--seed must be in [0, 2**63), not {args.seed}")
    folder = None if args.images is None else files(args.images)
    with ExitStack() as stack:
        model, aside = _model(args, stack)
        record: dict[str, Any] = {
            "what": "llava-engine bench",
            "command": shlex.join(["llava-engine", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "model": args.model,
            "weights": "random" if args.random_weights else "checkpoint",
            **measure_cold_start(model, started, aside),
            "where": where(model),
        }
        work = _workload(args, model)
        record["workload"] = {
            "pictures": "files" if args.images else "random pixels",
            "new_tokens": args.new_tokens,
            "sampling": "greedy, past the end of sequence",
            "seed": args.seed,
        }
        if folder is not None:
            record["workload"]["distinct_pictures"] = folder[1]
        else:
            height, width = _picture_size(args, model)
            record["workload"] |= {"picture_width": width, "picture_height": height}
        runs, levels, ours = _runs(args, work, record["workload"])
        record["runs"] = runs
        if args.trace is not None:
            _trace(args, work)
        if args.peers and levels:
            setting = _setting(model, work, record)
            llava_engine.vision_pool().shutdown()
            plan = Plan(levels, args.new_tokens, ours)
            record["peers"] = measure_peers(args.peers, setting, plan)
        record |= {"machine": machine(), "versions": versions()}
    return record


def _runs(
    args: argparse.Namespace, work: Workload, workload: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[int, range], dict[int, list[int]]]:
    """The figures of all runs; of closed loops the requests' numbers, and all answers."""
    runs: list[dict[str, Any]] = []
    levels: dict[int, range] = {}
    answers: dict[int, list[int]] = {}
    first = 0

    def one(
        kind: dict[str, Any], count: int, at_once: int, loop: Callable[..., Any]
    ) -> range | None:
        nonlocal first
        if count == 0:
            return None
        warm_up = min(count, at_once)
        closed_loop(
            work.ask(first, warm_up, min(args.new_tokens, _WARM_UP_TOKENS)), warm_up, at_once
        )
        numbers = range(first + warm_up, first + warm_up + count)
        first = numbers.stop
        records, seconds = loop(work.ask(numbers.start, count), count)
        _note_prompt(records, workload)
        figures = summarize(records, seconds, args.goodput)
        if args.detailed:
            figures |= detailed(records)
        answers.update({numbers[r.number]: r.token_ids for r in records if r.error is None})
        runs.append({"backend": "llava_engine", **kind, **figures})
        return numbers

    for concurrency in args.concurrency:
        count = max(12, 3 * concurrency) if args.requests is None else args.requests
        kind = {"mode": "closed loop", "max_concurrency": concurrency}
        numbers = one(
            kind, count, concurrency, lambda ask, n, c=concurrency: closed_loop(ask, n, c)
        )
        if numbers is not None:
            levels[concurrency] = numbers
    for rate in args.rate:
        count = max(12, round(10 * rate)) if args.requests is None else args.requests
        kind = {"mode": "open loop", "request_rate": rate, "burstiness": 1.0}
        one(kind, count, 1, lambda ask, n, r=rate: open_loop(ask, n, r, args.seed))
    return runs, levels, answers


def _note_prompt(records: list[Record], workload: dict[str, Any]) -> None:
    for record in records:
        if record.error is None:
            workload["prompt_tokens"] = record.prompt_tokens
            workload["image_tokens"] = record.image_tokens


def _trace(args: argparse.Namespace, work: Workload) -> None:
    from llava_engine.cli.bench.trace import trace

    ask = work.ask(_TRACED_FROM, _TRACED, min(args.new_tokens, _WARM_UP_TOKENS))
    at_once = min(_TRACED, max(args.concurrency))
    trace(args.trace, lambda: closed_loop(ask, _TRACED, at_once)[0])


def _model(args: argparse.Namespace, stack: ExitStack) -> tuple[llava_engine.VisionModel, float]:
    """The model, and the seconds that writing random weights took, which no cold start has."""
    config = engine_config(args)
    if args.trace is not None:
        from llava_engine.cli.bench.trace import prepare

        prepare()
        config = dataclasses.replace(config, nvtx=True)
    if args.kv_cache_mb is not None:
        try:
            config = dataclasses.replace(config, kv_cache_mb=args.kv_cache_mb)
        except ValueError as error:
            raise BadInput(str(error)) from error
    width, height = args.image_size or (0, 0)
    if width * height > config.max_image_pixels:
        raise BadInput(f"--image-size: {config.max_image_pixels} pixels are allowed")
    model = llava_engine.get(args.model, config)
    if not args.random_weights:
        return model, 0.0
    began = time.monotonic()
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava-engine-")))
    write_random_checkpoint(model.info, directory, args.seed)
    name = f"{model.info.registry_key} (random weights)"
    info = dataclasses.replace(
        model.info, registry_key=name, repo_id=None, revision="main", directory=directory
    )
    return llava_engine.VisionModel(info, config), time.monotonic() - began


def _workload(args: argparse.Namespace, model: llava_engine.VisionModel) -> Workload:
    if args.images is not None:
        pictures, _ = files(args.images)
    else:
        pictures = noise(_picture_size(args, model), args.seed)
    query = QUESTION
    if args.prompt_tokens is not None:
        query = question_of(model, pictures(0), args.prompt_tokens)
    return Workload(model, pictures, query, args.new_tokens)


def _picture_size(args: argparse.Namespace, model: llava_engine.VisionModel) -> tuple[int, int]:
    """Height and width of random pictures."""
    if args.image_size is not None:
        width, height = args.image_size
        return height, width
    return model.info.image_size, model.info.image_size


def _setting(model: llava_engine.VisionModel, work: Workload, record: dict[str, Any]) -> Setting:
    from PIL import Image

    def picture(number: int) -> Image.Image:
        source: Any = work.pictures(number)
        if isinstance(source, str):
            return Image.open(source).convert("RGB")
        return Image.fromarray(source)

    device = record["where"]["devices"][0]
    dtype = model.config.dtype
    if dtype == "auto":  # as the engine has it
        dtype = "float32" if device == "cpu" else "float16"
    info = model.info
    local = info.directory is not None
    return Setting(
        source=str(info.directory if local else info.repo_id),
        revision=None if local else info.revision,
        device=device,
        dtype=dtype,
        prompt=work.prompt(),
        picture=picture,
        context=record["workload"]["prompt_tokens"] + work.new_tokens + 1,
    )


def _print(record: dict[str, Any]) -> None:
    split = record["cold_start_s"]
    print_table([(name, f"{seconds:8.3f} s") for name, seconds in split.items()])
    found = record["where"]
    if found is not None and found["devices"] != ["cpu"]:
        print("The CUDA context is made beside the imports: that time is in both.")
    runs = [run for run in record["runs"]]
    for peer in record.get("peers", []):
        runs += peer.get("runs", [])
    if runs:
        print()
        print_table(
            [("", "AT ONCE", "TOKENS/S", "TTFT P50", "P99", "TPOT P50", "P99", "E2E P50", "P99")]
            + [_row(run) for run in runs]
        )
        print("Times in milliseconds, as the reader of the answer saw them.")
    for run in runs:
        for error in run.get("errors", []):
            print(f"{run['failed']} of {run['num_prompts']} requests failed: {error}")
        if "request_goodput" in run:
            print(f"{run['request_goodput']:.2f} requests/s met the goals at {_load(run)}.")
    for peer in record.get("peers", []):
        print(f"{peer['name']}: {_verdict(peer)}.")
    if found is not None:
        print(f"It {sentence(found)}.")


def _row(run: dict[str, Any]) -> list[str]:
    times = [
        "-" if run[f"{p}_{name}_ms"] is None else f"{run[f'{p}_{name}_ms']:.2f}"
        for name in ("ttft", "tpot", "e2el")
        for p in ("p50", "p99")
    ]
    return [run["backend"].replace("_", "-"), _load(run), f"{run['output_throughput']:.0f}", *times]


def _load(run: dict[str, Any]) -> str:
    if "request_rate" in run:
        return f"{run['request_rate']:g}/s"
    return str(run["max_concurrency"])


def _verdict(peer: dict[str, Any]) -> str:
    if peer["missing"]:
        return f"not measured, {peer['missing']}"
    outputs = peer["outputs"]
    counts = (
        f"of {outputs['compared']} answers {outputs['identical']} are ours to the token, "
        f"{outputs['near_ties']} part at a near tie, {outputs['different']} differ"
    )
    if not agree(peer):
        counts += ": its speed is not comparable"
    return f"{counts}; {peer['stopped']}" if peer["stopped"] else counts


def _read_ops(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"--ops: {path} cannot be read") from error
    return found


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
        if min(counts) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be like 1,8, each 1 or more, not {text!r}"
        ) from None
    return counts


def _rates(text: str) -> list[float]:
    try:
        return [_positive(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be like 2,8.5, each above 0, not {text!r}"
        ) from None


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError("must be like 640x480")
    return int(width), int(height)


def _goals(text: str) -> dict[str, float]:
    goals = {}
    for part in text.split(","):
        name, _, limit = part.partition(":")
        if name not in GOALS:
            raise argparse.ArgumentTypeError(f"knows {', '.join(GOALS)}, not {name!r}")
        try:
            goals[name] = _positive(limit)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{name} must be above 0, not {limit!r}") from None
    return goals


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def _peers(text: str) -> list[str]:
    named = text.split(",")
    unknown = [name for name in named if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"knows {', '.join(NAMES)}, not {unknown[0]!r}")
    return [name for name in NAMES if name in named]
