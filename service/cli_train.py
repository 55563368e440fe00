"""`ziplora train` and `ziplora train joint`: options and what is printed; the work is training.py's."""

import dataclasses
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from service.console import OUT, progress_bar, size_text, the_same_command
from service.errors import BadInput
from ziplora.train_settings import JointSettings, TrainSettings

if TYPE_CHECKING:
    from service.training import Order

F = TypeVar("F", bound=Callable[..., Any])
DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
RECENT = 50  # steps that the shown loss is the mean of: one step's depends mostly on its noise


def setting(flag: str, name: str, kind: Any, text: str) -> Callable[[F], F]:
    """An option for a field of TrainSettings, with the field's default."""
    default = DEFAULTS[name]
    return click.option(flag, name, type=kind, default=default, show_default=default is not None, help=text)


class TrainCommand(click.Command):
    """`train IMAGES …`, and `train joint …`; a directory of that name is `./joint`."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> click.Context:
        if args[:1] == [joint.name]:
            return joint.make_context(f"{info_name} {args[0]}", args[1:], *more, **extra)
        return super().make_context(info_name, args, *more, **extra)


def options(*many: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one, in this order."""

    def add(command: F) -> F:
        for option in reversed(many):
            command = option(command)
        return command

    return add


MODEL_OPTIONS = options(
    click.option("--base", required=True, help="Base model: a diffusers directory or a hub id."),
    click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write."),
)
SETTING_OPTIONS = options(
    setting("--rank", "rank", click.IntRange(1, 1024), "Rank of the update of each layer."),
    setting("--alpha", "alpha", click.FloatRange(min=0, min_open=True), "The update is scaled by alpha/rank; as rank."),
    setting("--steps", "steps", click.IntRange(min=1), "Updates in all."),
    setting("--batch", "batch", click.IntRange(min=1), "Pictures per update."),
    setting("--lr", "lr", click.FloatRange(min=0, min_open=True), "Learning rate."),
    setting("--lr-schedule", "lr_schedule", click.Choice(["constant", "cosine"]), "Learning rate over the steps."),
    setting("--seed", "seed", click.IntRange(0, 2**63 - 1), "Decides noise and order."),
    setting("--size", "size", click.IntRange(min=8), "Side of the pictures in pixels; as the base was trained."),
    click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time."),
    click.option(
        "--preview", multiple=True, metavar="PROMPT", help="Sample this on the way; may be given several times."
    ),
    click.option("--preview-every", default=100, type=click.IntRange(min=1), show_default=True, help="Steps."),
    click.option("--preview-steps", default=25, type=click.IntRange(min=1), show_default=True, help="Denoising steps."),
    click.option(
        "--save-every", default=100, type=click.IntRange(min=1), show_default=True, help="Steps to a checkpoint."
    ),
    click.option("--overwrite", is_flag=True, help="Start afresh, in place of an output or checkpoint that is there."),
    click.option("--device", default="auto", type=click.Choice(["auto", "cuda", "cpu"]), show_default=True),
    click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]), show_default=True),
    click.option(
        "--threads",
        default=1,
        type=click.IntRange(min=1),
        show_default=True,
        help="CPU threads. Another number gives other roundings.",
    ),
    click.option("--revision", help="Commit, branch or tag of a base that is a hub id."),
    click.option("--download", is_flag=True, help="Fetch a base that is a hub id and not in the local hub cache."),
)


