"""Are mutated pictures refused or decoded, quickly and in little memory?

Loads the mutations of tests/image/test_fuzz.py under EngineConfig's default limits, and two kinds
of picture whose work could be out of all proportion: one pixel wide, and huge in the header alone.
Ends with status 1, naming them, where pictures break a bound; a crash ends it with a traceback.

    python bench/fuzz.py [--count 10000] [--seed 8] [--json PATH]
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import PIL
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image, features

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from image.test_fuzz import mutated  # noqa: E402
from support.odd_pictures import huge_headers  # noqa: E402

from llava_engine.config import EngineConfig  # noqa: E402
from llava_engine.errors import ImageTooLarge  # noqa: E402
from llava_engine.image.header import sniff  # noqa: E402
from llava_engine.image.load import load_image  # noqa: E402
from llava_engine.image.preprocess import ImageProcessorConfig, preprocess  # noqa: E402

MAX_MS = 100.0
MAX_MIB = 256.0
MAX_NARROW_MS = 10.0
MAX_HEADER_MS = 1.0
SOURCES = ("llava_engine", "tests/image", "bench/fuzz.py")
DEFAULTS = {each.name: each.default for each in fields(EngineConfig)}
LIMITS: dict[str, Any] = {
    "max_bytes": DEFAULTS["max_image_bytes"],
    "max_pixels": DEFAULTS["max_image_pixels"],
}


@dataclass
class Worst:
    """Of the pictures of one format: how many came to what, and the most that one of them took."""

    outcomes: dict[str, int] = field(default_factory=dict)
    ms: float = 0.0
    slowest: str = ""
    mib: float = 0.0  # above what the process held before the first: what was not given back counts


class Run:
    """What became of the pictures so far; `broken` names those that broke a bound."""

    def __init__(self) -> None:
        self.formats: dict[str, Worst] = {}
        self.broken: list[str] = []
        self.before = memory("VmRSS")

    def picture(self, content: bytes) -> None:
        """Load one picture and note what it took."""
        worst = self.formats.setdefault(sniff(content[:16]) or "none", Worst())
        reset_peak()
        outcome, ms = load(content)
        mib = memory("VmHWM") - self.before
        for _ in range(4):  # a busy machine's pauses are not the picture's
            if ms > MAX_MS / 2:
                ms = min(ms, load(content)[1])
        worst.outcomes[outcome] = worst.outcomes.get(outcome, 0) + 1
        worst.mib = max(worst.mib, mib)
        if ms > worst.ms:
            worst.ms, worst.slowest = ms, f"{outcome}, {len(content)} bytes: {content[:64].hex()}"
        foreign = outcome not in ("decoded", "ImageDecodeError", "ImageTooLarge")
        if foreign or ms > MAX_MS or mib > MAX_MIB:
            self.broken.append(f"{outcome}, {ms:.0f} ms, {mib:.0f} MiB: {content.hex()}")


def memory(name: str) -> float:
    """VmRSS, this process's memory now, or VmHWM, its peak since `reset_peak`, in MiB."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def load(content: bytes) -> tuple[str, float]:
    """Give 'decoded' or the name of what was raised, and the milliseconds it took."""
    outcome = "decoded"
    start = time.perf_counter()
    try:
        load_image(content, **LIMITS)
    except Exception as error:
        outcome = type(error).__name__
    return outcome, 1e3 * (time.perf_counter() - start)


def least_ms(work: Callable[..., object], *arguments: object) -> float:
    """Of ten calls: a busy machine's pauses are not the picture's."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        work(*arguments)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def prepare(content: bytes, pad: bool) -> None:
    """Decode and preprocess as CLIP does, or as LLaVA does where it pads to a square."""
    config = ImageProcessorConfig(shortest_edge=336, crop_size=(336, 336), do_pad=pad)
    preprocess(load_image(content, **LIMITS), config)


def narrow_pictures() -> dict[str, float]:
    """Milliseconds that pictures take which are one pixel wide or high."""
    times = {}
    for width, height in ((4000, 1), (65_000, 1), (1, 65_000)):
        file = io.BytesIO()
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        times[f"{width} x {height}"] = least_ms(prepare, file.getvalue(), False)
        times[f"{width} x {height}, padded"] = least_ms(prepare, file.getvalue(), True)
    return times


def refuse(content: bytes) -> None:
    """Load a picture that must be refused as too large."""
    try:
        load_image(content, **LIMITS)
    except ImageTooLarge:
        return
    raise AssertionError("a huge header was not refused")


def mutations(count: int, seed: int) -> list[bytes]:
    """`count` different pictures, the same for one seed and one release of hypothesis."""
    contents: dict[bytes, None] = {}

    @hypothesis.seed(seed)
    @settings(
        max_examples=2 * count,  # a fifth comes twice
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated())
    def keep(content: bytes) -> None:
        contents[content] = None

    keep()
    return list(contents)[:count]


@contextmanager
def no_chatter() -> Iterator[None]:
    """Keep what libtiff writes to stderr away, but not the traceback of a crash."""
    with os.fdopen(os.dup(2), "w") as stderr, open(os.devnull, "w") as nowhere:
        faulthandler.enable(stderr)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr.fileno(), 2)
            faulthandler.enable()


def main() -> int:
    """Print what each format took; write JSON if asked. 1 if a bound was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # as in production, where a warning is no error
    contents = mutations(arguments.count, arguments.seed)
    run = Run()
    with no_chatter():
        for content in contents:
            run.picture(content)
    narrow = narrow_pictures()
    headers = {name: least_ms(refuse, content) for name, content in huge_headers().items()}

    for name, each in sorted(run.formats.items()):
        print(f"{name:>5}: at most {each.ms:5.1f} ms, {each.mib:5.1f} MiB; {each.outcomes}")
    for what, ms in [*narrow.items(), *((f"huge {name}", ms) for name, ms in headers.items())]:
        print(f"{what}: {ms:.3f} ms")
    broken = run.broken
    broken += [f"{name}: {ms:.1f} ms" for name, ms in narrow.items() if ms > MAX_NARROW_MS]
    broken += [f"huge {name}: {ms:.2f} ms" for name, ms in headers.items() if ms > MAX_HEADER_MS]
    if len(contents) < arguments.count:
        broken.append(f"only {len(contents)} pictures were tried")
    for each_broken in broken:
        print("BROKEN:", each_broken)
    print(f"{len(contents)} pictures, {len(broken)} bounds broken")
    if arguments.json:
        record = {
            "commit": git("rev-parse", "HEAD"),
            "uncommitted": git("status", "--porcelain", "--", *SOURCES).splitlines(),
            "command": "python " + " ".join(sys.argv),
            "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(),
            "versions": versions(),
            "limits": LIMITS,
            "bounds": {
                "ms": MAX_MS,
                "mib": MAX_MIB,
                "narrow_ms": MAX_NARROW_MS,
                "header_ms": MAX_HEADER_MS,
            },
            "pictures": len(contents),
            "formats": {name: asdict(each) for name, each in sorted(run.formats.items())},
            "narrow_ms": narrow,
            "header_ms": headers,
            "broken": broken,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if broken else 0


def git(*arguments: str) -> str:
    """What git prints here."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip()


def versions() -> dict[str, str | None]:
    """Of what decodes and of what mutates."""
    found: dict[str, str | None] = {
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "hypothesis": hypothesis.__version__,
    }
    for name in ("libjpeg_turbo", "webp", "zlib", "zlib_ng", "libtiff"):
        of = features.version_feature if name in features.features else features.version
        found[name] = of(name)
    return found


if __name__ == "__main__":
    sys.exit(main())
