"""The peers' part of a run: each measured where it can be had, its answers compared with ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_engine.cli.bench import peers
from llava_engine.cli.bench.loops import Record, clock
from llava_engine.cli.bench.metrics import summarize

NAMES = {
    "vllm": "vLLM",
    "eager": "transformers eager",
    "compiled": "transformers static cache + compile",
}
"""By what the command line calls them, in the order in which they run."""

_ONE_BY_ONE = 4  # requests of a run at concurrency 1, after those that warm up
_JUDGED = 2  # at each level
_MEASURED = 32  # tokens whose logits tell what rounding does


@dataclass(frozen=True, slots=True)
class Plan:
    """What peers are asked.

    levels: by concurrency, the numbers of the requests that the engine was asked there.
    ours: what it answered to them, if it did.
    """

    levels: Mapping[int, Sequence[int]]
    new_tokens: int
    ours: peers.Answers


def measure_peers(
    wanted: Sequence[str], setting: peers.Setting, plan: Plan
) -> list[dict[str, Any]]:
    """A record per peer that is wanted, of NAMES: "missing" says why there is nothing else in it.

    A peer without continuous batching gets the requests of a level as one batch, and the compiled
    one only single requests: every size of a batch is compiled anew.
    """
    found: dict[str, dict[str, Any]] = {}
    answers: dict[str, peers.Answers] = {}
    for short in wanted:
        found[short] = {"name": NAMES[short], "missing": None}

    def measure(short: str, run: peers.Run, version: str, most: int | None) -> None:
        if most is not None and min(plan.levels) > most:
            found[short]["missing"] = f"measured at a concurrency of {most} at most"
            return
        try:
            began = clock()
            run([_first(plan)], plan.new_tokens)
            if short == "compiled":
                run([_first(plan)], plan.new_tokens)  # records what the first one compiled
            found[short] |= {"version": version, "warm_up_s": round(clock() - began, 3)}
            runs, answers[short], stopped = _runs(run, plan, most)
        except Exception as error:  # a stranger's code: its failure is its own, and is told
            found[short]["missing"] = f"failed with {_told(error)}"
            return
        found[short]["runs"] = [{"backend": NAMES[short], **figures} for figures in runs]
        found[short]["stopped"] = stopped

    if "vllm" in wanted:
        try:
            vllm = peers.Vllm(setting)
        except peers.Missing as missing:
            found["vllm"]["missing"] = str(missing)
        else:
            measure("vllm", vllm.run, peers.version("vllm"), None)
            vllm.close()
    if not answers and not {"eager", "compiled"} & found.keys():
        return list(found.values())  # there is nothing to judge
    try:
        model = peers.Transformers(setting)
    except peers.Missing as missing:
        for short in {"eager", "compiled"} & found.keys():
            found[short]["missing"] = str(missing)
        judge = None
    else:
        version = peers.version("transformers")
        if "eager" in wanted:
            measure("eager", model.eager, version, None)
        if "compiled" in wanted:
            measure("compiled", model.compiled, version, 1)
        judge = peers.Judge(model, _judged(plan), min(plan.new_tokens, _MEASURED))
    for short, theirs in answers.items():
        ours = {number: plan.ours[number] for number in _judged(plan) if number in plan.ours}
        found[short]["outputs"] = peers.compare(ours, theirs, judge)
    return list(found.values())


def agree(peer: dict[str, Any]) -> bool:
    """Whether a peer's answers are ours, so that its speed may stand beside ours."""
    outputs = peer.get("outputs")
    return bool(outputs and outputs["compared"] and not outputs["different"])


def _runs(
    run: peers.Run, plan: Plan, most: int | None
) -> tuple[list[dict[str, Any]], peers.Answers, str | None]:
    """The figures at each level, up to `most` at once, what was answered, and what ended it early.

    Raises what the first level fails with.
    """
    figures: list[dict[str, Any]] = []
    answers: peers.Answers = {}
    for concurrency, numbers in plan.levels.items():
        if most is not None and concurrency > most:
            continue
        if concurrency == 1:
            batches = [[number] for number in numbers[:_ONE_BY_ONE]]
        else:
            batches = [list(numbers[:concurrency])]
        records: list[Record] = []
        began = clock()
        try:
            for batch in batches:
                records += run(batch, plan.new_tokens)
        except Exception as error:  # too large a batch, as a rule
            if not figures:
                raise
            return figures, answers, f"{concurrency} at once failed with {_told(error)}"
        seconds = clock() - began
        mode = "one by one" if concurrency == 1 else "one batch"
        summary = summarize(records, seconds)
        figures.append({"mode": mode, "max_concurrency": concurrency, **summary})
        answers |= {record.number: record.token_ids for record in records}
    return figures, answers, None


def _told(error: Exception) -> str:
    """An error in a line."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}"


def _first(plan: Plan) -> int:
    return next(iter(plan.levels.values()))[0]


def _judged(plan: Plan) -> list[int]:
    return [number for numbers in plan.levels.values() for number in numbers[:_JUDGED]]
