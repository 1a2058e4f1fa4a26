"""The page: what it answers, what it refuses, and that a browser shows it."""

import io
import json
import shutil
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tests import browser
from tests.data import damage
from videomem_jax.data.needle_video import ASSETS
from videomem_jax.models.config import ConfigError
from videomem_jax.videomem import Segment

gradio = pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

from videomem_jax import app  # noqa: E402

FILM = ASSETS / "film/bbb_320x192_1fps.mp4"
WAYS = ["red cat", "red cat <b>blue</b> frog", "blue frog tree"]


class Reader:
    """In a model's place: it reads as one does, but says what it is told."""

    def __init__(self, model):
        self.settings, self.model, self.asked = model.settings, model, []
        self.go_on = None  # a semaphore, to be asked before each segment but the first

    def read(self, video, question, options, segments):
        self.asked.append((video, question, options, segments))
        times = self.model(video, question, options, segments)
        return self.told(times, options)

    def told(self, times, options):
        for i, clip in enumerate(times):
            if i and self.go_on is not None:
                assert self.go_on.acquire(timeout=60)
            shares = (0.7, 0.2, 0.1)[: len(options or ())]
            yield Segment(
                number=i + 1,
                of=len(times),
                times=tuple(map(float, clip)),
                memory=WAYS[i % 3],
                tokens=4,
                answer=options[0] if options else "a <i>frog</i>",
                choice=0 if options else None,
                probabilities=shares or None,
            )


class Planner:
    """What a real model checks before it reads."""

    def __init__(self, **data):
        from videomem_jax import settings

        prompt = settings.Prompt(segments=3, frames=8)
        self.settings = settings.Settings(prompt=prompt, data=settings.Data(**data))

    def __call__(self, video, question, options, segments):

        from videomem_jax import asking

        asking.check_question(question, options)
        return asking.plan(video, self.settings, segments)


@pytest.fixture(scope="module")
def reader():
    return Reader(Planner())


@pytest.fixture(scope="module")
def served(reader, tmp_path_factory):
    """The page, served: its address."""
    page = app.build(reader, {"the film": str(FILM)})
    _, address, _ = app.launch(page, "127.0.0.1", None, max_mb=1, block=False)
    yield address
    page.close()


@pytest.fixture(scope="module")
def caller(served):
    return client.Client(served, verbose=False)


def ask(caller, picked="the film", uploaded=None, question="who?", options="Ann\nBo\nCy", n=""):
    """All that the page shows, one after the other: (status, segments)."""
    job = caller.submit(picked, uploaded, question, options, n, api_name="/ask")
    job.result(timeout=60)
    return job.outputs()


def test_it_shows_each_segment_as_it_is_read(caller, reader):
    shown = ask(caller)
    assert reader.asked[-1] == (str(FILM), "who?", ["Ann", "Bo", "Cy"], None)
    assert len(shown) == 4 and "Reading" in shown[0][0]
    for i, (status, body) in enumerate(shown[1:], 1):
        assert body.count("Segment ") == i and body.count("data:image/jpeg") == 4 * i
        assert "<b>A. Ann</b>" in status and ("Answer" in status) == (i == 3)
        assert body.count("<span>70.0%") == i
    body = shown[-1][1]
    assert "<ins>red</ins>" in body and "<del>red</del>" in body and "<span>frog</span>" in body
    # What a model writes is text, never markup.
    assert "&lt;b&gt;blue&lt;/b&gt;" in body and "<b>blue" not in body


def test_open_questions_and_segments(caller, reader):
    shown = ask(caller, options=" \n", n="2")
    assert reader.asked[-1][2:] == (None, 2)
    assert len(shown) == 3 and "a &lt;i&gt;frog&lt;/i&gt;" in shown[-1][0]
    ask(caller, n="auto")
    assert reader.asked[-1][3] == "auto"


def test_an_uploaded_video_comes_first(caller, reader, tmp_path):
    own = tmp_path / "own.mp4"
    shutil.copy(FILM, own)
    if own.stat().st_size > 900_000:
        _shorten(own)
    shown = ask(caller, uploaded=client.handle_file(own))
    assert len(shown) == 4
    assert reader.asked[-1][0].endswith("own.mp4") and reader.asked[-1][0] != str(FILM)


def _shorten(path):
    import av

    with av.open(str(FILM)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None and packet.pts * packet.time_base < 60:
                packet.stream = stream
                new.mux(packet)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "  "}, "'question' must not be empty"),
        ({"options": "one"}, "'options' must hold 2 to 26"),
        ({"n": "many"}, "neither a number nor"),
        ({"n": "900"}, "900 segments of 8 frames need 7200"),
        ({"picked": None}, "Pick a video, or upload one"),
    ],
)
def test_mistakes_are_sentences(caller, change, said):
    with pytest.raises(client.exceptions.AppError, match=said) as error:
        ask(caller, **change)
    assert str(FILM.parent) not in str(error.value)


