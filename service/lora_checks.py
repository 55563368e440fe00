"""Each LoRA of a manifest with its reference images: there, sound, fit for the base. No values are loaded, no torch.

A file gives a range read of its header and, once per version of it, a pass for its sha256. Where there are only images,
what there is to check is the training that they are for.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from service.base_files import BaseFiles
from service.errors import BadInput, NotFound, StorageError
from service.images import MAX_BYTES, check_image
from service.inputs import DigestCache, open_input
from service.jobs import ImageRef, TrainJob
from service.manifest import Manifest
from service.manifest_specs import LoRASpec
from service.steps import Steps, parallel
from ziplora.errors import LoRAError
from ziplora.layouts import ModuleKeys, ParsedLoRA, check_shapes, component, is_target, parse, read_header
from ziplora.train_settings import TrainSettings, caption_of, check_trigger

MAX_CAPTION_BYTES = 1 << 16
Structure = tuple[tuple[str, ModuleKeys], ...]
OF = re.compile(
    r"(?:an?\s+|the\s+)?(?:photo|photograph|picture|image|painting|drawing|render(?:ing)?)\s+of\s+(?:an?\s+)?(.+)$"
)


@dataclass(frozen=True, slots=True)
class CheckedLoRA:
    """One LoRA of the manifest as found: its content if it can be used, and all its problems.

    `training`: how it comes to be, where it is no file; `sha256` is then that job's id, and '' of a concept whose LoRA
    no method looks at. `captions`: of each image, where anything is trained on them.
    """

    spec: LoRASpec
    sha256: str
    n_bytes: int
    layout: str
    modules: Mapping[str, ModuleKeys]  # by canonical path
    trigger: str | None  # of the file's header
    notes: tuple[str, ...]
    images: tuple[ImageRef, ...]
    problems: tuple[str, ...]
    captions: tuple[str, ...] = ()
    training: TrainJob | None = None

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest."""
        ranks = [keys.rank for keys in self.modules.values()]
        return (min(ranks), max(ranks)) if ranks else (0, 0)

    @property
    def carried(self) -> dict[str, int]:
        """Component → modules outside the merge targets, which pass through at weight 1."""
        return dict(Counter(component(path) for path in self.modules if not is_target(path)))


def check_loras(
    manifest: Manifest, specs: Sequence[LoRASpec], base: BaseFiles | None, digests: DigestCache, threads: int
) -> Steps[CheckedLoRA]:
    """Each LoRA with its images: exists, is sound, fits the base. Without a base, shapes are not looked at."""

    structures: dict[Structure, Mapping[str, ModuleKeys]] = {}

    def check(spec: LoRASpec) -> CheckedLoRA:
        checked = _check_lora(manifest, spec, base, digests)
        # thousands of LoRAs of one trainer have the same modules: one copy, or collecting garbage takes over
        return replace(checked, modules=structures.setdefault(tuple(checked.modules.items()), checked.modules))

    return Steps(len(specs), lambda: parallel(check, specs, threads))


def _check_lora(manifest: Manifest, spec: LoRASpec, base: BaseFiles | None, digests: DigestCache) -> CheckedLoRA:
    problems: list[str] = []
    sha256, n_bytes, parsed = "", 0, None
    try:
        if spec.lora:
            file = open_input(spec.lora, digests)
            n_bytes = file.size
            parsed = parse(read_header(file.read, file.size, spec.lora), spec.lora)
            if base:
                check_shapes(parsed, base.shapes, spec.lora)
            sha256 = file.sha256()
    except (LoRAError, StorageError) as error:
        problems.append(f"{manifest.where(*spec.field, 'lora')}: {_advised(error)}")
    images = []
    for i, location in enumerate(spec.images):
        try:
            images.append(_check_image(location, digests))
        except (BadInput, StorageError) as error:
            written_apart = (*spec.field, "images", i) in manifest.lines and len(spec.images) > 1
            field = ("images", i) if written_apart else ("images",)
            problems.append(f"{manifest.where(*spec.field, *field)}: {_advised(error)}")
    checked = CheckedLoRA(
        spec=spec,
        sha256=sha256,
        n_bytes=n_bytes,
        layout=parsed.layout if parsed else "",
        modules=parsed.modules if parsed else {},
        trigger=_header_trigger(parsed),
        notes=parsed.notes if parsed else (),
        images=tuple(images),
        problems=tuple(problems),
    )
    trained = not spec.lora and manifest.takes_loras
    if checked.problems or not checked.images or not (trained or manifest.takes_captions):
        return checked
    return _with_training(manifest, checked, base if trained else None)


