"""A base model (SDXL or SD 1.5), loaded once and kept: prompts and images in, noise predictions out, LoRA slots in
every layer."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image, ImageOps
from torch import Tensor

from ziplora.lora import LoRA, digest
from ziplora.slots import Slots

COMPILED_FORMS = 64
PROMPTS_KEPT = 256  # 77 tokens × 2048 values in bf16: 81 MB on SDXL

Architecture = Literal["sdxl", "sd15"]
PIPELINES: dict[type[DiffusionPipeline], Architecture] = {
    StableDiffusionXLPipeline: "sdxl",
    StableDiffusionPipeline: "sd15",
}


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Encoded prompts: `embeds` [prompts, tokens, width]; SDXL's `pooled` [prompts, width], None for SD 1.5."""

    embeds: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Tensor | slice) -> "Conditioning":
        return Conditioning(self.embeds[index], None if self.pooled is None else self.pooled[index])

    def repeat(self, n: int) -> "Conditioning":
        """Each prompt n times, in order."""
        return Conditioning(
            self.embeds.repeat_interleave(n, 0), None if self.pooled is None else self.pooled.repeat_interleave(n, 0)
        )


def stack(conditionings: Sequence[Conditioning]) -> Conditioning:
    pooled = [one.pooled for one in conditionings if one.pooled is not None]
    return Conditioning(torch.cat([one.embeds for one in conditionings]), torch.cat(pooled) if pooled else None)


