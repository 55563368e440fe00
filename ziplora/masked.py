"""A masked-token base model (diffusers' aMUSEd, an open Muse: arXiv 2401.01808), loaded once: prompts and pictures in,
logits over a codebook out, and pictures sampled from whatever combines those logits.

A picture is a grid of tokens of a codebook; the model guesses the masked ones from the others and from a prompt.
Sampling starts from masks alone and keeps, at each step, the guesses that it is surest of (MaskGIT, arXiv 2202.04200).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AmusedPipeline, DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ziplora.slots import Slots

AESTHETIC_SCORE = 6.0  # what aMUSEd is told in sampling and fine-tuning; training images were scored
IGNORED = -100  # a label that the cross-entropy leaves out


@dataclass(frozen=True, slots=True)
class TextCondition:
    """Encoded prompts: `hidden` [prompts, tokens, width] and `pooled` [prompts, width]."""

    hidden: Tensor
    pooled: Tensor

    def rows(self, index: Tensor | slice) -> TextCondition:
        return TextCondition(self.hidden[index], self.pooled[index])


@dataclass(frozen=True, slots=True)
class MaskedBase:
    """A resident pipeline. `slots` covers its transformer; nothing here changes a base weight."""

    pipeline: Any
    slots: Slots

    @property
    def device(self) -> torch.device:
        return self.pipeline.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.transformer.dtype

    @property
    def mask_token(self) -> int:
        return self.pipeline.scheduler.config.mask_token_id

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.pipeline.transformer.config.sample_size

    @property
    def side(self) -> int:
        """Pixels along a side: 256 for amused-256."""
        return self.grid * self.pipeline.vae_scale_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """As aMUSEd's own pipeline: the last but one hidden states, and the projected pooled ones."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        output = self.pipeline.text_encoder(ids.to(self.device), return_dict=True, output_hidden_states=True)
        return TextCondition(output.hidden_states[-2], output.text_embeds)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Tokens [images, grid, grid] of centre-cropped pictures."""
        rotated = [ImageOps.exif_transpose(image).convert("RGB") for image in images]
        fitted = [ImageOps.fit(image, (self.side, self.side)) for image in rotated]
        tokens = []
        with self._vqvae() as vqvae:
            for image in fitted:
                pixels = self.pipeline.image_processor.preprocess(image).to(self.device, vqvae.dtype)
                indices = vqvae.quantize(vqvae.encode(pixels).latents)[2][2]
                tokens.append(indices.reshape(1, self.grid, self.grid))
        return torch.cat(tokens)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> list[Image.Image]:
        """The pictures of tokens [n, h, w]."""
        with self._vqvae() as vqvae:
            shape = (*tokens.shape, vqvae.config.latent_channels)
            pixels = vqvae.decode(tokens, force_not_quantize=True, shape=shape).sample.clip(0, 1)
        pictures: list[Image.Image] = self.pipeline.image_processor.postprocess(pixels, output_type="pil")
        return pictures

    def logits(self, tokens: Tensor, text: TextCondition) -> Tensor:
        """log p of every token up to a constant, [n, codebook, h, w], by the model with what its slots hold."""
        size = [float(side * self.pipeline.vae_scale_factor) for side in reversed(tokens.shape[1:])]
        sizes = text.hidden.new_tensor([[*size, 0.0, 0.0, AESTHETIC_SCORE]]).expand(len(tokens), -1)
        logits: Tensor = self.pipeline.transformer(
            tokens, encoder_hidden_states=text.hidden, pooled_text_emb=text.pooled, micro_conds=sizes
        )
        return logits

    @contextmanager
    def _vqvae(self) -> Any:
        """The autoencoder, in fp32 while it is used where it would overflow."""
        vqvae = self.pipeline.vqvae
        overflows = vqvae.dtype == torch.float16 and vqvae.config.force_upcast
        try:
            yield vqvae.float() if overflows else vqvae
        finally:
            if overflows:
                vqvae.half()


def load_masked(
    directory: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, variant: str | None = None
) -> MaskedBase:
    """A diffusers directory of an aMUSEd pipeline (such as `amused/amused-256`); safetensors weights only.

    Raises OSError when it is not there, ValueError for another kind of pipeline.
    """
    name = DiffusionPipeline.load_config(str(directory), local_files_only=True).get("_class_name")
    if name != "AmusedPipeline":
        raise ValueError(
            f"incompatible base: {directory} is a {name}, StyleDrop needs a masked-token model (AmusedPipeline),"
            " such as amused/amused-256"
        )
    pipeline = AmusedPipeline.from_pretrained(
        str(directory), dtype=dtype, use_safetensors=True, variant=variant, local_files_only=True
    )
    return resident_masked(pipeline.to(device))


def resident_masked(pipeline: AmusedPipeline) -> MaskedBase:
    """Freeze a loaded pipeline and put slots into its transformer."""
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.transformer, pipeline.text_encoder, pipeline.vqvae):
        model.requires_grad_(False).eval()
    return MaskedBase(pipeline, Slots({"transformer": pipeline.transformer}))


def masked_loss(base: MaskedBase, tokens: Tensor, text: TextCondition, generator: torch.Generator) -> Tensor:
    """−log p of masked tokens given the others and the prompt, a mean over them: what Muse (arXiv 2301.00704) and
    StyleDrop (2306.00983) train with.

    For each row of `tokens` [n, h, w] a share cos(π/2·u), u uniform, is masked, at least one token: MaskGIT's cosine
    schedule (arXiv 2202.04200, Sec. 3.1), with which aMUSEd was trained.
    """
    flat = tokens.flatten(1)
    share = torch.cos(math.pi / 2 * torch.rand(len(flat), 1, generator=generator))
    n_masked = (share * flat.shape[1]).round().clamp(min=1)
    masked = (torch.rand(flat.shape, generator=generator).argsort(dim=1) < n_masked).to(tokens.device)
    given = flat.masked_fill(masked, base.mask_token).view_as(tokens)
    labels = flat.masked_fill(~masked, IGNORED).view_as(tokens)
    return F.cross_entropy(base.logits(given, text).float(), labels, ignore_index=IGNORED)


@torch.no_grad()
def sample_tokens(
    base: MaskedBase, logits: Callable[[Tensor], Tensor], seed: int, *, steps: int, temperature: tuple[float, float]
) -> Tensor:
    """One picture's tokens [1, h, w]. `logits`: of tokens [1, h, w], some masked, [1, codebook, h, w]. The seed's
    generator is the only source of chance; `temperature` falls from its first to its second value."""
    generator = torch.Generator().manual_seed(seed)
    # a fresh scheduler every time: it carries its timesteps
    scheduler = type(base.pipeline.scheduler).from_config(base.pipeline.scheduler.config)
    scheduler.set_timesteps(steps, temperature, base.device)
    tokens = torch.full((1, base.grid, base.grid), base.mask_token, dtype=torch.long, device=base.device)
    for timestep in scheduler.timesteps:
        tokens = scheduler.step(logits(tokens), timestep, tokens, generator=generator).prev_sample
    return tokens
