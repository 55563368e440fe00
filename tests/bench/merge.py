"""What a merge costs on a random SDXL: every method of METHODS, beside the dense form of public code, in one run.

    python -m tests.bench.merge [--size true|scaled] [--stages rates,steps,…] [--methods direct,…] [--full] [--again]

Of true size on a GPU (24 GB or more), scaled down elsewhere: a fifth of every width, all 560 layers. Results are
written after every stage to `--out`; a later run with the same settings goes on from there, so a bench may be run in
parts. Every time is set against the arithmetic floor: counted FLOPs over the rate of a square matrix product that was
measured on the same machine in the same part.

Gradient methods are measured for a few steps, which all cost the same, and completed by passes × seconds of a pass
(`completed`); `--full`, the default on a GPU, runs every step.
"""

import argparse
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from tests.bench.dense import dense_layers, dense_step, installed
from tests.bench.endurance import measure_endurance, measure_worker
from tests.bench.measuring import (
    RESULTS,
    PeakMemory,
    Results,
    check_device,
    clock_name,
    flops,
    machine,
    matmul_rate,
    seconds,
)
from tests.bench.models import random_lora, random_pipeline
from tests.bench.true_flops import true_size_flops
from ziplora import merge_flop
from ziplora.base import resident
from ziplora.calibrate import WEIGHT_ROWS, Calibration, calibrate, predictions
from ziplora.calibration_settings import CalibrationSettings
from ziplora.merged import Pair, Words
from ziplora.methods import METHODS, Method
from ziplora.moments import recorded
from ziplora.optimize import Optimization
from ziplora.optimize_knobs import ZipLoRAKnobs

STAGES = ("rates", "flops", "steps", "k", "memory", "methods", "grid", "endurance")
MERGING = tuple(name for name, method in METHODS.items() if not method.trains)  # what trains is timed by its steps
PROMPTS = ("a photo of sks dog", "a house in szn style")
GRIDS = (1, 2, 4, 8, 16)
FEW_DRAWS, MORE_DRAWS = 8, 16  # what calibrations are measured with: beyond WEIGHT_ROWS their cost is linear in draws
GRADIENT_DRAWS = 2  # that timed steps go round in


