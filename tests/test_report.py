"""Methods held against each other: figures, intervals, gaps, the paper's table; as text and as a page."""

import csv
import io
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser, expect

from service import report_page, report_text
from service.catalog import Catalog
from service.cli import cli
from service.errors import AccessDenied, BadInput
from service.pages import Gallery
from service.published import PUBLISHED
from service.report import Report, make_report, read_rows, result_of
from service.storage import LocalStore
from tests.browser import page_of
from tests.commands import wait_until
from tests.pictures import commit, id_of, job, report_of

EVIL = "</script><img src=x onerror=window.pwned=1>"
SUBJECTS, STYLES = ("cat", "dog", "fox"), ("ink", "oil", "wax")


def put(catalog: Catalog, scores: dict[str, float], **job_fields: Any) -> None:
    """An entry without pictures whose scores and loss are known."""
    own = job(job_fields.pop("subject"), job_fields.pop("style"), job_fields.pop("method")) | job_fields
    told = report_of(own)
    told["scores"] = {f"{name}_alignment": value for name, value in scores.items()}
    told["merge"] = {"subject_loss": [0.2, 0.003], "style_loss": [0.1, 0.001]}
    catalog.commit(id_of(own), own, {"merged.safetensors": b"x"}, told)


@pytest.fixture
def compared(local: Catalog) -> Catalog:
    """Three subjects in three styles by two methods, ziplora .05 above direct in style; one pair given up."""
    rng = random.Random(0)
    for subject in SUBJECTS:
        for style in STYLES:
            a, b = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6)
            put(local, {"style": a, "subject": b, "text": 0.3}, subject=subject, style=style, method="direct")
            if (subject, style) != ("fox", "wax"):
                own = {"style": a + 0.05, "subject": b, "text": 0.3}
                put(local, own, subject=subject, style=style, method="ziplora")
    failed = job("fox", "wax", "ziplora")
    local.record_failure(id_of(failed), failed, "LoRA down is [8, 640]: another base", "BadInput", "", 1)
    return local


def report_on(catalog: Catalog, against: str | None = None) -> Report:
    rows, given_up, digest = read_rows(catalog)
    return make_report([result_of(row) for row in rows], given_up, title="mine", digest=digest, against=against)


def test_means_differences_and_gaps(compared: Catalog) -> None:
    made = report_on(compared)
    direct, ziplora = made.rows
    assert (made.against, direct.variant, ziplora.variant) == ("direct", "direct", "ziplora")
    assert (direct.pairs, ziplora.pairs, made.common, ziplora.first_on, direct.first_on) == (9, 8, 8, 8, 0)
    scores = [entry.report["scores"] for entry in compared.entries() if entry.method == "direct"]
    assert direct.measures["style"].mean == pytest.approx(sum(one["style_alignment"] for one in scores) / 9)
    both = [(one["style_alignment"], one["subject_alignment"]) for one in scores]
    assert direct.measures["harmonic"].mean == pytest.approx(sum(2 * a * b / (a + b) for a, b in both) / 9)
    assert direct.measures["style"].low < direct.measures["style"].mean < direct.measures["style"].high
    difference = ziplora.minus["style"]  # of equal pairs: the one that ziplora lacks does not count
    assert (difference.mean, difference.low, difference.high) == (pytest.approx(0.05),) * 3
    assert ziplora.minus["subject"].mean == 0
    assert direct.minus == {}
    assert ziplora.measures["eq3"].mean == pytest.approx(4.0)
    (gap,) = ziplora.missing
    assert (gap.subject, gap.style, gap.reason) == ("fox", "wax", "LoRA down is [8, 640]: another base")
    assert made.notes == ("ziplora: 1 of 9 pairs missing, 1 given up",)
    assert report_on(compared) == made  # the bootstrap has a seed


def test_a_pairs_seeds_are_averaged_and_variants_told_apart(local: Catalog) -> None:
    for seed, style in ((0, 0.2), (1, 0.4)):
        put(local, {"style": style, "subject": 0.5}, subject="dog", style="ink", method="ziplora", seed=seed)
    other = {"knobs": {"steps": 50}}
    put(local, {"style": 0.6, "subject": 0.5}, subject="dog", style="ink", method="ziplora", **other)
    made = report_on(local, against="ziplora (steps 50)")
    rows = {row.variant: row for row in made.rows}
    assert rows["ziplora (steps 100)"].measures["style"].mean == pytest.approx(0.3)
    assert (rows["ziplora (steps 100)"].merges, rows["ziplora (steps 100)"].seeds) == (2, (0, 1))
    assert rows["ziplora (steps 100)"].minus["style"].mean == pytest.approx(-0.4)  # of seed 0, which both have
    assert "text" not in rows["ziplora (steps 50)"].measures
    assert "no intervals: they take two subjects and two styles at least" in made.notes
    with pytest.raises(BadInput, match=r"ziplora has the variants .* hold the others against one of"):
        report_on(local, against="ziplora")


