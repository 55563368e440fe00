"""`ziplora …`: the commands, and how errors become messages and exit codes. Only this and the other cli_*.py read the
command line or print, with console.py and run_shown.py.

Exit codes: 0 all is done; 1 some jobs were given up, or an object is not as promised; 2 the user's input is wrong;
130 interrupted.
"""

import logging
import os
import re
import sys
import traceback
from importlib.metadata import requires, version
from typing import NoReturn

import click

from service.cli_catalog import COMMANDS as CATALOG_COMMANDS
from service.cli_deploy import deploy
from service.cli_jobs import COMMANDS as JOB_COMMANDS
from service.cli_look import COMMANDS as LOOK_COMMANDS
from service.cli_loras import loras
from service.cli_pages import COMMANDS as PAGE_COMMANDS
from service.cli_plan import COMMANDS as PLAN_COMMANDS
from service.cli_report import report
from service.cli_run import run
from service.cli_styledrop import styledrop
from service.cli_train import train
from service.console import ERR, complain
from service.errors import ServiceError
from ziplora.errors import LoRAError


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


for command in (
    *PLAN_COMMANDS,
    train,
    loras,
    styledrop,
    run,
    *JOB_COMMANDS,
    *LOOK_COMMANDS,
    *CATALOG_COMMANDS,
    *PAGE_COMMANDS,
    report,
    deploy,
):
    cli.add_command(command)


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
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else None
        if missing in _needed():
            complain(
                f"this command takes {missing}, which is not in this environment (`make client` leaves it out):"
                " use one with all of ziplora, which `make venv` makes"
            )
            sys.exit(2)
        complain(f"{type(error).__name__}: {error} (a defect: --debug shows where)")
        sys.exit(1)


def _needed() -> set[str]:
    """Packages that a whole installation has."""
    return {re.split(r"[^\w-]", one)[0].replace("-", "_") for one in requires("ziplora") or [] if "extra ==" not in one}
