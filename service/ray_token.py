"""Ray's token: where a user has it, and that clusters which we start have one. Before `ray` is imported: it reads the
mode once, at its import. Standard library only.

Ray's own names are used: RAY_AUTH_MODE=token turns authentication on, the token is RAY_AUTH_TOKEN, else the content of
the file RAY_AUTH_TOKEN_PATH, else of ~/.ray/auth_token.
"""

import secrets
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from service.errors import AccessDenied

MODE, TOKEN, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def token_from(environment: Mapping[str, str]) -> str | None:
    """The token to show to a cluster; None: none is meant to be shown.

    The file in the home directory, which Ray writes for clusters on this machine, is not shown to others unless
    RAY_AUTH_MODE=token asks for it. AccessDenied when the file cannot be read.
    """
    if environment.get(MODE, "").lower() == "disabled":
        return None
    if token := environment.get(TOKEN, "").strip():
        return token
    if path := environment.get(PATH):
        return _read(Path(path), f"{PATH}={path}")
    if environment.get(MODE, "").lower() == "token":
        return _read(Path.home() / ".ray/auth_token", "RAY_AUTH_MODE=token, but neither RAY_AUTH_TOKEN nor "
                     "RAY_AUTH_TOKEN_PATH is set, and ~/.ray/auth_token")  # fmt: skip
    return None


def join_with_token(environment: MutableMapping[str, str]) -> None:
    """Let Ray show the token, if there is one, to the cluster that will be joined. AccessDenied."""
    if token_from(environment) is not None:
        environment.setdefault(MODE, "token")


def start_with_token(environment: MutableMapping[str, str]) -> None:
    """Let a cluster that is started here demand a token: the user's, or one made for it alone and written nowhere.

    RAY_AUTH_MODE=disabled turns it off.
    """
    mode = environment.setdefault(MODE, "token").lower()
    if mode == "token" and not environment.get(TOKEN) and not environment.get(PATH):
        environment[TOKEN] = secrets.token_hex(32)


def _read(path: Path, named: str) -> str:
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise AccessDenied(f"{named} cannot be read ({reason}): put the cluster's token there") from error
    if not token:
        raise AccessDenied(f"{named} is empty: put the cluster's token there")
    return token
