"""Adapters that are no plain LoRA for SDXL or SD 1.5, told by their keys, so that a refusal can name what a file is."""

import re
from collections.abc import Collection, Mapping
from functools import lru_cache

from ziplora.errors import FormatError, LoRAError, UnsupportedAdapter
from ziplora.headers import few

ADVICE = "only plain LoRA can be merged exactly: train or convert it as one"

# Keys that no plain LoRA has. (kind, what its keys look like)
ADAPTERS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("DoRA", r"\.dora_scale$|\.lora_magnitude_vector\b"),
        ("LoHa", r"\.hada_[wt]\d"),
        ("LoKr", r"\.lokr_[wt]\d"),
        ("GLoRA", r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$"),
        ("BOFT", r"\.boft_"),
        ("OFT", r"\.oft_"),
        ("IA³", r"\.ia3_|\.on_input$"),
        ("VeRA", r"\.vera_lambda_"),
        ("AdaLoRA", r"\.lora_E\b"),
        ("LyCORIS norm", r"\.[wb]_norm$"),
        ("LyCORIS full-difference", r"\.diff(_b)?$"),
        ("LyCORIS scalar", r"\.scalar$"),
        ("replaced-weight", r"\.(set_weight|reshape_weight)$"),
        ("Tucker-decomposed", r"\.lora_mid\.weight$"),
        ("LoRA bias", r"\.(lora_B|lora_up|lora\.up)(\.[^.]+)?\.bias$"),
        ("embedding LoRA", r"\.lora_embedding_[AB]\b"),
        ("textual inversion", r"^(bundle_emb\.|emb_params$|string_to_param|clip_[lg]$|<[^>]+>$)"),
        ("ControlNet-LLLite", r"^lllite_"),
    )
)
# Modules of other architectures. (architecture, what its keys look like)
FOREIGN = tuple(
    (architecture, re.compile(pattern))
    for architecture, pattern in (
        ("AnimateDiff's motion modules", r"motion_modules"),
        ("Stable Cascade", r"^lora_prior_unet_"),
        ("Stable Diffusion 3", r"joint_(transformer_)?blocks"),
        ("FLUX", r"single_transformer_blocks|(double|single)_blocks[._]\d"),
        ("Wan", r"\bblocks[._]\d+[._](self_attn|cross_attn|ffn)[._]|_blocks_\d+_(self_attn|cross_attn)_[qkvo]\b"),
        ("a T5 text encoder (FLUX or Stable Diffusion 3)", r"^lora_(te3|t5)|^text_encoder_3\."),
        (
            "a diffusion transformer (FLUX, Stable Diffusion 3, Qwen-Image or the like)",
            r"^(base_model\.model\.)?transformer\.|^lora_transformer_|^diffusion_model\.(layers|transformer_blocks)\.",
        ),
        ("a language model", r"\bmodel\.layers\.\d+\.(self_attn|mlp)\."),
    )
)


@lru_cache(32768)
def kind_of(key: str) -> str | None:
    """The kind of adapter that a key belongs to, if it is none of a plain LoRA."""
    return next((kind for kind, pattern in ADAPTERS if pattern.search(key)), None)


def refused_keys(
    name: str, kinds: Mapping[str, list[str]], strange: list[str], every: Collection[str]
) -> list[LoRAError]:
    """Why a file of these keys is not read. `kinds`: keys by `kind_of`; `strange`: not understood; `every`: all."""
    if not every:
        return [FormatError(f"{name} holds no tensors at all: was it saved before training began?")]
    refusals: list[LoRAError] = []
    odd = [*(key for keys in kinds.values() for key in keys), *strange]
    for architecture, pattern in FOREIGN:
        if matching := [key for key in odd if pattern.search(key)]:
            return [
                UnsupportedAdapter(
                    f"{name} is made for {architecture}: {len(matching)} keys such as {few(matching, 1)};"
                    " only LoRAs for SDXL and Stable Diffusion 1.5 can be merged"
                )
            ]
    for kind, keys in kinds.items():
        count = f"{len(keys)} {kind} {'key' if len(keys) == 1 else 'keys'}"
        refusals.append(UnsupportedAdapter(f"{name} is not a plain LoRA: it has {count} ({few(keys)}); {ADVICE}"))
    if strange and not any("lora" in key.lower() for key in every):
        what = f"{name} holds the weights of a model and no LoRA ({len(strange)} keys: {few(strange)})"
        refusals.append(UnsupportedAdapter(f"{what}; name a LoRA file instead"))
    elif strange:
        what = f"{name} has {len(strange)} of {len(every)} keys that are not understood ({few(strange)})"
        refusals.append(
            FormatError(f"{what}; it is not read, as their effect would be lost: was it made for another model?")
        )
    return refusals
