"""A tiny model with what it must answer, and a runtime of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.runtime import World, make_world, running

from llava_engine.runtime.runtime import DeviceRuntime


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("model"))


@pytest.fixture
def runtime(world: World) -> Iterator[DeviceRuntime]:
    yield from running(world, blocks=400)
