"""What a Kubernetes API server, KubeRay's operator and the pod security standard would say of a document, offline."""

import copy
import gzip
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

Document = dict[str, Any]
CRD = Path(__file__).parent / "data/ray.io_rayjobs.yaml.gz"
KUBERNETES = "1.37"
MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
SAFE_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
SAFE_VOLUMES |= {"secret", "image"}


def problems(document: Document) -> list[str]:
    """All that is wrong with it: schema, and for a RayJob the operator's rules; pod security of every pod in it."""
    found = []
    if document["apiVersion"].startswith("ray.io/"):
        faults = list(_rayjob().iter_errors(document))
        found += [f"{'/'.join(map(str, fault.path))}: {fault.message[:200]}" for fault in faults]
        found += operator_problems(document) if not found else []
    elif not document["apiVersion"].startswith("monitoring.coreos.com/"):
        try:
            kubernetes_validate.validate(copy.deepcopy(document), KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(error.message)
    return found + [problem for pod in pods(document) for problem in restricted_problems(pod)]


@cache
def _rayjob() -> jsonschema.Draft7Validator:
    crd = yaml.load(gzip.decompress(CRD.read_bytes()), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)


def _strict(schema: Any) -> Any:
    """A CRD's schema passes over unknown fields; here an object with declared fields has no others."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {
        key: {name: _strict(one) for name, one in value.items()} if key == "properties" else _strict(value)
        for key, value in schema.items()
    }
    if out.pop("x-kubernetes-int-or-string", False):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if out.get("type") == "object" and "properties" in out and not out.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


# What only the operator says (KubeRay 1.7)


def operator_problems(job: Document) -> list[str]:
    return list(_operator_problems(job))


def _operator_problems(job: Document) -> Iterator[str]:
    spec, name = job["spec"], job["metadata"]["name"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    if len(name) > 47:
        yield f"the name {name} has {len(name)} characters, 47 are allowed"
    if spec.get("submissionMode", "K8sJobMode") not in MODES:
        yield f"submissionMode {spec['submissionMode']}"
    ends = spec.get("shutdownAfterJobFinishes", False)
    if ends and spec.get("deletionStrategy", {}).get("deletionRules"):
        yield "deletionRules beside shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if spec.get("suspend") and not ends:
        yield "suspend without shutdownAfterJobFinishes"
    if "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {}) and not spec.get("suspend"):
        yield "a queue, but not suspended"
    if cluster.get("autoscalerOptions", {}).get("version") == "v2":
        for group in groups:
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield "autoscaler v2 with a restartPolicy other than Never"
    for group in groups:
        both = set(group.get("resources", {})) & {"CPU", "GPU", "memory"} and group.get("rayStartParams")
        if both:
            yield "resources and rayStartParams of one group name the same thing"
    if cluster.get("authOptions", {}).get("mode") != "token" or not cluster["authOptions"].get("secretName"):
        yield "no token authentication"
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "work may land on the head"
    for group in cluster["workerGroupSpecs"]:
        if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield "replicas outside of minReplicas … maxReplicas"
        if cluster.get("enableInTreeAutoscaling") and group.get("minReplicas", 0) == group["maxReplicas"] != 1:
            yield "autoscaling with nothing to scale"
    for group in groups:
        (shm,) = [one for one in group["template"]["spec"]["volumes"] if one["name"] == "shm"]
        size = 2**30 * int(shm["emptyDir"]["sizeLimit"].removesuffix("Gi"))
        # Ray takes 30 % of the memory if it is not told, and /tmp/ray where that does not fit
        if not int(group["rayStartParams"].get("object-store-memory", 10**10)) < size:
            yield "the object store does not fit into /dev/shm"
    drain = {
        one["name"]: one["value"]
        for group in cluster["workerGroupSpecs"]
        for one in group["template"]["spec"]["containers"][0]["env"]
        if "value" in one
    }
    grace = min(group["template"]["spec"]["terminationGracePeriodSeconds"] for group in cluster["workerGroupSpecs"])
    if int(drain.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30)) >= grace:
        yield "a worker is killed before its drain has ended"


# Pod security standard "restricted", field by field (https://kubernetes.io/docs/concepts/security/pod-security-standards/)


def pods(document: Document) -> list[Document]:
    """All pod specs within a document."""
    found: list[Document] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("containers"), list):
                found.append(value)
            for one in value.values():
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)

    walk(document)
    return found


def restricted_problems(pod: Document) -> list[str]:
    return list(_restricted_problems(pod))


def _restricted_problems(pod: Document) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    for volume in pod.get("volumes", []):
        if strange := set(volume) - {"name"} - SAFE_VOLUMES:
            yield f"volume {volume['name']} of kind {strange}"
    of_pod = pod.get("securityContext", {})
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        own, name = container.get("securityContext", {}), container["name"]
        if own.get("privileged"):
            yield f"{name} is privileged"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may escalate privileges"
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add", []) not in (
            [],
            ["NET_BIND_SERVICE"],
        ):
            yield f"{name} keeps capabilities"
        if own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
            yield f"{name} may run as root"
        if own.get("runAsUser", of_pod.get("runAsUser")) == 0:
            yield f"{name} runs as root"
        profile = own.get("seccompProfile", of_pod.get("seccompProfile", {})).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            yield f"{name} has no seccomp profile"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{name} has a host port"
        resources = container.get("resources", {})
        if not resources.get("requests") or resources["requests"] != resources.get("limits"):
            yield f"{name}: requests are not limits"
