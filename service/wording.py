"""Words that messages about a user's file share: what was given, what is known, what was probably meant."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong in a file: at which field, and what; the reader of the file knows the line."""

    field: FieldPath
    text: str


def field_name(field: FieldPath) -> str:
    """('subjects', 'dog', 'images', 0) → subjects.dog.images[0]"""
    name = ""
    for part in field:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return "".join(character if character.isprintable() else "?" for character in name)


def shown(value: Any) -> str:
    """A value in a message: short, and in the words of YAML."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "…")
        case list():
            return f"a list of {len(value)}"
        case dict() if value:
            return f"a mapping ({', '.join(list(value)[:4])}{', …' if len(value) > 4 else ''})"
        case dict():
            return "an empty mapping"
    return str(value)


def plain(value: Any) -> str:
    """A value in a report: `none`, `1.0, 0.7`, `50`."""
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def number(n: int, one: str, many: str = "") -> str:
    """`1 merge`, `2 merges`; `many` where that is not the word with an s."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def some(names: Sequence[str], n: int = 8) -> str:
    """The first n names, and how many there are if that is not all."""
    return ", ".join(names[:n]) + (f" … ({len(names)} in all)" if len(names) > n else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean prompt? ', or nothing."""
    by_case = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), list(by_case), n=1, cutoff=0.6)
    return f"did you mean {by_case[close[0]]}? " if close else ""


def unknown(what: str, known: Sequence[str], name: str) -> str:
    """'unknown field; did you mean prompt? known: lora, prompt'"""
    return f"{what}; {nearest(name, known)}known: {some(known, 24)}"
