"""Model cards as the Hub reads them, also of entries whose texts mean harm."""

from dataclasses import replace
from datetime import UTC, datetime

from huggingface_hub import ModelCard

from service.entry import Entry
from service.model_card import Picture, model_card
from tests.catalogs import id_of, identity

EVIL = '"\n---\nlicense: mit\n---\n```\n<script>alert(1)</script> ` | [x](javascript:1) # \u2028 \ud83d\udc15 : - {a}'


def entry(**fields: object) -> Entry:
    job = {**identity(), **fields}
    scores = {"style_alignment": 0.7, "subject_alignment": 0.42, "text_alignment": None}
    return Entry(id_of(job), job, {}, {"scores": scores}, "attempt", datetime(2026, 11, 21, tzinfo=UTC))


def test_the_front_matter_is_what_the_hub_reads() -> None:
    pictures = [Picture("images/000.png", "a sks dog in szn style")]
    card = ModelCard(model_card(entry(), pictures, "stabilityai/stable-diffusion-xl-base-1.0"))
    assert card.data.to_dict() == {
        "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": "sks dog, szn",
        "tags": [
            "text-to-image", "diffusers", "lora", "template:sd-lora", "ziplora",
            "stable-diffusion-xl", "stable-diffusion-xl-diffusers",
        ],
        "widget": [{"text": "a sks dog in szn style", "output": {"url": "images/000.png"}}],
    }  # fmt: skip
    text = card.text
    assert "# dog × watercolour\n" in text
    assert "<Gallery />" in text
    assert 'image = pipeline("a sks dog in szn style").images[0]' in text
    assert "| style alignment | 0.700 |" in text
    assert "text alignment" not in text
    assert f"`{id_of(identity())}`" in text


def test_a_card_without_pictures_base_or_scores_claims_none() -> None:
    card = ModelCard(model_card(entry(), []))
    assert not {"base_model", "widget", "license"} & card.data.to_dict().keys()
    assert "Gallery" not in card.text
    assert f"the base with digest `{'b' * 64}`" in card.text


def test_the_lora_is_the_one_that_was_merged() -> None:
    made = replace(entry(), report={"subject": {"lora_sha256": "f" * 64}})  # trained by the run, from an id of 1111…
    card = model_card(made, [])
    assert f"| subject LoRA | sha256 `{'f' * 64}`, trained with `a sks dog` |" in card
    assert f"| style LoRA | sha256 `{'2' * 64}`, trained with `szn style` |" in card
    subject = {**identity()["subject"], "lora": ""}  # joint training looks at none
    card = model_card(entry(subject=subject), [])
    assert "| subject LoRA | none: trained on its pictures, with `a sks dog` |" in card


def test_texts_of_an_entry_stay_texts() -> None:
    concept = {"id": EVIL, "trigger": EVIL, "prompt": EVIL, "lora": EVIL}
    hostile = entry(subject=concept, style=concept, method=EVIL, knobs={EVIL: EVIL}, base={"architecture": EVIL})
    card = ModelCard(model_card(hostile, [Picture("images/000.png", EVIL)], "me/base"))
    assert card.data.get("license") is None
    assert card.data["instance_prompt"] == f"{EVIL}, {EVIL}"
    assert card.data["widget"][0]["text"] == EVIL
    body = card.text
    assert "<script" not in body
    assert body.count("```") == 2
    assert "](" not in body.replace("[ZipLoRA](https://arxiv.org/abs/2311.13600)", "")
    assert len([line for line in body.splitlines() if line.startswith("| ")]) == len(
        [line for line in body.splitlines() if line.count(" | ") == 1]
    )
