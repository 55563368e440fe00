"""The preference study of the paper (§4, "which best shows the style while keeping the subject"): its questions, who is
asked what and where each picture stands, and what the answers say. Pure but for reading and writing the store.

    studies/<study>/study.json                            the questions, written once
    studies/<study>/participants/<participant>.json       somebody has begun
    studies/<study>/responses/<participant>/<question>.json   one answer, written once: the first one counts

A participant is a random number and nothing else. What he or she is asked follows from that number and the study's
seed: a reload, another server or a restart asks the same. One key per participant and question, create-only: double
clicks and repeated requests count once.
"""

import hashlib
import json
import math
import random
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from service.entry import Entry
from service.errors import AlreadyCommitted, BadInput, NotFound
from service.storage import Store

PARTICIPANT = re.compile(r"[0-9a-f]{32}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Z_95 = 1.959963984540054
MAX_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Question:
    """One pair by two methods at the same prompt and seed; `keys` are the pictures', in the order of `methods`."""

    id: str
    subject: str
    style: str
    methods: tuple[str, str]
    keys: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Study:
    """`asked`: how many questions each participant gets; all of them when there are no more."""

    name: str
    seed: int
    asked: int
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as a participant sees it: the methods' places are mixed, `left` is 0 or 1 of `question.methods`."""

    question: Question
    left: int


@dataclass(frozen=True, slots=True)
class Response:
    participant: str
    question: str
    methods: tuple[str, str]
    left: int  # which of the methods stood on the left
    chosen: int  # which of them was preferred
    ms: int | None  # from seeing to choosing, as the page measured it
    at: str  # ISO 8601, UTC


@dataclass(frozen=True, slots=True)
class Preference:
    """How often the first of two methods was preferred; `low` and `high`: Wilson's 95 % interval."""

    methods: tuple[str, str]
    n: int
    first: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.first / self.n if self.n else math.nan


@dataclass(frozen=True, slots=True)
class Agreement:
    """One participant: answers, the share in which the first method was preferred, and how often he or she chose what
    most of the others chose in the same question (None where there were no others, or they were divided)."""

    participant: str
    n: int
    first: float
    with_others: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """`left`: answers that took the picture on the left, with its Wilson interval, which a half should lie in."""

    study: str
    participants: int
    preferences: tuple[Preference, ...]
    agreements: tuple[Agreement, ...]
    left: Preference
    seconds: float | None  # median of an answer


# Questions


def make_study(name: str, entries: Iterable[Entry], methods: Sequence[str], asked: int, seed: int) -> Study:
    """The first method against each of the others, on every pair that both have merged and sampled at one prompt and
    seed at full style strength. BadInput when there is nothing to ask."""
    if not NAME.fullmatch(name):
        raise BadInput(f"study name {name!r}: 1 to 64 of A-Z a-z 0-9 . _ -")
    if len(methods) < 2 or len(set(methods)) < len(methods):
        raise BadInput(f"methods {', '.join(methods)}: name two or more different ones, such as ziplora,direct")
    newest: dict[tuple[str, str, str], Entry] = {}
    for entry in sorted(entries, key=lambda entry: (entry.created, entry.job_id)):
        newest[entry.subject, entry.style, entry.method] = entry
    questions = []
    for subject, style in sorted({(subject, style) for subject, style, _ in newest}):
        first = newest.get((subject, style, methods[0]))
        for other in methods[1:]:
            second = newest.get((subject, style, other))
            if first and second:
                questions += [
                    Question(_id(first, second, where), subject, style, (methods[0], other), keys)
                    for where, keys in _common(first, second)
                ]
    if not questions:
        known = ", ".join(sorted({method for _, _, method in newest})) or "none"
        raise BadInput(
            f"no pair was merged by {methods[0]} and another of {', '.join(methods[1:])} and sampled at the same prompt"
            f" and seed with style strength 1.0; the catalog has the methods {known}"
        )
    return Study(name, seed, min(asked, len(questions)), tuple(questions))


def _common(first: Entry, second: Entry) -> list[tuple[str, tuple[str, str]]]:
    pictures = [_pictures(entry) for entry in (first, second)]
    return [(where, (pictures[0][where], pictures[1][where])) for where in pictures[0] if where in pictures[1]]


def _pictures(entry: Entry) -> dict[str, str]:
    """Keys of the samples at full strength, by prompt and seed."""
    found = {}
    for sample in entry.report.get("samples") or []:
        if sample.get("style_strength") == 1.0 and sample.get("object") in entry.objects:
            found[f"{sample.get('prompt')} {sample.get('seed')}"] = entry.objects[sample["object"]].key
    return found


def _id(first: Entry, second: Entry, where: str) -> str:
    return hashlib.sha256(f"{first.job_id} {second.job_id} {where}".encode()).hexdigest()[:16]


# Who is asked what


def asked_of(study: Study, participant: str) -> tuple[Asked, ...]:
    """The questions of one participant in their order: as many of each pair of methods (±1), the first method on the
    left in half of them (±1), no pair of subject and style before all have had their turn."""
    mix = random.Random(f"{study.name} {study.seed} {participant}")
    by_methods: dict[tuple[str, str], list[Question]] = defaultdict(list)
    for question in study.questions:
        by_methods[question.methods].append(question)
    for questions in by_methods.values():
        mix.shuffle(questions)
        seen: Counter[tuple[str, str]] = Counter()
        turns = {}
        for question in questions:
            turns[question.id] = seen[question.subject, question.style]
            seen[question.subject, question.style] += 1
        questions.sort(key=lambda question: turns[question.id])
    queues = list(by_methods.values())
    mix.shuffle(queues)
    chosen: list[Question] = []
    while len(chosen) < study.asked and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue]
    chosen = chosen[: study.asked]
    mix.shuffle(chosen)
    lefts = [place % 2 for place in range(len(chosen))]
    if len(chosen) % 2 and mix.random() < 0.5:
        lefts[-1] = 1
    mix.shuffle(lefts)
    return tuple(Asked(question, left) for question, left in zip(chosen, lefts, strict=True))


