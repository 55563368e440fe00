"""What a base model directory holds, from JSON and safetensors headers alone: architecture, shapes, digest."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.base_copy import copied
from service.errors import ManifestError
from service.inputs import DigestCache
from service.jobs import Architecture, BaseRef
from service.model_files import (
    PICKLES,
    TOKENIZER_FILES,
    WEIGHT_LIMITS,
    digest_of,
    find_on_hub,
    is_hub_id,
    read_json,
    shards,
)
from ziplora.errors import LoRAError
from ziplora.layouts import Header, base_name, module_shapes, read_header_file


@dataclass(frozen=True, slots=True)
class Family:
    """Base models of one use. `architectures`: by class of the pipeline; `example`: a hub id; `denoiser` and `decoder`:
    the components that predict what a picture is decoded from, and that decode it."""

    name: str
    architectures: Mapping[str, Architecture]
    example: str
    denoiser: str
    decoder: str


DIFFUSION = Family(
    "SDXL or SD 1.5",
    {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"},
    "stabilityai/stable-diffusion-xl-base-1.0",
    "unet",
    "vae",
)
MASKED = Family("aMUSEd", {"AmusedPipeline": "amused"}, "amused/amused-256", "transformer", "vqvae")
COMPONENTS: dict[Architecture, tuple[str, ...]] = {
    "sdxl": ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"),
    "sd15": ("scheduler", "text_encoder", "tokenizer", "unet", "vae"),
    "amused": ("scheduler", "text_encoder", "tokenizer", "transformer", "vqvae"),
}
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vqvae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A base model as found on disk.

    shapes: canonical module path (`unet.…`, `text_encoder.text_model.…`) → weight shape of every linear [out, in] and
    convolution [out, in, kh, kw] of the denoiser and the text encoders. files: relative path → size in bytes of all
    that determines results, which is what `digest` covers.
    """

    location: str  # absolute directory, s3 URL, or hub id
    revision: str | None  # the commit, for a hub id
    directory: Path
    architecture: Architecture
    variant: str | None  # "fp16" when only such weights are there; what diffusers' `variant=` takes
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, int]
    default_size: int  # pixels: what the denoiser was trained at
    size_step: int  # pixels: widths and heights are multiples of it
    scheduler: str  # class name
    prediction_type: str
    digest: str

    @property
    def n_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def ref(self) -> BaseRef:
        return BaseRef(self.location, self.revision, self.digest, self.architecture)


def read_base(
    location: str,
    revision: str | None = None,
    *,
    digests: DigestCache | None = None,
    download: bool = False,
    family: Family = DIFFUSION,
) -> BaseFiles:
    """A diffusers directory, `s3://bucket/prefix` (copied to this node once), or a hub id in the local hub cache
    (`download` fetches what is missing).

    Raises ManifestError with everything that is wrong, one line each; StorageError for object storage.
    """
    directory, commit = _find(location, revision, download, family)
    architecture, variant, problems = _check_components(directory, location, family)
    if problems:
        raise ManifestError("\n".join(problems))
    denoiser = read_json(directory / family.denoiser / "config.json")
    decoder = read_json(directory / family.decoder / "config.json")
    scheduler = read_json(directory / "scheduler/scheduler_config.json")
    headers = {
        part: _headers(directory, part, variant) for part in COMPONENTS[architecture] if part in WEIGHTS
    }  # the decoder's too: a truncated file is found here, not on the GPU
    shapes = dict(_shapes(headers, family))
    if family is DIFFUSION:
        _check_unet(location, shapes)
    factor = 2 ** (len(_channels(decoder, family, location)) - 1)
    side = _whole(denoiser.get("sample_size"), f"{family.denoiser}/config.json sample_size", location)
    files = {
        file: (directory / file).stat().st_size for file in sorted(_result_files(directory, architecture, variant))
    }
    return BaseFiles(
        location=location,
        revision=commit,
        directory=directory,
        architecture=architecture,
        variant=variant,
        shapes=shapes,
        files=files,
        default_size=side * factor,
        size_step=factor,
        scheduler=str(scheduler.get("_class_name")),
        prediction_type=str(scheduler.get("prediction_type", "epsilon")),
        digest=digest_of(directory, files, digests or DigestCache()),
    )


# Where it is


