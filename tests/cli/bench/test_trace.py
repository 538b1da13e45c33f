"""The Chrome trace: the work of the engine's own thread, under the requests it was done for."""

from __future__ import annotations

import json
import os

import pytest


@pytest.fixture(scope="module")
def events(ran) -> list[dict]:
    return json.loads(ran.trace.read_bytes())["traceEvents"]


def test_requests_have_rows_with_stages_and_chunks(events):
    rows = [e["args"]["name"] for e in events if e.get("name") == "thread_name" and e["ph"] == "M"]
    assert {f"request {number}" for number in range(4)} <= set(rows)
    mine = [e for e in events if e.get("cat") == "request"]
    for number in range(4):
        row = [e for e in mine if e["tid"] == number]
        names = [e["name"] for e in row if e["ph"] == "X"]
        assert names == ["queue", "picture", "prefill", "decode", "delivery"]
        assert sum(e["name"] == "chunk" for e in row) >= 1
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in row if e["ph"] == "X"]
        for (_, end), (begin, _) in zip(spans, spans[1:], strict=False):
            assert begin == pytest.approx(end, abs=1)


def test_the_engines_thread_is_watched_and_on_the_same_clock(events):
    """Matrix products of other threads than the one that started the trace, nearly all of them
    between a request's call and its end."""
    products = [e for e in events if e.get("name") == "aten::mm" and e["ph"] == "X"]
    assert {e["tid"] for e in products} - {os.getpid()}
    requests = [e for e in events if e.get("cat") == "request" and e["ph"] == "X"]
    begin = min(e["ts"] for e in requests)
    end = max(e["ts"] + e["dur"] for e in requests)
    inside = [e for e in products if begin <= e["ts"] and e["ts"] + e["dur"] <= end]
    assert len(products) > 50 and len(inside) >= 0.98 * len(products)


def test_prefill_has_a_range_of_its_own(events):
    ranges = [e for e in events if e.get("name") == "llava_engine: step" and e["ph"] == "X"]
    decodes = [e for e in events if e.get("name") == "llava_engine: decode" and e["ph"] == "X"]
    assert ranges and decodes
    prefills = [e for e in events if e.get("cat") == "request" and e.get("name") == "prefill"]
    # Each request's first token was sampled inside some step of prefill.
    for prefill in prefills:
        end = prefill["ts"] + prefill["dur"]
        assert any(r["ts"] < end and prefill["ts"] < r["ts"] + r["dur"] for r in ranges)
