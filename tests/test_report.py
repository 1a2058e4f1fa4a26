"""The report: what it says, what it leaves out, and that a browser shows it."""

import base64
import dataclasses
import html.parser
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from PIL import Image

from tests import browser
from videomem_jax import report, report_plots, report_timelines
from videomem_jax.data import needle, records, video

SPLITS = {"test": needle.SplitSpec(3, 6, segments=4, part="test", seed=21)}
NASTY = "<script>alert('x')</script>"


def share(mean, n=400):
    return {"mean": mean, "low": max(0.0, mean - 0.04), "high": min(1.0, mean + 0.04), "n": n}


def item(record, right, remembers):
    """A row of an evaluation; `remembers` is the number of last cards held in memory."""
    times = video.segment_times(0, record.duration, 4, 8)
    wrong = "ABCD"[("ABCD".index(record.answer) + 1) % 4]
    steps = []
    for segment in range(4):
        seen = [card for card in record.meta["cards"] if card["segment"] <= segment]
        held = [f"{card['colour']} {card['picture']}" for card in seen[-remembers:]]
        answer = {0: None, 3: record.answer if right else wrong}.get(segment, wrong)
        steps.append(
            {
                "times": times[segment].tolist(),
                "memory": " ".join(held),
                "tokens": 2 * len(held),
                "answer": answer,
                "well_formed": answer is not None,
            }
        )
    meta = {key: record.meta[key] for key in ("needle_segment", "cards")}
    row = {key: getattr(record, key) for key in ("id", "video", "question", "category")}
    return row | meta | {"options": list(record.options), "gold": record.answer, "steps": steps}


def metric_rows():
    for step in range(1, 61):
        values = dict.fromkeys(("loss", "token_accuracy", "answer_accuracy", "grad_norm"), 1 / step)
        yield {"phase": "coldstart", "step": step, **values, "seconds/step": 0.5, "seconds/data": 0}
    for step in range(1, 41):
        values = {f"accuracy/segment_{t + 1}": 0.2 * t + step / 400 for t in range(4)}
        names = "reward reward/answer reward/form reward/length memory_tokens entropy tau no_signal"
        values |= dict.fromkeys([*names.split(), "over_budget", "format_rate", "kl"], step / 40)
        values |= {"logprob_gap": 1e-6 * step, "clip_fraction": math.nan}
        yield {"phase": "prpo", "step": step, **values, "seconds/rollout": 2.0 + 30 * (step == 1)}


SUMMARY = {
    "accuracy": {
        "base": share(0.262),
        "blind": share(0.247),
        "coldstart": share(0.531),
        "prpo": share(0.913),
        "prpo_8_segments": share(0.884, 300),
        "coldstart_by_segment": [share(0.3), share(0.38), share(0.45), share(0.531)],
        "prpo_by_segment": [share(0.35), share(0.55), share(0.75), share(0.913)],
        "prpo_by_kind": {"colour": share(0.957, 160), "count": share(0.811, 60)},
        "coldstart_by_kind": {"colour": share(0.6, 160), "count": share(math.nan, 0)},
        "prpo_by_needle_segment": [share(0.9), share(0.91), share(0.92), share(0.933)],
    },
    "memory_tokens": {"coldstart": 6.41, "prpo": 3.27},
    "logprob_gap": 3.4e-6,
    "seconds": {"total": 754.0, "data": 60, "coldstart": 200, "prpo": 400, "compile": 90.0},
    "peak_rss_gb": 3.21,
    "config": {"memory": {"budget": 8}, "prpo": {"group_size": 8, "note": NASTY}},
    "versions": {"jax": "0.10.2"},
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def test_records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needle")
    needle.build(folder, SPLITS, progress=False)
    return records.read_records(folder / "test.jsonl")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, test_records):
    """A run folder with everything, and its page; the first question has nasty text in it."""
    folder = tmp_path_factory.mktemp("run")
    found = list(test_records)
    options = list(found[0].options)
    options["ABCD".index(found[0].answer)] = NASTY
    found[0] = dataclasses.replace(found[0], options=tuple(options), question=f"Which {NASTY}?")
    (folder / "eval").mkdir()
    evals = {
        "coldstart": [item(record, i % 2 == 0, 4) for i, record in enumerate(found)],
        "prpo": [item(record, i % 3 != 1, 1) for i, record in enumerate(found)],
    }
    evals["prpo"][0]["steps"][0]["memory"] = f"red {NASTY} \ud800"
    for name, rows in evals.items():
        (folder / f"eval/{name}.jsonl").write_text(lines(rows))
    (folder / "metrics.jsonl").write_text(lines(metric_rows()))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    assert report.write(folder, timelines=6) == folder / "report.html"
    return folder


@pytest.fixture
def workdir(tmp_path, whole):
    """A copy without training curves, which take the most time to draw, to be changed."""
    shutil.copytree(whole, tmp_path / "run")
    for name in ("metrics.jsonl", "report.html"):
        (tmp_path / "run" / name).unlink()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def page(whole):
    return Page(whole / "report.html")


