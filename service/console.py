"""What all commands print with: two consoles, complaints, progress bars, sizes in words."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from service.entry import Unreadable
from service.steps import Steps

T = TypeVar("T")
OUT = Console(highlight=False, markup=False)  # paths and ids are nobody's markup
ERR = Console(stderr=True, highlight=False, markup=False)


def complain(line: str, label: str = "error") -> None:
    ERR.print(Text.assemble((f"{label}:", "red"), " ", line), soft_wrap=True)


def left_out(record: Unreadable) -> None:
    complain(f"{record.key}: {record.reason}", "left out")


def the_same_command() -> str:
    """What the user typed, to be typed again."""
    return shlex.join(["ziplora", *sys.argv[1:]])


def tracked(steps: Iterable[T], description: str) -> Iterator[T]:
    """`steps` with a progress bar where there is a terminal."""
    total = len(steps) if isinstance(steps, Steps) else None
    with progress_bar() as bar:
        task = bar.add_task(description, total=total)
        for step in steps:
            yield step
            bar.advance(task)


def progress_bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=ERR,
        transient=True,
        disable=not ERR.is_terminal,
    )


@contextmanager
def redrawn() -> Iterator[Callable[[str], None] | None]:
    """A function that shows a text in place of the one before; None where there is no terminal."""
    if not OUT.is_terminal:
        yield None
        return
    with Live(console=OUT, auto_refresh=False) as live:
        yield lambda text: live.update(Text(text), refresh=True)


def size_text(n_bytes: int) -> str:
    for limit, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.1f} {unit}"
    return f"{n_bytes} B"


def counted(values: Any, what: str) -> str:
    if len(values) == 1:
        return str(next(iter(values)))
    return ", ".join(f"{value} ({number} {what})" for value, number in values.items())
