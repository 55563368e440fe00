"""`ziplora deploy`: what goes to Kubernetes, printed."""

import json
from typing import TYPE_CHECKING

import click

from service.cli_jobs import check_run_options
from service.console import tracked

if TYPE_CHECKING:
    from service.steps import Steps


@click.group()
def deploy() -> None:
    """Kubernetes: a manifest as YAML for `kubectl apply -f -`, and the dashboard. See deploy/README.md."""


@deploy.command()
@click.argument("manifest")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@click.option("--overlay", required=True, help="One of deploy/kustomize/overlays: cpu-smoke, gpu, kueue, …")
@click.option("--image", default="ziplora:0.1.0", show_default=True, help="Built from deploy/Dockerfile and pushed.")
@click.option("--workers", type=click.IntRange(min=1), help="At most so many; the overlay's own number otherwise.")
@click.option("--namespace", help="Written into every document.")
@click.option("--output", help="Catalog to use instead of the manifest's.")
@click.option("--via", metavar="S3_URL", help="Put manifest and files there, for the pods to fetch.")
@click.option(
    "--with",
    "extras",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="One of deploy/kustomize/options: models-pvc[=CLAIM], models-image[=IMAGE].",
)
@click.option("--address", metavar="URL", help="For existing-cluster: the cluster's http://HEAD-SVC:8265.")
def render(
    manifest: str,
    options: tuple[str, ...],
    overlay: str,
    image: str,
    workers: int | None,
    namespace: str | None,
    output: str | None,
    via: str | None,
    extras: tuple[str, ...],
    address: str | None,
) -> None:
    """Print all that Kubernetes needs to run MANIFEST (a file or s3://bucket/key).

    OPTIONS after `--` are those of `ziplora run`.
    """
    from service.deploy import Wanted, rendered
    from service.kustomize import to_yaml
    from service.manifest import read_manifest
    from service.parcel import pack, upload
    from service.storage import open_store

    if address and overlay != "existing-cluster":
        raise click.UsageError(f"--address goes with --overlay existing-cluster, not with {overlay}")
    check_run_options(options)
    read = read_manifest(manifest)
    url = manifest if manifest.startswith("s3://") else None
    sending: Steps[str] | None = None
    if via and url is None:
        store = open_store(via)
        key, sending = upload(pack(read), store)
        url = f"{store.url}/{key}"
    wanted = Wanted(overlay, url, output, image, workers, namespace, extras, options, address)
    documents = rendered(read, wanted)
    if sending is not None:  # only now, when all wishes have been found good
        for _ in tracked(sending, "uploading"):
            pass
    click.echo(to_yaml(documents), nl=False)


@deploy.command()
def dashboard() -> None:
    """Print the Grafana dashboard as JSON."""
    from service.deploy_dashboard import dashboard as make

    click.echo(json.dumps(make(), indent=2))


@deploy.command()
def alerts() -> None:
    """Print the alerts as a rule file of Prometheus, for where there is no Prometheus operator."""
    from service.deploy import KUSTOMIZE
    from service.kustomize import build, to_yaml

    rules = [one["spec"] for one in build(KUSTOMIZE / "monitoring") if one["kind"] == "PrometheusRule"]
    click.echo(to_yaml(rules), nl=False)
