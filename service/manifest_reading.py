"""What the readers of a manifest's sections share: the values and lines of the file, and the problems found so far, so
that all are reported and not the first alone."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from service.errors import ManifestError
from service.locations import resolve_location
from service.model_files import is_hub_id
from service.wording import Fault, FieldPath, field_name
from service.yaml_text import Document, Problem

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ID_RULE = "1 to 64 of A-Z a-z 0-9 . _ - beginning with a letter or digit"


class Reading:
    """One pass over a manifest. `directory`: what its relative locations are relative to, a path or an s3 URL."""

    def __init__(self, document: Document, name: str, directory: str) -> None:
        # `x-…` fields at the top hold anchors for reuse
        self.raw: dict[str, Any] = {key: value for key, value in document.value.items() if not key.startswith("x-")}
        self.lines = document.lines
        self.name = name
        self.directory = directory
        self.problems: list[Problem] = []

    def add(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self.problems.append(Problem(line_of(self.lines, fault.field), field_name(fault.field), fault.text))

    def problem(self, field: FieldPath, text: str) -> None:
        self.add([Fault(field, text)])

    def section(self, name: str) -> dict[str, Any]:
        section = self.raw.get(name)
        return section if isinstance(section, dict) else {}

    def location(self, field: FieldPath, text: Any) -> str:
        """The resolved location, '' when it is none (then it has been reported)."""
        if not isinstance(text, str) or not text.strip():
            return ""
        try:
            return resolve_location(text.strip(), self.directory)
        except ValueError as error:
            self.problem(field, str(error))
            return ""

    def model(self, field: FieldPath, text: Any, *, stored: bool) -> str:
        """The directory if there is one, else the hub id if it looks like one; whether it is there is seen later.
        `stored`: whether it may lie in object storage."""
        if isinstance(text, str) and text.strip().startswith("s3://") and not stored:
            self.problem(field, f"{text} lies in object storage; expected a local directory or a hub id: copy it first")
            return ""
        if isinstance(text, str) and is_hub_id(text.strip()) and self.directory.startswith("s3://"):
            return text.strip()
        path = self.location(field, text)
        return str(text).strip() if is_hub_id(str(text).strip()) and not os.path.exists(path) else path.rstrip("/")


def manifest_error(name: str, problems: Iterable[Problem]) -> ManifestError:
    """All problems in the order of the file, one line each."""
    ordered = sorted(set(problems), key=lambda problem: (problem.line or 0, problem.field, problem.text))
    places = (name if problem.line is None else f"{name}:{problem.line}" for problem in ordered)
    fields = (f"{problem.field}: " if problem.field else "" for problem in ordered)
    lines = (f"{place}: {field}{problem.text}" for place, field, problem in zip(places, fields, ordered, strict=True))
    return ManifestError("\n".join(lines))


def line_of(lines: Mapping[FieldPath, int], field: FieldPath) -> int:
    """The line of the field, or of the nearest one around it."""
    while field not in lines:
        field = field[:-1]
    return lines[field]