class Bench:
    """The base, two LoRAs and what is known of them; calibrations by kind, made when first asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.dtype = getattr(torch, options.dtype)
        started = time.perf_counter()
        self.base = resident(random_pipeline(self.device, self.dtype, options.size))
        self.load_s = time.perf_counter() - started
        self.loras = [random_lora(self.base.slots, options.rank, seed) for seed in (1, 2)]
        self.side = options.latent * self.base.pipeline.vae_scale_factor
        generator = np.random.default_rng(0)
        self.images = [Image.fromarray(generator.integers(0, 256, (self.side, self.side, 3), np.uint8))]
        self.known: dict[str, list[Calibration]] = {}

    def settings(self, draws: int, moments: str = "none") -> CalibrationSettings:
        return CalibrationSettings(draws, 0, "separate", self.side, moments)  # type: ignore[arg-type]

    def calibration(self, which: int, settings: CalibrationSettings) -> Calibration:
        return calibrate(self.base, self.loras[which], PROMPTS[which], self.images, settings)

    def calibrations(self, moments: str = "none") -> list[Calibration]:
        if moments not in self.known:
            draws = FEW_DRAWS if moments != "none" else GRADIENT_DRAWS
            draws = 2 * FEW_DRAWS if self.options.full else draws  # as many as the combined term takes of either LoRA
            self.known.clear()  # moments are large, and one kind is used at a time
            self.known[moments] = [self.calibration(which, self.settings(draws, moments)) for which in (0, 1)]
        return self.known[moments]

    def pair(self, moments: str | None = "none") -> Pair:
        known = [None, None] if moments is None else self.calibrations(moments)
        words = (Words(PROMPTS[0], "sks dog"), Words(PROMPTS[1], "szn style"))
        return Pair(*self.loras, *known, combined_prompt="sks dog in szn style", words=words)  # type: ignore[arg-type]

    def rate(self) -> float:
        return matmul_rate(self.device, self.dtype)["best"]

    def seconds(self, work: Callable[[], object]) -> float:
        return seconds(work, self.device)


def measure_rates(bench: Bench) -> dict[str, Any]:
    base = bench.base
    return {
        "clock": clock_name(bench.device),
        "flop_per_s": matmul_rate(bench.device, bench.dtype),
        "unet_parameters": sum(parameter.numel() for parameter in base.unet.parameters()),
        "unet_bytes": sum(parameter.nbytes for parameter in base.unet.parameters()),
        "targets": len(base.slots.targets),
        "load_s": bench.load_s,
        "lora_bytes": sum(t.nbytes for layer in bench.loras[0].layers.values() for t in (layer.down, layer.up)),
        "mergers_bytes": 2 * 4 * sum(base.slots.targets.values()),
    }


@contextmanager
def optimizing(bench: Bench, n_pairs: int) -> Iterator[Callable[[int], Any]]:
    """One step of ZipLoRA per call, `n_pairs` pairs side by side; all settings as published but the number of steps."""
    steps = iter(Optimization(bench.base, [bench.pair()] * n_pairs, ZipLoRAKnobs(steps=10**6, draws=GRADIENT_DRAWS)))
    try:
        yield lambda _: next(steps)
    finally:
        steps.close()  # type: ignore[attr-defined]


def against_floor(found: list[float], counted: int, rate: float) -> dict[str, Any]:
    floor = counted / rate
    return {
        "seconds": statistics.median(found),
        "all_seconds": found,
        "flop": counted,
        "floor_seconds": floor,
        "times_floor": statistics.median(found) / floor,
    }


def measure_steps(bench: Bench) -> dict[str, Any]:
    """A step of each, by turns; and a teacher's pass, which the dense form pays at every step and we once per LoRA."""
    base, n = bench.base, bench.options.steps
    subject, style = bench.calibrations()
    draws = [(one.noisy, one.timesteps, one.conditioning) for one in (subject, style)]
    rate = bench.rate()
    layers = dense_layers(base, *bench.loras)
    dense_once = dense_step(base, layers, *draws)

    def teacher(i: int) -> None:
        i %= GRADIENT_DRAWS
        base.predict_noise(subject.noisy[i : i + 1], subject.timesteps[i : i + 1], subject.conditioning)

    def encode() -> None:
        base.encode_images(bench.images, bench.side, bench.side)

    found: dict[str, list[float]] = {"dense": [], "ziplora": [], "teacher": [], "base": [], "encode": []}
    counted = {"encode": flops(encode)}
    with torch.no_grad():
        counted["base"] = flops(lambda: teacher(0))
        found["base"] = [bench.seconds(lambda i=i: teacher(i)) for i in range(n)]
    for i in range(n):
        with installed(base, layers):
            if i == 0:
                counted["dense"] = flops(lambda: dense_once(0))
            found["dense"].append(bench.seconds(lambda i=i: dense_once(i)))
        with optimizing(bench, 1) as once:
            first: Callable[[], Any] = lambda once=once: once(0)  # noqa: E731
            if i == 0:
                counted["ziplora"] = flops(first)
            else:
                first()
            found["ziplora"].append(bench.seconds(lambda once=once: once(1)))
        found["encode"].append(bench.seconds(encode))
        with torch.no_grad(), base.slots.loaded([[bench.loras[0]]]):
            if i == 0:
                counted["teacher"] = flops(lambda: teacher(0))
            found["teacher"].append(bench.seconds(lambda i=i: teacher(i)))
    base.slots.unload()
    result = {name: against_floor(found[name], counted[name], rate) for name in found}
    rounds = list(zip(found["dense"], found["ziplora"], found["encode"], strict=True))
    return {
        "flop_per_s": rate,
        **result,
        "dense_over_ziplora": statistics.median(dense / ours for dense, ours, _ in rounds),
        # public code also encodes both pictures anew at every step
        "dense_and_encoding_over_ziplora": statistics.median((dense + 2 * one) / ours for dense, ours, one in rounds),
        "dense_flop_over_ziplora_flop": counted["dense"] / counted["ziplora"],
    }


