"""A catalog's entry: one finished job and the objects it left. As a value, and as JSON that is not trusted.

Whoever pulls a catalog reads what somebody else wrote, so nothing of an entry is used before `read_entry` has checked
it: names, keys, digests and sizes all have one narrow form.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from service.errors import Corrupted, StorageError
from service.storage import check_key
from ziplora.methods import METHODS

VERSION = 1
MAX_BYTES = 4 << 20  # of an entry's JSON
MAX_OBJECTS = 10_000
MAX_OBJECT_BYTES = 1 << 40

JOB_ID = re.compile(r"[0-9a-f]{64}")
ATTEMPT = re.compile(r"[0-9a-zA-Z_-]{1,64}")
SHA256 = JOB_ID
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?"
OBJECT_NAME = re.compile(rf"{PART}(?:/{PART})?")
CONTENT_TYPE = re.compile(r"[a-z0-9][a-z0-9.+/;= -]{0,99}", re.IGNORECASE)
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps for devices


@dataclass(frozen=True, slots=True)
class Object:
    """A file of an entry: its name there (`merged.safetensors`, `samples/000.png`) and its key in the store."""

    name: str
    key: str
    sha256: str
    size: int  # bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Entry:
    """`job` is the job's identity (see `jobs.identity`), `report` what was measured and assumed on the way."""

    job_id: str
    job: Mapping[str, Any]
    objects: Mapping[str, Object]
    report: Mapping[str, Any]
    attempt: str
    created: datetime  # aware, UTC
    version: int = VERSION

    @property
    def subject(self) -> str:
        return self.job["subject"]["id"]

    @property
    def style(self) -> str:
        return self.job["style"]["id"]

    @property
    def method(self) -> str:
        return self.job["method"]

    @property
    def merged_by(self) -> str:
        """The method that made its LoRA: `method`, or the one that `best` chose."""
        best = self.report.get("best")
        won = best.get("method") if isinstance(best, dict) else None
        return won if isinstance(won, str) else self.method

    @property
    def n_bytes(self) -> int:
        return sum(item.size for item in self.objects.values())

    def lora_sha256(self, role: str) -> str:
        """Of the subject's or the style's LoRA that was merged; '' where the method looked at none. Where the run
        trained it, the job knows only what it was trained on."""
        seen, concept = self.report.get(role), self.job[role]
        known = (seen.get("lora_sha256") if isinstance(seen, dict) else None) or concept.get("lora")
        return known if isinstance(known, str) else ""


RECIPE = "recipe.json"  # of a method that leaves no merged LoRA


def why_no_lora(entry: Entry) -> str:
    """Why the entry has no merged LoRA, and what it has."""
    if RECIPE in entry.objects:
        method = METHODS.get(entry.merged_by)
        return (
            f"{entry.method} {method.instead if method else 'did not merge'}, so there is no merged LoRA, only images"
            " and a recipe: see `ziplora show`, or pull what another method made of the pair"
        )
    return f"{entry.method} left no merged LoRA, only what `ziplora show` lists"


ALIGNMENTS = ("style_alignment", "subject_alignment", "text_alignment")


