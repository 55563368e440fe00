"""Pair after pair on one worker's base: whether it keeps its bits, memory stays flat and nothing is compiled again."""

import gc
import statistics
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from service.manifest import read_manifest
from service.messages import WorkerSettings
from service.plan import plan
from service.worker import Worker
from tests.bench.measuring import give_back
from tests.grid import build_grid
from tests.random_loras import random_lora
from tests.tiny import tiny_sdxl
from ziplora.base import resident
from ziplora.calibrate import calibrate
from ziplora.calibration_settings import CalibrationSettings
from ziplora.lora import LoRA
from ziplora.merged import Pair
from ziplora.methods import METHODS
from ziplora.optimize_knobs import ZipLoRAKnobs
from ziplora.sample import Request, sample_requests


def measure_endurance(n_pairs: int, device: str) -> dict[str, Any]:
    """On the tests' tiny base: pairs merged by gradient and in closed form by turns, each sampled through a compiled
    UNet. LoRAs of three ranks, some of which lack layers."""
    base = resident(tiny_sdxl().to(device))
    loras = [random_lora(base.slots, rank=2 + i % 3, seed=i, dtype=torch.float32, drop=i % 4) for i in range(30)]
    observe = CalibrationSettings(4, 0, "separate", 32, "inputs")
    image = [Image.linear_gradient("L")]
    known = [calibrate(base, lora, f"picture {i}", image, observe) for i, lora in enumerate(loras)]
    weights = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in base.unet.state_dict().items()}
    backend = "inductor" if device == "cuda" else "eager"
    methods = [(METHODS["ziplora"].load(), ZipLoRAKnobs(steps=2, draws=4))]
    methods += [(METHODS[name].load(), METHODS[name].knobs()) for name in ("ziplora-closed",) if name in METHODS]
    looked_at = (1, n_pairs // 4, n_pairs // 2, n_pairs)
    memory: dict[str, int] = {}
    compiled: dict[str, int] = {}
    failures = 0
    torch.compiler.reset()
    try:
        for number in range(n_pairs):
            i, j = number % 10, 10 + number // 10 % 20
            pair = Pair(loras[i], loras[j], known[i], known[j])
            merge, knobs = methods[number % len(methods)]
            lora: LoRA = merge(base, [pair], knobs)[0].lora()
            pictures = sample_requests(
                base, [Request(lora, f"{number % 7}", number)], steps=2, width=32, height=32, backend=backend
            )
            failures += sum(picture.size != (32, 32) for picture in pictures)
            if number == 0:
                torch.compiler.set_stance("fail_on_recompile")  # from here on a second compilation is an error
            if number + 1 in looked_at:
                gc.collect()
                give_back()
                memory[str(number + 1)] = psutil.Process().memory_info().rss
                compiled[str(number + 1)] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        torch.compiler.set_stance("default")
    after = base.unet.state_dict()
    return {
        "pairs": n_pairs,
        "base_bit_identical": all(torch.equal(copy, after[name]) for name, (_, copy) in weights.items()),
        "base_at_the_same_addresses": all(pointer == after[name].data_ptr() for name, (pointer, _) in weights.items()),
        "bytes_after_pair": memory,
        "growth_from_a_quarter_to_the_end": memory[str(n_pairs)] / memory[str(n_pairs // 4)] - 1,
        "compiled_graphs_after_pair": compiled,
        "wrong_pictures": failures,
    }


def measure_worker(n_pairs: int) -> dict[str, Any]:
    """The service's worker on the tests' grid: files to committed entries, UNet compiled, pairs one after another.

    LoRAs of three ranks in four layouts. A second compilation for ranks that were met before is an error. The backend
    is inductor's path but for the code it makes: torch 2.13's `eager` keeps graphs of autograd functions, 7 MB a pair.
    """
    with tempfile.TemporaryDirectory() as directory:
        grid = build_grid(Path(directory))
        merge = {"method": "ziplora", "steps": 2, "seeds": list(range(n_pairs // 4))}
        planned = plan(read_manifest(grid.manifest(subjects=2, styles=2, merge=merge)))
        planned.check()
        worker = Worker(
            WorkerSettings(
                str(grid.root / "catalog"), str(grid.root / "base"), None, device="cpu",
                cache_dir=str(grid.root / "cache"), compile="aot_eager",
            )
        )  # fmt: skip
        base = worker.base
        weights = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in base.unet.state_dict().items()}
        # seed after seed of the whole grid: after the first seed every pair has been met
        jobs = sorted(planned.jobs, key=lambda job: job.seed)
        memory, compiled, seconds = [], [], []
        torch.compiler.reset()
        try:
            for number, job in enumerate(jobs, 1):
                result = worker.run(job)
                if result.status != "committed":
                    raise RuntimeError(f"job {number} {result.status}: {result.reason}")
                seconds.append(sum(result.stages.values()))
                if number % 20 == 0:
                    gc.collect()
                    give_back()
                    memory.append(psutil.Process().memory_info().rss)
                    compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
                    torch.compiler.set_stance("fail_on_recompile")
        finally:
            torch.compiler.set_stance("default")
            worker.close()
        after = base.unet.state_dict()
    return {
        "pairs": len(jobs),
        "base_bit_identical": all(torch.equal(copy, after[name]) for name, (_, copy) in weights.items()),
        "base_at_the_same_addresses": all(pointer == after[name].data_ptr() for name, (pointer, _) in weights.items()),
        "bytes_after_every_20": memory,
        "growth_from_40_to_the_end": memory[-1] / memory[1] - 1,
        "compiled_graphs_after_every_20": compiled,
        "median_job_s": statistics.median(seconds),
    }
