"""LoRA files as the tools in the wild write them, from a canonical LoRA: one writer per layout, by name in `LAYOUTS`.

The names are made here from the rules of each tool, not by the code under test. A file's own factors are such that
alpha/rank times them gives the canonical LoRA.
"""

import json
import math
import re
from collections.abc import Callable, Mapping

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ziplora.lora import Layer, LoRA

Shapes = Mapping[str, tuple[int, ...]]
File = tuple[dict[str, Tensor], dict[str, str]]  # tensors, metadata


def shapes_of(pipe, kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)) -> dict[str, tuple[int, ...]]:
    """Weight shapes of a pipeline's UNet and text encoders by canonical path."""
    shapes = {}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        for inner, module in getattr(pipe, name, nn.Module()).named_modules():
            if isinstance(module, kinds):
                lacks = name != "unet" and inner.startswith("encoder.")
                shapes[f"{name}.{'text_model.' if lacks else ''}{inner}"] = tuple(module.weight.shape)
    return shapes


def random_lora(
    shapes: Shapes, rank: int | Callable[[str], int] = 4, seed: int = 0, size: float = 0.25, dtype=torch.float32
) -> LoRA:
    """Factors in steps of 1/256, about `size` large: sums and products with short numbers stay exact in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * size * 256).round().div(256).to(dtype)

    layers = {}
    for path, (n_out, n_in, *kernel) in shapes.items():
        r = rank if isinstance(rank, int) else rank(path)
        layers[path] = Layer(values(r, n_in, *kernel), values(n_out, r, *[1] * len(kernel)))
    return LoRA(layers)


def differing_alphas(lora: LoRA) -> dict[str, float]:
    """An alpha for each module, none equal to its neighbour's; alpha/rank is a power of two, so nothing is rounded."""
    return {path: layer.rank * (0.5, 1.0, 2.0, 0.25)[i % 4] for i, (path, layer) in enumerate(lora.layers.items())}


def lora_file(
    lora: LoRA,
    layout: str,
    *,
    alphas: Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """A safetensors file of this LoRA in one of `LAYOUTS`; without `alphas`, none are written and the scale is 1."""
    tensors, header = LAYOUTS[layout](lora, alphas or {})
    tensors = {k: (v if k.endswith(".alpha") else v.to(dtype or v.dtype)).contiguous() for k, v in tensors.items()}
    return save(tensors, {"format": "pt", **header, **(metadata or {})})


def sgm(inner: str) -> str:
    """SDXL's sgm name by substitution on diffusers' name."""
    inner = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }.get(inner, inner)

    def entry(match: re.Match[str]) -> str:
        side, i, kind, j = match[1], int(match[2]), match[3], int(match[4])
        part = {"resnets": 0, "attentions": 1}[kind]
        return f"input_blocks.{3 * i + 1 + j}.{part}" if side == "down" else f"output_blocks.{3 * i + j}.{part}"

    inner = re.sub(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)", entry, inner)
    inner = re.sub(
        r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op", inner
    )
    inner = re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2.conv", inner
    )
    inner = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", inner)
    inner = inner.replace("mid_block.attentions.0", "middle_block.1")
    for ours, theirs in (
        ("time_emb_proj", "emb_layers.1"),
        ("conv_shortcut", "skip_connection"),
        ("conv1", "in_layers.2"),
        ("conv2", "out_layers.3"),
    ):
        inner = re.sub(rf"\.{ours}$", f".{theirs}", inner)
    return inner


def _split(path: str) -> tuple[str, str]:
    owner, _, inner = path.partition(".")
    return owner, inner


def _stored(layer: Layer, alpha: float | None) -> tuple[Tensor, Tensor]:
    """down and up as the file holds them, so that alpha/rank·up·down is the layer's ΔW."""
    return layer.down, layer.up if alpha is None else layer.up * (layer.rank / alpha)