def _with_training(manifest: Manifest, checked: CheckedLoRA, base: BaseFiles | None) -> CheckedLoRA:
    """With what its images are trained on as; with `base`, also the training that its LoRA is to come from."""
    spec, (trigger, _) = checked.spec, trigger_of(checked)
    problems = []
    captions: list[str] = []
    try:
        check_trigger(spec.prompt, trigger)
    except ValueError as error:
        problems.append(f"{manifest.where(*spec.field, 'trigger')}: {error}; correct one of them")
    for image in checked.images if not problems else ():
        try:
            captions.append(_caption(image.location, spec.prompt, trigger))
        except (ValueError, StorageError) as error:
            problems.append(f"{manifest.where(*spec.field, 'images')}: {error}")
    if base is None or problems:
        return replace(checked, captions=tuple(captions), problems=tuple(problems))
    size = spec.training["size"]
    if size is not None and size % base.size_step:
        field = (*spec.field, "training", "size")
        where = manifest.where(*(field if field in manifest.lines else ("training", "size")))
        problem = f"{where}: {size} pixels do not fit the base; expected a multiple of {base.size_step}"
        return replace(checked, captions=tuple(captions), problems=(problem,))
    settings = asdict(TrainSettings(spec.prompt, trigger, **spec.training))
    training = TrainJob(base.ref, spec.id, spec.role, checked.images, tuple(captions), settings)
    return replace(
        checked,
        sha256=training.job_id,
        layout="to be trained",
        modules=trained_modules(base.shapes, settings["rank"]),
        captions=tuple(captions),
        training=training,
    )


def trained_modules(shapes: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, ModuleKeys]:
    """What a LoRA that is trained here will hold; `shapes`: of the base's weights, by canonical path."""
    return {
        path: ModuleKeys(f"{path}.down", f"{path}.up", None, 1.0, rank, shape[1], shape[0], ())
        for path, shape in shapes.items()
        if is_target(path)
    }


def _caption(image: str, prompt: str, trigger: str) -> str:
    """That of the text file beside the picture, dog.txt beside dog.png, else the prompt; ValueError, StorageError."""
    location = f"{image.rpartition('.')[0]}.txt" if "." in image.rpartition("/")[2] else f"{image}.txt"
    try:
        file = open_input(location)
        content = file.read(0, min(file.size, MAX_CAPTION_BYTES))
    except NotFound:
        return prompt
    return caption_of(content, prompt, trigger, location)


def _advised(error: Exception) -> str:
    return f"{error}; relative paths begin at the manifest's directory" if isinstance(error, NotFound) else str(error)


def _check_image(location: str, digests: DigestCache) -> ImageRef:
    file = open_input(location, digests)
    if file.size > MAX_BYTES:
        raise BadInput(f"{location} has {file.size:,} bytes; at most {MAX_BYTES:,} are read")
    check_image(file.read(0, file.size), location)
    return ImageRef(location, file.sha256())


def _header_trigger(parsed: ParsedLoRA | None) -> str | None:
    return parsed.trigger if parsed else None


def derived_trigger(prompt: str, role: str) -> str:
    """The words of a training prompt that stand for the concept.

    Subject: 'a photo of sks dog' → 'sks dog'. Style: 'a cat in szn style' → 'szn style'. Else the whole prompt.
    """
    if role == "style" and (match := re.search(r"\b(?:in|by)\s+(?:the\s+)?(.+)$", prompt)):
        return match[1]
    match = OF.match(prompt)
    return match[1] if match else prompt


def trigger_of(lora: CheckedLoRA) -> tuple[str, str]:
    """The trigger words, and where they are from."""
    if lora.spec.trigger:
        return lora.spec.trigger, "given"
    if lora.trigger:
        return lora.trigger, "from the LoRA file's header"
    return derived_trigger(lora.spec.prompt, lora.spec.role), "from its prompt"
