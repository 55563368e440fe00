"""Results of a bench as a file, with what one must know to read them: machine, versions and command."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "diffusers", "ray", "boto3", "pyarrow")
ABOUT = ("command", "machine")  # keys of the file beside the figures'


def machine() -> dict[str, Any]:
    """Processor, load, versions of what is installed (a GPU machine may lack some), and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: version(package) for package in VERSIONS if find_spec(package)},
        "commit": commit,
    }


def about() -> dict[str, Any]:
    """The command as typed (without the interpreter's place) and where it ran."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    module = specification.name if specification else Path(sys.argv[0]).name
    return {"command": " ".join(["python -m", module, *sys.argv[1:]]), "machine": machine()}


def figures_of(path: Path) -> dict[str, Any]:
    """What the file holds beside `about`; nothing if there is none."""
    known = json.loads(path.read_text()) if path.exists() else {}
    return {name: value for name, value in known.items() if name not in ABOUT}


def save(path: Path, figures: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**about(), **figures}, indent=2, ensure_ascii=False) + "\n")
