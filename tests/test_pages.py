"""The gallery in a real Chromium: from disk and from a bucket over HTTP, with whatever users call their LoRAs."""

import io
import json
import re

import boto3
import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from service.catalog import Catalog
from service.errors import BadInput
from service.pages import Gallery, put_live, put_script
from service.references import put_references, stored_references
from service.thumbnails import CRISP, SIDE, thumbnail, thumbnail_key
from tests.browser import page_of
from tests.commands import wait_until
from tests.conftest import Swift
from tests.pictures import commit, id_of, job, picture, report_of

EVIL = "<img src=x onerror=window.pwned=1>"


def page_at(catalog: Catalog) -> str:
    return f"file://{catalog.store.url}/gallery.html"


def fill(catalog: Catalog) -> None:
    """dog and cat in ink and oil, by two methods; fox in ink given up."""
    for subject in ("dog", "cat"):
        for style in ("ink", "oil"):
            for method in ("ziplora", "direct"):
                commit(catalog, job(subject, style, method))
    failed = job("fox", "ink")
    catalog.record_failure(id_of(failed), failed, "LoRA down is [8, 640]: another base", "BadInput", "", 1)


def published(swift: Swift) -> str:
    """The bucket opened to readers without a key; its address by plain HTTP."""
    boto3.client("s3").put_bucket_acl(Bucket=swift.bucket, ACL="public-read")
    return f"{swift.endpoint}/v1/AUTH_test/{swift.bucket}"


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_walk_through_the_gallery(
    browser: Browser, place: str, local: Catalog, request: pytest.FixtureRequest
) -> None:
    catalog, url = local, page_at(local)
    if place == "bucket":
        swift = request.getfixturevalue("swift")
        catalog, url = Catalog(f"{swift.url}/catalog"), f"{published(swift)}/catalog/gallery.html"
    fill(catalog)
    put_references(catalog.store, {("subject", "dog"): picture("dog"), ("style", "ink"): picture("ink")})
    Gallery(catalog, "My merges").refresh()
    with page_of(browser, url) as page:
        expect(page.locator("h1")).to_have_text("My merges")
        expect(page.locator("#counts")).to_contain_text("8 merges")
        expect(page.locator("#counts")).to_contain_text("3 subjects × 2 styles")
        expect(page.locator("#counts")).to_contain_text("1 given up")
        expect(page.locator(".cell img")).to_have_count(4)
        wait_until(lambda: page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth)"))
        assert page.locator(".cell img").first.get_attribute("alt").startswith("cat in ink, ")  # type: ignore[union-attr]
        expect(page.locator(".cell.failed")).to_contain_text("another base")
        heads = page.locator("[role=rowheader]")
        assert heads.all_inner_texts() == ["cat", "dog", "fox"]
        expect(page.locator("[role=rowheader] img")).to_have_attribute("alt", "reference picture of dog")

        # filter and sort
        page.keyboard.press("/")
        page.keyboard.type("DOG oil")
        expect(page.locator("[role=rowheader]")).to_have_text(["dog"])
        expect(page.locator("[role=columnheader]:not(.corner)")).to_have_text(["oil"])
        page.fill("#find", "nothing like it")
        expect(page.locator("#empty")).to_contain_text("Nothing matches")
        page.click("#empty button")
        expect(heads).to_have_count(3)
        page.select_option("#order", "best")
        means = page.evaluate(
            "[...ziplora.model.page.subjects.keys()].map(row => {"
            " const all = [...ziplora.model.page.cells.values()].filter(c => c.row === row && c.entries.length)"
            "  .map(cell => ziplora.choose(cell, {method: '', score: 'overall'}).scores.overall);"
            " return [ziplora.model.page.subjects[row], all.length ? all.reduce((a, b) => a + b) / all.length : -1]; })"
        )
        assert heads.all_inner_texts() == [name for name, _ in sorted(means, key=lambda pair: -pair[1])]
        page.select_option("#order", "name")
        page.select_option("#method", "direct")
        expect(page.locator(".cell img").first).to_have_attribute("alt", re.compile("direct"))
        page.select_option("#method", "")
        page.locator("#floor").fill("100")
        expect(page.locator("#counts")).to_contain_text("1 shown")
        page.locator("#floor").fill("0")
        expect(page.locator(".heat")).to_have_count(0)
        page.check("#heat")
        expect(page.locator(".heat")).to_have_count(4)
        expect(page.locator("#legend")).to_be_visible()
        page.uncheck("#heat")

        # the pointer on a cell, then inside
        page.locator(".cell").first.hover()
        expect(page.locator("#tip")).to_contain_text("a sks cat in szn ink")
        expect(page.locator("#tip")).to_contain_text("seed 0")
        expect(page.locator("#tip")).to_contain_text("style 0.")
        page.locator(".cell").first.click()
        detail = page.locator("#detail")
        expect(detail.locator(".figure")).to_have_count(2)
        expect(detail.locator(".figure b")).to_have_text(["ziplora", "direct"])
        expect(detail.locator(".strip button")).to_have_count(6)
        shown = detail.locator(".figure img").first
        before = shown.get_attribute("src")
        page.locator("#strength").fill("0")
        expect(detail.locator(".controls output")).to_have_text("0.4")
        expect(shown).not_to_have_attribute("src", before)
        detail.locator(".strip button").nth(3).click()
        expect(detail.locator(".controls output")).to_have_text("0.7")
        expect(detail.locator("code")).to_have_text("sks cat, szn ink")
        expect(detail).to_contain_text("similarity")
        expect(detail).to_contain_text("0.0200 → 0.00500")
        detail.locator(".figure").nth(1).click()
        link = detail.locator("a.download")
        assert (
            link.get_attribute("download") == f"cat__ink__direct-{id_of(job('cat', 'ink', 'direct'))[:8]}.safetensors"
        )
        key = link.get_attribute("href")
        assert catalog.store.get(str(key)).startswith(b"weights of ")
        if place == "disk":
            page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        detail.get_by_role("button", name="Copy").click()
        expect(detail.locator(".copy [role=status]")).to_have_text("copied")
        assert page.url.endswith("#cat/ink")


