"""A small world on disk for tests of the service: a random tiny SDXL, LoRAs in every layout, reference images,
manifests over them."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from PIL import Image

from tests.lora_files import SDXL_LAYOUTS, differing_alphas, lora_file, random_lora, shapes_of
from tests.tiny import tiny_sdxl
from ziplora.layouts import is_target

SUBJECTS = ("dog", "cat", "fox", "owl", "hen")
STYLES = ("ink", "oil", "wax", "pen")
QUICK_MERGE = {"method": "ziplora", "steps": 3}
QUICK_SAMPLES = {"prompts": ["{subject} in {style}"], "steps": 2, "size": 32}


@dataclass(frozen=True, slots=True)
class Grid:
    """`root` holds base/, <id>.safetensors and <id>.png for every id; the fox and the wax have no image."""

    root: Path

    def manifest(self, name: str = "manifest.yaml", subjects: int = 2, styles: int = 2, **fields: object) -> Path:
        """Written beside the files; `fields` replace or add to the top-level ones, None leaves one out."""
        content: dict[str, object] = {
            "base": "base",
            "subjects": {id: self._lora(id, f"a photo of sks {id}", f"sks {id}") for id in SUBJECTS[:subjects]},
            "styles": {id: self._lora(id, f"a house in szn {id} style", f"szn {id} style") for id in STYLES[:styles]},
            "merge": QUICK_MERGE,
            "samples": QUICK_SAMPLES,
            "output": "catalog",
            **fields,
        }
        path = self.root / name
        path.write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
        )
        return path

    def _lora(self, id: str, prompt: str, trigger: str) -> dict[str, object]:
        images = {"images": f"{id}.png"} if (self.root / f"{id}.png").exists() else {}
        return {"lora": f"{id}.safetensors", "prompt": prompt, "trigger": trigger, **images}


def build_grid(root: Path) -> Grid:
    pipeline = tiny_sdxl()
    pipeline.save_pretrained(root / "base")
    shapes = shapes_of(pipeline)
    targets = {path: shape for path, shape in shapes.items() if is_target(path)}
    for number, id in enumerate((*SUBJECTS, *STYLES)):
        # the second of each kind has text-encoder, feed-forward and convolution parts too
        lora = random_lora(shapes if number in (1, 6) else targets, rank=2 + number % 3, seed=number, size=0.2)
        layout = [name for name in SDXL_LAYOUTS if name not in ("legacy", "peft, rslora")][number % 7]
        alphas = None if layout.startswith(("peft", "dreambooth")) else differing_alphas(lora)
        (root / f"{id}.safetensors").write_bytes(lora_file(lora, layout, alphas=alphas))
        if id not in ("fox", "wax"):
            Image.effect_mandelbrot((48, 40), (-2 + number / 10, -1.5, 1, 1.5), 20).convert("RGB").save(
                root / f"{id}.png"
            )
    return Grid(root)
