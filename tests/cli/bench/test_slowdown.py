"""A planted slowdown shows in the bar of the stage that it was planted in, and nowhere else."""

from __future__ import annotations

import time
from html.parser import HTMLParser

import pytest

from llava_engine import cli
from llava_engine.cli.bench import measure
from llava_engine.cli.bench.report import report
from llava_engine.image.picture_cache import PictureCache
from llava_engine.runtime.decoder import Decoder
from llava_engine.runtime.model_runner import ModelRunner

TOKENS = 9
SECONDS = 0.8  # of sleep in all, far above what llava-tiny takes for anything
PLANTED = {
    "decode": (Decoder, "_step", SECONDS / (TOKENS - 1)),
    "prefill": (ModelRunner, "run", SECONDS),
    "picture": (PictureCache, "prepare", SECONDS),
}


class Bars(HTMLParser):
    """Widths of the rectangles of a page's plots by row and span."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.widths: dict[tuple[str | None, str], float] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "rect":
            key = (named.get("data-row"), named["data-span"])
            self.widths[key] = float(named["width"])


@pytest.mark.parametrize("stage", PLANTED)
def test_a_sleep_is_in_its_own_bar(stage, monkeypatch):
    owner, name, seconds = PLANTED[stage]
    original = getattr(owner, name)

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)
    options = f"bench --device cpu --requests 3 --new-tokens {TOKENS}".split()
    record = measure(cli._parser().parse_args(options))
    (run,) = record["runs"]
    stages = dict(run["stages_ms"])
    assert stages.pop(stage) >= 1e3 * SECONDS
    assert sum(stages.values()) < 500 * SECONDS, stages
    slept = 1e3 * SECONDS
    if stage == "decode":
        assert run["median_tpot_ms"] >= slept / (TOKENS - 1) and run["median_ttft_ms"] < slept / 2
    else:
        assert run["median_ttft_ms"] >= slept and run["median_tpot_ms"] < slept / (TOKENS - 1)
    # And so it is seen: of the bars of all requests' mean, and of the one request's time line.
    widths = Bars(report(record)).widths
    for row in ("llava-engine, 1 at once", None):
        bars = {span: width for (of, span), width in widths.items() if of == row}
        longest = bars.pop(stage)
        assert longest > 2 * sum(bars.values()), bars