@pytest.mark.parametrize("size", [(1100, 900), (1440, 900), (390, 844)])
def test_only_the_grid_scrolls(browser: Browser, local: Catalog, size: tuple[int, int]) -> None:
    """Two scroll bars beside each other leave nobody knowing which one moves what."""
    for number in range(8):
        commit(local, job(f"s{number}", "ink"))
    Gallery(local).refresh()
    with page_of(browser, page_at(local), viewport={"width": size[0], "height": size[1]}) as page:
        page.locator(".cell").first.wait_for()
        edges = "(e => [e.scrollHeight - e.clientHeight, e.scrollWidth - e.clientWidth])"
        assert page.evaluate(f"{edges}(document.documentElement)") == [0, 0]
        assert page.evaluate(f"{edges}(document.getElementById('viewport'))")[0] > 0


def test_everything_can_be_reached_by_keyboard(browser: Browser, local: Catalog) -> None:
    fill(local)
    Gallery(local).refresh()
    with page_of(browser, page_at(local)) as page:
        page.locator(".cell").first.wait_for()
        page.keyboard.press("Shift+Tab")  # the last thing in the page is the grid: one stop, whatever its size
        where = "[document.activeElement.dataset.i, document.activeElement.dataset.j].join()"
        assert page.evaluate(where) == "0,0"
        seen = []
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "End", "Control+End", "Home", "PageUp"):
            page.keyboard.press(key)
            seen.append(page.evaluate(where))
        assert seen == ["0,1", "0,1", "1,1", "1,0", "1,1", "2,1", "2,0", "0,0"]
        assert page.locator(".cell[tabindex='0']").count() == 1
        expect(page.locator("#tip")).to_be_visible()  # what hovering shows, the focus shows
        page.keyboard.press("Enter")
        expect(page.locator("#detail-title")).to_contain_text("cat")
        page.get_by_role("button", name="Next pair").press("Enter")
        expect(page.locator("#detail-title")).to_contain_text("oil")
        assert page.evaluate("document.activeElement.ariaLabel") == "Next pair"
        page.locator("#strength").press("ArrowLeft")
        expect(page.locator(".controls output")).to_have_text("0.7")
        page.keyboard.press("Escape")
        wait_until(lambda: page.evaluate(where) == "0,1")
        assert not page.locator("#detail").is_visible()
        page.keyboard.press("Control+End")
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        expect(page.locator("#detail")).to_contain_text("Given up: ziplora")
        expect(page.locator("#detail")).to_contain_text("another base")


