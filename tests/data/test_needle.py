"""The embedded task: what the videos show, what the questions ask, and how building resumes."""

import contextlib
import dataclasses
import errno
import itertools
from collections import Counter, defaultdict
from fractions import Fraction

import av
import numpy as np
import pytest

from videomem_jax.data import needle, needle_chains, needle_video, records, video
from videomem_jax.data.needle import NeedleError, SplitSpec

SPLITS = {
    "train": SplitSpec(videos=3, questions_per_video=6, segments=4, part="train", seed=11),
    "val": SplitSpec(videos=2, questions_per_video=4, segments=4, part="val", seed=12),
    "test": SplitSpec(videos=3, questions_per_video=4, segments=4, part="test", seed=13),
    "test_long": SplitSpec(videos=1, questions_per_video=4, segments=8, part="test", seed=14),
}
ONE = {"val": SplitSpec(videos=2, questions_per_video=2, segments=4, part="val", seed=5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needle")
    needle.build(folder, SPLITS, progress=False)
    return folder


@pytest.fixture(scope="module")
def read(folder):
    """The records of each split, which are all good."""
    by_split = {}
    for name in SPLITS:
        by_split[name], skipped = records.read_records(folder / f"{name}.jsonl")
        assert not skipped
    return by_split


@pytest.fixture(scope="module")
def demo():
    """The records of the real splits, without their videos."""
    return {
        name: [record for plan in needle._plans(name, spec) for record in plan.records]
        for name, spec in needle.DEMO_SPLITS.items()
    }


def one_a_video(of):
    return list({record.video: record for record in of}.values())


def test_files(folder, read):
    for name, spec in SPLITS.items():
        assert len(read[name]) == spec.videos * spec.questions_per_video
        assert len(list((folder / name).glob("*.mp4"))) == spec.videos
        for record in one_a_video(read[name]):
            info = video.probe(record.video)
            seconds = 16.0 * spec.segments
            assert info == video.VideoInfo(seconds, 2.0, 2 * round(seconds), 192, 128)
            assert (record.start, record.end, record.duration) == (0.0, seconds, seconds)


def test_videos_have_a_key_frame_every_8_seconds(read):
    with av.open(read["test"][0].video) as container:
        keys = [float(f.time) for f in container.decode(video=0) if f.key_frame]
    assert keys[0] == 0.0
    assert np.diff([*keys, 64.0]).max() <= 8.0


def test_a_card_is_seen_in_exactly_one_sampled_frame(read):
    for name, spec in SPLITS.items():
        times = video.segment_times(0, 16 * spec.segments, spec.segments, 8)
        for record in one_a_video(read[name]):
            frames = video.read_frames(record.video, times.ravel())
            frames = frames.reshape(spec.segments, 8, 128, 192, 3)
            pairs = set()
            for card in record.meta["cards"]:
                shown = (card["time"] <= times) & (times < card["time"] + 2)
                ((segment, frame),) = np.argwhere(shown)
                assert segment == card["segment"]
                corners = frames[segment, frame, [3, 3, -4, -4], [3, -4, 3, -4]].astype(int)
                ground = needle_video.COLOURS[card["colour"]]
                assert np.abs(corners - ground).max() < 45, (record.id, card)
                pairs.add((segment, frame // 2))
                around = video.read_frames(record.video, [card["time"], card["time"] + 1.99])
                assert np.abs(around.astype(int) - frames[segment, frame]).mean() < 12
            assert len(pairs) == len(record.meta["cards"])  # No two cards in one patch of 2 frames.


def test_grounds_and_pictures_can_be_told_apart():
    grounds = np.array(list(needle_video.COLOURS.values()))
    apart = np.abs(grounds[:, None] - grounds[None]).max(-1) + 255 * np.eye(8, dtype=int)
    # More than twice the shade that `draw_card` adds, and what encoding does.
    assert apart.min() > 60
    assert len(needle_video.PICTURES) == len(set(needle_video.PICTURES)) == 30
    assert all(name.isalpha() and name.islower() for name in needle_video.PICTURES)
    rng = np.random.default_rng(0)
    for picture in needle_video.PICTURES:
        for colour, ground in needle_video.COLOURS.items():
            card = needle_video.Card(colour, picture, 0.0, 0)
            image = needle_video.draw_card(rng, card, (0, 60)).astype(int)
            ink = np.abs(image - ground).max(-1) > 60
            assert ink.mean() > 0.02, f"{picture} hardly shows on {colour}"
            assert not ink[:2].any()
            assert not ink[:, :2].any()


def test_card_times():
    rng = np.random.default_rng(0)
    counts = Counter()
    for _ in range(300):
        cards = int(rng.integers(7, 10))
        times = needle_video.card_times(rng, 4, cards)
        assert len(times) == cards
        assert times[0] >= 0
        assert times[-1] <= 62
        assert np.diff(times).min() >= 4
        assert all(float(2 * time).is_integer() for time in times)
        clips = Counter(int(needle_video.sampled_time(time) // 16) for time in times)
        assert set(clips) == {0, 1, 2, 3}
        assert max(clips.values()) <= 3
        counts.update(clips.values())
    assert set(counts) == {1, 2, 3}


def test_few_cards_in_a_long_video():
    """Of a split with a number of cards: however long the videos are, they have no more."""
    spec = SplitSpec(40, 4, segments=32, part="test", seed=1, cards=8)
    made = [record for plan in needle._plans("x", spec) for record in plan.records]
    clips = Counter()
    for record in one_a_video(made):
        cards = record.meta["cards"]
        assert 7 <= len(cards) <= 9 and record.duration == 512
        assert all(c["segment"] == needle_video.sampled_time(c["time"]) // 16 for c in cards)
        assert np.diff([c["time"] for c in cards]).min() >= 4
        clips.update(card["segment"] for card in cards)
    assert len(clips) > 28 and max(clips.values()) < 40 * 8 / 32 * 2.5  # all over the video


def test_splits_share_nothing(demo):
    parts = needle_video.PARTS
    for a, b in itertools.combinations(parts.values(), 2):
        assert a.film[1] <= b.film[0]
        assert a.digits[1] <= b.digits[0]
    rng = np.random.default_rng(0)
    for part in parts.values():
        seconds = part.film[1] - part.film[0]
        assert len(needle_video._film(part.film)) == seconds
        for _ in range(50):
            cut = needle_video._stretches(rng, 64, seconds)
            assert len(cut) == 64
            assert cut.min() >= 0
            assert cut.max() < seconds
    digits = needle_video._digits()
    assert digits.shape == (10, 174, 8, 8)
    assert len(np.unique(digits.reshape(1740, -1), axis=0)) == 1740

    specs = needle.DEMO_SPLITS
    assert len({spec.seed for spec in specs.values()}) == len(specs)
    assert {name: spec.part for name, spec in specs.items()} == {
        "train": "train",
        "val": "val",
        "test": "test",
        "test_long": "test",
    }
    seen = Counter()
    for name, made in demo.items():
        # An instance is a question about a sequence of cards.
        instances = {
            (record.question, tuple((c["colour"], c["picture"]) for c in record.meta["cards"]))
            for record in made
        }
        assert len(instances) == len(made), f"{name} asks a question twice"
        seen.update(instances)
    assert max(seen.values()) == 1
    assert len({record.id for made in demo.values() for record in made}) == 3460


def test_shares_and_letters_are_balanced(demo):
    for name, spec in needle.DEMO_SPLITS.items():
        made = demo[name]
        total = spec.videos * spec.questions_per_video
        assert len(made) == total
        letters = Counter(record.answer for record in made)
        assert max(letters.values()) - min(letters.values()) <= 1
        by_kind = defaultdict(Counter)
        for record in made:
            by_kind[record.category][record.answer] += 1
        for kind, share in zip(needle.KINDS, spec.shares, strict=True):
            assert abs(by_kind[kind].total() - share / 20 * total) <= 1
            assert set(by_kind[kind]) == set("ABCD")
            assert max(by_kind[kind].values()) - min(by_kind[kind].values()) <= 1


def gold(record):
    """The right answer, the pictures it may not be mixed with, and the clip, from the cards."""
    cards = record.meta["cards"]
    words = record.question.removesuffix("?").split()
    if record.category == "colour":
        (found,) = (card for card in cards if card["colour"] == words[5])
        assert record.question == f"Which picture was on the {words[5]} card?"
    elif record.category == "count":
        found = [card for card in cards if card["colour"] == words[2]]
        assert record.question == f"How many {words[2]} cards were there?"
        return str(len(found)), found[-1]["segment"], words[2]
    elif record.category == "after":
        place = [card["picture"] for card in cards].index(words[-1])
        assert record.question == f"Which card came right after the {words[-1]}?"
        return cards[place + 1]["picture"], cards[place + 1]["segment"], words[-1]
    else:
        found = cards[{"first": 0, "last": -1}[record.category]]
        assert record.question == f"Which card came {record.category}?"
    return found["picture"], found["segment"], words[5] if record.category == "colour" else None


def test_questions_have_one_right_answer(demo):
    for record in itertools.chain.from_iterable(demo.values()):
        answer, segment, about = gold(record)
        assert record.options["ABCD".index(record.answer)] == answer
        assert record.meta["needle_segment"] == segment
        times = [c["time"] for c in record.meta["cards"] if c["segment"] == segment]
        assert record.evidence[-1][0] in times
        # What is right so far is what a memory of all cards shown so far supports.
        shown = record.meta["cards"]
        for number in range(len(shown) + 1):
            now = shown[number - 1]["time"] if number else -1.0
            so_far = [letter for time, letter in record.evidence if time <= now]
            supported = needle_chains.supported_answer(record, shown[:number])
            known = supported in record.options
            letter = "ABCD"[record.options.index(supported)] if known else ""
            assert (so_far[-1] if so_far else "") == letter
        assert record.meta["about"] == about
        if record.category == "count":
            assert record.options == ("1", "2", "3", "4")
        else:
            shown = {card["picture"] for card in record.meta["cards"]}
            assert len(set(record.options)) == 4
            assert set(record.options) <= shown - {about}


def test_cards_of_a_video(demo):
    for name, made in demo.items():
        segments = needle.DEMO_SPLITS[name].segments
        for record in one_a_video(made):
            cards = record.meta["cards"]
            assert 2 * segments - 1 <= len(cards) <= 2 * segments + 1
            assert len({card["picture"] for card in cards}) == len(cards)
            colours = Counter(card["colour"] for card in cards)
            assert list(colours.values()).count(1) >= 2
            assert max(colours.values()) <= 4
            assert [c["time"] for c in cards] == sorted(c["time"] for c in cards)
            clips = Counter(card["segment"] for card in cards)
            assert set(clips) == set(range(segments))
            assert max(clips.values()) <= 3


def state(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_video_without_questions_shows_no_card(tmp_path):
    spec = SplitSpec(videos=1, questions_per_video=0, segments=4, part="train", seed=5)
    needle.build(tmp_path, {"blank": spec}, progress=False)
    assert (tmp_path / "blank.jsonl").read_bytes() == b""
    film = needle_video.film_frames(needle_video.PARTS["train"].film).astype(int)
    with av.open(str(tmp_path / "blank/0000.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    for frame in frames[:: len(frames) // 16]:
        assert np.abs(film - frame).mean((1, 2, 3)).min() < 8


def test_finished_folder_is_reused_and_a_gap_is_filled(tmp_path):
    needle.build(tmp_path, ONE, progress=False)
    before = state(tmp_path)
    needle.build(tmp_path, ONE, progress=False)
    assert state(tmp_path) == before
    (tmp_path / "val/0001.mp4").unlink()
    (tmp_path / "val.jsonl").unlink()
    needle.build(tmp_path, ONE, workers=1, progress=False)
    after = state(tmp_path)
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in before.items()}
    kept = [path for path in before if before[path] == after[path]]
    assert [path.name for path in kept] == ["0000.mp4", "spec.json"]


def test_another_spec_replaces_the_files(tmp_path):
    needle.build(tmp_path, ONE, progress=False)
    before = state(tmp_path)
    other = {"val": dataclasses.replace(ONE["val"], seed=6, videos=1)}
    needle.build(tmp_path, other, progress=False)
    after = state(tmp_path)
    assert len(before) == 4
    assert len(after) == 3
    assert all(after[path][1] != before[path][1] for path in after)


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "val.jsonl").write_text("mine")
    with pytest.raises(NeedleError, match=r"val\.jsonl was not written by this task"):
        needle.build(tmp_path, ONE, progress=False)
    assert (tmp_path / "val.jsonl").read_text() == "mine"


def test_full_disk_is_one_sentence_and_the_rest_can_be_made_later(tmp_path, monkeypatch):
    real = needle.replacing

    @contextlib.contextmanager
    def full(path):
        with real(path) as out:
            yield out
            if path.name == "0001.mp4":
                raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(needle, "replacing", full)
        with pytest.raises(NeedleError, match=r"The disk that holds .* is full; free some space"):
            needle.build(tmp_path, ONE, progress=False)
    assert not (tmp_path / "val.jsonl").exists()
    assert not (tmp_path / "val/0001.mp4").exists()
    needle.build(tmp_path, ONE, progress=False)
    assert len(records.read_records(tmp_path / "val.jsonl")[0]) == 4
    assert len(state(tmp_path)) == 4


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NeedleError, match="Cannot write the data set"):
        needle.build(tmp_path / "file", ONE, progress=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"videos": 0}, "at least 1 video"),
        ({"questions_per_video": 7}, "0 to 6 questions"),
        ({"segments": 3}, "4 to 10 segments"),
        ({"segments": 11}, "4 to 10 segments"),
        ({"segments": 3, "cards": 8}, "4 to 10 segments"),
        ({"cards": 7}, r"0 or 8 to 11 \(in 4 segments\), found 7"),
        ({"cards": 12}, r"0 or 8 to 11 \(in 4 segments\), found 12"),
        ({"segments": 8, "cards": 21}, "0 or 8 to 20"),
        ({"shares": (8, 3, 3, 3)}, "5 numbers that add up to 20"),
        ({"shares": (8, 3, 3, 3, 4)}, "5 numbers that add up to 20"),
        ({"shares": (5, 2, 3, 5, 5), "questions_per_video": 5}, "all but the first at most 4"),
        ({"part": "dev"}, "'part' must be train, val or test, found 'dev'"),
    ],
)
def test_impossible_specs(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(ONE["val"], **change)


@pytest.mark.parametrize(
    ("segments", "cards"), [(4, 0), (10, 0), (4, 8), (4, 11), (8, 20), (32, 8), (32, 20)]
)
@pytest.mark.parametrize("questions", [1, 2, 3, 5, 6])
def test_every_spec_that_is_allowed_can_be_made(segments, cards, questions):
    spec = SplitSpec(40, questions, segments, part="val", seed=1, cards=cards)
    made = [record for plan in needle._plans("x", spec) for record in plan.records]
    assert len(made) == 40 * questions
    for record in made:
        assert record.options["ABCD".index(record.answer)] == gold(record)[0]
    assert Fraction(sum(r.category == "colour" for r in made), len(made)) == Fraction(2, 5)
