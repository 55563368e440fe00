"""StyleDrop (arXiv 2306.00983) with DreamBooth's subject beside it, on a masked-token model (masked.py).

- **Adapter tuning**: few weights beside a frozen transformer are trained with the masked-token loss on one
  picture whose prompt names content and style ("a mushroom in szn style"). Here they are a LoRA (2106.09685) on its
  attention and feed-forward layers, which starts as the identity; the paper has bottleneck adapters.
- **Iterative training with feedback**: the tuned model draws other contents in the style, a scorer picks the
  best, and a second adapter is trained on those. One picture says too little about what is style and what is content.
- **My object in my style**: a subject's adapter, trained in the same way on its own pictures as DreamBooth
  does (arXiv 2208.12242), and the style's are never merged: at each step of sampling their logits are combined.

So the result is pictures and a recipe (two adapters, weights, seeds), not one LoRA file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ziplora.lora import Layer, LoRA
from ziplora.masked import MaskedBase, TextCondition, masked_loss, sample_tokens
from ziplora.merged import Instances, Merged, Pair
from ziplora.score import Judge
from ziplora.styledrop_knobs import AdapterSettings, FeedbackSettings, Mixture, StyleDropKnobs
from ziplora.train import Step, finite_steps, own_seed

PAPER = "https://arxiv.org/abs/2306.00983"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")  # within a transformer block


@dataclass(frozen=True, slots=True)
class Feedback:
    """A picture of the tuned model's own, and how well it was scored."""

    image: Image.Image
    prompt: str
    score: float


def mixed(base: Tensor, nothing: Tensor, subject: Tensor, style: Tensor, weights: Mixture) -> Tensor:
    """ℓ_m + λ_A·(ℓ_m − ℓ) + λ_B·(ℓ − ℓ_∅) with ℓ_m = ℓ + w_c·(ℓ_c − ℓ) + w_s·(ℓ_s − ℓ).

    ℓ, ℓ_c and ℓ_s are the logits [n, codebook, h, w] of the base, of the subject's and of the style's adapter under the
    prompt, ℓ_∅ the base's under no prompt. With one adapter this is StyleDrop's guidance: λ_A is away from the base,
    towards what was tuned; λ_B away from no prompt, towards the text. With w_c = γ and w_s = 1 − γ, ℓ_m is
    γ·ℓ_c + (1 − γ)·ℓ_s, the combination of a subject's and a style's adapter. Logits being log-probabilities up to a
    constant, it is a weighted product of the two models' distributions.

    The form with λ_A and λ_B is the one in which github.com/aim-uofa/StyleDrop-PyTorch samples; the weights extend it
    to two adapters. The paper's own equation for two was not at hand to be compared.
    """
    m = (1 - weights.subject - weights.style) * base + weights.subject * subject + weights.style * style
    return m + weights.contrast * (m - base) + weights.text * (base - nothing)


