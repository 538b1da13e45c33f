"""The progress bar: when it shows, that nothing of it stays, and the real thing on a terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import textwrap

import pytest

from llava_engine.progress import DELAY_S, ProgressBar

MIB = 1 << 20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_waits_and_is_wiped_away() -> None:
    now = 0.0
    screen = Terminal()
    with ProgressBar("a-model", screen, clock=lambda: now) as bar:
        now = DELAY_S - 0.01
        bar.update(10 * MIB, 100 * MIB)
        assert screen.getvalue() == ""
        now = DELAY_S
        bar.update(50 * MIB, 100 * MIB)
        drawn = screen.getvalue()
        for part in ("a-model", "50%", "50 of 100 MiB"):
            assert part in drawn
        now += 0.05
        bar.update(51 * MIB, 100 * MIB)
        assert screen.getvalue() == drawn
        now += 0.1
        bar.update(0, 0)
        assert screen.getvalue().startswith(drawn) and screen.getvalue() != drawn
    ended = screen.getvalue()
    assert ended.endswith("\r\x1b[K")
    now += 5
    bar.update(1, 1)
    assert screen.getvalue() == ended


def test_the_line_fits_a_terminal_whatever_the_name() -> None:
    now = 0.0
    screen = Terminal()
    bar = ProgressBar("n" * 200, screen, clock=lambda: now)
    now = 2.0
    bar.update(26_000 * MIB, 26_000 * MIB)
    assert len(screen.getvalue().removeprefix("\r\x1b[K")) < 100


def test_no_bar_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_engine.progress.DELAY_S", 0.0)
    closed = Terminal()
    closed.close()
    for stream in (io.StringIO(), closed):
        with ProgressBar("m", stream) as bar:
            bar.update(1, 2)
        assert stream.closed or stream.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    with ProgressBar("m") as bar:
        bar.update(1, 2)


def test_a_terminal_that_goes_away_ends_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_engine.progress.DELAY_S", 0.0)

    class Gone(Terminal):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise OSError(5, "Input/output error")

    gone = Gone()
    with ProgressBar("m", gone) as bar:
        bar.update(1, 2)
        bar.update(2, 2)
    assert gone.writes == 1


LOAD = """
import sys
import llava_engine, llava_engine.progress
from llava_engine import EngineConfig
from llava_engine.demo import picture_path

llava_engine.progress.DELAY_S = 0.0
config = EngineConfig(device="cpu", progress_bar=sys.argv[1] == "on")
own = (lambda *_: None) if sys.argv[1] == "own" else None
model = llava_engine.get("llava-tiny", config, progress=own)
model.describe_image(picture_path(), "x", max_new_tokens=1).text()
"""


@pytest.mark.parametrize(
    ("setting", "terminal", "shown"),
    [("on", True, True), ("on", False, False), ("off", True, False), ("own", True, False)],
)
def test_a_load_shows_it_on_a_terminal_alone(setting: str, terminal: bool, shown: bool) -> None:
    """Nothing else stands on stderr before, and nothing stays there after."""
    parent, child = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOAD), setting], stdout=subprocess.PIPE, stderr=child
    )
    os.close(child)
    output = b""
    try:
        while chunk := os.read(parent, 4096):
            output += chunk
    except OSError:  # how Linux says that the last writer of a terminal has gone
        pass
    finally:
        os.close(parent)
    stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, b"")
    text = output.decode()
    assert ("Loading llava-tiny [" in text) == shown
    assert text.rpartition("\x1b[K")[2] == ""
