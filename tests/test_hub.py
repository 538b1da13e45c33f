"""Checkpoints from the hub: huggingface_hub for real, against a server on loopback.

Its settings are read when it is imported, so every call runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.hub_server import SHA, Hub

from llava_engine import errors
from llava_engine.hub import cached, checkpoint_mb, resolve, saved_quantised
from llava_engine.registry import ModelInfo

REPO = "someone/llava-small"
FILES = {
    "config.json": b'{"model_type": "llava"}',
    "tokenizer.json": b"{}" * 50,
    "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
    "model-00002-of-00002.safetensors": b"weights" * 100,
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"raise SystemExit('ran')",
    "chat_template.json": b"{}",
}
WANTED = {name for name in FILES if name.endswith((".json", ".safetensors"))} - {
    "chat_template.json"
}
CALL = """
import json, sys
from llava_engine import LlavaError
from llava_engine.hub import cached, resolve
from llava_engine.registry import ModelInfo
repo, revision = sys.argv[1:]
info = ModelInfo(registry_key="small", repo_id=repo, revision=revision, est_memory_allocation_mb=1)
before = cached(info)
try:
    result = {"path": str(resolve(info))}
except LlavaError as error:
    cause = error.__cause__
    result = {"error": type(error).__name__, "text": str(error), "retryable": error.retryable}
    result["cause"] = cause and type(cause).__name__
result["cached"] = before and str(before)
print(json.dumps(result))
"""


@pytest.fixture
def hub():
    with Hub(files={REPO: dict(FILES)}) as server:
        yield server


@pytest.fixture
def call(hub, tmp_path):
    """`resolve` in a new process with a cache of its own, as what came of it."""

    def call(repo: str = REPO, revision: str = "main", **settings: str) -> dict[str, object]:
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **settings,
        }
        done = subprocess.run(
            [sys.executable, "-c", CALL, repo, revision],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return {**json.loads(done.stdout), "stderr": done.stderr}

    return call


def test_a_snapshot_is_downloaded_and_found_again_without_the_server(hub, call, tmp_path):
    first = call()
    directory = Path(first["path"])
    assert first["cached"] is None
    assert directory.is_relative_to(tmp_path / "home")
    assert directory.name == SHA
    assert {path.name for path in directory.iterdir()} == WANTED
    for name in WANTED:
        assert (directory / name).read_bytes() == FILES[name]
    assert checkpoint_mb(directory) == 1
    assert "Fetching" in first["stderr"]

    hub.requests.clear()
    again = call()
    assert again["path"] == again["cached"] == str(directory)
    assert not [line for line in hub.requests if "/resolve/" in line]

    hub.close()
    down = call()
    assert down["path"] == down["cached"] == str(directory)
    offline = call(HF_HUB_OFFLINE="1")
    assert offline["path"] == str(directory)


def test_an_interrupted_download_is_resumed(hub, call):
    name = "model-00001-of-00002.safetensors"
    hub.interrupted.add(name)
    directory = Path(call()["path"])
    assert (directory / name).read_bytes() == FILES[name]
    assert len([line for line in hub.requests if line == f"GET /{REPO}/resolve/{SHA}/{name}"]) == 2


def test_a_commit_is_a_revision_too(call):
    assert Path(call(revision=SHA)["path"]).name == SHA


@pytest.mark.parametrize(
    ("repo", "revision", "error", "words"),
    [
        ("nobody/nothing", "main", "UnknownModel", "nobody/nothing"),
        (REPO, "v9", "UnknownModel", "v9"),
        ("a/b/c", "main", "UnknownModel", "a/b/c"),
        ("..", "main", "UnknownModel", ".."),
    ],
)
def test_what_the_hub_does_not_have(call, repo, revision, error, words):
    result = call(repo, revision)
    assert result["error"] == error
    assert words in result["text"]
    assert result["cause"]
    assert not result["retryable"]


def test_a_gated_model(hub, call):
    hub.gated.add(REPO)
    result = call()
    assert (result["error"], result["cause"]) == ("ModelError", "GatedRepoError")
    assert "HF_TOKEN" in result["text"]


def test_a_truncated_file_is_noticed_and_not_kept(hub, call):
    hub.truncated.add("model-00001-of-00002.safetensors")
    result = call()
    assert (result["error"], result["retryable"]) == ("ModelError", True)
    assert "incomplete" in result["text"]
    assert str(hub.url) not in result["text"]
    hub.truncated.clear()
    assert "path" in call()


def test_a_file_that_is_listed_and_not_there(hub, call):
    hub.failing.add("tokenizer.json")
    result = call()
    assert result["error"] == "ModelError"
    assert result["cause"]


def test_offline_with_an_empty_cache(call, hub):
    result = call(HF_HUB_OFFLINE="1")
    assert result["error"] == "ModelError"
    assert "HF_HUB_OFFLINE" in result["text"]
    assert not result["retryable"]
    assert hub.requests == []


def test_no_network_and_an_empty_cache(call, hub):
    hub.close()
    result = call()
    assert (result["error"], result["retryable"]) == ("ModelError", True)
    assert "cannot be reached" in result["text"]


def test_no_network_and_half_a_snapshot(call, hub):
    hub.truncated.add("model-00001-of-00002.safetensors")
    call()
    hub.close()
    result = call()
    assert result["error"] == "ModelError"
    assert "not wholly" in result["text"]
    assert result["cached"] is None


def test_a_cache_that_cannot_be_written(call, tmp_path):
    (tmp_path / "home").write_text("a file where the cache should be")
    result = call()
    assert result["error"] == "ModelError"
    assert "stored" in result["text"]
    assert str(tmp_path) not in result["text"]


@pytest.mark.parametrize("missing", ["config.json", ".safetensors"])
def test_a_repository_without_a_checkpoint(hub, call, missing):
    hub.files[REPO] = {k: v for k, v in FILES.items() if not k.endswith(missing)}
    result = call()
    assert result["error"] == "WeightsError"
    assert missing.strip(".") in result["text"]


def local(directory: Path) -> ModelInfo:
    return ModelInfo(registry_key="mine", directory=directory, est_memory_allocation_mb=1)


def test_a_directory_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (3 * 2**20 + 1))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\0" * 2**21)
    assert resolve(local(tmp_path)) == tmp_path
    assert cached(local(tmp_path)) == tmp_path
    assert checkpoint_mb(tmp_path) == 4


@pytest.mark.parametrize("present", [None, [], ["config.json"], ["model.safetensors"]])
def test_a_directory_that_is_no_checkpoint(tmp_path, present):
    directory = tmp_path / "checkpoint"
    if present is not None:
        directory.mkdir()
        for name in present:
            (directory / name).write_text("{}")
    with pytest.raises(errors.WeightsError, match="mine"):
        resolve(local(directory))
    assert checkpoint_mb(directory) == (1 if present == ["model.safetensors"] else 0)


@pytest.mark.parametrize(
    ("text", "quantised"),
    [
        ('{"quantization_config": {"load_in_8bit": true}}', True),
        ('{"quantization_config": null}', False),
        ("{}", False),
        ("[1]", False),
        ("{", False),
        ("[" * 100_000, False),
        (None, False),
    ],
    ids=["quantised", "null", "whole", "list", "broken", "deep", "absent"],
)
def test_whether_a_checkpoint_was_saved_quantised(text, quantised, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert saved_quantised(tmp_path) is quantised