def _find(location: str, revision: str | None, download: bool, family: Family) -> tuple[Path, str | None]:
    """The directory, and the commit if it is a hub snapshot."""
    if location.startswith("s3://"):
        if revision is not None:
            raise ManifestError(f"base {location}: a revision goes with a hub id only; remove it")
        return copied(location, needed_files), None
    path = Path(location)
    if path.is_dir():
        if revision is not None:
            raise ManifestError(f"base {location} is a directory: a revision goes with a hub id only; remove it")
        return path, None
    if path.is_file():
        converted = (
            ": convert a single-file checkpoint with "
            "StableDiffusionXLPipeline.from_single_file(...).save_pretrained(DIRECTORY)"
        )
        raise ManifestError(
            f"base {location} is a file; expected a diffusers directory{converted if family is DIFFUSION else ''}"
        )
    if not is_hub_id(location):
        raise ManifestError(
            f"base {location} does not exist; expected a diffusers directory, s3://bucket/prefix or a hub id such as "
            f"{family.example}"
        )
    return find_on_hub("base", location, revision, _download_patterns if download else None)


def _download_patterns(repo: str, revision: str | None) -> list[str]:
    """What a base needs of a hub repository: full-precision weights where they are complete, else the fp16 variant."""
    from huggingface_hub import HfApi

    return needed_files([file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or []])


def needed_files(files: Collection[str]) -> list[str]:
    """Patterns of what a base needs of these files."""
    parts = [part for part in WEIGHTS if any(file.startswith(f"{part}/") for file in files)]
    settings = ["model_index.json", *(f"{part}/*.json" for part in parts), "scheduler/*.json", "tokenizer*/*"]
    full = all(
        any(_is_weight(Path(file).name, None) for file in files if Path(file).parent == Path(part)) for part in parts
    )
    dotted = "" if full else ".fp16"
    weights = [f"{part}/{WEIGHTS[part]}{dotted}{tail}" for part in parts for tail in (".safetensors", "-*.safetensors")]
    return settings + weights


# What it holds


def _check_components(directory: Path, location: str, family: Family) -> tuple[Architecture, str | None, list[str]]:
    """Architecture, variant, and every component that is missing or unfit. ManifestError if it is no such pipeline."""
    index_file = directory / "model_index.json"
    if not index_file.is_file():
        raise ManifestError(
            f"base {location} has no model_index.json{_what_is_there(directory)}; "
            f"expected a diffusers directory of {family.name}"
        )
    found = read_json(index_file).get("_class_name")
    architecture = family.architectures.get(str(found))
    if architecture is None:
        raise ManifestError(_other_kind(location, str(found), family))
    variant = _variant(directory / family.denoiser)
    problems = []
    for part in COMPONENTS[architecture]:
        if not (directory / part).is_dir():
            problems.append(f"base {location} has no {part}/; a {found} needs {', '.join(COMPONENTS[architecture])}")
        elif part in WEIGHTS:
            problems += [f"base {location}: {problem}" for problem in _weight_problems(directory / part, variant)]
        elif part == "scheduler":
            if not (directory / "scheduler/scheduler_config.json").is_file():
                problems.append(f"base {location}: scheduler/scheduler_config.json is missing")
        elif not (directory / part / "tokenizer.json").is_file() and not (
            (directory / part / "vocab.json").is_file() and (directory / part / "merges.txt").is_file()
        ):
            problems.append(f"base {location}: {part}/ holds neither tokenizer.json nor vocab.json with merges.txt")
    return architecture, variant, problems


def _other_kind(location: str, found: str, family: Family) -> str:
    expected = f"base {location} is a {found}; expected {' or '.join(family.architectures)}"
    if family is MASKED:
        return f"incompatible base: {expected}, a masked-token model such as {family.example}"
    styledrop = "; as the base of styledrop it is named in merge: {method: styledrop, base: …}"
    return f"{expected}{styledrop if found in MASKED.architectures else ''}"


