"""`llava-engine describe`: what it asks the model for, what it prints where, and the real thing."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys

import pytest
from support.command_line import COMMAND, run

import llava_engine
from llava_engine import cli, demo, errors
from llava_engine.cli.where import sentence
from llava_engine.registry import LLAVA_15_TEMPLATE


def test_a_file_is_described(answer, capsys):
    model = answer("A red", " circle", ".")
    assert cli.main(["describe", "here/cat.jpg", "What is it?", "--model", "llava-1.5-7b"]) == 0
    assert model.calls == [("image", "here/cat.jpg", "What is it?", {"timeout": None})]
    assert model.got[0] == "llava-1.5-7b"
    out, err = capsys.readouterr()
    assert (out, err) == ("A red circle.\n", "")


@pytest.mark.parametrize("url", ["http://example.org/a.png", "HTTPS://example.org/a.png"])
def test_a_url_is_fetched(answer, url):
    model = answer("x")
    assert cli.main(["describe", url]) == 0
    assert model.calls[0][:2] == ("url", url)


@pytest.mark.parametrize("path", ["http", "https:/x.png", "./ftp://x.png", "a http://b", "-x"])
def test_what_only_looks_like_a_url_is_a_file(answer, path):
    model = answer("x")
    assert cli.main(["describe", "--", path]) == 0
    assert model.calls[0][:2] == ("image", path)


@pytest.mark.parametrize("url", ["ftp://h/x.png", "FILE:///x.png", "git+ssh://h/x"])
def test_other_urls_are_refused_as_such(answer, capsys, url):
    model = answer("x")
    assert cli.main(["describe", url]) == 3
    assert model.calls == []
    assert "only http and https" in capsys.readouterr().err


def stdin(monkeypatch, data: bytes) -> io.BytesIO:
    file = io.BytesIO(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
    return file


def test_a_dash_is_standard_input(answer, monkeypatch):
    model = answer("x")
    stdin(monkeypatch, b"a\xff picture")
    assert cli.main(["describe", "-"]) == 0
    assert model.calls[0][:2] == ("image", b"a\xff picture")


def test_no_more_of_standard_input_is_read_than_a_picture_may_have(answer, monkeypatch):
    monkeypatch.setenv("LLAVA_ENGINE_MAX_IMAGE_BYTES", "1000")
    model = answer("x")
    file = stdin(monkeypatch, bytes(100_000))
    assert cli.main(["describe", "-"]) == 0
    assert len(model.calls[0][1]) == 1001 and file.tell() < 100_000


def test_no_standard_input(answer, monkeypatch, capsys):
    answer("x")
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["describe", "-"]) == 3
    assert capsys.readouterr().err == "llava-engine: standard input is closed\n"


def test_defaults(answer):
    model = answer("x")
    assert cli.main(["describe"]) == 0
    expected = ("image", str(demo.picture_path()), "Describe the picture.", {"timeout": None})
    assert model.calls == [expected]
    assert model.got == ("llava-tiny", llava_engine.EngineConfig.from_env())


def test_options_reach_the_model(answer):
    model = answer("x")
    options = "--max-new-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 3 --seed 7 --timeout 2.5 "
    options += "--stop star --stop ."
    arguments = [
        "describe",
        "a.png",
        "q",
        *options.split(),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    assert cli.main(arguments) == 0
    assert model.calls[0][3] == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 7,
        "stop": ["star", "."],
        "timeout": 2.5,
    }
    assert (model.got[1].device, model.got[1].dtype) == ("cpu", "float32")


def test_settings_of_the_environment_hold_unless_overridden(answer, monkeypatch):
    monkeypatch.setenv("LLAVA_ENGINE_DTYPE", "bfloat16")
    monkeypatch.setenv("LLAVA_ENGINE_DEVICE", "cuda")
    model = answer("x")
    assert cli.main(["describe", "a.png", "--device", "cpu"]) == 0
    assert (model.got[1].device, model.got[1].dtype) == ("cpu", "bfloat16")


def test_json(answer, capsys):
    answer("A é", "\n", "star")
    assert cli.main(["describe", "a.png", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == "A é\nstar"
    assert result["finish_reason"] == "stop"
    assert result["usage"] == {
        "prompt_tokens": 12,
        "image_tokens": 4,
        "cached_tokens": 0,
        "completion_tokens": 3,
    }
    assert set(result["timings"]) == {"queued", "image", "first_token", "total"}
    assert (result["model"], result["where"]) == ("llava-tiny", None)


def test_a_failure_prints_no_half_json(answer, capsys):
    answer("half", error=errors.WorkerDied("gone"))
    assert cli.main(["describe", "a.png", "--json"]) == 5
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_do_not_reach_a_terminal(answer, monkeypatch):
    for screen, shown in ((Terminal(), "a]0;title\n\tb\n"), (io.StringIO(), None)):
        answer("a\x1b]0;title\x07", "\n\tb\x9b")
        monkeypatch.setattr(sys, "stdout", screen)
        assert cli.main(["describe", "a.png"]) == 0
        assert screen.getvalue() == (shown or "a\x1b]0;title\x07\n\tb\x9b\n")


def test_describe_quantised(capsys):
    whole, quantised = (
        cli.main(["describe", "--json", "--device", "cpu", "--max-new-tokens", "8", *more])
        for more in ([], ["--quantization", "nf4"])
    )
    assert whole == quantised == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 2 and all(answer["text"] for answer in answers)
    assert [answer["where"]["quantization"] for answer in answers] == [None, "nf4"]
    assert "nf4" not in sentence(answers[0]["where"])
    said = sentence({**answers[1]["where"], "memory_mb": 300})
    assert said.startswith("ran on ") and said.endswith(", in nf4 (300 MiB)")
    keys = llava_engine.vision_pool().health()["models"]
    assert any("quantization=nf4" in key for key in keys)


@pytest.fixture(scope="module")
def described() -> dict[str, object]:
    """What the command says of the bundled picture."""
    done = run("describe", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_the_bundled_picture_is_described_for_real(described):
    assert len(described["text"].split()) > 2
    assert described["finish_reason"] == "stop"
    assert 0 < described["usage"]["image_tokens"] < described["usage"]["prompt_tokens"]
    assert described["timings"]["total"] >= described["timings"]["first_token"] > 0


def test_a_picture_is_piped_in_and_the_answer_stopped(described):
    first, second, *_ = described["text"].split()
    with demo.picture_path().open("rb") as picture:
        done = run("describe", "-", "--stop", "no such word", "--stop", second, stdin=picture)
    assert (done.returncode, done.stdout.strip()) == (0, first)


def test_the_real_answer_is_that_of_transformers():
    """The command's text is what transformers generates from the same directory."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(demo.model_dir(), backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(demo.model_dir(), dtype="float32")
    query = "How many shapes are there?"
    inputs = processor(
        images=Image.open(demo.picture_path()),
        text=LLAVA_15_TEMPLATE.replace("{query}", query),
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    ids = ids[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(ids, skip_special_tokens=True)
    done = run("describe", str(demo.picture_path()), query, "--max-new-tokens", "20")
    assert done.stdout == expected + "\n"


def test_on_a_real_terminal(described):
    """Text arrives on a terminal whole, and then where it came from."""
    parent, child = pty.openpty()
    process = subprocess.Popen([*COMMAND, "describe"], stdout=child, stderr=child, stdin=child)
    os.close(child)
    output = b""
    try:
        while chunk := os.read(parent, 4096):
            output += chunk
    except OSError:  # how Linux says that the last writer has gone
        pass
    finally:
        os.close(parent)
    assert process.wait(60) == 0
    shown = output.decode().replace("\r\n", "\n")
    text, _, where = shown.partition("\n")
    assert text == described["text"]
    assert where.count("\n") == 1 and sentence(described["where"]) in where


def test_where_it_ran_is_said(described):
    import torch

    where = described["where"]
    if torch.cuda.is_available():
        return  # tests/gpu has that
    assert where["devices"] == ["cpu"] and where["kernels"] == "torch"
    assert sentence(where).startswith("ran on the CPU")
    done = run("describe", "--device", "cpu", "--max-new-tokens", "1")
    assert done.stderr == "llava-engine: ran on the CPU\n"


@pytest.mark.parametrize(
    ("cuda", "available", "missing", "said"),
    [
        (None, False, None, "ran on the CPU; Some GPU is not used: this torch is built without"),
        ("13.0", False, None, "ran on the CPU; Some GPU is not used: torch cannot use it"),
        ("13.0", True, "no library; build it", "ran on the CPU; Some GPU is not used: no library"),
        ("13.0", True, None, "ran on the CPU"),
    ],
)
def test_a_gpu_that_is_not_used_is_told_with_the_reason(
    cuda, available, missing, said, answer, capsys, monkeypatch
):
    """The one worker of the model is on the CPU, and NVML sees a GPU."""
    import torch

    model = answer("x")
    model.config = llava_engine.EngineConfig()
    health = {"models": {model.registry_key: {"workers": [{"device": "cpu"}]}}}
    pool = type("Pool", (), {"health": lambda self: health})()
    monkeypatch.setitem(vars(llava_engine), "vision_pool", lambda: pool)
    monkeypatch.setattr(cli.where, "gpus", lambda: ([{"name": "Some GPU"}], "driver 1"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(cli.where, "kernels_missing", lambda: missing)
    assert cli.main(["describe", "a.png"]) == 0
    assert capsys.readouterr().err.startswith(f"llava-engine: {said}")
    assert not (missing and "build it" in capsys.readouterr().err)
    model.config = llava_engine.EngineConfig(device="cpu")  # who asked for it needs no reason
    assert cli.main(["describe", "a.png"]) == 0
    assert capsys.readouterr().err == "llava-engine: ran on the CPU\n"
