"""Who may reach whom by the NetworkPolicy, decided as a cluster would decide it."""

import copy
from typing import Any

import pytest

from service.deploy import KUSTOMIZE
from service.kustomize import build

Document = dict[str, Any]
OURS = {"app.kubernetes.io/part-of": "ziplora"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
OTHER_HEAD = {"ray.io/node-type": "head", "ray.io/cluster": "somebody-elses"}
STRANGER = {"app": "web"}
GCS, DASHBOARD, NODE_METRICS, OURS_METRICS = 6379, 8265, 8080, 9400


def policy() -> Document:
    (found,) = [one for one in build(KUSTOMIZE / "common") if one["kind"] == "NetworkPolicy"]
    return found


def allowed(rules: list[Document], side: str, pod: Document, port: int, protocol: str, same_namespace: bool) -> bool:
    """Whether a rule allows it. A rule without peers is for everybody, one without ports for every port; rules know
    matchLabels alone, and what else they said would be an error here."""

    def is_meant(peer: Document) -> bool:
        assert not set(peer) - {"podSelector", "namespaceSelector"}
        assert not set(peer["podSelector"]) - {"matchLabels"}
        assert peer.get("namespaceSelector", {}) == {}
        labels = peer["podSelector"]["matchLabels"].items()
        return labels <= pod.items() and (same_namespace or "namespaceSelector" in peer)

    return any(
        (side not in rule or any(map(is_meant, rule[side])))
        and ("ports" not in rule or {"port": port, "protocol": protocol} in rule["ports"])
        for rule in rules
    )


INGRESS = {
    "the head to a worker, and back": (OURS, GCS, True, True),
    "a worker to a worker, on any port": (OURS, 12345, True, True),
    "a run of another namespace": (OURS, DASHBOARD, False, False),
    "the operator to the dashboard": (OPERATOR, DASHBOARD, False, True),
    "the operator elsewhere": (OPERATOR, GCS, False, False),
    "Prometheus to Ray's metrics": (PROMETHEUS, NODE_METRICS, False, True),
    "Prometheus to the run's": (PROMETHEUS, OURS_METRICS, False, True),
    "Prometheus to the dashboard, where code is run": (PROMETHEUS, DASHBOARD, False, False),
    "a neighbour to the dashboard": (STRANGER, DASHBOARD, True, False),
    "a neighbour to metrics": (STRANGER, NODE_METRICS, True, False),
    "a neighbour to the GCS": (STRANGER, GCS, True, False),
}
EGRESS = {
    "a worker to its head": (OURS, GCS, True, True),
    "object storage": (STRANGER, 443, False, True),
    "MinIO": (STRANGER, 9000, False, True),
    "the Kubernetes API": (STRANGER, 6443, False, True),
    "a cluster that runs already": (OTHER_HEAD, DASHBOARD, False, True),
    "that cluster's GCS": (OTHER_HEAD, GCS, False, False),
    "another's database": (STRANGER, 5432, True, False),
    "another's dashboard": (STRANGER, DASHBOARD, True, False),
}


@pytest.mark.parametrize("case", INGRESS)
def test_who_reaches_the_pods(case: str) -> None:
    pod, port, same_namespace, expected = INGRESS[case]
    assert allowed(policy()["spec"]["ingress"], "from", pod, port, "TCP", same_namespace) == expected


@pytest.mark.parametrize("case", EGRESS)
def test_whom_the_pods_reach(case: str) -> None:
    pod, port, same_namespace, expected = EGRESS[case]
    assert allowed(policy()["spec"]["egress"], "to", pod, port, "TCP", same_namespace) == expected


def test_names_are_resolved_by_whatever_resolves_them() -> None:
    for protocol in ("UDP", "TCP"):
        assert allowed(policy()["spec"]["egress"], "to", STRANGER, 53, protocol, False)


def test_all_pods_are_meant_in_both_directions() -> None:
    spec = policy()["spec"]
    assert spec["podSelector"] == {"matchLabels": OURS}
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    documents = [*build(KUSTOMIZE / "overlays/gpu"), *build(KUSTOMIZE / "overlays/existing-cluster")]
    (job,) = [one for one in documents if one["kind"] == "RayJob"]
    (submitting,) = [one for one in documents if one["kind"] == "Job"]
    cluster = job["spec"]["rayClusterSpec"]
    templates = [job["spec"]["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    templates += [group["template"] for group in cluster["workerGroupSpecs"]] + [submitting["spec"]["template"]]
    for template in templates:
        assert OURS.items() <= template["metadata"]["labels"].items()


def test_every_port_that_is_scraped_lets_prometheus_in() -> None:
    (job,) = [one for one in build(KUSTOMIZE / "overlays/gpu") if one["kind"] == "RayJob"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    monitors = [one for one in build(KUSTOMIZE / "monitoring") if one["kind"] == "PodMonitor"]
    scraped = {endpoint["port"] for one in monitors for endpoint in one["spec"]["podMetricsEndpoints"]}
    assert len(scraped) == 4
    for name in scraped:
        assert allowed(policy()["spec"]["ingress"], "from", PROMETHEUS, ports[name], "TCP", False), name


def test_a_policy_that_forgets_whom_it_means_would_be_seen() -> None:
    opened = copy.deepcopy(policy())
    (to_operator,) = [
        rule for rule in opened["spec"]["ingress"] if {"port": 8265, "protocol": "TCP"} in rule.get("ports", [])
    ]
    del to_operator["from"]
    pod, port, same_namespace, expected = INGRESS["a neighbour to the dashboard"]
    assert allowed(opened["spec"]["ingress"], "from", pod, port, "TCP", same_namespace) != expected
