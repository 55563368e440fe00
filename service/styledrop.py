"""StyleDrop + DreamBooth on a masked-token model, as a command does it: two adapters trained, each once, then pictures
from both, with the recipe that made them. There is no merged file: the adapters meet in the logits of each step."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import BadInput
from service.files import local_errors, make_directories, replacing
from service.steps import Steps
from service.training import picture_digest
from ziplora.train_settings import TrainSettings, image_paths, read_captions

if TYPE_CHECKING:
    from ziplora.lora import LoRA
    from ziplora.masked import MaskedBase
    from ziplora.score import Judge
    from ziplora.styledrop import AdapterTraining, Feedback
    from ziplora.styledrop_knobs import AdapterSettings, FeedbackSettings, Mixture

REQUEST_KEY = "ziplora.adapter.request"  # of an adapter's header: what decided it, as JSON


@dataclass(frozen=True, slots=True)
class Concept:
    """A subject or a style: pictures (a directory or a file), what they show, and the words of it that stand for it."""

    role: str
    images: Path
    prompt: str
    trigger: str


@dataclass(frozen=True, slots=True)
class FeedbackOrder:
    """The second round for the style; `clip` picks its pictures."""

    clip: str
    settings: "FeedbackSettings"


@dataclass(frozen=True, slots=True)
class StyleDropOrder:
    """`prompts`: templates with {subject} and {style}, each sampled with every seed."""

    base: str
    subject: Concept
    style: Concept
    out: Path
    settings: "AdapterSettings"
    weights: "Mixture"
    prompts: tuple[str, ...] = ("a {subject} in {style}",)
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    steps: int = 12
    feedback: FeedbackOrder | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the work, done as its steps are taken; each step gives a line to show."""

    name: str
    steps: Steps[str]


@dataclass(slots=True)
class StyleDropRun:
    """An order being carried out with a loaded base; iterating gives its stages, which must be done in turn.

    An adapter that is there already, trained just so, is taken as it is.
    """

    order: StyleDropOrder
    base: "MaskedBase"
    base_digest: str
    judge: "Judge | None" = None
    adapters: dict[str, "LoRA"] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Stage]:
        order = self.order
        with local_errors(order.out):
            make_directories(order.out)
        yield self._training("subject", order.subject)
        if order.feedback is None:
            yield self._training("style", order.style)
        else:
            yield self._training("style-round-1", order.style)
            yield self._second_round(order.feedback)
        n = len(order.prompts) * len(order.seeds)
        yield Stage("pictures", Steps(n, self._pictures))

    def _training(self, name: str, concept: Concept) -> Stage:
        from ziplora.styledrop import AdapterTraining
        from ziplora.train import read_images

        paths, captions = _pictures_of(concept)
        request = self._request({"images": [picture_digest(path) for path in paths], "captions": captions})

        def training() -> "AdapterTraining":
            images = [image for path in paths for image in read_images(path)]
            return AdapterTraining(self.base, images, captions, self.order.settings)

        return self._adapter(name, request, training)

    def _second_round(self, wanted: FeedbackOrder) -> Stage:
        from ziplora.styledrop import feedback, second_round
        from ziplora.train import read_images

        order = self.order
        first = self.records["style-round-1"]
        judge = self.judge
        if judge is None:
            raise BadInput("feedback needs a CLIP to score with: name one")
        request = self._request({"first": first, "feedback": asdict(wanted.settings), "judge": judge.digest})

        def training() -> "AdapterTraining":
            paths, captions = _pictures_of(order.style)
            images = [image for path in paths for image in read_images(path)]
            chosen = feedback(
                self.base,
                self.adapters["style-round-1"],
                images,
                judge,
                wanted.settings,
                seed=order.settings.seed,
            )
            self._write_feedback(chosen)
            return second_round(self.base, images, captions, chosen, order.settings)

        return self._adapter("style", request, training)

    def _adapter(self, name: str, request: dict[str, Any], training: Callable[[], "AdapterTraining"]) -> Stage:
        path = self.order.out / f"{name}.safetensors"
        found = _there(path, request)
        self.records[name] = {"file": path.name, **request}
        if found is not None:
            self.adapters[name] = found
            return Stage(f"{name} adapter: there already", Steps(0, lambda: iter(())))

        def work() -> Iterator[str]:
            from ziplora.adapter_files import write_adapter

            with training() as steps:
                for step in steps:
                    yield f"loss {step.loss:.4f}"
                self.adapters[name] = steps.adapter()
                metadata = steps.metadata() | {REQUEST_KEY: json.dumps(request, sort_keys=True)}
            with local_errors(path), replacing(path) as file:
                file.write(write_adapter(self.adapters[name], metadata))

        return Stage(f"{name} adapter", Steps(self.order.settings.steps, work))

    def _write_feedback(self, chosen: "Sequence[Feedback]") -> None:
        folder = self.order.out / "feedback"
        with local_errors(folder):
            make_directories(folder)
            for i, one in enumerate(chosen):
                with replacing(folder / f"{i}.png") as file:
                    one.image.save(file, "PNG")
                with replacing(folder / f"{i}.txt") as file:
                    file.write(f"{one.prompt}\n".encode())
        self.records["feedback"] = {"scores": [round(one.score, 6) for one in chosen]}

    def _pictures(self) -> Iterator[str]:
        from ziplora.styledrop import sample_mixture

        order = self.order
        words = {"subject": order.subject.trigger, "style": order.style.trigger}
        wanted = [(prompt.format(**words), seed) for prompt in order.prompts for seed in order.seeds]
        pictures = sample_mixture(
            self.base,
            self.adapters["subject"],
            self.adapters["style"],
            [prompt for prompt, _ in wanted],
            [seed for _, seed in wanted],
            order.weights,
            steps=order.steps,
        )
        made = []
        for i, (picture, (prompt, seed)) in enumerate(zip(pictures, wanted, strict=True)):
            path = order.out / f"{i // len(order.seeds)}-{seed}.png"
            with local_errors(path), replacing(path) as file:
                picture.save(file, "PNG")
            made.append({"file": path.name, "prompt": prompt, "seed": seed})
            yield path.name
        self._write_recipe(made)

    def _write_recipe(self, made: list[dict[str, Any]]) -> None:
        from ziplora.styledrop import PAPER

        order = self.order
        recipe = {
            "method": "styledrop",
            "paper": PAPER,
            "base": {"location": order.base, "transformer": self.base_digest},
            "adapters": {name: record for name, record in self.records.items() if name != "feedback"},
            "feedback": self.records.get("feedback"),
            "weights": asdict(order.weights),
            "steps": order.steps,
            "pictures": made,
        }
        path = order.out / "recipe.json"
        with local_errors(path), replacing(path) as file:
            file.write(json.dumps(recipe, indent=1).encode() + b"\n")

    def _request(self, own: dict[str, Any]) -> dict[str, Any]:
        request = {**own, "settings": asdict(self.order.settings), "base": self.base_digest}
        read_back: dict[str, Any] = json.loads(json.dumps(request))  # tuples are lists then, as in a file
        return read_back


