"""`ziplora run`: its options, and how the parts of a run are put together."""

import json
import os
import re
import signal
from importlib.metadata import version
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from service.catalog import Catalog
from service.cli_plan import make_plan, print_plan
from service.console import OUT, complain, the_same_command
from service.crew import Crew
from service.errors import ServiceError, StorageError
from service.ray_token import join_with_token, start_with_token
from service.run_shown import RunProgress, Summary
from service.wording import number

if TYPE_CHECKING:
    from service.manifest import Manifest
    from service.messages import WorkerSettings
    from service.metrics import Metrics
    from service.plan import Plan
    from service.pool import Pool


@click.command()
@click.argument("manifest")
@click.option("--output", help="Catalog to write instead of the manifest's.")
@click.option(
    "--address", help="Ray cluster to use, such as ray://head:10001 or auto. Default: a Ray of its own on this machine."
)
@click.option("--inline", is_flag=True, help="One worker in this process, without Ray; for debugging.")
@click.option("--workers", type=click.IntRange(min=1), help="Workers; default: one per GPU, or one.")
@click.option(
    "--min-workers", type=click.IntRange(min=1), help="With --max-workers: never fewer, even for little work."
)
@click.option("--max-workers", type=click.IntRange(min=1), help="As many as the work left is worth, up to this.")
@click.option("--accelerator-type", metavar="NAME", help="Only on GPUs of this kind, as Ray names it, such as A100.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only on nodes with this Ray label.")
@click.option("--gpus-per-worker", type=float, metavar="SHARE", help="Such as 0.5, to let workers share a GPU.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cuda", "cpu"]), show_default=True)
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]), show_default=True)
@click.option(
    "--compile",
    is_flag=True,
    help="Compile the UNet with torch.compile: minutes at each worker's start and for each new rank or picture size.",
)
@click.option(
    "--threads",
    default=1,
    type=click.IntRange(min=1),
    show_default=True,
    help="CPU threads per worker. Another number gives other roundings.",
)
@click.option(
    "--metrics-port",
    default=0,
    type=click.IntRange(0, 65535),
    help="Serve Prometheus metrics here while running; 0 = do not.",
)
@click.option(
    "--attempts",
    default=3,
    type=click.IntRange(min=1),
    show_default=True,
    help="Attempts per job before it is given up.",
)
@click.option(
    "--checkpoint-every",
    default=60.0,
    type=click.FloatRange(min=0),
    show_default=True,
    help="Seconds between checkpoints of a training, in the catalog.",
)
@click.option(
    "--deadline", default=3600.0, type=click.FloatRange(min=1), show_default=True, help="Seconds that one job may take."
)
@click.option("--download", is_flag=True, help="Fetch a base that is a hub id and not in the local hub cache.")
@click.option(
    "--given-up-ok",
    is_flag=True,
    help="Exit code 0 also when jobs were given up: for schedulers that would start the whole run again.",
)
@click.option("--gallery/--no-gallery", default=True, show_default=True, help="Keep gallery.html beside the catalog.")
def run(manifest: str, output: str | None, download: bool, given_up_ok: bool, **options: Any) -> int:
    """Merge, sample and publish everything in MANIFEST that the catalog does not hold yet.

    Running the same command again goes on where the last run stopped, and takes up again what was given up.
    """
    crew = crew_of(options)
    if options["inline"] and crew not in (Crew(), Crew(1, 1)):
        raise click.UsageError(
            "--inline is one worker in this process, on what is here: leave it out, or --workers, --min-workers,"
            " --max-workers, --gpus-per-worker, --accelerator-type and --label"
        )
    planned, read = make_plan(manifest, output, download)
    print_plan(planned)
    planned.check()
    if not planned.left:
        OUT.print(f"nothing to do: all {len(planned.jobs)} jobs are committed in {planned.output}", soft_wrap=True)
        return 0
    code = execute(read, planned, crew=crew, **options)
    return 0 if code == 1 and given_up_ok else code


