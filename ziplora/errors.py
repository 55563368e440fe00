"""What can be wrong with a LoRA.

LoRAError
├─ FormatError         the file cannot be read as a LoRA: truncated, not safetensors, unknown keys, NaN, too large
├─ ShapeMismatch       a module's shapes do not fit the base model, the other LoRA or its mergers
└─ UnsupportedAdapter  a sound file, but another kind of adapter (DoRA, LoHa, LoKr …) or made for another kind of model

Each message says what, which, what was expected and what to do next, in one sentence or two.
"""


class LoRAError(Exception):
    """A LoRA that cannot be used; the base of all errors that this package raises on purpose, beside ValueError."""


class FormatError(LoRAError):
    """The file or the values cannot be read, or written, as a LoRA."""


class ShapeMismatch(LoRAError):
    """Shapes that do not fit together."""


class UnsupportedAdapter(LoRAError):
    """An adapter that is no plain LoRA, or no LoRA for Stable Diffusion 1.5 or SDXL."""