@click.command(cls=TrainCommand)
@click.argument("images", type=click.Path(path_type=Path))
@MODEL_OPTIONS
@click.option("--prompt", required=True, help="What the pictures show, such as 'a photo of sks dog'.")
@click.option("--trigger", required=True, help="The words of the prompt that stand for it, such as 'sks dog'.")
@setting(
    "--class-prompt", "prior_prompt", str, "Prior preservation: keep what the base knows of, say, 'a photo of a dog'."
)
@setting("--class-images", "prior_images", click.IntRange(min=1), "Pictures of the class that the base makes first.")
@setting("--class-weight", "prior_weight", click.FloatRange(min=0), "Weight of the class in the loss.")
@SETTING_OPTIONS
def train(
    images: Path, base: str, out: Path, overwrite: bool, revision: str | None, download: bool, **given: Any
) -> int:
    """Train a LoRA (DreamBooth) on IMAGES: a directory of pictures of one subject, or a picture in one style.

    dog.txt beside dog.png is that picture's own caption, in place of the prompt. Pictures in different looks, each
    named in its caption, make a subject that carries into other styles.

    Running the same command again after a stop goes on from the last checkpoint, which lies beside the output.

    `ziplora train joint SUBJECT STYLE …` trains one LoRA on the pictures of both together.
    """
    from service.training import make_order

    settings, how = settings_of(TrainSettings, given)
    order = make_order(images, base, settings, out, revision=revision, download=download)
    return carry_out(order, f"pictures of {images}", overwrite, **how)


@click.command("joint")
@click.argument("subject", type=click.Path(path_type=Path))
@click.argument("style", type=click.Path(path_type=Path))
@MODEL_OPTIONS
@click.option("--prompt", required=True, help="What the subject's pictures show, such as 'a photo of sks dog'.")
@click.option("--trigger", required=True, help="The words of it that stand for the subject, such as 'sks dog'.")
@click.option("--style-prompt", required=True, help="What the style's show, such as 'a house in szn ink style'.")
@click.option("--style-trigger", required=True, help="The words of it that stand for the style: 'szn ink style'.")
@SETTING_OPTIONS
def joint(
    subject: Path,
    style: Path,
    base: str,
    out: Path,
    overwrite: bool,
    revision: str | None,
    download: bool,
    **given: Any,
) -> int:
    """Train one LoRA on the pictures of SUBJECT and of STYLE together, directories or single pictures.

    Half of the pictures that it sees are of either, however many there are. Captions beside the pictures and going on
    after a stop: as for `ziplora train`.
    """
    from service.training import make_joint_order

    settings, how = settings_of(JointSettings, given)
    order = make_joint_order(subject, style, base, settings, out, revision=revision, download=download)
    return carry_out(order, f"pictures of {subject} and {style}", overwrite, **how)


S = TypeVar("S", bound=TrainSettings)


def settings_of(kind: type[S], given: dict[str, Any]) -> tuple[S, dict[str, Any]]:
    """The settings among the options, and the other options. BadInput."""
    names = {field.name for field in dataclasses.fields(kind)}
    try:
        settings = kind(**{name: value for name, value in given.items() if name in names})
    except ValueError as error:
        raise BadInput(str(error)) from error
    return settings, {name: value for name, value in given.items() if name not in names}


def carry_out(
    order: "Order",
    what: str,
    overwrite: bool,
    *,
    preview: tuple[str, ...],
    preview_every: int,
    preview_steps: int,
    save_every: int,
    device: str,
    dtype: str,
    threads: int,
) -> int:
    """Train as ordered, from the checkpoint if there is one; the exit code."""
    from service.training import Previews, TrainingRun, is_done, triggers_of

    out, settings = order.out, order.settings
    if overwrite:
        order.out.unlink(missing_ok=True)
        order.checkpoint.unlink(missing_ok=True)
    if is_done(order):
        order.checkpoint.unlink(missing_ok=True)
        say(f"nothing to do: {out} is there already, trained like this to the end ({settings.steps} steps)")
        return 0
    beside = f"; not looked at: {', '.join(path.name for path in order.left_out)}" if order.left_out else ""
    prompts = (settings.prompt, settings.style_prompt) if isinstance(settings, JointSettings) else (settings.prompt,)
    own = sum(caption not in prompts for caption in order.captions)
    captions = f"; {own} with captions of their own" if own else ""
    say(f"training on {len(order.images)} {what}{captions}{beside}")
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
    triggers = ", ".join(f"'{trigger}'" for trigger in triggers_of(settings))
    say(f"wrote {written} ({size_text(written.stat().st_size)}): rank {settings.rank}, trigger {triggers}")
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
