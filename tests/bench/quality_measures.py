"""What the quality bench measures of one merge, in the pocket world, where the true picture of every pair is known."""

import functools
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor

from tests.bench.quality_masked import MaskedStand
from ziplora import pocket
from ziplora.base import load_base
from ziplora.calibrate import Calibration, calibrate, derived_seed
from ziplora.calibration_settings import CalibrationSettings
from ziplora.formats import read_lora
from ziplora.lora import LoRA, digest, scaled
from ziplora.merged import Instances, Merged, Pair, Pictures, Words
from ziplora.methods import METHODS
from ziplora.optimize import batch, reconstruction, student_conditioning
from ziplora.pocket import Concept, world
from ziplora.pocket.recognise import Recogniser
from ziplora.sample import make_scheduler
from ziplora.score import load_clip, load_dino, mean_cosine
from ziplora.switched import Follow, applied_side_by_side
from ziplora.train_settings import TrainSettings, read_captions

TRUTHS = 32  # renderings of one scene: pose, size and pattern phase vary
N_CAPTIONS = 200  # as many as the published code of Custom Diffusion reads
HELD_OUT = "held out"  # names the seed of draws that no merge was fitted to


@dataclass(frozen=True, slots=True)
class Settings:
    """How every merge is sampled and judged. `images` of the combined prompt, half as many of each other prompt."""

    scheduler: str = "dpm++2m"
    steps: int = 10
    guidance: float = 4.0
    images: int = 4
    held_out_draws: int = 48


@dataclass(frozen=True, slots=True)
class Variant:
    """A method with its knobs and the LoRAs' weights; `TRUTH` stands for the renderer itself."""

    name: str
    method: str
    knobs: Any = None
    weights: tuple[float, float] = (1.0, 1.0)

    @property
    def masked(self) -> bool:
        return self.method in METHODS and METHODS[self.method].masked

    def as_dict(self) -> dict[str, Any]:
        knobs = {} if self.knobs is None else asdict(self.knobs)
        if self.masked:
            knobs |= {"base": _digest_once(Path(knobs["base"])), "revision": None}  # not where it lies
        return {"method": self.method, "knobs": knobs, "weights": list(self.weights)}


TRUTH = Variant("truth", "rendered truth")


def parse_variant(text: str, masked_base: Path | None = None) -> Variant:
    """`ziplora`, `ziplora:learning_rate=0.03,penalty_weight=0`, `direct@0.7` (both LoRAs), `direct@1/0` (subject
    only), `truth`. `masked_base`: that of methods on a base of their own. Raises ValueError."""
    if text == TRUTH.name:
        return TRUTH
    head, _, settings = text.partition(":")
    name, _, weights = head.partition("@")
    if name not in METHODS:
        raise ValueError(f"there is no method {name}: {', '.join(METHODS)}")
    given: dict[str, Any] = dict(one.split("=", 1) for one in settings.split(",")) if settings else {}
    if METHODS[name].masked:
        if masked_base is None or weights:
            raise ValueError(f"{name} takes a base of its own (--masked-base) and no weights of LoRAs")
        given["base"] = str(masked_base)
        if given.get("feedback"):
            given["contents"] = plain_contents()
    if "captions" in METHODS[name].knob_names:
        given["captions"] = plain_captions()  # the built-in ones are of a world that this base has never seen
    knobs = TypeAdapter(METHODS[name].knobs).validate_python(given)
    first, _, second = (weights or "1").partition("/")
    return Variant(text, name, knobs, (float(first), float(second or first)))


def plain_captions() -> tuple[str, ...]:
    """Captions such as the base was trained on, none of a pair that it is asked for."""
    generator = np.random.default_rng(0)
    return tuple(dict.fromkeys(world.training_example(generator)[1] for _ in range(N_CAPTIONS)))


def plain_contents() -> tuple[str, ...]:
    """What a style's first round draws: some of the shapes that the base knows."""
    return tuple(f"a {shape}" for shape in world.SEEN_SHAPES[:8])


@dataclass(frozen=True, slots=True)
class Cell:
    """One pair, with the seed of its merge and its samples."""

    subject: Concept
    style: Concept
    seed: int


@dataclass(frozen=True, slots=True)
class Shot:
    """A prompt, what a right answer shows, and how many samples of it."""

    kind: str
    prompt: str
    scene: world.Scene
    count: int


@dataclass(frozen=True, slots=True)
class Measured:
    values: dict[str, float]
    report: Mapping[str, Any]
    pictures: list[Image.Image]  # of the combined prompt


