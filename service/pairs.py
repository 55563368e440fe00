"""Which subject goes with which style: the whole grid, patterns over it, or a list."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from service.wording import Fault, FieldPath, nearest, shown, some, unknown

SPELLINGS = "all, {include: [subject/style patterns], exclude: […]}, or a list of [subject, style]"
Chosen = set[tuple[str, str]]


def choose_pairs(
    written: Any, subjects: Sequence[str], styles: Sequence[str]
) -> tuple[list[tuple[str, str]], list[Fault]]:
    """The pairs that `written` (the manifest's `pairs`) means, in the order of the grid, and what is wrong with it."""
    grid = ((subject, style) for subject in subjects for style in styles)
    if written == "all":
        return list(grid), []
    faults: list[Fault] = []
    if isinstance(written, list):
        chosen = _listed(written, subjects, styles, faults)
    elif isinstance(written, dict):
        chosen = _matched(written, subjects, styles, faults)
    else:
        return [], [Fault(("pairs",), f"expected {SPELLINGS}, given {shown(written)}")]
    if not chosen and not faults:
        faults.append(Fault(("pairs",), "no pair is left; expected at least one"))
    return [pair for pair in grid if pair in chosen], faults


def _listed(written: list[Any], subjects: Sequence[str], styles: Sequence[str], faults: list[Fault]) -> Chosen:
    first: dict[tuple[str, str], int] = {}
    known_subjects, known_styles = set(subjects), set(styles)
    for i, item in enumerate(written):
        field: FieldPath = ("pairs", i)
        if not (isinstance(item, list) and len(item) == 2 and all(isinstance(id, str | int) for id in item)):
            faults.append(Fault(field, f"expected [subject, style], given {shown(item)}"))
            continue
        pair = (str(item[0]), str(item[1]))
        if pair[0] not in known_subjects:
            faults.append(Fault(field, _unknown_id("subject", pair[0], subjects)))
        if pair[1] not in known_styles:
            faults.append(Fault(field, _unknown_id("style", pair[1], styles)))
        if pair in first:
            faults.append(Fault(field, f"{pair[0]}/{pair[1]} is already pairs[{first[pair]}]; name each pair once"))
        first.setdefault(pair, i)
    return set(first)


def _unknown_id(role: str, id: str, known: Sequence[str]) -> str:
    return f"no {role} has the id {shown(id)}; {nearest(id, known)}known: {some(known)}"


def _matched(written: dict[str, Any], subjects: Sequence[str], styles: Sequence[str], faults: list[Fault]) -> Chosen:
    for key in written.keys() - {"include", "exclude"}:
        faults.append(Fault(("pairs", key), unknown("unknown field", ["include", "exclude"], key)))
    include = _matches("include", written.get("include", "*/*"), subjects, styles, faults)
    return include - _matches("exclude", written.get("exclude", []), subjects, styles, faults)


def _matches(key: str, patterns: Any, subjects: Sequence[str], styles: Sequence[str], faults: list[Fault]) -> Chosen:
    """A pattern that matches nothing is a fault, in `exclude` too: a typing error there costs GPU time."""
    matched: Chosen = set()
    several = isinstance(patterns, list)
    for i, pattern in enumerate(patterns if several else [patterns]):
        field: FieldPath = ("pairs", key, i) if several else ("pairs", key)
        if not isinstance(pattern, str) or pattern.count("/") != 1:
            faults.append(Fault(field, f"expected a pattern subject/style such as dog*/*, given {shown(pattern)}"))
            continue
        left, right = pattern.split("/")
        rows = [subject for subject in subjects if fnmatchcase(subject, left)]
        columns = [style for style in styles if fnmatchcase(style, right)]
        if not rows and subjects:
            faults.append(Fault(field, f"{pattern} matches no subject; known: {some(subjects)}"))
        if not columns and styles:
            faults.append(Fault(field, f"{pattern} matches no style; known: {some(styles)}"))
        matched |= {(subject, style) for subject in rows for style in columns}
    return matched