def test_what_best_took_is_told_of_each_variant(local: Catalog) -> None:
    for enough, winner in ((None, "ties"), (0.5, "direct")):
        own = job("dog", "ink", "best") | {"knobs": {"of": [], "good_enough": enough}}
        local.commit(id_of(own), own, {"merged.safetensors": b"x"}, report_of(own) | {"best": {"method": winner}})
    told = {note for note in report_on(local).notes if "took" in note}
    assert told == {"best (good_enough 0.5) took direct 1 times", "best (good_enough null) took ties 1 times"}


def test_merges_sampled_otherwise_are_not_subtracted(compared: Catalog) -> None:
    own = job("cat", "ink", "svd")
    samples = own["samples"] | {"seeds": [3]}
    put(compared, {"style": 0.9, "subject": 0.9}, subject="cat", style="ink", method="svd", samples=samples)
    strengths = own["samples"] | {"style_strengths": [1.0, 0.4]}
    put(compared, {"style": 0.9, "subject": 0.9}, subject="cat", style="ink", method="dare", samples=strengths)
    made = report_on(compared)
    rows = {row.method: row for row in made.rows}
    assert rows["svd"].minus == {}
    assert set(rows["dare"].minus) >= {"style", "subject"}  # other strengths than 1 are not judged
    assert any("sampled or judged in 2 different ways" in note for note in made.notes)


def test_as_text_beside_the_published_figures(compared: Catalog) -> None:
    made = report_on(compared)
    text = report_text.markdown(made)
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert [len(line.split(" | ")) for line in table[:2]] == [
        len(text.split("\n| method")[1].splitlines()[0].split("|")) - 1
    ] * 2
    assert "| 0.699 / 0.420 / 0.303 |" in table[1]
    assert "+0.050 (+0.050 … +0.050)" in text
    assert "other data, base and judges" in text
    assert "- not in this catalog: Mix-of-Show, published 0.635 / 0.374 / 0.251 on SDXL 1.0" in text
    assert "- missing of `ziplora`: fox/wax (LoRA down is [8, 640]: another base)" in text
    rows = list(csv.DictReader(io.StringIO(report_text.csv_text(made))))
    published = {(row["method"], row["measure"]): row["mean"] for row in rows if row["source"] == "published sdxl"}
    assert len(published) == 3 * len(PUBLISHED)
    assert published["custom-diffusion", "style"] == "0.616"
    (style,) = [r for r in rows if (r["method"], r["measure"], r["against"]) == ("ziplora", "style", "direct")]
    assert float(style["mean"]) == pytest.approx(0.05)
    assert {row["method"] for row in rows if row["source"] == "catalog"} == {"direct", "ziplora"}


