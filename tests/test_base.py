"""A base is loaded with what its merges and samples need, whatever else its model_index.json names."""

import json
import shutil
from fnmatch import fnmatchcase

import pytest

from service.base_files import needed_files
from tests.tiny import tiny_sd15, tiny_sdxl
from ziplora.base import load_base

EXTRACTOR = {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
ENCODER = {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
CHECKER = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}


@pytest.mark.parametrize(
    ("make", "architecture", "named"),
    [
        (tiny_sd15, "sd15", EXTRACTOR | CHECKER),  # as on the hub
        (tiny_sd15, "sd15", EXTRACTOR | CHECKER | ENCODER),
        (tiny_sdxl, "sdxl", EXTRACTOR | ENCODER),
    ],
)
def test_what_is_fetched_of_a_base_is_enough_to_load_it(make, architecture, named, tmp_path):
    whole, fetched = tmp_path / "whole", tmp_path / "fetched"
    make().save_pretrained(whole)
    index = whole / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | named))
    names = [path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()]
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in needed_files(names)):
            (fetched / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / name, fetched / name)
    base = load_base(fetched)
    assert base.architecture == architecture
    assert base.encode_prompt("a cat").embeds.shape[1] == 77
