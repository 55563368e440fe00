"""A real worker that does to certain pairs what a script says: their merges end the process, hang, or take longer."""

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.messages import WorkerSettings


@dataclass(frozen=True, slots=True)
class Script:
    """`acts`: pair → what its attempts do, in order: "die", "hang", "ok"; the last holds for all that follow. Attempts
    are counted in files, since processes do not live to remember them."""

    acts: Mapping[str, Sequence[str]]
    counts: Path
    pause_s: float = 0.0  # before every merge

    def attempt(self, pair: str) -> int:
        """Which one this is, from 0 on."""
        self.counts.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            try:
                (self.counts / f"{pair.replace('/', '--')}.{number}").touch(exist_ok=False)
            except FileExistsError:
                number += 1
            else:
                return number

    def __call__(self, settings: WorkerSettings) -> Any:
        from service.worker import Worker
        from service.worker_inputs import Prepared
        from ziplora.merged import Merged

        script = self

        class Scripted(Worker):
            def _merge(self, ready: Sequence[Prepared]) -> Iterator[tuple[Prepared, Merged | Exception]]:
                for one in ready:
                    time.sleep(script.pause_s)
                    acts = script.acts.get(one.job.pair)
                    if acts:
                        act = acts[min(script.attempt(one.job.pair), len(acts) - 1)]
                        if act == "die":
                            os.kill(os.getpid(), signal.SIGKILL)
                        elif act == "hang":
                            time.sleep(10_000)
                return super()._merge(ready)

        return Scripted(settings)
