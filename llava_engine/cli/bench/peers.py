"""Other engines on the same checkpoint, pictures and prompts: one small adapter each.

An engine that is not installed is told to be missing. What an adapter gives are the same records
as the engine's own, so one set of figures is made of both; and before they are compared, the tokens
are: see `Judge`. The only file of the package that knows these libraries.
"""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_engine.cli.bench.loops import Record, clock


@dataclass(frozen=True, slots=True)
class Setting:
    """What every peer is given. picture: by request number, as a PIL image.

    source, revision: a directory, or the hub's name and revision. dtype: torch's name of it.
    context: tokens that a request can take at most.
    """

    source: str
    revision: str | None
    device: str
    dtype: str
    prompt: str
    picture: Callable[[int], Any]
    context: int


Run = Callable[[Sequence[int], int], list[Record]]
"""Greedy answers of exactly so many tokens to the requests of these numbers, all at once."""


class Missing(Exception):
    """Why a peer cannot be had here."""


def version(library: str) -> str:
    """Of an installed library. Raises Missing."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"{library} is not installed") from None


class Transformers:
    """transformers' model, which answers batches by `generate` and judges answers."""

    def __init__(self, setting: Setting) -> None:
        """Raises Missing."""
        version("transformers")
        import torch
        from transformers import AutoProcessor, LlavaForConditionalGeneration
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # it would be shown even where stderr is no terminal
        self._setting = setting
        place = {"revision": setting.revision} if setting.revision else {}
        # The picture goes through Pillow, as in the engine: the pixels are the same.
        self._processor = AutoProcessor.from_pretrained(setting.source, backend="pil", **place)
        self._model = LlavaForConditionalGeneration.from_pretrained(
            setting.source, dtype=getattr(torch, setting.dtype), device_map=setting.device, **place
        ).eval()
        self._model.generation_config.eos_token_id = None  # exactly as many tokens as asked for

    def inputs(self, numbers: Sequence[int]) -> Any:
        """A batch as generate takes it: prompts of equal length, so nothing is padded."""
        import torch

        pictures = [self._setting.picture(number) for number in numbers]
        texts = [self._setting.prompt] * len(pictures)
        batch = self._processor(images=pictures, text=texts, return_tensors="pt")
        return batch.to(self._model.device, getattr(torch, self._setting.dtype))

    def compiled(self, numbers: Sequence[int], new_tokens: int) -> list[Record]:
        """A Run with a static cache and torch.compile, the way generate itself offers it."""
        from transformers.generation.configuration_utils import CompileConfig

        compiling = CompileConfig()
        compiling._compile_all_devices = True  # else a GPU's alone
        options = {"cache_implementation": "static", "compile_config": compiling}
        return self.eager(numbers, new_tokens, **options)

    def eager(self, numbers: Sequence[int], new_tokens: int, **options: Any) -> list[Record]:
        """A Run. The times are those at which generate handed the tokens out."""
        began = clock()
        inputs = self.inputs(numbers)
        prepared = clock() - began
        times = _Times()
        ids = self.generate(inputs, new_tokens, streamer=times, **options)
        answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
        ended = clock()
        return [
            Record(
                number,
                began,
                ended,
                arrivals=list(times.times),
                token_ids=answer,
                stages={
                    "queued": 0.0,
                    "image": prepared,
                    "first_token": times.times[0] - began,
                    "total": times.times[-1] - began,
                },
                prompt_tokens=inputs["input_ids"].shape[1],
                output_tokens=len(answer),
            )
            for number, answer in zip(numbers, answers, strict=True)
        ]

    def generate(self, inputs: Any, new_tokens: int, **options: Any) -> Any:
        """transformers' own, greedy and without an end."""
        import torch

        with torch.inference_mode():
            return self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                **options,
            )

    def logits(self, inputs: Any, answer: Sequence[int]) -> Any:
        """[len(answer), vocabulary] in float32: what the model has before each token of `answer`,
        all in one pass."""
        import torch

        prompt = inputs["input_ids"]
        tail = torch.tensor([answer[:-1]], dtype=prompt.dtype, device=prompt.device)
        ids = torch.cat((prompt, tail), dim=1)
        with torch.inference_mode():
            outputs = self._model(
                input_ids=ids,
                pixel_values=inputs["pixel_values"],
                use_cache=False,
                logits_to_keep=len(answer),
            )
        return outputs.logits[0].float()

    def close(self) -> None:
        """Give all memory back."""
        del self._model
        _release()


