"""The command line from end to end: real files, a real Ray, a real S3 server, real signals."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from service.catalog import Catalog
from service.cli_plan import make_plan
from service.cli_run import execute
from service.crew import Crew
from service.errors import BadInput
from tests.commands import started, wait_until, ziplora
from tests.conftest import Swift
from tests.grid import Grid
from tests.tiny import SDXL_TARGETS

NO_SAMPLES = {"prompts": []}


def test_run_then_look_around_then_pull(grid: Grid) -> None:
    manifest = grid.manifest()
    first = ziplora("run", manifest, "--workers", 2)
    assert first.returncode == 0, first.stderr
    assert "committed 4" in first.stdout
    again = ziplora("run", manifest)
    assert again.returncode == 0
    assert "nothing to do: all 4 jobs are committed" in again.stdout

    catalog, root = Catalog(grid.root / "catalog"), grid.root
    listed = ziplora("ls", root / "catalog")
    assert "4 merges, 0 given up" in listed.stdout
    shown = json.loads(ziplora("show", root / "catalog", "dog/ink").stdout)
    assert shown["report"]["subject"]["calibrated_on"] == "images"
    (record,) = (root / "catalog/runs").iterdir()
    left = {path.name for path in record.iterdir()}
    assert left == {"manifest.yaml", "metrics.prom", "standing.json", "summary.json"}
    assert 'ziplora_jobs{state="committed"} 4.0' in (record / "metrics.prom").read_text()
    assert (root / "catalog/index/all.parquet").exists()

    pulled = ziplora("pull", root / "catalog", root / "pulled", "--subject", "d*", "--style", "i*", "--samples")
    assert pulled.returncode == 0, pulled.stderr
    (file,) = (root / "pulled").glob("*.safetensors")
    assert file.name.startswith("dog__ink__ziplora-")
    assert json.loads(file.with_suffix(".json").read_text())["activation text"] == "sks dog, szn ink style"
    assert Image.open(file.with_suffix(".png")).size == (32, 32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(root / "base")
    pipeline.load_lora_weights(file)
    assert sum(hasattr(module, "lora_A") for module in pipeline.unet.modules()) == SDXL_TARGETS
    inspected = ziplora("inspect", file)
    assert "kohya" in inspected.stdout
    assert ziplora("verify", root / "catalog").returncode == 0
    assert ziplora("sheet", root / "catalog", root / "sheet.png", "--cell", 32).returncode == 0
    sheet = Image.open(root / "sheet.png").convert("RGB")
    preview = Image.open(file.with_suffix(".png")).convert("RGB")
    assert any(sheet.crop((x, 18 + 36, x + 32, 18 + 36 + 32)).tobytes() == preview.tobytes() for x in range(80))

    entry = next(iter(catalog.entries()))
    broken = root / "catalog" / entry.objects["merged.safetensors"].key
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    verified = ziplora("verify", root / "catalog")
    assert verified.returncode == 1
    assert entry.objects["merged.safetensors"].key in verified.stdout
    refused = ziplora("pull", root / "catalog", root / "pulled2")
    assert refused.returncode == 1
    assert "sha256" in refused.stderr
    assert len(list((root / "pulled2").glob("*.safetensors"))) == 3


def test_local_disk_and_s3_give_catalogs_of_equal_digest(grid: Grid, swift: Swift) -> None:
    manifest = grid.manifest()
    for output in (grid.root / "catalog", f"{swift.url}/some/catalog"):
        done = ziplora("run", manifest, "--inline", "--output", output)
        assert done.returncode == 0, done.stderr
    assert Catalog(grid.root / "catalog").digest() == Catalog(f"{swift.url}/some/catalog").digest()
    pulled = ziplora("pull", f"{swift.url}/some/catalog", grid.root / "pulled", "--style", "oil")
    assert pulled.returncode == 0, pulled.stderr
    assert len(list((grid.root / "pulled").glob("*__oil__*.safetensors"))) == 2


def test_killed_halfway_and_run_again_commits_the_rest_and_repeats_nothing(grid: Grid) -> None:
    manifest = grid.manifest(subjects=3, samples=NO_SAMPLES)
    catalog = Catalog(grid.root / "catalog")
    first = started("run", manifest, "--workers", 1)
    wait_until(lambda: len(catalog.committed()) >= 2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    wait_until(lambda: not processes_of(first.pid))
    before = {entry.job_id: entry.attempt for entry in catalog.entries()}
    assert 2 <= len(before) < 6
    second = ziplora("run", manifest, "--inline")
    assert second.returncode == 0, second.stderr
    assert f"committed {6 - len(before)}" in second.stdout
    after = {entry.job_id: entry.attempt for entry in catalog.entries()}
    assert len(after) == 6
    assert before.items() <= after.items()
    third = ziplora("run", manifest, "--inline")
    assert "nothing to do: all 6 jobs are committed" in third.stdout


@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_what_is_committed_and_how_to_go_on(grid: Grid, interruption: signal.Signals) -> None:
    manifest = grid.manifest(subjects=5, styles=4, samples=NO_SAMPLES)
    catalog = Catalog(grid.root / "catalog")
    running = started("run", manifest, "--workers", 2)
    wait_until(lambda: len(catalog.committed()) >= 2)
    # a shell's Ctrl-C goes to the whole group, a pod's SIGTERM to its first process
    (os.killpg if interruption == signal.SIGINT else os.kill)(running.pid, interruption)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 130, output
    assert re.search(r"committed \d+ .*left", output)
    assert f"To go on: ziplora run {manifest} --workers 2" in output
    assert "Traceback" not in output
    assert not processes_of(running.pid)
    committed = len(catalog.committed())
    assert 2 <= committed < 20
    assert f"committed {committed} " in output
    (record,) = (grid.root / "catalog/runs").iterdir()
    assert json.loads((record / "summary.json").read_text())["interrupted"] is True


def processes_of(session: int) -> list[str]:
    """What still lives of a session."""
    found = subprocess.run(["ps", "-s", str(session), "-o", "args="], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if line.strip() and "<defunct>" not in line]


def test_given_up_jobs_are_named_and_taken_up_by_the_next_run(grid: Grid) -> None:
    good = (grid.root / "dog.safetensors").read_bytes()
    tensors = load_file(grid.root / "dog.safetensors")
    key = next(key for key, tensor in tensors.items() if tensor.ndim == 2)
    tensors[key][0, 0] = float("inf")
    save_file(tensors, grid.root / "dog.safetensors")
    manifest = grid.manifest(samples=NO_SAMPLES)
    first = ziplora("run", manifest, "--inline")
    assert first.returncode == 1
    assert "given up: dog/ink (ziplora)" in first.stdout
    assert key in first.stdout
    assert f"to try them again, once the cause is mended: ziplora run {manifest} --inline" in first.stdout
    assert "2 given up" in ziplora("ls", grid.root / "catalog").stdout
    (grid.root / "dog.safetensors").write_bytes(good)
    second = ziplora("run", manifest, "--inline")
    assert second.returncode == 0, second.stderr
    assert "committed 2" in second.stdout


def pickled(path: Path) -> None:
    torch.save({"lora": torch.ones(2)}, path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def of_sd15(path: Path) -> None:
    save_file(
        {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.ones(4, 768),
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.ones(320, 4),
        },
        path,
    )


def of_flux(path: Path) -> None:
    save_file(
        {
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 3072),
            "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(3072, 4),
        },
        path,
    )


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD_LORAS = {
    "missing": (Path.unlink, "dog.safetensors"),
    "a directory": (a_directory, "directory"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "truncated": (truncated, "truncated|bytes"),
    "of SD 1.5": (of_sd15, "SD 1.5|1\\.5"),
    "of FLUX": (of_flux, "FLUX"),
    "pickle": (pickled, "only safetensors is read"),
}


@pytest.mark.parametrize("name", BAD_LORAS)
def test_a_bad_lora_is_one_clear_line_and_exit_code_2(grid: Grid, name: str) -> None:
    make, expected = BAD_LORAS[name]
    make(grid.root / "dog.safetensors")  # type: ignore[operator]
    refused(ziplora("run", grid.manifest(), "--inline"), expected, grid)


BAD_MANIFESTS = {
    "unknown field": ("samples:", "sampels:", "sampels.*samples"),
    "duplicate id": ("  cat:", "  dog:", "dog.*twice|duplicate"),
    "ids that differ by case": ("  cat:", "  Dog:", "case"),
    "path traversal": ("  cat:", "  ../cat:", r"\.\./cat"),
    "image that is none": ("images: dog.png", "images: dog.safetensors", "dog.safetensors.*image"),
    "no such method": ("method: ziplora", "method: zipora", "zipora.*ziplora"),
    "no such base": ("base: base", "base: nowhere/at-all", "nowhere/at-all"),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_bad_manifest_is_one_clear_line_and_exit_code_2(grid: Grid, name: str) -> None:
    good, bad, expected = BAD_MANIFESTS[name]
    manifest = grid.manifest()
    text = manifest.read_text()
    assert good in text
    manifest.write_text(text.replace(good, bad))
    refused(ziplora("run", manifest, "--inline"), expected, grid)


def refused(result: subprocess.CompletedProcess[str], expected: str, grid: Grid) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert re.search(expected, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1, result.stderr
    assert not list(grid.root.glob("catalog/*"))


def test_wrong_credentials_missing_bucket_and_no_server(
    grid: Grid, swift: Swift, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = grid.manifest()
    refused(ziplora("run", manifest, "--output", "s3://no-such-bucket/x"), "no-such-bucket", grid)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused(ziplora("run", manifest, "--output", swift.url), "credentials|secret|access", grid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    refused(ziplora("run", manifest, "--output", swift.url), "127.0.0.1", grid)


def test_metrics_port_in_use(grid: Grid) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(ziplora("run", grid.manifest(), "--inline", "--metrics-port", port), f"--metrics-port {port}", grid)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small file system needs root"
)
def test_full_disk_gives_jobs_up_and_leaves_nothing_that_looks_complete(grid: Grid) -> None:
    small = grid.root / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", small], check=True)
    try:
        result = ziplora("run", grid.manifest(), "--inline", "--output", small / "catalog")
        assert result.returncode == 1, result.stdout + result.stderr
        assert "space" in result.stdout
        assert "Traceback" not in result.stderr
        for entry in Catalog(small / "catalog").entries():
            assert all((small / "catalog" / item.key).stat().st_size == item.size for item in entry.objects.values())
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_catalog_that_cannot_be_listed_any_more_hides_no_outcome(
    grid: Grid, capsys: pytest.CaptureFixture[str]
) -> None:
    planned, manifest = make_plan(str(grid.manifest()), None, False)
    assert planned.base is not None
    entries = Path(planned.output, "entries")
    entries.parent.mkdir(parents=True, exist_ok=True)
    entries.symlink_to(entries)
    other_base = replace(planned, base=replace(planned.base, digest="0" * 64))
    options: dict[str, Any] = {"address": None, "inline": True, "crew": Crew(), "device": "cpu", "dtype": "auto"}
    options |= {
        "compile": False,
        "threads": 1,
        "metrics_port": 0,
        "attempts": 1,
        "deadline": 60.0,
        "checkpoint_every": 60.0,
    }
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(BadInput, match="was planned with"):
            execute(manifest, other_base, gallery=False, **options)
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr()
    assert "committed 0 (0 B), before this run 0, given up 0, 4 left" in said.out
    assert "what is committed is as the workers told it" in said.err


def test_inline_takes_no_crew(grid: Grid) -> None:
    result = ziplora("run", grid.manifest(), "--inline", "--workers", 2)
    assert (result.returncode, "--inline is one worker in this process" in result.stderr) == (2, True)


def test_plan_needs_neither_torch_nor_ray(grid: Grid) -> None:
    manifest = grid.manifest()
    code = (
        "import sys; from service.cli import cli\n"
        f"cli.main(['plan', {str(manifest)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'ray', 'diffusers', 'transformers'} & set(sys.modules), 'too much'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4: 0 committed, 4 to do" in done.stdout


def test_loading_a_model_draws_no_bars() -> None:
    """tqdm reads its environment as it is imported: nothing that the command line needs may import it before."""
    code = (
        "from service.cli import cli\n"
        "cli.main(['methods'], standalone_mode=False)\n"
        "import tqdm.auto; assert tqdm.auto.tqdm([]).disable"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_small_commands() -> None:
    methods = ziplora("methods").stdout
    assert "ziplora" in methods
    assert "images and a recipe, no merged file" in methods
    assert "base: amused/amused-256, revision: null, rank: 16" in " ".join(methods.split())
    assert json.loads(ziplora("schema").stdout)["type"] == "object"
    assert re.fullmatch(r"ziplora, version \d+\.\d+\.\d+\n", ziplora("--version").stdout)
    assert ziplora("run").returncode == 2