class Page(html.parser.HTMLParser):
    """A written page: `text`, and `tags` as (name, attributes); fails where tags do not close."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.tags, self._open, self._text = [], [], []
        self.feed(self.source)
        self.close()
        assert not self._open
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self._text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("", "", ""),
        ("", "red cat", "+red +cat"),
        ("red cat", "", "-red -cat"),
        ("red cat", " red  cat\n", "=red =cat"),
        ("red cat", "red key", "=red -cat +key"),
        ("red cat blue star", "blue star green key", "-red -cat =blue =star +green +key"),
    ],
)
def test_timeline_diff(before, after, words):
    states = {"=": "kept", "+": "added", "-": "dropped"}
    expected = [(word[1:], states[word[0]]) for word in words.split()]
    assert report.timeline_diff(before, after) == expected


def test_timeline_diff_of_long_memories():
    # Above 200 words difflib takes frequent ones for junk unless it is told not to.
    before = "the cat saw the dog " * 100
    assert {state for _, state in report.timeline_diff(before, before)} == {"kept"}


def made_up(rights, kinds=("a",), videos=1000):
    return [
        {
            "id": i,
            "video": str(i % videos),
            "category": kinds[i % len(kinds)],
            "gold": "A",
            "steps": [{"answer": "A" if right else None}],
        }
        for i, right in enumerate(rights)
    ]


def test_choose_mixes_right_and_wrong_of_every_kind():
    rows = made_up([i % 10 != 0 for i in range(300)], kinds="abcdefg")
    chosen = report_timelines.choose(rows, 12)
    assert chosen == report_timelines.choose(rows, 12)
    assert len({row["id"] for row in chosen}) == 12
    assert sum(not report_timelines.is_right(row) for row in chosen) == 4
    assert [kind for kind, _ in itertools.groupby(row["category"] for row in chosen)] == [
        *"abcdefg"
    ]


@pytest.mark.parametrize(
    ("rights", "wrong"), [([True] * 20, 0), ([False] * 20, 6), ([False] + [True] * 9, 1)]
)
def test_choose_takes_what_there_is(rights, wrong):
    chosen = report_timelines.choose(made_up(rights), 6)
    assert len(chosen) == 6
    assert sum(not report_timelines.is_right(row) for row in chosen) == wrong
    assert len(report_timelines.choose(made_up(rights), 100)) == len(rights)


def test_choose_prefers_videos_not_yet_shown():
    chosen = report_timelines.choose(made_up([True] * 40, videos=8), 8)
    assert len({row["video"] for row in chosen}) == 8


def test_frame_times_prefer_cards():
    times = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0]
    cards = [{"time": 4.5}, {"time": 13.0}]  # Shown at 5 and at 13.
    assert report_timelines.frame_times(times, cards, 4) == [3.0, 5.0, 11.0, 13.0]
    assert report_timelines.frame_times(times, [], 4) == [3.0, 7.0, 11.0, 15.0]
    assert report_timelines.frame_times(times[:2], cards, 4) == [1.0, 3.0]
    assert report_timelines.frame_times(times, [{"time": t - 1} for t in times], 2) == [5.0, 13.0]


def test_smooth():
    values = np.array([0.0, 3.0, 6.0, 3.0])
    np.testing.assert_allclose(report_plots.smooth(values, 3), [1.5, 3.0, 4.0, 4.5])
    np.testing.assert_array_equal(report_plots.smooth(values, 1), values)


@pytest.mark.parametrize(("budget", "marked"), [(None, 0), (0, 0), (3, 1), (30, 0)])
@pytest.mark.parametrize("tokens", [[0, 0], [2, 4]])
def test_a_budget_is_marked_where_it_fits_on_the_axis(tokens, budget, marked):
    """Memories may be empty, and no token free of cost."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = report_plots.Line("PRPO", "prpo")
        drawn = str(report_plots.memory_length({line: tokens}, budget))
    assert drawn.count(">budget<") == (marked if max(tokens) else 0)


def test_content(page):
    for words in (
        "reads videos in 4 segments",
        "cold-started for 60 steps on chains of memory, trained for 40 steps by PRPO and",
        "evaluated on 400 test questions",
        "PRPO 91.3% 87.3\u201395.3% 400",
        "PRPO, 8 segments 88.4%",
        "Chance 25.0%",
        "+38.2 points over the cold start",
        "colour 60.0% 56.0\u201364.0, n = 160",
        "count not measured 81.1%",
        "segment 4 93.3%",
        "Cold start 6.41 tokens PRPO 3.27 tokens",
        "3.4e-06",
        "12 min 34 s",
        "peak memory 3.21 GB",
        "prpo.group_size 8",
        "jax 0.10.2",
        "malformed output",
        "Cold start on the same question",
    ):
        assert words in page.text, words
    titles = re.findall(r"<figcaption>\s*<b>(.*?)</b>", page.source)
    assert titles.count("Accuracy by segment") == titles.count("Temperature of propagation") == 1
    assert "Clip fraction" not in titles  # Never a number in this run.
    assert "This run has no" not in page.text


