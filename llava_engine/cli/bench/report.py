"""The record of a run as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from llava_engine.cli.bench.comparison import agree
from llava_engine.cli.bench.metrics import LATENCIES, PERCENTILES, STAGES
from llava_engine.cli.bench.plots import (
    COLOURS,
    Axis,
    Bar,
    Line,
    axis,
    bars,
    legend,
    lines,
    number,
    request_line,
)
from llava_engine.cli.bench.style import STYLE

Record = dict[str, Any]
_SHARE = Axis("% of them within", 0, 100)
_LATENCIES = {
    "ttft": "time to first token",
    "itl": "between two chunks",
    "e2el": "to the end",
}


def report(record: Record, ops: Record | None = None) -> str:
    """The page. ops: what bench/kernels.py wrote."""
    runs: list[Record] = record["runs"]
    beside = [run for peer in record.get("peers", []) if agree(peer) for run in peer["runs"]]
    sections = [_head(record)]
    if runs:
        sections += [_tiles(runs), _throughput(runs, beside), _distributions(runs)]
        sections += [_stages(runs, beside), _table(record)]
    if "peers" in record:
        sections.append(_peers(record["peers"]))
    sections.append(_cold_start(record["cold_start_s"]))
    if ops is not None and ops["copy_gb_per_s"] is not None:  # a CPU's kernels have no ceilings
        sections.append(_ops(ops))
    sections.append(_conditions(record))
    title = f"llava-engine bench: {record['model']}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def name_of(run: Record) -> str:
    """Who was measured, under which load."""
    return f"{_engine(run)}, {_load(run)}"


def _load(run: Record) -> str:
    if "request_rate" in run:
        return f"{number(run['request_rate'])}/s arriving"
    return f"{run['max_concurrency']} at once"


def _engine(run: Record) -> str:
    name: str = run["backend"]
    return name.replace("_", "-")


def _head(record: Record) -> str:
    work, where = record["workload"], record["where"] or {"devices": [], "names": []}
    places = ", ".join(
        name if name == "CPU" else f"{name} ({device})"
        for name, device in zip(where["names"], where["devices"], strict=True)
    )
    weights = ", random weights" if record["weights"] == "random" else ""
    if "picture_width" in work:
        size = f"{work['picture_width']}\u00d7{work['picture_height']}"
        picture = f"a picture of {size} that no other has"
    else:
        picture = f"one of {work['distinct_pictures']} pictures in turn"
    prompt = ""
    if "prompt_tokens" in work:
        prompt = f" ({work['prompt_tokens']} prompt tokens, {work['image_tokens']} of the picture)"
    return (
        f"<header><h1>{escape(record['model'])}<small>{weights} on {escape(places)}</small></h1>"
        f"<p>Each request: {picture}, and a question{prompt}, answered with "
        f"exactly {work['new_tokens']} tokens, greedily. {escape(record['date'])}</p></header>"
    )


def _tiles(runs: Sequence[Record]) -> str:
    fastest = max(runs, key=lambda run: run["output_throughput"])
    lightest = min(runs, key=lambda run: run.get("max_concurrency", float("inf")))
    tiles = [
        ("first token", lightest["median_ttft_ms"], "ms", f"median, {_load(lightest)}"),
        ("each token after", lightest["median_tpot_ms"], "ms", f"median, {_load(lightest)}"),
        ("output", fastest["output_throughput"], "tokens/s", f"the most, {_load(fastest)}"),
    ]
    if "request_goodput" in fastest:
        best = max(runs, key=lambda run: run["request_goodput"])
        tiles.append(("goodput", best["request_goodput"], "requests/s", _load(best)))
    cells = "".join(
        f"<div><b>{name}</b><strong>{number(value)}<small> {unit}</small></strong>"
        f"<span>{escape(note)}</span></div>"
        for name, value, unit, note in tiles
        if value is not None
    )
    return f'<section class="tiles">{cells}</section>'


def _throughput(runs: Sequence[Record], beside: Sequence[Record]) -> str:
    """Throughput against the latency of a request and of a token."""
    groups: dict[str, list[Record]] = {}
    for run in [*runs, *beside]:
        if run["median_tpot_ms"] is not None:
            loop = ", open loop" if "request_rate" in run else ""
            groups.setdefault(_engine(run) + loop, []).append(run)
    if not groups:
        return ""
    series = []
    for colour, (name, group) in enumerate(groups.items()):
        group = sorted(group, key=lambda run: run["output_throughput"])
        labels = [_short(run) for run in group]
        for kind, dashed in (("median", False), ("p99", True)):
            points = [(run["output_throughput"], run[f"{kind}_tpot_ms"]) for run in group]
            series.append(
                Line(
                    f"{name}, {kind}",
                    colour % COLOURS,
                    points,
                    () if dashed else labels,
                    dashed,
                    dots=True,
                    below=True,
                )
            )
    xs = [point[0] for line in series for point in line.points]
    ys = [point[1] for line in series for point in line.points]
    spread = max(ys) > 8 * min(ys)
    plot = lines(
        series,
        axis("output tokens a second, all requests together", xs),
        axis("ms a token, one request" + (", logarithmic" if spread else ""), ys, log=spread),
    )
    return _figure(
        "Throughput against latency",
        "To the right is more work done, downwards is a quicker answer. Points are named by the "
        "requests at once, or arriving a second.",
        legend([(line.name, line.colour, line.dashed) for line in series]) + plot,
    )


def _short(run: Record) -> str:
    if "request_rate" in run:
        return f"{number(run['request_rate'])}/s"
    return str(run["max_concurrency"])


def _distributions(runs: Sequence[Record]) -> str:
    plots = []
    for key, title in _LATENCIES.items():
        series = [
            Line(
                name_of(run),
                index % COLOURS,
                [(ms, share) for share, ms in enumerate(run["quantiles_ms"][key])],
            )
            for index, run in enumerate(runs)
            if key in run.get("quantiles_ms", {})
        ]
        if not series:
            continue
        values = [point[0] for line in series for point in line.points]
        log = max(values) > 20 * max(min(values), 1e-3)
        x = axis("milliseconds" + (", logarithmic" if log else ""), values, log=log)
        plot = lines(series, x, _SHARE, width=300, height=250)
        plots.append(f"<div><h3>{title} <code>{key}</code></h3>{plot}</div>")
    keys = legend([(name_of(run), index % COLOURS, False) for index, run in enumerate(runs)])
    return _figure(
        "How long it took, and how often",
        "A steep curve is a steady engine; a long tail to the right is what the slowest met.",
        f'{keys}<div class="row">{"".join(plots)}</div>',
    )


def _stages(runs: Sequence[Record], beside: Sequence[Record]) -> str:
    """Mean stages of all runs, and one request's time line."""
    known = [run for run in [*runs, *beside] if run.get("stages_ms")]
    if not known:
        return ""
    rows = [
        Bar(
            name_of(run),
            [(stage, STAGES.index(stage), ms) for stage, ms in run["stages_ms"].items()],
            f"{number(sum(run['stages_ms'].values()))} ms",
        )
        for run in known
    ]
    x = axis(
        "milliseconds, mean of all requests", [sum(run["stages_ms"].values()) for run in known]
    )
    shown = known[0]
    one = shown["timeline"]
    line = request_line(
        [(stage, STAGES.index(stage), ms) for stage, ms in one["stages_ms"].items()],
        one["chunks_ms"],
    )
    lengths = [
        (f"{stage} {number(ms)} ms", STAGES.index(stage), False)
        for stage, ms in one["stages_ms"].items()
    ]
    keys = legend([(stage, index, False) for index, stage in enumerate(STAGES)])
    return _figure(
        "Where a request's time goes",
        "queue: until a worker takes it. picture: read, decoded, prepared. prefill: to the first "
        "token, the wait for a place in the batch included. decode: to the last token. delivery: "
        "to the reader's end.",
        f"{keys}{bars(rows, x)}<h3>One request, {escape(name_of(shown))}: the one of median "
        f"latency, and each chunk as it came</h3>{legend(lengths)}{line}",
    )


