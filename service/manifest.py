"""What a user writes: base, subjects, styles, pairs, merge, samples, output; read, checked and resolved.

`read_manifest` answers with a frozen Manifest or raises ManifestError with every problem of the file, one line each:
`demo.yaml:7: subjects.dog.promt: unknown field; did you mean prompt? …`. Whether the named files are there and fit the
base is `plan`'s question. Ids become keys of the catalog and file names on any system, so they hold no separator.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.base_files import is_hub_id
from service.best import trains
from service.choose import BEST
from service.errors import ManifestError, NotFound, StorageError
from service.jobs import Role, SamplePrompt, template_problem
from service.locations import is_pattern, matches, resolve_location
from service.manifest_checks import (
    check_best,
    check_file,
    check_knobs,
    check_lora,
    check_seeds,
    check_text,
    check_training,
)
from service.manifest_file import DEFAULT_METHOD, ManifestFile, SamplesSection, ScorerSection, ScoresSection
from service.pairs import choose_pairs
from service.scorer_files import Kind
from service.storage import split_location
from service.wording import Fault, FieldPath, field_name, plain, shown, some, unknown
from service.yaml_text import MAX_BYTES, Document, Problem, Unreadable, read_yaml
from ziplora.methods import METHODS
from ziplora.unmerged import UNMERGED

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ID_RULE = "1 to 64 of A-Z a-z 0-9 . _ - beginning with a letter or digit"
WINDOWS_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
DEFAULT_PROMPT = "{subject} in {style}"
KINDS: tuple[Kind, ...] = ("clip", "dino")


@dataclass(frozen=True, slots=True)
class LoRASpec:
    """A subject or style with resolved locations: absolute paths or s3 URLs, patterns expanded.

    `lora` is '' where there are only images. `training`: how a LoRA is then trained on them, fields of TrainSettings
    but the prompt and the trigger, as JSON values.
    """

    id: str
    role: Role
    lora: str
    prompt: str
    trigger: str | None
    images: tuple[str, ...]
    weight: float
    training: Mapping[str, Any]
    priority: int = 0

    @property
    def field(self) -> FieldPath:
        return (f"{self.role}s", self.id)


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """A method with all its knobs, as JSON values, and its seeds; `given`: the knobs that the file sets."""

    method: str
    knobs: Mapping[str, Any]
    seeds: tuple[int, ...]
    given: frozenset[str]
    candidates: tuple["MergeSpec", ...] = ()  # of `best`, in the order in which they are tried; its knobs hold them too


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Sample settings as far as the file gives them: None is left to the base. No image when an axis is empty."""

    prompts: tuple[SamplePrompt, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float | None
    size: tuple[int, int] | None  # width, height
    scheduler: str | None
    negative: str
    style_strengths: tuple[float, ...]

    @property
    def n_images(self) -> int:
        return len(self.prompts) * len(self.seeds) * len(self.style_strengths)


@dataclass(frozen=True, slots=True)
class ScorerSpec:
    """A model that judges samples: absolute directory or hub id."""

    kind: Kind
    location: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest without a problem in itself. `defaulted`: one line for each thing not given, with what is taken."""

    name: str  # as messages name it
    source: bytes  # the file as it was read
    digest: str  # its sha256
    base: str  # absolute directory or hub id
    revision: str | None
    subjects: tuple[LoRASpec, ...]
    styles: tuple[LoRASpec, ...]
    pairs: tuple[tuple[str, str], ...]  # (subject id, style id), in the order of the grid
    merges: tuple[MergeSpec, ...]
    samples: SampleSpec
    scorers: tuple[ScorerSpec, ...]
    outputs: tuple[str, ...]
    output: str  # absolute directory or s3 URL
    defaulted: tuple[str, ...]
    lines: Mapping[FieldPath, int]

    @property
    def takes_loras(self) -> bool:
        """Whether any method looks at the LoRAs; one that trains on both concepts' images does not."""
        return not all(trains(merge.method) for merge in self.merges)

    @property
    def takes_captions(self) -> bool:
        return any(trains(merge.method) for merge in self.merges)

    def where(self, *field: str | int) -> str:
        """`demo.yaml:7: subjects.dog.lora`, for messages about what a field names."""
        return f"{self.name}:{_line(self.lines, field)}: {field_name(field)}"


def read_manifest(location: str | Path) -> Manifest:
    """The manifest at a path or s3 URL. Raises ManifestError with all of its problems; StorageError if S3 fails."""
    name = str(location)
    if name.startswith("s3://"):
        return parse_manifest(_read_object(name), name=name, directory=name.rpartition("/")[0])
    path = Path(name).expanduser()
    return parse_manifest(_read_file(path, name), name=name, directory=os.path.abspath(path.parent))


def parse_manifest(raw: bytes, *, name: str, directory: str) -> Manifest:
    """The manifest in `raw`; `directory` (absolute path or s3 URL) is what its relative locations are relative to."""
    try:
        document = read_yaml(raw)
    except Unreadable as error:
        raise _manifest_error(name, error.problems) from error
    if not isinstance(document.value, dict):
        expected = f"expected a mapping of the fields {', '.join(ManifestFile.model_fields)}"
        raise _manifest_error(name, [Problem(document.lines[()], "", f"{expected}, given {shown(document.value)}")])
    return _Reading(document, name, directory).manifest(raw)


def _read_file(path: Path, name: str) -> bytes:
    expected = "expected a manifest, a YAML file"
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ManifestError(f"{name}: does not exist; {expected}") from None
    except IsADirectoryError:
        raise ManifestError(f"{name}: is a directory; {expected}") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{name}: cannot be read ({error}); {expected}") from error


def _read_object(url: str) -> bytes:
    store, key = split_location(url)
    try:
        return store.get_range(key, 0, MAX_BYTES + 1)
    except NotFound as error:
        raise ManifestError(f"{url}: does not exist ({error}); expected a manifest, a YAML file") from error


def _manifest_error(name: str, problems: Iterable[Problem]) -> ManifestError:
    """All problems in the order of the file, one line each."""
    ordered = sorted(set(problems), key=lambda problem: (problem.line or 0, problem.field, problem.text))
    places = (name if problem.line is None else f"{name}:{problem.line}" for problem in ordered)
    fields = (f"{problem.field}: " if problem.field else "" for problem in ordered)
    lines = (f"{place}: {field}{problem.text}" for place, field, problem in zip(places, fields, ordered, strict=True))
    return ManifestError("\n".join(lines))


def _line(lines: Mapping[FieldPath, int], field: FieldPath) -> int:
    """The line of the field, or of the nearest one around it."""
    while field not in lines:
        field = field[:-1]
    return lines[field]


class _Reading:
    """One pass over the file that collects problems instead of stopping at the first."""

    def __init__(self, document: Document, name: str, directory: str) -> None:
        # `x-…` fields at the top hold anchors for reuse
        self.raw: dict[str, Any] = {key: value for key, value in document.value.items() if not key.startswith("x-")}
        self.lines = document.lines
        self.name = name
        self.directory = directory
        self.problems: list[Problem] = []

    def manifest(self, source: bytes) -> Manifest:
        file, faults = check_file(self.raw)
        self._add(faults)
        subjects, styles = tuple(self._loras("subjects")), tuple(self._loras("styles"))
        pairs, faults = choose_pairs(self.raw.get("pairs", "all"), self._ids("subjects"), self._ids("styles"))
        self._add(faults)
        merges = tuple(self._merges())
        prompts = tuple(self._prompts())
        self._check_strengths(file, merges)
        self._check_outputs(file, merges)
        self._check_images(merges, pairs)
        base, output = self._model("base"), self._output()
        scorers = {kind: self._model("scores", kind) for kind in KINDS if self._section("scores").get(kind) is not None}
        if self.problems or file is None:
            raise _manifest_error(self.name, self.problems)
        return Manifest(
            name=self.name,
            source=source,
            digest=hashlib.sha256(source).hexdigest(),
            base=base,
            revision=file.base.revision,
            subjects=subjects,
            styles=styles,
            pairs=tuple(pairs),
            merges=merges,
            samples=_sample_spec(file.samples, prompts),
            scorers=tuple(_scorer_specs(file.scores, scorers)),
            outputs=tuple(sorted(set(file.outputs))),
            output=output,
            defaulted=tuple(self._defaulted(file, merges)),
            lines=self.lines,
        )

    def _add(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self.problems.append(Problem(_line(self.lines, fault.field), field_name(fault.field), fault.text))

    def _problem(self, field: FieldPath, text: str) -> None:
        self._add([Fault(field, text)])

    def _section(self, name: str) -> dict[str, Any]:
        section = self.raw.get(name)
        return section if isinstance(section, dict) else {}

    # Subjects and styles

    def _ids(self, role: str) -> list[str]:
        return list(self._section(role))

    def _loras(self, role: str) -> Iterator[LoRASpec]:
        seen: dict[str, str] = {}
        for id, entry in self._section(role).items():
            self._check_id(role, id, seen)
            if not isinstance(entry, dict):
                continue
            lora = self._location((role, id, "lora"), entry.get("lora"))
            images = tuple(self._images((role, id, "images"), entry.get("images", [])))
            if not entry.get("lora") and not entry.get("images"):
                self._problem(
                    (role, id, "lora"),
                    "missing; expected the LoRA file: a path or s3://bucket/key, or else images, to train one on",
                )
            if entry.get("lora") and "training" in entry:
                self._problem((role, id, "training"), "given beside lora, which is trained already; keep one of them")
            checked = check_lora(entry)
            if checked:
                kind: Role = "subject" if role == "subjects" else "style"
                training = self._training() | checked.training.model_dump(exclude_unset=True)
                texts = checked.prompt, checked.trigger
                yield LoRASpec(id, kind, lora, *texts, images, checked.weight, training, checked.priority)

    def _training(self) -> dict[str, Any]:
        """The manifest's own settings, the paper's where it has none."""
        section = check_training(self.raw.get("training", {}))
        return section.model_dump() if section is not None else {}

    def _check_id(self, role: str, id: str, seen: dict[str, str]) -> None:
        twin = seen.setdefault(id.lower(), id)
        if not ID.fullmatch(id):
            self._problem((role, id), f"the id {shown(id)} cannot be used; expected {ID_RULE}")
        elif id.lower().split(".")[0] in WINDOWS_NAMES or id.endswith("."):
            self._problem((role, id), f"the id {shown(id)} cannot be a file name on Windows; rename it")
        elif twin != id:
            line = self.lines[role, twin]
            self._problem((role, id), f"the id differs from {twin} on line {line} by case alone; rename one of them")

    def _location(self, field: FieldPath, text: Any) -> str:
        """The resolved location, '' when it is none (then it has been reported)."""
        if not isinstance(text, str) or not text.strip():
            return ""
        try:
            return resolve_location(text.strip(), self.directory)
        except ValueError as error:
            self._problem(field, str(error))
            return ""

    def _images(self, field: FieldPath, images: Any) -> Iterator[str]:
        """Single images as written, patterns in sorted order; each image once."""
        seen: dict[str, FieldPath] = {}
        several = isinstance(images, list)
        for i, text in enumerate(images if several else [images]):
            own = (*field, i) if several else field
            for location in self._expanded(own, self._location(own, text)):
                if location in seen:
                    self._problem(own, f"{location} is already in {field_name(seen[location])}; name each image once")
                seen.setdefault(location, own)
                yield location

    def _expanded(self, field: FieldPath, location: str) -> list[str]:
        if not is_pattern(location):
            return [location] if location else []
        try:
            found = matches(location)
        except StorageError as error:
            self._problem(field, f"{location} could not be listed: {error}")
            return []
        if not found:
            self._problem(field, f"{location} matches no file; expected an image, or leave images out")
        return found

    # Models and output

    def _model(self, *field: str) -> str:
        """The directory if there is one, else the hub id if it looks like one; whether it is there is seen later."""
        text: Any = self.raw
        for name in field:
            text = text.get(name)
        if isinstance(text, dict):
            field, text = (*field, "location"), text.get("location")
        if isinstance(text, str) and text.strip().startswith("s3://") and field[0] != "base":
            self._problem(
                field, f"{text} lies in object storage; expected a local directory or a hub id: copy it first"
            )
            return ""
        if isinstance(text, str) and is_hub_id(text.strip()) and self.directory.startswith("s3://"):
            return text.strip()
        path = self._location(field, text)
        return str(text).strip() if is_hub_id(str(text).strip()) and not os.path.exists(path) else path.rstrip("/")

    def _output(self) -> str:
        text = self.raw.get("output")
        output = self._location(("output",), f"{text.strip()}/" if isinstance(text, str) and text.strip() else None)
        if not output.startswith("s3://") and os.path.exists(output) and not os.path.isdir(output):
            self._problem(("output",), f"{output} is a file; expected a directory or s3://bucket/prefix")
        return output.rstrip("/") or output

    # Merge

    def _merges(self) -> Iterator[MergeSpec]:
        written = self.raw.get("merge", DEFAULT_METHOD)
        several = isinstance(written, list)
        if written is None or written == []:
            self._problem(("merge",), f"empty; expected a method (known: {', '.join(METHODS)}), or leave merge out")
        seen: dict[tuple[str, str, int], FieldPath] = {}
        for i, entry in enumerate(written if several else [written] if written is not None else []):
            field: FieldPath = ("merge", i) if several else ("merge",)
            merge = self._merge(field, {"method": entry} if isinstance(entry, str) else entry)
            if merge is None:
                continue
            for seed in merge.seeds:
                first = seen.setdefault((merge.method, json.dumps(merge.knobs, sort_keys=True), seed), field)
                if first != field:
                    self._problem(field, f"the same as {field_name(first)} in method, knobs and seed {seed}; keep one")
            yield merge

    def _merge(self, field: FieldPath, entry: Any) -> MergeSpec | None:
        if not isinstance(entry, dict):
            self._problem(field, f"expected a method or a mapping of method and knobs, given {shown(entry)}")
            return None
        name = entry.get("method", DEFAULT_METHOD)
        seeds = self._merge_seeds(field, entry)
        if name == BEST:
            return self._best(field, entry, seeds)
        if not isinstance(name, str) or name not in METHODS:
            own = (*field, "method") if (*field, "method") in self.lines else field
            if isinstance(name, str) and name in UNMERGED:
                self._problem(own, UNMERGED[name].refusal)
            else:
                self._problem(own, unknown(f"unknown method {shown(name)}", [*METHODS, BEST], str(name)))
            return None
        given = {key: value for key, value in entry.items() if key not in ("method", "seed", "seeds")}
        knobs, faults = check_knobs(name, given, field)
        self._add(faults)
        return None if knobs is None or seeds is None else MergeSpec(name, knobs, tuple(seeds), frozenset(given))

    def _best(self, field: FieldPath, entry: Mapping[str, Any], seeds: list[int] | None) -> MergeSpec | None:
        given = {key: value for key, value in entry.items() if key not in ("method", "seed", "seeds")}
        section, faults = check_best(given, field)
        self._add(faults)
        tried = tuple(self._candidates((*field, "of"), section.of if section else []))
        if section is None or seeds is None or len(tried) < len(section.of):
            return None
        of = [{"method": spec.method, "knobs": dict(spec.knobs)} for spec in tried]
        knobs = {"of": of, "by": section.by, "good_enough": section.good_enough}
        return MergeSpec(BEST, knobs, tuple(seeds), frozenset(given), tried)

    def _candidates(self, field: FieldPath, listed: list[Any]) -> Iterator[MergeSpec]:
        seen: dict[str, FieldPath] = {}
        for i, entry in enumerate(listed):
            own: FieldPath = (*field, i)
            named = {"method": entry} if isinstance(entry, str) else entry
            if isinstance(named, dict) and (named.get("method") == BEST or {"seed", "seeds"} & named.keys()):
                self._problem(own, "expected a method other than best, and no seed: that of best is for all")
                continue
            spec = self._merge(own, named)
            if spec is None:
                continue
            if METHODS[spec.method].trains:
                self._problem(
                    own,
                    f"{spec.method} trains on each pair's pictures and cannot be one of best's; merge by it as well: of"
                    " all methods, `ziplora pull --method best` takes the highest scored merge",
                )
                continue
            first = seen.setdefault(json.dumps([spec.method, spec.knobs], sort_keys=True), own)
            if first == own:
                yield spec
            else:
                self._problem(own, f"the same as {field_name(first)} in method and knobs; keep one")

    def _merge_seeds(self, field: FieldPath, entry: Mapping[str, Any]) -> list[int] | None:
        if "seed" in entry and "seeds" in entry:
            self._problem((*field, "seeds"), "given beside seed, which means the same; keep one")
            return None
        name = "seeds" if "seeds" in entry else "seed"
        seeds, faults = check_seeds(entry.get(name, 0), (*field, name))
        self._add(faults)
        return seeds

    def _check_strengths(self, file: ManifestFile | None, merges: Iterable[MergeSpec]) -> None:
        """A style strength can be sampled only where the merged file keeps the style apart: other methods are sampled
        at 1.0 alone, which must then be asked for, and one method at least must have use for the others."""
        whole, apart = _by_parts(merges)
        strengths = [1.0] if file is None else file.samples.style_strengths
        if whole and set(strengths) != {1.0} and (not apart or 1.0 not in strengths):
            self._problem(
                ("samples", "style_strengths"),
                f"{whole[0]} leaves the style no rows of its own, so that only 1.0 can be sampled; "
                + ("add 1.0" if apart else "give the styles a weight instead"),
            )

    def _check_outputs(self, file: ManifestFile | None, merges: Iterable[MergeSpec]) -> None:
        """A second layout of the merged file, or nothing but it, can be had only where there is one."""
        every = (own for merge in merges for own in (merge.candidates or (merge,)))
        fileless = [merge.method for merge in every if not METHODS[merge.method].file]
        if not fileless or file is None:
            return
        if file.outputs:
            self._problem(
                ("outputs",),
                f"{fileless[0]} yields {METHODS[fileless[0]].yields}, so there is no {file.outputs[0]} of it; leave"
                f" outputs out, or merge by {fileless[0]} in a manifest of its own",
            )

    def _check_images(self, merges: Iterable[MergeSpec], pairs: Iterable[tuple[str, str]]) -> None:
        """A method that trains needs pictures of both concepts of each pair."""
        names = [merge.method for merge in merges if trains(merge.method)]
        used = {(role, id) for pair in pairs for role, id in zip(("subjects", "styles"), pair, strict=True)}
        for role, id in sorted(used) if names else ():
            entry = self._section(role).get(id)
            if isinstance(entry, dict) and not entry.get("images"):
                self._problem(
                    (role, id, "images"),
                    f"missing; {names[0]} trains on pictures of both subject and style: give some, or leave {id} out of"
                    f" the pairs, or merge by {names[0]} in a manifest of its own",
                )

    # Sample prompts

    def _prompts(self) -> Iterator[SamplePrompt]:
        if "samples" not in self.raw:
            yield SamplePrompt(_slug(DEFAULT_PROMPT), DEFAULT_PROMPT)
        samples = self._section("samples")
        if not samples:
            return
        field: FieldPath = ("samples", "prompts")
        match samples.get("prompts"):
            case dict() as named:
                for name, template in named.items():
                    if not ID.fullmatch(name):
                        self._problem((*field, name), f"the name {shown(name)} cannot be used; expected {ID_RULE}")
                    yield from self._prompt((*field, name), name, template)
            case list() as templates:
                yield from self._listed_prompts(field, templates)
            case str() as template:
                yield from self._prompt(field, _slug(template), template)
            case None if "prompts" not in samples and [] in (samples.get("seeds"), samples.get("style_strengths")):
                return  # no images asked for
            case None:
                self._problem(
                    field, f"missing; expected templates such as '{DEFAULT_PROMPT}', or `samples: {{}}` for no images"
                )
            case other:
                self._problem(
                    field, f"expected {SamplesSection.model_fields['prompts'].description}, given {shown(other)}"
                )

    def _listed_prompts(self, field: FieldPath, templates: list[Any]) -> Iterator[SamplePrompt]:
        first: dict[Any, int] = {}
        names: set[str] = set()
        for i, template in enumerate(templates):
            slug = _slug(template) if isinstance(template, str) else ""
            name = slug if slug not in names else f"{slug}-{i}"
            names.add(name)
            if isinstance(template, str) and first.setdefault(template, i) != i:
                self._problem(
                    (*field, i), f"the same as prompts[{first[template]}]; keep one (seeds make several images)"
                )
                continue
            yield from self._prompt((*field, i), name, template)

    def _prompt(self, field: FieldPath, name: str, template: Any) -> Iterator[SamplePrompt]:
        text, faults = check_text(template, field)
        self._add(faults)
        problem = template_problem(text) if text else None
        if problem:
            self._problem(field, problem)
        elif text:
            yield SamplePrompt(name, text)

    # What was not given

    def _defaulted(self, file: ManifestFile, merges: Iterable[MergeSpec]) -> Iterator[str]:
        if "merge" not in self.raw:
            yield f"merge: not given, so {DEFAULT_METHOD} with seed 0"
        for merge in (own for one in merges for own in (one, *one.candidates)):
            left = [f"{knob} {plain(value)}" for knob, value in merge.knobs.items() if knob not in merge.given]
            if left:
                yield f"merge: {merge.method} with {', '.join(left)}"
        if "samples" not in self.raw:
            yield f"samples: not given, so one image of '{DEFAULT_PROMPT}', seed 0, {file.samples.steps} steps"
        for name in ("seeds", "steps", "style_strengths") if self.raw.get("samples") else ():
            if name not in file.samples.model_fields_set:
                yield f"samples.{name}: {plain(getattr(file.samples, name))}"
        whole, _ = _by_parts(merges)
        if whole and any(strength != 1.0 for strength in file.samples.style_strengths):
            yield f"samples.style_strengths: 1.0 alone for {some(whole)}, whose style has no rows of its own"
        for role in ("subjects", "styles"):
            unweighted = [id for id, lora in getattr(file, role).items() if "weight" not in lora.model_fields_set]
            if unweighted:
                yield f"{role}: weight 1.0 for {len(unweighted)} of {len(getattr(file, role))}"
        looked_at = any(not trains(merge.method) for merge in merges)
        bare = [lora for lora in (*file.subjects.values(), *file.styles.values()) if not lora.lora]
        settings = file.training.model_dump()
        if bare and looked_at:
            left = [name for name in settings if name not in file.training.model_fields_set]
            yield f"training: {', '.join(f'{name} {plain(settings[name])}' for name in left)}"
        elif "training" in self.raw:
            yield "training: not looked at, as nothing is to be trained by it"


def _by_parts(merges: Iterable[MergeSpec]) -> tuple[list[str], list[str]]:
    """Methods whose merged file does not keep the style apart, and those whose does."""
    names = dict.fromkeys(one.method for merge in merges for one in (merge.candidates or (merge,)))
    return [name for name in names if not METHODS[name].parts], [name for name in names if METHODS[name].parts]


def _scorer_specs(section: ScoresSection, locations: Mapping[Kind, str]) -> Iterator[ScorerSpec]:
    for kind, location in locations.items():
        scorer: ScorerSection = getattr(section, kind)
        yield ScorerSpec(kind, location, scorer.revision)


def _sample_spec(section: SamplesSection, prompts: tuple[SamplePrompt, ...]) -> SampleSpec:
    return SampleSpec(
        prompts=prompts,
        seeds=tuple(section.seeds),
        steps=section.steps,
        guidance=section.guidance,
        size=(section.size[0], section.size[1]) if section.size else None,
        scheduler=section.scheduler,
        negative=section.negative,
        style_strengths=tuple(section.style_strengths),
    )


def _slug(template: str) -> str:
    """A name for a prompt that has none: 'a {subject}, sleeping' → a-subject-sleeping."""
    return re.sub(r"[^a-z0-9]+", "-", template.lower()).strip("-")[:48].strip("-") or "prompt"