@dataclass
class Base:
    """A resident pipeline. `slots` covers its UNet and text encoders; nothing here changes a base weight.

    `backend`: of torch.compile ("inductor"), for the UNet where it runs many times alike: steps of an optimisation and
    of sampling. None runs it as it is.
    """

    pipeline: Any
    architecture: Architecture
    slots: Slots
    alphas_cumprod: Tensor = field(repr=False)  # [training timesteps], fp32
    backend: str | None = None
    prompts: OrderedDict[tuple[str, str | None], Conditioning] = field(default_factory=OrderedDict, repr=False)
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)  # what methods made of the base alone
    _compiled: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def n_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def default_size(self) -> int:
        """Pixels; what the UNet was trained at: 1024 for SDXL, 512 for SD 1.5."""
        return self.unet.config.sample_size * self.pipeline.vae_scale_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """With whatever text-encoder LoRAs the slots hold at the moment."""
        encoded = self.pipeline.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning(encoded[0], encoded[2] if self.architecture == "sdxl" else None)

    def encode_prompt(self, prompt: str, text_lora: LoRA | None = None) -> Conditioning:
        """One prompt, as the text encoders see it with `text_lora` (the text-encoder part of a LoRA; None for the
        base's own).

        A grid repeats its prompts: the last PROMPTS_KEPT are remembered, by their text and the LoRA's content.
        """
        key = (prompt, None if text_lora is None else digest(text_lora))
        if key not in self.prompts:
            with self.slots.fused(text_lora or LoRA({})):
                self.prompts[key] = self.encode_prompts([prompt])
            while len(self.prompts) > PROMPTS_KEPT:
                self.prompts.popitem(last=False)
        self.prompts.move_to_end(key)
        return self.prompts[key]

    def token_ids(self, prompt: str) -> list[int]:
        """Start, the prompt's own tokens as far as the text encoders read them, end; without padding. Both of SDXL's
        tokenizers give the same."""
        ids: list[int] = self.pipeline.tokenizer(prompt, truncation=True).input_ids
        return ids

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], width: int, height: int) -> Tensor:
        """[images, channels, height/f, width/f] scaled latents: the mode of the VAE's posterior, so that a seed
        decides everything."""
        vae, own_dtype = self.pipeline.vae, self.pipeline.vae.dtype
        overflows = own_dtype == torch.float16 and vae.config.force_upcast  # SDXL's own VAE does, in fp16
        if overflows:
            vae.to(torch.float32)
        # EXIF rotation first, then a centred crop: how the DreamBooth scripts see the same files
        fitted = [ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height)) for image in images]
        pixels = [self.pipeline.image_processor.preprocess(image).to(self.device, vae.dtype) for image in fitted]
        latents = torch.cat([vae.encode(one).latent_dist.mode() for one in pixels])
        if overflows:
            vae.to(own_dtype)  # the pipeline expects it as it was
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return ((latents - shift) * vae.config.scaling_factor).to(self.dtype)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t·x + √(1−ᾱ_t)·ε (DDPM, arXiv 2006.11239, Eq. 4); latents and noise [n, c, h, w], timesteps [n]."""
        alpha = self.alphas_cumprod.to(latents.device, torch.float64)[timesteps.to(latents.device)].view(-1, 1, 1, 1)
        return (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).to(latents.dtype)

    def predict_noise(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, backend: str | None = None
    ) -> Tensor:
        """ε(x_t, p) of the model with what its slots hold; [n, c, h, w]. v-prediction bases give v: Eq. 3 compares
        like with like. `backend`: of torch.compile ("inductor"); None runs the model as it is."""
        added = None
        if conditioning.pooled is not None:
            height, width = (side * self.pipeline.vae_scale_factor for side in noisy.shape[-2:])
            # original size, crop, target size: as sampled by default, uncropped
            time_ids = noisy.new_tensor([[height, width, 0, 0, height, width]]).expand(len(noisy), -1)
            added = {"text_embeds": conditioning.pooled, "time_ids": time_ids}
        unet = self.unet if backend is None else self._compiled_unet(backend)
        return unet(
            noisy,
            timesteps.to(noisy.device),
            encoder_hidden_states=conditioning.embeds,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def _compiled_unet(self, backend: str) -> Any:
        if backend not in self._compiled:
            # static shapes: a picture size of its own is worth a compilation of its own, and so are LoRAs of other
            # ranks; beyond the limit (8 by default) the model would silently run as it is
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_FORMS)
            self._compiled[backend] = torch.compile(self.unet, backend=backend, dynamic=False)
        return self._compiled[backend]


def load_base(
    directory: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Base:
    """A diffusers directory of an SDXL or SD 1.5 pipeline; safetensors weights only. `variant` as in file names:
    "fp16".

    Raises OSError when it is not there, ValueError for another kind of pipeline.
    """
    name = DiffusionPipeline.load_config(str(directory)).get("_class_name")
    # by its own class: DiffusionPipeline does not know which components that one can do without
    kind = next((known for known in PIPELINES if known.__name__ == name), DiffusionPipeline)
    pipeline = kind.from_pretrained(
        str(directory),
        dtype=dtype,
        use_safetensors=True,
        variant=variant,
        local_files_only=True,
        **_left_out(kind),
    )
    return resident(pipeline.to(device))


def resident(pipeline: DiffusionPipeline) -> Base:
    """Freeze a loaded pipeline and put slots into it."""
    architecture = PIPELINES.get(type(pipeline))
    if architecture is None:
        known = " or ".join(kind.__name__ for kind in PIPELINES)
        raise ValueError(f"base is a {type(pipeline).__name__}; expected {known}")
    pipeline.set_progress_bar_config(disable=True)
    components = {
        name: getattr(pipeline, name)
        for name in ("unet", "text_encoder", "text_encoder_2")
        if getattr(pipeline, name, None) is not None
    }
    for model in (*components.values(), pipeline.vae):
        model.requires_grad_(False).eval()
    alphas = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    return Base(pipeline, architecture, Slots(components), alphas)


def _left_out(kind: type[DiffusionPipeline]) -> dict[str, Any]:
    """What is left out, as neither merges nor samples use it and nobody fetches it: image encoder, feature extractor,
    and the safety checker of SD 1.5; the watermark of SDXL, which would alter every sample."""
    unused: dict[str, Any] = {"image_encoder": None, "feature_extractor": None}
    if kind is StableDiffusionXLPipeline:
        return {**unused, "add_watermarker": False}
    return {**unused, "safety_checker": None, "requires_safety_checker": False}