def alignments(entry: Entry) -> dict[str, float | None]:
    """By the names of ALIGNMENTS: mean cosines of the samples with what they should show; None: not scored."""
    scores = entry.report.get("scores")
    found = {name: scores.get(name) if isinstance(scores, dict) else None for name in ALIGNMENTS}
    return {name: value if isinstance(value, float) and math.isfinite(value) else None for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Failure:
    """A job that was given up: `kind` is the error's class, `inputs` where its files were looked for."""

    job_id: str
    job: Mapping[str, Any]
    kind: str
    reason: str
    traceback: str
    attempts: int
    inputs: Mapping[str, str]
    created: datetime  # aware, UTC


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that could not be used, and why."""

    key: str
    reason: str


def check_object_name(name: str) -> str:
    """The name, if it is safe as a file name on any system; ValueError otherwise."""
    if not OBJECT_NAME.fullmatch(name) or any(RESERVED.fullmatch(part) for part in name.split("/")):
        raise ValueError(f"the object name {name[:100]!r} is not of the form merged.png or samples/000.png")
    return name


def digest_of(entries: Iterable[Entry]) -> str:
    """sha256 over job ids and (name, sha256) of their objects: equal content, equal digest. See `digest_of_groups`."""
    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(entry.job_id[:2], []).append(digest_line(entry.job_id, entry.objects.values()))
    return digest_of_groups({group: digest_of_lines(lines) for group, lines in groups.items()})


def digest_line(job_id: str, objects: Iterable[Object]) -> str:
    return f"{job_id} {json.dumps(sorted((item.name, item.sha256) for item in objects))}"


def digest_of_lines(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def digest_of_groups(groups: Mapping[str, str]) -> str:
    """A tree: entries whose ids begin with the same two digits are hashed first, so that an index need not read all of
    100,000 again to know the whole."""
    return digest_of_lines([f"{group} {digest}" for group, digest in groups.items()])


def write_entry(entry: Entry) -> bytes:
    """Its JSON. Numbers that JSON lacks (NaN, infinities) become null. TypeError for what is no JSON value at all."""
    fields = {**_fields(entry), "objects": [asdict(item) for _, item in sorted(entry.objects.items())]}
    return _json(fields)


def read_entry(body: bytes, job_id: str) -> Entry:
    """The entry of this job. Corrupted, with the reason, for anything that is not exactly an entry."""
    try:
        fields = _object(body)
        objects = [_read_object(item, job_id) for item in _list(fields["objects"])]
        if len({item.name.casefold() for item in objects}) != len(objects):
            raise ValueError("two objects have the same name")
        return Entry(
            job_id=_same(fields["job_id"], job_id),
            job=_job(fields["job"]),
            objects={item.name: item for item in objects},
            report=_dict(fields["report"]),
            attempt=_matching(ATTEMPT, fields["attempt"], "attempt"),
            created=_time(fields["created"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError, StorageError) as error:
        raise Corrupted(f"the entry of job {job_id[:12]} cannot be used: {_reason(error)}") from error


def write_failure(failure: Failure) -> bytes:
    return _json({**_fields(failure), "version": VERSION})


def read_failure(body: bytes, job_id: str) -> Failure:
    """Corrupted for anything that is not exactly a failure record."""
    try:
        fields = _object(body)
        return Failure(
            job_id=_same(fields["job_id"], job_id),
            job=_job(fields["job"]),
            kind=_text(fields["kind"]),
            reason=_text(fields["reason"]),
            traceback=_text(fields["traceback"]),
            attempts=_whole(fields["attempts"], 1 << 30),
            inputs={_text(name): _text(location) for name, location in _dict(fields["inputs"]).items()},
            created=_time(fields["created"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Corrupted(f"the failure record of job {job_id[:12]} cannot be used: {_reason(error)}") from error


def _fields(record: Entry | Failure) -> dict[str, Any]:
    names = record.__dataclass_fields__
    return {name: getattr(record, name) for name in names} | {"created": record.created.isoformat()}


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(_finite(fields), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value


def _object(body: bytes) -> dict[str, Any]:
    if len(body) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
    fields = _dict(json.loads(body))
    if fields["version"] != VERSION:
        raise ValueError(f"it has version {fields['version']!r}, this program reads {VERSION}; is the program too old?")
    return fields


def _read_object(item: Any, job_id: str) -> Object:
    fields = _dict(item)
    name, key = check_object_name(_text(fields["name"])), check_key(_text(fields["key"]))
    if not key.startswith(f"pairs/{job_id}/"):
        raise ValueError(f"its object {name} lies outside pairs/{job_id[:12]}…/")
    return Object(
        name=name,
        key=key,
        sha256=_matching(SHA256, fields["sha256"], "sha256"),
        size=_whole(fields["size"], MAX_OBJECT_BYTES),
        content_type=_matching(CONTENT_TYPE, fields["content_type"], "content type"),
    )


def _job(value: Any) -> dict[str, Any]:
    job = _dict(value)
    for text in (_dict(job["subject"])["id"], _dict(job["style"])["id"], job["method"]):
        _text(text)
    return job


def _same(value: Any, job_id: str) -> str:
    if value != job_id or not JOB_ID.fullmatch(job_id):
        raise ValueError("it is stored under another job's name")
    return job_id


def _time(value: Any) -> datetime:
    time = datetime.fromisoformat(_text(value))
    if time.tzinfo is None:
        raise ValueError("its time has no zone")
    return time


def _whole(value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"{str(value)[:40]} is not a whole number from 0 to {limit}")
    return value


def _matching(pattern: re.Pattern[str], value: Any, what: str) -> str:
    if not pattern.fullmatch(_text(value)):
        raise ValueError(f"{value[:100]!r} is no {what}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]} stands where a text belongs")
    return value


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]} stands where fields belong")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_OBJECTS:
        raise ValueError(f"{str(value)[:40]} stands where a list of at most {MAX_OBJECTS} objects belongs")
    return value


def _reason(error: Exception) -> str:
    return f"the field {error} is missing" if isinstance(error, KeyError) else str(error)[:300]
