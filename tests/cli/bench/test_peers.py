"""The peers' adapters and the judge of answers, on a random checkpoint of llava-tiny's shape."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_engine
from llava_engine.cli.bench import comparison, peers
from llava_engine.cli.bench.random_checkpoint import write_random_checkpoint
from llava_engine.cli.bench.workload import Workload, noise

NEW_TOKENS = 8
PICTURES = noise((112, 112), seed=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random")
    (info,) = [info for info in llava_engine.models() if info.registry_key == "llava-tiny"]
    write_random_checkpoint(info, directory, seed=5)
    return directory


@pytest.fixture(scope="module")
def setting(directory: Path) -> peers.Setting:
    return peers.Setting(
        source=str(directory),
        revision=None,
        device="cpu",
        dtype="float32",
        prompt="USER: <image>\nDescribe the picture. ASSISTANT:",
        picture=lambda number: Image.fromarray(PICTURES(number)),
        context=256,
    )


@pytest.fixture(scope="module")
def model(setting: peers.Setting) -> Iterator[peers.Transformers]:
    model = peers.Transformers(setting)
    yield model
    model.close()


@pytest.fixture(scope="module")
def answers(model: peers.Transformers) -> peers.Answers:
    return {record.number: record.token_ids for record in model.eager([0, 1], NEW_TOKENS)}


@pytest.fixture(scope="module")
def judge(model: peers.Transformers) -> peers.Judge:
    return peers.Judge(model, [0, 1], NEW_TOKENS)


def test_the_adapter_is_transformers_own_answer(setting, model, answers):
    processor = AutoProcessor.from_pretrained(setting.source, backend="pil")
    theirs = LlavaForConditionalGeneration.from_pretrained(setting.source, dtype="float32")
    for number, answer in answers.items():
        inputs = processor(images=setting.picture(number), text=setting.prompt, return_tensors="pt")
        ids = theirs.generate(
            **inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
        )
        assert ids[0, inputs["input_ids"].shape[1] :].tolist() == answer


def test_a_record_has_a_time_for_each_token(model):
    for numbers in ([3], [4, 5, 6]):
        records = model.eager(numbers, NEW_TOKENS)
        assert [record.number for record in records] == numbers
        for record in records:
            assert record.output_tokens == len(record.arrivals) == NEW_TOKENS
            assert record.submitted < record.arrivals[0]
            assert sorted(record.arrivals) == record.arrivals
            assert record.arrivals[-1] <= record.ended


def test_the_engine_answers_the_same_to_the_same_requests(directory, answers, judge):
    """Through the public names, as the command asks."""
    model = llava_engine.get(
        directory, llava_engine.EngineConfig(device="cpu", kv_cache_mb=64, dtype="float32")
    )
    work = Workload(model, PICTURES, "Describe the picture.", NEW_TOKENS)
    assert work.prompt() == "USER: <image>\nDescribe the picture. ASSISTANT:"
    ask = work.ask(0, 2)
    ours = {}
    for number in range(2):
        with ask(number) as stream:
            ours[number] = [token for chunk in stream for token in chunk.token_ids]
    found = peers.compare(ours, answers, judge)
    assert found["compared"] == 2 and found["different"] == 0
    assert found["logit_error"] == judge.logit_error


def test_equal_answers_need_no_judge(answers):
    found = peers.compare(answers, answers, None)
    assert found == {"compared": 2, "identical": 2, "near_ties": 0, "different": 0}


def test_no_answer_is_the_same_as_none(answers):
    """A stream that broke off is no match, however well it began; a last token may be missing."""
    for kept, kind in ((0, "different"), (3, "different"), (NEW_TOKENS - 1, "identical")):
        broken = {number: answer[:kept] for number, answer in answers.items()}
        for one, other in ((answers, broken), (broken, answers)):
            assert peers.compare(one, other, None)[kind] == 2
    assert peers.compare({0: []}, {0: []}, None)["different"] == 1
    assert not comparison.agree({"outputs": peers.compare({}, answers, None)})


def test_another_answer_is_different(answers, judge):
    wrong = {number: list(answer) for number, answer in answers.items()}
    wrong[1][4] = (wrong[1][4] + 1) % 768
    for one, other in ((answers, wrong), (wrong, answers)):
        found = peers.compare(one, other, judge)
        assert (found["identical"], found["near_ties"], found["different"]) == (1, 0, 1)


def test_a_token_that_rounding_may_prefer_is_a_near_tie(model, answers, judge, monkeypatch):
    """The second best token at a place, with the gap to the best just within and just out of twice
    the error; the answer goes on as transformers does after it."""
    place = 3
    inputs = model.inputs([0])
    logits = model.logits(inputs, answers[0])[place]
    values, tokens = logits.topk(2)
    gap = float(values[0] - values[1])
    start = torch.tensor([[*inputs["input_ids"][0].tolist(), *answers[0][:place], int(tokens[1])]])
    tail = model.generate(
        {
            "input_ids": start,
            "attention_mask": torch.ones_like(start),
            "pixel_values": inputs["pixel_values"],
        },
        NEW_TOKENS - place - 1,
    )
    other = {0: tail[0, inputs["input_ids"].shape[1] :].tolist()}
    assert other[0] != answers[0] and len(other[0]) == NEW_TOKENS
    for share, kind in ((0.51, "near_ties"), (0.49, "different")):
        monkeypatch.setattr(judge, "logit_error", share * gap)
        assert peers.compare(answers, other, judge)[kind] == 1


def test_rounding_is_small_and_there(judge):
    assert 0 < judge.logit_error < 1e-3


def test_a_missing_engine_is_said_to_be(setting, answers, monkeypatch):
    def none(library: str) -> str:
        raise peers.Missing(f"{library} is not installed")

    monkeypatch.setattr(peers, "version", none)
    plan = comparison.Plan({1: [0, 1]}, NEW_TOKENS, answers)
    found = comparison.measure_peers(list(comparison.NAMES), setting, plan)
    assert [(peer["name"], peer["missing"].split()[0]) for peer in found] == [
        ("vLLM", "vllm"),
        ("transformers eager", "transformers"),
        ("transformers static cache + compile", "transformers"),
    ]
    assert not any(comparison.agree(peer) for peer in found)


def test_no_judge_is_loaded_where_there_is_nothing_to_judge(setting, answers, monkeypatch):
    monkeypatch.setattr(peers, "Transformers", None)
    plan = comparison.Plan({1: [0, 1]}, NEW_TOKENS, answers)
    (vllm,) = comparison.measure_peers(["vllm"], setting, plan)  # which takes no CPU
    assert vllm["missing"] and "outputs" not in vllm


def test_a_peer_that_fails_is_said_to(setting, answers, monkeypatch):
    def broken(*ignored: object, **more: object) -> None:
        raise RuntimeError("out of luck\nand more lines")

    monkeypatch.setattr(peers.Transformers, "generate", broken)
    monkeypatch.setattr(peers.Judge, "_measure", lambda *ignored: 0.0)
    plan = comparison.Plan({1: [0, 1]}, NEW_TOKENS, answers)
    (found,) = comparison.measure_peers(["eager"], setting, plan)
    assert found["missing"] == "failed with RuntimeError: out of luck"
    assert "runs" not in found


def test_a_peer_that_fails_at_a_batch_keeps_what_it_did_before(setting, answers, monkeypatch):
    original = peers.Transformers.eager

    def small(self, numbers, new_tokens, **options):
        if len(numbers) > 1:
            raise MemoryError("no room")
        return original(self, numbers, new_tokens, **options)

    monkeypatch.setattr(peers.Transformers, "eager", small)
    plan = comparison.Plan({1: [0, 1], 2: [0, 1], 3: [0, 1, 2]}, NEW_TOKENS, answers)
    (found,) = comparison.measure_peers(["eager"], setting, plan)
    assert found["missing"] is None and comparison.agree(found)
    assert [run["max_concurrency"] for run in found["runs"]] == [1]
    assert found["stopped"] == "2 at once failed with MemoryError: no room"


def test_speed_is_not_compared_where_answers_differ(setting, answers):
    wrong = {number: [(token + 1) % 768 for token in answer] for number, answer in answers.items()}
    plan = comparison.Plan({1: [0, 1]}, NEW_TOKENS, wrong)
    (found,) = comparison.measure_peers(["eager"], setting, plan)
    assert found["outputs"]["different"] == 2 and not comparison.agree(found)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")
def test_the_compiled_peer_answers_the_same(setting, answers):
    plan = comparison.Plan({1: [0, 1], 2: [0, 1]}, NEW_TOKENS, answers)
    (found,) = comparison.measure_peers(["compiled"], setting, plan)
    assert found["missing"] is None
    assert [run["max_concurrency"] for run in found["runs"]] == [1]
    assert found["outputs"]["compared"] == 2 and comparison.agree(found)


def test_vllm_is_asked_for_the_same(setting, monkeypatch):
    """Its offline API as of 0.26, by a stand-in: it is on none of the machines that run this."""
    made: dict[str, object] = {}
    asked = []

    class LLM:
        def __init__(self, **options: object) -> None:
            made.update(options)

        def generate(self, prompts: list, sampling: SimpleNamespace, use_tqdm: bool) -> list:
            asked.append((prompts, sampling.max_tokens))
            assert (sampling.temperature, sampling.ignore_eos, use_tqdm) == (0, True, False)
            answer = SimpleNamespace(token_ids=tuple(range(sampling.max_tokens)))
            return [SimpleNamespace(prompt_token_ids=[1] * 9, outputs=[answer]) for _ in prompts]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=lambda **given: SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(peers, "version", lambda library: "0.26.0")
    with pytest.raises(peers.Missing, match="GPUs"):
        peers.Vllm(setting)
    peer = peers.Vllm(dataclasses.replace(setting, device="cuda:0"))
    assert made["enable_prefix_caching"] is False
    assert (made["model"], made["dtype"], made["max_model_len"]) == (
        setting.source,
        setting.dtype,
        setting.context,
    )
    records = peer.run([3, 4], NEW_TOKENS)
    assert [tokens for _, tokens in asked] == [
        1,
        NEW_TOKENS,
    ]  # the first token's time is the first's
    prompts = asked[-1][0]
    assert [prompt["prompt"] for prompt in prompts] == [setting.prompt] * 2
    assert prompts[1]["multi_modal_data"]["image"] == setting.picture(4)
    for number, record in zip([3, 4], records, strict=True):
        assert record.number == number and record.token_ids == list(range(NEW_TOKENS))
        assert (record.prompt_tokens, record.output_tokens) == (9, NEW_TOKENS)
        assert record.submitted <= record.arrivals[0] <= record.ended
    peer.close()
