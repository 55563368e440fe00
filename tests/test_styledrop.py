"""StyleDrop + DreamBooth on a random masked-token model, held against diffusers' own pipeline and the written-out
equations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.tiny import tiny_amused, tiny_sdxl
from tests.tiny_scorers import tiny_clip
from ziplora.adapter_files import read_adapter, write_adapter
from ziplora.errors import FormatError
from ziplora.lora import Layer, LoRA, digest
from ziplora.masked import IGNORED, MaskedBase, load_masked, masked_loss, resident_masked
from ziplora.score import Judge, load_clip
from ziplora.styledrop import (
    AdapterTraining,
    IterativeTraining,
    feedback,
    identity,
    mixed,
    sample_mixture,
    second_round,
    tuned,
)
from ziplora.styledrop_knobs import AdapterSettings, FeedbackSettings, Mixture
from ziplora.train import own_seed

SIDE = 16
PROMPT = "a sks in szn style"
BASE_ALONE = Mixture(subject=0.0, style=0.0, text=2.0)
SETTINGS = AdapterSettings(rank=4, steps=16, batch=2, lr=1e-2)


@pytest.fixture(scope="module")
def base() -> MaskedBase:
    torch.set_num_threads(1)
    return resident_masked(tiny_amused())


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return load_clip(tiny_clip(tmp_path_factory.mktemp("clip")))


def picture(seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def random_adapter(base: MaskedBase, seed: int, size: float = 0.3) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    start = identity(base, 4, seed).layers
    return LoRA(
        {
            path: Layer(layer.down, size * torch.randn(layer.up.shape, generator=generator))
            for path, layer in start.items()
        }
    )


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def drawn(base: MaskedBase, subject: LoRA | None, style: LoRA | None, weights: Mixture) -> np.ndarray:
    return pixels(list(sample_mixture(base, subject, style, [PROMPT] * 2, [5, 6], weights, steps=4)))


def pipelines_own(pipe: object, guidance: float) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    run = [
        pipe(PROMPT, num_inference_steps=4, guidance_scale=guidance, generator=generator).images[0]  # type: ignore[operator]
        for generator in generators
    ]
    return pixels(run)


class TestMixing:
    def test_the_equation_as_written(self) -> None:
        g, nothing, c, s = torch.randn(4, 1, 32, 8, 8, dtype=torch.float64).unbind()
        w_c, w_s, contrast, text = 0.7, 0.9, 1.5, 3.0
        m = g + w_c * (c - g) + w_s * (s - g)
        expected = m + contrast * (m - g) + text * (g - nothing)
        torch.testing.assert_close(mixed(g, nothing, c, s, Mixture(w_c, w_s, contrast, text)), expected)

    def test_weights_that_sum_to_one_interpolate_the_two_adapters(self) -> None:
        g, nothing, c, s = torch.randn(4, 1, 32, 8, 8, dtype=torch.float64).unbind()
        for gamma in (0.0, 0.3, 1.0):
            found = mixed(g, nothing, c, s, Mixture(gamma, 1 - gamma, 0.0, 0.0))
            torch.testing.assert_close(found, gamma * c + (1 - gamma) * s)

    def test_it_is_a_product_of_distributions(self) -> None:
        """Whatever constants the logits carry, the distribution sampled from is ∝ p_c^γ·p_s^(1−γ)."""
        g, nothing, c, s = torch.randn(4, 2, 32, 4, 4, dtype=torch.float64).unbind()
        found = mixed(g, nothing, c + 5, s - 3, Mixture(0.4, 0.6, 0.0, 0.0)).log_softmax(1)
        product = 0.4 * c.log_softmax(1) + 0.6 * s.log_softmax(1)
        torch.testing.assert_close(found, product.log_softmax(1))

    def test_a_strength_is_a_factor_of_the_styles_weight_alone(self) -> None:
        assert Mixture(0.7, 0.6, 0.1, 2.0).styled(0.5) == Mixture(0.7, 0.3, 0.1, 2.0)

    @pytest.mark.parametrize("name", ["subject", "style", "contrast", "text"])
    @pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
    def test_senseless_weights_are_refused(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"the weight {name}"):
            Mixture(**{name: value})


class TestSampling:
    def test_without_adapters_it_is_diffusers_own_sampling(self, base: MaskedBase) -> None:
        """Guidance g is 1 + λ_B."""
        own = pipelines_own(tiny_amused(), guidance=3.0)
        assert (drawn(base, None, None, BASE_ALONE) == own).all()
        assert own.std() > 0

    def test_weights_of_nought_are_the_base_whatever_the_adapters_are(self, base: MaskedBase) -> None:
        subject, style = random_adapter(base, 1), random_adapter(base, 2)
        assert (drawn(base, subject, style, BASE_ALONE) == drawn(base, None, None, BASE_ALONE)).all()

    @pytest.mark.parametrize("side", ["subject", "style"])
    def test_one_weight_of_one_is_that_adapter_as_diffusers_samples_it(
        self, base: MaskedBase, tmp_path: Path, side: str
    ) -> None:
        """The file goes through diffusers' own reader into a fresh pipeline."""
        adapters = {"subject": random_adapter(base, 1), "style": random_adapter(base, 2)}
        file = tmp_path / "adapter.safetensors"
        file.write_bytes(write_adapter(adapters[side], {"made": "by a test"}))
        pipe = tiny_amused()
        pipe.transformer.load_lora_adapter(str(file), prefix="transformer")
        weights = Mixture(subject=float(side == "subject"), style=float(side == "style"), text=0.0)
        found = drawn(base, adapters["subject"], adapters["style"], weights)
        assert (found == pipelines_own(pipe, guidance=1.0)).all()
        assert (found != drawn(base, None, None, Mixture(0.0, 0.0, text=0.0))).any()

    def test_adapters_start_as_the_identity(self, base: MaskedBase) -> None:
        new = identity(base, 4, seed=3)
        assert len(new.layers) == 2 * (8 + 2) + 2 * 8  # two transformer layers; two blocks of attention without ff
        both = Mixture(subject=0.5, style=0.5, text=2.0)
        assert (drawn(base, new, new, both) == drawn(base, None, None, BASE_ALONE)).all()

    def test_a_seed_is_one_picture_and_both_adapters_count(self, base: MaskedBase) -> None:
        subject, style = random_adapter(base, 1), random_adapter(base, 2)
        both = Mixture(text=2.0)
        once = drawn(base, subject, style, both)
        assert (once == drawn(base, subject, style, both)).all()
        assert (once != drawn(base, subject, None, both)).any()
        assert (once != drawn(base, None, style, both)).any()
        assert len({one.tobytes() for one in once}) == 2

    def test_the_base_is_left_as_it_was(self, base: MaskedBase) -> None:
        list(sample_mixture(base, random_adapter(base, 1), None, [PROMPT], [0], Mixture(), steps=2))
        expected = tiny_amused().transformer.state_dict()
        found = base.pipeline.transformer.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
        assert not any(slot.active for slot in base.slots.layers.values())


