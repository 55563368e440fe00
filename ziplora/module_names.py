"""Names of modules: our canonical paths, and how kohya's tools and the original (sgm) code name the same modules.

A canonical path is a component and diffusers' own module name, `unet.down_blocks.1.attentions.0.proj_in`; text encoders
always with `text_model.`. kohya joins names with underscores, which are part of names too. The vocabulary of the two
architectures is small and closed, so every name is flattened to underscores and matched against that grammar: no
flat name has two readings in it, sgm names need no base model to be translated, and a name outside it is told apart.
"""

import re
from dataclasses import dataclass
from typing import Literal

Architecture = Literal["sdxl", "sd15"]

_N = r"(0|[1-9]\d{0,2})"

# Modules outside the blocks: canonical, sgm
_OUTER = (
    ("conv_in", "input_blocks.0.0"),
    ("conv_out", "out.2"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
)
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Inside an attention block sgm and diffusers agree. `processor` and a bare `to_out` are the oldest diffusers spelling.
_ATTENTION = (
    (re.compile(r"proj_(in|out)"), r"proj_\1"),
    (
        re.compile(rf"transformer_blocks_{_N}_attn([12])_(?:processor_)?to_([qkv])"),
        r"transformer_blocks.\1.attn\2.to_\3",
    ),
    (
        re.compile(rf"transformer_blocks_{_N}_attn([12])_(?:processor_)?to_out(?:_0)?"),
        r"transformer_blocks.\1.attn\2.to_out.0",
    ),
    (re.compile(rf"transformer_blocks_{_N}_ff_net_0_proj"), r"transformer_blocks.\1.ff.net.0.proj"),
    (re.compile(rf"transformer_blocks_{_N}_ff_net_2"), r"transformer_blocks.\1.ff.net.2"),
)
_TEXT = (
    (re.compile(rf"(?:text_model_)?encoder_layers_{_N}_self_attn_([qkv])_proj"), r"self_attn.\2_proj"),
    (re.compile(rf"(?:text_model_)?encoder_layers_{_N}_self_attn_to_([qkv])"), r"self_attn.\2_proj"),
    (re.compile(rf"(?:text_model_)?encoder_layers_{_N}_self_attn_(?:out_proj|to_out)"), r"self_attn.out_proj"),
    (re.compile(rf"(?:text_model_)?encoder_layers_{_N}_mlp_fc([12])"), r"mlp.fc\2"),
)
_TARGET = re.compile(r"unet\..+\.attn[12]\.(?:to_q|to_k|to_v|to_out\.0)")
_DIFFUSERS_BLOCK = re.compile(
    rf"(?:(down|up)_blocks_{_N}|(mid)_block)_(resnets|attentions|downsamplers|upsamplers)_{_N}_(\w+)"
)
_SGM_BLOCK = re.compile(rf"(?:(input|output)_blocks_{_N}|(middle)_block)_{_N}_(\w+)")

# How files name components, before the module's own name. The empty prefix stands for a bare name.
_PREFIXES = (
    ("lora_unet_", "unet"),
    ("lycoris_", "unet"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("unet.", "unet"),
    ("diffusion_model.", "unet"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("", "unet"),
)
_PEFT_WRAPPER = re.compile(r"^((?:unet|text_encoder|text_encoder_2)\.)?base_model\.model\.")


@dataclass(frozen=True, slots=True)
class Located:
    """A module name of a file, understood."""

    path: str  # canonical
    blocks: Literal["diffusers", "sgm", "text"]
    joined: Literal[".", "_"]  # what the file's name is joined with


def is_target(path: str) -> bool:
    """Whether ZipLoRA merges this module: an attention linear of the UNet (to_q, to_k, to_v, to_out.0)."""
    return _TARGET.fullmatch(path) is not None


CONTEXT = "unet.context"  # the encoded prompt


def input_of(path: str) -> str:
    """Names what the merge target at `path` reads; layers with the same name here read the very same tensor.

    q, k and v of a self-attention share one, k and v of all cross-attentions another: SDXL's 560 targets have 281.
    """
    if path.endswith((".attn2.to_k", ".attn2.to_v")):
        return CONTEXT
    if path.endswith((".attn1.to_q", ".attn1.to_k", ".attn1.to_v")):
        return path.rpartition(".")[0]
    return path


def component(path: str) -> str:
    """`unet`, `text_encoder` or `text_encoder_2`."""
    return path.partition(".")[0]


def locate(name: str) -> Located | None:
    """The canonical path of a module as a LoRA file names it (without `.lora_down` and the like), or None."""
    name = _PEFT_WRAPPER.sub(r"\1", name)
    for prefix, owner in _PREFIXES:
        if name.startswith(prefix):
            flat = name.removeprefix(prefix).replace(".", "_")
            joined: Literal[".", "_"] = "_" if prefix.endswith("_") else "."
            if owner != "unet":
                inner = _text_name(flat)
                return Located(f"{owner}.{inner}", "text", joined) if inner else None
            if inner := _from_diffusers(flat):
                return Located(f"unet.{inner}", "diffusers", joined)
            inner = _from_sgm(flat)
            return Located(f"unet.{inner}", "sgm", joined) if inner else None
    return None


def canonical(path: str) -> str:
    """A base model's own module path in canonical spelling: transformers ≥ 5 leaves `text_model.` out of some."""
    owner, _, inner = path.partition(".")
    if owner.startswith("text_encoder") and inner.startswith(("encoder.", "embeddings.", "final_layer_norm")):
        return f"{owner}.text_model.{inner}"
    return path


def kohya_name(path: str, architecture: Architecture) -> str:
    """`lora_unet_…`, `lora_te…`: sgm block names for SDXL, diffusers' for SD 1.5, as kohya's trainer writes them.

    Raises ValueError for a path that is no canonical one.
    """
    owner, _, inner = path.partition(".")
    if owner == "unet":
        return "lora_unet_" + (to_sgm(inner) if architecture == "sdxl" else inner).replace(".", "_")
    prefix = {("text_encoder", "sdxl"): "lora_te1_", ("text_encoder_2", "sdxl"): "lora_te2_"}
    prefix |= {("text_encoder", "sd15"): "lora_te_"}
    if (owner, architecture) not in prefix:
        raise ValueError(f"{architecture} has no component {owner!r} (module {path})")
    return prefix[owner, architecture] + inner.replace(".", "_")


def to_sgm(inner: str) -> str:
    """SDXL's sgm name of a UNet module, from diffusers' name: each block has 3 entries, input_blocks ends in `op`."""
    for name, sgm in _OUTER:
        if inner == name:
            return sgm
    match inner.split("."):
        case ["down_blocks", i, "resnets", j, layer] if layer in _RESNET:
            return f"input_blocks.{3 * int(i) + 1 + int(j)}.0.{_RESNET[layer]}"
        case ["down_blocks", i, "attentions", j, *rest]:
            return ".".join([f"input_blocks.{3 * int(i) + 1 + int(j)}.1", *rest])
        case ["down_blocks", i, "downsamplers", "0", "conv"]:
            return f"input_blocks.{3 * int(i) + 3}.0.op"
        case ["mid_block", "resnets", j, layer] if layer in _RESNET:
            return f"middle_block.{2 * int(j)}.{_RESNET[layer]}"
        case ["mid_block", "attentions", "0", *rest]:
            return ".".join(["middle_block.1", *rest])
        case ["up_blocks", i, "resnets", j, layer] if layer in _RESNET:
            return f"output_blocks.{3 * int(i) + int(j)}.0.{_RESNET[layer]}"
        case ["up_blocks", i, "attentions", j, *rest]:
            return ".".join([f"output_blocks.{3 * int(i) + int(j)}.1", *rest])
        case ["up_blocks", i, "upsamplers", "0", "conv"]:
            return f"output_blocks.{3 * int(i) + 2}.2.conv"
    raise ValueError(f"{inner} is no module of SDXL's UNet that has an sgm name")


def _from_diffusers(flat: str) -> str | None:
    for name, _ in _OUTER:
        if flat == name.replace(".", "_"):
            return name
    found = _DIFFUSERS_BLOCK.fullmatch(flat)
    if not found:
        return None
    side, i, mid, kind, j, rest = found.groups()
    block = f"{side}_blocks.{i}" if side else f"{mid}_block"
    if kind == "attentions":
        inner = _attention_name(rest)
        return f"{block}.attentions.{j}.{inner}" if inner else None
    if kind == "resnets":
        return f"{block}.resnets.{j}.{rest}" if rest in _RESNET else None
    fits = rest == "conv" and (side, kind) in {("down", "downsamplers"), ("up", "upsamplers")}
    return f"{block}.{kind}.{j}.conv" if fits else None


def _from_sgm(flat: str) -> str | None:
    for name, sgm in _OUTER:
        if flat == sgm.replace(".", "_"):
            return name
    found = _SGM_BLOCK.fullmatch(flat)
    if not found:
        return None
    side, entry, middle, part, rest = found.groups()
    resnet = next((name for name, sgm in _RESNET.items() if rest == sgm.replace(".", "_")), None)
    attention = _attention_name(rest)
    if middle:
        if part == "1":
            return f"mid_block.attentions.0.{attention}" if attention else None
        return f"mid_block.resnets.{int(part) // 2}.{resnet}" if resnet and part in ("0", "2") else None
    i, j = divmod(int(entry) - (side == "input"), 3)
    block = f"{'down' if side == 'input' else 'up'}_blocks.{i}"
    if i < 0:
        return None
    if side == "input" and j == 2:
        return f"{block}.downsamplers.0.conv" if (part, rest) == ("0", "op") else None
    if part == "0" and resnet:
        return f"{block}.resnets.{j}.{resnet}"
    if part == "1" and attention:
        return f"{block}.attentions.{j}.{attention}"
    if side == "output" and j == 2 and rest == "conv" and part in ("1", "2"):  # 1 in a block without attention
        return f"{block}.upsamplers.0.conv"
    return None


def _attention_name(flat: str) -> str | None:
    for pattern, template in _ATTENTION:
        if found := pattern.fullmatch(flat):
            return found.expand(template)
    return None


def _text_name(flat: str) -> str | None:
    if flat in ("text_projection", "text_model_text_projection"):
        return "text_projection"
    for pattern, template in _TEXT:
        if found := pattern.fullmatch(flat):
            return f"text_model.encoder.layers.{found[1]}." + found.expand(template)
    return None