def execute(
    manifest: "Manifest",
    planned: "Plan",
    *,
    address: str | None,
    inline: bool,
    crew: Crew,
    device: str,
    dtype: str,
    compile: bool,
    threads: int,
    metrics_port: int,
    attempts: int,
    deadline: float,
    checkpoint_every: float,
    gallery: bool = True,
) -> int:
    from service.faults import Limits
    from service.live import LiveGallery
    from service.messages import WorkerSettings
    from service.metrics import Metrics
    from service.run import run as drive
    from service.standing import StandingRecord

    if inline and address:
        raise click.UsageError("--inline runs without Ray, so it takes no --address")
    assert planned.base is not None, "a plan without one has problems, and was refused"
    metrics = Metrics(version("ziplora"))
    server = metrics.serve(metrics_port) if metrics_port else None
    catalog = Catalog(planned.output)
    catalog.store.probe()
    settings = WorkerSettings(
        catalog=planned.output,
        base=planned.base.location,
        base_revision=planned.base.revision,
        base_digest=planned.base.digest,
        device=device,
        dtype=dtype,
        compile="inductor" if compile else None,
        threads=threads,
        checkpoint_s=checkpoint_every,
    )
    run_id = new_run_id(planned.manifest_digest)
    standing = StandingRecord(catalog, run_id)
    live = LiveGallery(catalog) if gallery else None
    interrupted, problem = False, None
    summary = Summary()
    pool = None
    with RunProgress(len(planned.jobs), len(planned.committed)) as progress:
        try:
            trainings = planned.trainings_left
            pool = make_pool(settings, inline, crew, address, len(planned.left) + len(trainings))
            signal.signal(signal.SIGTERM, _as_interrupt)  # after Ray's start, which sets a handler of its own
            drive(
                planned.left,
                pool,
                catalog,
                run_id=run_id,
                already=len(planned.committed),
                limits=Limits(attempts=attempts, deadline_s=deadline),
                prior_s=planned.duration.pairs_s / len(planned.left),
                trainings=trainings,
                training_s=planned.duration.train_s / len(trainings) if trainings else None,
                need=planned.need,
                observers=[summary.observe, metrics.observe, progress.observe, standing.observe]
                + ([live.observe] if live else []),
            )
        except KeyboardInterrupt:
            interrupted = True
        except ServiceError as error:
            problem = error
        finally:
            if pool is not None:
                pool.close()
    if server is not None:
        server.shutdown()
    unfinished = interrupted or problem is not None
    summary.committed_now = committed_of(catalog, planned) if unfinished else None
    now = summary.committed_now
    standing.close(None if now is None else len(planned.committed) + now)
    if live is not None:
        live.close()
    leave_record(catalog, run_id, manifest, metrics, summary)
    indexed = True
    if not unfinished:  # an unfinished run shall end at once; the next one brings the index up to date
        try:
            index = catalog.build_index()
            OUT.print(
                f"catalog: {planned.output} ({number(index.entries, 'merge')}, digest {index.digest[:16]})",
                soft_wrap=True,
            )
            if live is not None:
                live.finish()
                OUT.print(f"to look at it: {planned.output}/gallery.html", soft_wrap=True)
        except StorageError as error:  # no reason to hide what was done, and what was not
            indexed = False
            complain(f"{error}; once that is mended: ziplora index {planned.output}")
    summary.show(len(planned.committed))
    if problem is not None:
        raise problem
    if interrupted:
        OUT.print(f"interrupted; what is committed stays. To go on: {the_same_command()}", soft_wrap=True)
        return 130
    return 1 if summary.given_up or not indexed else 0


def crew_of(options: dict[str, Any]) -> Crew:
    """Takes out of the options what says how many workers there shall be, and where."""
    workers, least, most = (options.pop(name) for name in ("workers", "min_workers", "max_workers"))
    labels, gpus, kind = (options.pop(name) for name in ("labels", "gpus_per_worker", "accelerator_type"))

    if workers and (least or most):
        raise click.UsageError("--workers is a fixed number: leave out --min-workers and --max-workers, or --workers")
    if least and not most:
        raise click.UsageError(f"--min-workers {least} goes with --max-workers: give that, too, or --workers {least}")
    wrong = next((one for one in labels if not re.fullmatch(r"[^=]+=[^=]+", one)), None)
    if wrong is not None:
        raise click.UsageError(f"--label {wrong}: expected KEY=VALUE, such as ray.io/market-type=spot")
    pairs = dict(one.split("=") for one in labels)
    crew = Crew(workers or least, workers or most, gpus, kind, pairs)
    crew.check()
    return crew


def make_pool(settings: "WorkerSettings", inline: bool, crew: Crew, address: str | None, jobs: int) -> "Pool":
    from service.pool import InlinePool

    if inline:
        return InlinePool(settings)
    (join_with_token if address else start_with_token)(os.environ)  # before ray is imported
    from service.ray_pool import RayPool

    return RayPool(settings, None, address, cpus_per_worker=settings.threads, most=jobs, crew=crew)


def new_run_id(manifest_digest: str) -> str:
    from datetime import UTC, datetime

    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{manifest_digest[:8]}"


def committed_of(catalog: Catalog, planned: "Plan") -> int | None:
    """How many of the jobs that were left the catalog has now; None where it does not answer any more, which is no
    reason to hide the outcome."""
    try:
        return len(catalog.committed() & {job.job_id for job in planned.left})
    except StorageError as error:
        complain(f"what is committed is as the workers told it: {error}", "warning")
        return None


def leave_record(catalog: Catalog, run_id: str, manifest: "Manifest", metrics: "Metrics", summary: Summary) -> None:
    """What a run leaves about itself: its manifest, its last metrics (a short run is over before it is scraped), its
    outcome. A store that does not take it any more is no reason to hide the outcome."""
    records = {
        "manifest.yaml": manifest.source,
        "metrics.prom": metrics.text(),
        "summary.json": json.dumps(summary.to_json(), indent=2).encode(),
    }
    try:
        for name, content in records.items():
            catalog.store.put(f"runs/{run_id}/{name}", content)
    except StorageError as error:
        complain(f"the record of this run was not written: {error}", "warning")


def _as_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
