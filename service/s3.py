"""The store in S3 or a compatible server. Owns boto3; endpoint and credentials come the standard AWS ways.

Two habits make it work with servers other than AWS: checksums only where the protocol demands them (several servers
refuse the trailers that boto3 would send; our own sha256 is checked instead), and conditional writes only after a probe
has shown that this server honours them. Botocore's errors are translated in `_errors`, here only.
"""

import contextlib
import functools
import io
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from s3transfer.manager import TransferConfig, TransferManager

from service.errors import AccessDenied, AlreadyCommitted, NotFound, StorageError, StoreFull, Unavailable
from service.files import local_errors
from service.storage import CHUNK, TEMPORARY, ObjectInfo, Unfinished, check_key, download

ATTEMPTS = 6  # of each request: botocore's standard mode waits up to 1, 2, 4, 8, 16 s between them
PROBE_ATTEMPTS = 2
MAX_LINK_S = 7 * 86400  # of a presigned URL: the limit of its signature
STREAM_ATTEMPTS = 4  # in a row without a single new byte
TRANSFER = TransferConfig(multipart_threshold=16 << 20, multipart_chunksize=16 << 20, max_request_concurrency=4)

MISSING = {"NoSuchKey", "NoSuchUpload", "NotFound", "404"}
TAKEN = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
UNKNOWN_CONDITION = {"NotImplemented", "501"}
FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "507", "413"}
FULL |= {"EntityTooLarge"}  # how Swift and Ceph answer above a quota; our own parts are far below any size limit
BUSY = {"SlowDown", "RequestTimeout", "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequests"}
DENIED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed", "InvalidSecurity"}


