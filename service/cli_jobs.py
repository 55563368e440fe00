"""`ziplora submit`, `status`, `logs`, `cancel`, `retry`: runs on a Ray cluster, over its Jobs API."""

import os
import shlex
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from service.catalog import Catalog
from service.cli_options import CATALOG_HELP, filtered, open_catalog
from service.console import OUT, complain, size_text, tracked
from service.errors import BadInput, NotFound, StorageError
from service.ray_token import token_from
from service.retry import forget_failures
from service.wording import number

ADDRESS = click.option(
    "--address",
    required=True,
    envvar="RAY_API_SERVER_ADDRESS",
    show_envvar=True,
    metavar="URL",
    help="The cluster's dashboard, such as http://head:8265. A token is taken from RAY_AUTH_TOKEN or"
    " RAY_AUTH_TOKEN_PATH.",
)
OUTPUT = click.option("--output", help="Catalog to use instead of the manifest's.")
RUN_HELP = "JOB is a manifest, or an id that `ziplora submit` gave."


@click.command()
@click.argument("manifest")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@ADDRESS
@OUTPUT
@click.option("--via", metavar="S3_URL", help="Put manifest and files there, for all to fetch, instead of through Ray.")
@click.option("--again", is_flag=True, help="Submit what has succeeded already, too.")
def submit(
    manifest: str, options: tuple[str, ...], address: str, output: str | None, via: str | None, again: bool
) -> None:
    """Run MANIFEST (a file or s3://bucket/key) on a cluster, and return at once.

    Files that the manifest names by relative paths are sent along; absolute paths are those of the cluster's machines.
    OPTIONS after `--` are those of `ziplora run`, such as `-- --workers 8`.

    The same manifest into the same catalog is not run twice at a time, nor again once it has succeeded; one that failed
    or was cancelled is submitted anew and goes on from what is committed.
    """
    from service.manifest import read_manifest
    from service.parcel import check_output, pack, upload
    from service.ray_jobs import MAX_PARCEL_BYTES, JobServer
    from service.storage import open_store

    check_run_options(options)
    read = read_manifest(manifest)
    check_output(read, output)
    catalog = open_store(output or read.output).url
    server = JobServer(address, token_from(os.environ))
    about: dict[str, Any] = {"manifest": read.name, "manifest_digest": read.digest, "catalog": catalog, "again": again}
    extra = [*(["--output", catalog] if output else []), *options]
    if manifest.startswith("s3://"):
        there, is_new = server.submit(_command(manifest, extra), **about)
    else:
        parcel = pack(read)
        if parcel.there:
            OUT.print(f"to be found on the cluster's machines: {len(parcel.there)} absolute paths", soft_wrap=True)
        if via:
            key, steps = upload(parcel, open_store(via))
            for _ in tracked(steps, "uploading"):
                pass
            there, is_new = server.submit(_command(f"{open_store(via).url}/{key}", extra), **about)
        elif parcel.n_bytes > MAX_PARCEL_BYTES:
            raise BadInput(
                f"{read.name} names {len(parcel.files) - 1} files of {size_text(parcel.n_bytes)} by relative paths,"
                f" Ray's job server takes {size_text(MAX_PARCEL_BYTES)}: give --via s3://bucket/prefix to send them"
                " through object storage, or write s3:// locations or absolute paths that all machines share"
            )
        else:
            there, is_new = _sent(server, parcel, extra, about)
    if is_new:
        OUT.print(f"submitted {there.id}: {read.name} → {catalog}", soft_wrap=True)
    elif there.has_ended:
        OUT.print(f"{there.id} has succeeded already; to run it once more: --again", soft_wrap=True)
    else:
        OUT.print(f"{there.id} is {there.state.lower()} already; nothing was submitted", soft_wrap=True)
    if not there.has_ended:
        OUT.print(f"to follow it: ziplora logs -f {there.id} --address {address}", soft_wrap=True)


def _sent(server: Any, parcel: Any, extra: list[str], about: dict[str, Any]) -> tuple[Any, bool]:
    from service.parcel import lay_out

    with tempfile.TemporaryDirectory(prefix="ziplora-") as directory:
        lay_out(parcel, Path(directory))
        return server.submit(_command(parcel.manifest, extra), directory=Path(directory), **about)


def _command(manifest: str, options: list[str]) -> str:
    """What the cluster's head runs; it is told its own address by Ray."""
    return shlex.join(["ziplora", "run", manifest, "--address", "auto", *options])


def check_run_options(options: tuple[str, ...]) -> None:
    """Here, not in a log on the cluster."""
    from service.cli_run import crew_of, run

    taken = {
        "address": "submit has it",
        "inline": "a cluster has workers of its own",
        "output": "write it before the --",
    }
    context = run.make_context("run", ["manifest.yaml", *options])
    for name, why in taken.items():
        if context.params.get(name):
            raise click.UsageError(f"--{name} cannot be given after the --: {why}")
    crew_of(dict(context.params))


