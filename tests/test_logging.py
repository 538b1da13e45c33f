"""The package logs, and where nobody listens it says nothing."""

from __future__ import annotations

import subprocess
import sys


def test_nothing_is_printed_where_no_logging_is_configured() -> None:
    code = """
        import io, logging, llava_engine

        log = logging.getLogger("llava_engine.pool.pool")
        log.warning("to nobody")
        heard = io.StringIO()
        logging.basicConfig(stream=heard)
        log.warning("to the application")
        assert "to the application" in heard.getvalue()
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
