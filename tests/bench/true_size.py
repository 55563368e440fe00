"""ZipLoRA's step on an SDXL UNet of true size with random weights: ours and the dense form of public code, side by
side in one run.

    python -m tests.bench.true_size [--latent 16] [--steps 3] [--dtype bfloat16] [--out FILE]

For each form: seconds per step (median), and peak memory over the base alone, sampled while it runs. Then a rank-64
merge is written as the file that users get, and read back by our inspection and by diffusers. The dense form holds
ΔW_c and ΔW_s as matrices, builds ΔW_c·diag(m_c) + ΔW_s·diag(m_s) in every forward pass, and runs two teacher and
two student passes per step.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from tests.bench.dense import dense_layers, dense_step, installed
from tests.bench.measuring import PeakMemory, machine, seconds, timed_steps
from tests.bench.models import random_lora, random_unet
from ziplora.base import Base, Conditioning
from ziplora.calibrate import Calibration
from ziplora.formats import save_kohya
from ziplora.layouts import inspect_file
from ziplora.lora import LoRA, stacked
from ziplora.merged import Pair
from ziplora.optimize import Optimization
from ziplora.optimize_knobs import ZipLoRAKnobs
from ziplora.slots import Slots


def resident_base(unet: UNet2DConditionModel) -> Base:
    alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    return Base(SimpleNamespace(unet=unet, vae_scale_factor=8), "sdxl", Slots({"unet": unet}), alphas)


def random_draws(base: Base, n: int, latent: int, seed: int) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(base.device, base.dtype)

    timesteps = torch.randint(0, 1000, (n,), generator=generator)
    return normal(n, 4, latent, latent), timesteps, Conditioning(normal(1, 77, 2048), normal(1, 1280))


def calibration(base: Base, lora: LoRA, n: int, latent: int, seed: int) -> Calibration:
    noisy, timesteps, conditioning = random_draws(base, n, latent, seed)
    with torch.no_grad(), base.slots.loaded([[lora]]):
        target = torch.cat([base.predict_noise(noisy[i : i + 1], timesteps[i : i + 1], conditioning) for i in range(n)])
    return Calibration("", noisy, timesteps, target, conditioning, "images")


def measure_ours(base: Base, subject: LoRA, style: LoRA, options: argparse.Namespace, device: str) -> dict[str, Any]:
    with PeakMemory(device) as memory:
        draws = options.steps + 1
        known: list[Calibration] = []

        def observe() -> None:
            known.extend(
                calibration(base, lora, draws, options.latent, i) for i, lora in enumerate((subject, style), 1)
            )

        teachers_s = seconds(observe, device) / draws
        pair = Pair(subject, style, *known)
        optimization = iter(Optimization(base, [pair], ZipLoRAKnobs(steps=draws)))
        found = timed_steps(lambda i: next(optimization), options.steps, device)
        optimization.close()  # type: ignore[attr-defined]
    base.slots.unload()
    return {
        "seconds_per_step": statistics.median(found),
        "seconds_of_both_teachers_per_step": teachers_s,
        "peak_bytes_over_base": memory.bytes,
        "all_seconds": found,
    }


def measure_dense(base: Base, subject: LoRA, style: LoRA, options: argparse.Namespace, device: str) -> dict[str, Any]:
    draws = random_draws(base, options.steps + 1, options.latent, 1)
    with PeakMemory(device) as memory:
        layers = dense_layers(base, subject, style)
        with installed(base, layers):
            found = timed_steps(dense_step(base, layers, draws, draws), options.steps, device)
    return {
        "seconds_per_step": statistics.median(found),
        "peak_bytes_over_base": memory.bytes,
        "all_seconds": found,
    }


def measure_file(base: Base, subject: LoRA, style: LoRA) -> dict[str, Any]:
    """A rank-64 + rank-64 merge as users get it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "merged.safetensors"
        started = time.perf_counter()
        save_kohya(stacked([subject, style]), path, metadata={}, architecture="sdxl", title="bench")
        write_s = time.perf_counter() - started
        seen = inspect_file(path)
        pipeline = StableDiffusionXLPipeline(
            vae=None,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=base.unet,
            scheduler=DDPMScheduler(),
        )
        pipeline.load_lora_weights(path)
        adapted = sum(hasattr(module, "lora_A") for module in base.unet.modules())
        pipeline.unload_lora_weights()
        return {
            "bytes": path.stat().st_size,
            "seconds_to_write": write_s,
            "inspect": {
                "layout": seen.layout,
                "ranks": {str(k): v for k, v in seen.ranks.items()},
                "targets": seen.n_targets,
            },
            "modules_adapted_by_diffusers": adapted,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", type=int, default=16, help="side of the latents (128 at 1024 px)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/true_size.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "command": " ".join(["python -m tests.bench.true_size", *sys.argv[1:]]),
        "machine": machine(),
        "settings": vars(options) | {"out": str(options.out.name)},
    }
    dtype = getattr(torch, options.dtype)
    base = resident_base(random_unet(options.device, dtype))
    result["unet_parameters"] = sum(parameter.numel() for parameter in base.unet.parameters())
    result["targets"] = len(base.slots.targets)
    subject, style = (random_lora(base.slots, options.rank, seed, torch.float16) for seed in (1, 2))
    for name, measure in (("ours", measure_ours), ("ours_checkpointed", measure_ours), ("dense", measure_dense)):
        if name == "ours_checkpointed":  # activations computed twice, not kept
            base.unet.enable_gradient_checkpointing()
        result[name] = measure(base, subject, style, options, options.device)
        base.unet.disable_gradient_checkpointing()
        print(name, json.dumps(result[name]), flush=True)
    ours, dense = result["ours"], result["dense"]
    result["ratio"] = {
        "dense_step_over_our_step": dense["seconds_per_step"] / ours["seconds_per_step"],
        "dense_step_over_our_step_and_teachers": dense["seconds_per_step"]
        / (ours["seconds_per_step"] + ours["seconds_of_both_teachers_per_step"]),
        "our_memory_over_dense_memory": ours["peak_bytes_over_base"] / dense["peak_bytes_over_base"],
        "our_checkpointed_memory_over_dense_memory": result["ours_checkpointed"]["peak_bytes_over_base"]
        / dense["peak_bytes_over_base"],
    }
    print("ratio", json.dumps(result["ratio"]), flush=True)
    result["file"] = measure_file(base, subject, style)
    print("file", json.dumps(result["file"]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