@click.command(epilog=RUN_HELP)
@click.argument("job")
@ADDRESS
@OUTPUT
def status(job: str, address: str, output: str | None) -> int:
    """How far JOB is: on the cluster, and in its catalog. Exit code 1 if it failed or was stopped."""
    _, found = _find(job, address, output)
    now = found[-1]
    for one in found:
        times = f", {_ago(one.started)}" if one.started else ""
        code = f" with exit code {one.exit_code}" if one.exit_code else ""
        lasted = f", took {_duration((one.ended - one.started).total_seconds())}" if one.ended and one.started else ""
        OUT.print(f"{one.id}: {one.state.lower()}{code}{times}{lasted}", soft_wrap=True)
    if now.state == "FAILED":
        OUT.print(f"  {_end_of(now.message)}", soft_wrap=True)
    _print_standing(now)
    return 1 if now.state in ("FAILED", "STOPPED") else 0


@click.command(epilog=RUN_HELP)
@click.argument("job")
@ADDRESS
@OUTPUT
@click.option("--follow", "-f", is_flag=True, help="Go on until it ends.")
def logs(job: str, address: str, output: str | None, follow: bool) -> int:
    """What JOB printed. With --follow, exit code 1 if it then failed or was stopped."""
    server, found = _find(job, address, output)
    if not follow:
        click.echo(server.logs(found[-1].id), nl=False)
        return 0
    for piece in server.follow(found[-1].id):
        click.echo(piece, nl=False)
    return 1 if server.submission(found[-1].id).state in ("FAILED", "STOPPED") else 0


@click.command(epilog=RUN_HELP)
@click.argument("job")
@ADDRESS
@OUTPUT
def cancel(job: str, address: str, output: str | None) -> int:
    """Stop JOB: as Ctrl-C on `ziplora run`. What is committed stays; to go on, submit it again."""
    server, found = _find(job, address, output)
    if found[-1].has_ended:
        OUT.print(f"{found[-1].id} has ended already: {found[-1].state.lower()}", soft_wrap=True)
        return 0
    now = server.stop(found[-1].id)
    if not now.has_ended:
        complain(f"{now.id} was told to stop and is {now.state.lower()} still; look again with `ziplora status`")
        return 1
    OUT.print(f"{now.id}: {now.state.lower()}", soft_wrap=True)
    _print_standing(now)
    return 0


@click.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@filtered
@click.option("--kind", default="*", help="Pattern of kinds of failure, such as OutOfMemory.")
def retry(catalog: str, subject: str, style: str, method: str, kind: str) -> None:
    """Forget why jobs of CATALOG were given up, so that the next run takes them up as new."""
    steps = forget_failures(open_catalog(catalog), subject, style, method, kind)
    kinds: dict[str, int] = {}
    for failure in tracked(steps, "forgetting"):
        kinds[failure.kind] = kinds.get(failure.kind, 0) + 1
    if not kinds:
        raise NotFound(f"{catalog} has nothing given up that matches: `ziplora ls {catalog}` lists what it has")
    counts = ", ".join(f"{number} {name}" for name, number in sorted(kinds.items()))
    jobs = number(sum(kinds.values()), "job")
    OUT.print(f"{jobs} will be tried again ({counts}) by the next run or submit of their manifest")


COMMANDS = (submit, status, logs, cancel, retry)


def _find(job: str, address: str, output: str | None) -> tuple[Any, list[Any]]:
    """The job server, and the submissions that `job` (an id, or a manifest) means, the latest last."""
    from service.manifest import read_manifest
    from service.parcel import run_name
    from service.ray_jobs import ID, JobServer
    from service.storage import open_store

    server = JobServer(address, token_from(os.environ))
    if ID.fullmatch(job):
        return server, [server.submission(job)]
    read = read_manifest(job)
    found = server.submissions(run_name(read.digest, open_store(output or read.output).url))
    if not found:
        raise NotFound(f"{job}, as it is now, was not submitted to {address}: `ziplora submit {job}` does it")
    return server, found


def _print_standing(submission: Any) -> None:
    from service.standing import latest_standing

    try:
        catalog = Catalog(submission.catalog)
        catalog.store.probe(write=False)
        standing = latest_standing(catalog, submission.manifest_digest)
    except StorageError as error:
        OUT.print(f"its catalog {submission.catalog} cannot be read from here: {error}", soft_wrap=True)
        return
    if standing is None:
        OUT.print(f"its catalog {submission.catalog} has no record of a run yet", soft_wrap=True)
        return
    eta = f", {_duration(standing.eta_s)} to go" if standing.eta_s and standing.state == "running" else ""
    age = _ago(datetime.fromisoformat(standing.updated))
    OUT.print(
        f"{standing.committed} of {standing.jobs} committed, {standing.given_up} given up, {standing.left} left; "
        f"{number(standing.workers, 'worker')}{eta} (run {standing.run_id}, as of {age})",
        soft_wrap=True,
    )


def _ago(when: datetime) -> str:
    return f"{_duration((datetime.now(UTC) - when).total_seconds())} ago"


def _duration(seconds: float) -> str:
    minutes, hours = divmod(int(seconds), 60)[0], int(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{seconds:.0f} s"


def _end_of(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "it left no message"
