"""A base is loaded with what its merges and samples need, whatever else its model_index.json names."""

import json
import shutil
from fnmatch import fnmatchcase

from service.base_files import needed_files
from tests.tiny import tiny_sd15
from ziplora.base import load_base


def test_what_is_fetched_of_a_base_is_enough_to_load_it(tmp_path):
    whole, fetched = tmp_path / "whole", tmp_path / "fetched"
    tiny_sd15().save_pretrained(whole)
    index = whole / "model_index.json"
    as_on_the_hub = {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
    }
    index.write_text(json.dumps(json.loads(index.read_text()) | as_on_the_hub))
    names = [path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()]
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in needed_files(names)):
            (fetched / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / name, fetched / name)
    base = load_base(fetched)
    assert base.architecture == "sd15"
    assert base.encode_prompt("a cat").embeds.shape[1] == 77
