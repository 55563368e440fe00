"""File names that a person can read and no system minds."""

import re
from datetime import UTC, datetime
from pathlib import PureWindowsPath

from service.entry import Entry
from service.file_names import stems
from tests.catalogs import identity


def named(subject: str, style: str = "ink", job_id: str = "a" * 64) -> Entry:
    job = identity(subject, style)
    return Entry(job_id, job, {}, {}, "attempt", datetime.now(UTC))


EVIL = (
    "../../etc", "/root", "C:\\x", "con", "COM¹", "nul.txt", "a\x00b\n", "", ".", "trailing.", "trailing ", "~",
    "$(rm)", "-rf", "x" * 500, "\u202e", "é" * 90, "\U0001f415", "e\u0301", 'a"b<c>d|e?f*g:h',
)  # fmt: skip


def test_file_names_are_readable_and_safe() -> None:
    assert stems([named("dog", "water colour (v1.5)")]) == ["dog__water_colour__v1_5___ziplora-aaaaaaaa"]
    assert stems([named("Hündchen-犬")]) == ["Hündchen-犬__ink__ziplora-aaaaaaaa"]
    for evil in EVIL:
        (stem,) = stems([named(evil, evil)])
        assert re.fullmatch(r"[\w-]+__[\w-]+__ziplora-a{8}", stem)
        assert len(stem.encode()) < 200
        assert not stem.startswith("-")
        for suffix in (".safetensors", ".preview.png", ".safetensors.part"):
            assert not PureWindowsPath(stem + suffix).is_reserved()
            assert len((stem + suffix).encode()) < 255


def test_file_names_differ_for_different_jobs() -> None:
    entries = [named("dog", job_id="a" * 63 + c) for c in "01"] + [named("Dog", job_id="a" * 63 + "2"), named("cat")]
    found = stems(entries)
    assert len({stem.casefold() for stem in found}) == 4
    assert found[0] == f"dog__ink__ziplora-{'a' * 63}0"
    assert found[3] == "cat__ink__ziplora-aaaaaaaa"


def test_the_longest_names_fit_with_all_digits_of_the_id() -> None:
    entries = [named("é" * 90, "x" * 90, "a" * 63 + c) for c in "01"]
    for stem in stems(entries):
        assert stem[-64:] in {entry.job_id for entry in entries}
        assert len(f"{stem}.safetensors.part".encode()) < 255


def test_as_many_digits_as_tell_two_jobs_apart() -> None:
    entries = [named("dog", job_id="a" * 10 + c + "0" * 53) for c in "bc"]
    assert stems(entries) == ["dog__ink__ziplora-aaaaaaaaaab00000", "dog__ink__ziplora-aaaaaaaaaac00000"]
