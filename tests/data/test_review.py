"""The page of review: what it shows and writes, and that a browser can work with it."""

import dataclasses
import io
import json
import os
import shutil
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tests import browser

pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

from videomem_jax import run, settings  # noqa: E402
from videomem_jax.data import chain_files, review  # noqa: E402
from videomem_jax.data.chain_files import Chain  # noqa: E402
from videomem_jax.data.needle_video import ASSETS  # noqa: E402
from videomem_jax.data.records import (  # noqa: E402
    BadRecord,
    Record,
    RecordError,
    read_records,
    write_records,
)

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture
def made(tmp_path):
    """A file of chains of a film: two that were kept, one with nasty texts, and one rejected."""
    shutil.copy(ASSETS / "film/bbb_320x192_1fps.mp4", tmp_path / "film.mp4")
    kept = [
        Record(
            f"c{i}",
            str(tmp_path / "film.mp4"),
            "Who <b>wakes</b> up?" if i < 2 else EVIL,
            ("a rabbit", f"{EVIL} a bird"),
            "A",
            memories=("a bird sings", "a rabbit wakes"),
            answers=("B", "A"),
        )
        for i in range(3)
    ]
    open_one = dataclasses.replace(kept[0], id="c3", options=(), answer="rabbit", answers=("", "x"))
    path = tmp_path / "coldstart.jsonl"
    write_records(path, kept)
    with chain_files.Log(chain_files.beside(path, "chains.jsonl")) as log:
        for i, record in enumerate([*kept, open_one]):
            cause, why = ("answer not in memory", f"it gives {EVIL}.") if i == 3 else ("", "")
            times = tuple(tuple(100.0 * s + 5 * f for f in range(8)) for s in range(2))
            summaries = (f"The bird sings {EVIL}.", "A rabbit & its burrow.")
            model = (str(run.BASE), 30)
            log.add(Chain(record, times, summaries, (4, 5), *model, cause, why, "d"))
    return path


@pytest.fixture
def desk(made):
    return review.Desk(made)


def learnt(path):
    """What the cold start reads, by id."""
    s = settings.Settings(data=settings.Data(folder=str(path.parent)))
    return {r.id: r for r in run.training_data(s, path.name, chains=True, open_ended=True)}


def test_decisions_reach_the_cold_start(made, desk):
    assert desk.names("not reviewed") == ["c0", "c1", "c2", "c3"]
    assert desk.names("rejected by the checks") == ["c3"]
    assert desk.decide("c0", "accept", *desk.texts("c0")) == "accept"
    new = ("a bird sings", "a rabbit wakes up")
    assert desk.decide("c1", "accept", new, ("B", " A ")) == "edit"
    assert desk.decide("c2", "reject", ("", ""), ("", "")) == "reject"
    assert desk.decide("c3", "accept", ("a bird", "a rabbit"), ("", "a rabbit")) == "edit"
    got = learnt(made)
    assert list(got) == ["c0", "c1", "c3"]
    assert got["c1"].memories == new and got["c1"].answers == ("B", "A")
    assert got["c3"].answers == ("", "a rabbit") and got["c3"].is_open
    # Started again, the page knows, and an edit can be edited once more.
    again = review.Desk(made)
    assert again.names("not reviewed") == [] and len(again.names("reviewed")) == 4
    assert again.texts("c1")[0] == new
    again.decide("c1", "accept", ("a bird", "a rabbit"), ("", "A"))
    assert learnt(made)["c1"].memories == ("a bird", "a rabbit")
    again.decide("c1", "reject", *again.texts("c1"))
    assert "c1" not in learnt(made)


def test_what_cannot_be_learnt_is_not_written(made, desk):
    for memories, answers, sentence in (
        (("word " * 40, "x"), ("B", "A"), "Memory 1 has .* tokens, the budget is 30"),
        (("x", "y"), ("B", "C"), "letter from A to B"),
    ):
        with pytest.raises(BadRecord, match=sentence):
            desk.decide("c0", "accept", memories, answers)
    assert not chain_files.read_reviews(made)


def test_a_review_of_an_older_chain_is_asked_for_again(made, desk):
    desk.decide("c0", "reject", *desk.texts("c0"))
    chain = desk.chains["c0"]
    newer = dataclasses.replace(chain.record, memories=("another", "chain"))
    with chain_files.Log(chain_files.beside(made, "chains.jsonl")) as log:
        log.add(dataclasses.replace(chain, record=newer))
    assert "c0" in review.Desk(made).names("not reviewed")


def test_texts_are_shown_as_texts(desk):
    for name in desk.chains:
        page = review.about_html(desk, name) + "".join(review.clips_html(desk.chains[name]))
        assert "<script" not in page and "<img src=x" not in page and "<b>wakes" not in page
        assert page.count("data:image/jpeg") == 8
    assert "Who &lt;b&gt;wakes&lt;/b&gt; up?" in review.about_html(desk, "c0")
    assert "rejected by the checks: it gives &lt;img" in review.about_html(desk, "c3")
    assert "A rabbit &amp; its burrow." in review.clips_html(desk.chains["c0"])[1]


