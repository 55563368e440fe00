"""Is a merge good? Three alignments of sampled pictures, each the mean cosine over the full matrix of pairs.

- style (CLIP-I): CLIP image features of the samples × those of the style's reference pictures;
- subject (DINO): class token of a self-supervised ViT, samples × the subject's pictures;
- text (CLIP-T): CLIP image features of the samples × CLIP text features of their prompts.

The paper does not say which models it used; its table is nearest to CLIP ViT-B/32 (`openai/clip-vit-base-patch32`)
and DINO ViT-S/16 (`facebook/dino-vits16`). Any `CLIPModel`, and any ViT or ResNet, will do; a score is
comparable only
with scores of the same `Judge.digest`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

CLIP = "openai/clip-vit-base-patch32"
DINO = "facebook/dino-vits16"


@dataclass(frozen=True, slots=True)
class Judge:
    """A scorer: unit feature vectors [n, d] of pictures, and of prompts where the model has a text side."""

    source: str  # model id or path, as the user gave it
    digest: str  # sha256 of the weights
    images: Callable[[Sequence[Image.Image]], Tensor]
    texts: Callable[[Sequence[str]], Tensor] | None


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean cosines; None where there was nothing to compare with."""

    style: float | None
    subject: float | None
    text: float | None


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean of the full pairwise matrix of cosines between rows of `a` [n, d] and rows of `b` [m, d]."""
    return (F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).T).mean().item()


def load_clip(
    source: str | Path = CLIP, *, revision: str | None = None, device: str | torch.device = "cpu", batch: int = 32
) -> Judge:
    """A CLIP from the hub or a directory. Raises OSError."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(source, revision=revision, dtype=torch.float32).eval().to(device)
    prepare = _image_processor(source, revision)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    n_tokens = model.config.text_config.max_position_embeddings

    def images(pictures: Sequence[Image.Image]) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=prepare(pictures).to(device)).pooler_output)

    def texts(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=n_tokens, truncation=True, return_tensors="pt"
        ).to(device)
        output = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return model.text_projection(output.pooler_output)

    return Judge(str(source), digest(model), _batched(images, batch), _batched(texts, batch))


def load_dino(
    source: str | Path = DINO, *, revision: str | None = None, device: str | torch.device = "cpu", batch: int = 32
) -> Judge:
    """A DINO: a ViT, judged by its class token, or a ResNet, by its pooled features. Raises OSError if not found."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32).eval().to(device)
    if any(name.startswith("pooler.") for name, _ in model.named_parameters()):
        # not used, and random where the checkpoint has none (DINO's): the digest must not see it
        model.pooler = torch.nn.Identity()
    prepare = _image_processor(source, revision)

    def images(pictures: Sequence[Image.Image]) -> Tensor:
        output = model(pixel_values=prepare(pictures).to(device))
        if output.last_hidden_state.ndim == 4:
            return output.last_hidden_state.mean((2, 3))
        return output.last_hidden_state[:, 0]

    return Judge(str(source), digest(model), _batched(images, batch), None)


def digest(model: torch.nn.Module) -> str:
    """sha256 over names, shapes and fp32 values of a model's parameters: equal weights, equal digest."""
    total = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        total.update(f"{name} {list(value.shape)}\n".encode())
        total.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def score(
    samples: Sequence[Image.Image],
    *,
    prompts: Sequence[str] | str = (),
    style_images: Sequence[Image.Image] = (),
    subject_images: Sequence[Image.Image] = (),
    clip: Judge | None = None,
    dino: Judge | None = None,
) -> Scores:
    """Score sampled pictures. `prompts`: one for all (the full matrix), or one for each sample (the mean over samples).

    ValueError where a sequence of prompts does not match the samples, or there are no samples.
    """
    if not samples:
        raise ValueError("no samples to score")
    if not isinstance(prompts, str) and prompts and len(prompts) != len(samples):
        raise ValueError(f"{len(prompts)} prompts for {len(samples)} samples: give one prompt for all or one for each")
    style = subject = text = None
    if clip is not None and (style_images or prompts):
        features = clip.images(samples)
        if style_images:
            style = mean_cosine(features, clip.images(style_images))
        if prompts and clip.texts is not None:
            text = _text_alignment(features, clip.texts([prompts] if isinstance(prompts, str) else prompts), prompts)
    if dino is not None and subject_images:
        subject = mean_cosine(dino.images(samples), dino.images(subject_images))
    return Scores(style, subject, text)


def _text_alignment(images: Tensor, texts: Tensor, prompts: Sequence[str] | str) -> float:
    if isinstance(prompts, str):
        return mean_cosine(images, texts)
    return F.cosine_similarity(images.double(), texts.double(), dim=-1).mean().item()


def _batched(features: Callable[[Any], Tensor], size: int) -> Callable[[Any], Tensor]:
    @torch.inference_mode()
    def run(items: Sequence[Any]) -> Tensor:
        parts = [features(items[i : i + size]) for i in range(0, len(items), size)]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    return run


def _image_processor(source: str | Path, revision: str | None) -> Callable[[Sequence[Image.Image]], Tensor]:
    """The model's own preprocessing, by PIL: the same pixels whether or not torchvision is installed."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(source, revision=revision, backend="pil")

    def prepare(pictures: Sequence[Image.Image]) -> Tensor:
        return processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt").pixel_values

    return prepare
