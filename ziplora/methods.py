"""METHODS: every way to merge a subject LoRA with a style LoRA, behind one signature. Importing this needs no
torch: manifests are checked with it.

A method is a function `(base, pairs, knobs) -> list[Merged]`; `pairs` may come many at a time because the methods
that run the model merge several side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ziplora import merge_flop
from ziplora.baseline_knobs import DareKnobs, DirectKnobs, NullSpaceKnobs, PruneKnobs, SvdKnobs, TiesKnobs
from ziplora.calibration_settings import CalibrationSettings, Passes
from ziplora.closed_form_knobs import ClosedKnobs, MatrixKnobs, RefinedKnobs
from ziplora.fusion_knobs import CustomDiffusionKnobs, GradientFusionKnobs, KLoRAKnobs
from ziplora.merge_flop import Flop
from ziplora.optimize_knobs import ComposedKnobs, ZipLoRAKnobs
from ziplora.styledrop_knobs import StyleDropKnobs
from ziplora.train_settings import JointKnobs

if TYPE_CHECKING:
    from ziplora.base import Base
    from ziplora.merged import Merged, Pair

ZIPLORA_PAPER = "https://arxiv.org/abs/2311.13600"
REGMEAN_PAPER = "https://arxiv.org/abs/2212.09849"


@dataclass(frozen=True, slots=True)
class Method:
    """A row of METHODS. `function` is imported when asked for, `knobs` says and checks what a manifest may set."""

    name: str
    summary: str
    paper: str
    yields: str
    mergers: bool  # whether it has one coefficient per column, which are kept beside the merged file
    cost: str
    knobs: type
    function: str
    flop: Flop | None = None  # operations of a pair beside model passes; None where they are but additions
    parts: bool = True  # whether the style has rows of its own in the file, so that its strength can be changed there
    file: bool = True  # whether the result is one LoRA; otherwise images and a recipe are all that there can be
    trains: bool = False  # whether it trains on both concepts' pictures, and looks at neither LoRA
    masked: bool = False  # whether that is an adapter for each concept, on a masked-token base of the method's own
    instead: str = ""  # of a method without a file: what it does with the two, in place of merging them

    def load(self) -> Callable[[Base, Sequence[Pair], Any], list[Merged]]:
        module, _, name = self.function.partition(":")
        loaded: Callable[[Base, Sequence[Pair], Any], list[Merged]] = getattr(import_module(module), name)
        return loaded

    def calibration(self, knobs: Any, seed: int) -> CalibrationSettings | None:
        """What the method must know of each LoRA beyond its weights; None if nothing."""
        return knobs.calibration(seed) if hasattr(knobs, "calibration") else None

    def passes(self, knobs: Any) -> Passes:
        return knobs.passes() if hasattr(knobs, "passes") else Passes()

    def captions(self, knobs: Any) -> int:
        """Prompts that go through the text encoders once for all pairs."""
        return knobs.n_captions() if hasattr(knobs, "n_captions") else 0

    def combined_prompt(self, knobs: Any, subject_trigger: str, style_trigger: str) -> str | None:
        """What `Pair.combined_prompt` must be for this method; None if it does not look at it."""
        if not hasattr(knobs, "combined_prompt"):
            return None
        return knobs.combined_prompt.format(subject=subject_trigger, style=style_trigger)

    @property
    def knob_names(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self.knobs))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="ziplora",
            summary="learns one coefficient per column of each LoRA so that the merge still does what each did alone",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, and the coefficients",
            mergers=True,
            cost="one merged forward and backward pass per step; teacher passes once per LoRA",
            knobs=ZipLoRAKnobs,
            function="ziplora.optimize:ziplora",
        ),
        Method(
            name="ziplora-closed",
            summary="ziplora's coefficients, solved layer by layer: each layer shall give what it gave in either LoRA",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, and the coefficients",
            mergers=True,
            cost="one linear system per layer; model passes only once per LoRA",
            knobs=ClosedKnobs,
            function="ziplora.closed_form:ziplora_closed",
            flop=merge_flop.columns,
        ),
        Method(
            name="ziplora-matrix",
            summary="the same with a matrix for each LoRA in place of coefficients: the regression mean of both",
            paper=REGMEAN_PAPER,
            yields="one LoRA",
            mergers=False,
            cost="one smaller linear system for layers that share an input; model passes only once per LoRA",
            knobs=MatrixKnobs,
            function="ziplora.closed_form:ziplora_matrix",
            flop=merge_flop.matrices,
        ),
        Method(
            name="ziplora-refined",
            summary="ziplora-closed, then a few steps of ziplora from there",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, and the coefficients",
            mergers=True,
            cost="as ziplora-closed, and a fifth of ziplora's steps with two draws at each",
            knobs=RefinedKnobs,
            function="ziplora.refine:ziplora_refined",
            flop=merge_flop.columns,
        ),
        Method(
            name="ziplora-composed",
            summary="ziplora with a term for the combined prompt: there it shall do what the direct merge does",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, and the coefficients",
            mergers=True,
            cost="half as much again as ziplora, and passes without gradient for the combined prompt",
            knobs=ComposedKnobs,
            function="ziplora.optimize:ziplora",
        ),
        Method(
            name="direct",
            summary="the sum of both updates (the paper's baseline)",
            paper=ZIPLORA_PAPER,
            yields="one LoRA",
            mergers=False,
            cost="none",
            knobs=DirectKnobs,
            function="ziplora.baselines:direct",
        ),
        Method(
            name="svd",
            summary="the sum of both updates, cut to a chosen rank",
            paper="https://doi.org/10.1007/BF02288367",
            yields="one LoRA, in which subject and style are not apart",
            mergers=False,
            cost="one small SVD per layer",
            knobs=SvdKnobs,
            function="ziplora.low_rank_merges:svd",
            flop=merge_flop.summed,
            parts=False,
        ),
        Method(
            name="prune",
            summary="the sum of the largest elements of both updates",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, an approximation whose error the entry states",
            mergers=False,
            cost="two truncated SVDs of a dense layer at a time",
            knobs=PruneKnobs,
            function="ziplora.sparse_merges:prune",
            flop=merge_flop.sparsified,
        ),
        Method(
            name="ties",
            summary="the largest elements of both updates, averaged where their signs agree with the stronger one's",
            paper="https://arxiv.org/abs/2306.01708",
            yields="one LoRA, an approximation whose error the entry states",
            mergers=False,
            cost="two truncated SVDs of a dense layer at a time",
            knobs=TiesKnobs,
            function="ziplora.sparse_merges:ties",
            flop=merge_flop.sparsified,
        ),
        Method(
            name="dare",
            summary="the sum of both updates with elements dropped by chance and the rest scaled up",
            paper="https://arxiv.org/abs/2311.03099",
            yields="one LoRA, an approximation whose error the entry states",
            mergers=False,
            cost="two truncated SVDs of a dense layer at a time",
            knobs=DareKnobs,
            function="ziplora.sparse_merges:dare",
            flop=merge_flop.sparsified,
        ),
        Method(
            name="np-lora",
            summary="the style, and the subject kept out of the directions that the style reads",
            paper="https://arxiv.org/abs/2511.11051",
            yields="one LoRA",
            mergers=False,
            cost="one small SVD per layer",
            knobs=NullSpaceKnobs,
            function="ziplora.low_rank_merges:np_lora",
            flop=merge_flop.projected,
        ),
        Method(
            name="custom-diffusion",
            summary="K and V of the cross-attentions give what each LoRA gave at its words, and change captions least",
            paper="https://arxiv.org/abs/2212.04488",
            yields="one LoRA",
            mergers=False,
            cost="one linear system for all layers; plain captions through the text encoders",
            knobs=CustomDiffusionKnobs,
            function="ziplora.custom_diffusion:custom_diffusion",
            flop=merge_flop.constrained,
        ),
        Method(
            name="mix-of-show",
            summary="each layer fitted by L-BFGS to what it gave in either LoRA's own run (gradient fusion)",
            paper="https://arxiv.org/abs/2305.18292",
            yields="one LoRA",
            mergers=False,
            cost="an L-BFGS run for each layer; model passes only once per LoRA",
            knobs=GradientFusionKnobs,
            function="ziplora.gradient_fusion:mix_of_show",
            flop=merge_flop.fused,
        ),
        Method(
            name="k-lora",
            summary="at each step of sampling each layer takes one of the LoRAs: the subject's first, then the style's",
            paper="https://arxiv.org/abs/2502.18461",
            yields="images and a recipe, no merged file",
            mergers=False,
            cost="one dense ΔW of each LoRA at a time",
            knobs=KLoRAKnobs,
            function="ziplora.k_lora:k_lora",
            flop=merge_flop.chosen,
            file=False,
            instead="chooses between the two LoRAs at every step of sampling",
        ),
        Method(
            name="joint",
            summary="no merge: one LoRA trained on the subject's and the style's pictures together, in equal parts",
            paper=ZIPLORA_PAPER,
            yields="one LoRA, in which subject and style are not apart",
            mergers=False,
            cost="a whole training for every pair: a forward and backward pass per step and picture",
            knobs=JointKnobs,
            function="ziplora.joint:joint",
            parts=False,
            trains=True,
        ),
        Method(
            name="styledrop",
            summary="no merge: an adapter for the subject, one for the style, their logits combined as they sample;"
            " on a masked-token base of its own (StyleDrop + DreamBooth)",
            paper="https://arxiv.org/abs/2306.00983",
            yields="images and a recipe, no merged file",
            mergers=False,
            cost="a training for every subject and every style, whatever their partners",
            knobs=StyleDropKnobs,
            function="ziplora.styledrop:styledrop",
            file=False,
            trains=True,
            masked=True,
            instead="combines the logits of two adapters at every step of sampling",
        ),
    )
}
