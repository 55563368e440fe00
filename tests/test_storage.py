"""One contract for every store, held against a local directory and a real S3 server; then what only one of them has."""

import contextlib
import hashlib
import http.server
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.errors import AccessDenied, AlreadyCommitted, NotFound, StorageError, StoreFull, Unavailable
from service.s3 import S3Store
from service.storage import LocalStore, Store, check_key, open_store, sha256_of, split_location
from tests.conftest import Swift

UNSAFE = ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/./b", "a/", "a\\b", "..\\x", "a\x00b", "a\nb", "\x7f"]
UNSAFE += ["\ud800", ".tmp/x", "x" * 1025]


class TestContract:
    def test_what_is_put_is_read(self, store: Store, tmp_path: Path) -> None:
        file = tmp_path / "body"
        file.write_bytes(b"from a file")
        store.put("pairs/a/merged.json", b"{}", content_type="application/json")
        store.put("pairs/a/merged.png", file)
        store.put("pairs/a/empty", b"")
        assert store.get("pairs/a/merged.json") == b"{}"
        assert store.get("pairs/a/merged.png") == b"from a file"
        assert store.get("pairs/a/empty") == b"".join(store.stream("pairs/a/empty")) == b""
        store.put("pairs/a/merged.json", b"replaced")
        assert store.get("pairs/a/merged.json") == b"replaced"
        assert sha256_of(store, "pairs/a/merged.png") == hashlib.sha256(b"from a file").hexdigest()

    def test_ranges_are_slices(self, store: Store) -> None:
        body = bytes(range(200))
        store.put("x", body)
        store.put("empty", b"")
        for start, stop in [(0, 8), (8, 100), (190, 500), (200, 300), (999, 1000), (5, 5), (7, 3)]:
            assert store.get_range("x", start, stop) == body[start:stop]
        assert store.get_range("empty", 0, 10) == b""
        assert b"".join(store.stream("x", 150)) == body[150:]
        assert b"".join(store.stream("x", 200)) == b""

    def test_a_large_file_goes_up_in_parts_and_comes_down_in_chunks(self, store: Store, tmp_path: Path) -> None:
        body = os.urandom(1 << 20) * 20  # above the multipart threshold; the last part is shorter
        (tmp_path / "large").write_bytes(body)
        store.put("large.safetensors", tmp_path / "large", content_type="application/octet-stream")
        assert store.head("large.safetensors").size == len(body)
        store.download("large.safetensors", tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == body
        assert store.get_range("large.safetensors", (16 << 20) - 5, (16 << 20) + 5) == body[-5:] + body[:5]
        assert max(len(chunk) for chunk in store.stream("large.safetensors")) <= 1 << 20

    def test_what_is_missing_is_not_found(self, store: Store, tmp_path: Path) -> None:
        store.put("a/b", b"")
        for key in ("nope", "a", "a/b/c", "a/nope"):
            for read in (store.get, store.head, lambda key: list(store.stream(key))):
                with pytest.raises(NotFound, match=key):
                    read(key)
            with pytest.raises(NotFound):
                store.get_range(key, 0, 4)
            with pytest.raises(NotFound):
                store.download(key, tmp_path / "file")
        assert not list(tmp_path.glob("*file*"))

    def test_head_describes(self, store: Store) -> None:
        store.put("x", b"1234")
        first = store.head("x")
        assert (first.key, first.size) == ("x", 4)
        assert abs(datetime.now(UTC) - first.modified) < timedelta(minutes=5)
        store.put("x", b"5678")
        assert store.head("x").etag != first.etag

    def test_listings_are_sorted_by_key_and_paged(self, store: Store) -> None:
        keys = [f"many/{i:03}" for i in range(50)]
        keys += ["a-b/x", "a/x", "a/b/c", "a.b", "many-", "ü/ö", "sp ace", "%41+&="]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, key.encode()), keys))
        assert [found.key for found in store.list()] == sorted(keys)
        assert [found.key for found in store.list("many/")] == keys[:50]
        assert [found.key for found in store.list("many/01")] == [f"many/01{i}" for i in range(10)]
        assert [found.key for found in store.list("a")] == ["a-b/x", "a.b", "a/b/c", "a/x"]
        assert [found.key for found in store.list("a/")] == ["a/b/c", "a/x"]
        assert list(store.list("nothing/here")) == []
        assert {found.size for found in store.list("many/")} == {8}
        assert next(iter(store.list("ü"))).key == "ü/ö"

    def test_delete_is_idempotent(self, store: Store) -> None:
        store.put("a/b/c", b"")
        for _ in range(2):
            store.delete("a/b/c")
        store.delete("never/there")
        assert list(store.list()) == []

    def test_create_only_never_replaces(self, store: Store, tmp_path: Path) -> None:
        store.probe()
        assert store.creates_only
        assert list(store.list()) == []
        store.put("entry", b"first", create_only=True)
        (tmp_path / "body").write_bytes(b"third")
        for body in (b"second", tmp_path / "body"):
            with pytest.raises(AlreadyCommitted, match="entry"):
                store.put("entry", body, create_only=True)
        assert store.get("entry") == b"first"

    def test_create_only_without_a_probe_learns_by_itself(self, store: Store) -> None:
        store.put("entry", b"first", create_only=True)
        with pytest.raises(AlreadyCommitted):
            store.put("entry", b"second", create_only=True)
        assert [found.key for found in store.list()] == ["entry"]

    def test_of_racing_creates_one_is_stored_whole(self, store: Store) -> None:
        store.probe()
        bodies = [bytes([i]) * 5000 for i in range(8)]

        def create(body: bytes) -> bool:
            with contextlib.suppress(AlreadyCommitted):
                store.put("entry", body, create_only=True)
                return True
            return False

        with ThreadPoolExecutor(8) as pool:
            winners = [body for body, won in zip(bodies, pool.map(create, bodies), strict=True) if won]
        assert store.get("entry") in winners
        assert len(winners) == 1 or isinstance(store, S3Store)  # Swift lets several through in the same instant

    def test_unsafe_keys_are_refused(self, store: Store, tmp_path: Path) -> None:
        for use in (
            store.get,
            store.head,
            store.delete,
            lambda key: store.get_range(key, 0, 1),
            lambda key: list(store.stream(key)),
            lambda key: store.put(key, b""),
            lambda key: store.download(key, tmp_path / "x"),
        ):
            for key in UNSAFE:
                with pytest.raises(StorageError, match="the key"):
                    use(key)

    def test_a_failed_download_leaves_what_was_there(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"old")
        with pytest.raises(NotFound):
            store.download("nope", tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == b"old"

    def test_a_body_that_is_missing_is_named(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="no-body"):
            store.put("x", tmp_path / "no-body")
        assert list(store.list()) == []

    def test_it_travels_to_workers(self, store: Store) -> None:
        store.put("x", b"1")
        assert pickle.loads(pickle.dumps(store)).get("x") == b"1"
        assert open_store(store.url).get("x") == b"1"


def test_locations() -> None:
    assert open_store("file:///a/b%20c").url == "/a/b c"
    assert open_store("s3://bucket/some/prefix/").url == "s3://bucket/some/prefix"
    assert open_store("s3://bucket").url == "s3://bucket"
    with pytest.raises(StorageError, match="gs://"):
        open_store("gs://bucket/x")
    with pytest.raises(StorageError, match="bucket"):
        open_store("s3:///x")
    with pytest.raises(StorageError, match="three slashes"):
        open_store("file://a/b")
    with pytest.raises(StorageError, match="names a bucket"):
        split_location("s3://bucket")
    store, key = split_location("s3://bucket/loras/dog (v1).safetensors")
    assert (store.url, key) == ("s3://bucket", "loras/dog (v1).safetensors")


def test_a_link_given_as_location_is_followed(tmp_path: Path) -> None:
    """Hub caches give files as links into a blob directory."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"lora")
    (tmp_path / "snapshot" / "dog.safetensors").symlink_to("../blobs/abc")
    store, key = split_location(tmp_path / "snapshot" / "dog.safetensors")
    assert store.get(key) == b"lora"


def test_safe_keys_pass() -> None:
    for key in ("a", "pairs/0a/1b/merged.safetensors", "ü/ö x (1)…", "a..b/.hidden", "x" * 1024):
        assert check_key(key) == key


class TestLocal:
    def test_links_that_lead_out_are_refused(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "secret").write_bytes(b"secret")
        store = LocalStore(tmp_path / "store")
        store.put("real", b"1")
        (store.root / "dir").symlink_to(outside)
        (store.root / "file").symlink_to(outside / "secret")
        for key in ("dir/secret", "file"):
            with pytest.raises(StorageError, match="leads out"):
                store.get(key)
            with pytest.raises(StorageError, match="leads out"):
                store.put(key, b"overwritten")
            with pytest.raises(StorageError, match="leads out"):
                store.delete(key)
        assert [found.key for found in store.list()] == ["real"]
        assert [path.name for path in outside.iterdir()] == ["secret"]
        assert (outside / "secret").read_bytes() == b"secret"

    def test_a_root_that_is_a_link_is_fine(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        LocalStore(tmp_path / "link").put("a/b", b"1")
        assert (tmp_path / "real" / "a" / "b").read_bytes() == b"1"

    def test_special_files_are_not_objects(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(NotFound, match="not a file"):
            LocalStore(tmp_path).get("fifo")
        assert list(LocalStore(tmp_path).list()) == []

    def test_probe_of_a_file_or_of_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StorageError, match="is a file"):
            LocalStore(tmp_path / "file").probe()
        with pytest.raises(NotFound, match="nope"):
            LocalStore(tmp_path / "nope").probe(write=False)
        with pytest.raises(StorageError):
            LocalStore(tmp_path / "file").put("x", b"")

    def test_a_key_cannot_be_both_object_and_directory(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        store.put("a", b"")
        with pytest.raises(StorageError, match="cannot hold both"):
            store.put("a/b", b"")
        store.put("c/d", b"")
        with pytest.raises(StorageError, match="cannot hold both"):
            store.put("c", b"")

    def test_a_killed_writer_leaves_nothing_that_counts(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        script = f"""
            import os, pathlib, service.storage as s
            def fill(file, body):
                file.write(b"half"); file.flush(); print("half", flush=True); import time; time.sleep(60)
            s._fill = fill
            s.LocalStore(pathlib.Path({str(tmp_path)!r})).put("entry", b"whole", create_only=True)
        """
        writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert list(store.list()) == []
        (leftover,) = (tmp_path / ".tmp").iterdir()
        store.probe()
        assert leftover.exists()  # another process may be writing it now
        os.utime(leftover, (0, 0))
        store.probe()
        assert not leftover.exists()
        store.put("entry", b"whole", create_only=True)

    def test_a_full_disk(self, small_disk: Path) -> None:
        store = LocalStore(small_disk)
        store.put("small", b"x" * 1000)
        with pytest.raises(StoreFull, match=r"large.*free some space"):
            store.put("large", b"x" * (3 << 20))
        source = LocalStore(Path(tempfile.mkdtemp()))
        source.put("large", b"x" * (3 << 20))
        with pytest.raises(StoreFull):
            source.download("large", small_disk / "copy")
        assert [found.key for found in store.list()] == ["small"]
        assert list((small_disk / ".tmp").iterdir()) == []
        store.put("another", b"x" * 1000)

    def test_a_limit_on_file_sizes_reads_as_full(self, tmp_path: Path) -> None:
        script = f"""
            import pathlib, resource, service.errors, service.storage
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                service.storage.LocalStore(pathlib.Path({str(tmp_path)!r})).put("x", b"x" * 200_000)
            except service.errors.StoreFull as error:
                print(error)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
        )
        assert "cannot be written: file too large" in done.stdout
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_odd_umasks_and_rights(self) -> None:
        """As an ordinary user: a umask of 0777 does not lock the store out; what is not ours is AccessDenied."""
        script = """
            import os, pathlib, sys, service.errors, service.storage
            root = pathlib.Path(sys.argv[1])
            if os.getuid() == 0:
                os.setuid(65534)
            os.umask(0o777)
            store = service.storage.LocalStore(root / "deep" / "store")
            store.probe()
            store.put("a/b", b"1")
            store.put("a/c", b"1", create_only=True)
            assert store.get("a/b") == b"1" and [f.key for f in store.list()] == ["a/b", "a/c"]
            (root / "locked").mkdir()
            for act in (lambda s: s.probe(), lambda s: s.put("x", b""), lambda s: s.get("x"), lambda s: list(s.list())):
                try:
                    act(service.storage.LocalStore(root / "locked"))
                except service.errors.AccessDenied as error:
                    print("refused:", error)
        """
        with tempfile.TemporaryDirectory(dir="/tmp") as directory:
            os.chmod(directory, 0o777)
            done = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(script), directory],
                capture_output=True,
                text=True,
            )
            for path in [Path(directory) / "locked", *Path(directory).rglob("*")]:
                path.chmod(0o700)  # so that it can be removed
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("refused:") == 4
        assert "check its owner and mode" in done.stdout

    def test_ordinary_umasks_are_respected(self, tmp_path: Path) -> None:
        LocalStore(tmp_path / "s").put("a", b"")
        mask = os.umask(0)
        os.umask(mask)
        assert stat.S_IMODE((tmp_path / "s" / "a").stat().st_mode) == 0o666 & ~mask | 0o600
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o777 & ~mask | 0o700


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]).returncode != 0:
        pytest.skip("a small file system needs the right to mount; the limit on file sizes is tested without")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_directories_that_come_and_go_harm_no_put(tmp_path: Path) -> None:
    """Deletes take the directories that they leave empty: those of a put that is just making its own below them."""
    store = LocalStore(tmp_path)

    def come_and_go(name: int) -> None:
        for _ in range(150):
            store.put(f"a/b/{name}/c/d", b"")
            store.delete(f"a/b/{name}/c/d")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert list(store.list()) == []


