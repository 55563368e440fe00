"""`make bench-overlap`: the same grid of pocket pairs with fetching ahead and uploading behind, and without; every
request to the store takes 50 ms longer. Result: results/overlap.json.

The store is a real S3 server behind a proxy that holds back what clients send. One worker, in this process.
"""

import asyncio
import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import boto3
import yaml

from service.catalog import Catalog
from service.jobs import Job
from service.manifest import read_manifest
from service.messages import WorkerSettings
from service.metrics import Metrics
from service.plan import plan
from service.pool import InlinePool, Report
from service.run import run
from service.storage import open_store
from tests.bench.record import save
from tests.bench.stage import LORAS, ROOT
from tests.swift_node import swift_node

RESULT = Path(__file__).parent / "results" / "overlap.json"
LATENCY_S = 0.05
BUCKET = "overlap"


class Slowed:
    """A proxy on loopback that passes on what clients send after LATENCY_S, at any rate."""

    def __init__(self, port: int) -> None:
        self.target, self.port = port, 0
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        threading.Thread(target=self._serve, args=(ready,), daemon=True).start()
        ready.wait()

    def _serve(self, ready: threading.Event) -> None:
        async def start() -> None:
            server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()

        self.loop.run_until_complete(start())
        self.loop.run_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(self._pass(reader, back, LATENCY_S), self._pass(there, writer, 0.0))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        while data := await reader.read(1 << 16):
            # held back by time, not one after another: latency, not bandwidth
            self.loop.call_later(delay_s, writer.write, data)
        self.loop.call_later(delay_s + 0.01, writer.close)


def manifest(root: Path) -> Path:
    """24 pairs; LoRAs and pictures in the bucket."""
    store = open_store(f"s3://{BUCKET}")

    def section(kind: str, prompt: str, trigger: str, n: int) -> dict[str, object]:
        found: dict[str, object] = {}
        for path in sorted((LORAS / kind).iterdir())[:n]:
            files = [path / f"{path.name}.safetensors", path / "0.png"]
            for file in files:
                store.put(f"in/{path.name}/{file.name}", file)
            lora, image = (f"s3://{BUCKET}/in/{path.name}/{file.name}" for file in files)
            found[path.name] = {"lora": lora, "prompt": prompt, "trigger": trigger, "images": image}
        return found

    content = {
        "base": str(ROOT / "ziplora/pocket/weights/base"),
        "subjects": section("subjects", "a photo of a sks", "sks", 6),
        "styles": section("styles", "a house in szn style", "szn style", 4),
        "merge": {"method": "ziplora", "steps": 5},
        "samples": {"prompts": []},
        "output": f"s3://{BUCKET}/catalog",
    }
    path = root / "manifest.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class Loaded(InlinePool):
    """Its base is in memory before the clock starts."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        self.ready = super().wait(0.0)

    def wait(self, timeout_s: float) -> Sequence[Report]:
        ready, self.ready = self.ready, []
        return ready or super().wait(timeout_s)


def measured(settings: WorkerSettings, jobs: Sequence[Job]) -> dict[str, float]:
    pool, metrics = Loaded(settings), Metrics("overlap")
    began = time.monotonic()
    progress = run(jobs, pool, Catalog(settings.catalog), run_id="overlap", observers=[metrics.observe])
    seconds = time.monotonic() - began
    pool.close()
    assert len(progress.committed) == len(jobs), progress.given_up
    busy = metrics.registry.get_sample_value("ziplora_worker_busy_seconds_total") or 0.0
    return {"seconds": round(seconds, 2), "computing": round(busy / seconds, 3)}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, swift_node(Path(directory) / "swift") as node:
        root = Path(directory)
        os.environ.update(node.environment)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        planned = plan(read_manifest(manifest(root)))
        planned.check()
        assert planned.base is not None
        location, digest = planned.base.ref.location, planned.base.ref.digest
        os.environ["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{Slowed(node.port).port}"
        found: dict[str, list[dict[str, float]]] = {"one after another": [], "overlapped": []}
        for number in range(4):  # in turns: the machine's other work falls on both
            overlap = number % 2 == 1
            settings = WorkerSettings(
                f"s3://{BUCKET}/catalog-{number}",
                location,
                None,
                digest,
                device="cpu",
                cache_dir=str(root / f"cache-{number}"),
                overlap=overlap,
            )
            found["overlapped" if overlap else "one after another"].append(measured(settings, planned.jobs))
        digests = {Catalog(f"s3://{BUCKET}/catalog-{number}").digest() for number in range(4)}
        assert len(digests) == 1
    totals = [sum(one["seconds"] for one in runs) for runs in found.values()]
    figures = {
        "pairs": len(planned.jobs),
        "milliseconds added to a request": 1000 * LATENCY_S,
        **found,
        "time saved": round(1 - totals[1] / totals[0], 3),
        "catalogs are equal": True,
    }
    save(RESULT, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
