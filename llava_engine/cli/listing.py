"""`llava-engine models`, and how the commands print tables and sizes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import llava_engine


def list_models(args: argparse.Namespace) -> None:
    """Print the registered models, whether they are here, and what they take in which format."""
    from llava_engine.hub import cached, checkpoint_mb
    from llava_engine.pool.sizing import formats_needed

    found: list[dict[str, Any]] = []
    for info in llava_engine.models():
        directory = cached(info)
        needs = formats_needed(info, llava_engine.EngineConfig(), "cuda:0")
        found.append(
            {
                "name": info.registry_key,
                "source": f"{info.repo_id} @ {info.revision}" if info.repo_id else "local",
                "here": directory is not None,
                "disk_mb": checkpoint_mb(directory) if directory else None,
                "device_mb": info.est_memory_allocation_mb,
                "further_worker_mb": info.est_worker_share_mb,
                "quantised": {
                    name: {"device_mb": need.first_mb, "further_worker_mb": need.next_mb}
                    for name, need in needs.items()
                },
                "host_mb": info.est_host_memory_mb,
            }
        )
    if args.json:
        print(json.dumps(found))
        return
    rows = [("NAME", "HERE", "ON DISK", "ON DEVICE", "INT8", "FP8", "NF4", "SOURCE")]
    for model in found:
        rows.append(
            (
                model["name"],
                "yes" if model["here"] else "no",
                size(model["disk_mb"]),
                size(model["device_mb"]),
                *(size(model["quantised"][name]["device_mb"]) for name in ("int8", "fp8", "nf4")),
                model["source"],
            )
        )
    print_table(rows)
    print(
        "\nON DEVICE is an estimate: 16-bit weights, a worker's KV cache and workspace. INT8, FP8"
        "\nand NF4 are that with --quantization, and with a smaller KV cache."
    )


def size(megabytes: int | None) -> str:
    """MiB for people."""
    if megabytes is None:
        return "-"
    return f"{megabytes} MiB" if megabytes < 10_000 else f"{megabytes / 1024:.1f} GiB"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells, columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
