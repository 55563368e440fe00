"""What goes to Kubernetes: every overlay and rendered manifest against schemas, operator rules and pod security; each
check proven able to fail."""

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.deploy import IMAGE, KUSTOMIZE, Wanted, overlays, rendered
from service.deploy_dashboard import check_query, dashboard, metric_names
from service.errors import BadInput, ManifestError
from service.kustomize import build, json_patched, to_yaml
from service.manifest import parse_manifest
from service.ray_jobs import ID
from tests.commands import ziplora
from tests.kube_rules import problems

Document = dict[str, Any]
MANIFEST = b"""\
base: s3://models/sdxl
subjects: {dog: {lora: s3://loras/dog.safetensors, prompt: a photo of sks dog}}
styles: {ink: {lora: /models/ink.safetensors, prompt: a house in szn style}}
output: s3://bucket/catalog
"""
DEPLOY = KUSTOMIZE.parent


def documents(overlay: str, tmp_path: Path, **wishes: Any) -> dict[str, Document]:
    """By kind."""
    path = tmp_path / "grid.yaml"
    path.write_bytes(MANIFEST)
    manifest = parse_manifest(MANIFEST, name=str(path), directory=str(tmp_path))
    return {document["kind"]: document for document in rendered(manifest, Wanted(overlay, **wishes))}


@pytest.mark.parametrize("overlay", overlays())
@pytest.mark.parametrize("wishes", [{}, {"workers": 3, "namespace": "grids"}], ids=str)
def test_every_overlay_and_what_is_rendered_of_it_is_valid(overlay: str, wishes: Any, tmp_path: Path) -> None:
    made = documents(overlay, tmp_path, **wishes).values() if wishes else build(KUSTOMIZE / "overlays" / overlay)
    for document in made:
        assert problems(document) == [], document["kind"]


def test_kubectl_renders_the_same(tmp_path: Path) -> None:
    """Where there is a kubectl; the own rendering is what `ziplora deploy render` uses."""
    for directory in (*(KUSTOMIZE / "overlays").iterdir(), KUSTOMIZE / "monitoring"):
        ours = {(one["kind"], one["metadata"]["name"]): one for one in build(directory)}
        assert ours
        assert {
            (one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(to_yaml(ours.values()))
        } == ours
        if shutil.which("kubectl"):
            done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=True)
            theirs = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout)}
            assert ours == theirs


def at(document: Document, *path: Any) -> Any:
    for part in path:
        document = document[part]
    return document


