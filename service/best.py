"""`method: best`: several methods on one pair, of which the result with the highest score is published.

Candidates are tried in the order in which the manifest lists them, cheapest first if its author is wise; with
`good_enough`, a pair stops at the first that scores so much, so that costly methods run only where cheap ones score
low. That rule looks at one pair alone. Successive halving over the grid (arXiv 1502.07943) would not do here: which
half a pair falls into depends on all other pairs, so its result would depend on what had finished before, on the tiles
and on the workers; a resumed run or a larger grid would choose otherwise, and a job's id would no longer say what its
result is.

Which method won, and every candidate's scores, seconds or failure, are in the entry's report under `best`.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from service.choose import BEST, score_of
from service.entry import ALIGNMENTS
from service.jobs import SCORED_STRENGTH, Job, SampleSettings, Scorers, as_candidate, shows_pair
from service.messages import JobResult
from service.wording import some
from ziplora.methods import METHODS

if TYPE_CHECKING:
    from service.uploads import Made

JUDGES = {"harmonic": ("clip", "dino"), "style": ("clip",), "subject": ("dino",), "text": ("clip",)}
ROLES = {"harmonic": ("subject", "style"), "style": ("style",), "subject": ("subject",), "text": ()}


def candidates(job: Job) -> tuple[Job, ...]:
    """What is merged for this job, in order: itself, or for `best` the same job by each of its methods."""
    if job.method != BEST:
        return (job,)
    return tuple(
        as_candidate(job, one["method"], one["knobs"], sampled_by(one["method"], job.samples))
        for one in job.knobs["of"]
    )


def sampled_by(method: str, samples: SampleSettings) -> SampleSettings:
    """The samples that a method's merges can give: at style strength 1 alone where the style has no rows of its own."""
    if METHODS[method].parts or samples.style_strengths == (SCORED_STRENGTH,):
        return samples
    return replace(samples, style_strengths=tuple(one for one in samples.style_strengths if one == SCORED_STRENGTH))


def problems(by: str, scorers: Scorers, samples: SampleSettings, bare: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Why nothing could be chosen by this score. `bare`: ids without reference images, by role."""
    absent = [kind for kind in JUDGES[by] if getattr(scorers, kind) is None]
    if absent:
        yield f"best chooses by {by}, which takes a {' and a '.join(absent)} scorer: name it under scores"
    if samples.n_images == 0 or SCORED_STRENGTH not in samples.style_strengths:
        yield "best chooses by scores, which are given to samples of style strength 1.0: ask for some"
    elif ROLES[by] and not any(shows_pair(prompt.template) for prompt in samples.prompts):
        yield f"best chooses by {by}, which takes a sample prompt with both {{subject}} and {{style}}"
    for role in ROLES[by]:
        if bare[role]:
            yield f"best chooses by {by}, which takes reference images of {some(bare[role])}: name some under images"


class Contest:
    """One job's way to its result: candidates one after the other. A job of any other method is a contest of one, whose
    result comes out as it went in. Used by one thread."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._waiting = deque(candidates(job))
        self._tried: list[dict[str, Any]] = []
        self._leader: tuple[float, Made] | None = None
        self._failure: JobResult | None = None
        self._stages: dict[str, float] = {}
        self._peak_bytes = 0

    def take(self) -> Job:
        """The next candidate; to be called while there is no outcome."""
        return self._waiting.popleft()

    def add(self, candidate: Job, came: "Made | JobResult") -> "Made | JobResult | None":
        """What came of the candidate that was taken last. The outcome as soon as there is one."""
        if self.job.method != BEST:
            return came
        result = came if isinstance(came, JobResult) else came.result
        for stage, seconds in result.stages.items():
            self._stages[stage] = self._stages.get(stage, 0.0) + seconds
        self._peak_bytes = max(self._peak_bytes, result.peak_bytes)
        told: dict[str, Any] = {"method": candidate.method, "knobs": dict(candidate.knobs)}
        told["seconds"] = sum(result.stages.values())
        value = None
        if isinstance(came, JobResult):
            if came.kind != "BadInput" or came.broken_lora:
                return replace(came, stages=self._stages)  # of the machine, or of every method: no candidate's fault
            self._failure = self._failure or came
            told["failed"] = came.reason
        else:
            scores = came.report["scores"]
            value = score_of(scores, self.job.knobs["by"])
            told |= {"score": value, **{name: scores[name] for name in ALIGNMENTS}}
            if value is not None and (self._leader is None or value > self._leader[0]):
                self._leader = (value, came)
        self._tried.append(told)
        enough = self.job.knobs["good_enough"]
        if value is not None and enough is not None and value >= enough:
            return self._won()
        return None if self._waiting else self._won()

    def _won(self) -> "Made | JobResult":
        if self._leader is None:
            return self._lost()
        _, made = self._leader
        by, enough = self.job.knobs["by"], self.job.knobs["good_enough"]
        told = {
            "method": made.job.method,
            "knobs": dict(made.job.knobs),
            "by": by,
            "good_enough": enough,
            "candidates": self._tried,
            "not_tried": [one.method for one in self._waiting],
        }
        result = replace(made.result, stages=self._stages, peak_bytes=self._peak_bytes)
        report = {**made.report, "best": told, "peak_bytes": self._peak_bytes}
        return replace(made, job=self.job, report=report, result=result)

    def _lost(self) -> "JobResult":
        if self._failure is None:
            reason = f"{self.job.pair}: no candidate has a {self.job.knobs['by']} score to be chosen by"
            return JobResult(self.job.job_id, "failed", "BadInput", reason, "", self._stages)
        reason = f"none of best's candidates came to a score; the first: {self._failure.reason}"
        return replace(self._failure, reason=reason, stages=self._stages)