def test_a_letter_in_a_memory_is_pointed_out(desk):
    assert "tells an option" not in review.about_html(desk, "c0")
    desk.decide("c0", "accept", ("a bird", "the answer is A"), ("", "A"))
    assert "memory 2 tells an option's letter" in review.about_html(desk, "c0")


def test_a_video_that_is_gone_or_outside(made, desk):
    (made.parent / "film.mp4").unlink()
    clips = review.clips_html(desk.chains["c0"])
    assert "The frames cannot be shown" in clips[0] and "data:image" not in clips[0]
    log = chain_files.beside(made, "chains.jsonl")
    log.write_text(log.read_text().replace('"film.mp4"', '"../../etc/film.mp4"'))
    with pytest.raises(RecordError, match="holds no chain"):
        review.Desk(made)


def test_nothing_to_review(tmp_path):
    with pytest.raises(RecordError, match="coldstart.chains.jsonl holds no chain: make some"):
        review.Desk(tmp_path / "coldstart.jsonl")


@pytest.fixture
def served(desk):
    page = review.build(desk)
    _, address, _ = review.launch(page, None, block=False)
    yield address
    page.close()


def test_it_serves_this_machine_only(served, made):
    assert served.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{served}gradio_api/file={made}", timeout=10)
    assert error.value.code in (403, 404)


def test_it_can_be_driven_by_a_program(served, made):
    caller = client.Client(served, verbose=False)
    shown = caller.predict("c1", api_name="/show")
    assert "Who &lt;b&gt;wakes" in shown[0]
    done = caller.predict("all", "c1", "a bird", "B", "a rabbit", "A", api_name="/accept")
    assert "c1</b>: edit. 1 of 4 chains reviewed" in done[0]
    with pytest.raises(client.exceptions.AppError, match="budget is 30"):
        caller.predict("all", "c1", "x " * 60, "B", "a", "A", api_name="/accept")
    with pytest.raises(client.exceptions.AppError):
        caller.predict("all", "../x", "x", "B", "a", "A", api_name="/reject")
    assert {name: r.verdict for name, r in chain_files.read_reviews(made).items()} == {"c1": "edit"}


@pytest.mark.slow
@browser.driver_needed
def test_a_person_reviews_in_a_browser(served, made, tmp_path):
    """The first chain is edited and accepted, the second rejected; the file says so."""
    with browser.driven(tmp_path, "1300,1500") as page:
        page.get(served)
        find = lambda css: page.find_elements("css selector", css)  # noqa: E731

        def until(check, seconds=60):
            end = time.monotonic() + seconds
            while not check():
                assert time.monotonic() < end, page.page_source[-3000:]
                time.sleep(0.05)

        memories = lambda: [a.get_property("value") for a in find(".memory textarea")]  # noqa: E731
        until(
            lambda: len(find(".clip img")) == 8 and memories() == ["a bird sings", "a rabbit wakes"]
        )
        assert all(int(i.get_property("naturalWidth")) == 160 for i in find(".clip img"))
        assert "Who <b>wakes</b> up?" in find("#about")[0].text
        assert "The bird sings <img" in find(".clip")[0].text
        until(lambda: "0 of 4" in find("#status")[0].text)
        first = find(".memory textarea")[0]
        first.send_keys(" in a tree")
        shot = page.get_screenshot_as_png()
        (tmp_path / "shot.png").write_bytes(shot)
        if os.environ.get("REVIEW_SHOT"):
            shutil.copy(tmp_path / "shot.png", os.environ["REVIEW_SHOT"])
        assert np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).std() > 20
        find("#accept")[0].click()
        until(lambda: "c0: edit. 1 of 4 chains reviewed" in find("#status")[0].text)
        until(lambda: "c1:" in find("#about")[0].text and memories()[0] == "a bird sings")
        find("#reject")[0].click()
        until(lambda: "c1: reject. 2 of 4 chains reviewed" in find("#status")[0].text)
        # Over the budget: a sentence, and nothing is written.
        until(lambda: "c2:" in find("#about")[0].text)
        find(".memory textarea")[1].send_keys(" word" * 40)
        find("#accept")[0].click()
        until(lambda: "the budget is 30" in page.page_source)
        # Nothing of the data was run.
        assert not find("#about script") and not find('img[src="x"]')
        errors = [e for e in page.get_log("browser") if e["level"] == "SEVERE"]
        assert not [e for e in errors if served in e["message"]], json.dumps(errors)
    got = learnt(made)
    assert list(got) == ["c0", "c2"] and got["c0"].memories[0] == "a bird sings in a tree"
    assert len(read_records(made)[0]) == 3, "the chains themselves are as they were"
