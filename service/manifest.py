"""What a user writes: base, subjects, styles, pairs, merge, samples, output; read, checked and resolved.

`read_manifest` answers with a frozen Manifest or raises ManifestError with every problem of the file, one line each:
`demo.yaml:7: subjects.dog.promt: unknown field; did you mean prompt? …`. Whether the named files are there and fit the
base is `plan`'s question. The sections are read in manifest_loras.py, pairs.py, manifest_merges.py and
manifest_samples.py; how they go together is checked in manifest_demands.py.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ManifestError, NotFound
from service.manifest_checks import check_file
from service.manifest_defaults import defaulted
from service.manifest_demands import check_demands
from service.manifest_file import ManifestFile, ScorerSection, ScoresSection
from service.manifest_loras import read_loras
from service.manifest_merges import read_merges
from service.manifest_reading import Reading, line_of, manifest_error
from service.manifest_samples import read_prompts, sample_spec
from service.manifest_specs import LoRASpec, MergeSpec, SampleSpec, ScorerSpec
from service.method_facts import trains
from service.pairs import choose_pairs
from service.scorer_files import Kind
from service.storage import split_location
from service.wording import FieldPath, field_name, shown
from service.yaml_text import MAX_BYTES, Problem, Unreadable, read_yaml

KINDS: tuple[Kind, ...] = ("clip", "dino")


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
        return f"{self.name}:{line_of(self.lines, field)}: {field_name(field)}"


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
        raise manifest_error(name, error.problems) from error
    if not isinstance(document.value, dict):
        expected = f"expected a mapping of the fields {', '.join(ManifestFile.model_fields)}"
        raise manifest_error(name, [Problem(document.lines[()], "", f"{expected}, given {shown(document.value)}")])
    return _resolved(Reading(document, name, directory), raw)


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


def _resolved(reading: Reading, source: bytes) -> Manifest:
    """Section by section; a problem of one does not hide those of another."""
    file, faults = check_file(reading.raw)
    reading.add(faults)
    subjects, styles = tuple(read_loras(reading, "subjects")), tuple(read_loras(reading, "styles"))
    subject_ids, style_ids = list(reading.section("subjects")), list(reading.section("styles"))
    pairs, faults = choose_pairs(reading.raw.get("pairs", "all"), subject_ids, style_ids)
    reading.add(faults)
    merges = tuple(read_merges(reading))
    prompts = tuple(read_prompts(reading))
    check_demands(reading, file, merges, pairs)
    base, output = _model(reading, "base"), _output(reading)
    scores = reading.section("scores")
    scorers = {kind: _model(reading, "scores", kind) for kind in KINDS if scores.get(kind) is not None}
    if reading.problems or file is None:
        raise manifest_error(reading.name, reading.problems)
    return Manifest(
        name=reading.name,
        source=source,
        digest=hashlib.sha256(source).hexdigest(),
        base=base,
        revision=file.base.revision,
        subjects=subjects,
        styles=styles,
        pairs=tuple(pairs),
        merges=merges,
        samples=sample_spec(file.samples, prompts),
        scorers=tuple(_scorer_specs(file.scores, scorers)),
        outputs=tuple(sorted(set(file.outputs))),
        output=output,
        defaulted=tuple(defaulted(reading.raw, file, merges)),
        lines=reading.lines,
    )


def _model(reading: Reading, *field: str) -> str:
    text: Any = reading.raw
    for name in field:
        text = text.get(name)
    if isinstance(text, dict):
        field, text = (*field, "location"), text.get("location")
    return reading.model(field, text, stored=field[0] == "base")


def _output(reading: Reading) -> str:
    text = reading.raw.get("output")
    output = reading.location(("output",), f"{text.strip()}/" if isinstance(text, str) and text.strip() else None)
    if not output.startswith("s3://") and os.path.exists(output) and not os.path.isdir(output):
        reading.problem(("output",), f"{output} is a file; expected a directory or s3://bucket/prefix")
    return output.rstrip("/") or output


def _scorer_specs(section: ScoresSection, locations: Mapping[Kind, str]) -> Iterator[ScorerSpec]:
    for kind, location in locations.items():
        scorer: ScorerSection = getattr(section, kind)
        yield ScorerSpec(kind, location, scorer.revision)