def _table(record: Record) -> str:
    peers: list[Record] = record.get("peers", [])
    runs = record["runs"] + [run for peer in peers for run in peer.get("runs", [])]
    counts = ["completed", "failed", "duration", "request_throughput", "output_throughput"]
    if any("request_goodput" in run for run in runs):
        counts.append("request_goodput")
    rows = [[name_of(run), *(_cell(run.get(name)) for name in counts)] for run in runs]
    failed = "".join(
        f"<p>{escape(name_of(run))}: {run['failed']} of {run['num_prompts']} requests failed: "
        f"{escape(error)}</p>"
        for run in runs
        for error in run.get("errors", [])
    )
    kinds = ("mean", "std", *(f"p{p}" for p in PERCENTILES))
    parts = [
        (
            f"{latency}_ms",
            [
                [name_of(run), *(_cell(run[f"{kind}_{latency}_ms"]) for kind in kinds)]
                for run in runs
            ],
        )
        for latency in LATENCIES
    ]
    return _figure(
        "All figures",
        "Named as in vLLM's serving benchmark. Times in milliseconds; duration in seconds, "
        "throughputs a second.",
        _html_table(["run", *counts], [("", rows)]) + failed + _html_table(["", *kinds], parts),
    )


def _peers(peers: Sequence[Record]) -> str:
    body = []
    for peer in peers:
        if peer["missing"]:
            body.append([peer["name"], "", f"not measured: {peer['missing']}"])
            continue
        outputs = peer["outputs"]
        verdict = (
            f"of {outputs['compared']} answers {outputs['identical']} the same to the token, "
            f"{outputs['near_ties']} parted at a near tie, {outputs['different']} differed"
        )
        if not agree(peer):
            verdict += ": not compared, its speed is in the table alone"
        if peer["stopped"]:
            verdict += f"; {peer['stopped']}"
        body.append([peer["name"], peer["version"], verdict])
    return _figure(
        "Peers, on the same checkpoint, pictures and prompts",
        "Answers are compared before speeds. Near ties are told from errors by transformers' own "
        "logits: a token may lie below the best one by what rounding moves them. Peers without "
        "continuous batching answer a run as one batch, and their pictures and prompts are made in "
        "that time.",
        _html_table(["peer", "version", "answers"], [("", body)], words=True),
    )


