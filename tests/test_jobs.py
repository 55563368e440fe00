"""Jobs: identity, job_id, the JSON round trip, prompt templates."""

import json
from dataclasses import fields, replace

import pytest

from service.jobs import (
    BaseRef,
    Concept,
    ImageRef,
    Job,
    SamplePrompt,
    SampleSettings,
    ScorerRef,
    Scorers,
    canonical_json,
    from_json,
    identity,
    job_id,
    render,
    template_problem,
    to_json,
)

BASE = BaseRef(location="/models/sdxl", revision=None, digest="b" * 64, architecture="sdxl")
DOG = Concept(
    "dog", "subject", "/l/dog.safetensors", "d" * 64, "a photo of sks dog", "sks dog", (ImageRef("/i/1.png", "1" * 64),)
)
INK = Concept("ink", "style", "s3://l/ink.safetensors", "e" * 64, "a cat in szn style", "szn style", (), 0.8)
SAMPLES = SampleSettings(
    (SamplePrompt("both", "{subject} in {style}"),), (0, 1), 50, 5.0, 1024, 1024, style_strengths=(1.0, 0.7)
)
JOB = Job(BASE, DOG, INK, "ziplora", {"steps": 100, "lr": 0.01}, 0, SAMPLES)


SCORED = replace(JOB, scorers=Scorers(clip=ScorerRef("openai/clip-vit-base-patch32", "c0ffee", "c" * 64)))


@pytest.mark.parametrize("job", [JOB, SCORED])
def test_round_trip_keeps_every_field(job):
    back = from_json(to_json(job))
    assert back == job
    assert hash(back) == hash(job)
    assert {f.name for f in fields(Job)} == set(json.loads(to_json(JOB)))


def test_job_id_is_the_hash_of_the_identity():
    assert JOB.job_id == job_id(identity(JOB))
    assert len(JOB.job_id) == 64
    assert SCORED.job_id == job_id(identity(SCORED))
    assert canonical_json({"b": 1, "a": [1.0, "é"]}) == '{"a":[1.0,"\\u00e9"],"b":1}'


def test_a_job_without_scorers_has_the_id_it_had_before_there_were_scores():
    assert JOB.job_id == "f41d5931b1d5253c5a1c132654ae0c5c4a30f74c5abd0178c3ffc8a302786cfe"


MOVED = [
    replace(JOB, base=replace(BASE, location="/elsewhere", revision="main")),
    replace(JOB, subject=replace(DOG, lora="s3://b/d.safetensors", images=(ImageRef("s3://b/1.png", "1" * 64),))),
    replace(JOB, knobs={"lr": 0.01, "steps": 100}),
]


@pytest.mark.parametrize("job", MOVED)
def test_locations_and_order_of_knobs_do_not_change_identity(job):
    assert job.job_id == JOB.job_id


CHANGED = [
    replace(JOB, base=replace(BASE, digest="c" * 64)),
    replace(JOB, base=replace(BASE, architecture="sd15")),
    *(
        replace(JOB, subject=replace(DOG, **change))
        for change in (
            {"id": "cat"},
            {"lora_sha256": "0" * 64},
            {"prompt": "p"},
            {"trigger": "t"},
            {"images": ()},
            {"weight": 0.5},
        )
    ),
    replace(JOB, style=replace(INK, id="oil")),
    SCORED,
    replace(SCORED, scorers=Scorers(dino=SCORED.scorers.clip)),
    replace(SCORED, scorers=Scorers(clip=ScorerRef("openai/clip-vit-base-patch32", "c0ffee", "d" * 64))),
    replace(JOB, method="direct"),
    replace(JOB, knobs={"steps": 99, "lr": 0.01}),
    replace(JOB, seed=1),
    *(
        replace(JOB, samples=replace(SAMPLES, **change))
        for change in (
            {"prompts": ()},
            {"seeds": (0,)},
            {"steps": 20},
            {"guidance": 7.5},
            {"width": 512},
            {"height": 512},
            {"scheduler": "DDIMScheduler"},
            {"negative": "blurry"},
            {"style_strengths": (1.0,)},
        )
    ),
    replace(JOB, outputs=("peft",)),
]


def test_everything_else_changes_identity():
    ids = {job.job_id for job in CHANGED}
    assert len(ids) == len(CHANGED)
    assert JOB.job_id not in ids


def test_altered_or_foreign_text_is_refused():
    altered = json.loads(to_json(JOB)) | {"seed": 7}
    with pytest.raises(ValueError, match="altered, or sent by another version"):
        from_json(json.dumps(altered))
    with pytest.raises(ValueError, match="not a job as this version writes it"):
        from_json(json.dumps(altered | {"colour": 1}))
    with pytest.raises(ValueError, match="not a job"):
        from_json("[]")


def test_nan_has_no_identity():
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(JOB, knobs={"lr": float("nan")})


def test_n_images():
    assert SAMPLES.n_images == 4
    assert replace(SAMPLES, seeds=()).n_images == 0


def test_templates():
    assert render("{subject} wearing a crown in {style} {{}}", DOG, INK) == "sks dog wearing a crown in szn style {}"
    assert template_problem("{subject} in {style}") is None
    assert template_problem("a {} b") == "unknown field {}: a template knows {subject} and {style}"
    assert template_problem("a {object}") == "unknown field {object}: a template knows {subject} and {style}"
    assert template_problem("{subject.lora}") == "unknown field {subject.lora}: a template knows {subject} and {style}"
    assert template_problem("{subject!r}") == "{subject} takes no format: write it without ':' and '!'"
    assert template_problem("a { b") == "unbalanced braces: write {{ and }} for literal ones"
