"""Joint training: one LoRA that learns a subject and a style together, the paper's strongest baseline.

DreamBooth (arXiv 2208.12242) with two sets of instances, each under its own prompts. With c the subject and s the
style, x an encoded picture of either, p its caption, x_t the picture noised to time t, it minimises

    L = ½ Σ_{k ∈ {c, s}} E_{(x, p) ∈ k, ε, t} ‖ε(x_t, p) − ε‖²

(arXiv 2311.13600v2, Sec. 5, compares with it and gives no equation). The halves are exact, not an expectation: the
pictures of a training are by turns one of the subject and one of the style, whatever their numbers, else a style with
its single picture would be all but forgotten beside a subject with five.
"""

from collections.abc import Sequence

from ziplora.base import Base
from ziplora.lora import LoRA
from ziplora.merged import Merged, Pair, Pictures
from ziplora.train import Training, finite_steps
from ziplora.train_settings import JointKnobs

RECENT = 50  # steps that the reported loss is the mean of: one step's depends mostly on its noise


def joint(base: Base, pairs: Sequence[Pair], knobs: JointKnobs) -> list[Merged]:
    """One LoRA for each pair, trained on `pair.pictures`; neither of its LoRAs is looked at, nor their weights.

    Subject and style are not apart in it. ValueError for a pair without pictures, ArithmeticError when the loss is no
    number, MemoryError.
    """
    return [_trained(base, pair, knobs) for pair in pairs]


def joint_training(base: Base, pictures: Pictures, knobs: JointKnobs) -> Training:
    """The training, to be iterated: for those who report, save and resume."""
    subject, style = pictures.subject, pictures.style
    for name, instances in (("subject", subject), ("style", style)):
        if not instances.images:
            raise ValueError(f"the {name} has no pictures, and joint training learns from those of both: give it some")
    return Training(
        base,
        (*subject.images, *style.images),
        knobs.settings((subject.prompt, subject.trigger), (style.prompt, style.trigger), pictures.seed),
        captions=(*subject.captions, *style.captions),
        sets=(0,) * len(subject.images) + (1,) * len(style.images),
    )


def jointly_merged(training: Training, losses: Sequence[float]) -> Merged:
    """The finished training as a merge; `losses` of its last steps."""
    recent = losses[-RECENT:]
    loss = {"loss": sum(recent) / len(recent)} if recent else {}
    return Merged(training.lora(), LoRA({}), None, {"steps": training.step, **loss})


def _trained(base: Base, pair: Pair, knobs: JointKnobs) -> Merged:
    if pair.pictures is None:
        raise ValueError("joint training learns from pictures of subject and style, and was given none")
    with joint_training(base, pair.pictures, knobs) as training:
        return jointly_merged(training, [step.loss for step in finite_steps(training)])