def _cold_start(split: dict[str, float]) -> str:
    rows = [
        Bar(name, [(name, 0 if name == "in all" else 1, seconds)], f"{number(seconds)} s")
        for name, seconds in split.items()
    ]
    return _figure(
        "Cold start",
        "From the start of the process to its first token. Some stages run side by side, so they "
        "add up to more than all.",
        bars(rows, axis("seconds", list(split.values()))),
    )


def _ops(ops: Record) -> str:
    """Each op's share of the ceiling that is nearer to it: the memory's or the arithmetic's."""
    copied, multiplied = ops["copy_gb_per_s"], ops.get("matmul_tflop_per_s")
    rows = []
    for row in sorted(ops["rows"], key=lambda row: row["case"].split(" ")[0]):
        share, colour, rate = row["share_of_copy_ceiling"], 0, f"{number(row['gb_per_s'])} GB/s"
        arithmetic = row["tflop_per_s"] / multiplied if multiplied else 0.0
        if arithmetic > share:
            share, colour, rate = arithmetic, 4, f"{number(row['tflop_per_s'])} TFLOP/s"
        note = f"{number(row['us'])} \u00b5s, {rate}"
        rows.append(Bar(row["case"], [("share", colour, 100 * share)], note))
    ceilings = [f"a copy reached {number(copied)} GB/s"]
    keys = [("of the copy's rate", 0, False)]
    if multiplied:
        ceilings.append(f"a large matrix product {number(multiplied)} TFLOP/s")
        keys.append(("of the matrix product's rate", 4, False))
    return _figure(
        "Kernels against their ceilings",
        f"In the same run {' and '.join(ceilings)} ({escape(ops['device'])}, commit "
        f"{escape(ops['commit'])}). Of each kernel, the bytes that must move or the operations "
        "over the time it took, whichever is the larger share. Calls of a few microseconds are "
        "bound by neither.",
        legend(keys) + bars(rows, Axis("% of the ceiling", 0, 110), mark=100),
    )


def _conditions(record: Record) -> str:
    machine = record["machine"]
    gpus = ", ".join(machine["gpus"]) or "none"
    driver = f", {machine['driver']}" if machine["driver"] else ""
    lines_ = [
        ("command", record["command"]),
        ("commit", record.get("commit", "not told")),
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GiB"),
        ("GPUs", gpus + driver),
        ("system", machine["system"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items())),
        ("workload", ", ".join(f"{k} {v}" for k, v in record["workload"].items())),
    ]
    items = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in lines_)
    return f"<section><h2>Conditions</h2><dl>{items}</dl></section>"


def _figure(title: str, words: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p>{words}</p>{content}</section>"


def _cell(value: float | None) -> str:
    return "\u2013" if value is None else number(value)


def _html_table(
    head: Sequence[str], parts: Sequence[tuple[str, Sequence[Sequence[str]]]], words: bool = False
) -> str:
    """Rows in parts, each under its name if it has one."""
    body = ""
    for name, rows in parts:
        if name:
            body += f'<tr class="part"><td colspan="{len(head)}">{escape(name)}</td></tr>'
        for row in rows:
            body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    top = "".join(f"<th>{escape(name).replace('_', '_<wbr>')}</th>" for name in head)
    kind = ' class="words"' if words else ""
    return f'<div class="wide"><table{kind}><tr>{top}</tr>{body}</table></div>'
