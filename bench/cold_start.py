"""How long from a process's start to its first token, and where does the time go?

A checkpoint of LLaVA-1.5-7B's shape with random weights is written to a temporary folder, so that
it is in the page cache (--folder must have room), with llava-tiny's tokenizer. Then fresh
processes run `llava-engine bench` on it, one after the other; the first does not count. "start to
first token" is measured from here, with what it takes to start a process; the stages are the
package's own. --gigabytes takes fewer layers, --model something that is there.

    python -m bench.cold_start [--gigabytes 14] [--repeats 5] [--device cuda] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.about import about
from bench.load import make_checkpoint
from llava_engine.demo import model_dir

TOTAL = "start to first token"


def write_checkpoint(directory: Path, gigabytes: float) -> None:
    """A checkpoint that the whole package can run; what it says is nonsense."""
    make_checkpoint(directory, int(gigabytes * 1e9), torch.float16)
    tiny = model_dir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, directory)
    config = json.loads((directory / "config.json").read_bytes())
    theirs = json.loads((tiny / "config.json").read_bytes())
    config["image_token_index"] = theirs["image_token_index"]
    (directory / "config.json").write_text(json.dumps(config))
    side = 336
    processor = json.loads((tiny / "preprocessor_config.json").read_bytes())
    processor |= {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))


def start(model: str, device: str, requests: int) -> dict[str, Any]:
    """What one fresh process says, and how long it took as seen from here."""
    command = [sys.executable, "-m", "llava_engine.cli", "bench", "--json", "--model", model]
    command += ["--device", device, "--requests", str(requests)]
    began = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    record = json.loads(done.stdout)
    split = record["cold_start_s"]
    split[TOTAL] = round(record.pop("first_token_at") - began, 4)
    print("  ".join(f"{name} {seconds:.2f}" for name, seconds in split.items()), flush=True)
    return record


def main() -> None:
    """Print a line per process and the medians; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=14.13)
    parser.add_argument("--model", help="measure this model instead of writing one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        model = arguments.model
        if model is None:
            model = stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder))
            write_checkpoint(Path(model), arguments.gigabytes)
        start(model, arguments.device, 0)
        runs = [start(model, arguments.device, 0) for _ in range(arguments.repeats)]
        (warm,) = start(model, arguments.device, 5)["runs"]
    splits = [run["cold_start_s"] for run in runs]
    medians = {
        name: round(statistics.median(split[name] for split in splits), 4) for name in splits[0]
    }
    print("medians:", medians)
    if arguments.json:
        record = {
            **about(),
            "device": runs[0]["where"]["names"][0],
            "gigabytes": arguments.gigabytes if arguments.model is None else None,
            "model": arguments.model,
            "start_to_first_token_s": medians[TOTAL],
            "medians_s": medians,
            "runs": splits,
            "warm": {
                "requests": warm["completed"],
                "first_token_ms": round(warm["median_ttft_ms"], 3),
                "token_ms": round(warm["median_tpot_ms"], 3),
            },
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
