"""The files of a merge: what is in them, what they say of themselves, and the pictures beside them.

A method whose result is no single LoRA (`Method.file`) leaves a recipe in its place: which of the two LoRAs each module
takes, up to which share of the sampling steps; or with which weights the logits of two adapters are combined.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from io import BytesIO
from typing import Any

from PIL import Image, PngImagePlugin

from service.entry import RECIPE
from service.jobs import Job, Role, render
from ziplora import formats
from ziplora.lora import LoRA, restyled
from ziplora.merged import Merged
from ziplora.styledrop_knobs import Mixture
from ziplora.switched import Switched

RULE = (
    "In each module of `until`, the subject's update applies in the steps before which a share of all steps of at most"
    " its number is done, the style's in the steps from there on; every other module has both updates in all steps."
)


MIXTURE_RULE = (
    "At each step of sampling a token's logits are m + contrast·(m − b) + text·(b − n), m = b + subject·(c − b) +"
    " strength·style·(s − b): b of the base and n of the base under no prompt, c with the subject's adapter, s with the"
    " style's; `strength` is the sample's style strength."
)


def written(
    job: Job, merged: Merged, circumstances: Mapping[str, str], adapters: Mapping[Role, str] | None = None
) -> dict[str, bytes]:
    """The files of a merge: the LoRA for every tool, its sidecar, the mergers, and the PEFT twin if the manifest
    asks for one; or the recipe alone. `adapters`: sha256 of those that a mixture is of."""
    if merged.until is not None:
        return {RECIPE: recipe(job, merged, circumstances)}
    if merged.mixture is not None:
        return {RECIPE: mixture_recipe(job, merged.mixture, circumstances, adapters or {})}
    assert job.base.architecture != "amused"
    title = f"{job.subject.id} × {job.style.id} ({job.method})"
    trigger = f"{job.subject.trigger}, {job.style.trigger}"
    metadata = {**merge_metadata(job, merged), **circumstances}
    files = {
        "merged.safetensors": formats.write_kohya(
            merged.lora(), metadata=metadata, architecture=job.base.architecture, title=title, trigger=trigger
        ),
        "merged.json": formats.sidecar(
            trigger=trigger,
            description=f"{title}: ZipLoRA catalog, job {job.job_id[:12]}",
            architecture=job.base.architecture,
        ),
    }
    if merged.mergers is not None:
        files["mergers.safetensors"] = formats.write_mergers(merged.mergers, metadata)
    if "peft" in job.outputs:
        files["peft.safetensors"] = formats.write_peft(merged.lora(), metadata=metadata)
    return files


def recipe(job: Job, merged: Merged, circumstances: Mapping[str, str]) -> bytes:
    """JSON: what is applied when, and to which base and LoRAs that belongs."""
    assert merged.until is not None
    until = {path: round(share, 6) for path, share in sorted(merged.until.items())}
    about = {**merge_metadata(job, merged), **circumstances}
    return json.dumps({"version": 1, "rule": RULE, "until": until, "about": about}, indent=1, sort_keys=True).encode()


def mixture_recipe(job: Job, mixture: Mixture, circumstances: Mapping[str, str], adapters: Mapping[Role, str]) -> bytes:
    """JSON: the adapters by the sha256 of their files, the base they belong to, the weights, and what was sampled."""
    about = {name: circumstances[name] for name in ("ziplora.version", "ziplora.algorithm", "ziplora.dtype")}
    return json.dumps(
        {
            "version": 1,
            "rule": MIXTURE_RULE,
            "base": {"digest": job.base.digest, "architecture": job.base.architecture},
            "adapters": dict(adapters),
            "trainings": {"subject": job.subject.lora_sha256, "style": job.style.lora_sha256},
            "weights": asdict(mixture),
            "steps": job.samples.steps,
            "pictures": sample_list(job),
            "about": {"ziplora.job_id": job.job_id, "ziplora.method": job.method, **about},
        },
        indent=1,
        sort_keys=True,
    ).encode()


def sampled_with(
    files: Mapping[str, bytes], merged: Merged, strengths: Iterable[float]
) -> dict[float, LoRA | Switched]:
    """What pictures are made with, by style strength: the LoRA that is published, its rounding included, or both LoRAs
    by turns."""
    if merged.until is not None:
        return {strength: merged.applied(strength) for strength in strengths}
    published = formats.read_lora(files["merged.safetensors"], name="merged.safetensors").lora
    rank = merged.subject_rank
    return {strength: published if strength == 1.0 else restyled(published, rank, strength) for strength in strengths}


def merge_metadata(job: Job, merged: Merged) -> dict[str, str]:
    """What makes the file describe itself: base, method, knobs, seed and both sources by digest."""
    return {
        "modelspec.merged_from": f"{job.subject.id}, {job.style.id}",
        "ziplora.job_id": job.job_id,
        "ziplora.base": job.base.digest,
        "ziplora.method": job.method,
        "ziplora.knobs": json.dumps(dict(job.knobs), sort_keys=True),
        "ziplora.seed": str(job.seed),
        "ziplora.subject": job.subject.lora_sha256,
        "ziplora.style": job.style.lora_sha256,
        "ziplora.subject_weight": repr(job.subject.weight),
        "ziplora.style_weight": repr(job.style.weight),
        # in every module the first rows are the subject's: enough to change the style's strength later
        "ziplora.subject_rank": str(merged.subject_rank),
    }


def sample_list(job: Job) -> list[dict[str, Any]]:
    """What each sample shows, in the order of their numbers."""
    return [
        {
            "object": f"samples/{number:03}.png",
            "prompt": render(prompt.template, job.subject, job.style),
            "name": prompt.name,
            "style_strength": strength,
            "seed": seed,
        }
        for number, (prompt, strength, seed) in enumerate(
            (prompt, strength, seed)
            for prompt in job.samples.prompts
            for strength in job.samples.style_strengths
            for seed in job.samples.seeds
        )
    ]


def png(image: Image.Image, text: Mapping[str, Any]) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    out = BytesIO()
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue()
