"""How long a large manifest takes to plan, and to take up again once all of it is committed.

    python -m tests.bench.resume [--side 316] [--s3-side 71] [--plan-side 1000]

The plan checks every LoRA of the grid and computes the identity of every pair; resuming adds one listing of the
catalog. Entries are written by this program as runs write them, only faster: without a merge, and on the local disk
without waiting for it. On S3 (the tests' Swift server, pages of 1000 as AWS has them) requests are counted where they
leave the process.
"""

import argparse
import contextlib
import json
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from service import s3
from service.catalog import entry_key
from service.entry import Entry, write_entry
from service.inputs import DigestCache
from service.jobs import Job, identity
from service.manifest import read_manifest
from service.plan import Plan, plan
from service.plan_text import summary_lines
from service.storage import open_store
from tests import swift_node
from tests.bench.record import save
from tests.grid import Grid, build_grid

RESULTS = Path(__file__).parent / "results" / "resume.json"


def grid_of(grid: Grid, side: int, output: str) -> Path:
    """A manifest of side × side pairs over as many LoRA files: links to one, since only headers are read twice."""
    roles: dict[str, dict[str, Any]] = {"subjects": {}, "styles": {}}
    for role, source, prompt in (("subjects", "dog", "a photo of sks dog"), ("styles", "ink", "a house in ink style")):
        for i in range(side):
            file = grid.root / f"{role}-{i}.safetensors"
            if not file.exists():
                os.link(grid.root / f"{source}.safetensors", file)
            roles[role][f"{role[:-1]}{i:04}"] = {"lora": file.name, "prompt": prompt, "images": f"{source}.png"}
    path = grid.root / f"grid-{side}.yaml"
    path.write_text(yaml.safe_dump({"base": "base", **roles, "merge": "ziplora", "samples": {}, "output": output}))
    return path


def timed_plan(manifest: Path, digests: DigestCache) -> tuple[Plan, dict[str, float]]:
    started = time.perf_counter()
    read = read_manifest(manifest)
    read_s = time.perf_counter() - started
    made = plan(read, digests=digests)
    made.check()
    return made, {"read_manifest_s": round(read_s, 2), "plan_s": round(time.perf_counter() - started - read_s, 2)}


def body_of(job: Job) -> bytes:
    return write_entry(Entry(job.job_id, identity(job), {}, {"stages": {"merge": 1.0}}, "0" * 16, datetime.now(UTC)))


def commit_all(made: Plan) -> None:
    store = open_store(made.output)
    if made.output.startswith("s3://"):
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda job: store.put(entry_key(job.job_id), body_of(job)), made.jobs):
                pass
        return
    directory = Path(made.output) / "entries"
    directory.mkdir(parents=True)
    for job in made.jobs:
        (directory / f"{job.job_id}.json").write_bytes(body_of(job))


@contextlib.contextmanager
def counted_requests() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    events = s3.client(s3.ATTEMPTS).meta.events

    def count(request: Any, **_: Any) -> None:
        counts[request.method] += 1

    events.register("before-send.s3", count)
    try:
        yield counts
    finally:
        events.unregister("before-send.s3", count)


def resumed(grid: Grid, side: int, output: str, digests: DigestCache) -> dict[str, Any]:
    manifest = grid_of(grid, side, output)
    first, cold = timed_plan(manifest, digests)
    commit_all(first)
    with counted_requests() if output.startswith("s3://") else contextlib.nullcontext(Counter()) as counts:
        second, warm = timed_plan(manifest, digests)
    assert len(second.committed) == side * side
    assert not second.left
    says = next(line for line in summary_lines(second) if line.startswith("jobs"))
    return {
        "entries": side * side,
        "before": cold,
        "resumed": warm,
        "requests": dict(counts),
        "the plan says": says,
        "takes": second.duration.basis,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=316)
    parser.add_argument("--s3-side", type=int, default=71)
    parser.add_argument("--plan-side", type=int, default=1000)
    wanted = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="resume-") as temporary:
        root = Path(temporary)
        grid, digests = build_grid(root / "grid"), DigestCache(root / "digests")
        results["local"] = resumed(grid, wanted.side, str(root / "catalog"), digests)
        swift_node.FILTERS["s3api"] = swift_node.FILTERS["s3api"].replace("listing = 20", "listing = 1000")
        with swift_node.swift_node(root / "swift") as node:
            os.environ.update(node.environment)
            s3.client(s3.ATTEMPTS).create_bucket(Bucket="resume")
            results["s3"] = resumed(grid, wanted.s3_side, "s3://resume/catalog", digests)
        side = wanted.plan_side
        made, seconds = timed_plan(grid_of(grid, side, str(root / "empty")), digests)
        results["plan"] = {"pairs": len(made.jobs), "loras": 2 * side, **seconds}
    results["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    save(RESULTS, results)
    print(json.dumps(results, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