def test_nothing_that_a_user_names_becomes_markup(browser: Browser, local: Catalog) -> None:
    template = "{subject} </script><script>window.pwned=1</script> in {style} \u2028 {{literal}}"
    commit(local, job(EVIL, "'\"><svg onload=pwned=1>", EVIL, template))
    failed = job("</script><script>window.pwned=1</script>", "../../etc")
    local.record_failure(id_of(failed), failed, EVIL, EVIL, "", 1)
    Gallery(local, EVIL).refresh()
    with page_of(browser, page_at(local)) as page:
        expect(page.locator("h1")).to_have_text(EVIL)
        cells = page.locator(".cell:not(.blank)")
        expect(cells).to_have_count(2)
        page.locator(".cell", has=page.locator("img")).click()
        expect(page.locator(".facts")).to_contain_text("</script><script>window.pwned=1</script> in szn")
        expect(page.locator(".facts")).to_contain_text("{literal}")
        page.keyboard.press("Escape")
        page.locator(".cell.failed").click()
        expect(page.locator(".failure")).to_contain_text(EVIL)
        page.wait_for_timeout(100)
        assert page.evaluate("window.pwned") is None


@pytest.mark.parametrize("width", [360, 1200])
def test_many_cells_are_few_elements(browser: Browser, local: Catalog, width: int) -> None:
    n = 100
    Gallery(local).refresh()
    cells = [[i // n, i % n, 0, 0, f"{i:016x}", 500, 400, 300, 0, 1, 1, 0, 0] for i in range(n * n)]
    names = [f"n{i:03}" for i in range(n)]
    fixed = {"title": "many", "updated": "2026-01-01", "digest": "", "failures": [], "unreadable": 0, "groups": {}}
    lists = {"subjects": names, "styles": names, "methods": ["m"], "references": {}, "texts": ["{subject}", "a"]}
    put_script(local.store, "pages/catalog.js", "catalog", fixed | lists | {"cells": cells})
    with page_of(browser, page_at(local), viewport={"width": width, "height": 800}) as page:
        expect(page.locator("#counts")).to_contain_text("10,000 merges")
        assert page.locator(".cell").count() < 200
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("document.getElementById('viewport').scrollTo(5000, 5000)")
        wait_until(lambda: page.locator(".cell[data-i='34']").count() > 0)
        page.locator(".cell").last.focus()
        page.keyboard.press("Control+End")
        expect(page.locator(".cell:focus")).to_have_attribute("aria-label", "n099 in n099, m, overall 0.44")
        assert page.locator(".cell").count() < 300


def test_it_goes_on_while_a_run_goes_on(browser: Browser, local: Catalog) -> None:
    gallery = Gallery(local)
    gallery.refresh()
    live = {"state": "running", "jobs": 4, "committed": 0, "given_up": 0, "eta_s": None, "updated": ""}
    with page_of(browser, "about:blank") as page:
        page.clock.install()
        page.goto(page_at(local))
        expect(page.locator("#empty")).to_contain_text("Nothing is merged yet")
        commit(local, job("dog", "ink"))
        gallery.refresh()
        now = page.evaluate("new Date().toISOString()")
        put_live(local.store, live | {"committed": 1, "eta_s": 600, "updated": now, "digest": local.digest()})
        page.clock.fast_forward(61_000)
        expect(page.locator(".cell img")).to_have_count(1)
        expect(page.locator("#progress")).to_contain_text("1 of 4 done · about 10 min left")
        page.locator(".cell").click()
        commit(local, job("dog", "oil"))
        gallery.refresh()
        put_live(local.store, live | {"state": "finished", "committed": 4, "digest": local.digest()})
        page.clock.fast_forward(6_000)
        expect(page.locator("#progress")).to_be_hidden()
        expect(page.locator("#detail-title")).to_contain_text("ink")  # nobody is thrown out
        page.keyboard.press("Escape")
        expect(page.locator(".cell img")).to_have_count(2)


def test_what_best_chose_and_from_what(browser: Browser, local: Catalog) -> None:
    own = job("dog", "ink", "best") | {"knobs": {"of": [{"method": "direct", "knobs": {}}], "by": "harmonic"}}
    tried = [
        {"method": "direct", "knobs": {}, "seconds": 2.5, "score": 0.61},
        {"method": "ties", "knobs": {}, "seconds": 1.0, "failed": "density 0.0 keeps nothing"},
    ]
    best = {"method": "direct", "knobs": {}, "by": "harmonic", "candidates": tried, "not_tried": ["ziplora"]}
    local.commit(id_of(own), own, {"merged.png": picture("x")}, report_of(own) | {"best": best})
    Gallery(local).refresh()
    with page_of(browser, page_at(local)) as page:
        page.locator(".cell").click()
        expect(page.locator("#detail .figure b")).to_have_text(["best: direct"])
        told = page.locator("#detail section", has_text="Chosen from")
        expect(told.locator("tr")).to_have_text(["direct0.61, 2.50 s, taken", "tiesfailed: density 0.0 keeps nothing"])
        expect(told).to_contain_text("by harmonic; not tried: ziplora")


def test_without_scores_there_are_no_tools_for_them(browser: Browser, local: Catalog) -> None:
    commit(local, job("dog", "ink"), scored=False)
    Gallery(local).refresh()
    with page_of(browser, page_at(local), color_scheme="dark", viewport={"width": 360, "height": 700}) as page:
        page.click("#more")
        expect(page.locator("#size")).to_be_visible()
        expect(page.locator("#heat")).to_be_hidden()
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(int(part) for part in background[4:-1].split(",")) < 100
        page.locator(".cell").click()
        expect(page.locator("#detail .figure img")).to_be_visible()
        assert page.evaluate("document.querySelector('#detail').scrollWidth") <= 360


# What is written


def test_only_what_changed_is_written_again(local: Catalog) -> None:
    fill(local)
    gallery = Gallery(local)
    assert gallery.refresh().cells == 8
    rows = {found.key: found.etag for found in local.store.list("pages/rows/")}
    thumbs = {found.key: found.etag for found in local.store.list("pages/thumbs/")}
    assert len(thumbs) == 8
    commit(local, job("hen", "ink"))
    for another in (gallery, Gallery(local)):
        assert another.refresh().cells == 9
        now = {found.key: found.etag for found in local.store.list("pages/rows/")}
        assert rows.items() <= now.items()
        assert thumbs.items() < {found.key: found.etag for found in local.store.list("pages/thumbs/")}.items()


def test_variants_of_a_method_are_told_apart(local: Catalog) -> None:
    for steps in (50, 100):
        commit(local, job("dog", "ink") | {"knobs": {"steps": steps, "lr": 0.01}})
    Gallery(local).refresh()
    body = local.store.get("pages/catalog.js").decode()
    page = json.loads(body.removeprefix("ziplora.take.catalog(").removesuffix(");\n"))
    assert page["methods"] == ["ziplora (steps 100)", "ziplora (steps 50)"]


def test_a_preview_that_is_no_picture_is_reported_and_the_rest_shown(local: Catalog) -> None:
    bad = job("cat", "ink")
    local.commit(id_of(bad), bad, {"merged.png": b"not a picture", "merged.safetensors": b"x"}, {})
    commit(local, job("dog", "ink"))
    written = Gallery(local).refresh()
    assert written.cells == 2
    assert [problem.key.rpartition("/")[2] for problem in written.problems] == ["merged.png"]
    assert [found.key for found in local.store.list("pages/thumbs/")] == [thumbnail_key(id_of(job("dog", "ink")))]


def test_a_reference_that_is_no_picture_is_named_and_nothing_published(local: Catalog) -> None:
    with pytest.raises(BadInput, match="reference picture of style ink cannot be shown: no picture: expected one of"):
        put_references(local.store, {("subject", "dog"): picture("dog"), ("style", "ink"): b"a login page"})
    assert stored_references(local.store) == {}


def test_thumbnails_are_small_and_of_few_pixels_exact() -> None:
    large = Image.open(io.BytesIO(thumbnail(picture("a", side=1000))))
    assert max(large.size) == SIDE
    small = Image.open(io.BytesIO(picture("b", side=CRISP)))
    assert Image.open(io.BytesIO(thumbnail(picture("b", side=CRISP)))).convert("RGB").tobytes() == small.tobytes()