class S3Store:
    """Objects under `s3://bucket/prefix`."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        if not bucket:
            raise StorageError("the S3 location has no bucket: write s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self._creates_only: bool | None = None  # unknown until a probe

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def get(self, key: str) -> bytes:
        return b"".join(self._chunks(key, 0, None))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        return b"".join(self._chunks(key, start, stop)) if start < stop else b""

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        return self._chunks(key, start, None)

    def download(self, key: str, path: Path) -> None:
        download(self, key, path)

    def put(self, key: str, body: bytes | Path, *, content_type: str | None = None, create_only: bool = False) -> None:
        name = self._name(key)
        headers = {"ContentType": content_type} if content_type else {}
        if create_only and self.creates_only:
            headers["IfNoneMatch"] = "*"
        elif create_only and self._exists(key):
            raise AlreadyCommitted(f"{self.url}/{key} exists already")
        if isinstance(body, bytes):
            with self._errors("writing", key):
                self._client.put_object(Bucket=self.bucket, Key=name, Body=body, **headers)
            return
        with self._errors("writing", key), local_errors(body):
            if create_only or body.stat().st_size < TRANSFER.multipart_threshold:
                with body.open("rb") as file:
                    self._client.put_object(Bucket=self.bucket, Key=name, Body=file, **headers)
            else:
                with TransferManager(self._client, TRANSFER) as manager:
                    manager.upload(str(body), self.bucket, name, headers).result()

    def head(self, key: str) -> ObjectInfo:
        with self._errors("reading", key):
            answer = self._client.head_object(Bucket=self.bucket, Key=self._name(key))
        return ObjectInfo(key, answer["ContentLength"], answer["LastModified"], answer.get("ETag"))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._errors("listing", prefix):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(self.prefix)
                    if not key.startswith(f"{TEMPORARY}/"):
                        yield ObjectInfo(key, found["Size"], found["LastModified"], found.get("ETag"))

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFound), self._errors("deleting", key):
            self._client.delete_object(Bucket=self.bucket, Key=self._name(key))

    def unfinished(self) -> Iterator[Unfinished]:
        with self._errors("listing the uploads of", self.prefix):
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for found in page.get("Uploads", ()):
                    yield Unfinished(found["Key"].removeprefix(self.prefix), found["UploadId"], found["Initiated"])

    def discard(self, upload: Unfinished) -> None:
        with contextlib.suppress(NotFound), self._errors("aborting the upload of", upload.key):
            request = {"Bucket": self.bucket, "Key": self.prefix + upload.key, "UploadId": upload.id}
            self._client.abort_multipart_upload(**request)

    def link(self, key: str, expires_s: int, file_name: str) -> str:
        """A presigned URL, made without a request. Where the credentials are temporary, it ends with them."""
        if not 1 <= expires_s <= MAX_LINK_S:
            raise StorageError(f"a link may last from 1 second to {MAX_LINK_S // 86400} days, not {expires_s} s")
        request = {"Bucket": self.bucket, "Key": self._name(key)}
        request["ResponseContentDisposition"] = f'attachment; filename="{file_name}"'
        with self._errors("making a link to", key):
            return self._client.generate_presigned_url("get_object", Params=request, ExpiresIn=expires_s)

    def probe(self, *, write: bool = True) -> None:
        with self._errors("listing", ""):
            quick = client(PROBE_ATTEMPTS)
            quick.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
        if write:
            self._creates_only = self._honours_create_only(quick)

    @property
    def creates_only(self) -> bool:
        if self._creates_only is None:
            self._creates_only = self._honours_create_only(self._client)
        return self._creates_only

    @property
    def _client(self) -> Any:
        return client(ATTEMPTS)

    def _name(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _exists(self, key: str) -> bool:
        try:
            self.head(key)
        except NotFound:
            return False
        return True

    def _honours_create_only(self, client: Any) -> bool:
        """Create a small object twice with `If-None-Match: *`: a server that knows it refuses the second."""
        probe = {"Bucket": self.bucket, "Key": f"{self.prefix}{TEMPORARY}/probe-{uuid.uuid4().hex}"}
        with self._errors("writing", "a probe"):
            try:
                for _ in range(2):
                    client.put_object(**probe, Body=b"probe", IfNoneMatch="*")
            except ClientError as error:
                code, _ = _code(error)
                if code in UNKNOWN_CONDITION:
                    client.put_object(**probe, Body=b"probe")  # is it writable at all?
                elif code in TAKEN:
                    return True
                else:
                    raise
            finally:
                with contextlib.suppress(ClientError, BotoCoreError):
                    client.delete_object(**probe)
        return False

    def _chunks(self, key: str, start: int, stop: int | None) -> Iterator[bytes]:
        """Bytes [start, stop) of one version of the object; a broken connection is resumed where it broke."""
        version, failures = None, 0
        while True:
            try:
                with self._errors("reading", key):
                    etag, body = self._open(key, start, stop)
                    version = version or etag
                    if etag != version:
                        raise StorageError(f"{self.url}/{key} was replaced while it was read: read it again")
                    with contextlib.closing(body):
                        while chunk := body.read(CHUNK):
                            start += len(chunk)
                            failures = 0
                            yield chunk
                    return
            except Unavailable:
                failures += 1
                if failures == STREAM_ATTEMPTS:
                    raise
                time.sleep(0.2 * 2**failures)

    def _open(self, key: str, start: int, stop: int | None) -> tuple[str, Any]:
        """(etag, readable body) of bytes [start, stop); an empty body for a range that starts at the end or beyond."""
        request = {"Bucket": self.bucket, "Key": self._name(key)}
        if start or stop is not None:
            request["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            answer = self._client.get_object(**request)
        except ClientError as error:
            if _code(error)[0] in ("InvalidRange", "416"):
                return "", io.BytesIO()
            raise
        if start and not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
            answer["Body"].close()
            raise StorageError(
                f"{self._endpoint} ignores byte ranges, {self.url}/{key} cannot be read from byte {start}"
            )
        return answer["ETag"], answer["Body"]

    @property
    def _endpoint(self) -> str:
        return self._client.meta.endpoint_url

    @contextlib.contextmanager
    def _errors(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise self._refused(error, f"{doing} {self.url}/{key}".rstrip("/")) from error
        except BotoCoreError as error:
            raise self._unanswered(error, f"{doing} {self.url}/{key}".rstrip("/")) from error

    def _refused(self, error: ClientError, doing: str) -> StorageError:
        """What the server's error answer means."""
        code, status = _code(error)
        answer = f"{self._endpoint} answered {status} {code} on {doing}"
        if code == "NoSuchBucket":
            return NotFound(
                f"the bucket {self.bucket} does not exist at {self._endpoint}: create it, or correct {self.url}"
            )
        if code in MISSING:
            return NotFound(f"{self.url} has no such object: {doing}")
        if code in TAKEN:
            return AlreadyCommitted(f"{doing}: it exists already")
        if code in FULL or status == 507:
            return StoreFull(f"{answer}: no space or quota left; free some, or write elsewhere")
        if code in BUSY or status == 429 or status >= 500:
            return Unavailable(f"{answer}, also after {ATTEMPTS} attempts: wait, or send it fewer requests at a time")
        if code == "RequestTimeTooSkewed":
            return AccessDenied(f"{answer}: the clocks of this machine and the server differ; set this one")
        if code in DENIED or status in (401, 403):
            return AccessDenied(f"{answer}: check the AWS credentials and what they may do with bucket {self.bucket}")
        return StorageError(f"{answer}: {error.response['Error'].get('Message', '')}")

    def _unanswered(self, error: BotoCoreError, doing: str) -> StorageError:
        """What it means that no answer came, or that no request could be made."""
        match error:
            case NoCredentialsError() | PartialCredentialsError() | ProfileNotFound() | CredentialRetrievalError():
                return AccessDenied(f"{doing}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile")
            case SSOError() | TokenRetrievalError():
                return AccessDenied(f"{doing}: {error}; log in again")
            case SSLError():
                return StorageError(
                    f"{doing}: {error}; trust its certificate with AWS_CA_BUNDLE=FILE, or correct the URL"
                )
            case HTTPClientError() | ConnectionError() | IncompleteReadError():
                return Unavailable(f"{doing}: {error}; is the server up, and AWS_ENDPOINT_URL_S3 right?")
            case _:
                return StorageError(f"{doing}: {error}")


def _code(error: ClientError) -> tuple[str, int]:
    """(S3 error code, HTTP status); the code of an answer without body is its status."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return error.response.get("Error", {}).get("Code", str(status)), status


def client(attempts: int) -> Any:
    """A client that tries each request so often: one per process and AWS environment, safe for threads."""
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _creating:
        return _client(attempts, environment)


@functools.lru_cache(maxsize=8)
def _client(attempts: int, environment: tuple[tuple[str, str], ...]) -> Any:
    session = boto3.session.Session()
    config = Config(
        signature_version="s3v4",
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=64,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # AWS_REGION is what other SDKs and the pods of EKS have; boto3 alone goes by AWS_DEFAULT_REGION
    region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
    try:
        return session.client("s3", region_name=region, config=config)
    except ValueError as error:
        raise StorageError(f"{error}: write AWS_ENDPOINT_URL_S3 as http://host:port or https://host") from error


_creating = threading.Lock()  # a client costs about a second: threads that start together make one
