"""DreamBooth training of a LoRA (arXiv 2208.12242 with 2106.09685) on the attention layers of SDXL or SD 1.5.

The defaults are those of the ZipLoRA paper (arXiv 2311.13600v2, Sec. 5): rank 64, 1000 steps, batch 1, Adam at 5e-5,
text encoders frozen. A subject is trained on 4–5 pictures, a style on one. Latents and prompts are encoded once. A
`Training` is an iterable of steps with a length: whoever drives it reports, previews and saves as it likes, and
`state` / `restore` carry on a run bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional as F

from ziplora.base import Base, stack
from ziplora.lora import Layer, LoRA
from ziplora.sample import sample_images, sample_latents
from ziplora.train_settings import TrainSettings, image_paths

__all__ = ["Prior", "Step", "TrainSettings", "Training", "read_images", "sample_prior"]


@dataclass(frozen=True, slots=True)
class Step:
    """`step` counts from 1; `loss` is the mean squared error of the noise (plus the weighted prior term)."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Prior:
    """Pictures whose look must stay: `latents` [n, c, h, w] and the prompt of each, usually the base's own samples.

    DreamBooth has one such prompt, of the class; several, in several styles, keep a style LoRA from drawing nothing but
    its one picture's subject.
    """

    latents: Tensor
    prompts: tuple[str, ...]


def sample_prior(base: Base, prompts: Sequence[str], side: int) -> Prior:
    """What the base alone draws for each prompt, `side` pixels wide and high."""
    seeds = list(range(len(prompts)))
    latents = sample_latents(base, prompts, seeds, steps=25, guidance=5.0, width=side, height=side)
    return Prior(latents, tuple(prompts))


def read_images(location: str | Path) -> list[Image.Image]:
    """The pictures of a directory in name order, or one picture file. ValueError when there are none or one cannot be
    read."""
    return [_read_image(path) for path in image_paths(location)]


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no such picture or directory: {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); replace or remove it") from error