class TestTraining:
    def test_the_loss_is_the_cross_entropy_of_masked_tokens_alone(self, base: MaskedBase) -> None:
        tokens = base.encode_images([picture(0), picture(1)])
        assert tokens.shape == (2, 8, 8)
        seen: dict[str, torch.Tensor] = {}
        transformer, own = base.pipeline.transformer, base.pipeline.transformer.forward

        def watched(given: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
            seen["given"], seen["logits"] = given, own(given, **rest)
            return seen["logits"]

        transformer.forward = watched
        try:
            loss = masked_loss(base, tokens, base.encode_prompts([PROMPT] * 2), torch.Generator().manual_seed(0))
        finally:
            del transformer.forward
        masked = seen["given"] == base.mask_token
        assert 0 < masked.sum() < masked.numel()
        assert (seen["given"][~masked] == tokens[~masked]).all()
        log_p = seen["logits"].log_softmax(1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(loss, -log_p[masked].mean())
        assert IGNORED not in tokens

    def test_it_learns_one_picture_and_is_decided_by_the_seed(self, base: MaskedBase) -> None:
        losses: list[float] = []
        adapters = [
            tuned(
                AdapterTraining(base, [picture(0)], ["a cat in szn style"], settings),
                lambda step: losses.append(step.loss),
            )
            for settings in (SETTINGS, SETTINGS, AdapterSettings(rank=4, steps=16, batch=2, lr=1e-2, seed=1))
        ]
        assert np.mean(losses[12:16]) < 0.75 * losses[0]
        assert losses[:16] == losses[16:32]
        assert digest(adapters[0]) == digest(adapters[1]) != digest(adapters[2])
        text, tokens = base.encode_prompts(["a cat in szn style"]), base.encode_images([picture(0)])

        def error(adapter: LoRA) -> float:
            with base.slots.loaded([[adapter]]):
                return masked_loss(base, tokens, text, torch.Generator().manual_seed(9)).item()

        assert error(adapters[0]) < 0.75 * error(LoRA({}))

    def test_carried_on_from_a_saved_state_it_ends_the_same(self, base: MaskedBase) -> None:
        whole = tuned(AdapterTraining(base, [picture(0)], ["a cat in szn style"], SETTINGS))
        file = BytesIO()
        with AdapterTraining(base, [picture(0)], ["a cat in szn style"], SETTINGS) as first:
            for step in first:
                if step.step == 7:
                    torch.save(first.state(), file)
                    break
        state = torch.load(BytesIO(file.getvalue()), weights_only=True)
        with AdapterTraining(base, [picture(0)], ["a cat in szn style"], SETTINGS) as second:
            second.restore(state)
            assert [step.step for step in second] == list(range(8, 17))
            assert digest(second.adapter()) == digest(whole)
        with (
            AdapterTraining(base, [picture(1)], ["a cat in szn style"], SETTINGS) as other,
            pytest.raises(ValueError, match="belongs to other settings, pictures or another base"),
        ):
            other.restore(state)

    def test_bad_input(self, base: MaskedBase) -> None:
        with pytest.raises(ValueError, match="no pictures"):
            AdapterTraining(base, [], [], SETTINGS)
        with pytest.raises(ValueError, match="1 captions for 2 pictures"):
            AdapterTraining(base, [picture(0), picture(1)], ["a cat"], SETTINGS)
        with pytest.raises(ValueError, match="rank is 0"):
            AdapterSettings(rank=0)
        with pytest.raises(ValueError, match="lr is nan"):
            AdapterSettings(lr=float("nan"))


class TestFeedback:
    PROMPTS = ("a cat in szn style", "a house in szn style")
    WANTED = FeedbackSettings(PROMPTS, keep=2, per_prompt=1, sample_steps=2)

    def iterative(self, base: MaskedBase, judge: Judge) -> IterativeTraining:
        settings = AdapterSettings(rank=2, steps=3, lr=0.05)
        return IterativeTraining(base, [picture(0)], ["a cat in szn style"], settings, self.WANTED, judge)

    def test_the_highest_scored_are_chosen(self, base: MaskedBase, judge: Judge) -> None:
        adapter, style = random_adapter(base, 2), [picture(0)]
        wanted = FeedbackSettings(self.PROMPTS, keep=2, per_prompt=3, sample_steps=3)
        chosen = feedback(base, adapter, style, judge, wanted, seed=40)
        prompts = [prompt for prompt in self.PROMPTS for _ in range(3)]
        weights = Mixture(subject=0.0, style=1.0)
        images = list(sample_mixture(base, None, adapter, prompts, range(40, 46), weights, steps=3))
        features, texts = judge.images(images), judge.texts(prompts)
        scores = 0.5 * F.cosine_similarity(features, texts) + 0.5 * F.cosine_similarity(features, judge.images(style))
        best = scores.argsort(descending=True)[:2].tolist()
        assert [one.score for one in chosen] == pytest.approx(scores[best].tolist(), abs=1e-6)
        assert (pixels([one.image for one in chosen]) == pixels([images[i] for i in best])).all()
        assert [one.prompt for one in chosen] == [prompts[i] for i in best]
        by_text = feedback(base, adapter, style, judge, replace(wanted, keep=6, style_share=0.0), seed=40)
        assert by_text[0].score == pytest.approx(F.cosine_similarity(features, texts).max().item(), abs=1e-6)

    def test_the_second_round_learns_from_what_was_chosen(self, base: MaskedBase, judge: Judge) -> None:
        settings = AdapterSettings(rank=2, steps=2, lr=1e-3)
        first = tuned(AdapterTraining(base, [picture(0)], ["a cat in szn style"], settings))
        chosen = feedback(base, first, [picture(0)], judge, self.WANTED)
        training = second_round(base, [picture(0)], ["a cat in szn style"], chosen, settings)
        assert torch.equal(training.tokens[1:], base.encode_images([one.image for one in chosen]))
        assert digest(tuned(training)) != digest(first)
        assert training.metadata()["ziplora.adapter.images"] == "3"

    def test_both_rounds_as_one_training(self, base: MaskedBase, judge: Judge) -> None:
        both = self.iterative(base, judge)
        with both:
            steps = list(both)
            adapter = both.adapter()
        assert [one.step for one in steps] == [1, 2, 3, 4, 5, 6]
        assert not any(slot.active for slot in base.slots.layers.values())
        images, captions = [picture(0)], ["a cat in szn style"]
        first = tuned(AdapterTraining(base, images, captions, both.settings))
        seed = own_seed(both.settings.seed, images, captions)
        chosen = feedback(base, first, images, judge, self.WANTED, seed=seed)
        assert both.chosen is not None
        assert [one.score for one in both.chosen] == [one.score for one in chosen]
        assert digest(adapter) == digest(tuned(second_round(base, images, captions, chosen, both.settings)))
        told = json.loads(both.metadata()["ziplora.adapter.feedback"])
        assert [one["prompt"] for one in told] == [one.prompt for one in chosen]

    @pytest.mark.parametrize("n", [2, 3, 5])
    def test_both_rounds_go_on_from_a_checkpoint_bit_for_bit(self, base: MaskedBase, judge: Judge, n: int) -> None:
        with self.iterative(base, judge) as whole:
            losses = [one.loss for one in whole]
            expected = whole.adapter()
        file = BytesIO()
        with self.iterative(base, judge) as begun:
            _ = [next(iter(begun)) for _ in range(n)]
            torch.save(begun.state(), file)
        file.seek(0)
        with self.iterative(base, judge) as again:
            again.restore(torch.load(file, weights_only=True))
            assert again.step == n
            assert [one.loss for one in again] == losses[n:]
            assert digest(again.adapter()) == digest(expected)

    def test_a_checkpoint_of_another_round_is_refused(self, base: MaskedBase, judge: Judge) -> None:
        with self.iterative(base, judge) as one:
            state = one.state()
        settings = AdapterSettings(rank=2, steps=3, lr=0.05)
        wanted = replace(self.WANTED, keep=1)
        with (
            IterativeTraining(base, [picture(0)], ["a cat in szn style"], settings, wanted, judge) as other,
            pytest.raises(ValueError, match="start afresh"),
        ):
            other.restore(state)

    def test_bad_input(self, base: MaskedBase, judge: Judge) -> None:
        with pytest.raises(ValueError, match="3 pictures to keep of 2"):
            FeedbackSettings(("a cat",), keep=3, per_prompt=2)
        with pytest.raises(ValueError, match=r"style_share is 1\.5"):
            FeedbackSettings(("a cat",), keep=1, style_share=1.5)
        with pytest.raises(ValueError, match="no text side"):
            feedback(base, random_adapter(base, 2), [picture(0)], Judge("dino", "", judge.images, None), self.WANTED)


class TestFiles:
    def test_a_directory_loads_as_it_was(self, base: MaskedBase, tmp_path: Path) -> None:
        tiny_amused().save_pretrained(tmp_path)
        loaded = load_masked(tmp_path)
        assert (loaded.side, loaded.grid) == (SIDE, 8)
        assert (drawn(loaded, None, None, BASE_ALONE) == drawn(base, None, None, BASE_ALONE)).all()

    def test_another_kind_of_base_is_refused(self, tmp_path: Path) -> None:
        tiny_sdxl().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"incompatible base: .* is a StableDiffusionXLPipeline, StyleDrop needs"):
            load_masked(tmp_path)
        with pytest.raises(OSError, match="nowhere"):
            load_masked(tmp_path / "nowhere")

    def test_an_adapter_comes_back_from_its_file(self, base: MaskedBase, tmp_path: Path) -> None:
        adapter = random_adapter(base, 1)
        (tmp_path / "a.safetensors").write_bytes(write_adapter(adapter, {"prompt": PROMPT}))
        found, metadata = read_adapter(tmp_path / "a.safetensors")
        assert metadata["prompt"] == PROMPT
        assert found.layers.keys() == adapter.layers.keys()
        for path, layer in adapter.layers.items():
            torch.testing.assert_close(found.layers[path].up @ found.layers[path].down, layer.up @ layer.down)

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "broken").write_bytes(b"nothing of the kind")
        with pytest.raises(FormatError, match="cannot be read as an adapter"):
            read_adapter(tmp_path / "broken")
        with pytest.raises(FormatError, match="cannot be read as an adapter"):
            read_adapter(tmp_path / "missing")
