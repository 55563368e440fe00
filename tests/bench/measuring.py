"""What the benches share: clocks, memory, FLOPs, the machine's matmul rate, and results that a later run goes on
from."""

import argparse
import gc
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from tests.bench import record

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """`record.machine` and what of it decides how fast torch is."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        **record.machine(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "threads": torch.get_num_threads(),
    }


def check_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with what to give instead, where `options.device` or `options.size` is more than this machine has."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; take --device cpu")
    if options.device == "cuda" and options.size == "true" and torch.cuda.mem_get_info()[0] < 22 * 2**30:
        parser.error("true size takes a GPU with 24 GB of free memory: take --size scaled, or a larger one")


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
            give_back()
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


def give_back() -> None:
    """Freed memory goes back to the system, so that a later peak is not hidden in it (glibc only)."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def seconds(work: Callable[[], object], device: str) -> float:
    """On a GPU wall time with the device drained; on a CPU with one thread the process' own CPU time, which other
    programs on the machine do not lengthen."""
    if device == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    work()
    return clock() - started


def clock_name(device: str) -> str:
    if device == "cuda":
        return "wall, device drained"
    return "CPU time of the process" if torch.get_num_threads() == 1 else "wall"


def timed_steps(step: Callable[[int], object], n: int, device: str) -> list[float]:
    """Seconds of steps 1…n; step 0 warms up."""
    return [seconds(lambda i=i: step(i), device) for i in range(n + 1)][1:]  # type: ignore[misc]


def matmul_rate(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of square products, the best of several: what arithmetic alone could reach here."""
    rates = {}
    for n in (4096, 8192) if device == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        repeats = 20 if device == "cuda" else 3
        rates[str(n)] = max(
            2 * n**3 * repeats / seconds(lambda: [torch.mm(a, b, out=out) for _ in range(repeats)], device)  # noqa: B023
            for _ in range(4)
        )
    return {**rates, "best": max(rates.values())}


def _attention_forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _cholesky(matrix: Any, *_: Any, **__: Any) -> int:
    return math.prod(matrix[:-2]) * matrix[-1] ** 3 // 3


def _cholesky_solve(right: Any, *_: Any, **__: Any) -> int:
    return math.prod(right[:-2]) * 2 * right[-2] ** 2 * right[-1]


def _triangular_solve(matrix: Any, right: Any, *_: Any, **__: Any) -> int:
    return math.prod(right[:-2]) * matrix[-1] ** 2 * math.prod(right[-2:]) // matrix[-1]


FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_forward),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
    torch.ops.aten.linalg_cholesky_ex: shape_wrapper(_cholesky),
    torch.ops.aten.cholesky_solve: shape_wrapper(_cholesky_solve),
    torch.ops.aten.linalg_solve_triangular: shape_wrapper(_triangular_solve),
}


class _Counter(TorchDispatchMode):
    """torch's own counter follows modules too, which takes longer than a small model's arithmetic."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(work: Callable[[], object]) -> int:
    """Multiplications and additions of matrix products, convolutions, attention and Cholesky solves: by the formulas of
    torch.utils.flop_counter and those above."""
    with _Counter() as counter:
        work()
    return counter.total


class Results:
    """A JSON file of stages. Stages of an earlier run with the same settings are kept and not run again."""

    def __init__(self, path: Path, module: str, settings: dict[str, Any], again: bool = False) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        same = known.get("settings") == settings and not again
        self.command = " ".join(["python -m", module, *sys.argv[1:]])
        self.content: dict[str, Any] = {"settings": settings, "stages": known["stages"] if same else {}}

    def stage(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        stages = self.content["stages"]
        if name not in stages:
            started = time.perf_counter()
            at = machine()
            found = measure()
            took_s = round(time.perf_counter() - started, 1)
            stages[name] = {**found, "took_s": took_s, "command": self.command, "machine": at}
            self.write()
        shown = {key: value for key, value in stages[name].items() if key not in ("machine", "command")}
        print(name, json.dumps(shown, default=str), flush=True)
        result: dict[str, Any] = stages[name]
        return result

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=2) + "\n")
