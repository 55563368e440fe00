"""Given-up jobs, found and taken up again: their records under failures/ are removed, so that nothing is held against
them."""

from collections.abc import Callable
from fnmatch import fnmatchcase

from service.catalog import Catalog, warn
from service.entry import Failure, Unreadable
from service.steps import Steps, parallel

DELETES = 16  # at a time


def select_failures(
    catalog: Catalog,
    subject: str = "*",
    style: str = "*",
    method: str = "*",
    kind: str = "*",
    unreadable: Callable[[Unreadable], None] = warn,
) -> list[Failure]:
    """The failures that match these patterns (`*`, `?`, `[abc]`; case counts), in the order of their ids."""

    def matches(failure: Failure) -> bool:
        job = failure.job
        written = (job["subject"]["id"], job["style"]["id"], job["method"], failure.kind)
        return all(map(fnmatchcase, written, (subject, style, method, kind)))

    return list(filter(matches, catalog.failures(unreadable)))


def forget_failures(
    catalog: Catalog, subject: str = "*", style: str = "*", method: str = "*", kind: str = "*"
) -> Steps[Failure]:
    """One step per failure that matches, its record removed."""

    def forget(failure: Failure) -> Failure:
        catalog.clear_failure(failure.job_id)
        return failure

    found = select_failures(catalog, subject, style, method, kind)
    return Steps(len(found), lambda: parallel(forget, found, DELETES))