def load(order: StyleDropOrder, *, device: str, dtype: str, threads: int) -> StyleDropRun:
    """Check what needs no model, then load. BadInput in one line."""
    import torch

    from ziplora.masked import load_masked
    from ziplora.score import digest, load_clip

    for concept in (order.subject, order.style):
        _pictures_of(concept)
    for prompt in order.prompts:
        _check_template(prompt)
    torch.set_num_threads(threads)
    device = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    number = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    try:
        base = load_masked(order.base, device=device, dtype=number)
        judge = None if order.feedback is None else load_clip(order.feedback.clip, device=device)
    except (OSError, ValueError) as error:
        raise BadInput(str(error).splitlines()[0]) from error
    return StyleDropRun(order, base, digest(base.pipeline.transformer), judge)


def _pictures_of(concept: Concept) -> tuple[list[Path], list[str]]:
    """The concept's pictures and the caption of each, checked as `ziplora train` does. BadInput in one line."""
    try:
        settings = TrainSettings(concept.prompt, concept.trigger)
        paths = image_paths(concept.images)
        captions = read_captions(paths, settings)
    except (ValueError, OSError) as error:
        raise BadInput(f"{concept.role}: {error}") from error
    for path in paths:
        picture_digest(path)
    return paths, captions


def _check_template(prompt: str) -> None:
    try:
        prompt.format(subject="", style="")
    except (KeyError, IndexError, ValueError) as error:
        raise BadInput(f"prompt {prompt!r}: only {{subject}} and {{style}} are replaced, not {error}") from error


def _there(path: Path, request: dict[str, Any]) -> "LoRA | None":
    """The adapter in `path` if it was made for just this request; BadInput if something else is in its place."""
    from ziplora.adapter_files import read_adapter

    if not path.exists():
        return None
    adapter, metadata = read_adapter(path)
    if metadata.get(REQUEST_KEY) != json.dumps(request, sort_keys=True):
        raise BadInput(f"{path} is there, but was trained otherwise: name another directory, or --overwrite it")
    return adapter
