"""How a command ends that went wrong: its exit code, and a line on stderr."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.command_line import COMMAND

from llava_engine import cli, demo, errors


def caused(error: errors.LlavaError, cause: Exception) -> errors.LlavaError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ImageDecodeError("no picture"), 3),
        (errors.BlockedAddress("not allowed"), 3),
        (errors.FetchTimeout("slow"), 3),
        (errors.PromptTooLong("too long"), 3),
        (errors.InvalidQuery("NUL"), 3),
        (errors.UnknownModel("no such model"), 4),
        (errors.WeightsError("no weights"), 4),
        (caused(errors.SpawnFailed("spawn"), errors.WeightsError("torn file")), 4),
        (caused(errors.SpawnFailed("spawn"), errors.MemoryExhausted("full")), 5),
        (errors.MemoryExhausted("no room"), 5),
        (errors.PoolOverloaded("busy"), 5),
        (errors.RequestTimeout("late"), 5),
    ],
)
def test_exit_codes_of_failures(answer, capsys, error, code):
    for place in ("error", "get_error"):
        answer("half an", " answer", **{place: error})
        assert cli.main(["describe", "a.png"]) == code
        out, err = capsys.readouterr()
        cause = error.__cause__ or error
        assert err == f"llava-engine: {cause}\n"
        assert out == ("half an answer\n" if place == "error" else "")


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "-1"],
        ["--top-p", "0"],
        ["--max-new-tokens", "0"],
        ["--device", "tpu"],
        ["--dtype", "float8"],
    ],
)
def test_settings_out_of_range_are_bad_input(answer, capsys, options):
    answer("x")
    assert cli.main(["describe", "a.png", *options]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert options[0].strip("-").replace("-", "_") in err
    assert "Traceback" not in err


def test_a_misspelt_variable_is_bad_input(answer, capsys, monkeypatch):
    monkeypatch.setenv("LLAVA_ENGINE_DEVISE", "cpu")
    answer("x")
    assert cli.main(["describe", "a.png"]) == 3
    assert "LLAVA_ENGINE_DEVISE" in capsys.readouterr().err


def test_a_format_that_there_is_none_of(capsys):
    assert cli.main(["describe", "--quantization", "int3"]) == cli.BAD_INPUT
    assert "quantization" in capsys.readouterr().err


def test_internal_errors_show_where(answer, capsys):
    failed = caused(errors.RequestFailed("it broke"), ZeroDivisionError("deep inside"))
    for error in (RuntimeError("a bug"), failed):
        answer("x", error=error)
        assert cli.main(["describe", "a.png"]) == 70
        assert "Traceback" in capsys.readouterr().err


def test_interrupted(answer, capsys):
    answer(get_error=KeyboardInterrupt())
    assert cli.main(["describe", "a.png"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["describe", "a", "b", "c"], ["nothing"], ["describe", "--seed", "x"], ["models", "x"]],
)
def test_a_wrong_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_help_documents_every_exit_code(capsys):
    for arguments in (["--help"], ["describe", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        text = capsys.readouterr().out
        codes = text.partition("exit codes:")[2].split("\n")
        shown = [int(line.split()[0]) for line in codes if line.strip()]
        names = (cli.OK, cli.USAGE, cli.BAD_INPUT, cli.MODEL, cli.POOL)
        assert shown == [*names, cli.INTERNAL, cli.OUTPUT, cli.INTERRUPTED]


MISTAKES = [
    (["describe", "nowhere.png"], 3),
    (["describe", __file__], 3),
    (["describe", "ftp://h/x"], 3),
    (["bench", "--seed", "-1"], 3),
    (["bench", "--report", "."], 3),
    (["describe", "http://127.0.0.1:9/x.png"], 3),
    (["describe", "--model", "llava-tinny"], 4),
    (["describe", "--model", "."], 4),
    (["describe", str(demo.picture_path()), "a\udcffb"], 3),  # an argument that is no UTF-8
    (["describe", str(demo.picture_path()), "x " * 20_000], 3),
    (["describe", str(demo.picture_path()), "x", "--timeout", "-1"], 3),
]


SEVERAL = """
import contextlib, io, json, sys
from llava_engine.cli import main
for arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def test_real_mistakes(tmp_path):
    """All in one process, which also shows that one mistake does not spoil the next request."""
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL],
        input=json.dumps([arguments for arguments, _ in MISTAKES]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, expected), (code, out, err) in zip(MISTAKES, results, strict=True):
        assert (code, out) == (expected, ""), (arguments, err)
        assert err.startswith("llava-engine: ") and err.count("\n") == 1, err
    assert done.stderr == ""


def shell(line: str) -> tuple[int, str, str]:
    """The exit code of the command with what a shell does around it, its output and its errors."""
    done = subprocess.run(
        f"{' '.join(COMMAND)} {line}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_reader_that_leaves_is_no_error():
    assert shell("models --json | true; echo ${PIPESTATUS[0]}") == (0, "0\n", "")


@pytest.mark.parametrize("command", ["models", "models --json", "describe --max-new-tokens 2"])
def test_output_that_cannot_be_written(command):
    assert shell(f"{command} >/dev/full") == (74, "", "llava-engine: No space left on device\n")
    assert shell(f"{command} >&-") == (74, "", "llava-engine: standard output is closed\n")


def test_errors_that_cannot_be_written_are_no_output():
    for line in ("describe nowhere.png 2>&-", "describe nowhere.png 2>/dev/full"):
        assert shell(line) == (3, "", "")
    code, out, _ = shell("describe --max-new-tokens 2 2>&-")
    assert code == 0 and "llava-engine" not in out


def test_a_report_that_cannot_be_written_costs_no_figures(capsys):
    options = "--requests 1 --new-tokens 1 --device cpu --json --report /dev/full"
    assert cli.main(["bench", *options.split()]) == cli.OUTPUT
    out, err = capsys.readouterr()
    assert json.loads(out)["runs"] and err == "llava-engine: No space left on device\n"
