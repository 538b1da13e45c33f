"""Asks llava-tiny about scenes it never trained on and prints how many answers are right, by kind.

    python -m bench.demo_model.evaluate [--backend engine|transformers] [--json PATH]

Closed questions count only when the whole answer is exact but for case and a last period; a
description counts when it names every object with its colour and nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from bench.demo_model.questions import (
    CLOSED,
    KINDS,
    Question,
    names_everything,
    one_of_each,
    same_answer,
)
from bench.demo_model.scenes import Scene, make_scene, render
from bench.demo_model.tokenizer import PROMPT

SEED = 20_261_124  # train.py uses 1, its validation 1,000,003
MAX_NEW = {kind: 96 if kind == "describe" else 12 for kind in KINDS}


@dataclass(frozen=True)
class Case:
    scene: Scene
    picture: Image.Image
    question: Question


@dataclass
class Table:
    asked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    verbatim: int = 0  # descriptions that are the generator's own, word for word
    wrong: list[str] = field(default_factory=list)

    def add(self, case: Case, answer: str) -> None:
        question = case.question
        if question.kind == "describe":
            good = names_everything(case.scene, answer)
            self.verbatim += same_answer(answer, question.answer)
        else:
            good = same_answer(answer, question.answer)
        self.asked[question.kind] += 1
        self.right[question.kind] += good
        if not good:
            self.wrong.append(
                f"{case.scene.index} {question.text} | {question.answer} | {answer.strip()}"
            )

    def summary(self) -> dict[str, dict[str, float]]:
        lines = {kind: (self.right[kind], self.asked[kind]) for kind in KINDS}
        lines["all closed"] = (
            sum(self.right[k] for k in CLOSED),
            sum(self.asked[k] for k in CLOSED),
        )
        lines["describe, word for word"] = (self.verbatim, self.asked["describe"])
        return {
            name: {"right": right, "asked": asked, "percent": round(100 * right / max(1, asked), 2)}
            for name, (right, asked) in lines.items()
        }


def _case_parts(index: int) -> tuple[Scene, Image.Image, list[Question]]:
    scene = make_scene(SEED, index)
    return scene, render(scene), one_of_each(scene)


def make_cases(scenes: int) -> list[Case]:
    workers = min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_case_parts, range(scenes), chunksize=16)
    return [Case(scene, picture, q) for scene, picture, asked in parts for q in asked]


def answers_transformers(
    cases: list[Case], model: str, device: str, dtype: str, batch: int
) -> Iterator[str]:
    """Greedy answers of transformers, `batch` questions at a time."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype))
    llava = llava.to(device).eval()
    processor = AutoProcessor.from_pretrained(model, backend="pil")
    # Questions of like length answer together; `place` puts the answers back in order.
    place = sorted(range(len(cases)), key=lambda i: MAX_NEW[cases[i].question.kind])
    answers = [""] * len(cases)
    for start in range(0, len(cases), batch):
        part = place[start : start + batch]
        inputs = processor(
            images=[cases[i].picture for i in part],
            text=[PROMPT.format(query=cases[i].question.text) for i in part],
            padding=True,
            return_tensors="pt",
        ).to(device, dtype=getattr(torch, dtype))
        limit = max(MAX_NEW[cases[i].question.kind] for i in part)
        made = llava.generate(**inputs, max_new_tokens=limit, do_sample=False)
        texts = processor.batch_decode(
            made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(part, texts, strict=True):
            answers[i] = text
    yield from answers


def answers_engine(cases: list[Case], model: str, streams: int) -> Iterator[str]:
    """Greedy answers of llava_engine, `streams` of them open at once."""
    import llava_engine

    vision = llava_engine.get(model)
    waiting: deque[llava_engine.ChunkStream] = deque()
    for case in cases:
        if len(waiting) == streams:
            yield waiting.popleft().text()
        question = case.question
        waiting.append(
            vision.describe_image(
                case.picture, question.text, max_new_tokens=MAX_NEW[question.kind]
            )
        )
    while waiting:
        yield waiting.popleft().text()


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def hardware(device: str) -> str:
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores, {platform.processor() or platform.machine()}"


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "pillow", "numpy"):
        found[name] = metadata.version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("engine", "transformers"), default="engine")
    parser.add_argument("--model", help="default: the checkpoint in the package")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--device", default="cpu", help="transformers: cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="transformers: torch's name of it")
    parser.add_argument("--batch", type=int, default=256, help="transformers: questions at a time")
    parser.add_argument("--streams", type=int, default=64, help="engine: streams open at once")
    parser.add_argument("--json", type=Path, help="write the table and what it was measured on")
    parser.add_argument("--commit", help="what to record where there is no git")
    parser.add_argument("--wrong", type=int, default=0, help="print so many of the wrong answers")
    args = parser.parse_args()

    started = time.monotonic()
    cases = make_cases(args.scenes)
    if args.backend == "transformers":
        from llava_engine.demo import model_dir

        model = args.model or str(model_dir())
        answers = answers_transformers(cases, model, args.device, args.dtype, args.batch)
    else:
        model = args.model or "llava-tiny"
        answers = answers_engine(cases, model, args.streams)
    table = Table()
    for case, answer in zip(cases, answers, strict=True):
        table.add(case, answer)
    summary = table.summary()
    print(f"{'kind':<24} {'right':>7} {'asked':>7} {'%':>7}")
    for name, line in summary.items():
        print(f"{name:<24} {line['right']:>7} {line['asked']:>7} {line['percent']:>7.2f}")
    for miss in table.wrong[: args.wrong]:
        print("wrong:", miss)
    if args.json:
        record = {
            "what": "llava-tiny on scenes of a seed never trained on",
            "command": "python -m bench.demo_model.evaluate " + " ".join(sys.argv[1:]),
            "commit": args.commit or commit(),
            "backend": args.backend,
            "dtype": args.dtype if args.backend == "transformers" else "the engine's",
            "hardware": hardware(args.device),
            "versions": versions(),
            "seed": SEED,
            "scenes": args.scenes,
            "seconds": round(time.monotonic() - started, 1),
            "table": summary,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
