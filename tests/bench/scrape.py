"""`python -m tests.bench.scrape PROMETHEUS PROMTOOL`: a real Prometheus scrapes a live run on the pocket grid. Result:
results/scrape.json.

Shown: every metric of deploy/METRICS.md arrives, promtool has nothing to say, and what the run thinks of its end at
half time. The binaries are those of Debian's package `prometheus`.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from service import events
from service.catalog import Catalog
from service.manifest import read_manifest
from service.messages import WorkerSettings
from service.metrics import Metrics
from service.plan import plan
from service.pool import InlinePool
from service.run import run
from tests.bench.record import save
from tests.bench.stage import ROOT, manifest
from tests.commands import wait_until
from tests.swift_node import end_with_parent, reserve_ports

RESULT = Path(__file__).parent / "results" / "scrape.json"
SCORERS = ROOT / "ziplora/pocket/weights/scorers"


def everything(root: Path) -> Path:
    """The grid of the faults, so that every metric has a series: its samples are scored, and for one subject there are
    only pictures, on which a LoRA is trained first."""
    path = manifest(root)
    content = yaml.safe_load(path.read_text())
    del next(iter(content["subjects"].values()))["lora"]
    content |= {
        "training": {"rank": 4, "steps": 4},
        "samples": {"prompts": ["a {subject} in {style}"], "steps": 2},
        "scores": {"clip": str(SCORERS / "clip"), "dino": str(SCORERS / "dino")},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def main() -> None:
    prometheus, promtool = sys.argv[1:]
    port, lock = reserve_ports(2)
    with lock, tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        planned = plan(read_manifest(everything(root)))
        planned.check()
        assert planned.base is not None
        assert planned.duration is not None
        metrics = Metrics("scrape")
        server = metrics.serve(port, "127.0.0.1")
        (root / "prometheus.yml").write_text(
            f"global: {{scrape_interval: 1s}}\nscrape_configs:\n"
            f"- {{job_name: ziplora, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}\n"
        )
        options = [f"--config.file={root}/prometheus.yml", f"--storage.tsdb.path={root}/tsdb"]
        command = [prometheus, *options, f"--web.listen-address=127.0.0.1:{port + 1}"]
        scraper = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=end_with_parent)
        thought: list[tuple[float, float]] = []

        def look(event: events.Event) -> None:
            if isinstance(event, events.Outlook) and event.seconds and event.left <= len(planned.jobs) / 2:
                thought.append((time.monotonic(), event.seconds))

        location, digest = planned.base.ref.location, planned.base.ref.digest
        cache = str(root / "cache")
        settings = WorkerSettings(str(root / "catalog"), location, None, digest, device="cpu", cache_dir=cache)
        try:
            pool = InlinePool(settings)
            run(
                planned.jobs,
                pool,
                Catalog(settings.catalog),
                run_id="scrape",
                observers=[metrics.observe, look],
                trainings=planned.trainings,
                prior_s=planned.duration.pairs_s / len(planned.jobs),
                training_s=planned.duration.train_s / len(planned.trainings),
            )
            ended = time.monotonic()
            pool.close()
            time.sleep(2.5)  # the last scrape
            wait_until(lambda: bool(asked(port + 1, "query?query=ziplora_jobs")["result"]), 30)
            arrived = set(asked(port + 1, "label/__name__/values"))
            committed = asked(port + 1, "query?query=ziplora_jobs%7Bstate=%22committed%22%7D")["result"][0]["value"][1]
        finally:
            scraper.terminate()
            scraper.wait()
            server.shutdown()
        check = subprocess.run([promtool, "check", "metrics"], input=metrics.text(), capture_output=True)
    documented = re.findall(r"^\| `(ziplora_\w+)` \| (\w+)", (ROOT / "deploy/METRICS.md").read_text(), re.MULTILINE)
    names = {name: f"{name}_count" if kind == "histogram" else name for name, kind in documented}
    missing = {name for name, series in names.items() if series not in arrived}
    assert not missing, missing
    at, seconds = thought[0]
    figures = {
        "jobs": len(planned.jobs),
        "documented metrics": len(documented),
        "of them with a series": len(names) - len(missing),
        "committed, as scraped": int(float(committed)),
        "promtool check metrics": {
            "exit code": check.returncode,
            "says": check.stderr.decode() + check.stdout.decode(),
        },
        "ETA at half time, of the true rest": round(seconds / (ended - at), 3),
    }
    save(RESULT, figures)
    print(json.dumps(figures, indent=2))


def asked(port: int, what: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{what}", timeout=10) as answer:
        return json.load(answer)["data"]


if __name__ == "__main__":
    main()