# In the store


def open_study(store: Store, study: Study) -> Study:
    """The study as the store has it: written if it is new, BadInput when another is stored under its name."""
    body = json.dumps(asdict(study), sort_keys=True).encode()
    try:
        store.put(_study_key(study.name), body, content_type="application/json", create_only=True)
    except AlreadyCommitted:
        stored = read_study(store, study.name)
        if stored != study:
            raise BadInput(
                f"study {study.name} of {store.url} has other questions or another seed: give this one another --name"
            ) from None
    return study


def read_study(store: Store, name: str) -> Study:
    """NotFound, BadInput."""
    try:
        fields = json.loads(store.get(_study_key(name)))
        questions = tuple(
            Question(one["id"], one["subject"], one["style"], _two(one["methods"]), _two(one["keys"]))
            for one in fields["questions"]
        )
        return Study(fields["name"], fields["seed"], fields["asked"], questions)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{store.url}/{_study_key(name)} is no study of this version: {error}") from error


def study_names(store: Store) -> list[str]:
    found = (re.fullmatch(r"studies/([^/]+)/study\.json", one.key) for one in store.list("studies/"))
    return [match[1] for match in found if match]


def begin(store: Store, study: Study) -> str:
    """A new participant."""
    participant = secrets.token_hex(16)
    body = json.dumps({"at": _now()}).encode()
    store.put(_participant_key(study.name, participant), body, content_type="application/json")
    return participant


def has_begun(store: Store, study: Study, participant: str) -> bool:
    try:
        store.head(_participant_key(study.name, participant))
    except NotFound:
        return False
    return True


