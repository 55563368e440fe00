"""A manifest as Kubernetes documents: an overlay of deploy/kustomize with name, manifest, image and size filled in."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import BadInput, ManifestError
from service.kustomize import Document, build, patched
from service.manifest import Manifest
from service.parcel import check_output, pack, run_name
from service.storage import open_store
from service.wording import unknown

KUSTOMIZE = Path(__file__).resolve().parent.parent / "deploy/kustomize"
IMAGE = "ziplora:0.1.0"  # as the YAML files have it
INSTANCE = "app.kubernetes.io/instance"
MOUNTED = "/etc/ziplora/manifest.yaml"
MAX_CONFIG_BYTES = 1_000_000  # of a ConfigMap's values; Kubernetes takes 1 MiB with all else
PER_RUN = ("RayJob", "Job", "ConfigMap", "PodDisruptionBudget")  # the others are shared by all runs of a namespace


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for. `manifest_url`: where it lies in object storage; None: it goes into a ConfigMap. `run_options`
    are those of `ziplora run`; `address` is for existing-cluster alone; `options` are `NAME` or `NAME=VALUE`, the claim
    or image that is meant."""

    overlay: str
    manifest_url: str | None = None
    output: str | None = None
    image: str = IMAGE
    workers: int | None = None
    namespace: str | None = None
    options: tuple[str, ...] = ()
    run_options: tuple[str, ...] = ()
    address: str | None = None


def overlays(root: Path = KUSTOMIZE) -> list[str]:
    return sorted(path.name for path in (root / "overlays").glob("*/"))


def rendered(manifest: Manifest, wanted: Wanted, root: Path = KUSTOMIZE) -> list[Document]:
    """All documents of a run. Raises ManifestError for what pods would not find, BadInput for the wishes."""
    if not (root / "overlays").is_dir():
        raise BadInput(f"{root} is not there: run this from a checkout of the project, which has deploy/kustomize")
    if wanted.overlay not in overlays(root):
        raise BadInput(unknown(f"unknown overlay {wanted.overlay}", overlays(root), wanted.overlay))
    _check(manifest, wanted)
    documents = build(root / "overlays" / wanted.overlay)
    for option in wanted.options:
        documents = _with(option, documents, root / "options")
    name = run_name(manifest.digest, open_store(wanted.output or manifest.output).url)
    if wanted.manifest_url:
        documents = [document for document in documents if document["kind"] != "ConfigMap"]
    for document in documents:
        _fill_in(document, manifest, wanted, name)
    return documents


def _with(option: str, documents: list[Document], root: Path) -> list[Document]:
    name, _, value = option.partition("=")
    known = sorted(path.name for path in root.glob("*/"))
    if name not in known:
        raise BadInput(unknown(f"unknown option {name}", known, name))
    if not any(document["kind"] == "RayJob" for document in documents):
        raise BadInput(f"--with {name} is for overlays that make a cluster: an existing one has its own volumes")
    documents = patched(documents, root / name)
    for field in ("claimName", "reference") if value else ():
        for volume in _mappings(documents, field):
            volume[field] = value
    return documents


def _check(manifest: Manifest, wanted: Wanted) -> None:
    check_output(manifest, wanted.output)
    if wanted.manifest_url:
        return
    beside = len(pack(manifest).files) - 1
    if beside:
        raise ManifestError(
            f"{manifest.name} names {beside} files by relative paths, which pods do not have: give --via"
            " s3://bucket/prefix to send them through object storage, or write s3:// locations"
        )
    if len(manifest.source) > MAX_CONFIG_BYTES:
        raise ManifestError(
            f"{manifest.name} has {len(manifest.source):,} bytes, a ConfigMap takes {MAX_CONFIG_BYTES:,}:"
            " give --via s3://bucket/prefix to send it through object storage"
        )