def measure_k(bench: Bench, k: int) -> dict[str, Any]:
    """`k` pairs side by side in one forward pass. Seconds are per step and pair."""
    try:
        with PeakMemory(bench.device) as memory, optimizing(bench, k) as once:
            counted = flops(lambda: once(0))
            found = [bench.seconds(lambda: once(1)) / k for _ in range(max(1, bench.options.steps - 1))]
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        bench.base.slots.unload()
    rate = bench.rate()
    return {"flop_per_s": rate, **against_floor(found, counted // k, rate), "peak_bytes_over_base": memory.bytes}


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Peak over the base, of a merge's own doing: two steps of a gradient method, one pair. What both forms read (LoRA
    files, latents) is there before."""
    base = bench.base
    draws = [(one.noisy, one.timesteps, one.conditioning) for one in bench.calibrations()]
    result: dict[str, Any] = {}
    with PeakMemory(bench.device) as memory:
        layers = dense_layers(base, *bench.loras)
        once = dense_step(base, layers, *draws)
        with installed(base, layers):
            once(0), once(1)
    del layers, once
    result["dense"] = {"peak_bytes_over_base": memory.bytes}
    for name, checkpointed in (("ziplora", False), ("ziplora, activations computed twice", True)):
        if checkpointed:
            base.unet.enable_gradient_checkpointing()
        gc.collect()
        with PeakMemory(bench.device) as memory, optimizing(bench, 1) as step:
            step(0)
            found = bench.seconds(lambda step=step: step(1))
        base.slots.unload()
        base.unet.disable_gradient_checkpointing()
        result[name] = {"peak_bytes_over_base": memory.bytes, "seconds_per_step": found}
        result[name]["of_dense"] = memory.bytes / result["dense"]["peak_bytes_over_base"]
    return result


def reduced(knobs: Any) -> Any:
    """The same method with few steps and draws of its own."""
    few = {"steps": 2, "combined_draws": 2, "batch": 2}
    present = {name: min(few[name], getattr(knobs, name)) for name in few if hasattr(knobs, name)}
    return dataclasses.replace(knobs, **present)


def measure_calibration(bench: Bench, settings: CalibrationSettings) -> dict[str, Any]:
    """Seconds per LoRA: measured with FEW_DRAWS and MORE_DRAWS, unless all are run. Every further draw costs the
    same."""
    few, more = (bench.settings(n, settings.moments) for n in (FEW_DRAWS, MORE_DRAWS))
    if bench.options.full:
        few, more = bench.settings(1, settings.moments), bench.settings(settings.draws, settings.moments)
    counted = calibration_flops(bench, settings)  # first: it warms up
    with PeakMemory(bench.device) as memory:
        few_s, more_s = (bench.seconds(lambda one=one: bench.calibration(1, one)) for one in (few, more))
    further = (settings.draws - more.draws) / (more.draws - few.draws)
    return {
        "draws": settings.draws,
        "moments": settings.moments,
        "seconds": more_s + (more_s - few_s) * further,
        "measured": {str(few.draws): few_s, str(more.draws): more_s},
        "flop": counted,
        "peak_bytes_over_base": memory.bytes,
    }


def calibration_flops(bench: Bench, settings: CalibrationSettings) -> int:
    """A draw costs a prediction, observed if moments are recorded; the first WEIGHT_ROWS also a backward pass if
    outputs are weighed."""
    base = bench.base
    one, two = (flops(lambda n=n: bench.calibration(0, bench.settings(n, settings.moments))) for n in (1, 2))
    seen = bench.calibration(0, bench.settings(1))

    def observe() -> None:
        with recorded(base.slots) if settings.moments != "none" else nullcontext():
            predictions(base, seen.noisy, seen.timesteps, seen.conditioning)

    with base.slots.loaded([[bench.loras[0]]]):
        draw = flops(observe)
    return one + (settings.draws - 1) * draw + (min(settings.draws, WEIGHT_ROWS) - 1) * (two - one - draw)


def measure_method(bench: Bench, method: Method, cost_of: dict[str, float], closed_flop: int) -> dict[str, Any]:
    """Seconds per pair, one pair at a time."""
    knobs: Any = method.knobs()
    observe, merge = method.calibration(knobs, 0), method.load()
    run = knobs if bench.options.full else reduced(knobs)
    pair = bench.pair(observe.moments if observe else None)
    counted = 0

    def once() -> None:
        merge(bench.base, [pair], run)

    def counting() -> None:
        nonlocal counted
        counted = flops(once)

    passes, of_run = method.passes(knobs), method.passes(run)
    steps = bool(passes.backward or passes.forward)
    with PeakMemory(bench.device) as memory:
        # counting slows the launching of many small operations, so steps are counted by the pass
        found = [bench.seconds(once if steps or i else counting) for i in range(bench.options.repeats)]
    bench.base.slots.unload()
    missing = {name: getattr(passes, name) - getattr(of_run, name) for name in ("backward", "forward")}
    if steps:
        of_passes = sum(cost_of[f"{name}_flop"] * getattr(passes, name) for name in ("backward", "forward"))
        counted = int(of_passes) + (closed_flop if method.flop is merge_flop.columns else 0)
    return {
        "seconds": min(found) + sum(cost_of[name] * n for name, n in missing.items()),
        "measured_seconds": found,
        "completed": {name: {"passes": n, "seconds": cost_of[name]} for name, n in missing.items() if n},
        "flop": counted,
        "peak_bytes_over_base": memory.bytes,
    }


def measure_methods(bench: Bench, names: list[str], results: Results) -> None:
    """One stage per method; calibrations by kind and number of draws are stages too, shared by the methods."""
    stages = results.content["stages"]
    results.stage("steps", lambda: measure_steps(bench))  # methods are completed with the seconds of a pass
    step, teacher = stages["steps"]["ziplora"], stages["steps"]["teacher"]
    cost_of = {
        "backward": step["seconds"] / 2,  # a step is two rows
        "backward_flop": step["flop"] / 2,
        "forward": teacher["seconds"],
        "forward_flop": teacher["flop"],
    }
    for name in names:
        method = METHODS[name]
        observe = method.calibration(method.knobs(), 0)
        if observe is not None:
            kind = f"calibrate: {observe.draws} draws, moments {observe.moments}"
            results.stage(kind, lambda observe=observe: measure_calibration(bench, observe))

        def measured(method: Method = method) -> dict[str, Any]:
            try:
                return measure_method(bench, method, cost_of, stages.get("merge: ziplora-closed", {}).get("flop", 0))
            except torch.OutOfMemoryError:
                bench.base.slots.unload()
                return {"out_of_memory": True}

        results.stage(f"merge: {name}", measured)


def amortised(results: Results) -> dict[str, Any]:
    """Seconds and FLOPs per pair on n×n grids: 2n calibrations and n² merges over n² pairs. The dense form has nothing
    that pairs share."""
    stages = results.content["stages"]
    rate = stages["rates"]["flop_per_s"]["best"]
    steps = ZipLoRAKnobs().steps
    dense = {key: stages["steps"]["dense"][key] * steps for key in ("seconds", "flop")}
    table: dict[str, Any] = {"dense": {"merge": dense, **{f"{n}x{n}": dense["seconds"] for n in GRIDS}}}
    for name, method in METHODS.items():
        merge = stages.get(f"merge: {name}")
        if merge is None or "seconds" not in merge:
            continue
        observe = method.calibration(method.knobs(), 0)
        kind = None if observe is None else f"calibrate: {observe.draws} draws, moments {observe.moments}"
        one = stages[kind] if kind else {"seconds": 0.0, "flop": 0}
        row: dict[str, Any] = {f"{n}x{n}": merge["seconds"] + 2 / n * one["seconds"] for n in GRIDS}
        counted = merge["flop"] + 2 / GRIDS[-1] * one["flop"]
        row["merge"] = {"seconds": merge["seconds"], "flop": merge["flop"]}
        row["times_floor"] = row["16x16"] / (counted / rate) if counted else None
        table[name] = row
    reference = table.get("ziplora", {}).get("16x16")
    for row in table.values():
        row["dense_over_this"] = dense["seconds"] / row["16x16"] if row["16x16"] else None
        row["ziplora_over_this"] = reference / row["16x16"] if reference and row["16x16"] else None
        merge_s = table.get("ziplora", {}).get("merge", {}).get("seconds")
        row["ziplora_merge_over_this"] = (
            merge_s / row["merge"]["seconds"] if merge_s and row["merge"]["seconds"] else None
        )
    return {"seconds_per_pair": table}


def measure_grid(bench: Bench, side: int) -> dict[str, Any]:
    """A real grid of random LoRAs by both closed forms, end to end: every LoRA calibrated, every pair merged."""
    result: dict[str, Any] = {"side": side}
    loras = [random_lora(bench.base.slots, bench.options.rank, seed) for seed in range(2 * side)]
    for name in ("ziplora-closed", "ziplora-matrix"):
        method = METHODS[name]
        knobs = method.knobs()
        observe = dataclasses.replace(method.calibration(knobs, 0), size=bench.side)
        merge, known = method.load(), []

        def calibrate_all(observe: Any = observe, known: list[Calibration] = known) -> None:
            for lora in loras:
                known.append(calibrate(bench.base, lora, PROMPTS[0], bench.images, observe))

        def merge_all(merge: Any = merge, known: list[Calibration] = known, knobs: Any = knobs) -> None:
            for i in range(side):
                for j in range(side, 2 * side):
                    merge(bench.base, [Pair(loras[i], loras[j], known[i], known[j])], knobs)

        with PeakMemory(bench.device) as memory:
            calibrate_s, merge_s = bench.seconds(calibrate_all), bench.seconds(merge_all)
        result[name] = {
            "calibrate_s": calibrate_s,
            "merge_s": merge_s,
            "seconds_per_pair": (calibrate_s + merge_s) / side**2,
            "peak_bytes_over_base": memory.bytes,
        }
    return result


def grid_side(bench: Bench) -> int:
    """As large as the moments of all its LoRAs fit into half the memory that is free."""
    per_lora = sum(t.nbytes for t in (bench.calibrations("inputs")[0].moments or {}).values())
    free = torch.cuda.mem_get_info()[0] if bench.device == "cuda" else psutil.virtual_memory().available
    fitting = [n for n in GRIDS if 2 * n * per_lora < free / 2]
    return min(fitting[-1] if fitting else 1, bench.options.grid)


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("true", "scaled"), default="true" if gpu else "scaled")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of " + ",".join(STAGES))
    parser.add_argument("--methods", default=",".join(MERGING), help="some of " + ",".join(MERGING))
    parser.add_argument("--latent", type=int, help="side of the latents; 128 (1024 px) on a GPU, else 32")
    parser.add_argument("--steps", type=int, default=10 if gpu else 2, help="timed steps")
    parser.add_argument("--repeats", type=int, default=3 if gpu else 2, help="timed merges of each method")
    parser.add_argument("--pairs", default="1,2,4,8" if gpu else "1,2,4", help="pairs per forward pass to try")
    parser.add_argument("--rank", type=int, help="of a LoRA; 64 at true size, else 12")
    parser.add_argument("--grid", type=int, default=16 if gpu else 2, help="largest side of the grid that is run")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() if gpu else 1)
    parser.add_argument(
        "--full", action=argparse.BooleanOptionalAction, default=gpu, help="all steps and draws of every method"
    )
    parser.add_argument("--again", action="store_true", help="measure again what an earlier run measured")
    parser.add_argument("--out", type=Path, help="tests/bench/results/merge-<size>-<device>.json")
    options = parser.parse_args()
    options.latent = options.latent or (128 if gpu else 32)
    options.rank = options.rank or (64 if options.size == "true" else 12)
    options.out = options.out or RESULTS / f"merge-{options.size}-{options.device}.json"
    options.pairs = [int(k) for k in options.pairs.split(",")]
    for name, known in (("stages", STAGES), ("methods", MERGING)):
        chosen = getattr(options, name).split(",")
        unknown = [one for one in chosen if one not in known]
        if unknown:
            parser.error(f"--{name} {unknown[0]} is unknown; some of {','.join(known)}")
        setattr(options, name, chosen)
    check_device(parser, options)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("size", "latent", "rank", "dtype", "device", "threads")}
    settings |= {"full": options.full, "torch": torch.__version__, "gpu": machine()["gpu"]}
    results = Results(options.out, "tests.bench.merge", settings, options.again)
    if "flops" in options.stages:
        results.stage("flops", true_size_flops)
    if set(options.stages) - {"endurance", "flops"}:
        bench = Bench(options)
        plain = {"rates": measure_rates, "steps": measure_steps, "memory": measure_memory}
        for name, measure in plain.items():
            if name in options.stages:
                results.stage(name, lambda measure=measure: measure(bench))  # type: ignore[misc]
        for k in options.pairs if "k" in options.stages else ():
            results.stage(f"k = {k}", lambda k=k: measure_k(bench, k))  # type: ignore[misc]
        if "methods" in options.stages:
            measure_methods(bench, options.methods, results)
        if "grid" in options.stages:
            side = grid_side(bench)
            results.stage(f"grid {side}x{side}", lambda: measure_grid(bench, side))
        if {"rates", "steps"} <= results.content["stages"].keys():
            results.content["stages"].pop("amortised", None)  # a summary of the others, made anew
            results.stage("amortised", lambda: amortised(results))
        del bench
    if "endurance" in options.stages:
        results.stage("endurance", lambda: measure_endurance(200, options.device))
        results.stage("endurance of the service's worker", lambda: measure_worker(200))


if __name__ == "__main__":
    main()
