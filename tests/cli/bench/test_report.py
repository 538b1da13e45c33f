"""The report in headless Chromium: it needs nothing else, nothing runs out of it, and it prints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_engine.cli.bench.plots import number
from llava_engine.cli.bench.report import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (.ci/run gets one)")

PROBE = """
<script>
function box(e) { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; }
const found = {width: innerWidth, needs: document.documentElement.scrollWidth, svgs: []};
for (const svg of document.querySelectorAll("svg")) {
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, ...box(t)]);
  const shapes = [...svg.querySelectorAll("rect, circle, polyline")].map(box);
  found.svgs.push({label: svg.getAttribute("aria-label"), box: box(svg), texts, shapes});
}
document.body.innerHTML = "<pre>" + JSON.stringify(found).replaceAll("<", "&lt;") + "</pre>";
</script>
"""


def chromium(page: Path, *options: str) -> str:
    """Chromium's stdout with a page open and no network."""
    line = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    line += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run(
        [*line, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def probe(page: Path, directory: Path, width: int) -> dict[str, Any]:
    """What a browser window of that width makes of the page."""
    probed = directory / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    dom = chromium(probed, f"--window-size={width},900", "--dump-dom")
    text = re.search(r"<pre>(.*)</pre>", dom, re.DOTALL)
    assert text is not None
    return json.loads(text[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_is_asked_of_anybody_else(ran):
    text = ran.report.read_text()
    elements = Elements()
    elements.feed(text)
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use"}
    attributes = {name for _, attrs in elements.found for name in attrs}
    assert not attributes & {"src", "href", "srcset", "data", "onload", "xlink:href"}
    assert "url(" not in text and "@import" not in text and "@font-face" not in text
    assert "://" not in text


def test_what_was_measured_is_on_the_page(ran):
    text = ran.report.read_text()
    assert "transformers eager" in text and ran.record["versions"]["torch"] in text
    cases = json.loads((Path(__file__).parents[3] / "bench/results/kernels.json").read_bytes())
    elements = Elements()
    elements.feed(text)
    rows = {attrs.get("data-row") for tag, attrs in elements.found if tag == "rect"}
    assert {row["case"] for row in cases["rows"]} <= rows
    assert set(ran.record["cold_start_s"]) <= rows


def test_a_kernels_bar_is_its_share_of_the_nearer_ceiling(ran):
    """A made-up run: a bar of 100 % is as long as the mark is far from the bars' beginning."""
    rows = [
        {"case": "read", "gb_per_s": 1500.0, "tflop_per_s": 10.0, "share_of_copy_ceiling": 0.5},
        {"case": "multiply", "gb_per_s": 300.0, "tflop_per_s": 600.0, "share_of_copy_ceiling": 0.1},
        {"case": "all", "gb_per_s": 3000.0, "tflop_per_s": 0.0, "share_of_copy_ceiling": 1.0},
    ]
    rows = [{**row, "us": 100.0} for row in rows]
    ops = {"device": "a GPU", "commit": "c", "copy_gb_per_s": 3000.0, "rows": rows}
    for multiplied, expected in ((800.0, 0.75), (None, 0.1)):
        elements = Elements()
        elements.feed(report({**ran.record, "runs": []}, {**ops, "matmul_tflop_per_s": multiplied}))
        widths = {a["data-row"]: float(a["width"] or 0) for t, a in elements.found if t == "rect"
                  and "data-row" in a}  # fmt: skip
        begin = next(float(a["x"] or 0) for _, a in elements.found if a.get("data-row") == "all")
        mark = next(float(a["x1"] or 0) for _, a in elements.found if a.get("class") == "mark")
        assert widths["all"] == pytest.approx(mark - begin, abs=0.2)
        assert widths["read"] == pytest.approx(0.5 * widths["all"], abs=0.1)
        assert widths["multiply"] == pytest.approx(expected * widths["all"], abs=0.1)


def test_pictures_that_come_again_are_said_to(ran):
    assert "that no other has" in ran.report.read_text()
    work = {"new_tokens": 4, "distinct_pictures": 3}
    page = report({**ran.record, "workload": work})
    assert "one of 3 pictures in turn" in page and "that no other has" not in page


def test_strangers_names_are_text(ran):
    bad = "<script>alert(1)</script>"
    record = {**ran.record, "model": bad, "command": bad}
    record["runs"] = [{**run, "backend": bad} for run in record["runs"]]
    record["peers"] = [{"name": bad, "missing": bad}]
    assert "<script" not in report(record)


def test_a_run_that_failed_and_one_without_runs_have_a_page(ran):
    from llava_engine.cli.bench.loops import Record
    from llava_engine.cli.bench.metrics import summarize

    failed = {
        "backend": "llava_engine",
        "mode": "closed loop",
        "max_concurrency": 1,
        **summarize([Record(0, 0.0, 1.0, error="WorkerDied: <gone>")], 1.0, {"ttft": 1.0}),
    }
    assert "WorkerDied" not in report({**ran.record, "runs": []})
    for runs in ([failed], [failed, *ran.record["runs"]]):
        page = report({**ran.record, "runs": runs})
        assert "1 of 1 requests failed: WorkerDied: &lt;gone&gt;" in page


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [1200, 500])
def test_it_is_laid_out_without_a_fault(ran, tmp_path, width):
    seen = probe(ran.report, tmp_path, width)
    assert seen["width"] == width
    assert seen["needs"] <= width  # tables and plots scroll by themselves, the page does not
    assert len(seen["svgs"]) >= 8
    for svg in seen["svgs"]:
        left, top, right, bottom = svg["box"]
        assert right - left > 250 and bottom - top > 60
        boxes = [text[1:] for text in svg["texts"]] + svg["shapes"]
        for x1, y1, x2, y2 in boxes:
            assert x1 >= left - 1 and x2 <= right + 1, svg["label"]
            assert y1 >= top - 1 and y2 <= bottom + 1, svg["label"]
        if "tokens a second" in svg["label"]:
            continue  # its points have names, and points may coincide
        for index, one in enumerate(svg["texts"]):
            for other in svg["texts"][index + 1 :]:
                across = min(one[3], other[3]) - max(one[1], other[1])
                down = min(one[4], other[4]) - max(one[2], other[2])
                assert across <= 1 or down <= 3, (one[0], other[0], svg["label"])


@NEEDS_CHROMIUM
@pytest.mark.parametrize("dark", [False, True])
def test_a_picture_of_it_is_light_or_dark(ran, tmp_path, dark):
    picture = tmp_path / "page.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(ran.report, "--window-size=1000,1600", f"--screenshot={picture}", *scheme)
    image = Image.open(picture).convert("RGB")
    corner = image.getpixel((2, 2))
    assert max(corner) < 40 if dark else corner == (255, 255, 255)
    # The first series' colour of that scheme is there, so plots were drawn.
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert ((110, 168, 255) if dark else (31, 111, 235)) in colours


@NEEDS_CHROMIUM
def test_it_prints(ran, tmp_path):
    paper = tmp_path / "page.pdf"
    chromium(ran.report, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    data = paper.read_bytes()
    assert data.startswith(b"%PDF-")
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert 3 <= pages <= 12


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (2e-13, "0"), (3e-6, "0.000003"), (0.00819, "0.00819"), (999.6, "999.6")],
)
def test_numbers_are_for_people(value: float, shown: str) -> None:
    assert number(value) == shown
