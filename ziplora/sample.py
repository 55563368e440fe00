"""Images from a base and LoRAs: many pairs, strengths, prompts and seeds on one resident model.

`sample_requests` takes any mixture and gives the pictures in order. A request's picture is a function of the request
and the settings alone. Which floats a matrix product gives depends on its shape, not on what else is in it, so every
forward pass of a call has the same number of rows, padded where requests run out. With `batch` None (the default) one
request is sampled at a time, and its picture is the same bits whatever it came with; with `batch=n` the same holds
among all calls with that n, while another n differs in the last digits, as it does in any library (a level of 255
here and there). Both hold on the CPU by test; a GPU must be told to be repeatable (service/worker.py does).

One at a time, a LoRA is fused into the weights (`Slots.fused`): that costs as much as a small part of one of its 50
steps, and each step then costs what the base's does. Side by side, LoRAs pass through slots, each row with its own.
A LoRA that is another one later (`Switched`) is changed between two steps.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ziplora.base import Base, Conditioning, stack
from ziplora.lora import LoRA, concat, select
from ziplora.switched import Follow, Switched, applied, applied_side_by_side, part

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
KEPT_PICTURES = 16  # made with one LoRA before they are given out


@dataclass(frozen=True, slots=True)
class Request:
    """One picture. `lora` None: of the base alone."""

    lora: LoRA | Switched | None
    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Settings:
    """What the pictures of a call share; sizes in pixels."""

    steps: int
    guidance: float
    width: int
    height: int
    scheduler: str | None = None
    backend: str | None = None


def sample_requests(
    base: Base,
    requests: Sequence[Request],
    *,
    steps: int = 50,
    guidance: float = 5.0,
    width: int | None = None,
    height: int | None = None,
    negative: str = "",
    scheduler: str | None = None,
    batch: int | None = None,
    backend: str | None = None,
) -> Iterator[Image.Image]:
    """The picture of each request, in order. Between two pictures the base is as it was: the slots are closed.

    batch: requests per forward pass, LoRAs side by side; worth it where one picture does not fill the GPU. Requests
    whose LoRAs have the same ranks share a pass, and the last one of a kind is padded to full size, so let `batch`
    divide their number. None: one at a time, the same bits in every company (see the module).
    backend: of torch.compile ("inductor"), for the UNet; the base's own if not given. One at a time, no LoRA leads to a
    recompilation; side by side, none of the same ranks does.

    Raises ValueError for a size that the VAE cannot make, an unknown scheduler or a base that takes its guidance as
    an input, ShapeMismatch for a LoRA of another base; all but the last before anything is sampled.
    """
    settings = _checked(base, steps, guidance, width, height, scheduler, backend)
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}; at least 1")
    return _in_order(base, requests, negative, settings, batch or 1)


def _in_order(
    base: Base, requests: Sequence[Request], negative: str, settings: Settings, batch: int
) -> Iterator[Image.Image]:
    """Groups come in the order of their first request; a picture waits until those before it are out."""
    waiting: dict[int, Image.Image] = {}
    given_out = 0
    for group in _groups(requests, batch):
        chosen = [requests[i] for i in group]
        pictures = _one_lora if batch == 1 else _side_by_side
        waiting |= zip(group, pictures(base, chosen, negative, settings, batch), strict=True)
        while given_out in waiting:
            yield waiting.pop(given_out)
            given_out += 1


def _groups(requests: Sequence[Request], batch: int) -> Iterator[list[int]]:
    """Indices of requests that are sampled together: of one LoRA if one at a time, else `batch` of equal ranks."""
    kinds: dict[Any, list[int]] = {}
    for i, request in enumerate(requests):
        kinds.setdefault(id(request.lora) if batch == 1 else _ranks(request.lora), []).append(i)
    size = KEPT_PICTURES if batch == 1 else batch
    groups = [kind[i : i + size] for kind in kinds.values() for i in range(0, len(kind), size)]
    return iter(sorted(groups))


def _ranks(lora: LoRA | Switched | None) -> Any:
    """A slot is as wide as its widest LoRA, and the width decides how the sum over it is rounded."""
    if isinstance(lora, Switched):
        return _ranks(lora.first), _ranks(lora.second)
    if lora is None:
        return None
    return frozenset((path, layer.rank) for path, layer in lora.layers.items() if _in_unet(path))


def _one_lora(
    base: Base, requests: Sequence[Request], negative: str, settings: Settings, batch: int
) -> list[Image.Image]:
    lora = requests[0].lora or LoRA({})
    rows = [_rows(base, request, negative, settings) for request in requests]
    with applied(base.slots, part(lora, _in_unet)) as follow:
        latents = [
            denoise(base, row, [request.seed], settings, follow) for row, request in zip(rows, requests, strict=True)
        ]
    return [picture for one in latents for picture in decode(base, one)]


def _side_by_side(
    base: Base, requests: Sequence[Request], negative: str, settings: Settings, batch: int
) -> list[Image.Image]:
    padded = [*requests, *[requests[-1]] * (batch - len(requests))]
    rows = stack([_rows(base, request, negative, settings) for request in padded])
    loras = [part(request.lora or LoRA({}), _in_unet) for request in padded]
    with applied_side_by_side(base.slots, loras) as follow:
        latents = denoise(base, rows, [request.seed for request in padded], settings, follow)
    return decode(base, latents)[: len(requests)]


def _in_unet(path: str) -> bool:
    return path.startswith("unet.")


def _rows(base: Base, request: Request, negative: str, settings: Settings) -> Conditioning:
    """The prompt is encoded once, before the first step: of a switched LoRA both parts are in the text encoders."""
    lora = request.lora or LoRA({})
    parts = [lora.first, lora.second] if isinstance(lora, Switched) else [lora]
    text = concat([select(one, lambda path: not _in_unet(path)) for one in parts])
    text_lora = text if text.layers else None
    return _guided(base, lambda prompt: base.encode_prompt(prompt, text_lora), request.prompt, negative, settings)


def _guided(
    base: Base, encode: Callable[[str], Conditioning], prompt: str, negative: str, settings: Settings
) -> Conditioning:
    """A picture's rows of a forward pass: without and with the prompt, or the prompt alone where nothing guides."""
    encoded = encode(prompt)
    if settings.guidance <= 1:
        return encoded
    # no negative prompt at all is zeros for SDXL, as it was trained; an empty text is something else
    if not negative and base.pipeline.config.get("force_zeros_for_empty_prompt", False):
        pooled = encoded.pooled
        nothing = Conditioning(torch.zeros_like(encoded.embeds), None if pooled is None else torch.zeros_like(pooled))
        return stack([nothing, encoded])
    return stack([encode(negative), encoded])