def _peft_config(lora: LoRA, alphas: Mapping[str, float], rslora: bool = False) -> dict[str, str]:
    """diffusers' lora_adapter_metadata: a LoraConfig per component; ranks and alphas beside the largest as patterns."""
    if not alphas:
        return {}
    config: dict[str, object] = {}
    for owner in dict.fromkeys(_split(path)[0] for path in lora.layers):
        mine = {inner: path for path in lora.layers for o, inner in [_split(path)] if o == owner}
        ranks = {inner: lora.layers[path].rank for inner, path in mine.items()}
        values = {inner: alphas[path] for inner, path in mine.items()}
        r, alpha = max(ranks.values()), max(values.values())
        config |= {
            f"{owner}.r": r,
            f"{owner}.lora_alpha": alpha,
            f"{owner}.rank_pattern": {inner: each for inner, each in ranks.items() if each != r},
            f"{owner}.alpha_pattern": {inner: each for inner, each in values.items() if each != alpha},
            f"{owner}.use_rslora": rslora,
            f"{owner}.use_dora": False,
            f"{owner}.lora_bias": False,
            f"{owner}.target_modules": sorted(mine),
        }
    return {"lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}


def _peft(lora: LoRA, alphas: Mapping[str, float]) -> File:
    tensors = {}
    for path, layer in lora.layers.items():
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = _stored(layer, alphas.get(path))
    return tensors, _peft_config(lora, alphas)


def _peft_rslora(lora: LoRA, alphas: Mapping[str, float]) -> File:
    """alpha/√rank: the stored factors are such that the ranks 4 and 16 stay exact."""
    tensors = {}
    for path, layer in lora.layers.items():
        alpha = alphas.get(path, float(layer.rank))
        tensors[f"{path}.lora_A.weight"] = layer.down
        tensors[f"{path}.lora_B.weight"] = layer.up * (math.sqrt(layer.rank) / alpha)
    every = {path: alphas.get(path, float(layer.rank)) for path, layer in lora.layers.items()}
    return tensors, _peft_config(lora, every, rslora=True)


def _peft_without_unet(lora: LoRA, alphas: Mapping[str, float]) -> File:
    """Bare UNet names, and text encoders as transformers ≥ 5 names them, without `text_model.`."""
    tensors, metadata = _peft(lora, alphas)
    return {k.removeprefix("unet.").replace(".text_model.", "."): v for k, v in tensors.items()}, metadata


def _peft_wrapped(lora: LoRA, alphas: Mapping[str, float]) -> File:
    """PEFT's own state_dict with its adapter's name."""
    tensors, metadata = _peft(lora, alphas)
    return {
        "base_model.model." + re.sub(r"\.(lora_[AB])\.", r".\1.default.", k): v for k, v in tensors.items()
    }, metadata


def _dreambooth(lora: LoRA, alphas: Mapping[str, float]) -> File:
    """diffusers' training script: `lora.down`, in text encoders `lora_linear_layer`; every third module lora_A/B."""
    tensors = {}
    for i, (path, layer) in enumerate(lora.layers.items()):
        down, up = ("lora_A", "lora_B") if i % 3 == 0 else ("lora.down", "lora.up")
        if i % 3 and path.startswith("text"):
            down, up = "lora_linear_layer.down", "lora_linear_layer.up"
        tensors[f"{path}.{down}.weight"], tensors[f"{path}.{up}.weight"] = _stored(layer, alphas.get(path))
    return tensors, _peft_config(lora, alphas)


def _legacy(lora: LoRA, alphas: Mapping[str, float]) -> File:
    """Attention processors of diffusers < 0.22; what they cannot hold, as the script wrote it."""
    tensors = {}
    for path, layer in lora.layers.items():
        name = re.sub(r"\.(attn[12])\.(to_[qkv])$", r".\1.processor.\2_lora", path)
        name = re.sub(r"\.(attn[12])\.to_out\.0$", r".\1.processor.to_out_lora", name)
        name = re.sub(r"\.self_attn\.([qkv])_proj$", r".self_attn.to_\1_lora", name)
        name = re.sub(r"\.self_attn\.out_proj$", r".self_attn.to_out_lora", name)
        name = name if name.endswith("_lora") else f"{name}.lora"
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = _stored(layer, alphas.get(path))
        if path in alphas:
            tensors[f"{name.removesuffix('.lora').removesuffix('_lora')}.alpha"] = torch.tensor(alphas[path])
    return tensors, {}


def _kohya(rename: Callable[[str], str], first_text_encoder: str) -> Callable[[LoRA, Mapping[str, float]], File]:
    prefixes = {"unet": "lora_unet_", "text_encoder": first_text_encoder, "text_encoder_2": "lora_te2_"}

    def write(lora: LoRA, alphas: Mapping[str, float]) -> File:
        tensors = {}
        for path, layer in lora.layers.items():
            owner, inner = _split(path)
            name = prefixes[owner] + (rename(inner) if owner == "unet" else inner).replace(".", "_")
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = _stored(layer, alphas.get(path))
            if path in alphas:
                tensors[f"{name}.alpha"] = torch.tensor(alphas[path])
        return tensors, {"ss_network_module": "networks.lora"}

    return write


def _comfyui(lora: LoRA, alphas: Mapping[str, float]) -> File:
    """ComfyUI's own saver: sgm names with dots."""
    prefixes = {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
    }
    tensors = {}
    for path, layer in lora.layers.items():
        owner, inner = _split(path)
        name = "diffusion_model." + sgm(inner) if owner == "unet" else prefixes[owner] + inner
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = _stored(layer, alphas.get(path))
        if path in alphas:
            tensors[f"{name}.alpha"] = torch.tensor(alphas[path])
    return tensors, {}


LAYOUTS: dict[str, Callable[[LoRA, Mapping[str, float]], File]] = {
    "peft": _peft,
    "peft, rslora": _peft_rslora,
    "peft, bare names": _peft_without_unet,
    "peft, wrapped": _peft_wrapped,
    "dreambooth": _dreambooth,
    "legacy": _legacy,
    "kohya-sgm": _kohya(sgm, "lora_te1_"),
    "kohya-diffusers": _kohya(lambda inner: inner, "lora_te1_"),
    "kohya-sd15": _kohya(lambda inner: inner, "lora_te_"),
    "comfyui": _comfyui,
}
SDXL_LAYOUTS = tuple(name for name in LAYOUTS if name != "kohya-sd15")
SD15_LAYOUTS = tuple(name for name in LAYOUTS if name not in ("kohya-sgm", "kohya-diffusers"))
