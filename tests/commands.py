"""The command line as a user runs it: `ziplora …` in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ZIPLORA = Path(sys.executable).parent / "ziplora"


def ziplora(*arguments: object, cwd: Path | None = None, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=timeout_s, env=environment()
    )


def started(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell does, so that a signal to the group is what Ctrl-C is."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
        # a shell starts background jobs with SIGINT ignored, and what ignores it passes that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def command(*arguments: object) -> list[str]:
    return [str(ZIPLORA), *map(str, arguments)]


def environment() -> dict[str, str]:
    # wide lines: what is compared are messages, not how they are folded
    return {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def wait_until(condition: Callable[[], bool], timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
