"""What does EngineConfig(quantization=...) cost llava-tiny in right answers, and what does it save?

Questions about scenes that it never trained on, answered on the CPU by the formats' definitions in
plain torch (float32 activations), once in each format and once more without any, since batching
alone can tip a near tie. All of its products are in whole blocks of NF4.

    python -m bench.quantization [--scenes N] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from bench.demo_model.evaluate import Case, Table, make_cases
from bench.fp8 import answers
from llava_engine import EngineConfig, models
from llava_engine.network.weights import load_model

FORMATS: tuple[Literal["int8", "fp8", "nf4"] | None, ...] = (None, "int8", "fp8", "nf4")
MOST_LOST = {"int8": 1.0, "fp8": 1.0, "nf4": 5.0}  # points of the closed questions


def config(quantization: Literal["int8", "fp8", "nf4"] | None) -> EngineConfig:
    return EngineConfig(device="cpu", quantization=quantization, progress_bar=False)


def table(cases: list[Case], texts: list[str]) -> dict[str, dict[str, float]]:
    counted = Table()
    for case, text in zip(cases, texts, strict=True):
        counted.add(case, text)
    return counted.summary()


def weight_bytes(quantization: Literal["int8", "fp8", "nf4"] | None) -> dict[str, int]:
    """Of the whole model in 16 bits, and of the decoder's products in it."""
    info = next(info for info in models() if info.registry_key == "llava-tiny")
    assert info.directory is not None
    with torch.inference_mode():
        model = load_model(
            info.directory,
            device=torch.device("cpu"),
            dtype=torch.float16,
            quantization=quantization,
        )
    products = [product for product, _ in model.quantised()]
    if quantization is not None:
        assert len(products) == 4 * model.config.text.num_layers, "a product is left as it was"
    rest = sum(view.nbytes for name, view in model.slots() if not _is_product(name))
    return {"all": model.nbytes, "products": model.nbytes - rest}


def _is_product(name: str) -> bool:
    return name.startswith("language_model.model.layers.") and name.endswith("_proj.weight")


def measured(scenes: int) -> dict[str, object]:
    cases = make_cases(scenes)
    texts = {str(name): answers(cases, config(name)) for name in FORMATS}
    again = answers(cases, config(None))
    tables = {name: table(cases, said) for name, said in texts.items()}
    whole = tables["None"]["all closed"]["percent"]

    def same(said: list[str]) -> float:
        return sum(a == b for a, b in zip(texts["None"], said, strict=True)) / len(cases)

    return {
        "questions": len(cases),
        "same_text_again": same(again),
        "formats": {
            str(name): {
                "bytes": weight_bytes(name),
                "same_text": same(texts[str(name)]),
                "closed_points_lost": round(whole - tables[str(name)]["all closed"]["percent"], 2),
                "right": tables[str(name)],
            }
            for name in FORMATS
        },
    }


def main() -> None:
    """Print the table; write JSON if asked. Ends with an error where a format loses too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measured(arguments.scenes)
    record = {
        "commit": os.environ.get("COMMIT", "unknown"),
        "command": f"python -m bench.quantization --scenes {arguments.scenes}",
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "bitsandbytes": version("bitsandbytes"),
        "llava_tiny": found,
    }
    print(json.dumps(record, indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    for name, line in found["formats"].items():  # type: ignore[attr-defined]
        if line["closed_points_lost"] > MOST_LOST.get(name, 0.0):
            raise SystemExit(f"{name} loses {line['closed_points_lost']} points")


if __name__ == "__main__":
    main()
