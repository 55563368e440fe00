"""`make bench-pods`: what the pods of a rendered manifest would run, run as processes. Result: results/pods.json.

    python -m tests.bench.pods (Linux, as root; needs ip, unshare, nsenter, setpriv, prometheus, promtool)

Command lines, environment, ports, volumes, user and capabilities come from `ziplora deploy render --overlay cpu-smoke`;
what KubeRay adds is in kuberay.py, what Linux makes of a pod in pod.py. Put in place of what a cluster has: names are
resolved by /etc/hosts, the bucket is that of the tests' S3 server, Prometheus is configured from the PodMonitors and
scrapes every 2 s, three of Ray's timeouts at start are longer (pod.py). A grid of the pocket world is begun; one worker
gets SIGTERM and drains; the head is killed; the next attempt, a new cluster as backoffLimit has it, ends it. Meanwhile
the dashboard's queries and alerts are asked of Prometheus, and all that was written, served or shown is searched for
the Ray token and the S3 key.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import psutil
import yaml

from service.catalog import Catalog
from service.manifest import read_manifest
from service.plan import plan
from service.storage import open_store
from tests import swift_node
from tests.bench.credentials import Found, Processes, Search, files, objects
from tests.bench.kuberay import HEALTH, Document, RayJob
from tests.bench.pod import (
    BIN,
    HOST,
    ROOT,
    Container,
    Pod,
    answers,
    forwarded,
    get,
    killed_with_parent,
    make_bridge,
    mount_points,
    wait_for,
)
from tests.bench.record import save
from tests.bench.scraped import Prometheus

RESULT = Path(__file__).parent / "results" / "pods.json"
TOKEN = "f00dfeed" * 8
SECRET_KEY = "c0ffee42" * 5  # words that nothing else has
REGION = "pods-1"  # not the one that is assumed when none is given
NAMESPACE, S3 = "grids", "s3.storage.svc.cluster.local"
SECRETS = {
    "ziplora-ray-token": {"auth_token": TOKEN},
    "ziplora-s3": {
        "AWS_ACCESS_KEY_ID": swift_node.ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL_S3": f"http://{S3}:9000",
        "AWS_REGION": REGION,
    },
}
RENDERED_WITH = {"overlay": "cpu-smoke", "workers": 2, "namespace": NAMESPACE, "via": "s3://grids/inputs"}
WEIGHTS = ROOT / "ziplora/pocket/weights"
MANIFEST = """\
base: base
subjects:
  mushroom: {lora: subjects/mushroom/mushroom.safetensors, prompt: a photo of a sks, images: subjects/mushroom/*.png}
  robot: {lora: subjects/robot/robot.safetensors, prompt: a photo of a sks, images: subjects/robot/*.png}
styles:
  ice: {lora: styles/ice/ice.safetensors, prompt: a house in szn style, images: styles/ice/*.png}
  retro: {lora: styles/retro/retro.safetensors, prompt: a cat in szn style, images: styles/retro/*.png}
  arcade: {lora: styles/arcade/arcade.safetensors, prompt: a flower in szn style, images: styles/arcade/*.png}
merge: {method: ziplora, steps: 20, seeds: [0, 1, 2, 3, 4, 5]}
samples: {prompts: ["a {subject} in {style}"], steps: 4}
output: s3://grids/catalog
"""


class Cluster:
    """One attempt: head, workers, submitter."""

    def __init__(self, ray_job: RayJob, directory: Path, numbers: Iterator[int], documents: list[Document]) -> None:
        self.ray_job, self.directory, self.numbers = ray_job, directory, numbers
        self.config_maps = {one["metadata"]["name"]: one["data"] for one in documents if one["kind"] == "ConfigMap"}
        self.pods: dict[str, Pod] = {}
        self.hosts = {S3: HOST}
        self.head = self._start("headgroup", "head")
        self.hosts[ray_job.service] = self.pods["head"].address
        wait_for(lambda: self.head.ended() or answers(f"http://{self.pods['head'].address}{HEALTH}"), "a healthy head")
        group = ray_job.spec["workerGroupSpecs"][0]
        names = [f"worker-{number}" for number in range(group["replicas"])]
        for name in names:
            self._pod(name, group["template"]["spec"]).run(ray_job.init_command(), self._environment(group, name))
        self.workers: dict[str, Container] = {}
        for name in names:
            (waiting,) = self.pods[name].containers
            wait_for(lambda: waiting.ended() or self.head.ended(), "the head")  # noqa: B023
            assert not self.head.ended(), "the head has ended"
            command = ray_job.container_command(group["groupName"])
            self.workers[name] = self.pods[name].run(command, self._environment(group, name))
        wait_for(lambda: bool(self._ended()) or self._healthy(), "healthy pods")
        assert not self._ended(), f"{self._ended()} ended"
        template = ray_job.job["spec"]["submitterPodTemplate"]["spec"]
        self.submitter = self._pod("submitter", template).run(ray_job.submit_command(), ray_job.submitter_environment())

    def _healthy(self) -> bool:
        """By the liveness and readiness probe that KubeRay gives the pods."""
        return all(answers(f"http://{pod.address}{HEALTH}") for pod in self.pods.values())

    def _ended(self) -> list[str]:
        return [name for name, one in {"head": self.head, **self.workers}.items() if one.ended()]

    def _pod(self, name: str, spec: Document) -> Pod:
        name_there = f"{self.ray_job.cluster}-{name}"
        self.pods[name] = Pod(name_there, next(self.numbers), spec, self.directory, self.hosts, self.config_maps)
        return self.pods[name]

    def _start(self, group: str, name: str) -> Container:
        pod = self._pod(name, self.ray_job.groups()[group]["template"]["spec"])
        return pod.run(self.ray_job.container_command(group), self.ray_job.environment(group, pod.name))

    def _environment(self, group: Document, name: str) -> dict[str, str]:
        return self.ray_job.environment(group["groupName"], self.pods[name].name)

    def scraped(self) -> list[tuple[str, dict[str, str], dict[str, int]]]:
        found = []
        for name, pod in self.pods.items():
            if name != "submitter":
                group = "headgroup" if name == "head" else self.ray_job.spec["workerGroupSpecs"][0]["groupName"]
                ports = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
                found.append((pod.address, self.ray_job.labels(group), ports))
        return found

    def dashboard(self, path: str, token: str | None = TOKEN) -> bytes:
        return get(f"http://{self.pods['head'].address}:8265{path}", token)

    def state(self) -> str:
        return json.loads(self.dashboard(f"/api/jobs/{self.ray_job.job['spec']['jobId']}"))["status"]

    def end(self) -> None:
        for pod in self.pods.values():
            pod.keep_logs()
            pod.kill()


def drive(directory: Path, node: swift_node.SwiftNode) -> dict[str, Any]:
    forwarded(9000, node.port)
    os.environ.update(node.environment)
    boto3.client("s3").create_bucket(Bucket="grids")
    shutil.copytree(WEIGHTS / "loras", directory / "mine")
    shutil.copytree(WEIGHTS / "base", directory / "mine/base")
    manifest = directory / "mine/grid.yaml"
    manifest.write_text(MANIFEST)
    pods = directory / "pods"
    pods.mkdir()
    rendered = told("deploy", "render", manifest, *(f"--{name}={value}" for name, value in RENDERED_WITH.items()))
    (pods / "rendered.yaml").write_text(rendered)
    documents = list(yaml.safe_load_all(rendered))
    (job,) = [one for one in documents if one["kind"] == "RayJob"]
    planned = {one.job_id: (one.subject.id, one.style.id, one.seed) for one in plan(read_manifest(str(manifest))).jobs}

    search = Search({"Ray token": TOKEN, "S3 secret key": SECRET_KEY})
    processes = Processes(search)
    processes.start()
    catalog, prometheus = Catalog("s3://grids/catalog"), Prometheus(pods, told("deploy", "alerts"))
    numbers = iter(range(2, 250))
    pages: dict[str, bytes] = {}
    figures: dict[str, Any] = {"jobs": len(planned), "entrypoint": job["spec"]["entrypoint"]}

    say("first attempt")
    first = Cluster(RayJob(job, "x7k2p", NAMESPACE, SECRETS), pods, numbers, documents)
    figures["command lines of the containers"] = {name: one.command() for name, one in first.workers.items()}
    figures["command lines of the containers"]["head"] = first.head.command()
    prometheus.scrape(first.scraped())
    figures["without the token"] = refusal(lambda: first.dashboard("/api/jobs/", token=None))
    wait_for(lambda: len(catalog.committed()) >= 3, "three pairs")
    wait_for(lambda: prometheus.number("ziplora_jobs{state='committed'}") >= 3, "their scrape")
    time.sleep(6)  # rates want two scrapes
    status = ["status", "--output", "s3://grids/catalog", manifest, "--address"]
    figures["ziplora status"] = told(
        *status, f"http://{first.pods['head'].address}:8265", RAY_AUTH_TOKEN=TOKEN
    ).splitlines()
    figures["targets"] = prometheus.targets()
    assert {health for one in figures["targets"].values() for health in one} == {"up"}, figures["targets"]
    figures["alert rules"] = prometheus.rules()
    assert all(one.startswith("ok, ") for one in figures["alert rules"].values()), figures["alert rules"]
    n, empty, unknown = prometheus.ask_dashboard(job["metadata"]["name"])
    assert not unknown, unknown
    assert all(empty.values()), empty  # a query is without result because a metric has no series yet, or is wrong
    figures["dashboard"] = {
        "queries": n,
        "unknown metrics": unknown,
        "unknown in a query of ziplora_jobz": prometheus.unknown(["sum(ziplora_jobz{})"]),
        "with a result": n - len(empty),
        "no series in a run without faults": empty,
    }
    assert figures["dashboard"]["unknown in a query of ziplora_jobz"] == ["ziplora_jobz"]
    pages |= prometheus.pages()
    for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/actors?detail=true", "/api/cluster_status"):
        pages[path] = first.dashboard(path)

    say("drain")
    before, asked = len(catalog.committed()), time.monotonic()
    first.workers["worker-0"].send(signal.SIGTERM)  # as the kubelet does, to process 1
    grace = first.pods["worker-0"].spec["terminationGracePeriodSeconds"]
    code = first.workers["worker-0"].wait(grace)
    wait_for(lambda: len(catalog.committed()) > before, "a pair after the drain")
    figures["drained worker"] = {
        "seconds from SIGTERM to its end": round(time.monotonic() - asked, 1),
        "grace period": grace,
        "exit code": code,
        "committed before and after": [before, len(catalog.committed())],
        "attempts that failed": prometheus.number('sum(ziplora_attempts_total{outcome!~"committed|already"})'),
    }
    assert figures["drained worker"]["attempts that failed"] == 0

    say("head killed")
    pages |= {f"{url} (later)": page for url, page in prometheus.pages().items()}
    first.head.send(signal.SIGKILL)
    first.head.wait()
    then = {entry.job_id: entry.attempt for entry in catalog.entries()}
    assert len(then) < len(planned), "the run was over before its head was killed"
    follower = first.submitter.wait(300)
    first.end()
    figures["head killed"] = {"committed by then": len(then), "exit code of the submitter": follower}

    say("second attempt")
    second = Cluster(RayJob(job, "9qd4m", NAMESPACE, SECRETS), pods, numbers, documents)
    prometheus.scrape(second.scraped())
    code = second.submitter.wait(900)
    entries = list(catalog.entries())
    figures["second attempt"] = {
        "state of the Ray job": second.state(),
        "exit code of the submitter": code,
        "entries": len(entries),
        "done again though committed": sum(then[e.job_id] != e.attempt for e in entries if e.job_id in then),
        "its log": [line for line in second.pods["submitter"].log.read_text().splitlines() if " merges, " in line]
        + re.findall(r"^committed .+", second.pods["submitter"].log.read_text(), re.MULTILINE),
    }
    second.end()
    checked = list(catalog.verify())
    figures["catalog"] = {
        "entries": len(entries),
        "pairs with one entry": sum(n == 1 for n in Counter(planned[e.job_id] for e in entries).values()),
        "objects": len(checked),
        "objects that are not as promised": sum(bool(one.problem) for one in checked),
        "given up": len(catalog.given_up()),
        "garbage, of attempts that were cut off": len(catalog.garbage(now=datetime.now(UTC) + timedelta(days=30))),
    }
    assert figures["second attempt"]["state of the Ray job"] == "SUCCEEDED"
    assert {entry.job_id for entry in entries} == planned.keys()
    assert figures["catalog"]["pairs with one entry"] == len(planned)
    assert figures["second attempt"]["done again though committed"] == 0
    assert figures["catalog"]["objects that are not as promised"] == figures["catalog"]["given up"] == 0

    say("credentials")
    processes.stop()
    figures["credentials"] = searched(search, processes, pods, pages)
    return figures


def searched(search: Search, processes: Processes, pods: Path, pages: dict[str, bytes]) -> dict[str, Any]:
    """Nothing is found; and what is then put there is."""

    def look() -> tuple[dict[str, Found], dict[str, int]]:
        contents = {
            "files: rendered YAML, logs of pods and of Ray, caches": files(pods, leave_out=["tsdb"]),
            "metrics ports, all series, Ray's dashboard": pages.items(),
            "objects of the bucket": objects(open_store("s3://grids")),
            "command lines": ((line.replace(b"\0", b" ").decode()[:80], line) for line in processes.command_lines),
        }
        both = {what: search.through(one) for what, one in contents.items()}
        return {what: found for what, (found, _) in both.items()}, {what: n for what, (_, n) in both.items()}

    found, searched = look()
    assert not any(found.values()), found
    assert processes.variables == {"RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"}, processes.variables
    with next(pods.rglob("ray-logs/gcs_server.out")).open("a") as log:
        log.write(f"connecting with {TOKEN}\n")
    open_store("s3://grids").put("planted.json", json.dumps({"key": SECRET_KEY}).encode())
    pages["planted"] = b'ziplora_build_info{token="' + search.forms["Ray token"][1] + b'="} 1'
    shown = subprocess.Popen(["bash", "-c", f"exec -a --key={SECRET_KEY} sleep 60"])
    try:
        wait_for(lambda: SECRET_KEY.encode() in Path(f"/proc/{shown.pid}/cmdline").read_bytes(), "a command line")
        processes.look()
    finally:
        shown.kill()
        shown.wait()
    after, _ = look()
    assert [len(one) for one in after.values()] == [1, 1, 1, 1], after
    return {
        "searched": searched,
        "found": {what: sorted(one) for what, one in found.items()},
        "variables of the pods' processes that hold one": sorted(processes.variables),
        "found of four that were then planted, one of each kind": sum(len(one) for one in after.values()),
    }


def told(*words: object, **environment: str) -> str:
    """What `ziplora …` prints."""
    command = [str(BIN / "ziplora"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(ask: Callable[[], bytes]) -> int:
    """The HTTP status with which it is refused."""
    try:
        ask()
    except urllib.error.HTTPError as error:
        return error.code
    raise AssertionError("it was not refused")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def prometheus_version() -> str:
    done = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).split()[2]


def promtool(directory: Path) -> str:
    """Its last word on the tests of the alerts, where each fires and clears."""
    (directory / "rules.yml").write_text(told("deploy", "alerts"))
    shutil.copy(ROOT / "deploy/monitoring/alerts_test.yml", directory)
    words = ["promtool", "test", "rules", str(directory / "alerts_test.yml")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return (done.stdout + done.stderr).split()[-1]


def main() -> None:
    """Makes and removes what is seen outside; the rest is in namespaces, and ends with the first process there."""
    if inside := os.environ.get("ZIPLORA_PODS"):
        return run(Path(inside))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scratch = tempfile.TemporaryDirectory(prefix="pods-", ignore_cleanup_errors=True)
    with scratch as temporary, mount_points("/cache", "/etc/ziplora"):
        Path(temporary).chmod(0o755)
        environment = {**os.environ, "ZIPLORA_PODS": temporary, "OMP_NUM_THREADS": "1"}
        words = ["unshare", "-n", "-p", "--fork", "--kill-child", "--mount-proc"]
        own = [sys.executable, "-m", "tests.bench.pods"]
        bench = subprocess.Popen([*words, *own], env=environment, preexec_fn=killed_with_parent)
        try:
            code = bench.wait()
        finally:  # when the first process of its namespace has ended, so have all others
            for first in psutil.Process().children() if bench.poll() is None else []:
                for process in first.children():
                    process.kill()
            bench.wait()
    sys.exit(code)


def run(directory: Path) -> None:
    make_bridge()
    swift_node.FILTERS["tempauth"] = f"user_test_tester = {SECRET_KEY} .admin\n"
    swift_node.FILTERS["s3api"] = swift_node.FILTERS["s3api"].replace(swift_node.REGION, REGION)
    figures: dict[str, Any] = {
        "manifest": MANIFEST.splitlines(),
        "options of deploy render": RENDERED_WITH,
        "with": {"KubeRay's ways": "1.7.0", "swift": swift_node.SWIFT, "prometheus": prometheus_version()},
        "promtool test rules": promtool(directory),
    }
    began = time.monotonic()
    try:
        with swift_node.swift_node(directory / "swift") as node:
            node.environment |= {"AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": REGION}
            figures |= drive(directory, node)
    except BaseException:
        for log in directory.rglob("stdout.log"):
            print(f"--- {log.parent.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
        raise
    figures["seconds"] = round(time.monotonic() - began)
    save(RESULT, figures)
    print(json.dumps(figures, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
