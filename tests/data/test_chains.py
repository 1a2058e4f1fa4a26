"""Chains of memory, with models that see the frames, forget, leak, fail and come back."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openai")

from tests.endpoint import Raw, Stall, asked, serving
from videomem_jax import run, settings
from videomem_jax.data import chain_files, chains
from videomem_jax.data.chain_writers import Draft
from videomem_jax.data.records import Record, read_records, write_records
from videomem_jax.prompt import PromptError

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
WAY = ("green", "red", "blue", "green")  # of a video's four parts
KEY = "sk-secret-0123456789"
# One question a line: what is asked, the options, the right one.
QUESTIONS = (
    ("Which colour came first?", ("blue", "green", "red"), "B"),
    ("Which colour came last?", ("red", "blue", "green"), "C"),
    ("How many parts were green?", ("1", "2", "3"), "B"),
    ("Which colour came second?", (), "It was red."),
)


def write_video(path, way, seconds=2, fps=4):
    """A video of some colours, each for some seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for i in range(len(way) * seconds * fps):
            pixels = np.full((64, 96, 3), COLOURS[way[i // (seconds * fps)]], np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def seen(part) -> str:
    """The colour of a picture in a request."""
    uri = part["image_url"]["url"]
    assert uri.startswith("data:image/jpeg;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    mean = np.array(picture.convert("RGB")).mean((0, 1))
    return min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())


def vlm(body, _):
    """Says which colours the pictures have, in order."""
    parts = body["messages"][0]["content"]
    colours = [seen(part) for part in parts if part["type"] == "image_url"]
    assert len(colours) == 4 and "seconds>" in asked(body)
    return f"The screen is {' then '.join(dict.fromkeys(colours))}."


class Thinker:
    """An LLM that takes notes of colours and answers from them; `spoil` may spoil its notes."""

    def __init__(self, spoil=lambda notes, task: notes):
        self.spoil = spoil

    def __call__(self, body, _):
        system, user = (message["content"] for message in body["messages"])
        task = json.JSONDecoder().raw_decode(user)[0]
        if "reference" in task:
            return json.dumps({"correct": task["answer"] in task["reference"]})
        if "notes so far" in task:
            now = re.findall("red|green|blue", task["what the part shows"])
            return self.spoil(" ".join([task["notes so far"], *now]).strip(), task)
        if "Shorten" in user:
            limit = int(re.search(r"At most (\d+) words", system)[1])
            return " ".join(task["notes"].split()[:limit])
        assert "what the part shows" not in task
        return json.dumps(self.answer(task))

    def answer(self, task):
        notes = re.findall("red|green|blue", task["notes"])
        question, options = task["question"], task.get("options") or {}
        found = {
            "first": notes[:1],
            "last": notes[-1:],
            "green?": [str(notes.count("green"))],
            "second": notes[1:2],
        }[question.split()[-1].rstrip("?") + ("?" if "How" in question else "")]
        if not options:
            return {"answer": found[0] if found else "nothing", "supported": bool(found)}
        letters = [letter for letter, text in options.items() if text in found]
        return {"answer": (letters or ["A"])[0], "supported": bool(letters)}


@pytest.fixture
def data(tmp_path):
    """A folder with one video and four questions of it."""
    write_video(tmp_path / "film.mp4", WAY)
    made = [
        Record(f"q{i}", "film.mp4", question, options, answer)
        for i, (question, options, answer) in enumerate(QUESTIONS)
    ]
    write_records(tmp_path / "train.jsonl", made)
    return tmp_path


@pytest.fixture
def call(data, monkeypatch, capsys):
    """Runs the command with two servers: (exit code, standard output, standard error)."""
    monkeypatch.setenv("VLM_KEY", KEY)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))

    def command(see, think, *more):
        # The servers move from port to port: the cache knows them by name.
        ends = ["--vlm-name", "v", "--llm-name", "l", "--vlm-key-env", "VLM_KEY", "--retries", "0"]
        if see is not None:
            ends += ["--vlm", see.url, "--vlm-model", "vm"]
        if think is not None:
            ends += ["--llm", think.url, "--llm-model", "lm"]
        sizes = ["--segments", "4", "--frames", "4", "--max-pixels", "4096", "--budget", "20"]
        sizes += ["--model", str(run.BASE)]
        code = 0
        try:
            chains.main([str(data / "train.jsonl"), *ends, *sizes, *map(str, more)])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return command


def test_the_pipeline(call, data):
    with serving(vlm) as see, serving(Thinker()) as think:
        code, out, err = call(see, think, "--vlm-price", 2e6, 4e6)
        assert code == 0, err
        # Four clips, whatever the number of questions; of each question four memories, and what
        # each of them answers (equal requests once); one answer is for the judge.
        assert len(see.calls) == 4
        judged = [c for c in think.calls if '"reference"' in asked(c)]
        assert len(judged) == 1
        assert "4 records: 4 chains kept" in out and "chains in" in out
        assert re.search(r"vlm: 4 calls, \d+ from the cache, 0 failed; 44 tokens read", out)
        assert re.search(r"vlm: .*, cost 136\.00", out)
        # No model but the judge was told which answer is right.
        assert not any("It was red" in asked(c) for c in think.calls if c not in judged)
        assert all(key == f"Bearer {KEY}" for key in see.keys)
        assert all(key != f"Bearer {KEY}" for key in think.keys)
    found, skipped = read_records(data / "coldstart.jsonl")
    assert not skipped and [r.id for r in found] == ["q0", "q1", "q2", "q3"]
    assert found[0].memories == ("green", "green red", "green red blue", "green red blue green")
    assert [r.answers for r in found] == [
        ("B", "B", "B", "B"),
        ("C", "A", "B", "C"),
        ("A", "A", "A", "B"),
        ("nothing", "red", "red", "red"),
    ]
    kept = chain_files.read_chains(data / "coldstart.jsonl")
    assert kept["q0"].summaries[1] == "The screen is red." and kept["q0"].tokens[0] > 0
    assert np.array(kept["q0"].times).shape == (4, 4)
    for file in data.iterdir():
        assert KEY.encode() not in file.read_bytes(), file


def test_again_asks_nothing_and_new_sizes_ask_anew(call, data):
    with serving(vlm) as see, serving(Thinker()) as think:
        assert call(see, think)[0] == 0
        before = (data / "coldstart.jsonl").read_bytes()
        calls = len(see.calls), len(think.calls)
        (data / "coldstart.jsonl").unlink()
        assert call(see, think)[0] == 0
        assert (len(see.calls), len(think.calls)) == calls
        assert (data / "coldstart.jsonl").read_bytes() == before
        # Without its log, all replies come from the cache.
        chain_files.beside(data / "coldstart.jsonl", "chains.jsonl").unlink()
        assert call(see, think)[0] == 0
        assert (len(see.calls), len(think.calls)) == calls
        assert call(see, think, "--segments", "2", "--frames", "4")[0] == 0
        assert len(see.calls) > calls[0]
    found, _ = read_records(data / "coldstart.jsonl")
    assert {len(r.memories) for r in found} == {2}


def forgetful(notes, task):
    return notes if "second" not in task["question"] else notes.split()[-1]


def telling(notes, task):
    return notes + ". The answer seems to be B" if "last" in task["question"] else notes


def wordy(notes, task):
    return "green red " * 40 if "How many" in task["question"] else notes


@pytest.mark.parametrize(
    ("spoil", "name", "cause"),
    [
        (forgetful, "q3", "answer not in memory"),
        (telling, "q1", "letter told"),
        (lambda n, t: "Nothing yet." if "How" in t["question"] else n, "q2", "answer not in"),
    ],
    ids=["forgets", "tells", "keeps nothing"],
)
def test_a_bad_chain_is_rejected_by_cause(call, data, spoil, name, cause):
    with serving(vlm) as see, serving(Thinker(spoil)) as think:
        code, out, err = call(see, think)
    assert code == 0, err
    assert "3 chains kept" in out and re.search(f"1 rejected: 1 {cause}", out)
    found, _ = read_records(data / "coldstart.jsonl")
    assert name not in {r.id for r in found} and len(found) == 3
    chain = chain_files.read_chains(data / "coldstart.jsonl")[name]
    assert chain.cause.startswith(cause) and chain.why


def test_a_memory_over_the_budget_is_shortened_or_rejected(call, data):
    with serving(vlm) as see, serving(Thinker(wordy)) as think:
        call(see, think)
        assert any("Shorten" in asked(c) for c in think.calls)
    made = chain_files.read_chains(data / "coldstart.jsonl")
    assert all(max(chain.tokens) <= 20 for chain in made.values())
    stubborn = Thinker(wordy)

    def no_shorter(body, number):
        return "green red " * 40 if "Shorten" in asked(body) else stubborn(body, number)

    chain_files.beside(data / "coldstart.jsonl", "replies.sqlite").unlink()
    with serving(vlm) as see, serving(no_shorter) as think:
        _, out, _ = call(see, think, "--llm-name", "stubborn")
    assert "1 rejected: 1 over budget" in out
    assert max(chain_files.read_chains(data / "coldstart.jsonl")["q2"].tokens) > 20


def test_a_guess_is_rejected(call, data):
    class Guesser(Thinker):
        def answer(self, task):
            return super().answer(task) | {"supported": False}

    with serving(vlm) as see, serving(Guesser()) as think:
        code, out, err = call(see, think)
    assert code == 2 and "4 rejected: 4 answer guessed" in out and "no chain was kept" in err
    assert not (data / "coldstart.jsonl").exists()


def test_what_failed_is_finished_by_the_same_command(call, data):
    def sick(body, number):
        text = asked(body)
        if "came first" in text:
            return Raw(400, b'{"error": {"message": "no"}}')
        if "came last" in text:
            return "<think>hm" if "notes so far" not in text else Thinker()(body, number)
        return Stall(30) if "How many" in text else Thinker()(body, number)

    with serving(vlm) as see, serving(sick) as think:
        code, out, err = call(see, think, "--timeout", "4")
        assert code == 0, err
        assert "1 chains kept" in out and "3 unfinished: 3 no reply" in out
        for said in ("q0: unfinished (no reply): HTTP 400", "q1: unf", "q2: unfinished (no reply)"):
            assert said in err
        assert [r.id for r in read_records(data / "coldstart.jsonl")[0]] == ["q3"]
        think.reply, calls = Thinker(), len(see.calls)
        code, out, _ = call(see, think)
        assert code == 0 and "4 chains kept" in out and "unfinished" not in out
        assert len(see.calls) == calls, "the summaries were kept"


def test_a_dead_endpoint_ends_the_run_in_one_sentence(call, data):
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    many = [rows[0] | {"id": f"r{i}"} for i in range(60)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    with serving(lambda *_: Raw(404, b"{}")) as see, serving(Thinker()) as think:
        code, _, err = call(see, think, "--concurrency", "2")
        assert code == 2 and "error: no model answered for 2" in err and "HTTP 404" in err
        assert len(see.calls) < 60 * 4


def test_a_video_that_cannot_be_used_stops_nothing(call, data):
    with open(data / "train.jsonl", "a") as file:
        row = {"id": "x", "video": "no.mp4", "question": "?", "options": ["a", "b"], "answer": "A"}
        file.write(json.dumps(row) + "\n")
    with serving(vlm) as see, serving(Thinker()) as think:
        code, out, err = call(see, think)
    assert code == 0 and "4 chains kept" in out and "1 unfinished: 1 video" in out
    assert "x: unfinished (video)" in err


class Refusing:
    """A writer that has no room for one of the records."""

    identity = "refusing"

    def write(self, record):
        if record.id == "q1":
            raise PromptError("q1 has too many options")
        letters = (record.answer,) * 2
        return Draft(((0.0, 1.0), (2.0, 3.0)), (), ("x", "y"), letters, True)


def test_a_record_that_a_writer_cannot_use_stops_nothing(data):
    found, _ = read_records(data / "train.jsonl")
    maker = chains.Maker(Refusing(), settings.Settings(), run.BASE, len, lambda cases: [True])
    job = chains.Run(found, maker, data / "coldstart.jsonl")
    job.work(2, str, lambda: None)
    assert job.unfinished == {"q1": ("record", "q1 has too many options")}
    assert [r.id for r in read_records(data / "coldstart.jsonl")[0]] == ["q0", "q2", "q3"]
    assert "4 records: 3 chains kept\n  1 unfinished: 1 record" in chains.summary(
        job.done, job.unfinished
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_stopped_at_any_moment_it_goes_on(data, how):
    """One question is answered, then the server stalls and the command is stopped."""
    first = Thinker()

    def slow(body, number):
        return first(body, number) if "came first" in asked(body) else Stall(60)

    def command(see, think):
        words = ["-m", "videomem_jax.data.chains", data / "train.jsonl", "--vlm", see.url]
        words += ["--vlm-model", "v", "--llm", think.url, "--llm-model", "l", "--segments", "4"]
        words += ["--frames", "4", "--max-pixels", "4096", "--budget", "20", "--llm-name", "l"]
        words += ["--vlm-name", "v", "--model", run.BASE]
        root = Path(chains.__file__).parents[2]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # Where the tests run in the background, their shell has processes ignore Ctrl-C; a signal
        # with a handler is as at first in a new process.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen([sys.executable, *map(str, words)], cwd=root, **pipes)
        finally:
            signal.signal(signal.SIGINT, before)

    log = chain_files.beside(data / "coldstart.jsonl", "chains.jsonl")
    with serving(vlm) as see, serving(slow) as think:
        process = command(see, think)
        until = time.monotonic() + 300
        while not (log.exists() and log.read_bytes()) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(how)
        _, err = process.communicate(timeout=120)
        if how == signal.SIGINT:
            assert process.returncode == 130 and "the same command goes on" in err
            assert [r.id for r in read_records(data / "coldstart.jsonl")[0]] == ["q0"]
        with open(log, "ab") as file:
            file.write(b'{"record": {"id": "q1"')  # a line that the kill cut short
        calls = len(see.calls)
        think.reply = Thinker()
        process = command(see, think)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "4 records: 4 chains kept" in out and len(see.calls) == calls
    assert len(chain_files.read_chains(data / "coldstart.jsonl")) == 4


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--budget", "0"], "--budget=0 must be 1 to"),
        (["--out", "OUT"], "is the file of records"),
        (["--segments", "40"], "use fewer segments"),
        (["--llm-key-env", KEY], "must name an environment variable"),
        (["--llm-extra", "{"], "JSON object"),
    ],
)
def test_mistakes_are_one_sentence(call, data, more, sentence):
    with serving(vlm) as see, serving(Thinker()) as think:
        more = [str(data / "train.jsonl") if word == "OUT" else word for word in more]
        code, out, err = call(see, think, *more)
        assert code == 2 and (sentence in err or sentence in out) and "Traceback" not in err
        assert KEY not in err + out


def test_models_are_needed(call):
    code, _, err = call(None, None)
    assert code == 2 and "give --vlm and --llm" in err
