"""How mergers are changed by their gradients: Adam, or L-BFGS in coordinates in which a closed form is round.

A `Descent` is given the trainable mergers [merges, 2, in] by path and answers with a function that moves them, called
after each backward pass with the loss of every merge. Merges never see each other.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Update = Callable[
    [Tensor, bool], None
]  # given the loss [merges] at the mergers as they are, and whether it is the last
Descent = Callable[[Mapping[str, nn.Parameter]], Update]

# Default 1e-8 is not small here: the penalty's gradient, λ·m/(in·layers), is 1.4e-8 at SDXL's size, and eps would halve
# its updates there while leaving those of a miniature alone.
ADAM_EPSILON = 1e-15
PAIRS_KEPT = 10  # of steps and changes of the gradient


def adam(learning_rate: float) -> Descent:
    """Adam (arXiv 1412.6980) with β 0.9 and 0.999."""

    def begin(mergers: Mapping[str, nn.Parameter]) -> Update:
        optimizer = torch.optim.Adam(mergers.values(), lr=learning_rate, eps=ADAM_EPSILON)

        def update(_: Tensor, __: bool) -> None:
            optimizer.step()

        return update

    return begin


def whitened_lbfgs(factors: Sequence[Mapping[str, Tensor]]) -> Descent:
    """L-BFGS (Nocedal & Wright, Numerical Optimization, Alg. 7.4) on u, with m = m₀ + L⁻ᵀu.

    `factors[merge][path]` is L [2·in, 2·in], lower triangular, with L·Lᵀ close to the Hessian of that merge's loss in
    that layer's mergers: its Hessian in u is close to 1 within each layer, and −gradient nearly Newton's step. The
    loss must be of the same draws every time. A step that does not lower it is taken back and a shorter one tried; the
    last update only sees to it that nothing is left worse than it was, so n updates make n − 1 steps.
    """

    def begin(mergers: Mapping[str, nn.Parameter]) -> Update:
        return _WhitenedLBFGS(mergers, factors).update

    return begin


class _WhitenedLBFGS:
    """u and its gradient as one row per merge, [merges, Σ 2·in]."""

    def __init__(self, mergers: Mapping[str, nn.Parameter], factors: Sequence[Mapping[str, Tensor]]) -> None:
        self.mergers = mergers
        # a copy only of what is to be solved side by side
        self.factors = {
            path: factors[0][path][None] if len(factors) == 1 else torch.stack([one[path] for one in factors])
            for path in mergers
        }
        self.best: Tensor | None = None  # the lowest loss so far [merges], and its gradient
        self.gradient: Tensor
        self.offset: Tensor  # from there to where the mergers are
        self.scale: Tensor  # of H [merges, 1]
        self.steps: list[Tensor] = []
        self.changes: list[Tensor] = []

    def update(self, loss: Tensor, last: bool) -> None:
        gradient = self._whitened_gradient()
        if self.best is None:
            better = torch.ones_like(loss, dtype=torch.bool)
            self.best, self.gradient, self.offset = loss, gradient, torch.zeros_like(gradient)
            self.scale = torch.full_like(gradient[:, :1], 1 / len(self.mergers))
        else:
            better = loss <= self.best
            self._remember(self.offset, gradient - self.gradient)
        chosen = better[:, None]
        self.best = torch.where(better, loss, self.best)
        self.gradient = torch.where(chosen, gradient, self.gradient)
        step = torch.zeros_like(gradient) if last else self._direction(self.gradient)
        # what the failed step has shown of the curvature is known by now; half of it is the most that is tried again
        length, most = step.norm(dim=1, keepdim=True), self.offset.norm(dim=1, keepdim=True) / 2
        shorter = step * (most / length.clamp_min(1e-30)).clamp_max(1.0)
        self._move(torch.where(chosen, step, shorter - self.offset))
        self.offset = torch.where(chosen, step, shorter)

    def _remember(self, step: Tensor, change: Tensor) -> None:
        """Only where it curves upwards, as it must for a descent direction; a row of zeros counts for nothing."""
        good = (step * change).sum(1, keepdim=True) > 1e-8 * change.square().sum(1, keepdim=True)
        scale = _ratio((step * change).sum(1), change.square().sum(1))[:, None]
        self.scale = torch.where(good, scale, self.scale)
        self.steps = [*self.steps, step * good][-PAIRS_KEPT:]
        self.changes = [*self.changes, change * good][-PAIRS_KEPT:]

    def _direction(self, gradient: Tensor) -> Tensor:
        """−H·gradient by the two loops. The factors know of one layer at a time: where n layers err together the
        curvature is up to n times theirs, so H starts at 1/n; then at the curvature last seen."""
        q, alphas = gradient.clone(), []
        for step, change in zip(reversed(self.steps), reversed(self.changes), strict=True):
            alpha = _ratio((step * q).sum(1), (step * change).sum(1))
            q -= alpha[:, None] * change
            alphas.append(alpha)
        q *= self.scale
        for step, change, alpha in zip(self.steps, self.changes, reversed(alphas), strict=True):
            q += (alpha - _ratio((change * q).sum(1), (step * change).sum(1)))[:, None] * step
        return -q

    @torch.no_grad()
    def _move(self, step: Tensor) -> None:
        """m += L⁻ᵀ·step."""
        parts = step.split([parameter[0].numel() for parameter in self.mergers.values()], 1)
        for (path, parameter), part in zip(self.mergers.items(), parts, strict=True):
            moved = torch.linalg.solve_triangular(self.factors[path].mT, part[..., None], upper=True)
            parameter.add_(moved.view_as(parameter))

    def _whitened_gradient(self) -> Tensor:
        """L⁻¹·∂loss/∂m."""
        rows = []
        for path, parameter in self.mergers.items():
            assert parameter.grad is not None
            gradient = parameter.grad.flatten(1)[..., None]
            rows.append(torch.linalg.solve_triangular(self.factors[path], gradient, upper=False).flatten(1))
        return torch.cat(rows, 1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below != 0, above / torch.where(below != 0, below, torch.ones_like(below)), 0.0)
