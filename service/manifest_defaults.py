"""What a manifest does not give, and what is taken instead: nothing is filled in without being stated."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from service.manifest_demands import by_parts
from service.manifest_file import DEFAULT_METHOD, ManifestFile
from service.manifest_samples import DEFAULT_PROMPT
from service.manifest_specs import MergeSpec
from service.method_facts import trains
from service.wording import plain, some


def defaulted(raw: Mapping[str, Any], file: ManifestFile, merges: Iterable[MergeSpec]) -> Iterator[str]:
    if "merge" not in raw:
        yield f"merge: not given, so {DEFAULT_METHOD} with seed 0"
    for merge in (own for one in merges for own in (one, *one.candidates)):
        left = [f"{knob} {plain(value)}" for knob, value in merge.knobs.items() if knob not in merge.given]
        if left:
            yield f"merge: {merge.method} with {', '.join(left)}"
    if "samples" not in raw:
        yield f"samples: not given, so one image of '{DEFAULT_PROMPT}', seed 0, {file.samples.steps} steps"
    for name in ("seeds", "steps", "style_strengths") if raw.get("samples") else ():
        if name not in file.samples.model_fields_set:
            yield f"samples.{name}: {plain(getattr(file.samples, name))}"
    whole, _ = by_parts(merges)
    if whole and any(strength != 1.0 for strength in file.samples.style_strengths):
        yield f"samples.style_strengths: 1.0 alone for {some(whole)}, whose style has no rows of its own"
    for role in ("subjects", "styles"):
        unweighted = [id for id, lora in getattr(file, role).items() if "weight" not in lora.model_fields_set]
        if unweighted:
            yield f"{role}: weight 1.0 for {len(unweighted)} of {len(getattr(file, role))}"
    looked_at = any(not trains(merge.method) for merge in merges)
    bare = [lora for lora in (*file.subjects.values(), *file.styles.values()) if not lora.lora]
    settings = file.training.model_dump()
    if bare and looked_at:
        left = [name for name in settings if name not in file.training.model_fields_set]
        yield f"training: {', '.join(f'{name} {plain(settings[name])}' for name in left)}"
    elif "training" in raw:
        yield "training: not looked at, as nothing is to be trained by it"