def _fill_in(document: Document, manifest: Manifest, wanted: Wanted, name: str) -> None:
    kind, metadata = document["kind"], document["metadata"]
    if wanted.namespace:
        metadata["namespace"] = wanted.namespace
    if kind not in PER_RUN:
        return
    metadata["name"] = f"{name}-manifest" if kind == "ConfigMap" else name
    metadata.setdefault("labels", {})[INSTANCE] = name
    metadata["annotations"] = {"ziplora/manifest-sha256": manifest.digest}
    for labels in _mappings(document, INSTANCE):
        labels[INSTANCE] = name
    for container in _mappings(document, "image"):
        if container["image"] == IMAGE:
            container["image"] = wanted.image
    for pod in _mappings(document, "volumes"):
        _mount_manifest(pod, wanted, name)
    if kind == "ConfigMap":
        document["data"] = {"manifest.yaml": manifest.source.decode()}
    elif kind == "RayJob":
        # as `ziplora submit` would have it, so that `ziplora status` finds it
        catalog = open_store(wanted.output or manifest.output).url
        document["spec"]["jobId"] = f"{name}-1"
        document["spec"]["metadata"] = {
            "manifest": Path(manifest.name).name,
            "digest": manifest.digest,
            "catalog": catalog,
        }
        _size(document["spec"]["rayClusterSpec"], wanted.workers)
        document["spec"]["entrypoint"] = shlex.join(_command(shlex.split(document["spec"]["entrypoint"]), wanted))
    elif kind == "Job":
        pod = document["spec"]["template"]["spec"]
        for container in (*pod["initContainers"], *pod["containers"]):
            _command_of_job(container, wanted)


def _mount_manifest(pod: dict[str, Any], wanted: Wanted, name: str) -> None:
    for volume in pod["volumes"]:
        if volume["name"] == "manifest":
            volume["configMap"]["name"] = f"{name}-manifest"
    if wanted.manifest_url:
        pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "manifest"]
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            container["volumeMounts"] = [one for one in container["volumeMounts"] if one["name"] != "manifest"]


def _size(cluster: dict[str, Any], workers: int | None) -> None:
    group = cluster["workerGroupSpecs"][0]
    if workers is not None:
        group["maxReplicas"] = workers
        if not cluster.get("enableInTreeAutoscaling"):  # then all of them, from the start
            group["replicas"] = group["minReplicas"] = workers


def _command(command: Sequence[str], wanted: Wanted) -> list[str]:
    """`ziplora run …` with the wishes; an option given twice counts as given last."""
    located = [wanted.manifest_url or one if one == MOUNTED else one for one in command]
    at = located.index("--workers")
    if _is_range(wanted):
        del located[at : at + 2]
    elif wanted.workers is not None:
        located[at + 1] = str(wanted.workers)
    output = ["--output", wanted.output] if wanted.output else []
    return [*located, *output, *wanted.run_options]


def _is_range(wanted: Wanted) -> bool:
    """Whether the run's own options give a range of workers, which excludes a fixed number."""
    return any(one.partition("=")[0] == "--max-workers" for one in wanted.run_options)


def _command_of_job(container: dict[str, Any], wanted: Wanted) -> None:
    command = [wanted.manifest_url or one if one == MOUNTED else one for one in container["command"]]
    output = ["--output", wanted.output] if wanted.output else []
    command[2:2] = output  # after `ziplora submit`, before the manifest and its `--`
    if "--" in command:
        workers = ["--workers", str(wanted.workers)] if wanted.workers is not None and not _is_range(wanted) else []
        command += [*workers, *wanted.run_options]
    container["command"] = command
    for variable in container["env"]:
        if variable["name"] == "RAY_API_SERVER_ADDRESS" and wanted.address:
            variable["value"] = wanted.address


def _mappings(value: Any, key: str) -> Iterator[dict[str, Any]]:
    """All mappings within that have this key."""
    if isinstance(value, dict):
        if key in value:
            yield value
        for one in value.values():
            yield from _mappings(one, key)
    elif isinstance(value, list):
        for one in value:
            yield from _mappings(one, key)