def answered(store: Store, study: Study, participant: str) -> set[str]:
    """The questions that the participant has answered."""
    prefix = f"{_responses(study.name)}{participant}/"
    return {found.key.removeprefix(prefix).removesuffix(".json") for found in store.list(prefix)}


def answer(store: Store, study: Study, participant: str, question: str, chose_left: bool, ms: int | None) -> bool:
    """Store an answer; False when there is one already, which stays. NotFound for what the participant is not asked."""
    asked = next((one for one in asked_of(study, participant) if one.question.id == question), None)
    if asked is None:
        raise NotFound(f"participant {participant[:8]} is not asked question {question[:16]}")
    chosen = asked.left if chose_left else 1 - asked.left
    kept_ms = ms if ms is not None and 0 <= ms <= MAX_MS else None
    response = Response(participant, question, asked.question.methods, asked.left, chosen, kept_ms, _now())
    key = f"{_responses(study.name)}{participant}/{question}.json"
    try:
        store.put(key, json.dumps(asdict(response)).encode(), content_type="application/json", create_only=True)
    except AlreadyCommitted:
        return False
    return True


def responses(store: Store, study: Study) -> list[Response]:
    """All answers to questions of this study; what is none is left out."""
    questions = {question.id: question for question in study.questions}
    found = []
    for one in list(store.list(_responses(study.name))):
        try:
            fields = json.loads(store.get(one.key))
            response = Response(**{**fields, "methods": _two(fields["methods"])})
        except (ValueError, TypeError, KeyError, NotFound):
            continue
        question = questions.get(response.question)
        own = f"{_responses(study.name)}{response.participant}/{response.question}.json"
        if one.key == own and question and response.methods == question.methods and response.chosen in (0, 1):
            found.append(response)
    return found


def _study_key(name: str) -> str:
    return f"studies/{name}/study.json"


def _participant_key(name: str, participant: str) -> str:
    return f"studies/{name}/participants/{participant}.json"


def _responses(name: str) -> str:
    return f"studies/{name}/responses/"


def _two(values: Any) -> tuple[str, str]:
    first, second = values
    return str(first), str(second)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# What the answers say


def report(study: Study, found: Sequence[Response]) -> Report:
    by_methods: dict[tuple[str, str], list[Response]] = defaultdict(list)
    for response in found:
        by_methods[response.methods].append(response)
    preferences = tuple(
        preference(methods, sum(one.chosen == 0 for one in of), len(of)) for methods, of in sorted(by_methods.items())
    )
    times = sorted(one.ms for one in found if one.ms is not None)
    return Report(
        study.name,
        len({one.participant for one in found}),
        preferences,
        tuple(_agreements(found)),
        preference(("left", "right"), sum(one.chosen == one.left for one in found), len(found)),
        times[len(times) // 2] / 1000 if times else None,
    )


def preference(methods: tuple[str, str], first: int, n: int) -> Preference:
    return Preference(methods, n, first, *wilson(first, n))


def wilson(k: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Interval of a share k/n (Wilson 1927): where the true share p has |k/n − p| ≤ z·√(p(1−p)/n). (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, extra = k / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    return 0.0 if k == 0 else middle - half, 1.0 if k == n else middle + half


def _agreements(found: Sequence[Response]) -> Iterable[Agreement]:
    firsts: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for one in found:
        firsts[one.question] += one.chosen == 0
        totals[one.question] += 1
    of: Mapping[str, list[Response]] = defaultdict(list)
    for one in found:
        of[one.participant].append(one)
    for participant, own in sorted(of.items()):
        same = []
        for one in own:
            others_first = firsts[one.question] - (one.chosen == 0)
            others = totals[one.question] - 1
            if 2 * others_first != others:  # divided, or nobody else
                same.append((2 * others_first > others) == (one.chosen == 0))
        share = sum(one.chosen == 0 for one in own) / len(own)
        yield Agreement(participant, len(own), share, sum(same) / len(same) if same else None)