def shots(subject: Concept, style: Concept, settings: Settings) -> list[Shot]:
    both = world.truth(subject.name, style.name)
    fewer = max(1, settings.images // 2)
    shape = next(word for word in style.prompt.split() if word in world.SHAPES)
    return [
        Shot("combined", f"a {subject.trigger} in {style.trigger}", both, settings.images),
        *(
            Shot(
                extra,
                f"a {subject.trigger} with a {extra} in {style.trigger}",
                world.truth(subject.name, style.name, extra=extra),
                fewer,
            )
            for extra in world.EXTRAS
        ),
        Shot("subject alone", subject.prompt, world.truth(subject.name, None), fewer),
        Shot("style alone", style.prompt, world.truth(shape, style.name), fewer),
    ]


def seeds_of(cell: Cell, shot: Shot) -> list[int]:
    """Of its samples: noise depends on pair, prompt and seed, not on the method."""
    return [
        derived_seed(cell.seed, f"{cell.subject.name}/{cell.style.name}/{shot.kind}/{i}") for i in range(shot.count)
    ]


class Stand:
    """Base, judges and LoRAs, loaded once; calibrations, reference features and effects, computed once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.base = load_base(pocket.path())
        self.recogniser = Recogniser(pocket.scorer("recogniser"))
        self.clip, self.dino = load_clip(pocket.scorer("clip")), load_dino(pocket.scorer("dino"))
        assert self.clip.texts is not None
        self.calibrations: dict[tuple[str, CalibrationSettings], tuple[Calibration, float]] = {}
        self.masked = functools.cache(lambda base: MaskedStand(Path(base), self.clip))
        self.lora = functools.cache(_read)
        self.truths = functools.cache(_truths)
        self.effect = functools.cache(self._effect)
        self.text = functools.cache(lambda caption: self.clip.texts([caption]))
        self.style_features = functools.cache(lambda concept: self.clip.images(_images(concept)))
        self.subject_features = functools.cache(lambda concept: self.dino.images(_images(concept)))
        self.truth_features = functools.cache(
            lambda scene: (self.clip.images(self.truths(scene)), self.dino.images(self.truths(scene)))
        )

    def measure(self, variant: Variant, cells: Sequence[Cell]) -> list[Measured]:
        """`cells` share their seed; they are merged side by side, then sampled one by one."""
        if variant == TRUTH:
            return [self._judged(cell, self._rendered(cell), {}, {}) for cell in cells]
        if variant.masked:
            return [self._by_adapters(variant, cell) for cell in cells]
        pairs, calibration_s = self._pairs(variant, cells)
        wall, cpu = time.perf_counter(), time.process_time()
        merged = METHODS[variant.method].load()(self.base, pairs, variant.knobs)
        seconds = {
            "merge_s": (time.perf_counter() - wall) / len(cells),
            "merge_cpu_s": (time.process_time() - cpu) / len(cells),
            "calibration_cpu_s": calibration_s,
        }
        losses = self._held_out(cells, merged)
        return [
            self._judged(cell, self._sampled(cell, one), loss | seconds, one.report)
            for cell, one, loss in zip(cells, merged, losses, strict=True)
        ]

    def _by_adapters(self, variant: Variant, cell: Cell) -> Measured:
        """No Eq. 3, which is about what a LoRA changes on this base."""
        stand, knobs = self.masked(variant.knobs.base), variant.knobs
        trained = [
            stand.adapter(role, concept.name, _instances(concept), knobs, cell.seed)
            for role, concept in (("subject", cell.subject), ("style", cell.style))
        ]
        wanted = {
            shot.kind: list(zip([shot.prompt] * shot.count, seeds_of(cell, shot), strict=True))
            for shot in shots(cell.subject, cell.style, self.settings)
        }
        pictures = stand.pictures(trained[0][0], trained[1][0], wanted, knobs)
        return self._judged(cell, pictures, {"calibration_cpu_s": (trained[0][1] + trained[1][1]) / 2}, {})

    def _pairs(self, variant: Variant, cells: Sequence[Cell]) -> tuple[list[Pair], float]:
        """And the CPU seconds of observing one LoRA; a grid needs that once per LoRA, not per pair."""
        method = METHODS[variant.method]
        wanted = method.calibration(variant.knobs, cells[0].seed)
        pairs, seconds = [], []
        for cell in cells:
            if method.trains:
                pictures = Pictures(_instances(cell.subject), _instances(cell.style), cell.seed)
                pairs.append(Pair(LoRA({}), LoRA({}), pictures=pictures))
                continue
            subject, style = (
                scaled(self.lora(c), w) for c, w in zip((cell.subject, cell.style), variant.weights, strict=True)
            )
            observed: list[Calibration | None] = [None, None]
            if wanted is not None:
                for i, concept in enumerate((cell.subject, cell.style)):
                    observed[i], spent = self.calibration(concept, wanted)
                    seconds.append(spent)
            prompt = method.combined_prompt(variant.knobs, cell.subject.trigger, cell.style.trigger)
            words = tuple(Words(concept.prompt, concept.trigger) for concept in (cell.subject, cell.style))
            pairs.append(
                Pair(subject, style, *observed, combined_prompt=prompt, words=words, seed=cell.seed)  # type: ignore[arg-type]
            )
        return pairs, sum(seconds) / len(seconds) if seconds else 0.0

    def calibration(self, concept: Concept, wanted: CalibrationSettings) -> tuple[Calibration, float]:
        key = (concept.name, wanted)
        if key not in self.calibrations:
            started, lora = time.process_time(), self.lora(concept)
            made = calibrate(self.base, lora, concept.prompt, _images(concept), wanted, digest(lora))
            self.calibrations[key] = made, time.process_time() - started
        return self.calibrations[key]

    def _held_out_calibration(self, concept: Concept, seed: int) -> Calibration:
        wanted = CalibrationSettings(self.settings.held_out_draws, derived_seed(seed, HELD_OUT), "separate", None)
        return self.calibration(concept, wanted)[0]

    @torch.no_grad()
    def _held_out(self, cells: Sequence[Cell], merged: Sequence[Merged]) -> list[dict[str, float]]:
        """Both reconstruction terms of Eq. 3 as mean squares on held-out draws, and as a share of the LoRA's own
        effect: 0 where the merge does what the LoRA did, 1 where it does no more of it than the base model."""
        pairs = [
            Pair(
                one.subject,
                one.style,
                *(self._held_out_calibration(concept, cell.seed) for concept in (cell.subject, cell.style)),
            )
            for cell, one in zip(cells, merged, strict=True)
        ]
        draws = [(pair.subject_calibration, pair.style_calibration) for pair in pairs]
        # a merge that changes during sampling is another one for each timestep: every draw is then a merge of its own
        switched = merged[0].until is not None
        rows, parts = 1 if switched else 8, []
        with self._applied([one for one in merged for _ in range(2)] if switched else merged) as follow:
            conditioning = student_conditioning(self.base, pairs).repeat(rows)
            for step in range(self.settings.held_out_draws // rows):
                noisy, timesteps, target = batch(draws, step, rows)
                follow([1 - (t + 1) / self.base.n_timesteps for t in timesteps.flatten().tolist()])
                predicted = self.base.predict_noise(noisy.flatten(0, 2), timesteps.flatten(), conditioning)
                parts.append(reconstruction(predicted.unflatten(0, target.shape[:3]), target, "mean-square"))
        losses = torch.stack(parts).mean(0)
        return [
            {
                "eq3": loss.sum().item(),
                "eq3_subject": loss[0].item(),
                "eq3_style": loss[1].item(),
                "lost_subject": loss[0].item() / self.effect(cell.subject, cell.seed),
                "lost_style": loss[1].item() / self.effect(cell.style, cell.seed),
            }
            for cell, loss in zip(cells, losses, strict=True)
        ]

    @contextmanager
    def _applied(self, merged: Sequence[Merged]) -> Iterator[Follow]:
        if merged[0].until is not None:
            with applied_side_by_side(self.base.slots, [one.applied() for one in merged]) as follow:
                yield follow
        else:
            with self.base.slots.loaded([[one.subject, one.style] for one in merged]):
                yield lambda share: None

    @torch.no_grad()
    def _effect(self, concept: Concept, seed: int) -> float:
        """Mean square of what the LoRA changes on its held-out draws."""
        drawn = self._held_out_calibration(concept, seed)
        conditioning = drawn.conditioning.repeat(len(drawn.noisy))
        plain = self.base.predict_noise(drawn.noisy, drawn.timesteps, conditioning)
        return (plain - drawn.target).square().mean().item()

    def _sampled(self, cell: Cell, merged: Merged) -> dict[str, list[Image.Image]]:
        """All prompts of a pair in one batch."""
        wanted = shots(cell.subject, cell.style, self.settings)
        prompts = [shot.prompt for shot in wanted for _ in range(shot.count)]
        seeds = [seed for shot in wanted for seed in seeds_of(cell, shot)]
        pipeline = self.base.pipeline
        pipeline.scheduler = make_scheduler(self.settings.scheduler, pipeline.scheduler)  # afresh: they carry state
        with self._applied([merged]) as follow:
            follow(0.0)

            def after_step(_: Any, number: int, __: Any, kept: dict[str, Any]) -> dict[str, Any]:
                follow((number + 1) / self.settings.steps)
                return kept

            images = pipeline(
                prompts,
                num_inference_steps=self.settings.steps,
                guidance_scale=self.settings.guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=after_step,
            ).images
        rest = iter(images)
        return {shot.kind: [next(rest) for _ in range(shot.count)] for shot in wanted}

    def _rendered(self, cell: Cell) -> dict[str, list[Image.Image]]:
        first = 10_000 + 1000 * cell.seed  # other renderings than those it is compared with
        return {
            shot.kind: [world.picture(shot.scene, first + i) for i in range(shot.count)]
            for shot in shots(cell.subject, cell.style, self.settings)
        }

    def _judged(
        self, cell: Cell, pictures: Mapping[str, list[Image.Image]], known: dict[str, float], report: Mapping[str, Any]
    ) -> Measured:
        by_kind = {shot.kind: shot for shot in shots(cell.subject, cell.style, self.settings)}
        right = {kind: self._right(pictures[kind], shot.scene) for kind, shot in by_kind.items()}
        combined, scene = pictures["combined"], by_kind["combined"].scene
        seen, looks = self.clip.images(combined), self.dino.images(combined)
        true_seen, true_looks = self.truth_features(scene)
        style = mean_cosine(seen, self.style_features(cell.style))
        subject = mean_cosine(looks, self.subject_features(cell.subject))
        values = {
            "style": style,
            "subject": subject,
            "text": mean_cosine(seen, self.text(world.caption(scene))),
            "harmonic": harmonic(style, subject),
            "subject_right": right["combined"][0].mean(),
            "style_right": right["combined"][1].mean(),
            "both": right["combined"].all(0).mean(),
            "truth_clip": mean_cosine(seen, true_seen),
            "truth_dino": mean_cosine(looks, true_looks),
            "truth_pixels": nearest(combined, self.truths(scene)),
            "recontext_both": np.mean([right[extra].all(0).mean() for extra in world.EXTRAS]),
            "recontext_extra": np.mean([self._extra_shown(pictures[e], by_kind[e].scene) for e in world.EXTRAS]),
            "recontext_text": np.mean(
                [
                    mean_cosine(self.clip.images(pictures[e]), self.text(world.caption(by_kind[e].scene)))
                    for e in world.EXTRAS
                ]
            ),
            "subject_alone": right["subject alone"].all(0).mean(),
            "style_alone": right["style alone"].all(0).mean(),
        }
        return Measured(known | {name: float(value) for name, value in values.items()}, report, combined)

    def _right(self, pictures: Sequence[Image.Image], scene: world.Scene) -> np.ndarray:
        """[2, pictures]: is the shape right, is the style right ("photo" where the scene has none)."""
        seen = self.recogniser.look(pictures)
        style = "photo" if scene.style is None else scene.style.name
        return np.array([[a == scene.shape for a in seen.shapes()], [b == style for b in seen.styles()]])

    def _extra_shown(self, pictures: Sequence[Image.Image], scene: world.Scene) -> float:
        """Share of pictures whose best caption, of those that differ in the extra alone, is the prompt's own."""
        options = [world.truth(scene.shape, scene.style.name, extra=e) for e in (None, *world.EXTRAS)]  # type: ignore[union-attr]
        texts = torch.cat([self.text(world.caption(option)) for option in options])
        best = (self.clip.images(pictures) @ texts.T).argmax(1)
        return (best == options.index(scene)).float().mean().item()


def harmonic(a: float, b: float) -> float:
    """2ab/(a+b) of two cosines; 0 where one of them is not positive."""
    return 2 * a * b / (a + b) if min(a, b) > 0 else 0.0


def nearest(pictures: Sequence[Image.Image], truths: Sequence[Image.Image]) -> float:
    """Root mean square difference (colours 0..1) to the nearest rendering, averaged over pictures: poses are free."""
    a, b = (_flat(some) for some in (pictures, truths))
    return torch.cdist(a, b).div(a.shape[1] ** 0.5).min(1).values.mean().item()


def digest_of(*places: Path) -> str:
    """sha256 over files, and over all safetensors of directories: names and bytes."""
    total = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]:
            total.update(path.relative_to(place.parent).as_posix().encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


_digest_once = functools.cache(digest_of)


def _flat(pictures: Sequence[Image.Image]) -> Tensor:
    arrays = [np.asarray(picture.convert("RGB").resize((world.SIZE, world.SIZE))) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).flatten(1).float() / 255


def _instances(concept: Concept) -> Instances:
    """What joint training is given of a concept: its pictures with their own captions, as its LoRA was."""
    captions = read_captions(concept.images, TrainSettings(concept.prompt, concept.trigger))
    return Instances(tuple(_images(concept)), tuple(captions), concept.prompt, concept.trigger)


def _truths(scene: world.Scene) -> list[Image.Image]:
    return [world.picture(scene, i) for i in range(TRUTHS)]


def _images(concept: Concept) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in concept.images]


def _read(concept: Concept) -> LoRA:
    return read_lora(concept.lora).lora
