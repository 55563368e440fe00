"""A Prometheus (Debian's) that scrapes pods as the PodMonitors say, with the project's alerts; and what it answers."""

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from service.deploy import KUSTOMIZE
from service.deploy_dashboard import dashboard
from service.kustomize import build
from tests.bench.pod import get, killed_with_parent

INTERVAL = "2s"  # instead of the monitors' 15 and 30: the runs are short
ADDRESS = "127.0.0.1:9090"
METRICS = re.compile(r"\b(ziplora_\w+?)(?:_bucket|_sum|_count)?(?=\{)")
Target = tuple[str, dict[str, str], dict[str, int]]  # address, the pod's labels, its ports by name


class Prometheus:
    def __init__(self, directory: Path, alerts: str) -> None:
        self.directory = directory / "prometheus"
        self.directory.mkdir()
        (self.directory / "rules.yml").write_text(alerts)
        self.process: subprocess.Popen | None = None
        self.seen: set[str] = set()

    def scrape(self, pods: Sequence[Target]) -> None:
        """These pods from now on, on the ports and with the labels that the PodMonitors choose."""
        configs = []
        for monitor in [one for one in build(KUSTOMIZE / "monitoring") if one["kind"] == "PodMonitor"]:
            spec = monitor["spec"]
            wanted = spec["selector"]["matchLabels"].items()
            chosen = [pod for pod in pods if wanted <= pod[1].items()]
            for endpoint in spec["podMetricsEndpoints"]:
                static = [
                    {
                        "targets": [f"{address}:{ports[endpoint['port']]}"],
                        "labels": {re.sub(r"\W", "_", name): labels[name] for name in spec["podTargetLabels"]},
                    }
                    for address, labels, ports in chosen
                ]
                name = f"{monitor['metadata']['name']}:{endpoint['port']}"
                configs.append({"job_name": name, "static_configs": static})
        whole = {
            "global": {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL},
            "rule_files": ["rules.yml"],
            "scrape_configs": configs,
        }
        (self.directory / "prometheus.yml").write_text(yaml.safe_dump(whole))
        if self.process:
            urllib.request.urlopen(urllib.request.Request(f"http://{ADDRESS}/-/reload", method="POST"), timeout=20)
        else:
            self._start()

    def _start(self) -> None:
        binary = shutil.which("prometheus")
        if binary is None:
            raise SystemExit("there is no prometheus on PATH: apt install prometheus")
        options = [f"--config.file={self.directory}/prometheus.yml", f"--storage.tsdb.path={self.directory}/tsdb"]
        self.process = subprocess.Popen(
            [binary, *options, f"--web.listen-address={ADDRESS}", "--web.enable-lifecycle"],
            stdout=(self.directory / "log").open("w"),
            stderr=subprocess.STDOUT,
            preexec_fn=killed_with_parent,
        )

    def ask(self, path: str, **parameters: str) -> Any:
        return json.loads(get(f"http://{ADDRESS}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))["data"]

    def number(self, query: str) -> float:
        found = self.ask("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else 0.0

    def targets(self) -> dict[str, list[str]]:
        """Health of the pods, by monitor and port."""
        found: dict[str, list[str]] = {}
        for target in self.ask("targets")["activeTargets"]:
            found.setdefault(target["labels"]["job"], []).append(target["health"])
        return found

    def rules(self) -> dict[str, str]:
        """By alert: whether it can be evaluated, and its state."""
        rules = [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]
        return {rule["name"]: f"{rule['health']}, {rule['state']}" for rule in rules}

    def ask_dashboard(self, run: str) -> tuple[int, dict[str, list[str]], list[str]]:
        """(number of the dashboard's queries, those without a result with the metrics that have no series yet,
        metrics in them that no scrape has told of)."""
        queries = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
        names = set(self.ask("label/__name__/values"))
        empty = {}
        for query in queries:
            if not self.ask("query", query=query.replace("$run", run).replace("$price", "2.5"))["result"]:
                empty[query] = [name for name in METRICS.findall(query) if not {name, f"{name}_count"} & names]
        return len(queries), empty, self.unknown(queries)

    def unknown(self, queries: Sequence[str]) -> list[str]:
        """Metrics in them that no scrape has told of."""
        told = set(self.ask("metadata", limit="10000"))
        asked = {name for query in queries for name in METRICS.findall(query)}
        return sorted(name for name in asked if not {name, name.removesuffix("_total")} & told)

    def pages(self) -> dict[str, bytes]:
        """What the pods' metrics ports say, and what Prometheus keeps of it."""
        found = {"all series": json.dumps(self.ask("series", **{"match[]": '{__name__=~".+"}'})).encode()}
        for target in self.ask("targets")["activeTargets"]:
            try:
                found[target["scrapeUrl"]] = get(target["scrapeUrl"])
            except urllib.error.URLError as error:  # a drained worker has ended, and Prometheus has not asked since
                if not isinstance(error.reason, ConnectionRefusedError):
                    raise
        return found
