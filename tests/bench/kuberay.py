"""What KubeRay 1.7 adds to a rendered RayJob: names, command lines and environment of its pods, as the operator's
source has them (https://github.com/ray-project/kuberay, ray-operator/controllers/ray/common/pod.go and job.go). Without
the autoscaler's container, which talks to the Kubernetes API alone."""

import json
import math
import shlex
from collections.abc import Mapping
from typing import Any

Document = dict[str, Any]
Secrets = Mapping[str, Mapping[str, str]]  # by name, what the cluster's Secrets hold
SHELL = ["/bin/bash", "-c", "--"]
GCS_PORT, DASHBOARD_PORT, METRICS_PORT, AGENT_PORT = 6379, 8265, 8080, 52365
HEALTH = f":{AGENT_PORT}/api/healthz"  # of liveness and readiness probes, which the kubelet makes without a token
UNITS = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def quantity(text: str) -> float:
    """A number as Kubernetes writes it: 500m is 0.5, 2Gi is 2³¹."""
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)


class RayJob:
    """A rendered RayJob and one RayCluster made of it, which is called `<job>-<suffix>`."""

    def __init__(self, job: Document, suffix: str, namespace: str, secrets: Secrets) -> None:
        self.job, self.namespace, self.secrets = job, namespace, secrets
        self.cluster = f"{job['metadata']['name']}-{suffix}"
        self.spec: Document = job["spec"]["rayClusterSpec"]
        self.service = f"{self.cluster}-head-svc.{namespace}.svc.cluster.local"
        self.dashboard = f"http://{self.service}:{DASHBOARD_PORT}"

    def groups(self) -> dict[str, Document]:
        return {"headgroup": self.spec["headGroupSpec"], **{g["groupName"]: g for g in self.spec["workerGroupSpecs"]}}

    def labels(self, group: str) -> dict[str, str]:
        kind = "head" if group == "headgroup" else "worker"
        own = self.groups()[group]["template"]["metadata"]["labels"]
        return {**own, "ray.io/node-type": kind, "ray.io/group": group, "ray.io/cluster": self.cluster}

    def start_command(self, group: str) -> str:
        """`ray start` with what its limits say and the rendered rayStartParams do not."""
        spec, is_head = self.groups()[group], group == "headgroup"
        limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
        parameters = {
            "num-cpus": math.ceil(quantity(str(limits["cpu"]))),
            "memory": int(quantity(limits["memory"])),
            "metrics-export-port": METRICS_PORT,
            "dashboard-agent-listen-port": AGENT_PORT,
            **({} if is_head else {"address": f"{self.service}:{GCS_PORT}"}),
            **spec["rayStartParams"],
            "block": "true",
        }
        flags = " ".join(
            f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(parameters.items())
        )
        return f"ray start {'--head ' if is_head else ''}{flags}"

    def container_command(self, group: str) -> list[str]:
        return [*SHELL, f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {self.start_command(group)}"]

    def init_command(self) -> list[str]:
        """Of a worker's init container wait-gcs-ready."""
        check = f"ray health-check --address {self.service}:{GCS_PORT}"
        return [*SHELL, f"until {check} > /dev/null 2>&1; do sleep 5; done"]

    def environment(self, group: str, pod: str) -> dict[str, str]:
        """Of the Ray container: Secrets, what is rendered, what the operator adds."""
        container = self.groups()[group]["template"]["spec"]["containers"][0]
        head = "127.0.0.1" if group == "headgroup" else self.service
        return {
            **_from_secrets(container, self.secrets),
            **_own(container, self.secrets),
            **self._token(),
            "RAY_CLUSTER_NAME": self.cluster,
            "RAY_CLUSTER_NAMESPACE": self.namespace,
            "RAY_CLOUD_INSTANCE_ID": pod,
            "RAY_NODE_TYPE_NAME": group,
            "KUBERAY_GEN_RAY_START_CMD": self.start_command(group),
            "RAY_PORT": str(GCS_PORT),
            "RAY_ADDRESS": f"{head}:{GCS_PORT}",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
            "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
            **({} if group == "headgroup" else {"FQ_RAY_IP": head, "RAY_IP": head.partition(".")[0]}),
        }

    def submit_command(self) -> list[str]:
        """Of the submitter's Job: submit unless it is there, then follow. How it looks whether the dashboard is up is
        this module's own."""
        spec, address = self.job["spec"], f"--address {self.dashboard}"
        look = f"import urllib.request as u; u.urlopen('{self.dashboard}/api/gcs_healthz', timeout=5)"
        metadata = json.dumps(json.dumps(spec["metadata"]))
        submit = f"ray job submit {address} --no-wait --metadata-json {metadata} --submission-id {spec['jobId']}"
        script = (
            f"until python -c {shlex.quote(look)} >/dev/null 2>&1 ; do sleep 2 ; done ;"
            f" if ! ray job status {address} {spec['jobId']} >/dev/null 2>&1 ;"
            f" then {submit} -- {spec['entrypoint'].strip()} ; fi ;"
            f" ray job logs {address} --follow {spec['jobId']}"
        )
        return ["/bin/bash", "-ce", "--", script]

    def submitter_environment(self) -> dict[str, str]:
        container = self.job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]
        return {
            **_from_secrets(container, self.secrets),
            **_own(container, self.secrets),
            **self._token(),
            "RAY_DASHBOARD_ADDRESS": self.dashboard.removeprefix("http://"),
            "RAY_JOB_SUBMISSION_ID": self.job["spec"]["jobId"],
            "PYTHONUNBUFFERED": "1",
        }

    def _token(self) -> dict[str, str]:
        options = self.spec["authOptions"]
        token = self.secrets[options["secretName"]]["auth_token"]
        return {"RAY_AUTH_MODE": options["mode"], "RAY_AUTH_TOKEN": token}


def _from_secrets(container: Document, secrets: Secrets) -> dict[str, str]:
    names = [one["secretRef"]["name"] for one in container.get("envFrom", [])]
    return {name: value for secret in names for name, value in secrets.get(secret, {}).items()}


def _own(container: Document, secrets: Secrets) -> dict[str, str]:
    found = {}
    for one in container.get("env", []):
        reference = one.get("valueFrom", {}).get("secretKeyRef")
        found[one["name"]] = secrets[reference["name"]][reference["key"]] if reference else one["value"]
    return found
