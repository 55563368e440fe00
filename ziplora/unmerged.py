"""Methods of the comparison that merge nothing on SDXL or SD 1.5 and so are no rows of METHODS: a manifest that names
one is told where it is. Importing this needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unmerged:
    """`command`: what does it here. `needs`: the base model, and of each concept."""

    name: str
    summary: str
    yields: str
    needs: str
    command: str
    paper: str

    @property
    def refusal(self) -> str:
        """Why a manifest cannot name it, and what to do."""
        return (
            f"incompatible base: {self.name} needs {self.needs}, not SDXL or SD 1.5, and yields {self.yields};"
            f" see `{self.command} --help`"
        )


UNMERGED = {
    method.name: method
    for method in (
        Unmerged(
            name="styledrop",
            summary="an adapter for the subject, one for the style; their logits are combined at each step of sampling",
            yields="images and a recipe, no merged LoRA",
            needs="a masked-token model (aMUSEd) and pictures of both",
            command="ziplora styledrop",
            paper="https://arxiv.org/abs/2306.00983",
        ),
    )
}
MASKED_PIPELINE = "AmusedPipeline"