def _what_is_there(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    return f" (it holds {shown})" if names else " (it is empty)"


def _variant(denoiser: Path) -> str | None:
    """diffusers' rule: the variant is asked for when the UNet has nothing else."""
    names = [path.name for path in denoiser.glob("*.safetensors")]
    has_full = any(_is_weight(name, None) for name in names)
    return "fp16" if not has_full and any(_is_weight(name, "fp16") for name in names) else None


def _is_weight(name: str, variant: str | None) -> bool:
    dotted = rf"\.{variant}" if variant else ""
    return re.fullmatch(rf"(diffusion_pytorch_model|model){dotted}(-\d+-of-\d+)?\.safetensors", name) is not None


def _weight_problems(folder: Path, variant: str | None) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield f"{folder.name}/config.json is missing"
    if _weight_files(folder, variant):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        yield (
            f"{folder.name}/ has only {pickles[0]}, a format that can run code when it is loaded; "
            "expected safetensors: load it where you trust it and write it with pipeline.save_pretrained(DIRECTORY)"
        )
    else:
        yield f"{folder.name}/ has no weights; expected {WEIGHTS[folder.name]}.safetensors or its shards"


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that diffusers would load, the index of shards first; [] if there are none.

    A component without the variant is loaded from its plain file.
    """
    stem = WEIGHTS[folder.name]
    for wanted in (variant, None) if variant else (None,):
        index = folder / f"{stem}.safetensors.index{f'.{wanted}' if wanted else ''}.json"
        if index.is_file():
            return [index, *shards(index, f"base {folder.parent}: {folder.name}/{index.name}")]
        single = folder / f"{stem}{f'.{wanted}' if wanted else ''}.safetensors"
        if single.is_file():
            return [single]
    return []


def _headers(directory: Path, part: str, variant: str | None) -> list[Header]:
    """The safetensors headers of one component. ManifestError names a file that is truncated or no safetensors."""
    files = [path for path in _weight_files(directory / part, variant) if path.suffix == ".safetensors"]
    try:
        return [read_header_file(path, WEIGHT_LIMITS, name=f"base {path}") for path in files]
    except LoRAError as error:
        raise ManifestError(str(error)) from error


def _shapes(headers: Mapping[str, Iterable[Header]], family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical module path → weight shape, for linears and convolutions of the denoiser and the text encoders."""
    for part, files in headers.items():
        for header in files if part != family.decoder else ():
            for module, shape in module_shapes(header, part).items():
                if not module.endswith("_embedding"):  # tables of tokens and positions
                    yield module, shape


def _check_unet(location: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ManifestError for UNets that share the pipeline's class but not its use."""
    channels = shapes.get("unet.conv_in", (0, 0))[1]
    if channels != 4:
        kind = {9: "an inpainting UNet", 8: "an image-editing UNet"}.get(channels, "another kind of UNet")
        raise ManifestError(
            f"base {location}: unet.conv_in takes {channels} channels ({kind}); expected 4, text to image"
        )
    if base_name(shapes) == "SD 2":
        raise ManifestError(
            f"base {location} is Stable Diffusion 2 (prompt embeddings of width 1024); expected SD 1.5 or SDXL"
        )
    if not any(".attn1.to_q" in module for module in shapes):
        raise ManifestError(
            f"base {location}: the UNet has no attention layers under the usual names; expected attn1.to_q …"
        )


def _channels(decoder: Mapping[str, Any], family: Family, location: str) -> list[Any]:
    """Of the autoencoder's levels. ManifestError for one of another kind."""
    channels = decoder.get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        found = decoder.get("_class_name", "model of unknown kind")
        usual = "AutoencoderKL" if family is DIFFUSION else "VQModel"
        raise ManifestError(
            f"base {location}: its {family.decoder} is a {found}; expected {usual}, as {family.name} has"
        )
    return channels


def _whole(value: Any, what: str, location: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ManifestError(f"base {location}: {what} is {value!r}; expected a whole number of latent pixels")
    return value


# Its digest


def _result_files(directory: Path, architecture: Architecture, variant: str | None) -> Iterator[str]:
    """Relative posix paths of what is loaded: settings, tokenizers, chosen weights; no README, no other variant."""
    yield "model_index.json"
    for part in COMPONENTS[architecture]:
        if part == "scheduler":
            yield "scheduler/scheduler_config.json"
        elif part in WEIGHTS:
            yield f"{part}/config.json"
            yield from (f"{part}/{path.name}" for path in _weight_files(directory / part, variant))
        else:
            yield from (f"{part}/{name}" for name in TOKENIZER_FILES if (directory / part / name).is_file())
