"""The masked-token bases of a worker's jobs, each loaded when a job first asks for it, beside the worker's own base."""

import threading

import torch

from service.base_files import MASKED, read_base
from service.device import Device
from service.errors import BadInput, ManifestError
from service.jobs import BaseRef
from ziplora.masked import MaskedBase, load_masked


class MaskedBases:
    """The one that was asked for last stays resident: a manifest rarely names two. Safe for threads.

    `dtype` auto is float32, also where the worker's base has half precision: a picture's tokens are the nearest
    entries of a codebook, and adapters are trained on them.
    """

    def __init__(self, device: Device, dtype: str) -> None:
        self.device = device
        self.dtype = torch.float32 if dtype == "auto" else device.dtype(dtype)
        self._resident: tuple[str, MaskedBase] | None = None
        self._lock = threading.Lock()

    def get(self, ref: BaseRef) -> MaskedBase:
        """BadInput when it does not load, or is not on this machine what it was when the job was planned."""
        with self._lock:
            if self._resident is None or self._resident[0] != ref.digest:
                self._resident = None  # not two at a time
                self._resident = (ref.digest, self._loaded(ref))
            return self._resident[1]

    def _loaded(self, ref: BaseRef) -> MaskedBase:
        try:
            files = read_base(ref.location, ref.revision, family=MASKED)
        except ManifestError as error:
            raise BadInput(f"on this machine, {error}") from error
        if files.digest != ref.digest:
            raise BadInput(
                f"base {ref.location} on this machine has digest {files.digest[:12]}, the run was planned with"
                f" {ref.digest[:12]}: put the same files on every machine"
            )
        try:
            return load_masked(files.directory, device=self.device.name, dtype=self.dtype, variant=files.variant)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError) as error:
            raise BadInput(f"base {ref.location} does not load: {error}") from error