class Training:
    """A LoRA being trained in `base`'s UNet. Use as a context manager: on leaving, the base is as it was.

        with Training(base, images, settings) as training:
            for step in training: ...
            lora = training.lora()

    MemoryError, with what to lower, when the device's memory does not suffice.
    """

    def __init__(
        self,
        base: Base,
        images: Sequence[Image.Image],
        settings: TrainSettings,
        prior: Prior | None = None,
        captions: Sequence[str] | None = None,
        sets: Sequence[int] | None = None,
    ) -> None:
        """`prior`: in place of samples of `settings.prior_prompt`, which several trainings can so share. `captions`:
        one for each image, in place of the one prompt. `sets`: which concept, from 0 on, each image shows; the
        training's pictures come from them in turn, however many each has."""
        if not images:
            raise ValueError("no pictures to train on")
        if captions is not None and len(captions) != len(images):
            raise ValueError(f"{len(captions)} captions for {len(images)} pictures")
        self.base, self.settings = base, settings
        self.side = settings.size or base.default_size
        self.captions = tuple(captions or [settings.prompt] * len(images))
        self.sets = None if sets is None else tuple(sets)
        self._rows = _rows_of(self.sets or (0,) * len(images), len(images))
        self._seed = own_seed(settings.seed, images, self.captions)
        self.generator = torch.Generator().manual_seed(self._seed)
        self.latents = base.encode_images(images, self.side, self.side)
        distinct = list(dict.fromkeys(self.captions))
        self.conditioning = base.encode_prompts(distinct)
        self._caption_of = torch.tensor([distinct.index(caption) for caption in self.captions], device=base.device)
        if prior is None and settings.prior_prompt is not None:
            prior = sample_prior(base, [settings.prior_prompt] * settings.prior_images, self.side)
        self.prior = None if prior is None else (prior.latents, base.encode_prompts(prior.prompts))
        self.step = 0
        self._originals = {path: base.unet.get_submodule(path.removeprefix("unet.")) for path in base.slots.targets}
        self._adapters = self._inject()
        self.optimizer = torch.optim.AdamW(self._parameters(), lr=settings.lr, weight_decay=1e-4)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.settings.steps

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left."""
        while self.step < self.settings.steps:
            yield self._update()

    def lora(self) -> LoRA:
        """What is learned so far, alpha/rank folded in, fp32 on the CPU."""
        scale = (self.settings.alpha or self.settings.rank) / self.settings.rank
        return LoRA({path: Layer(_copy(a), _copy(b) * scale) for path, (a, b) in self._adapters.items()})

    def previews(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[Image.Image]:
        """Samples with the LoRA as it is now; options as `sample_images`."""
        return sample_images(self.base, prompts, seeds, **options)

    def state(self) -> dict[str, Any]:
        return {
            "identity": self.identity(),
            "step": self.step,
            "weights": {path: (a.detach().clone(), b.detach().clone()) for path, (a, b) in self._adapters.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Carry on from `state`. ValueError when it belongs to other settings or pictures."""
        if state["identity"] != self.identity():
            raise ValueError(
                "the saved state belongs to other settings, pictures or another base: start afresh or elsewhere"
            )
        with torch.no_grad():
            for path, (a, b) in state["weights"].items():
                self._adapters[path][0].copy_(a)
                self._adapters[path][1].copy_(b)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def save_state(self, path: Path) -> None:
        partial = path.with_name(path.name + ".part")
        torch.save(self.state(), partial)
        os.replace(partial, path)

    def load_state(self, path: Path) -> None:
        self.restore(torch.load(path, map_location="cpu", weights_only=True))

    def identity(self) -> str:
        """Digest of everything that decides the result but the base's weights."""
        sha = hashlib.sha256(repr(sorted(asdict(self.settings).items())).encode())
        for tensor in (
            self.latents,
            self._caption_of,
            self.conditioning.embeds,
            *([] if self.prior is None else [self.prior[0]]),
            *([] if self.sets is None else [torch.tensor(self.sets)]),
        ):
            sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def metadata(self) -> dict[str, str]:
        """How it was trained, for a LoRA file's header."""
        values = {key: value for key, value in asdict(self.settings).items() if value is not None}
        return {f"ziplora.train.{key}": str(value) for key, value in values.items()} | {
            "ziplora.train.images": str(len(self.latents)),
            "ziplora.train.step": str(self.step),
            "ziplora.train.size": str(self.side),
            **(
                {} if self.sets is None else {"ziplora.train.images_of_each": ", ".join(map(str, map(len, self._rows)))}
            ),
        }

    def close(self) -> None:
        """Take the adapters out of the base again."""
        for path, original in self._originals.items():
            parent, _, child = path.removeprefix("unet.").rpartition(".")
            setattr(self.base.unet.get_submodule(parent), child, original)
        if hasattr(self.base.unet, "peft_config"):
            del self.base.unet.peft_config
        if self.settings.gradient_checkpointing:
            self.base.unet.disable_gradient_checkpointing()

    def _inject(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        settings = self.settings
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha or settings.rank,
            init_lora_weights="gaussian",
            target_modules=[path.removeprefix("unet.") for path in self._originals],
        )
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            inject_adapter_in_model(config, self.base.unet)
        if settings.gradient_checkpointing:
            self.base.unet.enable_gradient_checkpointing()
        adapters = {}
        for path in self._originals:
            layer = self.base.unet.get_submodule(path.removeprefix("unet."))
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            adapters[path] = (down.float().weight, up.float().weight)  # fp32: small updates vanish in bf16
        return adapters

    def _parameters(self) -> list[nn.Parameter]:
        return [weight for pair in self._adapters.values() for weight in pair]

    def _update(self) -> Step:
        settings = self.settings
        fraction = self.step / settings.steps
        factor = 1.0 if settings.lr_schedule == "constant" else 0.5 * (1 + math.cos(math.pi * fraction))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * factor
        try:
            loss = self._loss()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"out of memory at batch {settings.batch}, {self.side} pixels, rank {settings.rank}:"
                " lower batch or size, or turn on gradient_checkpointing"
            ) from error
        nn.utils.clip_grad_norm_(self._parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return Step(self.step, loss.item())

    def _loss(self) -> Tensor:
        """‖ε(x_t, p) − ε‖², with prior preservation + weight·‖ε(x'_t, p') − ε'‖² on the base's pictures x' of p'."""
        settings = self.settings
        first = self.step * settings.batch
        rows = drawn_in_turn(self._rows, first, settings.batch, self.generator)
        drawn = torch.tensor(rows, device=self.base.device)
        latents, conditionings = [self.latents[drawn]], [self.conditioning.rows(self._caption_of[drawn])]
        if self.prior is not None:
            kept = self._draw(len(self.prior[0]))
            latents.append(self.prior[0][kept])
            conditionings.append(self.prior[1].rows(kept))
        x = torch.cat(latents)
        noise = torch.randn(x.shape, generator=self.generator).to(x)
        timesteps = torch.randint(self.base.n_timesteps, (len(x),), generator=self.generator)
        predicted = self.base.predict_noise(self.base.add_noise(x, noise, timesteps), timesteps, stack(conditionings))
        target = self._target(x, noise, timesteps)
        errors = F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2, 3))
        own = errors[: settings.batch].mean()
        return own if self.prior is None else own + settings.prior_weight * errors[settings.batch :].mean()

    def _draw(self, n: int) -> Tensor:
        """A batch of row numbers below n."""
        return torch.randint(n, (self.settings.batch,), generator=self.generator).to(self.base.device)

    def _target(self, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, or for a v-prediction base √ᾱ·ε − √(1−ᾱ)·x (arXiv 2202.00512)."""
        if self.base.pipeline.scheduler.config.get("prediction_type", "epsilon") != "v_prediction":
            return noise
        return self.base.add_noise(noise, -x, timesteps)


class Learning(Protocol):
    """Any training here: an iterable of the steps that are left, whose settings have a learning rate `lr`."""

    settings: Any

    def __iter__(self) -> Iterator[Step]: ...


def finite_steps(training: Learning) -> Iterator[Step]:
    """The steps that are left. ArithmeticError when the loss is no number, after which nothing is learned."""
    for step in training:
        if not math.isfinite(step.loss):
            raise ArithmeticError(
                f"the loss is {step.loss} at step {step.step}: lower lr (now {training.settings.lr:g})"
            )
        yield step


def own_seed(seed: int, images: Sequence[Image.Image], captions: Sequence[str]) -> int:
    """What a training with `seed` starts from: another number for other pictures or captions.

    From one start all LoRAs keep nearly the same `down` matrices (cosine .95 after 1000 steps): they read the same few
    directions of every input, and any two conflict in a merge as much as two that really are about the same thing.
    """
    shown = [f"/{image.size}/{image.mode}/".encode() + image.tobytes() for image in images]
    distinct = dict.fromkeys(zip(captions, shown, strict=True))  # naming a picture twice teaches nothing else
    sha = hashlib.sha256(f"{seed}/{[caption for caption, _ in distinct]}".encode())
    for _, content in distinct:
        sha.update(content)
    return int.from_bytes(sha.digest()[:7], "big")


def drawn_in_turn(sets: Sequence[Sequence[int]], first: int, n: int, generator: torch.Generator) -> list[int]:
    """`n` rows, of which number i, counted from `first`, is any of sets[i mod len(sets)], all of that set's equally
    likely. So of any even number of pictures both of two sets have given half, whatever their sizes."""
    # one draw serves sets of any size; from equal sets it takes what it would take from one
    numbers = torch.randint(math.lcm(*map(len, sets)), (n,), generator=generator).tolist()
    turns = [sets[(first + i) % len(sets)] for i in range(n)]
    return [rows[number % len(rows)] for rows, number in zip(turns, numbers, strict=True)]


def _rows_of(sets: Sequence[int], n_images: int) -> list[list[int]]:
    """The rows of each set. ValueError unless every image is in one of them and none is empty."""
    if len(sets) != n_images:
        raise ValueError(f"{len(sets)} sets named for {n_images} pictures")
    rows = [[row for row, one in enumerate(sets) if one == number] for number in range(max(sets) + 1)]
    if not all(rows):
        raise ValueError(f"set {rows.index([])} of {len(rows)} has no pictures")
    return rows


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu().clone()
