"""The preference study: who is asked what, through a real server and a real page; answers once; what they say."""

import json
import math
import random
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, expect

from service.catalog import Catalog
from service.errors import BadInput, NotFound
from service.references import put_references, reference_bytes
from service.storage import LocalStore, Store
from service.study import (
    Question,
    Response,
    Study,
    answer,
    answered,
    asked_of,
    begin,
    make_study,
    open_study,
    preference,
    read_study,
    report,
    responses,
    wilson,
)
from service.study_server import make_app
from tests.browser import page_of
from tests.commands import started, wait_until, ziplora
from tests.pictures import commit, job, picture

SUBJECTS, STYLES = ("dog", "cat"), ("ink", "oil")
SEEN = "[...document.querySelectorAll('#question img')].every(one => one.complete && one.naturalWidth)"


@contextmanager
def serving(store: Store, study: Study, host: str = "127.0.0.1") -> Iterator[str]:
    """The address of a real server."""
    pictures = {("subject", one.subject): b"" for one in study.questions}
    pictures = {key: picture(str(key)) for key in pictures | {("style", one.style): b"" for one in study.questions}}
    server = uvicorn.Server(
        uvicorn.Config(make_app(store, study, pictures, host), port=0, log_level="warning", access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask(url: str, given: object | None = None, **headers: str) -> Any:
    body = None if given is None else json.dumps(given).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as reply:
        return json.loads(reply.read())


def catalog_at(path: Path | Store) -> Catalog:
    catalog = Catalog(path)
    for subject in SUBJECTS:
        for style in STYLES:
            for method in ("ziplora", "direct"):
                commit(catalog, job(subject, style, method))
    return catalog


def study_of(catalog: Catalog, asked: int = 5, name: str = "study") -> Study:
    return make_study(name, catalog.entries(), ["ziplora", "direct"], asked, seed=0)


@pytest.fixture
def local(tmp_path: Path) -> Catalog:
    return catalog_at(tmp_path / "catalog")


def many(n: int, others: tuple[str, ...] = ("direct", "joint")) -> Study:
    questions = tuple(
        Question(f"{i:04}-{other}", f"s{i}", "ink", ("ziplora", other), ("a", "b"))
        for i in range(n)
        for other in others
    )
    return Study("study", 1, 8, questions)


class TestWhoIsAskedWhat:
    def test_the_same_prompt_and_seed_by_both_methods(self, local: Catalog) -> None:
        study = study_of(local)
        assert len(study.questions) == 8  # four pairs, two sample seeds at full strength
        for question in study.questions:
            names = {entry.job_id: entry for entry in local.entries()}
            first, second = (names[key.split("/")[1]] for key in question.keys)
            assert (first.method, second.method) == question.methods == ("ziplora", "direct")
            assert first.subject == second.subject == question.subject
            assert question.keys[0].rpartition("/")[2] == question.keys[1].rpartition("/")[2]

    def test_methods_that_share_nothing_are_refused(self, local: Catalog) -> None:
        for methods in (["ziplora"], ["ziplora", "ziplora"], ["ziplora", "ties"]):
            with pytest.raises(BadInput, match="methods"):
                make_study("study", local.entries(), methods, 8, 0)
        with pytest.raises(BadInput, match="study name"):
            make_study("../x", local.entries(), ["ziplora", "direct"], 8, 0)

    def test_left_and_right_and_methods_are_balanced(self) -> None:
        study = many(10)
        lefts: Counter[str] = Counter()
        for number in range(400):
            asked = asked_of(study, f"{number:032x}")
            assert asked == asked_of(study, f"{number:032x}")  # whenever it is asked
            assert len({one.question.id for one in asked}) == 8
            assert sum(one.left for one in asked) == 4
            assert Counter(one.question.methods[1] for one in asked) == {"direct": 4, "joint": 4}
            lefts.update(one.question.id for one in asked if one.left == 0)
        assert len(lefts) == 20
        # each question is asked about 160 times, half of them with the first method on the left: 80 ± 5 deviations
        assert all(abs(n - 80) < 5 * math.sqrt(400 * 0.2 * 0.8) for n in lefts.values())

    def test_an_odd_number_leans_to_neither_side(self) -> None:
        study = Study("study", 0, 5, many(10).questions)
        counts = Counter(sum(one.left for one in asked_of(study, f"{number:032x}")) for number in range(200))
        assert set(counts) == {2, 3}
        assert min(counts.values()) > 60


class TestAnswers:
    def test_the_first_one_counts(self, store: Store) -> None:
        study = open_study(store, many(3))
        assert open_study(store, many(3)) == read_study(store, "study") == study
        participant = begin(store, study)
        asked = asked_of(study, participant)[0]
        assert answer(store, study, participant, asked.question.id, True, 900)
        assert not answer(store, study, participant, asked.question.id, False, 100)
        assert answered(store, study, participant) == {asked.question.id}
        (response,) = responses(store, study)
        assert (response.chosen, response.left, response.ms) == (asked.left, asked.left, 900)
        with pytest.raises(NotFound):
            answer(store, study, participant, "another", True, None)
        with pytest.raises(BadInput, match="another --name"):
            open_study(store, many(4))

    def test_what_is_no_answer_is_left_out(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        study = open_study(store, many(3))
        for number, body in enumerate((b"{", b"[]", b'{"methods": 1}', b'{"participant": "x", "methods": ["a", "b"]}')):
            store.put(f"studies/study/responses/{'0' * 32}/{number}.json", body)
        assert responses(store, study) == []


class TestReport:
    def test_preferences_with_wilsons_interval(self) -> None:
        # Agresti and Coull (1998): 0 of 10 gives 0 to .278; 5 of 10 gives .237 to .763
        assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
        assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
        assert wilson(0, 0) == (0, 1)

    @given(n=st.integers(1, 300), k=st.integers(0, 300))
    def test_the_interval_holds_the_share_and_solves_its_equation(self, n: int, k: int) -> None:
        k = min(k, n)
        low, high = wilson(k, n)
        assert 0 <= low <= k / n + 1e-12
        assert k / n <= high + 1e-12
        for p in (low, high):
            if 0 < p < 1:
                assert abs(k / n - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / n), abs=1e-9)

    def test_it_recovers_what_the_answers_were_made_with(self) -> None:
        study, chance = Study("study", 0, 40, many(20).questions), random.Random(5)
        rates = {"direct": 0.827, "joint": 0.711}
        found = [
            Response(
                f"{number:032x}",
                one.question.id,
                one.question.methods,
                one.left,
                int(chance.random() > rates[one.question.methods[1]]),
                1000,
                "",
            )
            for number in range(45)
            for one in asked_of(study, f"{number:032x}")
        ]
        told = report(study, found)
        assert (told.participants, told.left.n, told.seconds) == (45, 1800, 1.0)
        for one in told.preferences:
            assert one.low < rates[one.methods[1]] < one.high
            assert one.n == 900
        assert told.left.low < 0.5 < told.left.high

    def test_agreement_is_with_what_most_of_the_others_chose(self) -> None:
        def said(participant: str, question: str, chosen: int) -> Response:
            return Response(participant, question, ("a", "b"), 0, chosen, None, "")

        found = [said(p, q, c) for p, q, c in [("x", "1", 0), ("y", "1", 0), ("z", "1", 1), ("x", "2", 1)]]
        told = {one.participant: one for one in report(many(1), found).agreements}
        assert (told["x"].with_others, told["y"].with_others) == (None, None)  # the others are divided, or not there
        assert told["z"].with_others == 0
        assert told["x"].first == 0.5
        assert report(many(1), []).preferences == ()
        assert math.isnan(preference(("a", "b"), 0, 0).share)


class TestServer:
    def test_a_participant_in_a_browser_double_clicks_and_reloads(self, browser: Browser, local: Catalog) -> None:
        study = open_study(local.store, study_of(local))
        with serving(local.store, study) as url, page_of(browser, url) as page:
            page.click("#begin")
            chosen = []
            for number in range(study.asked):
                expect(page.locator("#count")).to_have_text(f"{number + 1} of 5")
                question = str(page.evaluate("document.body.dataset.question"))
                wait_until(lambda: page.evaluate(SEEN))
                if number == 2:
                    page.reload()  # in the middle of a question
                    expect(page.locator("#count")).to_have_text("3 of 5")
                    assert page.evaluate("document.body.dataset.question") == question
                    wait_until(lambda: page.evaluate(SEEN))
                page.wait_for_timeout(200)
                side = ("left", "right")[number % 2]
                if number == 3:
                    page.keyboard.press("ArrowRight")
                else:
                    page.dblclick(f"#{side}")
                chosen.append((question, side))
            expect(page.locator("#thanks")).to_be_visible()
            page.reload()
            expect(page.locator("#thanks")).to_be_visible()
            participant = page.evaluate("localStorage.getItem('ziplora-study')")
        found = {one.question: one for one in responses(local.store, study)}
        assert len(found) == 5
        for question, side in chosen:
            one = found[question]
            assert one.participant == participant
            assert (one.chosen == one.left) == (side == "left")
            assert one.ms is not None

    def test_many_at_once_with_repeated_requests(self, local: Catalog) -> None:
        study = open_study(local.store, study_of(local, asked=8))
        with serving(local.store, study) as url:

            def take_part(number: int) -> str:
                state = ask(f"{url}/api/begin", {})
                while state["question"]:
                    where = f"{url}/api/{state['participant']}/{state['question']}"
                    sides = [{"side": side} for side in ("left", "right", "left")]
                    with ThreadPoolExecutor(3) as clicks:
                        replies = list(clicks.map(ask, [where] * 3, sides))
                    assert sum(reply["new"] for reply in replies) == 1
                    state = ask(f"{url}/api/{state['participant']}")
                return state["participant"]

            with ThreadPoolExecutor(3) as people:
                participants = set(people.map(take_part, range(3)))
        found = responses(local.store, study)
        assert len(found) == len({(one.participant, one.question) for one in found}) == 24
        assert {one.participant for one in found} == participants

    def test_nothing_sent_tells_the_methods(self, local: Catalog) -> None:
        study = open_study(local.store, study_of(local))
        with serving(local.store, study) as url:
            state = ask(f"{url}/api/begin", {})
            sent = json.dumps(state)
            for which in ("left", "right"):
                place = f"{url}/picture/{state['participant']}/{state['question']}/{which}"
                with urllib.request.urlopen(place) as reply:
                    sent += f"{reply.headers}{reply.read()!r}"
        assert not any(word in sent for word in ("ziplora", "direct", "pairs/", "merged", "samples/"))

    def test_strangers_are_refused(self, local: Catalog) -> None:
        study = open_study(local.store, study_of(local))
        with serving(local.store, study) as url:
            participant, question = "0" * 32, study.questions[0].id
            for path in (
                f"api/{participant}",
                f"picture/{participant}/{question}/left",
                "x",
                "study.py",
            ):
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    ask(f"{url}/{path}")
            with pytest.raises(urllib.error.HTTPError, match="404"):
                ask(f"{url}/api/{participant}/{question}", {"side": "left"})
            own = ask(f"{url}/api/begin", {})
            place = f"{url}/api/{own['participant']}/{own['question']}"
            for given in ({"side": "up"}, [], "left", {"side": "left", "more": "x" * 10_000}):
                with pytest.raises(urllib.error.HTTPError, match="400"):
                    ask(place, given)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask(f"{url}/api/begin", {}, Host="evil.example")  # a name that leads here from somebody's page
            assert ask(f"{url}/api/{own['participant']}")["answered"] == 0
        assert responses(local.store, study) == []

    def test_references_are_those_of_the_merges(self, local: Catalog) -> None:
        study = study_of(local)
        with pytest.raises(BadInput, match=r"no reference picture of style ink.*--references"):
            reference_bytes(local.store, study.questions, [], None)
        pictures = {("subject", one): picture(f"subject {one}") for one in SUBJECTS}
        put_references(local.store, pictures | {("style", one): picture(f"style {one}") for one in STYLES})
        assert len(reference_bytes(local.store, study.questions, [], None)) == 4

    def test_the_commands_serve_and_report(self, local: Catalog, tmp_path: Path) -> None:
        for role, ids in (("subject", SUBJECTS), ("style", STYLES)):
            for id in ids:
                (tmp_path / f"{id}.png").write_bytes(picture(f"{role} {id}"))
        line = "{{lora: x.safetensors, prompt: p, trigger: {0}, images: {0}.png}}"
        manifest = tmp_path / "manifest.yaml"
        manifest.write_text(
            f"base: base\noutput: {local.store.url}\nsubjects:\n"
            + "".join(f"  {id}: {line.format(id)}\n" for id in SUBJECTS)
            + "styles:\n"
            + "".join(f"  {id}: {line.format(id)}\n" for id in STYLES)
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ("--methods", "ziplora,direct", "--references", manifest, "--questions", 3, "--port", port)
        server = started("study", "serve", local.store.url, *options)
        try:
            url = f"http://127.0.0.1:{port}"
            state = None
            end = time.monotonic() + 120
            while state is None:
                assert server.poll() is None, server.stdout and server.stdout.read()
                assert time.monotonic() < end
                try:
                    state = ask(f"{url}/api/begin", {})
                except urllib.error.URLError:
                    time.sleep(0.1)
            while state["question"]:
                state = ask(f"{url}/api/{state['participant']}/{state['question']}", {"side": "left", "ms": 1500})
        finally:
            server.terminate()
            server.wait(20)
        told: subprocess.CompletedProcess[str] = ziplora("study", "report", local.store.url)
        assert told.returncode == 0, told.stderr
        assert "3 answers of 1 participants" in told.stdout
        assert "ziplora preferred over direct" in told.stdout
        assert "left picture chosen: 100.0%" in told.stdout
        unknown = ziplora("study", "report", local.store.url, "--name", "other")
        assert unknown.returncode == 2
        assert "it has: study" in unknown.stderr
