"""A whole study through the real server and the real page: 45 simulated participants × 40 questions, who prefer at the
paper's rates, click twice, press keys and reload in the middle.

    python -m tests.bench.study [--participants N] [--questions N]

Result: results/study.json.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

from service.catalog import Catalog
from service.study import Study, asked_of, make_study, open_study, report, responses
from tests.bench.record import save
from tests.browser import CHROMIUM, page_of
from tests.commands import wait_until
from tests.pictures import commit, job
from tests.test_study import SEEN, serving

RESULTS = Path(__file__).parent / "results" / "study.json"
RATES = {"direct": 0.827, "joint": 0.711, "styledrop": 0.680}  # ZipLoRA preferred, paper §4
SUBJECTS, STYLES = ("dog", "cat", "fox", "owl"), ("ink", "oil", "wax", "pen", "neon", "clay", "felt", "wood")


def take_part(browser: Browser, url: str, study: Study, chance: random.Random, done: Counter[str]) -> dict[str, str]:
    """One participant from beginning to end; what he or she meant to choose, by question."""
    meant = {}
    with page_of(browser, url) as page:
        page.click("#begin")
        expect(page.locator("#count")).to_have_text(f"1 of {study.asked}")
        participant = page.evaluate("localStorage.getItem('ziplora-study')")
        asked = {one.question.id: one for one in asked_of(study, participant)}
        for number in range(study.asked):
            expect(page.locator("#count")).to_have_text(f"{number + 1} of {study.asked}")
            wait_until(lambda: page.evaluate(SEEN))
            if chance.random() < 0.1:
                page.reload()
                done["reloads"] += 1
                expect(page.locator("#count")).to_have_text(f"{number + 1} of {study.asked}")
                wait_until(lambda: page.evaluate(SEEN))
            one = asked[page.evaluate("document.body.dataset.question")]
            first = chance.random() < RATES[one.question.methods[1]]
            side = "left" if (0 if first else 1) == one.left else "right"
            meant[one.question.id] = "first" if first else "second"
            page.wait_for_timeout(160)
            way = chance.choices(("click", "double", "key"), (0.5, 0.3, 0.2))[0]
            done[way] += 1
            if way == "key":
                page.keyboard.press("ArrowLeft" if side == "left" else "ArrowRight")
            elif way == "double":
                page.dblclick(f"#{side}")
            else:
                page.click(f"#{side}")
        expect(page.locator("#thanks")).to_be_visible()
    return {f"{participant} {question}": choice for question, choice in meant.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--participants", type=int, default=45)
    parser.add_argument("--questions", type=int, default=40)
    options = parser.parse_args()
    chance, done = random.Random(0), Counter[str]()
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        catalog = Catalog(Path(directory))
        for subject in SUBJECTS:
            for style in STYLES:
                for method in ("ziplora", *RATES):
                    commit(catalog, job(subject, style, method))
        made = make_study("paper", catalog.entries(), ["ziplora", *RATES], options.questions, seed=0)
        study = open_study(catalog.store, made)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        meant: dict[str, str] = {}
        started = time.monotonic()
        with serving(catalog.store, study) as url:
            for number in range(options.participants):
                meant |= take_part(browser, url, study, chance, done)
                print(f"participant {number + 1}: {time.monotonic() - started:.0f} s", flush=True)
        browser.close()
        found = responses(catalog.store, study)
        stored = {f"{one.participant} {one.question}": ("first", "second")[one.chosen] for one in found}
        told = report(study, found)
    result = {
        "participants": options.participants,
        "questions_each": options.questions,
        "answers_meant": len(meant),
        "answers_stored": len(found),
        "lost": len(meant.keys() - stored.keys()),
        "twice": len(found) - len(stored),
        "other_than_meant": sum(stored.get(key) != choice for key, choice in meant.items()),
        "ways": dict(done),
        "seconds": round(time.monotonic() - started, 1),
        "preferences": [
            asdict(one) | {"share": one.share, "true_rate": RATES[one.methods[1]]} for one in told.preferences
        ],
        "true_rates_within_intervals": all(one.low <= RATES[one.methods[1]] <= one.high for one in told.preferences),
        "first_on_the_left": sum(one.left == 0 for one in found) / len(found),
        "left_chosen": asdict(told.left) | {"share": told.left.share},
    }
    save(RESULTS, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
