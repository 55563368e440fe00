"""What the methods of a manifest demand of its other sections: each section may be sound by itself, and the merge still
have no use for it, or need what it does not give."""

from collections.abc import Collection, Iterable

from service.manifest_file import ManifestFile
from service.manifest_reading import Reading
from service.manifest_specs import MergeSpec
from service.method_facts import trains
from ziplora.methods import METHODS


def check_demands(
    reading: Reading, file: ManifestFile | None, merges: Collection[MergeSpec], pairs: Iterable[tuple[str, str]]
) -> None:
    """file: None where some field of it has a fault, which has been reported."""
    _check_strengths(reading, file, merges)
    _check_outputs(reading, file, merges)
    _check_images(reading, merges, pairs)


def _check_strengths(reading: Reading, file: ManifestFile | None, merges: Iterable[MergeSpec]) -> None:
    """A style strength can be sampled only where the merged file keeps the style apart: other methods are sampled
    at 1.0 alone, which must then be asked for, and one method at least must have use for the others."""
    whole, apart = by_parts(merges)
    strengths = [1.0] if file is None else file.samples.style_strengths
    if whole and set(strengths) != {1.0} and (not apart or 1.0 not in strengths):
        reading.problem(
            ("samples", "style_strengths"),
            f"{whole[0]} leaves the style no rows of its own, so that only 1.0 can be sampled; "
            + ("add 1.0" if apart else "give the styles a weight instead"),
        )


def _check_outputs(reading: Reading, file: ManifestFile | None, merges: Iterable[MergeSpec]) -> None:
    """A second layout of the merged file, or nothing but it, can be had only where there is one."""
    every = (own for merge in merges for own in (merge.candidates or (merge,)))
    fileless = [merge.method for merge in every if not METHODS[merge.method].file]
    if not fileless or file is None:
        return
    if file.outputs:
        reading.problem(
            ("outputs",),
            f"{fileless[0]} yields {METHODS[fileless[0]].yields}, so there is no {file.outputs[0]} of it; leave"
            f" outputs out, or merge by {fileless[0]} in a manifest of its own",
        )


def _check_images(reading: Reading, merges: Iterable[MergeSpec], pairs: Iterable[tuple[str, str]]) -> None:
    """A method that trains needs pictures of both concepts of each pair."""
    names = [merge.method for merge in merges if trains(merge.method)]
    used = {(role, id) for pair in pairs for role, id in zip(("subjects", "styles"), pair, strict=True)}
    for role, id in sorted(used) if names else ():
        entry = reading.section(role).get(id)
        if isinstance(entry, dict) and not entry.get("images"):
            reading.problem(
                (role, id, "images"),
                f"missing; {names[0]} trains on pictures of both subject and style: give some, or leave {id} out of"
                f" the pairs, or merge by {names[0]} in a manifest of its own",
            )


def by_parts(merges: Iterable[MergeSpec]) -> tuple[list[str], list[str]]:
    """Methods whose merged file does not keep the style apart, and those whose does."""
    names = dict.fromkeys(one.method for merge in merges for one in (merge.candidates or (merge,)))
    return [name for name in names if not METHODS[name].parts], [name for name in names if METHODS[name].parts]
