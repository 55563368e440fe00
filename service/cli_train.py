"""`ziplora train`: options and what is printed; the work is training.py's."""

import dataclasses
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from service.console import OUT, progress_bar, size_text, the_same_command
from service.errors import BadInput
from ziplora.train_settings import TrainSettings

F = TypeVar("F", bound=Callable[..., Any])
DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
RECENT = 50  # steps that the shown loss is the mean of: one step's depends mostly on its noise


def setting(flag: str, name: str, kind: Any, text: str) -> Callable[[F], F]:
    """An option for a field of TrainSettings, with the field's default."""
    default = DEFAULTS[name]
    return click.option(flag, name, type=kind, default=default, show_default=default is not None, help=text)


@click.command()
@click.argument("images", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="Base model: a diffusers directory or a hub id.")
@click.option("--prompt", required=True, help="What the pictures show, such as 'a photo of sks dog'.")
@click.option("--trigger", required=True, help="The words of the prompt that stand for it, such as 'sks dog'.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write.")
@setting("--rank", "rank", click.IntRange(1, 1024), "Rank of the update of each layer.")
@setting("--alpha", "alpha", click.FloatRange(min=0, min_open=True), "The update is scaled by alpha/rank; as rank.")
@setting("--steps", "steps", click.IntRange(min=1), "Updates in all.")
@setting("--batch", "batch", click.IntRange(min=1), "Pictures per update.")
@setting("--lr", "lr", click.FloatRange(min=0, min_open=True), "Learning rate.")
@setting("--lr-schedule", "lr_schedule", click.Choice(["constant", "cosine"]), "Learning rate over the steps.")
@setting("--seed", "seed", click.IntRange(0, 2**63 - 1), "Decides noise and order.")
@setting("--size", "size", click.IntRange(min=8), "Side of the pictures in pixels; as the base was trained.")
@setting(
    "--class-prompt", "prior_prompt", str, "Prior preservation: keep what the base knows of, say, 'a photo of a dog'."
)
@setting("--class-images", "prior_images", click.IntRange(min=1), "Pictures of the class that the base makes first.")
@setting("--class-weight", "prior_weight", click.FloatRange(min=0), "Weight of the class in the loss.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option("--preview", multiple=True, metavar="PROMPT", help="Sample this on the way; may be given several times.")
@click.option("--preview-every", default=100, type=click.IntRange(min=1), show_default=True, help="Steps.")
@click.option("--preview-steps", default=25, type=click.IntRange(min=1), show_default=True, help="Denoising steps.")
@click.option("--save-every", default=100, type=click.IntRange(min=1), show_default=True, help="Steps to a checkpoint.")
@click.option("--overwrite", is_flag=True, help="Start afresh, in place of an output or checkpoint that is there.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cuda", "cpu"]), show_default=True)
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]), show_default=True)
@click.option(
    "--threads",
    default=1,
    type=click.IntRange(min=1),
    show_default=True,
    help="CPU threads. Another number gives other roundings.",
)
@click.option("--revision", help="Commit, branch or tag of a base that is a hub id.")
@click.option("--download", is_flag=True, help="Fetch a base that is a hub id and not in the local hub cache.")
def train(
    images: Path,
    base: str,
    out: Path,
    preview: tuple[str, ...],
    preview_every: int,
    preview_steps: int,
    save_every: int,
    overwrite: bool,
    device: str,
    dtype: str,
    threads: int,
    revision: str | None,
    download: bool,
    **fields: Any,
) -> int:
    """Train a LoRA (DreamBooth) on IMAGES: a directory of pictures of one subject, or a picture in one style.

    dog.txt beside dog.png is that picture's own caption, in place of the prompt. Pictures in different looks, each
    named in its caption, make a subject that carries into other styles.

    Running the same command again after a stop goes on from the last checkpoint, which lies beside the output.
    """
    from service.training import Previews, TrainingRun, is_done, make_order

    try:
        settings = TrainSettings(**fields)
    except ValueError as error:
        raise BadInput(str(error)) from error
    order = make_order(images, base, settings, out, revision=revision, download=download)
    if overwrite:
        order.out.unlink(missing_ok=True)
        order.checkpoint.unlink(missing_ok=True)
    if is_done(order):
        order.checkpoint.unlink(missing_ok=True)
        say(f"nothing to do: {out} is there already, trained like this to the end ({settings.steps} steps)")
        return 0
    beside = f"; not looked at: {', '.join(path.name for path in order.left_out)}" if order.left_out else ""
    own = sum(caption != settings.prompt for caption in order.captions)
    captions = f"; {own} with captions of their own" if own else ""
    say(f"training on {len(order.images)} pictures of {images}{captions}{beside}")
    if settings.prior_prompt:
        say(f"the base makes {settings.prior_images} pictures of '{settings.prior_prompt}' first")
    previews = Previews(preview, preview_every, preview_steps)
    with TrainingRun(
        order, device=device, dtype=dtype, threads=threads, save_every=save_every, previews=previews
    ) as run:
        if run.step:
            say(f"going on after step {run.step}, from {order.checkpoint}")
        if not followed(run, settings.steps):
            run.save()
            say(
                f"interrupted after step {run.step} of {settings.steps}, which is saved. To go on: {the_same_command()}"
            )
            return 130
        written = run.write()
    say(f"wrote {written} ({size_text(written.stat().st_size)}): rank {settings.rank}, trigger '{settings.trigger}'")
    return 0


def followed(run: Any, steps: int) -> bool:
    """Do the steps that are left, shown as a bar on a terminal and as ten lines elsewhere; False when interrupted."""
    recent: deque[float] = deque(maxlen=RECENT)
    with interruption() as interrupted, progress_bar() as bar:
        task = bar.add_task("training", total=steps, completed=run.step)
        for step in run:
            recent.append(step.loss)
            loss = f"loss {sum(recent) / len(recent):.4f}"
            bar.update(task, completed=step.step, description=loss)
            if not OUT.is_terminal and (step.step % max(1, steps // 10) == 0 or step.step == steps):
                say(f"step {step.step} of {steps}: {loss}")
            for path in step.written:
                say(f"step {step.step}: {path}", bar)
            if interrupted.is_set() and step.step < steps:
                return False
    return True


@contextmanager
def interruption() -> Iterator[threading.Event]:
    """Set by SIGINT or SIGTERM, so that a step is finished and saved; a second one ends at once."""
    event = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str, bar: Any = None) -> None:
    console = bar.console if bar is not None and OUT.is_terminal else OUT
    console.print(line, soft_wrap=True)