def test_a_video_without_end_is_a_sentence(tmp_path):
    damage.endless(tmp_path / "endless.mkv", share=0.05)
    planner = Planner(time_limit=1.5)
    asked = ({"it": str(tmp_path / "endless.mkv")}, "it", None, "who?", "", "")
    with pytest.raises(gradio.Error, match="endless.mkv: decoding took longer than time_limit=1.5"):
        list(app.answer(Reader(planner), *asked))


@pytest.mark.parametrize("picked", [str(FILM), "../secret.mp4"])
def test_only_what_is_listed_can_be_picked(caller, reader, picked):
    before = len(reader.asked)
    with pytest.raises(client.exceptions.AppError):
        ask(caller, picked=picked)
    assert len(reader.asked) == before


def test_other_files_cannot_be_named(served, reader, tmp_path):
    """A path of this machine in an upload's place; the client would upload it, so by hand."""
    before, other = len(reader.asked), tmp_path / "other.mp4"
    other.write_bytes(b"0")
    named = {"path": str(other), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [None, named, "who?", "", ""]}).encode()
    address = f"{served}gradio_api/call/ask"
    post = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(post, timeout=10) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}", timeout=30) as reply:
        assert b"event: error" in reply.read()
    assert len(reader.asked) == before


def test_too_large_an_upload_is_refused(caller, tmp_path):
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(1_500_000))
    with pytest.raises(Exception, match="(?i)413|too large|exceeds|size"):
        ask(caller, uploaded=client.handle_file(large))


def test_it_serves_this_machine_only(served):
    assert served.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{served}gradio_api/file={FILM}", timeout=10)
    assert error.value.code in (403, 404)


def test_videos_to_pick_from(tmp_path):
    assert list(app.find_videos([]).values()) == [str(FILM)]
    (tmp_path / "a").mkdir()
    for name in ("a/b.MP4", "c.webm", "notes.txt"):
        (tmp_path / name).touch()
    assert sorted(app.find_videos([tmp_path])) == ["a/b.MP4", "c.webm"]
    with pytest.raises(ConfigError, match="there is no such folder"):
        app.find_videos([tmp_path / "gone"])


@pytest.mark.slow
@browser.driver_needed
def test_a_browser_watches_the_memory(served, reader, tmp_path, monkeypatch):
    """The question is typed, the button pressed; segments come one by one, with their frames."""
    monkeypatch.setattr(reader, "go_on", threading.Semaphore(0))
    with browser.driven(tmp_path, "1200,1500") as page:
        page.get(served)
        find = lambda css: page.find_elements("css selector", css)  # noqa: E731

        def until(check, seconds=60):
            end = time.monotonic() + seconds
            while not check():
                assert time.monotonic() < end, page.page_source[-3000:]
                time.sleep(0.05)

        until(lambda: find("#ask") and len(find("textarea")) >= 2)
        find("textarea")[1].send_keys("a cat\na frog\na tree")
        find("#ask")[0].click()
        finished = lambda: find("#status .said") and "Answer" in find("#status")[0].text  # noqa: E731
        for shown in (1, 2):
            until(lambda n=shown: len(find(".steps > li")) == n)
            assert not finished()
            reader.go_on.release()
        for _ in range(8):
            reader.go_on.release()
        until(finished)
        assert reader.asked[-1][2] == ["a cat", "a frog", "a tree"]
        images = find(".frames img")
        assert len(images) == 12 and all(int(i.get_property("naturalWidth")) == 160 for i in images)
        assert [i.text for i in find(".steps ins")][:2] == ["red", "cat"]
        # The columns stand beside each other, and the colours of the style sheet are in place.
        first = find(".steps > li")[0]
        frames, memory = (
            first.find_element("css selector", c).rect for c in (".frames", ".memory")
        )
        assert frames["x"] + frames["width"] <= memory["x"] and frames["width"] > 200
        shot = page.get_screenshot_as_png()
        (tmp_path / "shot.png").write_bytes(shot)
        assert np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).std() > 20
        # Without a question there is a sentence, not a broken page.
        find("textarea")[0].clear()
        find("textarea")[0].send_keys(" ")
        find("#ask")[0].click()
        until(lambda: "'question' must not be empty" in page.page_source)
        errors = [e for e in page.get_log("browser") if e["level"] == "SEVERE"]
        assert not [e for e in errors if served in e["message"]], json.dumps(errors)
