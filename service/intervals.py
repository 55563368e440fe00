"""Means over a grid with intervals that respect its clusters: two pairs that share a LoRA are not two independent
observations."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

Cells = Mapping[tuple[str, str], float]  # (subject, style) → value, averaged over seeds


@dataclass(frozen=True, slots=True)
class Interval:
    """`low` and `high` bound the middle 95 % of the bootstrap's means; nan with fewer than two subjects or styles."""

    mean: float
    low: float
    high: float
    pairs: int

    def as_dict(self) -> dict[str, float | None]:
        return {name: None if value != value else value for name, value in asdict(self).items()}


def clustered(cells: Cells, *, resamples: int = 4000, seed: int = 0) -> Interval:
    """Subjects and styles are drawn anew, with replacement and independently of each other; a pair counts as often as
    its subject times its style was drawn (the pigeonhole bootstrap, Owen 2007, arXiv 0712.1111). Pairs may be missing.
    """
    if not cells:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    subjects = sorted({subject for subject, _ in cells})
    styles = sorted({style for _, style in cells})
    values = np.zeros((len(subjects), len(styles)))
    present = np.zeros_like(values)
    for (subject, style), value in cells.items():
        at = subjects.index(subject), styles.index(style)
        values[at], present[at] = value, 1.0
    mean = float(values.sum() / present.sum())
    if min(values.shape) < 2:
        return Interval(mean, float("nan"), float("nan"), len(cells))
    rng = np.random.default_rng(seed)
    a = rng.multinomial(len(subjects), [1 / len(subjects)] * len(subjects), size=resamples).astype(float)
    b = rng.multinomial(len(styles), [1 / len(styles)] * len(styles), size=resamples).astype(float)
    weight = ((a @ present) * b).sum(1)
    total = ((a @ values) * b).sum(1)
    means = total[weight > 0] / weight[weight > 0]  # a sparse grid can leave a draw without any pair
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(mean, float(low), float(high), len(cells))
