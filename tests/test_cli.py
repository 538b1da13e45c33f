"""The command line: what it prints where, its exit codes, and the real thing in a process."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys

import pytest

import llava_engine
from llava_engine import cli, demo, errors
from llava_engine.cli.where import sentence
from llava_engine.registry import LLAVA_15_TEMPLATE
from llava_engine.stream import Channel, ChunkStream
from llava_engine.types import FinishReason, SamplingParams

COMMAND = [sys.executable, "-m", "llava_engine.cli"]


class Words:
    """A detokenizer for answers that are lists of words."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def push(self, token_id: int) -> str:
        return self._words[token_id]

    def flush(self) -> str:
        return ""


class FakeModel:
    """Answers with given words, or fails, and remembers what it was asked."""

    registry_key = "a model that the process's pool has not"

    def __init__(self, words: list[str], error: Exception | None = None) -> None:
        self.words, self.error = words, error
        self.calls: list[tuple[str, object, str, dict[str, object]]] = []

    def describe_image(self, image, query, *, timeout=None, **sampling):
        return self._answer("image", image, query, timeout=timeout, **sampling)

    def describe_url(self, url, query, *, timeout=None, **sampling):
        return self._answer("url", url, query, timeout=timeout, **sampling)

    def _answer(self, kind, picture, query, *, timeout, **sampling):
        SamplingParams(**sampling)
        self.calls.append((kind, picture, query, {"timeout": timeout, **sampling}))
        channel = Channel()
        channel.bind(Words(self.words), 12, 4)
        for index in range(len(self.words)):
            channel.put(index)
        if self.error is None:
            channel.finish(FinishReason.STOP)
        elif isinstance(self.error, errors.LlavaError):
            channel.fail(self.error)
        else:
            raise self.error
        return ChunkStream(channel)


@pytest.fixture
def answer(monkeypatch):
    """Put a FakeModel behind `llava_engine.get`; returns it and what `get` was called with."""

    def answer(*words: str, error: Exception | None = None, get_error: Exception | None = None):
        model = FakeModel(list(words), error)

        def get(name, config=None):
            model.got = (name, config)
            if get_error is not None:
                raise get_error
            return model

        monkeypatch.setitem(vars(llava_engine), "get", get)
        return model

    return answer


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


@pytest.mark.parametrize("path", ["http", "https:/x.png", "file:///x.png", "a http://b"])
def test_what_only_looks_like_a_url_is_a_file(answer, path):
    model = answer("x")
    assert cli.main(["describe", path]) == 0
    assert model.calls[0][:2] == ("image", path)


def test_defaults(answer):
    model = answer("x")
    assert cli.main(["describe"]) == 0
    expected = ("image", str(demo.picture_path()), "Describe the picture.", {"timeout": None})
    assert model.calls == [expected]
    assert model.got == ("llava-tiny", llava_engine.EngineConfig.from_env())


def test_options_reach_the_model(answer):
    model = answer("x")
    options = "--max-new-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 3 --seed 7 --timeout 2.5"
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


def caused(error: errors.LlavaError, cause: Exception) -> errors.LlavaError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ImageDecodeError("no picture"), 3),
        (errors.BlockedAddress("not allowed"), 3),
        (errors.FetchTimeout("slow"), 3),
        (errors.PromptTooLong("too long"), 3),
        (errors.InvalidQuery("NUL"), 3),
        (errors.UnknownModel("no such model"), 4),
        (errors.WeightsError("no weights"), 4),
        (caused(errors.SpawnFailed("spawn"), errors.WeightsError("torn file")), 4),
        (caused(errors.SpawnFailed("spawn"), errors.MemoryExhausted("full")), 5),
        (errors.MemoryExhausted("no room"), 5),
        (errors.PoolOverloaded("busy"), 5),
        (errors.RequestTimeout("late"), 5),
    ],
)
def test_exit_codes_of_failures(answer, capsys, error, code):
    for place in ("error", "get_error"):
        answer("half an", " answer", **{place: error})
        assert cli.main(["describe", "a.png"]) == code
        out, err = capsys.readouterr()
        cause = error.__cause__ or error
        assert err == f"llava-engine: {cause}\n"
        assert out == ("half an answer\n" if place == "error" else "")


