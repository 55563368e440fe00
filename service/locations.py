"""Where a manifest's files are: relative paths resolved against the manifest's own place, patterns expanded.

A local path may go up with `..`, since a user's own files may lie anywhere; an S3 key may not. No file is opened here.
"""

import glob
import os
import re
import unicodedata
from fnmatch import fnmatchcase

from service.errors import StorageError
from service.storage import check_key, open_store

BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
GLOB = re.compile(r"[*?\[]")


def resolve_location(text: str, directory: str) -> str:
    """An absolute path or s3 URL for what is written in a file that lies in `directory` (absolute path or s3 URL).

    Raises ValueError for control characters, other schemes, and S3 keys that are not plain relative paths. A trailing
    slash stands for a prefix and is kept in S3 URLs.
    """
    for character in text:
        if unicodedata.category(character)[0] == "C":
            raise ValueError(f"holds the invisible or control character {character!r}; remove it")
    if text.startswith("s3://"):
        return _checked_s3(text)
    if "://" in text:
        raise ValueError(f"the scheme {text.split('://')[0]}:// is not known; expected a path or s3://bucket/key")
    if directory.startswith("s3://") and not text.startswith(("/", "~")):
        return _checked_s3(f"{directory}/{text.removeprefix('./')}")
    return os.path.abspath(os.path.join(directory, os.path.expanduser(text)))


def _checked_s3(url: str) -> str:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not BUCKET.fullmatch(bucket):
        raise ValueError(f"{url}: {bucket!r} is no bucket name; expected s3://bucket/key")
    if not key and not url.endswith("/"):
        raise ValueError(f"{url} names a bucket, not an object; expected s3://bucket/key")
    if key:
        try:
            check_key(key.removesuffix("/"))
        except StorageError as error:
            raise ValueError(f"{url}: {error}") from error
    return url


def is_pattern(location: str) -> bool:
    """Whether it has wildcards and does not itself name a local file."""
    return GLOB.search(location) is not None and (location.startswith("s3://") or not os.path.exists(location))


def matches(pattern: str) -> list[str]:
    """The files or objects that a pattern (absolute path or s3 URL) matches, sorted. StorageError if S3 fails."""
    if not pattern.startswith("s3://"):
        return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    bucket, _, key = pattern.removeprefix("s3://").partition("/")
    wildcard = GLOB.search(key)
    prefix = key[: wildcard.start()] if wildcard else key
    found = (info.key for info in open_store(f"s3://{bucket}").list(prefix))
    return [f"s3://{bucket}/{one}" for one in found if _matches_parts(one.split("/"), key.split("/"))]


def _matches_parts(key: list[str], pattern: list[str]) -> bool:
    """`*` and `?` do not cross '/', as in a shell."""
    return len(key) == len(pattern) and all(map(fnmatchcase, key, pattern))
