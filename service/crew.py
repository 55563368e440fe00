"""How many workers a run has, and on what machines. Values only; no Ray."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.errors import BadInput
from service.wording import some


@dataclass(frozen=True, slots=True)
class Crew:
    """`least` and `most` workers; None: as many as there are GPUs, or one. Between the two, the run takes as many as
    the work that is left is worth.

    `gpus` of each: None is one where there are any, and a whole one; less is a part of one that several share, which
    must be asked for. `accelerator_type` as Ray names it (A100, H100, …), `labels` of nodes: the only ones that workers
    may run on.
    """

    least: int | None = None
    most: int | None = None
    gpus: float | None = None
    accelerator_type: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_elastic(self) -> bool:
        return self.most is not None and self.least != self.most

    def check(self) -> None:
        """BadInput for what no cluster could give."""
        if self.least and self.most and self.least > self.most:
            raise BadInput(f"at least {self.least} workers and at most {self.most}: give --min-workers ≤ --max-workers")
        if self.gpus is not None and not 0 < self.gpus <= 1:
            raise BadInput(
                f"--gpus-per-worker {self.gpus:g}: a worker uses one GPU at most; expected 1, or a part such as 0.5"
                " where several workers shall share a GPU and its memory"
            )

    def check_nodes(self, nodes: list[Mapping[str, float]], labels: list[Mapping[str, str]]) -> None:
        """BadInput where no worker would ever start, or several would share a GPU unasked. `nodes`: resources of each.
        A cluster that grows may yet get what it lacks."""
        parts = [node["GPU"] for node in nodes if node.get("GPU", 0) % 1]
        if parts and self.gpus is None:
            raise BadInput(
                f"a node offers {parts[0]:g} GPUs, and a worker takes a whole one, as its memory is not shared out:"
                " start Ray there with --num-gpus of a whole number, or give --gpus-per-worker 0.5"
            )
        if self.is_elastic:
            return
        types = sorted(
            {name.partition(":")[2] for node in nodes for name in node if name.startswith("accelerator_type:")}
        )
        if self.accelerator_type and types and self.accelerator_type not in types:
            raise BadInput(f"no node has the accelerator type {self.accelerator_type}; there are: {some(types)}")
        for name, value in self.labels.items():
            there = sorted({own[name] for own in labels if name in own})
            if there and value not in there:
                raise BadInput(f"no node has the label {name}={value}; there are: {some(there)}")

    def begin_with(self, there: int, jobs: int | None) -> int:
        """Workers to start with, where there is room for so many."""
        wanted = self.aim(there) if self.is_elastic else self.most or there or 1
        return max(1, min(wanted, jobs or wanted))

    def aim(self, wanted: int) -> int:
        """Within its limits."""
        return max(self.least or 1, min(wanted, self.most or 1))
