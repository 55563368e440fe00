"""What a manifest samples from each merge: its prompts, which have several spellings, and their names."""

import re
from collections.abc import Iterator
from typing import Any

from service.jobs import SamplePrompt, template_problem
from service.manifest_checks import check_text
from service.manifest_file import SamplesSection
from service.manifest_reading import ID, ID_RULE, Reading
from service.manifest_specs import SampleSpec
from service.wording import FieldPath, shown

DEFAULT_PROMPT = "{subject} in {style}"


def sample_spec(section: SamplesSection, prompts: tuple[SamplePrompt, ...]) -> SampleSpec:
    return SampleSpec(
        prompts=prompts,
        seeds=tuple(section.seeds),
        steps=section.steps,
        guidance=section.guidance,
        size=(section.size[0], section.size[1]) if section.size else None,
        scheduler=section.scheduler,
        negative=section.negative,
        style_strengths=tuple(section.style_strengths),
    )


def read_prompts(reading: Reading) -> Iterator[SamplePrompt]:
    """The sample prompts, but for those that have a fault, which is reported; the default one where `samples` is not
    given."""
    if "samples" not in reading.raw:
        yield SamplePrompt(_slug(DEFAULT_PROMPT), DEFAULT_PROMPT)
    samples = reading.section("samples")
    if not samples:
        return
    field: FieldPath = ("samples", "prompts")
    match samples.get("prompts"):
        case dict() as named:
            for name, template in named.items():
                if not ID.fullmatch(name):
                    reading.problem((*field, name), f"the name {shown(name)} cannot be used; expected {ID_RULE}")
                yield from _prompt(reading, (*field, name), name, template)
        case list() as templates:
            yield from _listed_prompts(reading, field, templates)
        case str() as template:
            yield from _prompt(reading, field, _slug(template), template)
        case None if "prompts" not in samples and [] in (samples.get("seeds"), samples.get("style_strengths")):
            return  # no images asked for
        case None:
            reading.problem(
                field, f"missing; expected templates such as '{DEFAULT_PROMPT}', or `samples: {{}}` for no images"
            )
        case other:
            reading.problem(
                field, f"expected {SamplesSection.model_fields['prompts'].description}, given {shown(other)}"
            )


def _listed_prompts(reading: Reading, field: FieldPath, templates: list[Any]) -> Iterator[SamplePrompt]:
    first: dict[Any, int] = {}
    names: set[str] = set()
    for i, template in enumerate(templates):
        slug = _slug(template) if isinstance(template, str) else ""
        name = slug if slug not in names else f"{slug}-{i}"
        names.add(name)
        if isinstance(template, str) and first.setdefault(template, i) != i:
            reading.problem(
                (*field, i), f"the same as prompts[{first[template]}]; keep one (seeds make several images)"
            )
            continue
        yield from _prompt(reading, (*field, i), name, template)


def _prompt(reading: Reading, field: FieldPath, name: str, template: Any) -> Iterator[SamplePrompt]:
    text, faults = check_text(template, field)
    reading.add(faults)
    problem = template_problem(text) if text else None
    if problem:
        reading.problem(field, problem)
    elif text:
        yield SamplePrompt(name, text)


def _slug(template: str) -> str:
    """A name for a prompt that has none: 'a {subject}, sleeping' → a-subject-sleeping."""
    return re.sub(r"[^a-z0-9]+", "-", template.lower()).strip("-")[:48].strip("-") or "prompt"