class AdapterTraining:
    """An adapter being trained in `base`'s slots: an iterable of steps with a length. Use as a context manager; on
    leaving, the base is as it was.

        with AdapterTraining(base, images, captions, settings) as training:
            for step in training: ...
            adapter = training.adapter()
    """

    def __init__(
        self, base: MaskedBase, images: Sequence[Image.Image], captions: Sequence[str], settings: AdapterSettings
    ) -> None:
        """`captions`: one for each picture; what they have in common is what the adapter learns to answer to."""
        if not images:
            raise ValueError("no pictures to train on")
        if len(captions) != len(images):
            raise ValueError(f"{len(captions)} captions for {len(images)} pictures: give one for each")
        self.base, self.settings = base, settings
        seed = own_seed(settings.seed, images, captions)
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens, self.text = base.encode_images(images), base.encode_prompts(captions)
        self.step = 0
        base.slots.load([[identity(base, settings.rank, seed)]])
        self._slots = {path: slot for path, slot in base.slots.layers.items() if slot.active}
        # leaves of their own, fp32: small updates vanish in half precision
        self._weights = {
            path: (slot.down.float().clone().requires_grad_(), slot.up.float().clone().requires_grad_())
            for path, slot in self._slots.items()
            if slot.down is not None and slot.up is not None
        }
        self.optimizer = torch.optim.AdamW(self._parameters(), lr=settings.lr, weight_decay=1e-4)

    def __enter__(self) -> AdapterTraining:
        return self

    def __exit__(self, *_: object) -> None:
        self.base.slots.unload()

    def __len__(self) -> int:
        return self.settings.steps

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left."""
        while self.step < self.settings.steps:
            yield self._update()

    def adapter(self) -> LoRA:
        """What is learned so far, fp32 on the CPU."""
        return LoRA(
            {
                path: Layer(down.detach()[0, 0].float().cpu().clone(), up.detach()[0].float().cpu().clone())
                for path, (down, up) in self._weights.items()
            }
        )

    def state(self) -> dict[str, Any]:
        return {
            "identity": self.identity(),
            "step": self.step,
            "weights": {path: (down.detach(), up.detach()) for path, (down, up) in self._weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Carry on from `state`, bit for bit. ValueError when it belongs to other settings or pictures."""
        if state["identity"] != self.identity():
            raise ValueError("the saved state belongs to other settings, pictures or another base: start afresh")
        with torch.no_grad():
            for path, (down, up) in state["weights"].items():
                self._weights[path][0].copy_(down)
                self._weights[path][1].copy_(up)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def identity(self) -> str:
        """Digest of everything that decides the result but the transformer's weights."""
        sha = hashlib.sha256(repr(sorted(asdict(self.settings).items())).encode())
        for tensor in (self.tokens, self.text.hidden, self.text.pooled):
            sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def metadata(self) -> dict[str, str]:
        """How it was trained, for an adapter file's header."""
        settings = {f"ziplora.adapter.{key}": str(value) for key, value in asdict(self.settings).items()}
        return settings | {"ziplora.adapter.images": str(len(self.tokens)), "ziplora.adapter.step": str(self.step)}

    def _parameters(self) -> list[Tensor]:
        return [weight for pair in self._weights.values() for weight in pair]

    def _update(self) -> Step:
        for path, (down, up) in self._weights.items():
            slot = self._slots[path]
            slot.down, slot.up = down.to(slot.weight.dtype), up.to(slot.weight.dtype)
        rows = torch.randint(len(self.tokens), (self.settings.batch,), generator=self.generator)
        rows = rows.to(self.base.device)
        loss = masked_loss(self.base, self.tokens[rows], self.text.rows(rows), self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return Step(self.step, loss.item())


def styledrop(base: MaskedBase, pairs: Sequence[Pair], knobs: StyleDropKnobs) -> list[Merged]:
    """The subject's and the style's adapter of each pair, side by side: `Merged.mixture` says how their logits are
    combined in sampling (see `mixed`, `sample_mixture`).

    A pair gives both adapters as its LoRAs, or `pictures` that they are trained on here. Of one concept and seed the
    adapter is the same whatever its partner, so whoever has a grid trains each once. ValueError for a pair with
    neither, or with a second round, which needs a judge (`IterativeTraining`) and so adapters that are there;
    ArithmeticError when a loss is no number.
    """
    return [_side_by_side(base, pair, knobs) for pair in pairs]


def _side_by_side(base: MaskedBase, pair: Pair, knobs: StyleDropKnobs) -> Merged:
    subject, style = pair.subject, pair.style
    if not (subject.layers and style.layers):
        if pair.pictures is None:
            raise ValueError("StyleDrop learns from pictures of subject and style, and was given none, nor adapters")
        if knobs.feedback:
            raise ValueError("a second round with feedback needs a CLIP to pick with: give both adapters")
        settings = knobs.settings(pair.pictures.seed)
        subject, style = (_adapter(base, one, settings) for one in (pair.pictures.subject, pair.pictures.style))
    return Merged(subject, style, None, {}, mixture=knobs.mixture())


def _adapter(base: MaskedBase, instances: Instances, settings: AdapterSettings) -> LoRA:
    with AdapterTraining(base, instances.images, instances.captions, settings) as training:
        for _ in finite_steps(training):
            pass
        return training.adapter()


def identity(base: MaskedBase, rank: int, seed: int) -> LoRA:
    """An adapter that changes nothing yet: random down, up zero, on every layer in TARGETS."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, slot in base.slots.layers.items():
        if path.endswith(tuple(f".{name}" for name in TARGETS)):
            out_features, in_features = slot.weight.shape[:2]
            down = torch.randn(rank, in_features, generator=generator) / rank
            layers[path] = Layer(down, torch.zeros(out_features, rank))
    return LoRA(layers)


def sample_mixture(
    base: MaskedBase,
    subject: LoRA | None,
    style: LoRA | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    weights: Mixture,
    *,
    steps: int = 12,
    temperature: tuple[float, float] = (2.0, 0.0),
) -> Iterator[Image.Image]:
    """One picture per (prompt, seed), in order, from the logits of `mixed`; one forward pass a step, its rows side by
    side. An adapter that is None, or weighs 0, is left out: what remains is exactly as if it did not exist.

    `steps` and `temperature` are aMUSEd's defaults. Raises ShapeMismatch for an adapter of another base.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1")
    w_c, w_s = (0.0 if lora is None else w for lora, w in ((subject, weights.subject), (style, weights.style)))
    weights = Mixture(w_c, w_s, weights.contrast, weights.text)
    rows: dict[str, LoRA] = {"base": LoRA({})}
    if weights.text:
        rows["nothing"] = LoRA({})
    rows |= {name: lora for name, lora, w in (("subject", subject, w_c), ("style", style, w_s)) if lora and w}
    for prompt, seed in zip(prompts, seeds, strict=True):
        text = _text_rows(base, prompt, rows)

        def logits(tokens: Tensor, text: TextCondition = text) -> Tensor:
            found = base.logits(tokens.expand(len(rows), -1, -1), text).float().split(1)
            by_name = dict(zip(rows, found, strict=True))
            plain = by_name["base"]
            nothing, c, s = (by_name.get(name, plain) for name in ("nothing", "subject", "style"))
            return mixed(plain, nothing, c, s, weights)

        with base.slots.loaded([[lora] for lora in rows.values()]):
            tokens = sample_tokens(base, logits, seed, steps=steps, temperature=temperature)
        yield base.decode(tokens)[0]


def _text_rows(base: MaskedBase, prompt: str, rows: dict[str, LoRA]) -> TextCondition:
    encoded = base.encode_prompts(["", prompt])
    return encoded.rows(torch.tensor([0 if name == "nothing" else 1 for name in rows], device=base.device))


def feedback(
    base: MaskedBase,
    adapter: LoRA,
    style_images: Sequence[Image.Image],
    judge: Judge,
    wanted: FeedbackSettings,
    *,
    seed: int = 0,
) -> list[Feedback]:
    """The best of the tuned model's own pictures of `wanted.prompts`, the best first, for a second round of training.

    A picture's score is (1 − share)·CLIP-T + share·CLIP-I: its cosine with its own prompt and, a mean, with the style's
    pictures. ValueError for a judge without a text side.
    """
    if judge.texts is None:
        raise ValueError(f"{judge.source} has no text side: feedback needs a CLIP")
    prompts = [prompt for prompt in wanted.prompts for _ in range(wanted.per_prompt)]
    seeds = [seed + i for i in range(len(prompts))]
    images = list(sample_mixture(base, None, adapter, prompts, seeds, wanted.mixture(), steps=wanted.sample_steps))
    features = judge.images(images)
    text = F.cosine_similarity(features, judge.texts(prompts), dim=-1)
    style = (features @ F.normalize(judge.images(style_images), dim=-1).T).mean(1)
    scores = ((1 - wanted.style_share) * text + wanted.style_share * style).tolist()
    found = [Feedback(*one) for one in zip(images, prompts, scores, strict=True)]
    return sorted(found, key=lambda one: -one.score)[: wanted.keep]


def second_round(
    base: MaskedBase,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    chosen: Sequence[Feedback],
    settings: AdapterSettings,
) -> AdapterTraining:
    """Training of a new adapter on the user's pictures and the chosen ones."""
    return AdapterTraining(
        base,
        [*images, *(one.image for one in chosen)],
        [*captions, *(one.prompt for one in chosen)],
        settings,
    )


class IterativeTraining:
    """Both rounds of a style's adapter as one training, to be used as AdapterTraining is: `settings.steps` on the
    user's pictures, then, from the beginning, as many on those and on what `judge` picks of the first round's own."""

    def __init__(
        self,
        base: MaskedBase,
        images: Sequence[Image.Image],
        captions: Sequence[str],
        settings: AdapterSettings,
        wanted: FeedbackSettings,
        judge: Judge,
    ) -> None:
        self.base, self.settings, self.wanted, self.judge = base, settings, wanted, judge
        self.images, self.captions = list(images), list(captions)
        self.chosen: list[Feedback] | None = None  # None: the first round is not over
        self._round = AdapterTraining(base, images, captions, settings)
        self._identity = hashlib.sha256(f"{self._round.identity()} {wanted} {judge.digest}".encode()).hexdigest()

    def __enter__(self) -> IterativeTraining:
        return self

    def __exit__(self, *exception: object) -> None:
        self._round.__exit__(*exception)

    def __len__(self) -> int:
        return 2 * self.settings.steps

    @property
    def step(self) -> int:
        return self._before + self._round.step

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left."""
        while self.step < len(self):
            if self.chosen is None and self._round.step == len(self._round):
                seed = own_seed(self.settings.seed, self.images, self.captions)
                adapter = self.adapter()
                self._round.__exit__()
                self._begin_second(feedback(self.base, adapter, self.images, self.judge, self.wanted, seed=seed))
            for one in self._round:
                yield Step(self._before + one.step, one.loss)

    def adapter(self) -> LoRA:
        return self._round.adapter()

    def state(self) -> dict[str, Any]:
        chosen = None if self.chosen is None else [_feedback_state(one) for one in self.chosen]
        return {"identity": self._identity, "chosen": chosen, "round": self._round.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """As AdapterTraining.restore."""
        if state["identity"] != self._identity:
            raise ValueError("the saved state belongs to other settings, pictures or another base: start afresh")
        if state["chosen"] is not None:
            self._round.__exit__()
            self._begin_second([_feedback_of(one) for one in state["chosen"]])
        self._round.restore(state["round"])

    def metadata(self) -> dict[str, str]:
        chosen = [{"prompt": one.prompt, "score": round(one.score, 6)} for one in self.chosen or ()]
        return self._round.metadata() | {"ziplora.adapter.feedback": json.dumps(chosen, ensure_ascii=True)}

    @property
    def _before(self) -> int:
        return 0 if self.chosen is None else self.settings.steps

    def _begin_second(self, chosen: list[Feedback]) -> None:
        self._round = second_round(self.base, self.images, self.captions, chosen, self.settings)
        self.chosen = chosen


def _feedback_state(one: Feedback) -> dict[str, Any]:
    pixels = torch.frombuffer(bytearray(one.image.convert("RGB").tobytes()), dtype=torch.uint8)
    return {"pixels": pixels, "size": one.image.size, "prompt": one.prompt, "score": one.score}


def _feedback_of(state: dict[str, Any]) -> Feedback:
    image = Image.frombytes("RGB", state["size"], bytes(state["pixels"].tolist()))
    return Feedback(image, state["prompt"], state["score"])


def tuned(training: AdapterTraining | IterativeTraining, each: Callable[[Step], None] = lambda step: None) -> LoRA:
    """Train to the end; `each` sees every step."""
    with training:
        for step in training:
            each(step)
        return training.adapter()