class TestS3:
    def test_wrong_secret(self, swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        for act in (lambda s: s.probe(), lambda s: s.get("x"), lambda s: s.head("x"), lambda s: s.put("x", b"")):
            with pytest.raises(AccessDenied, match="credentials"):
                act(open_store(swift.url))

    def test_no_credentials(self, swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
            open_store(swift.url).probe()

    def test_missing_bucket(self, swift: Swift) -> None:
        for act in (lambda s: s.probe(), lambda s: s.put("x", b""), lambda s: list(s.list())):
            with pytest.raises(NotFound, match="bucket nosuchbucket does not exist at http://127"):
                act(open_store("s3://nosuchbucket/prefix"))

    def test_a_bucket_name_that_cannot_be(self, swift: Swift) -> None:
        with pytest.raises(StorageError, match="bucket name"):
            open_store("s3://No_Bucket!/x").probe()

    def test_closed_port(self, swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{unused.getsockname()[1]}")
            with pytest.raises(Unavailable, match="AWS_ENDPOINT_URL_S3"):
                open_store("s3://bucket").probe()

    def test_an_endpoint_that_is_no_url(self, swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "localhost:9000")
        with pytest.raises(StorageError, match="http://host:port"):
            open_store("s3://bucket").probe()

    def test_the_region_comes_from_either_variable(self, swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
        def signed_for() -> str:
            return open_store("s3://bucket").link("x", 60, "x").split("X-Amz-Credential=")[1].split("%2F")[2]

        assert signed_for() == swift.environment["AWS_DEFAULT_REGION"]
        monkeypatch.setenv("AWS_REGION", "mars-1")
        assert signed_for() == "mars-1"
        monkeypatch.delenv("AWS_DEFAULT_REGION")
        monkeypatch.delenv("AWS_REGION")
        assert signed_for() == "us-east-1"

    def test_a_profile_that_does_not_exist(self, swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        for act in (lambda s: s.probe(), lambda s: list(s.list()), lambda s: s.get("x")):
            with pytest.raises(AccessDenied, match="nobody"):
                act(open_store("s3://bucket"))

    def test_over_tls(self, swift: Swift, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        endpoint, certificate = swift.node.start_tls()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(StorageError, match="AWS_CA_BUNDLE"):
            open_store(swift.url).probe()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        store = open_store(swift.url)
        store.probe()
        body = os.urandom(1 << 20) * 17
        (tmp_path / "large").write_bytes(body)
        store.put("large", tmp_path / "large")
        store.put("small", b"1", create_only=True)
        assert store.get("large") == body
        assert store.get("small") == b"1"

    def test_a_server_that_ignores_conditions(self, swift: Swift) -> None:
        store = S3Store(swift.bucket)
        store._creates_only = False  # as a probe finds on such a server
        store.put("entry", b"first", create_only=True)
        with pytest.raises(AlreadyCommitted):
            store.put("entry", b"second", create_only=True)
        assert store.get("entry") == b"first"

    def test_connections_that_break_are_resumed(self, swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
        body = os.urandom(1 << 20) * 5
        open_store(swift.url).put("x", body)
        with breaking_proxy(swift.node.port, answer_bytes=[2 << 20, 100_000, 3 << 20]) as port:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
            assert b"".join(open_store(swift.url).stream("x")) == body

    def test_answers_of_servers(self, swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [(0, "")]

        def answer(method: str, headers: dict[str, str]) -> tuple[int, bytes]:
            status, code = now[0]
            return (200, LISTING) if method == "GET" else (status, error_body(code))

        with answering(answer) as port:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
            for status, code, error in (
                (503, "SlowDown", Unavailable),
                (500, "InternalError", Unavailable),
                (507, "", StoreFull),
                (403, "QuotaExceeded", StoreFull),
                (400, "EntityTooLarge", StoreFull),
                (403, "AccessDenied", AccessDenied),
                (403, "RequestTimeTooSkewed", AccessDenied),
                (400, "Strange", StorageError),
            ):
                now[0] = (status, code)
                with pytest.raises(error, match=f"answered {status} {code or status}") as caught:
                    open_store("s3://bucket/catalog").probe()
                assert type(caught.value) is error

    def test_a_server_that_asks_to_slow_down_is_asked_again_later(
        self, swift: Swift, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def answer(method: str, headers: dict[str, str]) -> tuple[int, bytes]:
            asked.append(method)
            return (503, error_body("SlowDown")) if len(asked) < 4 else (200, b"")

        with answering(answer) as port:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
            open_store("s3://bucket/catalog").put("x", b"1")
        assert asked == ["PUT"] * 4

    def test_an_upload_in_parts_that_fails_leaves_none_behind(
        self, swift: Swift, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "large").write_bytes(bytes(40 << 20))
        begun = b"<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>"
        methods: list[str] = []

        def answer(method: str, headers: dict[str, str]) -> tuple[int, bytes]:
            methods.append(method)
            if method == "PUT":
                return (403, error_body("QuotaExceeded")) if methods.count("PUT") == 2 else (200, b"")
            return 200, begun

        with answering(answer) as port:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
            with pytest.raises(StoreFull, match="no space or quota left"):
                open_store("s3://bucket/catalog").put("x", tmp_path / "large")
        assert methods[0] == "POST"
        assert methods[-1] == "DELETE"
        assert methods.count("POST") == 1  # never completed

    @pytest.mark.parametrize(("status", "code"), [(200, ""), (501, "NotImplemented")])
    def test_a_probe_finds_servers_without_conditions(
        self, status: int, code: str, swift: Swift, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def answer(method: str, headers: dict[str, str]) -> tuple[int, bytes]:
            if method == "PUT":
                return (status, error_body(code)) if "If-None-Match" in headers else (200, b"")
            return 200, LISTING

        with answering(answer) as port:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
            store = open_store("s3://bucket/catalog")
            store.probe()
            assert not store.creates_only


LISTING = b"<ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount></ListBucketResult>"


def error_body(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>so it is</Message></Error>".encode() if code else b""


@contextlib.contextmanager
def answering(answer: Callable[[str, dict[str, str]], tuple[int, bytes]]) -> Iterator[int]:
    """A server that gives the answers (status, body) of `answer(method, headers)`; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = answer(self.command, dict(self.headers))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"1"')
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = do_PUT  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def breaking_proxy(upstream: int, answer_bytes: list[int]) -> Iterator[int]:
    """Forwards TCP connections; the i-th is cut after `answer_bytes[i]` bytes of answer, later ones are left alone."""
    limits = iter(answer_bytes)
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, limit: float) -> None:
        with contextlib.suppress(OSError):
            while limit > 0 and (chunk := source.recv(min(65536, int(min(limit, 65536))))):
                sink.sendall(chunk)
                limit -= len(chunk)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", upstream))
                limit = next(limits, float("inf"))
                for ends in ((client, server, float("inf")), (server, client, limit)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
