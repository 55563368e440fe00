"""Random pipelines with the block layout of SDXL and of SD 1.5, two million parameters, built offline in a moment.

The module names are those of the real models, except that SDXL's deeper transformers have 2 blocks in place of 10.
Images are 64×64 by default: 8×8 latents, as the autoencoders shrink by 8 like the real ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UVit2DModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ziplora.pocket.models import byte_characters, pipeline

TEXT_WIDTH = 32
SDXL_TARGETS = 176
SD15_TARGETS = 128


def tiny_sdxl(dtype: torch.dtype = torch.float32, seed: int = 0) -> StableDiffusionXLPipeline:
    """A random SDXL pipeline on the CPU, in evaluation mode; a seed gives the same weights in every dtype, rounded."""
    with _seeded(seed):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32, 64),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            attention_head_dim=(2, 4, 8),
            norm_num_groups=8,
            cross_attention_dim=2 * TEXT_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        )
        text_encoder = CLIPTextModel(text_config("quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(text_config("gelu"))
        vae = _vae(scaling_factor=0.13025)
    encoders = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    return _ready(pipeline({"unet": unet, "vae": vae, **encoders, **tokenizers()}), dtype)


def tiny_sd15(dtype: torch.dtype = torch.float32, seed: int = 0) -> StableDiffusionPipeline:
    """A random SD 1.5 pipeline on the CPU in evaluation mode, its 128 merge targets named as in the real model."""
    with _seeded(seed):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=2,
            attention_head_dim=4,
            norm_num_groups=8,
            cross_attention_dim=TEXT_WIDTH,
        )
        text_encoder = CLIPTextModel(text_config("quick_gelu"))
        vae = _vae(scaling_factor=0.18215)
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizers()["tokenizer"]}
    return _ready(pipeline(parts), dtype)


def tiny_amused(dtype: torch.dtype = torch.float32, seed: int = 0) -> AmusedPipeline:
    """A random aMUSEd pipeline on the CPU: 8×8 tokens of a codebook of 32, pictures of 16×16."""
    with _seeded(seed):
        transformer = UVit2DModel(
            hidden_size=32,
            cond_embed_dim=TEXT_WIDTH,
            micro_cond_encode_dim=8,
            micro_cond_embed_dim=5 * 8,
            encoder_hidden_size=TEXT_WIDTH,
            vocab_size=40,
            codebook_size=32,
            in_channels=32,
            block_out_channels=32,
            num_res_blocks=1,
            block_num_heads=4,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            sample_size=8,
        )
        text_encoder = CLIPTextModelWithProjection(text_config("quick_gelu"))
        vqvae = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            latent_channels=8,
            num_vq_embeddings=32,
            norm_num_groups=4,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        )
        torch.nn.init.normal_(vqvae.quantize.embedding.weight, std=0.2)
    pipe = AmusedPipeline(
        vqvae=vqvae,
        tokenizer=tokenizer(pad="<|endoftext|>"),
        text_encoder=text_encoder,
        transformer=transformer,
        scheduler=AmusedScheduler(mask_token_id=39),
    )
    return _ready(pipe, dtype)


def tokenizers() -> dict[str, CLIPTokenizer]:
    """Both of SDXL, as the parts of a pipeline."""
    return {"tokenizer": tokenizer(pad="<|endoftext|>"), "tokenizer_2": tokenizer(pad="!")}


def tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's tokenizer without merges: 256 byte characters, the same with `</w>`, and two specials."""
    characters = byte_characters()
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token=pad, model_max_length=77)


def text_config(
    activation: str, width: int = TEXT_WIDTH, layers: int = 3, heads: int = 4, intermediate: int = 2 * TEXT_WIDTH
) -> CLIPTextConfig:
    """Of an encoder for what `tokenizer` gives."""
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=intermediate,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Construction under a seed of its own; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _ready(pipe, dtype):
    pipe.set_progress_bar_config(disable=True)
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            torch.nn.Module.to(model, dtype).requires_grad_(
                False
            ).eval()  # diffusers' own `to` warns of nothing to warn of
    return pipe
