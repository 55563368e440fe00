"""Which merges of a catalog to take, by their scores. Pure functions of entries."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from service.entry import Entry, alignments

BEST = "best"  # as a method pattern: of each pair the merge with the highest score, whichever method made it
SCORES = ("harmonic", "style", "subject", "text")


@dataclass(frozen=True, slots=True)
class Choice:
    """What is taken, and what could not be compared because nobody scored it."""

    entries: list[Entry]
    unscored: list[Entry]


def matches(entry: Entry, subject: str = "*", style: str = "*", method: str = "*") -> bool:
    """Whether the entry's ids match these patterns (`*`, `?`, `[abc]`; case counts); the method `best` is any."""
    return (
        fnmatchcase(entry.subject, subject)
        and fnmatchcase(entry.style, style)
        and (method == BEST or fnmatchcase(entry.method, method))
    )


def score(entry: Entry, by: str = "harmonic") -> float | None:
    """One of SCORES: an alignment, or the harmonic mean of style and subject alignment; None if not scored."""
    return score_of(alignments(entry), by)


def score_of(found: Mapping[str, float | None], by: str) -> float | None:
    """One of SCORES from alignments by the names of entry.ALIGNMENTS."""
    if by != "harmonic":
        return found[f"{by}_alignment"]
    style, subject = found["style_alignment"], found["subject_alignment"]
    return None if style is None or subject is None else harmonic(style, subject)


def harmonic(style: float, subject: float) -> float:
    """2ab/(a + b), which is a mean of positive numbers; where one is not, the lower of the two stands in for it."""
    return 2 * style * subject / (style + subject) if min(style, subject) > 0 else min(style, subject)


def best_of_pairs(entries: Sequence[Entry], by: str = "harmonic") -> Choice:
    """The highest scored entry of each (subject, style); the only one of a pair needs no score."""
    pairs: defaultdict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        pairs[entry.subject, entry.style].append(entry)
    chosen, unscored = [], []
    for rivals in pairs.values():
        scored = [entry for entry in rivals if score(entry, by) is not None]
        if len(rivals) == 1 or scored:
            chosen.append(_ranked(scored or rivals, by)[0])
        if len(rivals) > 1:
            unscored += [entry for entry in rivals if entry not in scored]
    return Choice(chosen, unscored)


def highest(entries: Sequence[Entry], k: int, by: str = "harmonic") -> Choice:
    """The k highest scored entries, best first."""
    scored = [entry for entry in entries if score(entry, by) is not None]
    return Choice(_ranked(scored, by)[:k], [entry for entry in entries if score(entry, by) is None])


def choose(entries: Sequence[Entry], *, best: bool = False, top: int | None = None, by: str = "harmonic") -> Choice:
    """The best of each pair, the `top` of all, both (in this order) or everything. ValueError for an unknown score."""
    if by not in SCORES:
        raise ValueError(f"score {by} is unknown; one of {', '.join(SCORES)}")
    choice = best_of_pairs(entries, by) if best else Choice(list(entries), [])
    if top is None:
        return choice
    among = highest(choice.entries, top, by)
    return Choice(among.entries, choice.unscored + among.unscored)


def not_compared(choice: Choice) -> list[tuple[Entry, str]]:
    """Why each unscored entry was left out."""
    reason = "it has no score to be chosen by: add `scores` to the manifest and run it again, or name a method"
    return [(entry, reason) for entry in choice.unscored]


def _ranked(entries: Sequence[Entry], by: str) -> list[Entry]:
    return sorted(entries, key=lambda entry: (-(score(entry, by) or 0.0), entry.job_id))
