"""A base in object storage: copied once per node, whole or not at all, from a real S3 server."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service import base_copy
from service.base_copy import copied
from service.base_files import needed_files, read_base
from service.errors import Corrupted, ManifestError, StoreFull
from service.storage import open_store
from tests.conftest import Swift
from tests.grid import Grid


@pytest.fixture
def base(swift: Swift, grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a base; this user's cache is a directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"{swift.url}/models/base"
    for path in (grid.root / "base").rglob("*"):
        if path.is_file():
            open_store(url).put(path.relative_to(grid.root / "base").as_posix(), path)
    open_store(url).put("README.md", b"not needed")
    open_store(url).put("unet/diffusion_pytorch_model.fp16.safetensors", b"not needed either")
    return url


def test_it_is_the_same_base_as_on_disk_with_what_is_needed_and_nothing_else(base: str, grid: Grid) -> None:
    found = read_base(base)
    assert found.digest == read_base(str(grid.root / "base")).digest
    assert (found.location, found.revision) == (base, None)
    names = {path.name for path in found.directory.rglob("*")}
    assert not names & {"README.md", "diffusion_pytorch_model.fp16.safetensors"}
    before = found.directory.stat().st_ino
    assert read_base(base).directory.stat().st_ino == before
    with pytest.raises(ManifestError, match="a revision goes with a hub id only"):
        read_base(base, "main")
    with pytest.raises(ManifestError, match=r"s3://.*/nothing holds no model: expected model_index.json"):
        read_base(f"{base}/nothing")


READ = "import sys; from service.base_files import read_base; print(read_base(sys.argv[1]).directory)"


def test_several_processes_copy_it_once_and_one_that_is_replaced_again(base: str, tmp_path: Path) -> None:
    reading = [
        subprocess.Popen([sys.executable, "-c", READ, base], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    (first,) = {process.communicate(timeout=120)[0].strip() for process in reading}
    copies = [path for path in (tmp_path / "cache/ziplora/bases").iterdir() if path.is_dir()]
    assert copies == [Path(first)]
    scheduler = open_store(base).get("scheduler/scheduler_config.json").replace(b"0.00085", b"0.00086")
    open_store(base).put("scheduler/scheduler_config.json", scheduler)
    assert read_base(base).directory != Path(first)


def test_what_an_interrupted_copy_has_fetched_is_not_fetched_again(base: str) -> None:
    directory = copied(base, needed_files)
    part = directory.with_name(f"{directory.name}.part")
    shutil.move(directory, part)
    (part / "unet/diffusion_pytorch_model.safetensors").unlink()
    kept = (part / "vae/diffusion_pytorch_model.safetensors").stat().st_ino
    assert copied(base, needed_files) == directory
    assert (directory / "vae/diffusion_pytorch_model.safetensors").stat().st_ino == kept
    assert (directory / "unet/diffusion_pytorch_model.safetensors").exists()
    assert not part.exists()
    shutil.move(directory, part)
    (part / "model_index.json").write_text("{}")  # of another version
    with pytest.raises(Corrupted, match="was replaced while it was copied"):
        copied(base, needed_files)


def test_beyond_the_limit_the_longest_unused_goes_and_one_that_may_be_loading_stays(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "bases"
    first = copied(base, needed_files, root)
    open_store(base).put("model_index.json", b"{}")
    second = copied(base, needed_files, root, max_bytes=1)
    assert first.exists()  # asked for a moment ago
    long_ago = time.time() - 2 * base_copy.IN_USE_S
    os.utime(first, (long_ago, long_ago))
    open_store(base).put("model_index.json", b"{ }")
    third = copied(base, needed_files, root, max_bytes=1)
    assert [path.exists() for path in (first, second, third)] == [False, True, True]


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreFull, match=r"needs [\d,]+ bytes in .*bases, 1,000 are free: free some, or set XDG_CACHE"):
        copied(base, needed_files)
