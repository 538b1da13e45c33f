"""The tokenizers that the tests of this folder share: three made here, and the demo's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tokenizers import make_byte_level_tokenizer, make_tokenizer

from llava_engine.demo import model_dir
from llava_engine.text.tokenizer import Tokenizer

MADE = ("prepend", "metaspace", "byte-level")
LAYOUTS = (*MADE, "llava-tiny")


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer directories by layout, with the config.json that makes them LLaVA's."""
    root = tmp_path_factory.mktemp("tokenizers")
    make_tokenizer(root / "prepend")
    make_tokenizer(root / "metaspace", metaspace=True)
    make_byte_level_tokenizer(root / "byte-level")
    for layout in MADE:
        (root / layout / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return {**{layout: root / layout for layout in MADE}, "llava-tiny": model_dir()}


@pytest.fixture(scope="session", params=LAYOUTS)
def directory(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Path:
    return directories[request.param]


@pytest.fixture(scope="session")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)
