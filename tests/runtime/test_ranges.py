"""Ranges as torch's profiler sees them, where they are asked for and where they are not."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llava_engine.runtime.ranges import ranges

CPU = torch.device("cpu")


@pytest.mark.parametrize("on", [False, True])
def test_only_what_is_asked_for_is_recorded(on):
    opened = ranges(on, CPU)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with opened("a stretch of work"):
            torch.ones(3).sum()
        with pytest.raises(ZeroDivisionError), opened("one that fails"):
            _ = 1 / 0
    names = {event.name for event in profiler.events()}
    assert "aten::sum" in names
    assert ("a stretch of work" in names) == ("one that fails" in names) == on


def test_nothing_is_made_where_they_are_off():
    """So that a step costs nothing: the same empty block, whatever the name."""
    opened = ranges(False, torch.device("cuda"))
    assert opened("one") is opened("other")
    before = sys.getallocatedblocks()
    for _ in range(10_000):
        with opened("a stretch of work"):
            pass
    assert sys.getallocatedblocks() - before < 100


def test_on_a_gpu_they_are_nvtx_ranges_too(monkeypatch):
    said: list[str] = []
    nvtx = SimpleNamespace(range_push=said.append, range_pop=lambda: said.append("end"))
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    opened = ranges(True, torch.device("cuda"))
    with opened("outer"):
        with pytest.raises(ZeroDivisionError), opened("inner"):
            _ = 1 / 0
        said.append("work")
    assert said == ["outer", "inner", "end", "work", "end"]
