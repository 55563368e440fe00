"""Random scorers of a few thousand parameters, saved as users' scorers are: a CLIP, a ViT and a ResNet."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from tests.tiny import tokenizer

SIDE = 32  # pixels
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_clip(directory: Path, seed: int = 0) -> Path:
    text = CLIPTextConfig(
        vocab_size=514, max_position_embeddings=77, bos_token_id=512, eos_token_id=513, pad_token_id=513, **SMALL
    )
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=8, **SMALL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
        CLIPModel(config).save_pretrained(directory)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(directory)
    tokenizer(pad="<|endoftext|>").save_pretrained(directory)
    return directory


def tiny_vit(directory: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ViTModel(ViTConfig(image_size=SIDE, patch_size=8, **SMALL), add_pooling_layer=False).save_pretrained(directory)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(directory)
    return directory


def tiny_resnet(directory: Path, seed: int = 0) -> Path:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ResNetModel(config).save_pretrained(directory)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(directory)
    return directory
