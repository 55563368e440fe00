"""A plan as plain text, line by line; printing is the command line's."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from service.lora_checks import CheckedLoRA
from service.plan import Plan
from service.wording import number, some

SHOWN = 12  # lines of each kind


def summary_lines(plan: Plan) -> Iterator[str]:
    """The plan in plain text, long lists cut; all of it is in plan_json.py, its problems in `Plan.check`."""
    n_left = len(plan.left)
    if plan.base:
        base = plan.base
        kind = f"{base.architecture}, {base.default_size} px, {base.prediction_type}"
        yield f"base      {base.location} ({kind}, sha256 {base.digest[:12]})"
    for own in plan.own_bases:
        kind = f"{own.architecture}, {own.default_size} px"
        yield f"          {own.location} ({kind}, sha256 {own.digest[:12]}), for {_users(plan, own.digest)}"
    for kind, scorer in (("clip", plan.scorers.clip), ("dino", plan.scorers.dino)):
        if scorer:
            yield f"scorer    {kind}: {scorer.location} (sha256 {scorer.digest[:12]})"
    roles = Counter(lora.spec.role for lora in plan.loras)
    n_bytes = sum(lora.n_bytes for lora in plan.loras)
    yield f"LoRAs     {number(roles['subject'], 'subject')}, {number(roles['style'], 'style')}, {_size(n_bytes)}"
    yield from _training_lines(plan)
    yield f"jobs      {len(plan.jobs)}: {len(plan.committed)} committed, {n_left} to do"
    for method, n in Counter(job.method for job in plan.jobs).items():
        yield f"          {n} × {method}"
    yield f"catalog   {plan.output}"
    if n_left:
        images = sum(job.samples.n_images for job in plan.left)
        yield (
            f"writes    {_size(plan.n_bytes.total)}: merged LoRAs {_size(plan.n_bytes.merged)}"
            + (f", mergers {_size(plan.n_bytes.mergers)}" if plan.n_bytes.mergers else "")
            + (f", PEFT twins {_size(plan.n_bytes.peft)}" if plan.n_bytes.peft else "")
            + (f", {number(images, 'image')} about {_size(plan.n_bytes.samples)}" if images else ", no images")
        )
        yield (
            f"takes     {time_text(plan.duration.total_s)}: "
            + (f"training {time_text(plan.duration.train_s)}, " if plan.duration.train_s else "")
            + f"calibration {time_text(plan.duration.calibrate_s)}, "
            f"merging {time_text(plan.duration.merge_s)}, sampling {time_text(plan.duration.sample_s)}"
        )
        yield f"          {plan.duration.basis}"
        if plan.need:
            n_bytes = max(plan.need(job) for job in plan.left)
            yield f"needs     about {_size(n_bytes)} of a GPU's memory for one pair, more for several side by side"
    elif plan.jobs and not plan.problems:
        yield "nothing to do: every job of this manifest is committed"
    yield from _section("carried through at weight 1, outside the layers that are merged:", _carried_lines(plan.loras))
    yield from _section("taken where the manifest says nothing:", plan.defaulted)
    if plan.problems:
        yield f"{number(len(plan.problems), 'problem')} to mend first"


def _users(plan: Plan, digest: str) -> str:
    return ", ".join(dict.fromkeys(job.method for job in plan.jobs if job.base.digest == digest))


def _training_lines(plan: Plan) -> Iterator[str]:
    """LoRAs that the run makes itself: those there already by number, the others by name."""
    left = plan.trainings_left
    there = sum(training.job_id in plan.trained for training in plan.trainings)
    if there:
        yield f"trained   {number(there, 'LoRA')}, by an earlier run"
    for place, training in enumerate(left[:SHOWN]):
        settings = training.settings
        what = f"{training.pair} on {number(len(training.images), 'image')}"
        how = f"rank {settings['rank']}, {settings['steps']} steps of {settings['batch']}, lr {settings['lr']:g}"
        if feedback := settings.get("feedback"):
            made = len(feedback["prompts"]) * feedback["per_prompt"]
            how += f", and again with the best {feedback['keep']} of {made} pictures of its own"
        yield f"{'trains' if place == 0 else '':<9} {what}: {how}"
    if len(left) > SHOWN:
        yield f"          … and {len(left) - SHOWN} more"


def _carried_lines(loras: Iterable[CheckedLoRA]) -> list[str]:
    """Equal ones together: 'subjects.dog, subjects.cat: 72 of text_encoder'."""
    names: dict[str, list[str]] = {}
    for lora in loras:
        if lora.carried:
            what = ", ".join(f"{n} of {part}" for part, n in sorted(lora.carried.items()))
            names.setdefault(what, []).append(f"{lora.spec.role}s.{lora.spec.id}")
    return [f"{some(who)}: {what}" for what, who in names.items()]


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield title
        yield from (f"  {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"  … and {len(lines) - SHOWN} more"


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB" if n_bytes < 1000 else f"{n_bytes:,.0f} TB"


def time_text(seconds: float) -> str:
    if seconds < 90:
        return "0 s" if seconds == 0 else "under 1 s" if seconds < 1 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"