def sample_images(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 50,
    guidance: float = 5.0,
    width: int | None = None,
    height: int | None = None,
    negative: str = "",
    scheduler: str | None = None,
) -> list[Image.Image]:
    """One picture per (prompt, seed), in order, with the LoRAs that are in the slots (text encoders included).

    Each picture is sampled by itself, from noise made on the CPU, so that it does not depend on its neighbours.
    """
    settings = _checked(base, steps, guidance, width, height, scheduler)
    latents = [
        denoise(base, _rows_as_loaded(base, prompt, negative, settings), [seed], settings)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return [picture for one in latents for picture in decode(base, one)]


def sample_latents(
    base: Base, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, width: int, height: int
) -> Tensor:
    """Scaled latents [prompts, c, h, w] instead of pictures: nothing passes through the VAE."""
    settings = _checked(base, steps, guidance, width, height)
    return torch.cat(
        [
            denoise(base, _rows_as_loaded(base, prompt, "", settings), [seed], settings)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    )


def _rows_as_loaded(base: Base, prompt: str, negative: str, settings: Settings) -> Conditioning:
    return _guided(base, lambda text: base.encode_prompts([text]), prompt, negative, settings)


@torch.no_grad()
def denoise(
    base: Base, rows: Conditioning, seeds: Sequence[int], settings: Settings, follow: Follow | None = None
) -> Tensor:
    """Scaled latents [seeds, c, h, w] from each seed's noise, as diffusers' pipelines make them.

    `rows`: of each picture in turn the negative prompt and the prompt (classifier-free guidance, arXiv 2207.12598,
    Eq. 6, in the form ε_n + g·(ε_p − ε_n)), or the prompt alone if guidance is at most 1. A seed's generator gives
    first the initial noise, then whatever the scheduler asks for: nothing is shared among pictures. `follow` is told
    before each step which share of them is done.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # a fresh scheduler every time: some carry state from one run into the next
    scheduler = make_scheduler(settings.scheduler, base.pipeline.scheduler)
    scheduler.set_timesteps(settings.steps, device=base.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # or it would look for its place among the timesteps, waiting for the GPU
    takes_noise = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generators} if takes_noise else {}
    factor = base.pipeline.vae_scale_factor
    shape = (len(seeds), base.unet.config.in_channels, settings.height // factor, settings.width // factor)
    latents = randn_tensor(shape, generator=generators, device=base.device, dtype=rows.embeds.dtype)
    latents = latents * scheduler.init_noise_sigma
    guided = settings.guidance > 1
    for number, timestep in enumerate(scheduler.timesteps):
        if follow is not None:
            follow(number / len(scheduler.timesteps))
        noisy = scheduler.scale_model_input(latents, timestep)
        noisy = noisy.repeat_interleave(2, 0) if guided else noisy
        predicted = base.predict_noise(noisy, timestep.expand(len(noisy)), rows, settings.backend)
        if guided:
            without, with_prompt = predicted.unflatten(0, (-1, 2)).unbind(1)
            predicted = without + settings.guidance * (with_prompt - without)
        latents = scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0]
    return latents


def decode(base: Base, latents: Tensor) -> list[Image.Image]:
    """The pictures of scaled latents [n, c, h, w]: all at once; one by one where memory does not suffice; in tiles,
    whose seams are blended and may show, where it does not suffice for one."""
    attempts = [(latents,), latents.split(1)] if len(latents) > 1 else [(latents,)]
    with _decoder(base) as decoder:
        for parts in attempts:
            pixels = _unless_out_of_memory(decoder, parts)
            if pixels is not None:
                break
        else:
            with _tiled(base.pipeline.vae, latents.shape):
                pixels = torch.cat([decoder(one) for one in latents.split(1)])
    pictures: list[Image.Image] = base.pipeline.image_processor.postprocess(pixels, output_type="pil")
    return pictures


def _unless_out_of_memory(decoder: Any, parts: Sequence[Tensor]) -> Tensor | None:
    try:
        return torch.cat([decoder(part) for part in parts])
    except torch.OutOfMemoryError:
        return None  # and not a retry in here, where the traceback holds on to what was allocated


@contextmanager
def _decoder(base: Base) -> Iterator[Any]:
    """Scaled latents → pixels in [-1, 1], as in diffusers' pipelines."""
    vae, config = base.pipeline.vae, base.pipeline.vae.config
    overflows = vae.dtype == torch.float16 and config.force_upcast  # SDXL's own does
    if overflows:
        vae.to(torch.float32)

    @torch.no_grad()
    def decoder(latents: Tensor) -> Tensor:
        latents = latents.to(vae.dtype)
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
            latents = latents * std / config.scaling_factor + mean
        else:
            shift = getattr(config, "shift_factor", None) or 0.0
            latents = latents / config.scaling_factor + shift
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels

    try:
        yield decoder
    finally:
        if overflows:
            vae.to(torch.float16)


@contextmanager
def _tiled(vae: Any, shape: Sequence[int]) -> Iterator[None]:
    """Tiles of half the picture's longer side: a quarter of the memory."""
    names = ("use_tiling", "tile_latent_min_size", "tile_sample_min_size")
    own = {name: getattr(vae, name) for name in names}
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = max(shape[-2:]) // 2
    try:
        vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = True, side, side * factor
        yield
    finally:
        for name, value in own.items():
            setattr(vae, name, value)


def make_scheduler(name: str | None, own: Any) -> Any:
    """The scheduler called `name` in SCHEDULERS, or a fresh one of the base's own kind, on the base's noise
    schedule."""
    if name is None:
        return type(own).from_config(own.config)
    kind, options = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(own.config, **options)


def _checked(
    base: Base,
    steps: int,
    guidance: float,
    width: int | None,
    height: int | None,
    scheduler: str | None = None,
    backend: str | None = None,
) -> Settings:
    factor = base.pipeline.vae_scale_factor
    width, height = width or base.default_size, height or base.default_size
    for name, value in (("width", width), ("height", height)):
        if value < factor or value % factor:
            raise ValueError(f"{name} is {value}; a multiple of {factor} pixels, which is one latent of this base")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1")
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler {scheduler} is unknown; one of {', '.join(SCHEDULERS)}")
    if base.unet.config.time_cond_proj_dim is not None:
        raise ValueError("this base takes its guidance as an input (a distilled model): take the model it comes from")
    return Settings(steps, guidance, width, height, scheduler, backend or base.backend)
