"""Who may import what: each heavy dependency has its owners, and the algorithms know nothing of the service."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWNERS = {
    "ray": {"service/ray_cluster.py", "service/ray_jobs.py", "service/ray_pool.py"},
    "boto3": {"service/s3.py"},
    "botocore": {"service/s3.py"},
    "s3transfer": {"service/s3.py"},
    "prometheus_client": {"service/metrics.py"},
    "yaml": {"service/kustomize.py", "service/yaml_text.py"},
    "pydantic": {
        "service/manifest_checks.py",
        "service/manifest_file.py",
        "service/manifest_schema.py",
        "service/worker.py",  # where knobs enter it
    },
    "pyarrow": {"service/index.py", "service/index_rows.py"},
    "click": {
        "service/cli.py",
        "service/cli_catalog.py",
        "service/cli_deploy.py",
        "service/cli_jobs.py",
        "service/cli_look.py",
        "service/cli_loras.py",
        "service/cli_options.py",
        "service/cli_pages.py",
        "service/cli_plan.py",
        "service/cli_plots.py",
        "service/cli_report.py",
        "service/cli_run.py",
        "service/cli_styledrop.py",
        "service/cli_train.py",
    },
    "rich": {"service/cli_look.py", "service/cli_loras.py", "service/cli_plan.py", "service/console.py"},
    "starlette": {"service/study_server.py"},
    "uvicorn": {"service/study_server.py"},
    "matplotlib": {"ziplora/plots.py"},
    "peft": {"ziplora/sparse_merges.py", "ziplora/train.py"},
    "safetensors": {"ziplora/adapter_files.py", "ziplora/calibration_files.py", "ziplora/formats.py"},
}
POCKET = "ziplora/pocket/"  # builds and trains models of its own, so the model libraries are its business too
MODEL_OWNERS = {
    "numpy": {"service/intervals.py"},
    "diffusers": {"ziplora/base.py", "ziplora/masked.py", "ziplora/sample.py", "ziplora/train.py"},
    "transformers": {"ziplora/base.py", "ziplora/score.py", "ziplora/train.py"},
}
PLANNING = (
    "service.cli",
    "service.plan",
    "service.plan_text",
    "service.catalog",
    "service.tiles",
    "service.run",
    "service.pool",
    "ziplora",
    "ziplora.methods",
)
HEAVY = {"torch", "ray", "diffusers", "transformers", "peft", "numpy", "safetensors", "boto3", "pyarrow"}


def sources() -> list[Path]:
    return [path for package in ("service", "ziplora") for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_dependencies_stay_with_their_owners(path: Path) -> None:
    name, found = str(path.relative_to(ROOT)), imported(path)
    allowed = OWNERS if name.startswith(POCKET) else OWNERS | MODEL_OWNERS
    strangers = {module for module in found & allowed.keys() if name not in allowed[module]}
    assert not strangers, f"{name} imports {strangers}, which belong to {[allowed[module] for module in strangers]}"
    if name.startswith("ziplora/"):
        assert not found & {"service", "ray", "boto3", "click", "rich", "argparse"} or name.startswith(POCKET)
        assert "service" not in found


@pytest.mark.parametrize("module", PLANNING)
def test_planning_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_check_can_fail(tmp_path: Path) -> None:
    offender = tmp_path / "offender.py"
    offender.write_text("def f():\n    from ray.util import metrics\n    import boto3.session\n")
    assert imported(offender) == {"ray", "boto3"}
