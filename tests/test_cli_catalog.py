"""The commands on catalogs as a user types them, in this process."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import click
import pytest

from service.catalog import Catalog
from service.cli import cli
from service.errors import BadInput, NotFound, ServiceError, StorageError
from service.file_names import stem_of
from service.storage import open_store
from tests.catalogs import UNUSED_LORA, files_of, fill, id_of, identity, trained
from tests.conftest import Swift
from tests.grid import Grid
from tests.test_worker import jobs_of

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit code, output and messages) of `ziplora …`."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str]:
        code = cli.main([str(argument) for argument in arguments], standalone_mode=False)
        captured = capsys.readouterr()
        return code or 0, captured.out + captured.err

    return run


@pytest.fixture
def path(local: Catalog) -> Path:
    """Of a catalog of three merges, two of them of one pair and scored."""
    fill(local, identity("cat", "oil"))
    for method, alignment in (("direct", 0.4), ("ziplora", 0.6)):
        job = identity("dog", "oil", method)
        scores = {"style_alignment": alignment, "subject_alignment": alignment}
        local.commit(id_of(job), job, files_of(job), {"scores": scores})
    return Path(local.store.url)


def test_pull_takes_the_best_into_a_tools_layout(path: Path, tmp_path: Path, run: Run) -> None:
    code, said = run("pull", path, tmp_path / "out", "--method", "best", "--style", "o*", "--layout", "comfyui")
    assert (code, said) == (0, f"{tmp_path}/out: 6 pulled (6.6 kB)\n")
    names = {found.name.rpartition("-")[0] for found in (tmp_path / "out").iterdir()}
    assert names == {"cat__oil__ziplora", "dog__oil__ziplora"}
    code, said = run("pull", path, tmp_path / "top", "--top", 1, "--layout", "diffusers", "--base-model", "me/base")
    assert code == 0
    assert "it has no score to be chosen by" in said
    (card,) = (tmp_path / "top").rglob("README.md")
    assert "base_model: me/base" in card.read_text()
    assert card.parent.name.startswith("dog__oil__ziplora-")


def test_pull_refuses_what_is_larger_than_allowed(path: Path, tmp_path: Path, run: Run) -> None:
    code, said = run("pull", path, tmp_path / "out", "--subject", "cat", "--limit", 1000)
    assert code == 1
    assert "3,200 bytes, 1,000 are allowed: raise the limit if it is right" in said
    with pytest.raises(NotFound, match="nothing that matches subject hen"):
        run("pull", path, tmp_path / "out", "--subject", "hen")


def test_pull_says_where_it_cannot_write(path: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/out: not a directory"):
        run("pull", path, tmp_path / "file" / "out")


def test_ls_filters_what_was_given_up(path: Path, run: Run) -> None:
    for subject in ("dog", "cat"):
        job = identity(subject, "ink")
        Catalog(path).record_failure(id_of(job), job, "its LoRA has NaN", "BadInput", "", 1)
    assert run("ls", path)[1].count("given up: ") == 2
    _, said = run("ls", path, "--subject", "dog")
    assert "given up: dog/ink (BadInput): its LoRA has NaN" in said
    assert "cat/ink" not in said


def test_pull_follows_a_batch_to_its_end(path: Path, tmp_path: Path, run: Run) -> None:
    def batch() -> None:
        time.sleep(0.5)
        fill(Catalog(path), identity("hen", "oil"))
        open_store(path).put("runs/this/summary.json", b"{}")

    thread = threading.Thread(target=batch)
    thread.start()
    code, said = run("pull", path, tmp_path / "out", "--watch", "--interval", 0.2)
    thread.join()
    assert code == 0
    assert f"pulled {tmp_path}/out/{stem_of(Catalog(path).entry(id_of(identity('hen', 'oil'))))}.png" in said
    assert f"{tmp_path}/out: 12 pulled" in said


def test_links_give_the_file_to_whoever_has_them(swift: Swift, run: Run) -> None:
    job = identity("dog", "é ink")
    fill(Catalog(swift.url), job)
    code, said = run("link", swift.url, "--subject", "dog", "--json")
    shown = json.loads(said)
    assert (code, shown["subject"]) == (0, "dog")
    with urlopen(shown["url"]) as answer:
        assert answer.read() == files_of(job)["merged.safetensors"]
        assert f"dog____ink__ziplora-{id_of(job)[:8]}.safetensors" in answer.headers["Content-Disposition"]
    code, said = run("link", swift.url, "--object", "samples/001.png", "--days", 7)
    assert urlopen(said.strip()).read() == files_of(job)["samples/001.png"]
    with pytest.raises(StorageError, match="1 second to 7 days, not 691200 s"):
        run("link", swift.url, "--days", 8)
    with pytest.raises(NotFound, match=r"has no peft\.safetensors of what matches"):
        run("link", swift.url, "--object", "peft.safetensors")
    chosen = identity("dog", "wax", method="k-lora")
    Catalog(swift.url).commit(id_of(chosen), chosen, {"recipe.json": b"{}", "samples/000.png": b"picture"}, {})
    with pytest.raises(NotFound, match=r"has no merged\.safetensors of what matches .* method k-lora: "):
        run("link", swift.url, "--method", "k-lora")
    assert run("link", swift.url, "--method", "k-lora", "--object", "recipe.json")[0] == 0


def test_links_to_what_is_not_there(path: Path, run: Run) -> None:
    with pytest.raises(NotFound, match=r"has no peft\.safetensors of what matches subject dog, .* dog/oil` lists"):
        run("link", path, "--subject", "dog", "--object", "peft.safetensors")
    with pytest.raises(NotFound, match="nothing that matches subject hen"):
        run("link", path, "--subject", "hen")


def test_links_into_a_directory_are_file_urls(path: Path, run: Run) -> None:
    code, said = run("link", path, "--subject", "cat")
    assert code == 0
    assert said.startswith(f"file://{path}/pairs/")
    assert urlopen(said.strip()).read() == files_of(identity("cat", "oil"))["merged.safetensors"]


def test_verify_writes_down_what_it_found(path: Path, tmp_path: Path, run: Run) -> None:
    assert run("verify", path, "--record", tmp_path / "r") == (0, "18 objects read (10.6 kB), 0 not as promised\n")
    entry = Catalog(path).entry(id_of(identity("cat", "oil")))
    (path / entry.objects["merged.png"].key).write_bytes(b"another picture")
    code, said = run("verify", path, "--record", tmp_path / "r")
    assert (code, said) == (
        0, f"0 objects read (0 B), 18 known to be sound from {tmp_path}/r, 0 not as promised\n"
    )  # fmt: skip
    code, said = run("verify", path)
    assert code == 1
    assert f"{entry.objects['merged.png'].key}: it has 15 bytes, 71 were promised" in said


def test_gc_shows_what_would_go_and_removes_it_when_told(path: Path, run: Run) -> None:
    job = identity("cat", "oil")
    for item in Catalog(path)._upload(id_of(job), "killed", files_of(job)).values():
        os.utime(path / item.key, (0, 0))
    _, said = run("gc", path)
    assert f"pairs/{id_of(job)}/killed: no entry names it (6 objects, 3.5 kB)" in said
    assert "1 to remove (3.5 kB), older than 24 h; --delete does it" in said
    assert (path / "pairs" / id_of(job) / "killed").exists()
    assert run("gc", path, "--delete") == (0, "1 removed (3.5 kB)\n")
    assert not (path / "pairs" / id_of(job) / "killed").exists()
    assert run("verify", path)[0] == 0
    with pytest.raises(click.BadParameter, match="not in the range"):
        run("gc", path, "--older-than", 1)


def test_rm_takes_back_what_is_named(path: Path, run: Run) -> None:
    _, said = run("rm", path, "--subject", "dog", "--method", "direct")
    assert "dog/oil (direct)" in said
    assert "1 merge to remove (3.5 kB); --delete does it" in said
    assert len(Catalog(path).committed()) == 3
    assert run("rm", path, "--subject", "dog", "--method", "direct", "--delete") == (0, "1 merge removed (3.5 kB)\n")
    assert run("rm", path, "--job", id_of(identity("cat", "oil"))[:9], "--delete") == (0, "1 merge removed (3.5 kB)\n")
    assert {entry.method for entry in Catalog(path).entries()} == {"ziplora"}
    assert '"cat"' not in (path / "index.json").read_text()
    with pytest.raises(click.UsageError, match="that would be the whole catalog"):
        run("rm", path)


def test_rm_keeps_what_a_manifest_names(grid: Grid, run: Run) -> None:
    manifest = grid.manifest()
    catalog = Catalog(grid.root / "catalog")
    kept = jobs_of(manifest)
    for job in kept:
        catalog.commit(job.job_id, identity(job.subject.id, job.style.id), {"merged.safetensors": b"x"}, {})
    fill(catalog, identity("dog", "ink"), identity("old"))
    _, said = run("rm", grid.root / "catalog", "--not-in", manifest, "--subject", "*", "--delete")
    assert said == "2 merges removed (7.1 kB)\n"
    assert catalog.committed() == {job.job_id for job in kept}
    (grid.root / "dog.safetensors").unlink()  # then the manifest's jobs are not known, and everything would go
    with pytest.raises(ServiceError, match=r"dog\.safetensors"):
        run("rm", grid.root / "catalog", "--not-in", manifest, "--delete")
    assert len(catalog.committed()) == 4


def test_copy_of_nothing_leaves_nothing(tmp_path: Path, run: Run) -> None:
    with pytest.raises(NotFound):
        run("copy", tmp_path / "nowhere", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_copy_then_diff(path: Path, tmp_path: Path, run: Run) -> None:
    assert run("copy", path, tmp_path / "copy") == (0, f"{tmp_path}/copy: 3 copied (10.6 kB)\n")
    assert (tmp_path / "copy" / "index.json").exists()
    assert run("diff", path, tmp_path / "copy") == (0, "the same content\n")
    fill(Catalog(tmp_path / "copy"), identity("hen", "oil"), identity("cat", "oil", seed=1))
    assert run("copy", path, tmp_path / "copy") == (0, f"{tmp_path}/copy: 3 kept (0 B)\n")
    code, said = run("diff", path, tmp_path / "copy")
    new, other = id_of(identity("hen", "oil"))[:12], id_of(identity("cat", "oil", seed=1))[:12]
    assert code == 1
    assert said.splitlines() == [
        f"> cat/oil (ziplora) {other}: only second",
        f"> hen/oil (ziplora) {new}: only second",
        "2 differences",
    ]
    run("rm", path, "--subject", "cat", "--delete")
    fill(Catalog(path), identity("cat", "oil", seed=2))
    run("rm", tmp_path / "copy", "--job", id_of(identity("cat", "oil"))[:12], "--delete")
    assert "    seed: 2 → 1" in run("diff", path, tmp_path / "copy")[1].splitlines()
    assert json.loads(run("diff", path, tmp_path / "copy", "--json")[1].splitlines()[0])["kind"] == "made otherwise"


def test_a_trained_lora_is_copied_and_compared(path: Path, tmp_path: Path, run: Run) -> None:
    lora = trained(Catalog(path))
    said = f"{tmp_path}/copy: 3 copied, 1 trained LoRAs copied (11.4 kB)\n"
    assert run("copy", path, tmp_path / "copy") == (0, said)
    assert run("diff", path, tmp_path / "copy") == (0, "the same content\n")
    (tmp_path / "copy" / lora.key).write_bytes(b"another LoRA")
    code, said = run("verify", tmp_path / "copy")
    assert code == 1
    assert f"{lora.key}: it has 12 bytes, {lora.size} were promised" in said
    trained(Catalog(path), UNUSED_LORA, "ink", "style")
    assert run("diff", path, tmp_path / "copy") == (1, "< styles.ink (train) 333333333333: only first\n1 difference\n")


def test_export_asks_for_one_merge(path: Path, tmp_path: Path, run: Run) -> None:
    with pytest.raises(BadInput, match=r"dog/oil is 2 merges: .*; give the start of one job id"):
        run("export", path, "dog/oil", tmp_path, "--style-strength", 0.6)
    with pytest.raises(NotFound, match="has no merge hen/oil"):
        run("export", path, "hen/oil", tmp_path, "--style-strength", 0.6)
    with pytest.raises(click.UsageError, match="go together"):
        run("export", path, "cat/oil", tmp_path, "--style-strength", 0.6, "--style-lora", "x")
