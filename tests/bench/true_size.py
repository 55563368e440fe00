"""ZipLoRA's step on an SDXL UNet of true size with random weights: ours and the dense form of public code, side by
side in one run.

    python -m tests.bench.true_size [--latent 16] [--steps 3] [--dtype bfloat16] [--out FILE]

For each form: seconds per step (median), and peak memory over the base alone, sampled while it runs. Then a rank-64
merge is written as the file that users get, and read back by our inspection and by diffusers. The dense form holds
ΔW_c and ΔW_s as matrices, builds ΔW_c·diag(m_c) + ΔW_s·diag(m_s) in every forward pass, and runs two teacher and
two student passes per step.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import psutil
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from tests.test_module_names import SDXL_UNET
from ziplora.base import Base, Conditioning
from ziplora.calibrate import Calibration
from ziplora.formats import save_kohya
from ziplora.layouts import inspect_file
from ziplora.lora import Layer, LoRA, delta, stacked
from ziplora.merged import Pair
from ziplora.methods import ZipLoRAKnobs
from ziplora.optimize import Optimization
from ziplora.slots import Slots


def random_unet(device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """SDXL's UNet with seeded random weights, made in place: 2,567,463,684 parameters."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=128, **SDXL_UNET)
    unet = unet.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 / parameter[0].numel() ** 0.5, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return unet.requires_grad_(False).eval()


def resident_base(unet: UNet2DConditionModel) -> Base:
    alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    return Base(SimpleNamespace(unet=unet, vae_scale_factor=8), "sdxl", Slots({"unet": unet}), alphas)


def random_lora(slots: Slots, rank: int, seed: int, dtype: torch.dtype) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in slots.targets:
        n_out, n_in = slots.layers[path].weight.shape
        down = torch.randn(rank, n_in, generator=generator) / n_in**0.5
        up = torch.randn(n_out, rank, generator=generator) * 0.05
        layers[path] = Layer(down.to(dtype), up.to(dtype))
    return LoRA(layers)


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


class DenseLinear(nn.Module):
    """What public code puts into every attention layer: two dense updates and their mergers."""

    def __init__(self, base: nn.Linear, subject: Tensor, style: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.mode = base.weight, base.bias, "both"
        self.subject, self.style = subject, style  # [out, in]
        self.mergers = nn.Parameter(torch.ones(2, base.in_features, dtype=torch.float32, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "both":
            m_subject, m_style = self.mergers.to(x.dtype)
            mixed = self.subject * m_subject + self.style * m_style
        else:
            mixed = self.subject if self.mode == "subject" else self.style
        return F.linear(x, self.weight, self.bias) + F.linear(x, mixed)


@contextmanager
def dense_layers(base: Base, subject: LoRA, style: LoRA) -> Iterator[list[DenseLinear]]:
    unet, layers, kept = base.unet, [], {}
    for path in base.slots.targets:
        parent, _, name = path.removeprefix("unet.").rpartition(".")
        owner = unet.get_submodule(parent)
        kept[path] = (owner, name, getattr(owner, name))
        deltas = [delta(lora.layers[path]).to(base.device, base.dtype) for lora in (subject, style)]
        layers.append(DenseLinear(kept[path][2], *deltas))
        setattr(owner, name, layers[-1])
    try:
        yield layers
    finally:
        for owner, name, module in kept.values():
            setattr(owner, name, module)


class PeakMemory:
    """Bytes in use over what was in use at the start: allocator peak on a GPU, resident size sampled every 20 ms on
    a CPU."""

    def __init__(self, device: str) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.start = psutil.Process().memory_info().rss
            self.done = threading.Event()
            self.thread = threading.Thread(target=self._sample)
            self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.02):
            self.bytes = max(self.bytes, psutil.Process().memory_info().rss - self.start)

    def __exit__(self, *exception: object) -> None:
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.start
        else:
            self.done.set()
            self.thread.join()


def timed_steps(step: Callable[[int], object], n: int, device: str) -> list[float]:
    """Seconds of steps 1…n; step 0 warms up."""
    seconds = []
    for i in range(n + 1):
        started = time.perf_counter()
        step(i)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def measure_ours(base: Base, subject: LoRA, style: LoRA, options: argparse.Namespace, device: str) -> dict[str, Any]:
    with PeakMemory(device) as memory:
        draws = options.steps + 1
        started = time.perf_counter()
        pair = Pair(
            subject,
            style,
            calibration(base, subject, draws, options.latent, 1),
            calibration(base, style, draws, options.latent, 2),
        )
        teachers_s = (time.perf_counter() - started) / draws
        optimization = iter(Optimization(base, [pair], ZipLoRAKnobs(steps=draws)))
        seconds = timed_steps(lambda i: next(optimization), options.steps, device)
        optimization.close()  # type: ignore[attr-defined]
    base.slots.unload()
    return {
        "seconds_per_step": statistics.median(seconds),
        "seconds_of_both_teachers_per_step": teachers_s,
        "peak_bytes_over_base": memory.bytes,
        "all_seconds": seconds,
    }


def measure_dense(base: Base, subject: LoRA, style: LoRA, options: argparse.Namespace, device: str) -> dict[str, Any]:
    noisy, timesteps, conditioning = random_draws(base, options.steps + 1, options.latent, 1)
    with PeakMemory(device) as memory, dense_layers(base, subject, style) as layers:
        optimizer = torch.optim.Adam([layer.mergers for layer in layers], lr=0.01)

        def predict(i: int, mode: str) -> Tensor:
            for layer in layers:
                layer.mode = mode
            return base.predict_noise(noisy[i : i + 1], timesteps[i : i + 1], conditioning)

        def step(i: int) -> None:
            loss: Tensor | float = 0.0
            for mode in ("subject", "style"):
                with torch.no_grad():
                    teacher = predict(i, mode)
                loss = loss + (predict(i, "both").float() - teacher).square().mean()
            penalty = sum(
                (layer.mergers[0] * layer.mergers[1]).sum().abs() / layer.mergers.shape[1] for layer in layers
            )
            optimizer.zero_grad(set_to_none=True)
            (loss + 0.01 * penalty / len(layers)).backward()  # type: ignore[union-attr]
            optimizer.step()

        seconds = timed_steps(step, options.steps, device)
    return {
        "seconds_per_step": statistics.median(seconds),
        "peak_bytes_over_base": memory.bytes,
        "all_seconds": seconds,
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


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit,
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
    for name, measure in (("ours", measure_ours), ("dense", measure_dense)):
        result[name] = measure(base, subject, style, options, options.device)
        print(name, json.dumps(result[name]), flush=True)
    ours, dense = result["ours"], result["dense"]
    result["ratio"] = {
        "dense_step_over_our_step": dense["seconds_per_step"] / ours["seconds_per_step"],
        "dense_step_over_our_step_and_teachers": dense["seconds_per_step"]
        / (ours["seconds_per_step"] + ours["seconds_of_both_teachers_per_step"]),
        "our_memory_over_dense_memory": ours["peak_bytes_over_base"] / dense["peak_bytes_over_base"],
    }
    print("ratio", json.dumps(result["ratio"]), flush=True)
    result["file"] = measure_file(base, subject, style)
    print("file", json.dumps(result["file"]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