def test_a_failure_prints_no_half_json(answer, capsys):
    answer("half", error=errors.WorkerDied("gone"))
    assert cli.main(["describe", "a.png", "--json"]) == 5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "-1"],
        ["--top-p", "0"],
        ["--max-new-tokens", "0"],
        ["--device", "tpu"],
        ["--dtype", "float8"],
    ],
)
def test_settings_out_of_range_are_bad_input(answer, capsys, options):
    answer("x")
    assert cli.main(["describe", "a.png", *options]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert options[0].strip("-").replace("-", "_") in err
    assert "Traceback" not in err


def test_a_misspelt_variable_is_bad_input(answer, capsys, monkeypatch):
    monkeypatch.setenv("LLAVA_ENGINE_DEVISE", "cpu")
    answer("x")
    assert cli.main(["describe", "a.png"]) == 3
    assert "LLAVA_ENGINE_DEVISE" in capsys.readouterr().err


def test_internal_errors_show_where(answer, capsys):
    failed = caused(errors.RequestFailed("it broke"), ZeroDivisionError("deep inside"))
    for error in (RuntimeError("a bug"), failed):
        answer("x", error=error)
        assert cli.main(["describe", "a.png"]) == 70
        assert "Traceback" in capsys.readouterr().err


def test_interrupted(answer, capsys):
    answer(get_error=KeyboardInterrupt())
    assert cli.main(["describe", "a.png"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["describe", "a", "b", "c"], ["nothing"], ["describe", "--seed", "x"], ["models", "x"]],
)
def test_a_wrong_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_help_documents_every_exit_code(capsys):
    for arguments in (["--help"], ["describe", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        text = capsys.readouterr().out
        codes = text.partition("exit codes:")[2].split("\n")
        shown = [int(line.split()[0]) for line in codes if line.strip()]
        names = (cli.OK, cli.USAGE, cli.BAD_INPUT, cli.MODEL, cli.POOL)
        assert shown == [*names, cli.INTERNAL, cli.INTERRUPTED]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_do_not_reach_a_terminal(answer, monkeypatch):
    for screen, shown in ((Terminal(), "a]0;title\n\tb\n"), (io.StringIO(), None)):
        answer("a\x1b]0;title\x07", "\n\tb\x9b")
        monkeypatch.setattr(sys, "stdout", screen)
        assert cli.main(["describe", "a.png"]) == 0
        assert screen.getvalue() == (shown or "a\x1b]0;title\x07\n\tb\x9b\n")


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, **options
    )
    if done.returncode != 70:
        assert "Traceback" not in done.stderr
    return done


def test_models_needs_no_torch(tmp_path):
    code = (
        "import sys; from llava_engine.cli import main; code = main(['models', '--json']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    listed = {model["name"]: model for model in json.loads(done.stdout)}
    assert {info.registry_key for info in llava_engine.models()} >= set(listed)
    assert not listed["llava-1.5-7b"]["here"]
    assert listed["llava-1.5-7b"]["disk_mb"] is None
    assert listed["llava-1.5-7b"]["device_mb"] == 20_480
    sizes = [listed["llava-1.5-7b"]["quantised"][name]["device_mb"] for name in ("int8", "nf4")]
    assert 20_480 > sizes[0] > sizes[1] > 3_900
    weights = demo.model_dir() / "model.safetensors"
    assert listed["llava-tiny"]["here"]
    assert 0 <= listed["llava-tiny"]["disk_mb"] * 2**20 - weights.stat().st_size < 2**20


def test_models_as_a_table(capsys):
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["NAME", "HERE"]
    assert {"INT8", "FP8", "NF4"} <= set(lines[0].split())
    assert any(line.split()[:2] == ["llava-tiny", "yes"] for line in lines)


def test_doctor(capsys):
    import psutil
    import torch

    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert found["cuda_available"] == torch.cuda.is_available()
    assert len(found["gpus"]) >= torch.cuda.device_count()
    assert found["memory"]["total_mb"] <= psutil.virtual_memory().total >> 20
    extras = {"bitsandbytes", "flash-attn", "nvidia-nvimgcodec-cu13", "prometheus-client"}
    assert set(found["packages"]) == extras
    assert found["packages"]["prometheus-client"]
    assert found["formats"] == ["fp8", "int8", "nf4"]
    whole = "16 bits" if found["gpus"] and found["kernels"] else "32 bits"
    assert found["workers"]["llava-tiny"] == {whole: 2, "int8": 2, "fp8": 2, "nf4": 2}
    sizes = found["first_worker_mb"]["llava-1.5-7b"]
    assert sizes[whole] > 2 * sizes["nf4"] > 2 * 4_300
    if not found["gpus"]:
        assert any("GPU" in line for line in found["advice"])
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for line in found["advice"]:
        assert line in text
    row = next(line for line in text.splitlines() if line.startswith("workers of llava-1.5-7b"))
    assert f" in nf4 ({sizes['nf4']} MiB)" in row


def test_doctor_without_bitsandbytes(capsys, monkeypatch):
    import importlib.metadata

    def version(name):
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["formats"] == ["fp8"]
    assert set(found["workers"]["llava-1.5-7b"]) - {"16 bits", "32 bits"} == {"fp8"}


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


def test_a_format_that_there_is_none_of(capsys):
    assert cli.main(["describe", "--quantization", "int3"]) == cli.BAD_INPUT
    assert "quantization" in capsys.readouterr().err


def test_doctor_knows_the_hubs_settings(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = json.loads(run("doctor", "--json", env=environment).stdout)
    assert found["hub"]["offline"]
    assert found["hub"]["cache"] == str(tmp_path / "hub")
    assert any("HF_HUB_OFFLINE" in line for line in found["advice"])


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


MISTAKES = [
    (["describe", "nowhere.png"], 3),
    (["describe", __file__], 3),
    (["describe", "http://127.0.0.1:9/x.png"], 3),
    (["describe", "--model", "llava-tinny"], 4),
    (["describe", "--model", "."], 4),
    (["describe", str(demo.picture_path()), "a\udcffb"], 3),  # an argument that is no UTF-8
    (["describe", str(demo.picture_path()), "x " * 20_000], 3),
    (["describe", str(demo.picture_path()), "x", "--timeout", "-1"], 3),
]
SEVERAL = """
import contextlib, io, json, sys
from llava_engine.cli import main
for arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def test_real_mistakes(tmp_path):
    """All in one process, which also shows that one mistake does not spoil the next request."""
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL],
        input=json.dumps([arguments for arguments, _ in MISTAKES]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, expected), (code, out, err) in zip(MISTAKES, results, strict=True):
        assert (code, out) == (expected, ""), (arguments, err)
        assert err.startswith("llava-engine: ") and err.count("\n") == 1, err
    assert done.stderr == ""


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        f"{' '.join(COMMAND)} models --json | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "0\n"
    assert done.stderr == ""


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
