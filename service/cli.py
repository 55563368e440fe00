"""`ziplora …`: options, wiring, what is printed, exit codes. Nothing but this and cli_train.py prints or reads the
command line.

Exit codes: 0 all is done; 1 some jobs were given up, or an object is not as promised; 2 the user's input is wrong;
130 interrupted.
"""

import json
import logging
import os
import re
import signal
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.table import Table

from service import events
from service.catalog import Catalog
from service.cli_catalog import COMMANDS as CATALOG_COMMANDS
from service.cli_deploy import deploy
from service.cli_jobs import COMMANDS as JOB_COMMANDS
from service.cli_loras import loras
from service.cli_options import CATALOG_HELP, filtered, open_catalog
from service.cli_pages import COMMANDS as PAGE_COMMANDS
from service.cli_report import report
from service.cli_styledrop import styledrop
from service.cli_train import train
from service.console import (
    ERR,
    OUT,
    complain,
    counted,
    left_out,
    progress_bar,
    size_text,
    the_same_command,
    tracked,
)
from service.entry import alignments
from service.errors import NotFound, ServiceError, StorageError
from service.plan_text import time_text
from service.ray_token import join_with_token, start_with_token
from ziplora.errors import LoRAError

if TYPE_CHECKING:
    from service.pool import Pool


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version("ziplora"), prog_name="ziplora")
@click.option("--debug", is_flag=True, help="Show tracebacks and log messages.")
def cli(debug: bool) -> None:
    """Merge every subject LoRA with every style LoRA (ZipLoRA, arXiv 2311.13600) into a catalog."""
    logging.basicConfig(level=logging.INFO if debug else logging.ERROR, format="%(name)s: %(message)s")
    if not debug:  # what the model libraries say while they load is about their own options, not about the user's
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def main() -> NoReturn:
    debug = "--debug" in sys.argv
    arguments = ["--debug"] * debug + [one for one in sys.argv[1:] if one != "--debug"]  # wherever it stands
    try:
        sys.exit(cli.main(arguments, standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        ERR.print("interrupted")
        sys.exit(130)
    except (ServiceError, LoRAError) as error:
        if debug:
            traceback.print_exc()
        for line in str(error).splitlines():
            complain(line)
        sys.exit(error.exit_code if isinstance(error, ServiceError) else 2)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        complain(f"{type(error).__name__}: {error} (a defect: --debug shows where)")
        sys.exit(1)


# Before anything runs


@cli.command()
@click.argument("manifest")
@click.option("--output", help="Catalog to use instead of the manifest's.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--download", is_flag=True, help="Fetch a base that is a hub id and not in the local hub cache.")
def plan(manifest: str, output: str | None, as_json: bool, download: bool) -> None:
    """Check MANIFEST and every file it names, and say what a run would do. Needs neither GPU nor Ray."""
    planned, _ = make_plan(manifest, output, download)
    if as_json:
        click.echo(json.dumps(planned.to_json(), indent=2))
    else:
        print_plan(planned)
    planned.check()


def make_plan(manifest: str, output: str | None, download: bool) -> tuple[Any, Any]:
    import dataclasses

    from service.manifest import read_manifest
    from service.plan import plan as make
    from service.storage import open_store

    read = read_manifest(manifest)
    if output is not None:
        read = dataclasses.replace(read, output=open_store(output).url)
    return make(read, download=download, watch=lambda steps: tracked(steps, "checking LoRAs")), read


def print_plan(planned: Any) -> None:
    from service.plan_text import summary_lines

    for line in summary_lines(planned):
        OUT.print(line, soft_wrap=True)


@cli.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Figures of its updates, .png or .svg.")
@click.option("--beside", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A style, for --plot.")
@click.option("--mergers", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Of a merge, for --plot.")
def inspect(file: Path, as_json: bool, plot: Path | None, beside: Path | None, mergers: Path | None) -> None:
    """What a LoRA FILE holds: layout, ranks, alphas, targets, trigger words, and what would be refused."""
    from dataclasses import asdict

    from ziplora.layouts import inspect_file

    seen = inspect_file(file)
    if as_json:
        click.echo(json.dumps(asdict(seen), indent=2, default=str))
    else:
        table = Table(show_header=False, box=None, title=seen.name, title_justify="left")
        of = f" of the base's {seen.n_targets_of_base}" if seen.n_targets_of_base else ""
        rows = {
            "layout": seen.layout,
            "size": size_text(seen.n_bytes),
            "base": f"{seen.base or 'unknown'} by structure"
            + (f", {seen.stated_base} as stated" if seen.stated_base else ""),
            "dtype": counted(seen.dtypes, "tensors"),
            "ranks": counted(seen.ranks, "modules"),
            "alphas": counted(seen.alphas, "modules"),
            "merge targets": f"{seen.n_targets}{of}",
            "carried along": counted(seen.carried, "modules") or "none",
            "trigger words": ", ".join(seen.triggers) or "none stated",
            "notes": "\n".join(seen.notes),
            "refused": "\n".join(seen.refusals),
        }
        for name, value in rows.items():
            if value:
                table.add_row(name, str(value))
        OUT.print(table)
    if seen.refusals:
        raise LoRAError(f"{seen.name} cannot be merged: {seen.refusals[0]}")
    if plot is not None:
        from service.cli_plots import plotted

        plotted(file, plot, beside, mergers)


@cli.command()
def methods() -> None:
    """The merge methods that a manifest can name, with their settings."""
    from dataclasses import fields

    from ziplora.methods import METHODS
    from ziplora.unmerged import UNMERGED

    for method in METHODS.values():
        knobs = ", ".join(f"{field.name} {field.default}" for field in fields(method.knobs))
        rows = {
            "does": method.summary,
            "yields": method.yields,
            "costs": method.cost,
            "settings": knobs or "none",
            "paper": method.paper,
        }
        _print_method(method.name, rows)
    for other in UNMERGED.values():
        rows = {"does": other.summary, "yields": other.yields, "needs": other.needs, "command": other.command}
        _print_method(other.name, rows | {"paper": other.paper})
    of = "several methods on each pair, the one with the highest score kept: {method: best, of: [direct, ziplora]}"
    _print_method("best", {"does": of})


def _print_method(name: str, rows: dict[str, str]) -> None:
    OUT.print(name, style="bold")
    table = Table(show_header=False, box=None, padding=(0, 2))
    for row in rows.items():
        table.add_row(*row)
    OUT.print(table)


@cli.command()
def schema() -> None:
    """The JSON schema of a manifest, for editors that check YAML."""
    from service.manifest_file import manifest_schema

    click.echo(json.dumps(manifest_schema(), indent=2))


cli.add_command(train)
cli.add_command(loras)
cli.add_command(styledrop)
cli.add_command(deploy)
cli.add_command(report)


# The run


@cli.command()
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
    planned, read = make_plan(manifest, output, download)
    print_plan(planned)
    planned.check()
    if not planned.left:
        OUT.print(f"nothing to do: all {len(planned.jobs)} jobs are committed in {planned.output}", soft_wrap=True)
        return 0
    code = execute(read, planned, crew=crew, **options)
    return 0 if code == 1 and given_up_ok else code


def execute(
    manifest: Any,
    planned: Any,
    *,
    address: str | None,
    inline: bool,
    crew: Any,
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
    summary.committed_now = len(catalog.committed() & {job.job_id for job in planned.left}) if unfinished else None
    now = summary.committed_now
    standing.close(None if now is None else len(planned.committed) + now)
    if live is not None:
        live.close()
    leave_record(catalog, run_id, manifest, metrics, summary)
    if not unfinished:  # an unfinished run shall end at once; the next one brings the index up to date
        index = catalog.build_index()
        OUT.print(f"catalog: {planned.output} ({index.entries} merges, digest {index.digest[:16]})", soft_wrap=True)
        if live is not None:
            live.finish()
            OUT.print(f"to look at it: {planned.output}/gallery.html", soft_wrap=True)
    summary.show(len(planned.committed))
    if problem is not None:
        raise problem
    if interrupted:
        OUT.print(f"interrupted; what is committed stays. To go on: {the_same_command()}", soft_wrap=True)
        return 130
    return 1 if summary.given_up else 0


def crew_of(options: dict[str, Any]) -> Any:
    """Takes out of the options what says how many workers there shall be, and where."""
    from service.crew import Crew

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


def make_pool(settings: Any, inline: bool, crew: Any, address: str | None, jobs: int) -> "Pool":
    from service.pool import InlinePool

    if inline:
        return InlinePool(settings)
    (join_with_token if address else start_with_token)(os.environ)  # before ray is imported
    from service.ray_pool import RayPool

    return RayPool(settings, None, address, cpus_per_worker=settings.threads, most=jobs, crew=crew)


def new_run_id(manifest_digest: str) -> str:
    from datetime import UTC, datetime

    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{manifest_digest[:8]}"


def leave_record(catalog: Catalog, run_id: str, manifest: Any, metrics: Any, summary: "Summary") -> None:
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


class Summary:
    """What a run did, kept for its end."""

    def __init__(self) -> None:
        self.committed = self.n_bytes = 0
        self.given_up: list[events.JobGivenUp] = []
        self.finished: events.RunFinished | None = None
        self.committed_now: int | None = None  # by the catalog: workers may commit after the last event was seen

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.JobCommitted):
            self.committed += 1
            self.n_bytes += event.n_bytes
        elif isinstance(event, events.JobGivenUp):
            self.given_up.append(event)
        elif isinstance(event, events.RunFinished):
            self.finished = event

    def show(self, before: int) -> None:
        finished = self.finished
        n = self.committed if self.committed_now is None else self.committed_now
        left = finished.left + self.committed - n if finished else 0
        seconds = finished.seconds if finished else 0.0
        OUT.print(
            f"committed {n} ({size_text(self.n_bytes)}), before this run {before}, given up {len(self.given_up)}"
            + (f", {left} left" if left else "")
            + f"; {seconds:.0f} s"
        )
        for event in self.given_up[:20]:
            OUT.print(f"  given up: {event.job.pair} ({event.job.method}): {event.reason}", soft_wrap=True)
        if len(self.given_up) > 20:
            OUT.print(f"  … and {len(self.given_up) - 20} more, under failures/ in the catalog")
        if self.given_up:
            OUT.print(f"to try them again, once the cause is mended: {the_same_command()}", soft_wrap=True)

    def to_json(self) -> dict[str, Any]:
        finished = self.finished
        return {
            "committed": self.committed,
            "given_up": [
                {"job_id": e.job.job_id, "pair": e.job.pair, "kind": e.kind, "reason": e.reason} for e in self.given_up
            ],
            "left": finished.left if finished else None,
            "seconds": finished.seconds if finished else None,
            "interrupted": finished.interrupted if finished else True,
        }


class RunProgress:
    """A bar on a terminal; elsewhere a line per event that matters, so that logs tell the story too."""

    def __init__(self, jobs: int, committed: int) -> None:
        self.bar = progress_bar()
        self.task = self.bar.add_task("starting workers", total=jobs, completed=committed)
        self.running: dict[str, str] = {}
        self.tenths: dict[str, int] = {}  # of each training, that are done
        self.eta = ""
        self.trouble: str | None = None

    def __enter__(self) -> "RunProgress":
        if OUT.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def observe(self, event: events.Event) -> None:
        match event:
            case events.WorkerReady():
                what = f" ({event.model}, {size_text(event.n_bytes)})" if event.n_bytes else ""
                self.say(f"{event.worker} is ready on {event.device}{what} after {event.load_s:.1f} s")
            case events.WorkerGone():
                self.running.pop(event.worker, None)
                self.say(f"{event.reason}{'' if event.returns else '; it does not come back'}")
            case events.WorkerStalled() if event.reason != self.trouble:
                self.trouble = event.reason
                self.say(f"{event.worker} waits: {event.reason}")
            case events.Outlook():
                self.eta = "" if event.seconds is None else f", about {time_text(event.seconds)} left"
            case events.JobStarted():
                self.running[event.worker] = event.job.pair
            case events.TrainingStarted():
                self.running[event.worker] = f"training {event.training.pair}"
            case events.TrainingAt():
                self._at(event)
            case events.TrainingDone():
                self.running.pop(event.worker, None)
                how = "was trained already" if event.already else f"trained in {sum(event.stages.values()):.1f} s"
                self.say(f"{event.training.pair} {how}")
            case events.TrainingFailed():
                self.running.pop(event.worker, None)
                how = "will be tried again" if event.retry else "given up with all its pairs"
                self.say(f"{event.training.pair}: attempt {event.attempt} at training it failed, {how}: {event.reason}")
            case events.JobCommitted():
                self.running.pop(event.worker, None)
                self.trouble = None
                self.bar.advance(self.task)
                how = "was committed already" if event.already else f"{sum(event.stages.values()):.1f} s"
                if not OUT.is_terminal:
                    self.say(f"{event.job.pair} {event.job.method}: {how}")
            case events.JobFailed():
                self.running.pop(event.worker, None)
                if event.retry:
                    how = "failed" if event.counts else "does not count"
                    self.say(f"{event.job.pair}: attempt {event.attempt} {how}, will be tried again: {event.reason}")
            case events.JobGivenUp():
                self.bar.advance(self.task)
                self.say(f"{event.job.pair}: given up after {event.attempts} attempts: {event.reason}")
            case _:
                pass
        doing = ", ".join(sorted(self.running.values())[:4]) or "waiting"
        self.bar.update(self.task, description=doing + self.eta)

    def _at(self, event: events.TrainingAt) -> None:
        name = event.job.pair
        self.running[event.worker] = f"training {name}, step {event.step} of {event.steps}"
        tenth = 10 * event.step // event.steps
        if event.loss is None:
            how = f"goes on after step {event.step} of {event.steps}" if event.step else f"begins: {event.steps} steps"
            self.say(f"training {name} {how}")
        elif not OUT.is_terminal and tenth > self.tenths.get(event.job.job_id, 0):
            self.say(f"training {name}: step {event.step} of {event.steps}, loss {event.loss:.4f}")
        self.tenths[event.job.job_id] = tenth

    def say(self, line: str) -> None:
        console = self.bar.console if OUT.is_terminal else OUT
        console.print(line, soft_wrap=True)


# The catalog

for command in (*CATALOG_COMMANDS, *JOB_COMMANDS, *PAGE_COMMANDS):
    cli.add_command(command)


@cli.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@filtered
@click.option("--json", "as_json", is_flag=True)
def ls(catalog: str, subject: str, style: str, method: str, as_json: bool) -> None:
    """List what CATALOG holds, and what was given up."""
    opened = open_catalog(catalog)
    entries = sorted(
        opened.select(subject, style, method, left_out), key=lambda e: (e.subject, e.style, e.method, e.job_id)
    )
    failures = list(opened.failures(left_out))
    if as_json:
        for entry in entries:
            click.echo(
                json.dumps(
                    {"job_id": entry.job_id, "subject": entry.subject, "style": entry.style, "method": entry.method}
                    | {name: value for name, value in alignments(entry).items() if value is not None}
                )
            )
        return
    scored = any(value is not None for entry in entries for value in alignments(entry).values())
    titles = ("CLIP-I style", "DINO subject", "CLIP-T text") if scored else ()
    table = Table("subject", "style", "method", "job", "images", *titles, "size", "made")
    for entry in entries:
        images = sum(name.startswith("samples/") for name in entry.objects)
        table.add_row(
            entry.subject,
            entry.style,
            entry.method,
            entry.job_id[:12],
            str(images),
            *(("–" if value is None else f"{value:.3f}") for value in alignments(entry).values() if scored),
            size_text(entry.n_bytes),
            f"{entry.created:%Y-%m-%d %H:%M}",
        )
    OUT.print(table)
    for failure in failures:
        job = failure.job
        pair = f"{job.get('subject', {}).get('id', '?')}/{job.get('style', {}).get('id', '?')}"
        OUT.print(f"given up: {pair} ({failure.kind}): {failure.reason}", soft_wrap=True)
    OUT.print(f"{len(entries)} merges, {len(failures)} given up")


@cli.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.argument("job")
def show(catalog: str, job: str) -> None:
    """Everything that is known of one merge: JOB is the start of a job id, or SUBJECT/STYLE."""
    opened = open_catalog(catalog)
    subject, slash, style = job.partition("/")
    if slash:
        found = opened.select(subject, style, unreadable=left_out)
    else:
        found = [entry for entry in opened.entries(left_out) if entry.job_id.startswith(job)]
    if not found:
        raise NotFound(f"{catalog} has no merge {job}: `ziplora ls {catalog}` lists what it has")
    for entry in found:
        objects = {
            item.name: {"key": item.key, "bytes": item.size, "sha256": item.sha256} for item in entry.objects.values()
        }
        shown = {
            "job_id": entry.job_id,
            "created": entry.created.isoformat(),
            "job": entry.job,
            "report": entry.report,
            "objects": objects,
        }
        click.echo(json.dumps(shown, indent=2, default=str))


@cli.command(epilog=CATALOG_HELP)
@click.argument("catalog")
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
@filtered
@click.option("--cell", default=128, type=click.IntRange(16, 1024), show_default=True, help="Pixels of each picture.")
def sheet(catalog: str, picture: Path, subject: str, style: str, method: str, cell: int) -> None:
    """Write a contact sheet of CATALOG to PICTURE (a .png or .jpg): subjects down, styles across."""
    from service.sheet import contact_sheet

    opened = open_catalog(catalog)
    entries = opened.select(subject, style, method, left_out)
    if not entries:
        raise NotFound(f"{catalog} has nothing to show: `ziplora ls {catalog}` lists what it has")
    try:
        contact_sheet(opened.store, entries, cell).save(picture)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{picture} cannot be written: {error}") from error
    OUT.print(f"{picture}: {len({(e.subject, e.style) for e in entries})} pairs", soft_wrap=True)
