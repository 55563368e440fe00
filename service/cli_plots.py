"""`ziplora inspect --plot`: what LoRAs look like inside, as figures and as a few numbers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.console import OUT
from service.errors import BadInput

if TYPE_CHECKING:
    from ziplora.diagnose import Sparsity


def plotted(file: Path, plot: Path, beside: Path | None, mergers: Path | None) -> None:
    """Write the figures that these files allow, named after `plot`, and print what they show in numbers. BadInput where
    there is nothing to show.

    A published merge is taken apart into its two halves, which its mergers are part of already; other files are one
    LoRA, to be compared with `beside`.
    """
    try:
        from ziplora import plots
    except ImportError as error:
        raise click.UsageError("figures need matplotlib: pip install 'ziplora[plots]'") from error
    from ziplora import diagnose
    from ziplora.formats import read_lora, read_mergers
    from ziplora.lora import max_rank, zipped

    if plot.suffix.lower() not in plots.SUFFIXES:
        raise click.UsageError(f"{plot}: figures are written as {' or '.join(plots.SUFFIXES)}")
    read = read_lora(file)
    loras = {file.stem: read.lora}
    rank = read.metadata.get("ziplora.subject_rank", "")
    apart = beside is None and rank.isdecimal() and int(rank) < max_rank(read.lora)  # else the style has no rows
    if beside is not None:
        loras[beside.stem if beside.stem != file.stem else str(beside)] = read_lora(beside).lora
    elif apart:
        loras = dict(zip(("subject half", "style half"), diagnose.parts_of(read.lora, int(rank)), strict=True))
    read_back = None if mergers is None else read_mergers(mergers)
    try:
        found = {name: diagnose.sparsity(lora) for name, lora in loras.items()}
    except ValueError as error:
        raise BadInput(f"{file}: {error}") from error
    with writing(plot):
        plots.plot_sparsity(found, plot)
    said(plot, [f"{name}: {summary(one)}" for name, one in found.items()])
    if len(loras) == 2:
        subject, style = loras.values()
        cases = {"merged" if apart else "as they are": diagnose.interference(subject, style)}
        if read_back is not None and not apart:
            cases["merged"] = diagnose.interference(*zipped(subject, style, read_back))
        target = plot.with_stem(f"{plot.stem}-interference")
        with writing(target):
            plots.plot_interference(cases, target)
        said(target, [f"interference {name}: {mean(values):.3f}, mean of the layers" for name, values in cases.items()])
    if read_back is not None:
        target = plot.with_stem(f"{plot.stem}-mergers")
        with writing(target):
            plots.plot_mergers(read_back, target)
        said(target, [f"cosine of m_c and m_s: {mean(diagnose.merger_cosine(read_back)):.3f}, mean of the layers"])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.UsageError(f"{path} cannot be written: {error.strerror}") from error


def summary(one: "Sparsity") -> str:
    ranks = sorted(set(one.rank.values()))
    return (
        f"{one.below[0.1]:.0%} of the elements are below a tenth of their layer's largest; without the smallest 80 %"
        f" {one.energy_left[0.8]:.0%} of ‖ΔW‖² are left; effective rank {mean(one.effective_rank):.1f}"
        f" of {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}"
    )


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / max(1, len(values))


def said(path: Path, lines: list[str]) -> None:
    OUT.print(str(path), soft_wrap=True)
    for line in lines:
        OUT.print(f"  {line}", soft_wrap=True)
