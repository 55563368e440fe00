"""What a person at a terminal, or in a log, sees of a run: as it goes, and at its end."""

from typing import Any

from service import events
from service.console import OUT, progress_bar, size_text, the_same_command
from service.plan_text import time_text


class Summary:
    """What a run did, kept for its end."""

    def __init__(self) -> None:
        self.committed = self.n_bytes = 0
        self.given_up: list[events.JobGivenUp] = []
        self.finished: events.RunFinished | None = None
        self.committed_now: int | None = None  # by the catalog: workers may commit after the last event was seen

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.JobCommitted):
            self.committed += 1
            self.n_bytes += event.n_bytes
        elif isinstance(event, events.JobGivenUp):
            self.given_up.append(event)
        elif isinstance(event, events.RunFinished):
            self.finished = event

    def show(self, before: int) -> None:
        finished = self.finished
        n = self.committed if self.committed_now is None else self.committed_now
        left = finished.left + self.committed - n if finished else 0
        seconds = finished.seconds if finished else 0.0
        OUT.print(
            f"committed {n} ({size_text(self.n_bytes)}), before this run {before}, given up {len(self.given_up)}"
            + (f", {left} left" if left else "")
            + f"; {seconds:.0f} s"
        )
        for event in self.given_up[:20]:
            OUT.print(f"  given up: {event.job.pair} ({event.job.method}): {event.reason}", soft_wrap=True)
        if len(self.given_up) > 20:
            OUT.print(f"  … and {len(self.given_up) - 20} more, under failures/ in the catalog")
        if self.given_up:
            OUT.print(f"to try them again, once the cause is mended: {the_same_command()}", soft_wrap=True)

    def to_json(self) -> dict[str, Any]:
        finished = self.finished
        return {
            "committed": self.committed,
            "given_up": [
                {"job_id": e.job.job_id, "pair": e.job.pair, "kind": e.kind, "reason": e.reason} for e in self.given_up
            ],
            "left": finished.left if finished else None,
            "seconds": finished.seconds if finished else None,
            "interrupted": finished.interrupted if finished else True,
        }


class RunProgress:
    """A bar on a terminal; elsewhere a line per event that matters, so that logs tell the story too."""

    def __init__(self, jobs: int, committed: int) -> None:
        self.bar = progress_bar()
        self.task = self.bar.add_task("starting workers", total=jobs, completed=committed)
        self.running: dict[str, str] = {}
        self.tenths: dict[str, int] = {}  # of each training, that are done
        self.eta = ""
        self.trouble: str | None = None

    def __enter__(self) -> "RunProgress":
        if OUT.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def observe(self, event: events.Event) -> None:
        match event:
            case events.WorkerReady():
                what = f" ({event.model}, {size_text(event.n_bytes)})" if event.n_bytes else ""
                self.say(f"{event.worker} is ready on {event.device}{what} after {event.load_s:.1f} s")
            case events.WorkerGone():
                self.running.pop(event.worker, None)
                self.say(f"{event.reason}{'' if event.returns else '; it does not come back'}")
            case events.WorkerStalled() if event.reason != self.trouble:
                self.trouble = event.reason
                self.say(f"{event.worker} waits: {event.reason}")
            case events.Outlook():
                self.eta = "" if event.seconds is None else f", about {time_text(event.seconds)} left"
            case events.JobStarted():
                self.running[event.worker] = event.job.pair
            case events.TrainingStarted():
                self.running[event.worker] = f"training {event.training.pair}"
            case events.TrainingAt():
                self._at(event)
            case events.TrainingDone():
                self.running.pop(event.worker, None)
                how = "was trained already" if event.already else f"trained in {sum(event.stages.values()):.1f} s"
                self.say(f"{event.training.pair} {how}")
            case events.TrainingFailed():
                self.running.pop(event.worker, None)
                how = "will be tried again" if event.retry else "given up with all its pairs"
                self.say(f"{event.training.pair}: attempt {event.attempt} at training it failed, {how}: {event.reason}")
            case events.JobCommitted():
                self.running.pop(event.worker, None)
                self.trouble = None
                self.bar.advance(self.task)
                how = "was committed already" if event.already else f"{sum(event.stages.values()):.1f} s"
                if not OUT.is_terminal:
                    self.say(f"{event.job.pair} {event.job.method}: {how}")
            case events.JobFailed():
                self.running.pop(event.worker, None)
                if event.retry:
                    how = "failed" if event.counts else "does not count"
                    self.say(f"{event.job.pair}: attempt {event.attempt} {how}, will be tried again: {event.reason}")
            case events.JobGivenUp():
                self.bar.advance(self.task)
                self.say(f"{event.job.pair}: given up after {event.attempts} attempts: {event.reason}")
            case _:
                pass
        doing = ", ".join(sorted(self.running.values())[:4]) or "waiting"
        self.bar.update(self.task, description=doing + self.eta)

    def _at(self, event: events.TrainingAt) -> None:
        name = event.job.pair
        self.running[event.worker] = f"training {name}, step {event.step} of {event.steps}"
        tenth = 10 * event.step // event.steps
        if event.loss is None:
            how = f"goes on after step {event.step} of {event.steps}" if event.step else f"begins: {event.steps} steps"
            self.say(f"training {name} {how}")
        elif not OUT.is_terminal and tenth > self.tenths.get(event.job.job_id, 0):
            self.say(f"training {name}: step {event.step} of {event.steps}, loss {event.loss:.4f}")
        self.tenths[event.job.job_id] = tenth

    def say(self, line: str) -> None:
        console = self.bar.console if OUT.is_terminal else OUT
        console.print(line, soft_wrap=True)
