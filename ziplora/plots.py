"""Figures of what `ziplora.diagnose` finds, as PNG or SVG by the file's suffix. Owns matplotlib, an optional dependency
(`pip install 'ziplora[plots]'`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: no window system, no state that outlives the figure

from ziplora.diagnose import BINS, Sparsity, by_block, merger_histograms
from ziplora.lora import Mergers

SUFFIXES = (".png", ".svg")
SUBJECT, STYLE, OTHER = (
    "#0072B2",
    "#D55E00",
    "#555555",
)  # told apart by people who see colours otherwise (Okabe and Ito)


def plot_sparsity(found: Mapping[str, Sparsity], path: Path) -> None:
    """For each LoRA (name → Sparsity): share of small elements, energy left without the smallest, effective rank."""
    figure, (below, energy, rank) = _figure(3)
    for number, (name, one) in enumerate(found.items()):
        colour = (SUBJECT, STYLE, OTHER)[number % 3]
        below.plot(list(one.below), list(one.below.values()), "o-", color=colour, label=name)
        energy.plot(list(one.energy_left), list(one.energy_left.values()), "o-", color=colour, label=name)
        blocks = by_block(one.effective_rank)
        rank.plot(range(len(blocks)), list(blocks.values()), "o-", color=colour, label=name)
        rank.set_xticks(range(len(blocks)), list(blocks), rotation=45, ha="right")
    below.set(xscale="log", xlabel="share of the layer's largest |ΔW|", ylabel="share of elements below it")
    energy.set(xlabel="share of the smallest elements dropped", ylabel="‖ΔW‖² left", ylim=(0, 1.02))
    rank.set(ylabel="effective rank, mean of the block")
    rank.set_ylim(bottom=0)
    _save(figure, path)


def plot_dropped(found: Mapping[str, Mapping[float, float]], path: Path, ylabel: str) -> None:
    """A score against the share of the smallest |ΔW| that was dropped, for each LoRA (name → share → score); share 1 is
    the base model alone."""
    figure, (axes,) = _figure(1)
    for number, (name, scores) in enumerate(found.items()):
        colour, line = (SUBJECT, STYLE)[number % 2], ("-", "--", ":")[number // 2 % 3]
        axes.plot(list(scores), list(scores.values()), f"o{line}", color=colour, label=name)
    axes.set(xlabel="share of the smallest |ΔW| dropped (1: no LoRA)", ylabel=ylabel)
    _save(figure, path)


def plot_interference(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """By block, for each case such as `before` and `after` → layer → `diagnose.interference`."""
    figure, (axes,) = _figure(1)
    width = 0.8 / max(1, len(found))
    for number, (name, layers) in enumerate(found.items()):
        blocks = by_block(layers)
        places = [place + number * width for place in range(len(blocks))]
        axes.bar(places, list(blocks.values()), width, color=(OTHER, SUBJECT, STYLE)[number % 3], label=name)
        axes.set_xticks(range(len(blocks)), list(blocks), rotation=45, ha="right")
    axes.set(ylabel="interference, mean of the block")
    _save(figure, path)


def plot_mergers(mergers: Mergers, path: Path, low: float = -0.5, high: float = 1.5) -> None:
    """A histogram of the coefficients for each block."""
    histograms = merger_histograms(mergers, low, high)
    figure, all_axes = _figure(len(histograms))
    edges = [low + (high - low) * number / BINS for number in range(BINS)]
    for axes, (block, (subject, style)) in zip(all_axes, histograms.items(), strict=True):
        axes.step(edges, subject.tolist(), where="post", color=SUBJECT, label="subject")
        axes.step(edges, style.tolist(), where="post", color=STYLE, label="style")
        axes.set(title=block, xlabel="coefficient", ylabel="columns")
    _save(figure, path)


def _figure(n: int) -> tuple[Any, Any]:
    columns = min(n, 4)
    rows = -(-n // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(n)]


def _save(figure: Any, path: Path) -> None:
    """ValueError for a suffix that is none of SUFFIXES."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: figures are written as {' or '.join(SUFFIXES)}")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    if len(figure.axes[0].get_legend_handles_labels()[0]) > 1:
        figure.axes[0].legend(frameon=False)
    # equal content, equal bytes: without the time and the generated ids that an SVG otherwise holds
    with rc_context({"svg.hashsalt": "ziplora"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else {})
