"""Errors of `ziplora`, torch and the machine in the service's own words: the only place that says them."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from service.errors import BadInput, Corrupted, NotFound, OutOfMemory, ServiceError
from service.jobs import Work
from service.messages import JobResult
from ziplora.errors import LoRAError


class BrokenLoRA(BadInput):
    """A LoRA that is what the plan says and cannot be used, with whatever partner."""

    def __init__(self, message: str, sha256: str = "") -> None:
        super().__init__(message)
        self.sha256 = sha256


@contextmanager
def translated(job: Work) -> Iterator[None]:
    """A block that works on this job; what it raises is one of `errors.py`, or a defect of ours or of a library."""
    try:
        yield
    except (NotFound, Corrupted, LoRAError) as error:
        raise BadInput(f"{job.pair}: {error}") from error
    except ServiceError:
        raise
    except (ValueError, ArithmeticError) as error:
        raise BadInput(f"{job.pair}: {error}") from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{job.pair}: {error}: use a GPU with more memory, or a smaller sample size") from error


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of this machine, which torch reports as a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def failed(job: Work, error: BaseException, stages: Mapping[str, float], broken_lora: str | None = None) -> JobResult:
    """The result of an attempt that ended with `error`; a Defect where it is none of ours."""
    known = (base.__name__ for base in type(error).__mro__ if base.__module__ == ServiceError.__module__)
    kind = next(known, "Defect")
    reason = str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {error}"
    text = "".join(traceback.format_exception(error))
    return JobResult(job.job_id, "failed", kind, reason, text, stages, broken_lora=broken_lora)
