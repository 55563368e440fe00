"""What a worker runs on: a GPU or the CPU; its memory, and times that count the GPU's work."""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from service.errors import BadInput


class Device:
    """`name` as torch writes it; `share` of a GPU's memory that may be used. Raises BadInput when it is a GPU and there
    is none."""

    def __init__(self, name: str, share: float = 1.0) -> None:
        self.share = share
        self.name = name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.is_gpu = self.name.startswith("cuda")
        if self.is_gpu:
            repeatable()
            if not torch.cuda.is_available():
                raise BadInput(f"device {self.name}: this machine has no GPU that torch can use: take --device cpu")
            if share < 1:
                torch.cuda.set_per_process_memory_fraction(share)

    @property
    def model(self) -> str:
        return torch.cuda.get_device_name() if self.is_gpu else "cpu"

    @property
    def n_bytes(self) -> int | None:
        """A GPU's memory, as far as it may be used."""
        return int(self.share * torch.cuda.mem_get_info()[1]) if self.is_gpu else None

    def memory(self) -> tuple[int, int]:
        """Bytes of a GPU's memory that are there for the taking, and those that are taken; peaks count from here."""
        if not self.is_gpu:
            return 0, 0
        torch.cuda.reset_peak_memory_stats()
        taken = torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - taken
        return min(free, (self.n_bytes or 0) - taken), taken

    def peak_bytes(self) -> int:
        """Peak GPU memory since `memory` was asked; on the CPU the process' peak so far."""
        if self.is_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def give_back(self) -> None:
        """Memory that is held for later allocations."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def is_sound(self) -> bool:
        """False after an error that a GPU does not recover from within a process: every later job would fail too."""
        try:
            if self.is_gpu:
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def dtype(self, name: str) -> torch.dtype:
        """Of the base; `auto`: bfloat16 where a GPU has it. BadInput for a name that is none."""
        if name == "auto":
            return torch.bfloat16 if self.is_gpu and torch.cuda.is_bf16_supported() else torch.float32
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise BadInput(f"dtype {name} is unknown; one of float32, bfloat16")
        return dtype


@contextmanager
def timed(stages: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # or the GPU's work would be billed to a later stage
        stages[name] = stages.get(name, 0.0) + time.monotonic() - started


def repeatable() -> None:
    """A seed decides the result on a GPU too: attention's backward pass and cuBLAS otherwise sum in any order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)