def test_timelines(page):
    views = [attrs for attrs in page.all("article") if attrs["class"] == "timeline"]
    assert len(views) == 6
    classes = [attrs.get("class") for attrs in page.all("div")]
    assert classes.count("answer none") == 12  # The first step of all, and of the cold start's.
    assert classes.count("answer right") + classes.count("answer wrong") == 36
    assert {"ins", "del"} <= {name for name, _ in page.tags}
    images = page.all("img")
    assert len(images) == 6 * 4 * 4
    assert any(re.search(r"at 0:\d\d (red|blue|white|black|green)", i["alt"]) for i in images)
    for attrs in images:
        head, data = attrs["src"].split(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 107)


def test_number_of_timelines(workdir):
    assert len(Page(report.write(workdir, timelines=2)).all("article")) == 2
    assert "no evaluated questions to show" in Page(report.write(workdir, timelines=0)).text


def test_page_is_self_contained_and_escaped(page):
    assert not page.all("script") + page.all("link")
    assert page.text.count(NASTY) >= 4  # Question, option, memory, configuration: as text.
    assert not re.search("https?:", page.source)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        assert attrs.get("src", "data:").startswith("data:")
        links = [attrs[key] for key in ("href", "xlink:href") if key in attrs]
        links += re.findall(r"url\(([^)]*)\)", " ".join(filter(None, attrs.values())))
        assert all(link[0] == "#" and link[1:] in ids for link in links)
    # No colour of the figures is fixed: all follow the theme.
    assert not re.search(r"(fill|stroke): #", page.source)
    defined = set(re.findall(r"(--[\w-]+):", page.source))
    assert set(re.findall(r"var\((--[\w-]+)\)", page.source)) <= defined


def test_same_run_same_page(whole):
    first = (whole / "report.html").read_bytes()
    assert report.write(whole, timelines=6).read_bytes() == first
    assert not [path for path in whole.iterdir() if path.name.startswith(".")]


def test_missing_parts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines(metric_rows()).splitlines()[0] + "\n")
    text = Page(report.write(tmp_path)).text
    for words in (
        "cold-started for 1 steps on chains of memory.",
        "This run has no evaluation yet",
        "no accuracy by segment",
        "no memory lengths",
        "no accuracy by kind",
        "no accuracy by where the needle was",
        "no metrics of PRPO",
        "no times",
        "no evaluated questions",
        "no summary of its configuration",
    ):
        assert words in text, words
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "summary.json").write_text('{"accuracy": {"coldstart": null}, "seconds": 3}')
    text = Page(report.write(tmp_path)).text
    assert "neither trained nor evaluated" in text
    assert "no metrics of Cold start" in text
    (tmp_path / "config.json").write_text('{"prpo": {"steps": 7}}')
    assert "prpo.steps 7" in Page(report.write(tmp_path)).text


def test_video_gone(workdir):
    rows = [json.loads(line) for line in (workdir / "eval/prpo.jsonl").read_text().splitlines()]
    for row in rows:
        row["video"] = "/nowhere/0.mp4"
    (workdir / "eval/prpo.jsonl").write_text(lines(rows))
    page = Page(report.write(workdir, timelines=3))
    assert "The frames cannot be shown. /nowhere/0.mp4: there is no such video file." in page.text
    assert len(page.all("article")) == 3
    assert not page.all("img")


def test_rows_cut_short_are_left_out_and_named(workdir):
    (workdir / "metrics.jsonl").write_text('{"phase": "prpo", "step": 40}\n{"phase": "prpo", "st')
    with open(workdir / "eval/prpo.jsonl", "a") as out:
        out.write('{"id": "x", "steps": []}\n[]\n')
    (workdir / "summary.json").write_text("{")
    text = Page(report.write(workdir)).text
    assert "metrics.jsonl has 1 line that is cut short or incomplete" in text
    assert "prpo.jsonl has 2 lines that are cut short" in text
    assert "summary.json could not be read" in text
    assert "trained for 40 steps" in text


def test_a_folder_with_nothing_to_report(tmp_path):
    with pytest.raises(report.ReportError, match="there is no such run folder"):
        report.write(tmp_path / "none")
    with pytest.raises(report.ReportError, match=r"nothing to report.*run train\.py"):
        report.write(tmp_path)


def test_what_cannot_be_written_is_a_sentence(workdir):
    (workdir / "report.html").mkdir()
    with pytest.raises(report.ReportError, match=r"Cannot write .*report\.html: .*\.$"):
        report.write(workdir)


@browser.needed
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(whole, tmp_path, scheme):
    shot = tmp_path / "shot.png"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--window-size=1000,1600 --blink-settings=preferredColorScheme={int(scheme == 'light')}"
    )
    command = [browser.BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'browser'}"]
    subprocess.run(
        [*command, f"--screenshot={shot}", (whole / "report.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (1600, 1000, 3)
    ground = pixels[2, 2]
    assert (ground.mean() > 200) == (scheme == "light")
    drawn = np.abs(pixels - ground).max(-1) > 40
    # There is something in each fifth of the page's height, and colour from the figures.
    assert all(part.mean() > 0.01 for part in np.split(drawn, 5))
    assert (pixels.max(-1) - pixels.min(-1) > 80).sum() > 2000
