"""Where Ray's token is looked for, and that clusters of our own have one."""

import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import AccessDenied
from service.ray_token import join_with_token, start_with_token, token_from


def test_it_is_shown_only_where_the_user_means_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of this machine\n")
    (tmp_path / "file").write_text(" from a file\n")
    file = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}
    assert token_from({}) is None  # a token of the clusters of this machine is nobody else's business
    assert token_from({"RAY_AUTH_MODE": "token"}) == "of this machine"
    assert token_from(file) == "from a file"
    assert token_from({**file, "RAY_AUTH_TOKEN": "direct"}) == "direct"
    assert token_from({**file, "RAY_AUTH_MODE": "disabled"}) is None
    environment = dict(file)
    join_with_token(environment)
    assert environment["RAY_AUTH_MODE"] == "token"
    environment = {}
    join_with_token(environment)
    assert environment == {}


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AccessDenied, match=r"RAY_AUTH_TOKEN_PATH=/none cannot be read \(No such file or directory\)"):
        token_from({"RAY_AUTH_TOKEN_PATH": "/none"})
    with pytest.raises(AccessDenied, match=r"RAY_AUTH_MODE=token, but neither RAY_AUTH_TOKEN nor"):
        token_from({"RAY_AUTH_MODE": "token"})
    (tmp_path / "empty").touch()
    with pytest.raises(AccessDenied, match="is empty: put the cluster's token there"):
        token_from({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "empty")})


def test_a_cluster_of_our_own_has_a_token_of_its_own_unless_it_is_turned_off() -> None:
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    start_with_token(first)
    start_with_token(second)
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    off = {"RAY_AUTH_MODE": "disabled"}
    start_with_token(off)
    assert off == {"RAY_AUTH_MODE": "disabled"}
    given = {"RAY_AUTH_TOKEN": "mine"}
    start_with_token(given)
    assert given == {"RAY_AUTH_TOKEN": "mine", "RAY_AUTH_MODE": "token"}


def test_the_embedded_ray_turns_strangers_away() -> None:
    """The cluster that `ziplora run` starts: its GCS takes the token and nothing else."""
    code = """
import os, subprocess, sys
from service.ray_token import start_with_token
start_with_token(os.environ)
from service.ray_cluster import connect
import ray
connect(None, cpus=1)
ask = "import sys, ray; ray._raylet.GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None)"
def asked(**changes):
    environment = {**os.environ, **changes}
    gcs = ray.get_runtime_context().gcs_address
    done = subprocess.run([sys.executable, "-c", ask, gcs], env=environment, capture_output=True, text=True)
    return done.returncode == 0, "Unauthenticated" in done.stderr
print(asked(), asked(RAY_AUTH_TOKEN="wrong"))
ray.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split("\n")[-2] == "(True, False) (False, True)"