class _Times:
    """What generate calls with the prompt, with each step's tokens, and at the end."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._begun = False

    def put(self, tokens: Any) -> None:
        if self._begun:
            self.times.append(clock())
        self._begun = True

    def end(self) -> None: ...


class Vllm:
    """vLLM's offline engine without its prefix cache. It hands answers out whole, so the first
    token's time is that of the same requests with one new token, asked just before."""

    def __init__(self, setting: Setting) -> None:
        """Raises Missing."""
        version("vllm")
        if setting.device == "cpu":
            raise Missing("vllm is measured on GPUs only")
        from vllm import LLM

        self._setting = setting
        self._llm = LLM(
            model=setting.source,
            revision=setting.revision,
            dtype=setting.dtype,
            seed=0,
            enable_prefix_caching=False,
            max_model_len=setting.context,
            limit_mm_per_prompt={"image": 1},
        )

    def run(self, numbers: Sequence[int], new_tokens: int) -> list[Record]:
        """A Run."""
        prompts = [
            {
                "prompt": self._setting.prompt,
                "multi_modal_data": {"image": self._setting.picture(number)},
            }
            for number in numbers
        ]
        first, _, _ = self._generate(prompts, 1)
        seconds, began, outputs = self._generate(prompts, new_tokens)
        return [
            Record(
                number,
                began,
                began + seconds,
                arrivals=[began + min(first, seconds)],
                token_ids=list(output.outputs[0].token_ids),
                prompt_tokens=len(output.prompt_token_ids),
                output_tokens=len(output.outputs[0].token_ids),
            )
            for number, output in zip(numbers, outputs, strict=True)
        ]

    def _generate(self, prompts: list[Any], new_tokens: int) -> tuple[float, float, list[Any]]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        began = clock()
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        return clock() - began, began, outputs

    def close(self) -> None:
        """Give all memory back."""
        del self._llm
        _release()


class Judge:
    """Says whether two engines' greedy answers to a request are the same as far as can be asked.

    Equal tokens are. Else each answer must be greedy by the logits that transformers has for it, in
    one pass over prompt and answer; a token may lie below the best one by no more than twice what
    transformers' own logits differ by between that pass and its step by step decoding, which is
    rounding and nothing else. Such answers part at a near tie.
    """

    def __init__(self, model: Transformers, numbers: Sequence[int], new_tokens: int) -> None:
        self._model = model
        self._inputs = {number: model.inputs([number]) for number in numbers}
        self.logit_error = max(
            (self._measure(inputs, new_tokens) for inputs in self._inputs.values()), default=0.0
        )

    def greedy(self, number: int, answer: Sequence[int]) -> bool:
        """Whether every token of `answer` is the best one, or near it."""
        logits = self._model.logits(self._inputs[number], answer)
        best = logits.max(dim=-1).values.tolist()
        chosen = [float(row[token]) for row, token in zip(logits, answer, strict=True)]
        gap = max(b - c for b, c in zip(best, chosen, strict=True))
        return bool(gap <= 2 * self.logit_error)

    def _measure(self, inputs: Any, new_tokens: int) -> float:
        import torch

        result = self._model.generate(
            inputs, new_tokens, return_dict_in_generate=True, output_logits=True
        )
        answer = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        stepped = torch.cat([step.float() for step in result.logits])
        return float((stepped - self._model.logits(inputs, answer)).abs().max())


Answers = dict[int, list[int]]
"""Token ids by the request's number."""


def compare(ours: Answers, theirs: Answers, judge: Judge | None) -> dict[str, Any]:
    """How many answers to the same request are "identical", "near_ties" or "different".

    Without a judge all that are not identical are different.
    """
    found = {"compared": 0, "identical": 0, "near_ties": 0, "different": 0}
    for number in sorted(ours.keys() & theirs.keys()):
        found["compared"] += 1
        # The last tokens may be no text yet, and are then in no chunk: what both have is compared.
        length = min(len(ours[number]), len(theirs[number]))
        mine, other = ours[number][:length], theirs[number][:length]
        if 2 * length < max(len(ours[number]), len(theirs[number]), 1):
            found["different"] += 1
        elif mine == other:
            found["identical"] += 1
        elif judge is not None and judge.greedy(number, mine) and judge.greedy(number, other):
            found["near_ties"] += 1
        else:
            found["different"] += 1
    return found if judge is None else {**found, "logit_error": judge.logit_error}


def _release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
