"""One LoRA trained from pictures, as a command does it: everything checked first, a checkpoint beside the output from
which the same order goes on, previews on the way, and the file when it is done."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from service.base_files import BaseFiles, read_base
from service.errors import BadInput, OutOfMemory
from service.files import local_errors, make_directories, replacing
from service.images import check_image
from ziplora.errors import LoRAError
from ziplora.layouts import read_header_file
from ziplora.train_settings import JointSettings, TrainSettings, image_paths, read_captions

REQUEST_KEY = "ziplora.train.request"  # of the output's header: what was asked for, as JSON


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be trained, checked. `request`: all that decides the result, as JSON values, by name. `sets`: of joint
    training, which of its concepts each image shows."""

    images: tuple[Path, ...]
    captions: tuple[str, ...]  # of each image
    left_out: tuple[Path, ...]  # other files of the directory
    base: BaseFiles
    settings: TrainSettings
    out: Path
    request: dict[str, Any]
    sets: tuple[int, ...] | None = None

    @property
    def checkpoint(self) -> Path:
        return self.out.with_name(f"{self.out.name}.training")

    def preview(self, step: int, number: int) -> Path:
        return self.out.with_name(f"{self.out.stem}-previews") / f"step-{step:05}-{number}.png"


@dataclass(frozen=True, slots=True)
class Previews:
    """Samples with the LoRA as it is, every `every` steps and at the end; `steps` of denoising."""

    prompts: tuple[str, ...] = ()
    every: int = 100
    steps: int = 25


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` counts from 1. `written`: previews made after it."""

    step: int
    loss: float
    written: tuple[Path, ...]


# Before the model is loaded


def make_order(
    images: Path, base: str, settings: TrainSettings, out: Path, *, revision: str | None = None, download: bool = False
) -> Order:
    """Check everything that needs no model. BadInput or ManifestError in one line, StorageError if `out` is no place
    to write to."""
    return _order([(images, settings)], base, settings, out, revision, download)


def make_joint_order(
    subject: Path,
    style: Path,
    base: str,
    settings: JointSettings,
    out: Path,
    *,
    revision: str | None = None,
    download: bool = False,
) -> Order:
    """As `make_order`, for one LoRA of two concepts, from the pictures of either."""
    of_style = replace(settings, prompt=settings.style_prompt, trigger=settings.style_trigger)
    return _order([(subject, settings), (style, of_style)], base, settings, out, revision, download)


def _order(
    concepts: Sequence[tuple[Path, TrainSettings]],
    base: str,
    settings: TrainSettings,
    out: Path,
    revision: str | None,
    download: bool,
) -> Order:
    """`concepts`: where the pictures of each are, with its prompt and trigger."""
    if out.suffix != ".safetensors":
        raise BadInput(f"{out} does not end in .safetensors, which is what will be written; name it so")
    paths: list[Path] = []
    captions: list[str] = []
    sets: list[int] = []
    try:
        for number, (images, described) in enumerate(concepts):
            found = image_paths(images)
            paths += found
            captions += read_captions(found, described)
            sets += [number] * len(found)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    digests = [picture_digest(path) for path in paths]
    files = read_base(base, revision, download=download)
    if settings.size is not None and settings.size % files.size_step:
        raise BadInput(f"{settings.size} pixels do not fit the base; expected a multiple of {files.size_step}")
    used = {*paths, *(path.with_suffix(".txt") for path in paths)}
    beside = {path for images, _ in concepts if images.is_dir() for path in images.iterdir()} - used
    joint = {"sets": sets} if len(concepts) > 1 else {}
    request = {**asdict(settings), "images": digests, "captions": captions, "base": files.digest, **joint}
    with local_errors(out.parent):
        make_directories(out.parent)
    return Order(
        tuple(paths),
        tuple(captions),
        tuple(sorted(beside)),
        files,
        settings,
        out,
        json.loads(json.dumps(request)),
        tuple(sets) if joint else None,
    )


def is_done(order: Order) -> bool:
    """Whether the output is there, trained as ordered. BadInput when something else is in its place."""
    if not order.out.exists():
        return False
    try:
        found = _request(read_header_file(order.out).metadata.get(REQUEST_KEY))
    except LoRAError as error:
        raise BadInput(f"{order.out} is there and no LoRA file ({error}): name another, or remove it") from error
    if found is None:
        raise BadInput(f"{order.out} is there and was made otherwise: name another, or --overwrite it")
    if found != order.request:
        raise BadInput(
            f"{order.out} is there, but was trained with other {_differing(found, order.request)}: "
            "name another, or --overwrite it"
        )
    return True


def picture_digest(path: Path) -> str:
    """Its sha256. BadInput when it cannot be decoded to its last row."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"no such picture or directory: {path}") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    check_image(content, str(path))
    return hashlib.sha256(content).hexdigest()


def _request(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text or "")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _differing(found: dict[str, Any], ordered: dict[str, Any]) -> str:
    return ", ".join(name for name in ordered if found.get(name) != ordered[name]) or "settings"


# The training


class TrainingRun:
    """A loaded training; iterating does the steps that are left, with a checkpoint every `save_every`.

    Use as a context manager. BadInput when the base or the checkpoint does not load or the loss is no number,
    OutOfMemory with what to lower.
    """

    def __init__(
        self,
        order: Order,
        *,
        device: str = "auto",
        dtype: str = "auto",
        threads: int = 1,
        save_every: int = 100,
        previews: Previews | None = None,
    ) -> None:
        import torch

        from service.device import repeatable
        from ziplora.base import load_base
        from ziplora.train import Training, read_images

        self.order, self.save_every, self.previews = order, save_every, previews or Previews()
        torch.set_num_threads(threads)
        self.device = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda"):
            repeatable()
            if not torch.cuda.is_available():
                raise BadInput(f"device {self.device}: this machine has no GPU that torch can use: take --device cpu")
        state = self._checkpoint()
        number = {"auto": torch.bfloat16 if self.device.startswith("cuda") else torch.float32}.get(dtype)
        with memory_errors(order.settings):
            try:
                base = load_base(
                    order.base.directory,
                    device=self.device,
                    dtype=number or getattr(torch, dtype),
                    variant=order.base.variant,
                )
            except (OSError, ValueError) as error:
                raise BadInput(f"base {order.base.location} does not load: {str(error).splitlines()[0]}") from error
            pictures = [image for path in order.images for image in read_images(path)]
            self.training = Training(base, pictures, order.settings, captions=order.captions, sets=order.sets)
        if state is not None:
            self._restore(state)
        else:
            self.save()  # also shows, before hours of work, that there is a place to write to

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.training.close()

    @property
    def step(self) -> int:
        return self.training.step

    def __len__(self) -> int:
        """Steps that are left."""
        return self.order.settings.steps - self.step

    def __iter__(self) -> Iterator[Progress]:
        with memory_errors(self.order.settings):
            for step in self.training:
                if not math.isfinite(step.loss):
                    raise BadInput(
                        f"the loss is {step.loss} at step {step.step}: lower --lr (now {self.order.settings.lr:g}), "
                        "then train again with --overwrite"
                    )
                written = tuple(self._preview()) if self._is_due(self.previews.every) else ()
                if self._is_due(self.save_every):
                    self.save()
                yield Progress(step.step, step.loss, written)

    def save(self) -> None:
        """Checkpoint: the file is complete or the one before."""
        import torch

        with replacing(self.order.checkpoint) as file:
            torch.save({**self.training.state(), "request": json.dumps(self.order.request)}, file)

    def write(self) -> Path:
        """The LoRA as it is, in kohya layout; the checkpoint goes."""
        from ziplora import formats

        settings, out = self.order.settings, self.order.out
        assert self.order.base.architecture != "amused", "read_base was asked for no such family"
        content = formats.write_kohya(
            self.training.lora(),
            metadata={
                **self.training.metadata(),
                "ziplora.base": self.order.base.digest,
                REQUEST_KEY: json.dumps(self.order.request, sort_keys=True),
            },
            architecture=self.order.base.architecture,
            title=out.stem,
            trigger=", ".join(triggers_of(settings)),
        )
        with replacing(out) as file:
            file.write(content)
        self.order.checkpoint.unlink(missing_ok=True)
        return out

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.order.settings.steps

    def _preview(self) -> Iterator[Path]:
        side, seed = self.training.side, self.order.settings.seed
        for number, prompt in enumerate(self.previews.prompts):
            (image,) = self.training.previews([prompt], [seed], steps=self.previews.steps, width=side, height=side)
            path = self.order.preview(self.step, number)
            make_directories(path.parent)
            with replacing(path) as file:
                image.save(file, "PNG")
            yield path

    def _checkpoint(self) -> dict[str, Any] | None:
        """The state to go on from, if there is one."""
        import torch

        path = self.order.checkpoint
        for part in path.parent.glob(f".{path.name}.*.part"):  # of a training that was killed while it saved
            part.unlink(missing_ok=True)
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = _request(state["request"])
        except Exception as error:  # whatever a file that is none makes torch's reader raise
            raise BadInput(f"the checkpoint {path} cannot be read: remove it, or give --overwrite") from error
        if found != self.order.request:
            raise BadInput(
                f"the checkpoint {path} is of a training with other {_differing(found or {}, self.order.request)}: "
                "give the same again, name another output, or --overwrite it"
            )
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.training.restore(state)
        except ValueError as error:
            raise BadInput(
                f"the checkpoint {self.order.checkpoint} was written on another device or in another dtype: "
                "go on there, or start afresh with --overwrite"
            ) from error


def triggers_of(settings: TrainSettings) -> tuple[str, ...]:
    """The words that stand for what is learned: of joint training, the subject's and the style's."""
    return (settings.trigger, settings.style_trigger) if isinstance(settings, JointSettings) else (settings.trigger,)


@contextmanager
def memory_errors(settings: TrainSettings) -> Iterator[None]:
    """torch's and Python's ways to say that memory is short → OutOfMemory with what to lower."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(settings) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise _out_of_memory(settings) from error


def _out_of_memory(settings: TrainSettings) -> OutOfMemory:
    lower = [*(["--batch"] if settings.batch > 1 else []), "--size", "--rank"]
    spare = "" if settings.gradient_checkpointing else ", or give --gradient-checkpointing"
    size = f"size {settings.size}" if settings.size else "the base's own size"
    return OutOfMemory(
        f"out of memory at batch {settings.batch}, {size}, rank {settings.rank}: lower {' or '.join(lower)}{spare}"
    )
