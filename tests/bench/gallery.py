"""The index of 100,000 synthetic entries and the gallery of 10,000: seconds, memory, requests, first paint, scrolling.

    python -m tests.bench.gallery [--entries N] [--cells N] [--only gallery|index]

Entries and thumbnails are made beforehand, on a local disk; requests are what the same work would ask of S3 (a listing
is one per 1,000 keys). Result: results/gallery.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.catalog import Catalog
from service.index import update_index
from service.pages import Gallery
from service.storage import LocalStore, ObjectInfo
from tests.bench.record import figures_of, machine, save
from tests.pictures import id_of, job, picture, put_entry_alone

RESULTS = Path(__file__).parent / "results" / "gallery.json"
PAGE = 1000  # keys of a listing


class Requests(LocalStore):
    """Counts what S3 would be asked."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.counts: Counter[str] = Counter()

    def get(self, key: str) -> bytes:
        self.counts["get"] += 1
        return super().get(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        self.counts["get"] += 1
        return super().get_range(key, start, stop)

    def head(self, key: str) -> ObjectInfo:
        self.counts["head"] += 1
        return super().head(key)

    def put(self, key: str, body: bytes | Path, **options: Any) -> None:
        self.counts["put"] += 1
        super().put(key, body, **options)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.counts["list"] += 1
        for number, found in enumerate(super().list(prefix)):
            if number and number % PAGE == 0:
                self.counts["list"] += 1
            yield found


class Plain(LocalStore):
    """Does not wait for the disk: to make entries with."""

    def put(self, key: str, body: bytes | Path, **options: Any) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        assert isinstance(body, bytes)
        path.write_bytes(body)


def fill(root: Path, first: int, n: int, preview: bytes | None = None) -> None:
    """n entries of a grid with 400 styles."""
    catalog = Catalog(Plain(root))
    for i in range(first, first + n):
        put_entry_alone(catalog, job(f"subject-{i // 400:04}", f"style-{i % 400:04}"), preview)


def index_step(root: Path, rebuild: bool = False) -> dict[str, Any]:
    """One update in a process of its own, for its memory."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.gallery", "--index", str(root), *(["--rebuild"] if rebuild else [])],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def index_here(root: Path, rebuild: bool) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    store = Requests(root)
    started = time.monotonic()
    summary = update_index(Catalog(store), rebuild=rebuild)
    print(
        json.dumps(
            {
                "seconds": round(time.monotonic() - started, 2),
                "cpu_seconds": round(time.process_time(), 2),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "peak_bytes_before": before,
                "entries": summary.entries,
                "entries_read": summary.read,
                "shards": len(summary.shards),
                "shards_written": summary.written,
                "requests": dict(store.counts),
            }
        )
    )


def measure_index(root: Path, entries: int) -> dict[str, Any]:
    fill(root, 0, entries)
    found = {"build": index_step(root), "nothing_new": index_step(root)}
    fill(root, entries, 1)
    found["one_new"] = index_step(root)
    fill(root, entries + 1, 1000)
    found["thousand_new"] = index_step(root)
    shards = [one.size for one in LocalStore(root).list("index/")]
    found["index_bytes"] = {"parquet": sum(shards), "largest_shard": max(shards)}
    found["query"] = query(root)
    return found


def query(root: Path) -> dict[str, Any]:
    import duckdb
    import pandas as pd

    started = time.monotonic()
    text = f"select style, avg(style_alignment) from '{root}/index/*.parquet' group by 1 order by 2 desc limit 3"
    duckdb.sql(text).fetchall()
    ducked, started = time.monotonic() - started, time.monotonic()
    n = len(pd.read_parquet(root / "index", columns=["job_id", "subject", "style", "style_alignment"]))
    return {"duckdb_s": round(ducked, 2), "pandas_s": round(time.monotonic() - started, 2), "rows": n}


def measure_gallery(root: Path, cells: int) -> dict[str, Any]:
    side = int(cells**0.5)
    preview = picture("one for all", 256)

    catalog = Catalog(Plain(root))
    for i in range(side * side):
        one = job(f"subject-{i // side:03}", f"style-{i % side:03}")
        put_entry_alone(catalog, one, picture(id_of(one), 64) if i % 50 == 0 else preview)
    started = time.monotonic()
    store = Requests(root)
    Gallery(Catalog(store)).refresh()
    first, started = time.monotonic() - started, time.monotonic()
    counts = dict(store.counts)
    fill_one = job("subject-000", "another")
    put_entry_alone(catalog, fill_one, preview)
    store.counts.clear()
    Gallery(Catalog(store)).refresh()
    pages = {one.key: one.size for one in store.list("pages/")}
    return {
        "write": {"seconds": round(first, 1), "requests": counts},
        "one_new": {"seconds": round(time.monotonic() - started, 1), "requests": dict(store.counts)},
        "bytes": {
            "catalog.js": pages["pages/catalog.js"],
            "page": (root / "gallery.html").stat().st_size
            + sum(size for key, size in pages.items() if key.count("/") == 1 and key != "pages/catalog.js"),
            "largest_rows": max(size for key, size in pages.items() if key.startswith("pages/rows/")),
            "mean_thumbnail": round(
                sum(size for key, size in pages.items() if "/thumbs/" in key) / sum("/thumbs/" in key for key in pages)
            ),
        },
        "browser": in_browser(root),
    }


PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
SCROLL = """() => new Promise((resolve) => {
  const viewport = document.getElementById('viewport'), frames = [], cells = [];
  let last = performance.now(), n = 0;
  const step = (now) => {
    frames.push(now - last); last = now;
    cells.push(document.querySelectorAll('.cell').length);
    viewport.scrollBy(n % 40 < 20 ? 60 : -20, 180);
    n += 1;
    if (n < 240) requestAnimationFrame(step);
    else { frames.shift(); frames.sort((a, b) => a - b); resolve({
      frames: frames.length, median_ms: frames[Math.floor(frames.length / 2)],
      p95_ms: frames[Math.floor(frames.length * .95)],
      longest_ms: frames[frames.length - 1], most_cells: Math.max(...cells), scrolled_px: viewport.scrollTop }); }
  };
  requestAnimationFrame(step);
})"""


def in_browser(root: Path) -> dict[str, Any]:
    from playwright.sync_api import expect, sync_playwright

    from tests.browser import CHROMIUM, page_of

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with page_of(browser, f"file://{root}/gallery.html") as page:
            expect(page.locator(".cell img").first).to_be_visible()
            shown = page.evaluate("performance.now()")
            found = {
                "first_contentful_paint_ms": round(page.evaluate(PAINT)),
                "pictures_asked_for_ms": round(shown),
                "scroll": page.evaluate(SCROLL),
            }
            started = time.monotonic()
            page.select_option("#order", "best")
            page.fill("#find", "style-01")
            expect(page.locator("#counts")).to_contain_text("shown")
            found["sort_and_filter_s"] = round(time.monotonic() - started, 2)
            found["js_heap_bytes"] = page.evaluate("performance.memory.usedJSHeapSize")
        browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--only", choices=["gallery", "index"])
    parser.add_argument("--index", type=Path)  # one update, for its memory
    parser.add_argument("--rebuild", action="store_true")
    options = parser.parse_args()
    if options.index:
        return index_here(options.index, options.rebuild)
    parts = {"gallery": (measure_gallery, options.cells), "index": (measure_index, options.entries)}
    for name, (measure, n) in parts.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as directory:
                keep(name, {"machine": machine(), "n": n} | measure(Path(directory), n))
    return None


def keep(name: str, found: dict[str, Any]) -> None:
    """Beside what an earlier run has measured of the other part."""
    known = figures_of(RESULTS)
    save(RESULTS, known | {name: found})
    print(json.dumps({name: found}, indent=2), flush=True)


if __name__ == "__main__":
    main()
