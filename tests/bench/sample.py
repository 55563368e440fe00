"""Pictures per second of merged LoRAs on a random SDXL: `sample_requests` beside diffusers with peft's adapters, in one
run, from files on disk to pictures.

    python -m tests.bench.sample [--size true|scaled] [--stages pictures,company,precision,previews,compiled] [--again]

Of true size on a GPU (24 GB or more), scaled down elsewhere. What is measured is a pair's way to its pictures: the
merged file read and put to work (diffusers: load_lora_weights, set_adapters, delete_adapters; ours: read_lora, then
fused or in slots), then pictures. Setting up, a step and the rest are timed apart, by turns, and a picture of
`--of-steps` steps is put together from them: every step costs the same. Results are written after every stage.
"""

import argparse
import copy
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from tests.bench.measuring import RESULTS, PeakMemory, Results, check_device, clock_name, machine, seconds
from tests.bench.models import random_lora, random_pipeline
from ziplora.base import Conditioning, load_base, resident
from ziplora.formats import read_lora, save_kohya
from ziplora.lora import LoRA, stacked
from ziplora.sample import Request, sample_images, sample_requests

STAGES = ("pictures", "company", "precision", "compiled", "previews")
PROMPT = "a picture of sks dog in szn style"
PER_PAIR = (1, 4, 16)  # pictures of a pair


