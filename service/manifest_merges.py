"""The merges of a manifest, each method with its knobs and seeds, and `best` with the methods that it chooses from."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from service.choose import BEST
from service.manifest_checks import check_best, check_knobs, check_seeds
from service.manifest_file import DEFAULT_METHOD
from service.manifest_reading import Reading
from service.manifest_specs import MergeSpec
from service.wording import FieldPath, field_name, shown, unknown
from ziplora.methods import METHODS


def read_merges(reading: Reading) -> Iterator[MergeSpec]:
    """The merges, but for those that have a fault, which is reported."""
    written = reading.raw.get("merge", DEFAULT_METHOD)
    several = isinstance(written, list)
    if written is None or written == []:
        reading.problem(("merge",), f"empty; expected a method (known: {', '.join(METHODS)}), or leave merge out")
    seen: dict[tuple[str, str, int], FieldPath] = {}
    for i, entry in enumerate(written if several else [written] if written is not None else []):
        field: FieldPath = ("merge", i) if several else ("merge",)
        merge = _merge(reading, field, {"method": entry} if isinstance(entry, str) else entry)
        if merge is None:
            continue
        for seed in merge.seeds:
            first = seen.setdefault((merge.method, json.dumps(merge.knobs, sort_keys=True), seed), field)
            if first != field:
                reading.problem(field, f"the same as {field_name(first)} in method, knobs and seed {seed}; keep one")
        yield merge


def _merge(reading: Reading, field: FieldPath, entry: Any) -> MergeSpec | None:
    if not isinstance(entry, dict):
        reading.problem(field, f"expected a method or a mapping of method and knobs, given {shown(entry)}")
        return None
    name = entry.get("method", DEFAULT_METHOD)
    seeds = _merge_seeds(reading, field, entry)
    if name == BEST:
        return _best(reading, field, entry, seeds)
    if not isinstance(name, str) or name not in METHODS:
        own = (*field, "method") if (*field, "method") in reading.lines else field
        reading.problem(own, unknown(f"unknown method {shown(name)}", [*METHODS, BEST], str(name)))
        return None
    given = {key: value for key, value in entry.items() if key not in ("method", "seed", "seeds")}
    knobs, faults = check_knobs(name, given, field)
    reading.add(faults)
    if knobs is None or seeds is None:
        return None
    if METHODS[name].masked:
        knobs["base"] = reading.model((*field, "base"), knobs["base"], stored=True)
    return MergeSpec(name, knobs, tuple(seeds), frozenset(given), field=field)


def _best(reading: Reading, field: FieldPath, entry: Mapping[str, Any], seeds: list[int] | None) -> MergeSpec | None:
    given = {key: value for key, value in entry.items() if key not in ("method", "seed", "seeds")}
    section, faults = check_best(given, field)
    reading.add(faults)
    tried = tuple(_candidates(reading, (*field, "of"), section.of if section else []))
    if section is None or seeds is None or len(tried) < len(section.of):
        return None
    of = [{"method": spec.method, "knobs": dict(spec.knobs)} for spec in tried]
    knobs = {"of": of, "by": section.by, "good_enough": section.good_enough}
    return MergeSpec(BEST, knobs, tuple(seeds), frozenset(given), tried)


def _candidates(reading: Reading, field: FieldPath, listed: list[Any]) -> Iterator[MergeSpec]:
    seen: dict[str, FieldPath] = {}
    for i, entry in enumerate(listed):
        own: FieldPath = (*field, i)
        named = {"method": entry} if isinstance(entry, str) else entry
        if isinstance(named, dict) and (named.get("method") == BEST or {"seed", "seeds"} & named.keys()):
            reading.problem(own, "expected a method other than best, and no seed: that of best is for all")
            continue
        spec = _merge(reading, own, named)
        if spec is None:
            continue
        if METHODS[spec.method].trains:
            reading.problem(
                own,
                f"{spec.method} trains on each pair's pictures and cannot be one of best's; merge by it as well: of"
                " all methods, `ziplora pull --method best` takes the highest scored merge",
            )
            continue
        first = seen.setdefault(json.dumps([spec.method, spec.knobs], sort_keys=True), own)
        if first == own:
            yield spec
        else:
            reading.problem(own, f"the same as {field_name(first)} in method and knobs; keep one")


def _merge_seeds(reading: Reading, field: FieldPath, entry: Mapping[str, Any]) -> list[int] | None:
    if "seed" in entry and "seeds" in entry:
        reading.problem((*field, "seeds"), "given beside seed, which means the same; keep one")
        return None
    name = "seeds" if "seeds" in entry else "seed"
    seeds, faults = check_seeds(entry.get(name, 0), (*field, name))
    reading.add(faults)
    return seeds
