"""Fixtures shared by the tests: a real S3 server, started once per session, and a fresh bucket per test."""

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.catalog import Catalog
from service.storage import Store, open_store
from tests.browser import browser, pytest_terminal_summary  # noqa: F401
from tests.grid import Grid, build_grid
from tests.swift_node import SwiftNode, swift_node

os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves its workers on a busy machine


LONG = (
    "test_ray_jobs",
    "test_ray_pool",
    "test_ray_token",
    "test_run",
    "test_run_faults",
    "test_client",
    "test_trainings",
    "test_worker_styledrop",
    "test_cli_train",
    "test_joint",
    "test_study",
    "test_worker_methods",
    "test_worker_tiles",
    "test_worker",
    "test_worker_sd15",
    "test_train",
    "test_pull",
    "test_care",
    "test_pages",
    "test_cli",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests take long are begun first: at the end one process would be left with them."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@dataclass(frozen=True, slots=True)
class Swift:
    """`url` is a fresh bucket; `environment` (AWS_…) is already set in this process and inherited by its children."""

    node: SwiftNode
    bucket: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def endpoint(self) -> str:
        return self.node.endpoint

    @property
    def environment(self) -> dict[str, str]:
        return self.node.environment


@pytest.fixture(scope="session")
def swift_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftNode]:
    with swift_node(tmp_path_factory.mktemp("swift")) as node:
        yield node


_buckets = (f"bucket-{i}" for i in itertools.count())


@pytest.fixture
def swift(swift_server: SwiftNode, monkeypatch: pytest.MonkeyPatch) -> Swift:
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in swift_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = next(_buckets)
    boto3.client("s3").create_bucket(Bucket=bucket)
    return Swift(swift_server, bucket)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store: a directory, then a prefix in a bucket."""
    if request.param == "local":
        return open_store(tmp_path / "store")
    return open_store(f"{request.getfixturevalue('swift').url}/some/prefix")


@pytest.fixture
def catalog(store: Store) -> Catalog:
    """An empty catalog in a directory, then in a bucket."""
    return Catalog(store)


@pytest.fixture
def local(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "catalog")


@pytest.fixture(scope="session")
def grid_template(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return build_grid(tmp_path_factory.mktemp("grid"))


@pytest.fixture
def grid(grid_template: Grid, tmp_path: Path) -> Grid:
    """Base, LoRAs and images of tests/grid.py in a directory of the test's own."""
    root = tmp_path / "grid"
    shutil.copytree(grid_template.root, root)
    return Grid(root)