class Bench:
    """Plain diffusers and ours with equal weights, and merged LoRAs as files."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options, self.device = options, options.device
        dtype = getattr(torch, options.dtype)
        self.plain: StableDiffusionXLPipeline = random_pipeline(self.device, dtype, options.size)
        self.plain.set_progress_bar_config(disable=True)
        parts = self.plain.components | {"unet": copy.deepcopy(self.plain.unet)}
        self.base = resident(StableDiffusionXLPipeline(**parts, add_watermarker=False))
        # peft's adapters go into the plain UNet; its text encoders are shared and get none
        self.side = options.latent * self.base.pipeline.vae_scale_factor
        self.files = []
        for number in range(2):
            halves = [random_lora(self.base.slots, options.rank, 2 * number + i) for i in range(2)]
            self.files.append(directory / f"merged-{number}.safetensors")
            save_kohya(stacked(halves), self.files[-1], metadata={}, architecture="sdxl", title="bench")

    def seconds(self, work: Callable[[], object]) -> float:
        return seconds(work, self.device)

    def lora(self, number: int) -> LoRA:
        return read_lora(self.files[number % 2]).lora

    def plain_picture(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.plain(PROMPT, num_inference_steps=steps, width=self.side, height=self.side, generator=generator)

    def pictures(self, loras: list[LoRA], steps: int, **options: Any) -> None:
        requests = [Request(lora, PROMPT, seed) for seed, lora in enumerate(loras)]
        for _ in sample_requests(self.base, requests, steps=steps, width=self.side, height=self.side, **options):
            pass

    def picture_in_slots(self, steps: int) -> None:
        sample_images(self.base, [PROMPT], [0], steps=steps, width=self.side, height=self.side)


def per_step(bench: Bench, sample: Callable[[int], object]) -> tuple[float, float]:
    """Seconds of one step, and what a call costs besides."""
    few, more = 1, 1 + bench.options.steps
    few_s, more_s = (bench.seconds(lambda n=n: sample(n)) for n in (few, more))
    step = (more_s - few_s) / (more - few)
    return step, max(0.0, few_s - step)


def measure_pictures(bench: Bench) -> dict[str, Any]:
    """Setting up a pair, a step of one picture, and the rest (prompt, decoding); by turns, medians of the rounds."""
    base, plain, kept = bench.base, bench.plain, {"lora": bench.lora(0)}
    found: dict[str, dict[str, list[float]]] = {"peft": {}, "fused": {}, "slots": {}}

    def note(form: str, **values: float) -> None:
        for name, value in values.items():
            found[form].setdefault(name, []).append(value)

    def attach(name: str, number: int) -> None:
        plain.load_lora_weights(str(bench.files[number % 2]), adapter_name=name)
        plain.set_adapters([name])

    def read(number: int) -> None:
        kept["lora"] = bench.lora(number)

    def put(how: Callable[[], Any]) -> None:
        with how():
            pass

    bench.pictures([kept["lora"]], 1)
    for number in range(bench.options.rounds):
        name = f"pair_{number}"
        set_up = bench.seconds(lambda name=name, number=number: attach(name, number))
        if number == 0:
            bench.plain_picture(1)
        step, besides = per_step(bench, bench.plain_picture)
        tidy = bench.seconds(lambda name=name: plain.delete_adapters([name]))
        note("peft", set_up_s=set_up + tidy, step_s=step, besides_s=besides)
        read_s = bench.seconds(lambda number=number: read(number))
        lora = kept["lora"]
        fuse_s = bench.seconds(lambda lora=lora: put(lambda: base.slots.fused(lora)))
        step, besides = per_step(bench, lambda n, lora=lora: bench.pictures([lora], n))
        note("fused", set_up_s=read_s + fuse_s, step_s=step, besides_s=max(0.0, besides - fuse_s))
        load_s = bench.seconds(lambda lora=lora: put(lambda: base.slots.loaded([[lora]])))
        with base.slots.loaded([[lora]]):
            step, besides = per_step(bench, bench.picture_in_slots)
        base.slots.unload()
        note("slots", set_up_s=read_s + load_s, step_s=step, besides_s=besides)
    plain.unload_lora_weights()
    rates: dict[str, dict[str, float]] = {}
    for form, values in found.items():
        set_up, step, besides = (statistics.median(values[name]) for name in ("set_up_s", "step_s", "besides_s"))
        rates[form] = {str(n): n / (set_up + n * (bench.options.of_steps * step + besides)) for n in PER_PAIR}
    return {
        "clock": clock_name(bench.device),
        "seconds": found,
        "steps_per_picture": bench.options.of_steps,
        "pictures_per_s_by_pictures_per_pair": rates,
        "fused_over_peft": {n: rates["fused"][n] / rates["peft"][n] for n in rates["peft"]},
        "fused_over_slots": {n: rates["fused"][n] / rates["slots"][n] for n in rates["peft"]},
    }


def measure_company(bench: Bench) -> dict[str, Any]:
    """A step of `n` pictures in one pass, of n LoRAs in slots, against one LoRA after the other fused; seconds per
    picture."""
    loras, by_n = [bench.lora(i) for i in range(2)], {}
    for n in bench.options.batches:
        chosen = [loras[i % 2] for i in range(n)]
        try:
            with PeakMemory(bench.device) as memory:
                bench.pictures(chosen, 1, batch=n)
                step, besides = per_step(bench, lambda k, n=n, chosen=chosen: bench.pictures(chosen, k, batch=n))
        except torch.OutOfMemoryError:
            by_n[str(n)] = {"out_of_memory": True}
            break
        finally:
            bench.base.slots.unload()
        by_n[str(n)] = {
            "step_s_per_picture": step / n,
            "besides_s_per_picture": besides / n,
            "peak_bytes_over_base": memory.bytes,
        }
    step, besides = per_step(bench, lambda k: bench.pictures(loras[:1], k))
    return {"side_by_side": by_n, "fused_alone": {"step_s_per_picture": step, "besides_s_per_picture": besides}}


@torch.no_grad()
def measure_precision(bench: Bench) -> dict[str, Any]:
    """Error of a prediction with a LoRA in bf16, fused and in slots, against the same in fp32; root mean square, as a
    share of what the LoRA changes. Fusing rounds W₀ + ΔW once, slots round what they add to every output."""
    size = "scaled"
    exact = resident(random_pipeline(bench.device, torch.float32, size))
    rounded = resident(random_pipeline(bench.device, torch.bfloat16, size))
    for name, parameter in exact.unet.named_parameters():
        parameter.copy_(rounded.unet.get_parameter(name))  # what is compared is rounding in use
    lora = random_lora(exact.slots, 12, 1)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 32, 32, generator=generator).bfloat16()
    timesteps = torch.tensor([200, 700])
    prompt = rounded.encode_prompts([PROMPT] * 2)

    def predict(base: Any) -> torch.Tensor:
        assert prompt.pooled is not None
        given = Conditioning(prompt.embeds.to(base.dtype), prompt.pooled.to(base.dtype))
        return base.predict_noise(noisy.to(base.device, base.dtype), timesteps, given).double()

    plain = predict(exact)
    with exact.slots.fused(lora):
        truth = predict(exact)
    with rounded.slots.fused(lora):
        fused = predict(rounded)
    with rounded.slots.loaded([[lora]]):
        slots = predict(rounded)
    effect = (truth - plain).square().mean().sqrt()

    def share(values: torch.Tensor) -> float:
        return ((values - truth).square().mean().sqrt() / effect).item()

    return {"fused": share(fused), "slots": share(slots), "base_alone": share(predict(rounded) - plain + truth)}


def measure_compiled(bench: Bench) -> dict[str, Any]:
    """The UNet through torch.compile: how often it is compiled for several LoRAs, and a step."""
    loras = [bench.lora(0), bench.lora(1)]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compile_s = bench.seconds(lambda: bench.pictures(loras[:1], 1, backend="inductor"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.set_stance("fail_on_recompile")
    try:
        step, _ = per_step(bench, lambda k: bench.pictures(loras[1:], k, backend="inductor"))
    finally:
        torch.compiler.set_stance("default")
    eager, _ = per_step(bench, lambda k: bench.pictures(loras[1:], k))
    return {
        "first_picture_of_one_step_s": compile_s,
        "graphs_after_first": graphs,
        "graphs_at_end": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "step_s": step,
        "eager_step_s": eager,
        "eager_over_compiled": eager / step,
    }


def measure_previews(options: argparse.Namespace) -> dict[str, Any]:
    """How near pictures of few steps come to the same seed's picture of 50 steps with the same scheduler: mean
    difference in levels of 255, on the pocket world with its own LoRAs."""
    from ziplora import pocket

    base = load_base(pocket.path())
    pairs = list(zip(pocket.SUBJECTS[:4], pocket.STYLES[:4], strict=True))
    requests = [
        Request(read_lora(style.lora).lora, f"{subject.trigger} in {style.trigger}", seed)
        for seed, (subject, style) in enumerate(pairs)
    ]

    def pictures(steps: int, scheduler: str) -> np.ndarray:
        made = sample_requests(base, requests, steps=steps, scheduler=scheduler)
        return np.stack([np.asarray(picture).astype(float) for picture in made])

    result: dict[str, Any] = {}
    for scheduler in ("euler", "ddim", "dpm++2m", "dpm++2m-karras", "unipc"):
        reference = pictures(50, scheduler)
        result[scheduler] = {
            str(steps): round(float(np.abs(pictures(steps, scheduler) - reference).mean()), 2)
            for steps in (4, 8, 12, 25)
        }
    return {"mean_difference_in_levels": result}


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("true", "scaled"), default="true" if gpu else "scaled")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of " + ",".join(STAGES))
    parser.add_argument("--latent", type=int, help="side of the latents; 128 (1024 px) on a GPU, else 32")
    parser.add_argument("--steps", type=int, default=10 if gpu else 2, help="steps that one is timed over")
    parser.add_argument("--of-steps", type=int, default=50, help="steps of the pictures that are counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="2,4,8" if gpu else "2,4", help="pictures side by side to try")
    parser.add_argument("--rank", type=int, help="of each half of a merged LoRA; 64 at true size, else 12")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() if gpu else 1)
    parser.add_argument("--again", action="store_true", help="measure again what an earlier run measured")
    parser.add_argument("--out", type=Path, help="tests/bench/results/sample-<size>-<device>.json")
    options = parser.parse_args()
    options.latent = options.latent or (128 if gpu else 32)
    options.rank = options.rank or (64 if options.size == "true" else 12)
    options.out = options.out or RESULTS / f"sample-{options.size}-{options.device}.json"
    options.batches = [int(n) for n in options.batches.split(",")]
    options.stages = options.stages.split(",")
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"--stages {unknown[0]} is unknown; some of {','.join(STAGES)}")
    check_device(parser, options)
    return options


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    names = ("size", "latent", "rank", "dtype", "device", "threads", "of_steps")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"torch": torch.__version__, "gpu": machine()["gpu"]}
    results = Results(options.out, "tests.bench.sample", settings, options.again)
    measures = {"pictures": measure_pictures, "company": measure_company, "precision": measure_precision}
    measures |= {"compiled": measure_compiled}
    with tempfile.TemporaryDirectory() as directory:
        if set(options.stages) & measures.keys():
            bench = Bench(options, Path(directory))
            for name in options.stages:
                if name in measures:
                    results.stage(name, lambda name=name: measures[name](bench))  # type: ignore[misc]
    if "previews" in options.stages:
        results.stage("previews", lambda: measure_previews(options))


if __name__ == "__main__":
    main()
