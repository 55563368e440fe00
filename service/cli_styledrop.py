"""`ziplora styledrop`: options and what is printed; the work is styledrop.py's."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli_train import interruption, say
from service.console import OUT, progress_bar, the_same_command
from service.errors import BadInput

if TYPE_CHECKING:
    from service.styledrop import StyleDropOrder

MADE = ("subject.safetensors", "style.safetensors", "style-round-1.safetensors")


@click.command()
@click.option("--base", required=True, help="A masked-token model: an aMUSEd directory or cached hub id.")
@click.option("--subject", required=True, type=click.Path(path_type=Path), help="Pictures of the subject.")
@click.option("--subject-prompt", required=True, help="What they show, such as 'a photo of sks dog'.")
@click.option("--subject-trigger", required=True, help="The words that stand for it, such as 'sks dog'.")
@click.option("--style", required=True, type=click.Path(path_type=Path), help="A picture in the style.")
@click.option("--style-prompt", required=True, help="Its content and style, such as 'a mushroom in szn style'.")
@click.option("--style-trigger", required=True, help="The words that stand for the style, such as 'szn style'.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory to write to.")
@click.option("--prompt", "prompts", multiple=True, default=("a {subject} in {style}",), show_default=True)
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(0), default=(0, 1, 2, 3), show_default=True)
@click.option("--steps", default=12, type=click.IntRange(1), show_default=True, help="Steps of sampling.")
@click.option("--subject-weight", default=0.5, show_default=True, help="Of the subject's adapter in sampling.")
@click.option("--style-weight", default=0.5, show_default=True, help="Of the style's.")
@click.option("--contrast", default=0.0, show_default=True, help="Away from the base, towards the adapters.")
@click.option("--text", default=9.0, show_default=True, help="Towards the prompt: a guidance scale, less 1.")
@click.option("--rank", default=16, type=click.IntRange(1, 1024), show_default=True, help="Of both adapters.")
@click.option("--train-steps", default=1500, type=click.IntRange(1), show_default=True, help="Updates of each.")
@click.option("--batch", default=1, type=click.IntRange(1), show_default=True, help="Pictures per update.")
@click.option("--lr", default=4e-4, show_default=True, help="Learning rate.")
@click.option("--train-seed", default=0, type=click.IntRange(0), show_default=True)
@click.option("--feedback-clip", metavar="CLIP", help="Second round for the style; this CLIP picks its pictures.")
@click.option("--content", "contents", multiple=True, help="What the first round draws in the style, to be picked.")
@click.option("--keep", default=8, type=click.IntRange(1), show_default=True, help="Pictures to pick.")
@click.option("--per-content", default=4, type=click.IntRange(1), show_default=True, help="Made of each content.")
@click.option("--style-share", default=0.5, show_default=True, help="Of the style in a pick's score; text the rest.")
@click.option("--overwrite", is_flag=True, help="Train adapters afresh, in place of those that are there.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cuda", "cpu"]), show_default=True)
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]), show_default=True)
@click.option("--threads", default=1, type=click.IntRange(1), show_default=True, help="CPU threads.")
def styledrop(out: Path, overwrite: bool, device: str, dtype: str, threads: int, **options: Any) -> int:
    """Pictures of a subject in a style by StyleDrop with DreamBooth (arXiv 2306.00983), on a masked-token model.

    Trains an adapter for each, combines their logits as pictures are sampled, and writes OUT/*.png and recipe.json.
    This is no merge of LoRAs: there is no file for another tool. Adapters that are there already are used again, so
    other weights, prompts and seeds cost sampling alone.
    """
    from service.styledrop import load

    if overwrite:
        for name in MADE:
            (out / name).unlink(missing_ok=True)
    run = load(_order(out, options), device=device, dtype=dtype, threads=threads)
    with interruption() as interrupted, progress_bar() as bar:
        for stage in run:
            if len(stage.steps) == 0:
                say(stage.name, bar)
                continue
            task = bar.add_task(stage.name, total=len(stage.steps))
            every = max(1, len(stage.steps) // 5)
            for i, line in enumerate(stage.steps, 1):
                bar.update(task, completed=i, description=f"{stage.name}: {line}")
                if not OUT.is_terminal and (i % every == 0 or i == len(stage.steps)):
                    say(f"{stage.name}, {i} of {len(stage.steps)}: {line}")
                if interrupted.is_set():
                    say(f"interrupted in {stage.name}; finished adapters are kept. To go on: {the_same_command()}")
                    return 130
    say(f"wrote {len(run.order.prompts) * len(run.order.seeds)} pictures and recipe.json to {out}")
    return 0


def _order(out: Path, options: dict[str, Any]) -> "StyleDropOrder":
    from service.styledrop import Concept, FeedbackOrder, StyleDropOrder
    from ziplora.styledrop_knobs import CONTENTS, AdapterSettings, FeedbackSettings, Mixture

    subject, style = (
        Concept(role, options[role], options[f"{role}_prompt"], options[f"{role}_trigger"])
        for role in ("subject", "style")
    )
    feedback = None
    prompts = tuple(f"{content} in {style.trigger}" for content in options["contents"] or CONTENTS)
    numbers = tuple(options[name] for name in ("keep", "per_content", "style_share", "steps", "contrast", "text"))
    try:
        if options["feedback_clip"]:
            feedback = FeedbackOrder(options["feedback_clip"], FeedbackSettings(prompts, *numbers))
        return StyleDropOrder(
            options["base"],
            subject,
            style,
            out,
            AdapterSettings(
                options["rank"], options["train_steps"], options["batch"], options["lr"], options["train_seed"]
            ),
            Mixture(options["subject_weight"], options["style_weight"], options["contrast"], options["text"]),
            options["prompts"],
            options["seeds"],
            options["steps"],
            feedback,
        )
    except ValueError as error:
        raise BadInput(str(error)) from error
