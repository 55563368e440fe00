"""Given-up jobs, taken up again: their records under failures/ are removed, so that nothing is held against them."""

from fnmatch import fnmatchcase

from service.catalog import Catalog
from service.entry import Failure
from service.steps import Steps, parallel

DELETES = 16  # at a time


def forget_failures(
    catalog: Catalog, subject: str = "*", style: str = "*", method: str = "*", kind: str = "*"
) -> Steps[Failure]:
    """One step per failure that matches these patterns (`*`, `?`, `[abc]`; case counts), its record removed."""

    def matches(failure: Failure) -> bool:
        job = failure.job
        written = (job["subject"]["id"], job["style"]["id"], job["method"], failure.kind)
        return all(map(fnmatchcase, written, (subject, style, method, kind)))

    def forget(failure: Failure) -> Failure:
        catalog.clear_failure(failure.job_id)
        return failure

    found = list(filter(matches, catalog.failures()))
    return Steps(len(found), lambda: parallel(forget, found, DELETES))
