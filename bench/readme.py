"""Writes README's figures and its plot from what bench/results/ holds, and from nothing else.

python bench/readme.py            rewrites README.md and bench/results/figures.svg
python bench/readme.py --check    fails where they are not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llava_engine.cli.bench.comparison import agree
from llava_engine.cli.bench.plots import Axis, Line, axis, lines

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- figures: written by bench/readme.py from bench/results/ -->"
END = "<!-- end of figures -->"
PLOT = "figures.svg"

Record = dict[str, Any]

# A picture in a page knows nothing of that page's colours: it brings its own, and paper under them.
_STYLE = """<style>
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:#5b6470}
.title{fill:#1c2024}.rule{stroke:#dfe3e8}.line{fill:none;stroke-width:2}
.dashed{stroke-dasharray:5 4}
.c0{--c:#1f6feb}.c1{--c:#c2570c}.c2{--c:#0f7b5f}.c3{--c:#8b3fae}.c4{--c:#b3261e}.c5{--c:#6b6f00}
.line{stroke:var(--c)}.dot{fill:var(--c)}
</style><rect width="100%" height="100%" rx="8" fill="#fff"/>"""


def section(results: Path = RESULTS) -> str:
    """What stands in README between the two marks."""
    decode, cold = _read(results, "decode.json"), _read(results, "cold_start.json")
    serving = _read(results, "serving.json") if (results / "serving.json").exists() else None
    steps = [step for step in _read(results, "decode_step.json")["steps"] if step["rows"] > 1]
    shares = sorted(round(100 * step["of_floor"]) for step in steps)
    rows = [
        *_decode_rows(decode),
        (
            f"a whole step at {steps[0]['rows']} to {steps[-1]['rows']} sequences",
            f"{shares[0]} to {shares[-1]} % of its own floor",
            _source(results, "decode_step.json"),
        ),
        *_format_rows(results),
        *_cold_rows(cold),
    ]
    head = (
        f"LLaVA-1.5-7B's shape with random float16 weights on one {decode['device']}; a picture of "
        "336x336, 25 text tokens, 128 new tokens:"
    )
    body = [
        f"| {what} | {figure} | {source or _source(results, 'decode.json')} |"
        for what, figure, source in rows
    ]
    parts = [BEGIN, head, "\n".join(["| | | measured |", "| --- | --- | --- |", *body])]
    parts.append(f'<img src="bench/results/{PLOT}" width="760" alt="{_plot_text(serving)}">')
    parts.append(_peers(results, serving))
    parts.append(END)
    return "\n\n".join(parts)


def plot(results: Path = RESULTS) -> str:
    """The one plot: throughput against latency where that was measured, else steps by batch."""
    if (results / "serving.json").exists():
        drawn = _throughput(_read(results, "serving.json"))
    else:
        drawn = _steps(_read(results, "decode_step.json"))
    head, _, rest = drawn.partition(">")
    size = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    return f"{size}>{_STYLE}{rest}\n"


def _decode_rows(record: Record) -> list[tuple[str, str, str]]:
    busy = record["beside_two_computing_threads"]
    share = f"{100 * record['of_floor']:.0f} %"
    return [
        (
            "first token from the runtime, pixels in memory (by `describe_image`: table below)",
            f"{record['first_token_ms']:.1f} ms",
            "",
        ),
        (
            "the same, a picture seen before / a new 1920x1080 JPEG",
            f"{record['first_token_seen_ms']:.1f} / {record['first_token_jpeg_ms']:.1f} ms",
            "",
        ),
        (
            "each token after it",
            f"{record['token_ms']:.2f} ms, p99 {record['token_ms_p99']:.2f} ms: {share} of what "
            f"the memory allows ({record['floor_ms']:.2f} ms)",
            "",
        ),
        ("64 requests at once", f"{record['tokens_per_s_64']:.0f} tokens/s", ""),
        (
            "beside two Python threads that compute: the engine",
            f"p99 {busy['token_ms_p99']:.2f} ms a token",
            "",
        ),
        (
            "beside them: a reader in Python, which waits for the GIL",
            f"{busy['reader_token_ms']:.0f} ms a token, first token after "
            f"{busy['first_token_ms']:.0f} ms",
            "",
        ),
    ]


def _format_rows(results: Path) -> list[tuple[str, str, str]]:
    rows = []
    for name in ("fp8", "int8", "nf4"):
        file = f"decode_{name}.json"
        record = _read(results, file)
        rows.append(
            (
                f'`quantization="{name}"`: each token, first token, 64 at once',
                f"{record['token_ms']:.2f} ms, p99 {record['token_ms_p99']:.2f} ms (the memory "
                f"allows {record['floor_ms']:.2f} ms); {record['first_token_ms']:.1f} ms; "
                f"{record['tokens_per_s_64']:.0f} tokens/s; weights of "
                f"{record['weight_bytes'] / 1e9:.1f} GB",
                _source(results, file),
            )
        )
    return rows


def _cold_rows(record: Record) -> list[tuple[str, str, str]]:
    stages = record["medians_s"]
    return [
        (
            f"start of a process to its first token, {record['gigabytes']:.1f} GB of weights in "
            "the page cache",
            f"{record['start_to_first_token_s']:.1f} s, of which {stages['imports']:.1f} s import "
            f"torch and the rest, and {stages['weights']:.1f} s load the weights",
            f"[cold_start.json](bench/results/cold_start.json) at {record['commit'][:7]}",
        )
    ]


def _peers(results: Path, serving: Record | None) -> str:
    """A table of all engines of one run, or that there was none."""
    if serving is None:
        return (
            "Other engines have not been measured in the same run yet, so nothing is claimed "
            "against them."
        )
    loads = [run["max_concurrency"] for run in serving["runs"] if "max_concurrency" in run]
    table = [
        "| | "
        + " | ".join(f"{load} at once: tokens/s, first token, a token" for load in loads)
        + " |",
        "| --- |" + " --- |" * len(loads),
    ]
    table.append(_engine_row("llava-engine", serving["runs"], loads))
    notes = []
    for peer in serving.get("peers", []):
        if peer["missing"]:
            notes.append(f"{peer['name']} was not measured: {peer['missing']}.")
        elif not agree(peer):
            notes.append(f"{peer['name']} gave other answers, so its speed is not compared.")
        else:
            table.append(_engine_row(f"{peer['name']} {peer['version']}", peer["runs"], loads))
            notes += _unsteady(peer)
            if peer["stopped"]:
                notes.append(f"{peer['name']}: {peer['stopped']}.")
    words = (
        "All in one run, on the same checkpoint, distinct pictures and the same prompts, median "
        f"times as the caller sees them ({_source(results, 'serving.json')}). "
        f"{_compared(serving.get('peers', []))} transformers has several requests as one batch."
    )
    if (results / "serving.html").exists():
        notes.append("[The whole report](bench/results/serving.html) is one page.")
    return "\n\n".join(["\n".join(table), " ".join([words, *notes])])


def _compared(peers: list[Record]) -> str:
    """What was found when answers were compared, of all peers together."""
    found = [peer["outputs"] for peer in peers if peer.get("outputs")]
    count, same, ties, different = (
        sum(outputs[key] for outputs in found)
        for key in ("compared", "identical", "near_ties", "different")
    )
    return (
        f"Of {count} answers that were compared with ours {same} are the same to the token, "
        f"{ties} part at a near tie, {different} differ."
    )


def _unsteady(peer: Record) -> list[str]:
    """Of each load at which a peer's requests differed so much that its figures are rough."""
    return [
        f"{peer['name']} is rough at {run['max_concurrency']} at once: its {run['completed']} "
        f"requests took {run['quantiles_ms']['tpot'][0]:.0f} to "
        f"{run['quantiles_ms']['tpot'][-1]:.0f} ms a token."
        for run in peer["runs"]
        if run["std_tpot_ms"] > 0.2 * run["mean_tpot_ms"]
    ]


def _engine_row(name: str, runs: list[Record], loads: list[int]) -> str:
    by_load = {run.get("max_concurrency"): run for run in runs}
    cells = []
    for load in loads:
        run = by_load.get(load)
        cells.append(
            ""
            if run is None
            else f"{run['output_throughput']:.0f}, {run['median_ttft_ms']:.0f} ms, "
            f"{run['median_tpot_ms']:.2f} ms"
        )
    return f"| {name} | " + " | ".join(cells) + " |"


def _throughput(record: Record) -> str:
    groups = {"llava-engine": [run for run in record["runs"] if "max_concurrency" in run]}
    for peer in record.get("peers", []):
        if agree(peer):
            groups[peer["name"]] = peer["runs"]
    series = []
    for colour, (name, runs) in enumerate(groups.items()):
        points = [(run["output_throughput"], run["median_tpot_ms"]) for run in runs]
        labels = [f"{run['max_concurrency']} at once" for run in runs]
        labels[0] = f"{name}, {labels[0]}"
        below = len(runs) > 1  # of a line that rises, below is where it is not
        series.append(Line(name, colour, points, labels, dots=True, below=below))
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    across = axis("output tokens a second, all requests together", xs)
    up = axis("ms a token, median, logarithmic", ys, log=True)
    return lines(series, across, up, width=760, height=320)


def _steps(record: Record) -> str:
    steps = record["steps"]
    rows = [step["rows"] for step in steps]
    kinds = (("step_ms", "a step, measured", False), ("floor_ms", "what must be read", True))
    series = []
    for colour, (key, name, floor) in enumerate(kinds):
        points = [(step["rows"], step[key]) for step in steps]
        labels = [""] * (len(steps) // 2 if floor else len(steps) - 1) + [name]
        series.append(Line(name, colour, points, labels, floor, not floor, floor))
    title = "sequences that decode at once, logarithmic"
    across = Axis(title, min(rows), max(rows) * 1.3, True, rows)
    up = axis("milliseconds a step", [y for line in series for _, y in line.points])
    return lines(series, across, up, width=760, height=300)


def _plot_text(serving: Record | None) -> str:
    if serving is not None:
        return "throughput against the time of a token, by engine"
    return "a decoding step's time by sequences at once, beside the time to read what it must"


def _source(results: Path, name: str) -> str:
    commit = _read(results, name)["commit"]
    return f"[{name}](bench/results/{name}) at {commit[:7]}"


def _read(results: Path, name: str) -> Record:
    record: Record = json.loads((results / name).read_bytes())
    return record


def with_section(readme: str, new: str) -> str:
    """README with its figures replaced. Raises ValueError where the marks are not there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError("README.md must have both marks once")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + new + after


def main() -> int:
    """Rewrite, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme, picture = ROOT / "README.md", RESULTS / PLOT
    texts = {readme: with_section(readme.read_text(), section()), picture: plot()}
    wrong = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in wrong:
        print(f"{path.relative_to(ROOT)} {'is not' if arguments.check else 'was not'} up to date")
        if not arguments.check:
            path.write_text(texts[path])
    return 1 if wrong and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