def test_the_command(compared: Catalog, tmp_path: Path) -> None:
    def run(*arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(cli, ["report", str(compared.store.url), *map(str, arguments)])
        assert done.exit_code == code, done.output
        return done.output

    assert run().startswith("# Methods compared: catalog")
    assert "| `direct` |" not in run("--method", "zip*")
    assert run("--format", "csv").startswith("source,method,measure")
    assert run("--out", tmp_path / "r.csv").strip().endswith("r.csv")
    assert run("--format", "html").strip().endswith("catalog/report.html")
    assert "name the --format" in run("--out", tmp_path / "r.txt", code=2)
    done = CliRunner().invoke(cli, ["report", str(compared.store.url), "--against", "nothing"])
    assert str(done.exception) == "no merge is by nothing; hold the others against one of: direct, ziplora"
    done = CliRunner().invoke(cli, ["report", str(compared.store.url), "--subject", "cow"])
    assert "has no merge that matches" in str(done.exception)


class ReadOnly(LocalStore):
    def put(self, *_: Any, **__: Any) -> None:
        raise AccessDenied(f"{self.url} may only be read")


def test_a_catalog_that_may_only_be_read_and_has_no_index(compared: Catalog) -> None:
    before = report_on(compared)
    shutil.rmtree(Path(compared.store.url) / "index")
    rows = report_on(Catalog(ReadOnly(Path(compared.store.url)))).rows
    assert [(row.variant, row.measures, row.missing) for row in rows] == [
        (row.variant, row.measures, row.missing) for row in before.rows
    ]


# The page


def fill(catalog: Catalog) -> None:
    for subject in ("dog", "cat"):
        for style in ("ink", "oil"):
            for method in ("ziplora", "direct"):
                commit(catalog, job(subject, style, method))
    failed = job("fox", "ink")
    catalog.record_failure(id_of(failed), failed, EVIL, "BadInput", "", 1)


def test_a_walk_through_the_page(browser: Browser, local: Catalog) -> None:
    fill(local)
    Gallery(local, EVIL).refresh()
    with page_of(browser, f"file://{local.store.url}/gallery.html") as page:
        page.get_by_role("link", name="Compare methods").click()
        page.wait_for_url("**/report.html")
        expect(page.locator("#about")).to_contain_text(EVIL)
        rows = page.locator("#table tbody th")
        expect(rows).to_have_text([re.compile("^direct"), re.compile("^ziplora")])
        expect(page.locator("#table tbody svg")).to_have_count(2 * 6)
        button = page.locator("#table").get_by_role("button", name="text", exact=True)
        means = [float(row.split("\n")[0]) for row in page.locator("#table tbody td:nth-child(5)").all_inner_texts()]
        button.click()
        assert page.locator("#table th[aria-sort=descending]").inner_text() == "text"
        assert rows.first.inner_text().startswith("direct" if means[0] > means[1] else "ziplora")
        page.get_by_text("difference to direct").click()
        expect(page.locator("#table tbody tr", has_text="baseline")).to_have_count(1)
        expect(page.locator("#published tbody tr")).to_have_count(len(PUBLISHED))

        cells = page.locator("#sheet .cell")
        expect(cells).to_have_count(10)
        wait_until(lambda: page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth)"))
        expect(page.locator("#sheet .first")).to_have_count(4)
        expect(page.locator("#sheet")).to_contain_text(f"given up: {EVIL}")
        page.fill("#find", "oil cat")
        expect(page.locator("#shown")).to_have_text("1 pair")
        page.fill("#find", "")
        page.select_option("#order", "spread")
        expect(cells).to_have_count(10)

        # by keyboard: one stop for the sheet, arrows inside, Enter to the gallery
        assert page.locator("#sheet .cell[tabindex='0']").count() == 1
        page.locator("#order").focus()
        page.keyboard.press("Tab")
        where = "[document.activeElement.dataset.i, document.activeElement.dataset.j].join()"
        seen = [page.evaluate(where)]
        for key in ("ArrowRight", "ArrowDown", "Home", "ArrowUp", "ArrowUp"):
            page.keyboard.press(key)
            seen.append(page.evaluate(where))
        assert seen == ["0,0", "0,1", "1,1", "1,0", "0,0", "0,0"]
        assert page.evaluate("window.pwned") is None
        page.keyboard.press("Enter")
        page.wait_for_url("**/gallery.html#**")
        expect(page.locator("#detail .figure")).to_have_count(2)


def test_on_a_phone_in_the_dark_by_itself(browser: Browser, local: Catalog, tmp_path: Path) -> None:
    """A file far from the catalog, pictures inside."""
    fill(local)
    Gallery(local).refresh()
    made = report_on(local)
    path = tmp_path / "elsewhere.html"
    path.write_bytes(report_page.page(made, pictures=report_page.pictures_of(local.store, made)))
    with page_of(browser, f"file://{path}", color_scheme="dark", viewport={"width": 360, "height": 700}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(int(part) for part in background[4:-1].split(",")) < 100
        page.locator("#sheet").scroll_into_view_if_needed()
        wait_until(lambda: page.evaluate("[...document.images].some(image => image.naturalWidth)"))
        assert page.locator("#gallery").is_hidden()
        assert page.locator("a.cell").count() == 0


def test_many_pairs_are_few_elements(browser: Browser, compared: Catalog, tmp_path: Path) -> None:
    made = report_on(compared)
    path = tmp_path / "many.html"
    html = report_page.page(made).decode()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', html)[0])
    data["sheet"]["pairs"] = [[f"s{i}", "ink", [["0" * 16, 0, i / 2000], None]] for i in range(1000)]
    path.write_text(re.sub(r'(id="data">).*?(</script>)', lambda m: m[1] + json.dumps(data) + m[2], html))
    with page_of(browser, f"file://{path}") as page:
        expect(page.locator("#shown")).to_have_text("60 of 1,000 pairs")
        page.get_by_role("button", name="Show more pairs").click()
        expect(page.locator("#sheet tbody tr")).to_have_count(120)
        page.select_option("#order", "best")
        expect(page.locator("#sheet tbody th").first).to_contain_text("s999")


def test_one_method_has_nothing_to_compare(local: Catalog) -> None:
    commit(local, job("dog", "ink"))
    Gallery(local).refresh()
    assert not [found for found in local.store.list("") if found.key == report_page.PAGE]
    assert '"compared":false' in local.store.get("pages/catalog.js").decode()
