"""What does EngineConfig(prefill="fp8") cost in accuracy, and what does it gain?

LLaVA-1.5-7B's shape with random fp16 weights, on a GPU: the logits after prompts of random tokens,
prefilled one by one in both ways. llava-tiny, whose heads are too narrow for the kernels, by their
references on the CPU: questions about scenes that it never trained on, answered in both ways, and
once more in the first, since batching alone can tip a near tie. With --prompts 0 no GPU is needed.

    python -m bench.fp8 [--prompts N] [--scenes N] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path

import torch

import llava_engine
from bench.about import about
from bench.decode import Words
from bench.decode_step import DEVICE, make_model
from bench.demo_model.evaluate import MAX_NEW, Case, Table, make_cases
from llava_engine import EngineConfig, PoolConfig, SamplingParams, WorkerPool
from llava_engine.channel import Channel
from llava_engine.kernels.library import require_kernels
from llava_engine.network.llava import LlavaModel
from llava_engine.runtime.runtime import DeviceRuntime
from llava_engine.runtime.sequence import Sequence
from llava_engine.stream import ChunkStream

SHORTEST, LONGEST = 500, 750  # tokens, around those of a picture and a question
OPEN = 32  # requests of llava-tiny at once

EXACT = EngineConfig(device="cuda")
FP8 = EngineConfig(device="cuda", prefill="fp8")
TINY_EXACT = EngineConfig(device="cpu", kernels="reference")
TINY_FP8 = EngineConfig(device="cpu", kernels="reference", prefill="fp8")


def random_prompts(model: LlavaModel, count: int) -> list[list[int]]:
    chance = random.Random(0)
    most = model.config.text.vocab_size
    return [
        [1, *(chance.randrange(3, most) for _ in range(chance.randint(SHORTEST, LONGEST)))]
        for _ in range(count)
    ]


def first_logits(
    model: LlavaModel, config: EngineConfig, prompts: list[list[int]]
) -> tuple[torch.Tensor, list[float]]:
    """Float64 [prompts, vocab] after each prompt, and the milliseconds to its first token; the
    first prompt warms up and is left out."""
    seen: list[torch.Tensor] = []
    plain = model.logits

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(hidden)
        seen.append(logits)
        return logits

    model.logits = watched  # type: ignore[method-assign]
    runtime = DeviceRuntime(model, device=model.device, config=config)
    times = []
    try:
        runtime.add_worker("one", 2 << 30)
        for ids in map(list, prompts):  # a sequence appends to its ids
            channel = Channel()
            channel.bind(Words(), len(ids), 0)
            sampling = SamplingParams(ignore_eos=True)
            start = time.perf_counter()
            runtime.submit(Sequence(ids, (), sampling, 1, frozenset(), channel, seed=0))
            ChunkStream(channel).text()
            times.append(1e3 * (time.perf_counter() - start))
    finally:
        runtime.close()
        del model.logits
    assert [len(logits) for logits in seen] == [1] * len(prompts), "logits went unseen"
    return torch.cat(seen[1:]).double().cpu(), times[1:]


def compared(exact: torch.Tensor, fp8: torch.Tensor) -> dict[str, float]:
    """Differences of logits, in standard deviations of a prompt's logits."""
    assert not torch.equal(exact, fp8), "nothing ran in fp8"
    off = (fp8 - exact) / exact.std(dim=1, keepdim=True)
    best = exact.topk(2, dim=1).values
    gaps = (best[:, 0] - best[:, 1]) / exact.std(dim=1)
    return {
        "logit_difference_max": float(off.abs().max()),
        "logit_difference_rms": float(off.pow(2).mean().sqrt()),
        "median_gap_of_the_two_best": float(gaps.median()),
        "first_token_same": float((exact.argmax(dim=1) == fp8.argmax(dim=1)).double().mean()),
    }


def large(count: int, model: LlavaModel) -> dict[str, object]:
    """The 7B's shape."""
    prompts = random_prompts(model, count + 1)
    exact, exact_ms = first_logits(model, EXACT, prompts)
    fp8, fp8_ms = first_logits(model, FP8, prompts)
    return {
        "prompts": count,
        "tokens_median": statistics.median(map(len, prompts[1:])),
        **compared(exact, fp8),
        "first_token_ms_exact": statistics.median(exact_ms),
        "first_token_ms_fp8": statistics.median(fp8_ms),
    }


def answers(cases: list[Case], config: EngineConfig) -> list[str]:
    """Greedy answers of llava-tiny."""
    texts: list[str] = []
    with WorkerPool(PoolConfig()) as pool:
        model = llava_engine.get("llava-tiny", config, pool=pool)
        waiting: deque[ChunkStream] = deque()
        for case in cases:
            if len(waiting) == OPEN:
                texts.append(waiting.popleft().text())
            question = case.question
            longest = MAX_NEW[question.kind]
            waiting.append(
                model.describe_image(case.picture, question.text, max_new_tokens=longest)
            )
        texts += [stream.text() for stream in waiting]
    return texts


def tiny(scenes: int) -> dict[str, object]:
    """The trained demo model."""
    cases = make_cases(scenes)
    first, again, eighth = (answers(cases, config) for config in (TINY_EXACT, TINY_EXACT, TINY_FP8))

    def same(others: list[str]) -> float:
        return sum(a == b for a, b in zip(first, others, strict=True)) / len(cases)

    def right(texts: list[str]) -> dict[str, float]:
        table = Table()
        for case, text in zip(cases, texts, strict=True):
            table.add(case, text)
        return {kind: line["percent"] for kind, line in table.summary().items()}

    return {
        "questions": len(cases),
        "same_text_exact_again": same(again),
        "same_text_fp8": same(eighth),
        "right_percent_exact": right(first),
        "right_percent_fp8": right(eighth),
    }


def main() -> None:
    """Print both comparisons; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    record: dict[str, object] = {
        **about(),
    }
    if arguments.scenes:
        record["llava_tiny"] = tiny(arguments.scenes)
    if arguments.prompts and DEVICE.type != "cuda":
        print("without a GPU the 7B's logits are left out: fp8 prefill is Hopper's")
    elif arguments.prompts:
        require_kernels(DEVICE)
        record["device"] = torch.cuda.get_device_name()
        with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
            model = make_model(Path(directory))
        record["7b"] = large(arguments.prompts, model)
    print(json.dumps(record, indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
