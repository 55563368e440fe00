"""SDXL and SD 1.5 in miniature: the same classes and block layouts, made small. Deterministic given torch's seed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ziplora.pocket import world

N_TOKENS = 24  # a prompt's length, start and end included; CLIP's is 77
TEXT_WIDTH = 64  # each of the two text encoders; the UNet sees both side by side
LATENT_SIZE = world.SIZE // 4

Family = Literal["sdxl", "sd15"]

SHAPE_TRIGGERS = ("sks", "ohwx", "zwx", "qvx")
STYLE_TRIGGERS = ("szn", "bnha", "tok", "mrk")
TRIGGERS = ("sks", "szn", "ohwx", "zwx", "qvx", "bnha", "tok", "mrk")
"""Words that are one token and that no training caption has: free to be given a meaning."""


def words() -> list[str]:
    """Every word of the world's captions, and the triggers, in a fixed order."""
    found = ["a", "an", "and", "in", "of", "on", "with", "photo", "style", "thing", "some", "outline", ","]
    found += [*world.SHAPES, *world.STYLES, *world.COLOURS, *world.EXTRAS]
    found += [*world.FILLS, *world.GROUNDS, *world.OUTLINES, *world.EDGES, *TRIGGERS]
    return list(dict.fromkeys(found))


def byte_characters() -> list[str]:
    """The printable stand-ins of GPT-2's byte-level BPE, in CLIP's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(moved))]


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while True:
        pairs = [pair for pair in itertools.pairwise(pieces) if pair in ranks]
        if not pairs:
            return pieces
        best = min(pairs, key=lambda pair: ranks[pair])
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == best:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined


def bpe(vocabulary_words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """vocab and merges under which each given word is one token and any other text falls into bytes and shared pieces.

    A word's missing merges are appended, so they rank below all earlier ones and never disturb a word that is done.
    """
    characters = byte_characters()
    ranks: dict[tuple[str, str], int] = {}
    for word in vocabulary_words:
        pieces = _merge([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[(pieces[0], pieces[1])] = len(ranks)
            pieces = _merge([pieces[0] + pieces[1], *pieces[2:]], ranks)
    tokens = [*characters, *(c + "</w>" for c in characters), *dict.fromkeys(a + b for a, b in ranks)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, list(ranks)


def tokenizer(folder: Path, *, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Write vocab.json and merges.txt into `folder` and load them. SDXL's second tokenizer pads with "!"."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = bpe(words())
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), pad_token=pad, model_max_length=N_TOKENS
    )


def text_config(n_vocabulary: int, *, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=n_vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=N_TOKENS,
        hidden_act=activation,
        bos_token_id=n_vocabulary - 2,
        eos_token_id=n_vocabulary - 1,
        pad_token_id=n_vocabulary - 1,
    )


def vae(widths: tuple[int, int, int] = (16, 32, 64)) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def unet(widths: tuple[int, int, int] = (32, 64, 128)) -> UNet2DConditionModel:
    """SDXL's blocks: no attention at full size, then two levels with it. 56 attention linears (SDXL: 560)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=widths,
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=tuple(w // 32 for w in widths),
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
        norm_num_groups=16,
    )


def unet_sd15(widths: tuple[int, int, int, int] = (32, 64, 128, 128)) -> UNet2DConditionModel:
    """SD 1.5's blocks: attention at the first three of four levels, as many heads at each, proj_in and proj_out
    convolutions, nothing but the time beside the text. 80 attention linears (SD 1.5: 128)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=4,  # diffusers' name for the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's own settings."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        interpolation_type="linear",
    )


def scheduler_sd15() -> PNDMScheduler:
    """SD 1.5's own settings."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(parts: dict[str, Any]) -> StableDiffusionXLPipeline | StableDiffusionPipeline:
    if "text_encoder_2" not in parts:
        return StableDiffusionPipeline(
            vae=parts["vae"],
            text_encoder=parts["text_encoder"],
            tokenizer=parts["tokenizer"],
            unet=parts["unet"],
            scheduler=scheduler_sd15(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        text_encoder_2=parts["text_encoder_2"],
        tokenizer=parts["tokenizer"],
        tokenizer_2=parts["tokenizer_2"],
        unet=parts["unet"],
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def build(folder: Path, family: Family = "sdxl") -> dict[str, Any]:
    """All parts, untrained. The tokenizers' files go under `folder`."""
    first = tokenizer(folder / "tokenizer")
    n_vocabulary = len(first)
    text_encoder = CLIPTextModel(text_config(n_vocabulary, activation="quick_gelu"))
    if family == "sd15":
        return {"tokenizer": first, "text_encoder": text_encoder, "unet": unet_sd15(), "vae": vae()}
    return {
        "tokenizer": first,
        "tokenizer_2": tokenizer(folder / "tokenizer_2", pad="!"),
        "text_encoder": text_encoder,
        "text_encoder_2": CLIPTextModelWithProjection(text_config(n_vocabulary, activation="gelu")),
        "unet": unet(),
        "vae": vae(),
    }


def encode(parts: dict[str, Any], prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """As SDXL: both encoders' last but one hidden states [n, N_TOKENS, 2·TEXT_WIDTH], and pooled [n, TEXT_WIDTH]."""
    hidden, pooled = [], None
    for suffix in ("", "_2"):
        ids = parts[f"tokenizer{suffix}"](
            prompts, padding="max_length", max_length=N_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        output = parts[f"text_encoder{suffix}"](ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        pooled = output[0]
    assert pooled is not None
    return torch.cat(hidden, dim=-1), pooled


def n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
