"""What a manifest asks of its base and of its scorers that they cannot give. Each problem names the field it is in."""

from collections.abc import Iterable, Iterator

from service import best
from service.base_files import BaseFiles
from service.choose import BEST
from service.jobs import SampleSettings, Scorers
from service.lora_checks import CheckedLoRA
from service.manifest import Manifest

MAX_TOKENS = 75  # of a prompt that CLIP reads, without its start and end


def size_problems(manifest: Manifest, base: BaseFiles, samples: SampleSettings) -> list[str]:
    step = base.size_step
    expected = f"pixels do not fit the base; expected multiples of {step}"
    problems = []
    if samples.width % step or samples.height % step:
        problems.append(f"{manifest.where('samples', 'size')}: {samples.width}×{samples.height} {expected}")
    merges = [one for merge in manifest.merges for one in (merge, *merge.candidates)]
    for size in (merge.knobs.get("size") for merge in merges):
        if size is not None and size % step:
            problems.append(f"{manifest.where('merge')}: size {size} {expected}")
    return problems


def caption_problems(manifest: Manifest, base: BaseFiles) -> Iterator[str]:
    """Captions that are certainly too few, whatever the tokenizer makes of them: see ziplora.custom_diffusion."""
    width = max((shape[1] for path, shape in base.shapes.items() if path.endswith(".attn2.to_k")), default=0)
    for merge in (own for one in manifest.merges for own in (one, *one.candidates)):
        captions = merge.knobs.get("captions")
        if isinstance(captions, list) and sum(min(MAX_TOKENS, len(caption)) + 1 for caption in captions) < width:
            yield (
                f"{manifest.where('merge')}: missing captions: {len(captions)} cannot have {width} words in different"
                f" contexts, which {merge.method} needs for this base; give more, or captions: built-in"
            )


def best_problems(
    manifest: Manifest, scorers: Scorers, samples: SampleSettings, loras: Iterable[CheckedLoRA]
) -> list[str]:
    bare: dict[str, list[str]] = {"subject": [], "style": []}
    for lora in loras:
        if not lora.spec.images:
            bare[lora.spec.role].append(f"{lora.spec.role}s.{lora.spec.id}")
    chosen = dict.fromkeys(merge.knobs["by"] for merge in manifest.merges if merge.method == BEST)
    found = (text for by in chosen for text in best.problems(by, scorers, samples, bare))
    return [f"{manifest.where('merge')}: {text}" for text in found]
