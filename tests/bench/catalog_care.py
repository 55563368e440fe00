"""Files leaving a catalog under kills, and the care of a catalog under a running batch: `make bench-care`.

Real processes throughout: `ziplora pull` from an S3 server, killed with SIGKILL at random times and run again; `ziplora
run` while another process collects garbage without a pause. Results: tests/bench/results/catalog_care.json.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3

from service.catalog import COMMIT_S, Catalog
from service.manifest import read_manifest
from service.plan import plan
from tests.bench.record import save
from tests.catalogs import files_of, id_of, identity
from tests.commands import command, environment, ziplora
from tests.grid import build_grid
from tests.swift_node import swift_node

RESULTS = Path(__file__).parent / "results" / "catalog_care.json"
KILLS = 10
MERGES, MB = 12, 12


def pull_killed(directory: Path, seed: int = 0) -> dict[str, Any]:
    """Kill ten pulls, each after a random time; the run after them must end verified and complete."""
    with swift_node(directory / "swift") as node:
        os.environ.update(node.environment)
        boto3.client("s3").create_bucket(Bucket="catalog")
        catalog, out = Catalog("s3://catalog/kills"), directory / "out"
        promised = {}
        for number in range(MERGES):
            job = identity(f"s{number}")
            files = {**files_of(job), "merged.safetensors": os.urandom(MB << 20)}
            for item in catalog.commit(id_of(job), job, files, {}).objects.values():
                promised[item.sha256] = item.size
        arguments = command("pull", "s3://catalog/kills", out, "--samples", "--mergers")
        started = time.monotonic()
        whole = command("pull", "s3://catalog/kills", directory / "whole", "--samples", "--mergers")
        subprocess.run(whole, check=True, env=environment(), capture_output=True)
        whole_s = time.monotonic() - started
        generator, kills = random.Random(seed), []
        for _ in range(KILLS):
            process = subprocess.Popen(
                arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            wait_for_progress(process, out)
            time.sleep(generator.random() * 0.15)
            process.send_signal(signal.SIGKILL)
            kills.append({"ended": process.wait(), **state_of(out)})
        started = time.monotonic()
        last = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
        last_s = time.monotonic() - started
        found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in out.rglob("*") if path.is_file()}
        again = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    return {
        "kills": kills,
        "uninterrupted_s": round(whole_s, 2),
        "last_run": {"exit": last.returncode, "said": last.stdout.strip().rpartition(": ")[2], "s": round(last_s, 2)},
        "run_after_it": again.stdout.strip().rpartition(": ")[2],
        "files": sum(path.is_file() for path in out.rglob("*")),
        "all_as_promised": found == promised.keys(),
    }


def wait_for_progress(process: subprocess.Popen[bytes], out: Path) -> None:
    """Wait until the pull has begun to write something new, so that kills do not all hit its imports."""
    before = state_of(out)
    while process.poll() is None and state_of(out) == before:
        time.sleep(0.005)


def state_of(out: Path) -> dict[str, int]:
    files = [path for path in out.rglob("*") if path.is_file()] if out.exists() else []
    parts = [path for path in files if path.suffix == ".part"]
    n_bytes = 0
    for path in parts:
        try:
            n_bytes += path.stat().st_size
        except FileNotFoundError:  # finished meanwhile
            continue
    return {"whole": len(files) - len(parts), "parts": len(parts), "part_bytes": n_bytes}


SWEEP = """
import sys, time
from service.catalog import COMMIT_S, Catalog
catalog = Catalog(sys.argv[1])
sweeps = removed = 0
while True:
    found = catalog.garbage(older_than_s=2 * COMMIT_S)
    removed += sum(gone for _, gone in catalog.collect(found))
    sweeps += 1
    print(sweeps, removed, flush=True)
    time.sleep(0.02)
"""


def collected_under_a_batch(directory: Path) -> dict[str, Any]:
    """`ziplora run` of sixteen jobs in a catalog with old abandoned attempts of six of them, swept all the time."""
    grid = build_grid(directory / "grid")
    manifest = grid.manifest(subjects=4, styles=4, merge={"method": "direct"})
    planned = plan(read_manifest(manifest))
    catalog = Catalog(grid.root / "catalog")
    ids = sorted(job.job_id for job in planned.jobs)
    abandoned = []
    for job_id in ids[:6]:
        for item in catalog._upload(job_id, "killed", files_of(identity())).values():
            os.utime(grid.root / "catalog" / item.key, (0, 0))
            abandoned.append(item.key)
    sweeper = subprocess.Popen(
        [sys.executable, "-c", SWEEP, grid.root / "catalog"], stdout=subprocess.PIPE, text=True, env=environment()
    )
    done = ziplora("run", manifest, "--inline")
    sweeper.send_signal(signal.SIGTERM)
    printed = sweeper.communicate()[0].splitlines()
    last = printed[-1].split() if printed else ["0", "0"]
    left = [key for key in abandoned if (grid.root / "catalog" / key).exists()]
    verified = ziplora("verify", grid.root / "catalog")
    said = [line for line in done.stdout.splitlines() if line.startswith("committed")]
    return {
        "run": {"exit": done.returncode, "said": said or done.stderr.splitlines()[-1:]},
        "sweeps_while_it_ran": int(last[0]),
        "attempts_removed": int(last[1]),
        "abandoned_objects": len(abandoned),
        "of_them_left": len(left),
        "verify": verified.stdout.strip(),
    }


def flipped_bit(directory: Path) -> dict[str, Any]:
    """One bit among a thousand objects of 256 KiB."""
    catalog = Catalog(directory / "catalog")
    for number in range(20):
        job = identity(f"s{number}")
        catalog.commit(id_of(job), job, {f"samples/{i}.bin": os.urandom(256 << 10) for i in range(50)}, {})
    key = sorted(found.key for found in catalog.store.list("pairs/"))[617]
    path = directory / "catalog" / key
    content = bytearray(path.read_bytes())
    content[123_456] ^= 8
    path.write_bytes(content)
    started = time.monotonic()
    checks = list(catalog.verify())
    bad = [check.key for check in checks if check.problem]
    return {
        "objects": len(checks),
        "bytes": sum(check.size for check in checks),
        "s": round(time.monotonic() - started, 2),
        "found": len(bad),
        "it_is_the_flipped_one": bad == [key],
    }


def main() -> None:
    results: dict[str, Any] = {"at": f"{datetime.now(UTC):%Y-%m-%d}", "garbage_age_s": 2 * COMMIT_S}
    for name, measure in (
        ("flipped_bit", flipped_bit),
        ("collected_under_a_batch", collected_under_a_batch),
        ("pull_killed", pull_killed),
    ):
        with tempfile.TemporaryDirectory(prefix="ziplora-care-") as directory:
            results[name] = measure(Path(directory))
            print(json.dumps({name: results[name]}, indent=2), flush=True)
    save(RESULTS, results)


if __name__ == "__main__":
    main()
