"""The pocket world: its renderer, and the weights that are shipped for it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from service.base_files import read_base
from service.inputs import DigestCache
from ziplora import formats, layouts, pocket
from ziplora import lora as lora_value
from ziplora.base import Base, load_base
from ziplora.masked import load_masked
from ziplora.pocket import models, ship, train_amused, train_base, train_loras, train_vae, world
from ziplora.pocket.check import combinations, rates, sample
from ziplora.pocket.pool import read_pool, write_pool
from ziplora.pocket.recognise import Recogniser


@pytest.fixture(scope="module")
def base() -> Base:
    torch.set_num_threads(1)
    return load_base(pocket.path())


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    return Recogniser(pocket.scorer("recogniser"))


class TestWorld:
    def test_a_seed_is_one_picture(self) -> None:
        scene = world.truth("robot", "ice", extra="crown")
        first, again, other = (np.asarray(world.picture(scene, seed)) for seed in (3, 3, 4))
        assert (first == again).all()
        assert (first != other).any()

    def test_new_shapes_and_styles_are_never_trained(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(300):
            scene, caption = world.training_example(rng)
            assert scene.shape not in world.NEW_SHAPES
            assert scene.style is None or scene.style.name not in world.NEW_STYLES
            assert not set(models.TRIGGERS) & set(caption.split())
            if scene.style is not None and scene.style.name in world.SEEN_STYLES:
                assert not world.left_out(scene.shape, scene.style.name)

    def test_every_shape_and_style_is_drawn_differently(self) -> None:
        for names, scenes in (
            (world.SHAPES, [world.Scene(name, world.STYLES["stamp"]) for name in world.SHAPES]),
            (world.STYLES, [world.Scene("star", style) for style in world.STYLES.values()]),
        ):
            assert len({world.picture(scene, 0).tobytes() for scene in scenes}) == len(names)

    def test_captions(self) -> None:
        assert world.caption(world.truth("anchor", None)) == "a photo of a black and orange anchor"
        assert world.caption(world.truth("anchor", "ice", extra="ball")) == "an anchor with a ball in ice style"
        assert world.caption(world.truth("key", None), shape_word="sks thing") == "a photo of a sks thing"
        assert world.caption(world.truth("cat", "ice"), style_word="szn") == "a cat in szn style"

    def test_a_pool_does_not_depend_on_the_number_of_workers(self, tmp_path: Path) -> None:
        for workers in (1, 2):
            write_pool(tmp_path / str(workers), 25, seed=5, workers=workers, chunk=10)
        one, two = read_pool(tmp_path / "1"), read_pool(tmp_path / "2")
        assert (one.pixels == two.pixels).all()
        assert list(one.captions) == list(two.captions)
        assert one.pixels[24].std() > 0


class TestMiniature:
    def test_every_word_of_the_world_is_one_token_and_any_text_tokenises(self, tmp_path: Path) -> None:
        tokenizer = models.tokenizer(tmp_path)
        assert all(len(tokenizer(word).input_ids) == 3 for word in models.words())
        assert len(tokenizer("Zürich 🐶 unheard").input_ids) > 5
        assert tokenizer.unk_token_id not in tokenizer("Zürich 🐶").input_ids[1:-1]

    def test_longest_caption_fits(self, tmp_path: Path) -> None:
        tokenizer = models.tokenizer(tmp_path)
        rng = np.random.default_rng(0)
        longest = max(len(tokenizer(world.training_example(rng)[1]).input_ids) for _ in range(300))
        assert longest <= models.N_TOKENS

    def test_standardised_latents_have_unit_deviation_and_decode_the_same(self) -> None:
        torch.manual_seed(0)
        vae = models.vae((8, 8, 16)).eval()
        pixels = np.stack([np.asarray(world.picture(world.truth("cat", s), 0)) for s in world.SEEN_STYLES])
        with torch.no_grad():
            x = train_vae.to_tensor(pixels)
            before = vae.decode(vae.encode(x).latent_dist.mode()).sample
            train_vae.standardise(vae, pixels)
            z = vae.encode(x).latent_dist.mode()
            assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
            assert torch.allclose(z.std((0, 2, 3)), torch.ones(4), atol=1e-3)
            assert torch.allclose(vae.decode(z).sample, before, atol=1e-3)

    @pytest.mark.parametrize("family", ["sdxl", "sd15"])
    def test_base_training_learns_and_resumes_bit_for_bit(self, family: models.Family, tmp_path: Path) -> None:
        def trainer() -> train_base.Trainer:
            torch.manual_seed(0)
            parts = models.build(tmp_path, family)
            latents = torch.randn(8, 4, 12, 12, generator=torch.Generator().manual_seed(1))
            ids = train_base.token_ids(parts, ["a cat in ice style"] * 8)
            recipe = train_base.Recipe(batch=2, warmup_steps=1)
            return train_base.Trainer(recipe, parts, latents, ids, train_base.token_ids(parts, [""])[0])

        through = trainer()
        losses = [through.update(0.0) for _ in range(2)]
        state = through.state()
        state = {**state, "model": {k: v.clone() for k, v in state["model"].items()}}
        state["average"] = {k: v.clone() for k, v in state["average"].items()}
        torch.save(state, tmp_path / "state.pt")
        losses += [through.update(0.0) for _ in range(2)]
        resumed = trainer()
        resumed.restore(torch.load(tmp_path / "state.pt"))
        assert [resumed.update(0.0) for _ in range(2)] == losses[2:]

    def test_sd15_is_assembled_trained_on_and_told_from_sdxl(self, tmp_path: Path) -> None:
        """From a training's directory to a LoRA file that fits the base, in SD 1.5's own layout."""
        torch.manual_seed(0)
        parts = models.build(tmp_path, "sd15")
        models.pipeline(parts).save_pretrained(tmp_path / "base")
        parts["vae"].save_pretrained(tmp_path / "vae")
        assert ship.ship_base(tmp_path, tmp_path / "shipped") == "sd15"
        found = read_base(str(tmp_path / "shipped" / "base"), digests=DigestCache(tmp_path / "digests"))
        assert (found.architecture, found.scheduler) == ("sd15", "PNDMScheduler")
        base = load_base(tmp_path / "shipped" / "base")
        assert base.architecture == "sd15"
        assert len(base.slots.targets) == 80
        task = next(task for task in train_loras.tasks("sd15") if task.name == "retro")
        task = replace(task, settings=train_loras.Settings(steps=1, batch=1))
        lora, metadata, _ = train_loras.train(base, task)
        file = train_loras.write(lora, task.layout, metadata, title="retro", trigger="szn", family="sd15")
        (tmp_path / "retro.safetensors").write_bytes(file)
        header = layouts.read_header_file(tmp_path / "retro.safetensors")
        parsed = layouts.parse(header, "retro")
        layouts.check_shapes(parsed, found.shapes, "retro")
        assert (parsed.base, parsed.layout) == ("SD 1.5", "kohya-diffusers")
        assert header.metadata["ss_base_model_version"] == "sd_v1"


class TestMaskedMiniature:
    def test_the_autoencoder_decodes_as_the_shipped_one(self) -> None:
        vae = AutoencoderKL.from_pretrained(pocket.path() / "vae", dtype=torch.float32)
        vq = train_amused.vq_model(vae, 16)
        latents = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = vae.decode(latents).sample / 2 + 0.5
            torch.testing.assert_close(vq.decoder(vq.post_quant_conv(latents)), expected, atol=1e-5, rtol=1e-5)

    def test_k_means_finds_what_is_apart(self) -> None:
        corners = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
        generator = torch.Generator().manual_seed(0)
        points = corners.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=generator)
        found = train_amused.k_means(points, 3, generator)
        assert torch.cdist(corners, found).min(1).values.max() < 0.1

    def test_training_resumes_bit_for_bit_and_its_pipeline_loads(self, tmp_path: Path) -> None:
        recipe = train_amused.Recipe(codes=16, batch=2, steps=4)
        vq = train_amused.vq_model(AutoencoderKL.from_pretrained(pocket.path() / "vae", dtype=torch.float32), 16)
        pixels = np.stack([np.asarray(world.picture(world.truth("cat", s), 0)) for s in world.SEEN_STYLES[:4]])
        captions = [world.caption(world.truth("cat", style)) for style in world.SEEN_STYLES[:4]]

        def trainer() -> train_amused.Trainer:
            base = train_amused.build(vq, recipe, tmp_path)
            return train_amused.Trainer(base, train_amused.tokens_of(base, pixels).long(), captions, recipe)

        through = trainer()
        through.update()
        through.save(tmp_path)
        losses = [through.update() for _ in range(2)]
        resumed = trainer()
        resumed.restore(torch.load(tmp_path / "state.pt"))
        assert [resumed.update() for _ in range(2)] == losses
        resumed.finish(tmp_path)
        loaded = load_masked(tmp_path / "base")
        assert (loaded.side, loaded.mask_token) == (world.SIZE, 23)
        assert torch.equal(loaded.encode_images([Image.fromarray(pixels[0])])[0], through.tokens[0])


class TestShipped:
    def test_size(self) -> None:
        assert sum(path.stat().st_size for path in pocket.WEIGHTS.rglob("*") if path.is_file()) <= 16_000_000

    def test_importing_loads_no_torch(self) -> None:
        code = "import sys, ziplora.pocket as p; p.path(); print(len(p.SUBJECTS), 'torch' in sys.modules)"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert output.split() == [str(len(pocket.SUBJECTS)), "False"]

    def test_what_is_there(self) -> None:
        assert len(pocket.SUBJECTS) >= 8
        assert len(pocket.STYLES) >= 6
        for concept in (*pocket.SUBJECTS, *pocket.STYLES):
            assert concept.trigger in concept.prompt
            assert all(Image.open(image).size == (world.SIZE, world.SIZE) for image in concept.images)
        assert all(len(subject.images) >= 4 for subject in pocket.SUBJECTS)
        assert all(len(style.images) == 1 for style in pocket.STYLES)
        assert {c.name for c in pocket.SUBJECTS} <= set(world.NEW_SHAPES)
        assert {c.name for c in pocket.STYLES} <= set(world.NEW_STYLES)

    def test_subject_captions_share_nothing_with_the_combined_prompt_but_the_trigger(self) -> None:
        for subject in pocket.SUBJECTS:
            for style in pocket.STYLES:
                combined = f"a {subject.trigger} in {style.trigger}".split()
                own = [word for word in subject.prompt.split() if word not in subject.trigger.split()]
                assert set(own) & set(combined) <= {"a"}

    def test_loras_cover_the_layouts_and_fit_the_base(self, base: Base) -> None:
        layouts = set()
        for concept in (*pocket.SUBJECTS, *pocket.STYLES):
            file = formats.read_lora(concept.lora)
            layouts.add(file.layout)
            assert set(file.lora.layers) == set(base.slots.targets)
            with base.slots.loaded([[file.lora]]):
                pass
        assert len(layouts) >= 4

    def test_base_draws_what_it_is_told(self, base: Base, recogniser: Recogniser) -> None:
        """Pairs of shape and style that it never saw together."""
        scenes = combinations("left out", 16, seed=1)
        images = sample(base.pipeline, [world.caption(scene) for scene in scenes], seed=1, steps=15)
        assert rates(recogniser, images, scenes).both >= 0.6

    def test_a_subject_and_a_style_are_recognised(self, base: Base, recogniser: Recogniser) -> None:
        for concept in (pocket.SUBJECTS[0], pocket.STYLES[0]):
            with base.slots.loaded([[formats.read_lora(concept.lora).lora]]):
                images = sample(base.pipeline, [concept.prompt] * 8, seed=5, steps=15)
            seen = recogniser.look(images)
            names = seen.shapes() if concept in pocket.SUBJECTS else seen.styles()
            assert names.count(concept.name) >= 6

    def test_recogniser_knows_the_truth(self, recogniser: Recogniser) -> None:
        scenes = [world.truth(shape, style) for shape in world.NEW_SHAPES for style in world.NEW_STYLES]
        images = [world.picture(scene, 10_000 + i) for i, scene in enumerate(scenes)]
        assert rates(recogniser, images, scenes).both >= 0.95

    def test_recipe_is_recorded(self) -> None:
        recipe = json.loads((pocket.WEIGHTS / "recipe.json").read_text())
        assert recipe["base"]["seconds"] > 0


class TestTries:
    """What is trained when a LoRA is not recognised at first."""

    def test_a_subject_learns_longer_from_another_start(self) -> None:
        task = train_loras.subject_task("guitar", settings=train_loras.Settings(steps=100))
        found = list(train_loras.tries(task))
        assert found[0] == task
        assert [(one.seed, one.settings.steps) for one in found] == [(0, 100), (1, 150), (2, 225), (3, 338)]
        assert {one.scenes for one in found} == {task.scenes}

    def test_a_style_learns_from_another_picture_too(self) -> None:
        found = list(train_loras.tries(train_loras.style_task("ice", "car", layout="legacy")))
        assert [one.scenes[0].shape for one in found] == ["car", "flower", "cat", "star"]
        assert [one.prompt.split()[1] for one in found] == ["car", "flower", "cat", "star"]
        assert {one.layout for one in found} == {"legacy"}


class TestLayouts:
    @pytest.mark.parametrize("layout", train_loras.LAYOUTS)
    def test_every_layout_reads_back_as_written(self, layout: str) -> None:
        torch.manual_seed(0)
        path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
        lora = lora_value.LoRA(
            {
                f"{path}.{name}": lora_value.Layer(torch.randn(4, 64), torch.randn(64, 4))
                for name in ("to_q", "to_out.0")
            }
        )
        file = train_loras.write(lora, layout, {}, title="x", trigger="sks thing")
        read = formats.read_lora(file)
        assert read.lora.layers.keys() == lora.layers.keys()
        for name, layer in lora.layers.items():
            assert torch.allclose(lora_value.delta(read.lora.layers[name]), lora_value.delta(layer), atol=0.05)
        if layout != "kohya":
            assert read.layout == layout
