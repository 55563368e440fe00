"""How much of a GPU's memory a job is thought to need: so that small GPUs are not given what cannot fit. A guess that
errs on the small side does no harm, see boards.py; one that errs on the large side leaves small GPUs less to do."""

from collections.abc import Callable, Mapping
from math import prod

from service.best import candidates
from service.cost import Shapes, applied_to, level_of, levels_of
from service.jobs import Job
from ziplora.methods import METHODS

SAVED_BYTES = 3.14  # per value that a layer puts out, for the way back: 5.2 GiB for a row of SDXL at 1024² in bf16
PASSING = 0.1  # of that, where nothing is kept for a way back
DECODED_BYTES = 3000.0  # per pixel while the VAE decodes: about 3 GiB at 1024²
CONTEXT_BYTES = 2**30  # CUDA's own, and what allocators leave unused


def memory_of(
    shapes: Shapes, default_size: int, factor: int, value_bytes: int = 2, beside: Mapping[str, int] | None = None
) -> Callable[[Job], int]:
    """Bytes that one pair needs, alone. `shapes`: canonical path → weight shape; `default_size` in pixels, `factor`
    pixels per latent, `value_bytes` of a weight. `beside`: of bases that other methods load too, by digest."""
    weights = value_bytes * sum(prod(shape) for shape in shapes.values())
    known: dict[tuple[str, int, int], int] = {}

    def need(job: Job) -> int:
        key = (job.method, id(job.knobs), id(job.samples))  # the jobs of a merge share these
        if key not in known:
            most = max(max(merging(one), sampling(one)) for one in candidates(job))
            known[key] = int(weights + (beside or {}).get(job.base.digest, 0) + CONTEXT_BYTES + most)
        return known[key]

    def merging(job: Job) -> float:
        method = METHODS[job.method]
        knobs = method.knobs(**job.knobs)
        settings = method.calibration(knobs, job.seed)
        side = ((settings and settings.size) or default_size) // factor
        kept = SAVED_BYTES * value_bytes / 2 * values_out(shapes, side, side)
        rows = 2 * getattr(knobs, "batch", 1)  # both terms of Eq. 3 are rows of one pass
        return rows * kept if method.passes(knobs).backward else PASSING * kept

    def sampling(job: Job) -> float:
        if not job.samples.n_images:
            return 0.0
        width, height = job.samples.width, job.samples.height
        rows = 2 if job.samples.guidance > 1 else 1
        passing = PASSING * SAVED_BYTES * value_bytes / 2 * rows * values_out(shapes, height // factor, width // factor)
        return max(passing, DECODED_BYTES * width * height)

    return need


def values_out(shapes: Shapes, height: int, width: int) -> int:
    """What all layers of the UNet put out in one call on one latent."""
    levels = levels_of(shapes)
    return sum(
        shape[0] * applied_to(path, height * width // 4 ** level_of(path, levels))
        for path, shape in shapes.items()
        if path.startswith("unet.")
    )
