"""Calibrations as bytes, to be kept between runs: one safetensors file each, named by everything that it depends on.

Moments are stored compactly (`moments.compact`): what a closed form loses by it in the pocket world is stated there.
Everything else is stored as it is.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from ziplora.base import Base, Conditioning
from ziplora.calibrate import Calibration
from ziplora.calibration_settings import CalibrationSettings
from ziplora.errors import FormatError
from ziplora.moments import accumulator, compact, restored

VERSION = 2  # raised whenever the same inputs would give another calibration, or other bytes
PARTS = ("factor", "rest", "scale")  # of a compact moment


def calibration_key(
    lora_digest: str,
    weight: float,
    prompt: str,
    image_digests: Sequence[str],
    settings: CalibrationSettings,
    base_digest: str,
    dtype: torch.dtype,
) -> str:
    """sha256 over all that decides a calibration, 64 hex digits. `dtype` is the base's: in bf16 it predicts otherwise
    than in fp32."""
    identity = [
        VERSION,
        lora_digest,
        weight,
        prompt,
        list(image_digests),
        asdict(settings),
        base_digest,
        str(dtype).removeprefix("torch."),
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_calibration(calibration: Calibration) -> bytes:
    """The calibration as a safetensors file; equal calibrations give equal bytes."""
    tensors = {
        "noisy": calibration.noisy,
        "timesteps": calibration.timesteps,
        "target": calibration.target,
        "embeds": calibration.conditioning.embeds,
    }
    if calibration.conditioning.pooled is not None:
        tensors["pooled"] = calibration.conditioning.pooled
    for name, stored in compact(calibration.moments or {}).items():
        tensors |= {f"moments.{name}.{part}": value for part, value in zip(PARTS, stored, strict=True)}
    about = {
        "version": VERSION,
        "prompt": calibration.prompt,
        "source": calibration.source,
        "output_weights": calibration.output_weights and dict(calibration.output_weights),
    }
    # one key of metadata: with several, safetensors orders them differently from run to run
    metadata = {"ziplora.calibration": json.dumps(about, sort_keys=True)}
    return save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, metadata)


def read_calibration(content: bytes, base: Base, name: str = "calibration") -> Calibration:
    """What `write_calibration` wrote, on the base's device. Raises FormatError for anything else."""
    try:
        tensors = {key: tensor.to(base.device) for key, tensor in load(content).items()}
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        about = json.loads(header["__metadata__"]["ziplora.calibration"])
        if about["version"] != VERSION:
            raise FormatError(f"{name} is of version {about['version']}, this one reads {VERSION}: calibrate again")
        return Calibration(
            about["prompt"],
            tensors["noisy"],
            tensors["timesteps"].cpu(),
            tensors["target"],
            Conditioning(tensors["embeds"], tensors.get("pooled")),
            about["source"],
            _moments(tensors, accumulator(base.dtype)) or None,
            about["output_weights"],
        )
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{name} is no calibration as this version writes them ({error}): calibrate again") from error


def _moments(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    names = [key.removeprefix("moments.").removesuffix(".factor") for key in tensors if key.endswith(".factor")]
    factor, rest, scale = ([tensors[f"moments.{name}.{part}"] for name in names] for part in PARTS)
    return {
        name: restored(stored, dtype) for name, stored in zip(names, zip(factor, rest, scale, strict=True), strict=True)
    }