CLUSTER = ("spec", "rayClusterSpec")
HEAD = (*CLUSTER, "headGroupSpec", "template", "spec")
GROUP = (*CLUSTER, "workerGroupSpecs", 0)
WORKER = (*GROUP, "template", "spec")
SUBMITTER = ("spec", "submitterPodTemplate", "spec")
MUTATIONS: dict[str, Callable[[Document], Any]] = {
    # schema
    "a typo": lambda job: job["spec"].update(backofLimit=3),
    "a typo in a pod": lambda job: at(job, *WORKER).update(tolerationss=[]),
    "a wrong type": lambda job: job["spec"].update(backoffLimit="4"),
    "an unknown auth mode": lambda job: at(job, *CLUSTER, "authOptions").update(mode="tokens"),
    # operator
    "a long name": lambda job: job["metadata"].update(name="z" * 48),
    "a strange mode": lambda job: job["spec"].update(submissionMode="K8sJob"),
    "a ttl without an end": lambda job: job["spec"].update(shutdownAfterJobFinishes=False),
    "rules beside an end": lambda job: job["spec"].update(
        deletionStrategy={"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]}
    ),
    "a restart under autoscaler v2": lambda job: at(job, *WORKER).update(restartPolicy="Always"),
    "resources twice": lambda job: (
        at(job, *GROUP).update(resources={"CPU": "4"}),
        at(job, *GROUP, "rayStartParams").update({"num-cpus": "4"}),
    ),
    "no token": lambda job: at(job, *CLUSTER).pop("authOptions"),
    "work on the head": lambda job: at(job, *CLUSTER, "headGroupSpec", "rayStartParams").pop("num-cpus"),
    "more replicas than the most": lambda job: at(job, *GROUP).update(replicas=9),
    "an object store beyond /dev/shm": lambda job: at(job, *GROUP, "rayStartParams").pop("object-store-memory"),
    "killed while draining": lambda job: at(job, *WORKER).update(terminationGracePeriodSeconds=60),
    # pod security
    "root": lambda job: at(job, *HEAD, "securityContext").update(runAsUser=0),
    "perhaps root": lambda job: at(job, *HEAD, "securityContext").pop("runAsNonRoot"),
    "no seccomp": lambda job: at(job, *WORKER, "securityContext").pop("seccompProfile"),
    "escalation": lambda job: at(job, *SUBMITTER, "containers", 0, "securityContext").pop("allowPrivilegeEscalation"),
    "capabilities": lambda job: at(job, *WORKER, "containers", 0, "securityContext").pop("capabilities"),
    "added capabilities": lambda job: at(job, *WORKER, "containers", 0, "securityContext", "capabilities").update(
        add=["SYS_ADMIN"]
    ),
    "privileged": lambda job: at(job, *HEAD, "containers", 0, "securityContext").update(privileged=True),
    "the host's network": lambda job: at(job, *HEAD).update(hostNetwork=True),
    "the host's disk": lambda job: at(job, *HEAD, "volumes").append({"name": "x", "hostPath": {"path": "/"}}),
    "a host port": lambda job: at(job, *HEAD, "containers", 0, "ports", 0).update(hostPort=6379),
    "limits beyond requests": lambda job: at(job, *HEAD, "containers", 0, "resources", "limits").update(cpu="4"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_check_can_fail(mutation: str, tmp_path: Path) -> None:
    job = copy.deepcopy(documents("gpu", tmp_path)["RayJob"])
    assert problems(job) == []
    MUTATIONS[mutation](job)
    assert problems(job)


def test_a_suspended_job_needs_an_end_and_a_queue_needs_suspension(tmp_path: Path) -> None:
    for field, value in (("shutdownAfterJobFinishes", False), ("suspend", False)):
        job = copy.deepcopy(documents("kueue", tmp_path)["RayJob"])
        job["spec"].pop("ttlSecondsAfterFinished")
        assert problems(job) == []
        job["spec"][field] = value
        assert problems(job)


def test_core_kinds_are_checked_strictly(tmp_path: Path) -> None:
    for kind, path in (
        ("NetworkPolicy", ("spec", "podSelector")),
        ("ServiceAccount", ("metadata",)),
        ("PodDisruptionBudget", ("spec",)),
        ("ConfigMap", ()),
    ):
        document = copy.deepcopy(documents("gpu", tmp_path)[kind])
        at(document, *path)["matchLabel"] = {}
        assert problems(document), kind


# What is filled in


def test_a_range_of_workers_takes_the_place_of_the_fixed_number(tmp_path: Path) -> None:
    range = ("--min-workers", "2", "--max-workers", "6")
    made = documents("gpu", tmp_path, workers=6, run_options=range)["RayJob"]
    assert made["spec"]["entrypoint"] == (
        "ziplora run /etc/ziplora/manifest.yaml --address auto --device cuda --metrics-port 9400 --given-up-ok"
        " --min-workers 2 --max-workers 6"
    )
    assert at(made, *GROUP, "maxReplicas") == 6


def test_names_come_from_the_digest_and_hang_together(tmp_path: Path) -> None:
    made = documents("gpu", tmp_path, workers=3, image="registry/ziplora:1", run_options=("--attempts", "5"))
    job, config, budget = made["RayJob"], made["ConfigMap"], made["PodDisruptionBudget"]
    name = job["metadata"]["name"]
    assert name.startswith("ziplora-")
    assert len(name) == 24
    assert config["metadata"]["name"] == f"{name}-manifest"
    assert config["data"]["manifest.yaml"].encode() == MANIFEST
    assert at(job, *HEAD, "volumes")[0]["configMap"]["name"] == f"{name}-manifest"
    labels = at(job, *CLUSTER, "headGroupSpec", "template", "metadata", "labels")
    assert set(budget["spec"]["selector"]["matchLabels"].items()) - set(labels.items()) == {
        ("ray.io/node-type", "head")
    }
    assert job["spec"]["entrypoint"] == (
        "ziplora run /etc/ziplora/manifest.yaml --address auto --device cuda --workers 3 --metrics-port 9400"
        " --given-up-ok --attempts 5"
    )
    assert ID.fullmatch(job["spec"]["jobId"])
    assert job["spec"]["metadata"]["catalog"] == "s3://bucket/catalog"
    assert [at(job, *GROUP, field) for field in ("replicas", "minReplicas", "maxReplicas")] == [0, 0, 3]
    images = {container["image"] for container in (*at(job, *HEAD, "containers"), *at(job, *WORKER, "containers"))}
    assert images == {"registry/ziplora:1"}
    assert documents("gpu", tmp_path, output="s3://other/place")["RayJob"]["metadata"]["name"] != name
    fixed = documents("kueue", tmp_path, workers=5)["RayJob"]
    assert [at(fixed, *GROUP, field) for field in ("replicas", "minReplicas", "maxReplicas")] == [5, 5, 5]


def test_a_manifest_in_object_storage_needs_no_config_map(tmp_path: Path) -> None:
    made = documents("gpu", tmp_path, manifest_url="s3://b/grid.yaml")
    assert "ConfigMap" not in made
    assert problems(made["RayJob"]) == []
    assert "/etc/ziplora" not in json.dumps(made)
    assert made["RayJob"]["spec"]["entrypoint"].startswith("ziplora run s3://b/grid.yaml --address auto")


def test_an_existing_cluster_is_submitted_to(tmp_path: Path) -> None:
    made = documents("existing-cluster", tmp_path, address="http://mine:8265", workers=4, output="s3://b/c")
    pod = made["Job"]["spec"]["template"]["spec"]
    (submit,), (follow,) = pod["initContainers"], pod["containers"]
    assert " ".join(submit["command"]) == (
        "ziplora submit --output s3://b/c /etc/ziplora/manifest.yaml -- --given-up-ok --workers 4"
    )
    assert follow["command"] == ["ziplora", "logs", "--output", "s3://b/c", "--follow", "/etc/ziplora/manifest.yaml"]
    assert {"name": "RAY_API_SERVER_ADDRESS", "value": "http://mine:8265"} in submit["env"]


def test_models_may_come_from_a_volume(tmp_path: Path) -> None:
    for option in ("models-pvc", "models-image"):
        job = documents("gpu", tmp_path, options=(option,))["RayJob"]
        assert problems(job) == []
        assert {"name": "models", "mountPath": "/models", "readOnly": True} in at(
            job, *WORKER, "containers", 0, "volumeMounts"
        )


def test_whose_volume_or_image_is_said_with_the_option(tmp_path: Path) -> None:
    for option, path in (
        ("models-pvc=weights", ("persistentVolumeClaim", "claimName")),
        ("models-image=registry/sdxl:1", ("image", "reference")),
    ):
        job = documents("gpu", tmp_path, options=(option,))["RayJob"]
        assert problems(job) == []
        for pod in (HEAD, WORKER):
            (volume,) = [one for one in at(job, *pod, "volumes") if one["name"] == "models"]
            assert at(volume, *path) == option.partition("=")[2]
    with pytest.raises(BadInput, match="--with models-pvc is for overlays that make a cluster"):
        documents("existing-cluster", tmp_path, options=("models-pvc",))


def test_what_pods_would_not_find_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"unknown overlay gpus; did you mean gpu\? known: cpu-smoke"):
        documents("gpus", tmp_path)
    with pytest.raises(BadInput, match="unknown option pvc"):
        documents("gpu", tmp_path, options=("pvc",))
    (tmp_path / "dog.safetensors").touch()
    for old, new, message in (
        (b"s3://loras/dog", b"dog", "names 1 files by relative paths, which pods do not have: give --via s3://"),
        (b"s3://bucket/catalog", b"catalog", "catalog is a relative path"),
        (b"output:", b"# " + b"x" * 1_000_001 + b"\noutput:", "a ConfigMap takes 1,000,000: give --via"),
    ):
        source = MANIFEST.replace(old, new)
        (tmp_path / "grid.yaml").write_bytes(source)
        manifest = parse_manifest(source, name=str(tmp_path / "grid.yaml"), directory=str(tmp_path))
        with pytest.raises(ManifestError, match=message):
            rendered(manifest, Wanted("gpu"))


def test_the_command_prints_it(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_bytes(MANIFEST)
    done = ziplora(
        "deploy", "render", tmp_path / "grid.yaml", "--overlay", "gpu", "--workers", 2, "--", "--attempts", 9
    )
    assert done.returncode == 0, done.stderr
    printed = list(yaml.safe_load_all(done.stdout))
    assert {one["kind"] for one in printed} == set(documents("gpu", tmp_path))
    assert "--attempts 9" in done.stdout
    wrong = ziplora("deploy", "render", tmp_path / "grid.yaml", "--overlay", "gpu", "--", "--atempts", 9)
    assert wrong.returncode == 2


@pytest.mark.parametrize("command", ["render grid.yaml --overlay gpu", "dashboard"])
def test_what_make_client_installs_is_all_that_rendering_takes(command: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_bytes(MANIFEST)
    tell = "atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    code = f"import atexit, sys; {tell}; from service.cli import main; main()"
    words = [sys.executable, "-c", code, "deploy", *command.split()]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = {module.partition(".")[0].lower() for module in done.stderr.split()}
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    needs = {re.match(r"[\w-]+", one)[0] for one in project["dependencies"]}  # type: ignore[index]
    (installed,) = re.findall(r"^\t+(boto3 .+) 2>", (DEPLOY.parent / "Makefile").read_text(), re.MULTILINE)
    called = {"pillow": "pil", "pyyaml": "yaml"}
    assert "click" in loaded
    assert not {one for one in needs - set(installed.split()) if called.get(one, one.replace("-", "_")) in loaded}


def test_what_make_client_leaves_out_is_named_where_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_bytes(MANIFEST)
    code = "import sys; sys.modules['ray'] = None; from service.cli import main; main()"
    words = [sys.executable, "-c", code, "status", "grid.yaml", "--address", "http://127.0.0.1:1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "this command takes ray, which is not in this environment" in " ".join(done.stderr.split())
    assert "defect" not in done.stderr


def test_patches_that_miss_are_refused() -> None:
    document = {"kind": "X", "a": {"b/c": [1, 2]}}
    assert json_patched(document, [{"op": "add", "path": "/a/b~1c/-", "value": 3}])["a"] == {"b/c": [1, 2, 3]}
    assert document["a"] == {"b/c": [1, 2]}
    for operation in (
        {"op": "replace", "path": "/a/d", "value": 1},
        {"op": "remove", "path": "/e/f"},
        {"op": "add", "path": "/a/b~1c/x", "value": 1},
    ):
        with pytest.raises(BadInput, match="which is not there"):
            json_patched(document, [operation])
    with pytest.raises(BadInput, match="wants to move"):
        json_patched(document, [{"op": "move", "path": "/a"}])


# Dashboard and alerts


def test_the_dashboard_is_the_one_that_is_built_and_asks_for_what_is_exported() -> None:
    made = dashboard()
    assert json.loads((DEPLOY / "monitoring/dashboard.json").read_text()) == made, "run `ziplora deploy dashboard`"
    asked = {target["expr"] for panel in made["panels"] for target in panel.get("targets", [])}
    assert len(asked) > 20
    for query in asked:
        check_query(query)
    with pytest.raises(ValueError, match="no run exports ziplora_jobz"):
        check_query("sum(ziplora_jobz)")
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    assert not [panel for panel in made["panels"] if panel["gridPos"]["x"] + panel["gridPos"]["w"] > 24]


def test_alerts_ask_for_what_is_exported_and_have_a_section_each_in_the_runbook() -> None:
    (rule,) = build(KUSTOMIZE / "monitoring")[-1:]
    runbook = (DEPLOY / "README.md").read_text()
    alerts = [one for group in rule["spec"]["groups"] for one in group["rules"]]
    assert len(alerts) == 6
    for alert in alerts:
        check_query(alert["expr"])
        assert f"### {alert['alert']}\n" in runbook
        assert alert["annotations"]["runbook_url"].endswith(f"#{alert['alert'].lower()}")
    assert "ziplora_eta_seconds" in metric_names()


def test_alerts_fire_and_clear(tmp_path: Path) -> None:
    """Where there is a promtool; `make check-alerts` demands one."""
    rules, tests = tmp_path / "rules.yml", tmp_path / "alerts_test.yml"
    rules.write_text(ziplora("deploy", "alerts").stdout)
    shutil.copy(DEPLOY / "monitoring/alerts_test.yml", tests)
    alerts = {one["alert"] for group in yaml.safe_load(rules.read_text())["groups"] for one in group["rules"]}
    cases = [one for test in yaml.safe_load(tests.read_text())["tests"] for one in test["alert_rule_test"]]
    assert {one["alertname"] for one in cases if one["exp_alerts"]} == alerts
    assert {one["alertname"] for one in cases if not one["exp_alerts"]} == alerts
    if promtool := shutil.which("promtool"):
        done = subprocess.run([promtool, "test", "rules", tests], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_one_version_of_ray_and_of_this_program_everywhere() -> None:
    root = DEPLOY.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (ray,) = re.findall(r"^ray==(.+)$", (DEPLOY / "constraints.txt").read_text(), re.MULTILINE)
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"ray[default]=={ray}" in project["dependencies"]
    assert set(re.findall(r"rayproject/ray:([\d.]+)-", dockerfile)) == {ray}
    assert f'image.version="{project["version"]}"' in dockerfile
    assert f"ziplora:{project['version']}" == IMAGE
    (job,) = [one for one in build(KUSTOMIZE / "base") if one["kind"] == "RayJob"]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray


def test_compose_opens_nothing_to_others_and_keeps_secrets_out() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"], name
        assert ":latest" not in service["image"]
        assert "${" not in str(service.get("command")), f"{name} shows a secret on its command line"
    environment = compose["x-ziplora"]["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert all(environment[name].startswith("${") for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"))


def test_ports_that_are_scraped_are_ports_that_are_there(tmp_path: Path) -> None:
    head, workers, _ = build(KUSTOMIZE / "monitoring")
    job = documents("gpu", tmp_path)["RayJob"]
    for monitor, pod in ((head, at(job, *HEAD)), (workers, at(job, *WORKER))):
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        asked = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
        assert set(asked) <= set(ports)
    ports = {port["name"]: port["containerPort"] for port in at(job, *HEAD, "containers", 0, "ports")}
    assert f"--metrics-port {ports['ziplora']}" in job["spec"]["entrypoint"]
