"""The decode loop's guess of a step's time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.fake_device import ROOT, compile_native

T = 2_000_000


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("native") / "step_time"
    return compile_native(made, [ROOT / "tests" / "native" / "step_time.cpp"])


def guesses(program: Path, *steps: tuple[int, bool]) -> list[int]:
    told = "".join(f"{passed} {int(in_vain)}\n" for passed, in_vain in steps)
    done = subprocess.run([program], input=told, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_steady_steps(program: Path) -> None:
    assert guesses(program, *[(T, True)] * 3) == [T] * 3


@pytest.mark.parametrize("passed", [T + T // 2, 50 * T])
def test_one_late_step_hardly_counts(program: Path, passed: int) -> None:
    """The next one is looked for before it is there, and tells again what is right."""
    _, late, after = guesses(program, (T, True), (passed, True), (T, True))
    assert T < late <= T * 9 // 8 and late * 3 // 4 < T
    assert after == T


def test_steps_that_get_longer_are_followed(program: Path) -> None:
    assert guesses(program, (T, True), *[(3 * T, True)] * 12)[-1] == 3 * T


def test_what_was_there_at_the_first_look_shortens_the_sleep(program: Path) -> None:
    *_, last = guesses(program, (4 * T, True), *[(3 * T, False)] * 6)
    assert last * 3 // 4 < T


def test_two_steps_that_were_there_at_once_tell_nothing(program: Path) -> None:
    assert guesses(program, (100, False), (T, True)) == [0, T]
