"""Runs on a cluster: a real Ray head that demands a token, real submissions, the command line."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from service.catalog import Catalog
from service.errors import AccessDenied, BadInput, NotFound
from service.parcel import run_name
from service.ray_jobs import JobServer, NoJobServer, Submission
from tests.commands import wait_until, ziplora
from tests.conftest import Swift
from tests.grid import Grid
from tests.ray_head import TOKEN, Head, ray_head
from tests.swift_node import SwiftNode

ABOUT = {"manifest": "grid.yaml", "catalog": "/shared/catalog"}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, swift_server: SwiftNode) -> Iterator[Head]:
    environment = {**os.environ, **swift_server.environment}
    with ray_head(tmp_path_factory.mktemp("head"), environment) as head:
        yield head


@pytest.fixture
def server(head: Head) -> JobServer:
    return JobServer(head.dashboard, TOKEN)


# The rules of submission, with commands that take no time


def test_what_waits_or_runs_is_not_started_twice_even_by_two_at_once(server: JobServer) -> None:
    found = []

    def submit() -> None:
        found.append(server.submit("sleep 60", manifest_digest="twice", **ABOUT))

    threads = [threading.Thread(target=submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    submit()
    name = run_name("twice", "/shared/catalog")
    assert sorted(is_new for _, is_new in found) == [False, False, True]
    assert {one.id for one, _ in found} == {f"{name}-1"}
    assert len(server.submissions(name)) == 1
    assert server.stop(f"{name}-1").state == "STOPPED"


def test_what_was_stopped_or_failed_is_followed_by_the_next_and_what_succeeded_only_if_asked_for(
    server: JobServer,
) -> None:
    def submit(command: str, again: bool = False) -> Submission | None:
        submission, is_new = server.submit(command, manifest_digest="outcomes", again=again, **ABOUT)
        return submission if is_new else None

    first = submit("trap 'sleep 4; echo ended well; exit' TERM; echo begun; sleep 60 & wait")
    assert first is not None
    wait_until(lambda: "begun" in server.logs(first.id).splitlines())
    assert server.stop(first.id).state == "STOPPED"
    assert "ended well" in server.logs(first.id)  # Ray's own 3 s would have cut it off
    second = submit("echo oh no; exit 3")
    assert second is not None
    assert "oh no" in "".join(server.follow(second.id))
    wait_until(lambda: server.submission(second.id).has_ended)
    now = server.submission(second.id)
    assert (now.state, now.exit_code, now.number) == ("FAILED", 3, 2)
    assert (now.catalog, now.manifest, now.manifest_digest) == ("/shared/catalog", "grid.yaml", "outcomes")
    third = submit("true")
    assert third is not None
    wait_until(lambda: server.submission(third.id).state == "SUCCEEDED")
    assert submit("true") is None
    fourth = submit("true", again=True)
    assert fourth is not None
    assert fourth.number == 4


def test_a_wrong_address_token_or_id_is_refused_with_what_to_do(head: Head, server: JobServer) -> None:
    # in a process of its own: Ray keeps a token that it has once seen
    code = "import sys; from service.ray_jobs import JobServer; JobServer(sys.argv[1])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", code, head.dashboard]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    assert "AccessDenied" in refused
    assert "demands a token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH" in refused
    with pytest.raises(AccessDenied, match=r"does not take this token: set RAY_AUTH_TOKEN"):
        JobServer(head.dashboard, "wrong")
    with pytest.raises(NoJobServer, match=r"no Ray job server answers at http://127.0.0.1:9 .*is it the dashboard"):
        JobServer("http://127.0.0.1:9", TOKEN)
    with pytest.raises(BadInput, match=r"ray://head:10001 is no address of a Ray job server; expected http"):
        JobServer("ray://head:10001")
    for ask in (server.submission, server.logs, server.stop, lambda id: list(server.follow(id))):
        with pytest.raises(NotFound, match="knows no submission ziplora-0000"):
            ask("ziplora-0000000000000000-1")


# Real runs


def test_submit_cancel_and_submit_again(
    grid: Grid, head: Head, server: JobServer, monkeypatch: pytest.MonkeyPatch, swift: Swift
) -> None:
    samples = {"prompts": []}
    manifest = grid.manifest(subjects=5, styles=4, samples=samples, output=f"{swift.url}/catalog")
    catalog = Catalog(f"{swift.url}/catalog")
    at = ("--address", head.dashboard)
    assert ziplora("submit", manifest, *at).returncode == 2
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)

    submitted = ziplora("submit", manifest, *at, "--", "--workers", 1, "--device", "cpu")
    assert submitted.returncode == 0, submitted.stderr
    id = submitted.stdout.split()[1].rstrip(":")
    assert f"submitted {id}: {manifest} → {swift.url}/catalog" in submitted.stdout
    again = ziplora("submit", manifest, *at)
    assert "already; nothing was submitted" in again.stdout
    wait_until(lambda: len(catalog.committed()) >= 1)
    cancelled = ziplora("cancel", manifest, *at)
    assert cancelled.returncode == 0, cancelled.stderr
    assert f"{id}: stopped" in cancelled.stdout
    before = catalog.committed()
    assert 1 <= len(before) < 20
    assert f"{len(before)} of 20 committed, 0 given up, {20 - len(before)} left" in cancelled.stdout
    assert "interrupted; what is committed stays" in ziplora("logs", id, *at).stdout
    wait_until(lambda: not actors_of(head))

    # what travels is what lies beside the manifest now: the same manifest, another file
    (grid.root / "hen.png").write_text("no picture")
    second = ziplora("submit", manifest, *at, "--", "--workers", 1, "--device", "cpu")
    followed = ziplora("logs", "-f", manifest, *at)
    assert f"submitted {id[:-2]}-2" in second.stdout
    assert "hen.png" in followed.stdout
    assert followed.returncode == 1
    failed = ziplora("status", manifest, *at)
    assert failed.returncode == 1
    assert f"{id}: stopped" in failed.stdout
    assert "failed with exit code 2" in failed.stdout


def actors_of(head: Head) -> list[psutil.Process]:
    children = psutil.Process(head.pid).children(recursive=True)
    return [child for child in children if "_Actor" in " ".join(child.cmdline())]
