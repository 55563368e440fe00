"""YAML as a person writes it: bytes → plain values, and the line of every field. Owns yaml.

Scalars are read as YAML 1.2 reads them: `no` and `on` are text, `1e-2` is a number, 1:30 is text; keys are always text.
Anchors, aliases and `<<` merges work; a key written twice, tags, cycles and several documents do not.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from service.wording import FieldPath, field_name

Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 24
MAX_NODES = 500_000  # after aliases are expanded

BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
NULLS = ("", "~", "null", "Null", "NULL")
WHOLE = re.compile(r"[-+]?[0-9]+")
BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq")
}
PLAIN_TAGS |= {"tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One line of a report: where (line counted from 1, field path) and what."""

    line: int | None
    field: str
    text: str


class Unreadable(ValueError):
    """What makes the text no single YAML document of ours; `problems` has all that were found."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(problem.text for problem in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Document:
    """The values, and for each field the line where it is written. `lines[()]` is the first line of all."""

    value: Any
    lines: Mapping[FieldPath, int]


def flow(value: Any) -> str:
    """A plain value as YAML writes it within a line: `{k: null, lr: 5.0e-05, names: [a, b]}`."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).strip()


def read_yaml(raw: bytes) -> Document:
    """The one document in `raw` (UTF-8). Raises Unreadable with every problem of form; content is not looked at."""
    text = _decode(raw)
    try:
        _check_events(text)
        root = yaml.compose(text, Loader=Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(
            Problem(line, "", f"holds the control character {chr(error.character)!r}; remove it")
        ) from error
    except yaml.MarkedYAMLError as error:
        raise Unreadable(_syntax_problem(error, text)) from error
    if root is None:
        raise Unreadable(Problem(None, "", "is empty"))
    reading = _Reading()
    value = reading.value(root, (), _line(root))
    if reading.problems:
        raise Unreadable(*reading.problems)
    return Document(value, reading.lines)


def _decode(raw: bytes) -> str:
    if len(raw) > MAX_BYTES:
        raise Unreadable(Problem(None, "", f"is {len(raw):,} bytes long; at most {MAX_BYTES:,} are read"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Unreadable(
            Problem(line, "", f"is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}); save it as UTF-8")
        ) from error


def _check_events(text: str) -> None:
    """Depth and number of documents, by the parser's flat events: composing deep nesting would recurse."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=Loader):
        line = event.start_mark.line + 1 if event.start_mark else None
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise Unreadable(Problem(line, "", "a second document starts here; expected one: remove the --- line"))
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise Unreadable(Problem(line, "", f"is nested deeper than {MAX_DEPTH} levels; is a bracket missing?"))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _syntax_problem(error: yaml.MarkedYAMLError, text: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return Problem(None, "", f"is no YAML: {error.problem}")
    lines = text.splitlines()
    written = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in written[: mark.column + 1] and not written[: mark.column].strip():
        return Problem(mark.line + 1, "", "a tab in the indentation; YAML takes spaces only: replace it")
    began = error.context_mark
    since = f" ({error.context}, begun on line {began.line + 1})" if error.context and began else ""
    return Problem(mark.line + 1, "", f"is no YAML: {error.problem}{since}; a missing quote, colon or bracket?")


class _Reading:
    """The walk over composed nodes: values, lines and problems."""

    def __init__(self) -> None:
        self.lines: dict[FieldPath, int] = {}
        self.problems: list[Problem] = []
        self._open: set[int] = set()  # nodes that we are inside of: meeting one again is a cycle
        self._n_nodes = 0

    def value(self, node: yaml.Node, field: FieldPath, line: int) -> Any:
        self.lines[field] = line
        self._n_nodes += 1
        if self._n_nodes > MAX_NODES:
            raise Unreadable(
                Problem(line, field_name(field), f"has more than {MAX_NODES:,} values once aliases are expanded")
            )
        if id(node) in self._open:
            self._problem(line, field, "refers to itself; an alias may not stand inside its own anchor")
            return None
        if node.tag not in PLAIN_TAGS:
            self._problem(
                line, field, f"has the tag {node.tag.replace('tag:yaml.org,2002:', '!!')}; tags are not read: remove it"
            )
            return None
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*field, i), _line(item)) for i, item in enumerate(node.value)]
            return self._mapping(node, field) if isinstance(node, yaml.MappingNode) else None
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, field: FieldPath) -> dict[str, Any]:
        own: dict[str, tuple[int, yaml.Node]] = {}
        merged: dict[str, tuple[int, yaml.Node]] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(line, field, "a key is a list or a mapping; expected text")
            elif key_node.tag.endswith(":merge"):
                for name, item in self._merged(value_node, field, line):
                    merged.setdefault(name, item)
            elif key_node.value in own:
                first = own[key_node.value][0]
                self._problem(line, (*field, key_node.value), f"written twice, first on line {first}; keep one")
            else:
                own[key_node.value] = (line, value_node)
        entries = {**merged, **own}  # what is written here wins over what is merged in
        return {name: self.value(item, (*field, name), line) for name, (line, item) in entries.items()}

    def _merged(self, node: yaml.Node, field: FieldPath, line: int) -> Iterator[tuple[str, tuple[int, yaml.Node]]]:
        """The keys that `<<: *anchor` or `<<: [*a, *b]` brings in."""
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode) or id(source) in self._open:
                self._problem(line, field, "'<<' takes an alias of a mapping, or a list of them")
                continue
            for key_node, value_node in source.value:
                if isinstance(key_node, yaml.ScalarNode) and key_node.tag.endswith(":merge"):
                    self._open.add(id(source))
                    yield from self._merged(value_node, field, line)
                    self._open.discard(id(source))
                elif isinstance(key_node, yaml.ScalarNode):
                    yield key_node.value, (_line(key_node), value_node)

    def _problem(self, line: int, field: FieldPath, text: str) -> None:
        self.problems.append(Problem(line, field_name(field), text))


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """By YAML 1.2's core schema; quoted and block scalars are text."""
    text = node.value
    if node.style in ("'", '"', "|", ">"):
        return str(text)
    if text in NULLS:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    if WHOLE.fullmatch(text) and len(text) <= 40:
        return int(text)
    if BASED.fullmatch(text) and len(text) <= 40:
        return int(text, 0)
    if NUMBER.fullmatch(text):
        return float(text)
    if SPECIAL.fullmatch(text):
        return float(text.replace(".", "").lower())
    return str(text)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
