"""The loader: a row of a batch from one record, and decoded frames that are kept."""

import dataclasses
import functools
import pathlib
import pickle
from fractions import Fraction

import av
import jax
import numpy as np
import pytest
from flax import nnx

from tests.test_pipeline import FRAMES, PREFIX, SEGMENTS, SLOTS, TOKENS, ask, assert_same, sizes
from videomem_jax import settings as cfg
from videomem_jax.batch import Batch, Chain, Clip, Prefix
from videomem_jax.data import pipeline, video
from videomem_jax.data.decoder import Decoder
from videomem_jax.data.frames import FrameCache
from videomem_jax.data.sampling import Sample
from videomem_jax.data.video import VideoError
from videomem_jax.models.config import ConfigError, VisionConfig
from videomem_jax.models.decoder import place
from videomem_jax.models.vision import VisionTower
from videomem_jax.prompt import PromptError


@pytest.fixture(scope="module")
def film(film_records):
    """Two videos of the embedded task with two questions each."""
    return [film_records[i] for i in (0, 1, 4, 5)]


def write_video(path, height, width, seconds=16, fps=2):
    """A video whose colour says the time."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(seconds * fps):
            pixels = np.full((height, width, 3), 40 + 5 * i, np.uint8)
            pixels[: height // 2, : width // 2] = 255 - 5 * i
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def prompts(**changes) -> cfg.Settings:
    return dataclasses.replace(sizes(), prompt=dataclasses.replace(sizes().prompt, **changes))


def shapes(tree):
    return jax.tree.map(lambda a: (np.shape(a), np.asarray(a).dtype), tree)


# --- one record ---


def test_a_row_has_the_shapes_of_the_contract(tokenizer, film):
    t, q = SEGMENTS, TOKENS * 4
    row = pipeline.Loader(tokenizer, sizes(), t)(5, film[0])
    i, u, b = np.dtype(np.int32), np.dtype(np.uint8), np.dtype(bool)
    assert shapes(row) == Batch(
        prefix=Prefix(
            ((t, PREFIX), i), ((t, 3, PREFIX), i), ((t, PREFIX), b), ((t, PREFIX), i), ((t,), i)
        ),
        clip=Clip(((t, FRAMES // 2, q, 1536), u), ((t, q, 2), i), ((t, 2), i)),
        chain=Chain(((t, SLOTS), i), ((t,), i), ((t,), i)),
        gold=((), i),
        so_far=((t,), i),
        choices=((10, 1), i),
        record=((), i),
        real=((), b),
    )


def test_a_row_says_what_the_record_says(tokenizer, film):
    record = film[0]
    row = pipeline.Loader(tokenizer, sizes(), SEGMENTS)(5, record)
    assert (row.record, bool(row.real)) == (5, True)
    assert record.options[row.gold] == record.options["ABCD".index(record.answer)]
    # 128x192 becomes 64x96 pixels: 4 by 6 patches.
    np.testing.assert_array_equal(row.clip.grid, [[4, 6]] * SEGMENTS)
    times = video.sample_times(record.video, SEGMENTS, FRAMES, record.start, record.end)
    for t in range(SEGMENTS):
        frames = video.read_frames(record.video, times[t], (64, 96))
        np.testing.assert_array_equal(row.clip.patches[t], video.patchify(frames))
        text = tokenizer.decode(row.prefix.tokens[t][row.prefix.mask[t]])
        stamps = "".join(f"<{pair.mean():.1f} seconds>" for pair in times[t].reshape(-1, 2))
        options = "".join(f"{x}. {o}\n" for x, o in zip("ABCD", record.options, strict=True))
        assert text == f"user\n{record.question}\n{options}{stamps}"
        # Every merged block of every pair has its token.
        slot = row.prefix.slot[t]
        assert slot[slot >= 0].tolist() == list(range(TOKENS * FRAMES // 2))
        assert (slot[~row.prefix.mask[t]] == -1).all()
    np.testing.assert_array_equal(row.chain.length, [-1] * SEGMENTS)
    np.testing.assert_array_equal(row.chain.answer, [-1] * SEGMENTS)


def test_what_is_right_so_far(tokenizer, film):
    """By what the frames of a clip reach; after the last one the answer, whatever they reach."""
    loader = pipeline.Loader(tokenizer, sizes(), SEGMENTS)
    ends = loader.times(film[0])[:, -1]
    closed = dataclasses.replace(film[0], options=("a", "b", "c"), answer="C", evidence=None)
    spoken = dataclasses.replace(closed, options=(), answer="a cat")
    expected = [
        (closed, None, [2, 2, 2, 2]),
        (closed, ((0.0, "C"),), [2, 2, 2, 2]),
        (closed, ((ends[0], "B"), (ends[0] + 0.1, "C")), [1, 2, 2, 2]),
        (closed, ((0.0, "A"), (ends[1], ""), (ends[2], "C")), [0, -1, 2, 2]),
        (closed, ((1e6, "C"),), [-1, -1, -1, 2]),
        (spoken, None, [0, 0, 0, 0]),
        (spoken, ((0.0, "a dog"), (ends[1], "a cat")), [-1, 0, 0, 0]),
    ]
    for record, evidence, right in expected:
        record = dataclasses.replace(record, evidence=evidence)
        np.testing.assert_array_equal(loader(0, record).so_far, right, str(evidence))
    # The task's clips are named by their records.
    for row, record in enumerate(film[:4]):
        found = loader(row, record)
        known = np.arange(SEGMENTS) >= record.meta["needle_segment"]
        np.testing.assert_array_equal((found.so_far == found.gold)[known], True)
    np.testing.assert_array_equal(loader.blank().so_far, [-1] * SEGMENTS)


def test_chains(tokenizer, film):
    load = pipeline.Loader(tokenizer, sizes(), SEGMENTS)
    memories = ("red cat", "", "red cat blue boat", "blue boat")
    record = dataclasses.replace(film[0], memories=memories, answers=("B", "", "D", "C"))
    chain = load(0, record).chain
    assert chain.answer.tolist() == [1, -1, 3, 2] and chain.length[1] == 0
    for tokens, length, text in zip(chain.memory, chain.length, memories, strict=True):
        assert tokenizer.decode(tokens[:length]) == text
        assert (tokens[length:] == tokenizer.ids.pad).all()
    # Without provisional answers the right one is taught, at the end.
    chain = load(0, dataclasses.replace(record, answers=None)).chain
    assert chain.answer.tolist() == [-1, -1, -1, "ABCD".index(record.answer)]
    with pytest.raises(PromptError, match="has 2 memories, but the run has 4 segments"):
        load(0, dataclasses.replace(record, memories=memories[:2], answers=None))
    with pytest.raises(ConfigError, match="config.memory.slots=60"):
        load(0, dataclasses.replace(record, memories=("x y " * 40, *memories[1:])))


def test_open_ended_records(tokenizer, film):
    settings = sizes()
    settings = dataclasses.replace(
        settings, prompt=dataclasses.replace(settings.prompt, answer_tokens=6)
    )
    load = pipeline.Loader(tokenizer, settings, SEGMENTS)
    record = dataclasses.replace(film[0], options=(), answer="a boat", evidence=None)
    row = load(0, record)
    assert row.gold == -1 and (row.choices == -1).all() and row.choices.shape[1] == 6
    assert (row.chain.length == -1).all()
    # With a chain there is something to answer: what the chain answers, each text once.
    memories = ("red cat", "", "red cat blue boat", "blue boat")
    chained = dataclasses.replace(record, memories=memories, answers=("cat", "", "cat", "boat"))
    row = load(0, chained)
    assert row.gold == -1 and row.chain.answer.tolist() == [0, -1, 0, 1]
    said = [tokenizer.decode(ids[ids >= 0]) for ids in row.choices]
    assert said[:2] == ["cat", "boat"] and not any(said[2:])
    # In PRPO the chain is nothing, or its answers would be choices.
    row = pipeline.Loader(tokenizer, settings, SEGMENTS, chains=False)(0, chained)
    assert (row.choices == -1).all() and (row.chain.length == -1).all()
    row = load(0, dataclasses.replace(chained, answers=None))
    assert row.chain.answer.tolist() == [-1, -1, -1, 0]
    assert tokenizer.decode(row.choices[0][row.choices[0] >= 0]) == "a boat"
    with pytest.raises(PromptError, match="config.prompt.answer_tokens=6"):
        load(0, dataclasses.replace(chained, answers=("cat", "", "", "a boat on the blue card")))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Videos of other shapes."""
    folder = tmp_path_factory.mktemp("odd")
    names = {"wide": (128, 192), "tall": (192, 96), "square": (128, 128), "ribbon": (32, 640)}
    return {name: write_video(folder / f"{name}.mp4", *size) for name, size in names.items()}


def test_one_shape_for_every_aspect_ratio(tokenizer, odd):
    load = pipeline.Loader(tokenizer, sizes(), SEGMENTS)
    rows = {name: load(0, ask(odd[name])) for name in ("wide", "tall", "square")}
    assert shapes(rows["wide"]) == shapes(rows["tall"]) == shapes(rows["square"])
    grids = {name: tuple(row.clip.grid[0].tolist()) for name, row in rows.items()}
    assert grids == {"wide": (4, 6), "tall": (6, 2), "square": (4, 4)}
    for name, (h, w) in grids.items():
        assert not rows[name].clip.patches[:, :, h * w :].any()
        assert rows[name].clip.patches[:, :, : h * w].any((0, 1, 3)).all()


def test_padded_patches_change_nothing(tokenizer, odd, hasty):
    """What stands at a prompt's tokens is the same with more room for patches than there are."""
    vision = VisionConfig(1, 16, 24, 2, 32, 16, deepstack_visual_indexes=(0,))
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionTower(vision, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda a: 0.2 * rng.standard_normal(a.shape, np.float32), state)

    @functools.partial(jax.jit, compiler_options=hasty)
    def at_tokens(state, clip, slot):
        features = nnx.merge(graph, state)(*clip)
        return place(features.embeds, slot), place(features.deepstack[0], slot)

    seen = {}
    for room in (4, 6):
        s = prompts(max_pixels=room * 1024)
        row = pipeline.Loader(tokenizer, s, SEGMENTS)(0, ask(odd["square"]))
        slot = row.prefix.slot
        assert row.clip.patches.shape[2] == 4 * room
        assert (slot >= 0).sum() == SEGMENTS * FRAMES // 2 * 4
        seen[room] = [np.asarray(a) for a in at_tokens(state, row.clip, slot)]
    for exact, padded in zip(seen[4], seen[6], strict=True):
        np.testing.assert_allclose(exact, padded, atol=1e-5)
        # The case says something: features differ from pair to pair.
        assert exact[0, slot[0] >= 0].std(0).max() > 1e-3


def test_a_video_too_narrow_for_the_budget(tokenizer, odd):
    load = pipeline.Loader(tokenizer, sizes(), SEGMENTS)
    with pytest.raises(VideoError, match=r"640x32 pixels .*config.prompt.max_pixels=6144"):
        load(0, ask(odd["ribbon"]))


def test_a_blind_loader_shows_nothing(tokenizer, film):
    seeing = [pipeline.Loader(tokenizer, sizes(), SEGMENTS)(i, film[i]) for i in (0, 3)]
    blind = [pipeline.Loader(tokenizer, sizes(), SEGMENTS, blind=True)(i, film[i]) for i in (0, 3)]
    for row, with_eyes in zip(blind, seeing, strict=True):
        assert (row.clip.patches == 127).all() and with_eyes.clip.patches.std() > 10
        assert_same(row.prefix, with_eyes.prefix)
        assert_same(row.clip[1:], with_eyes.clip[1:])
    assert film[0].video != film[3].video


def test_a_blank_row_has_the_shapes_of_all_others(tokenizer, film):
    for changes in ({}, {"answer": "text", "answer_tokens": 60}):
        load = pipeline.Loader(tokenizer, prompts(**changes), SEGMENTS)
        blank, row = load.blank(), load(0, film[0])
        assert shapes(blank) == shapes(row)
        assert row.real and not blank.real and (blank.choices == -1).all()


def test_choices(tokenizer, film):
    """An option's letter or its own words, padded; and what there is no room for."""
    load = lambda **keys: pipeline.Loader(tokenizer, prompts(**keys), SEGMENTS)(0, film[0])  # noqa: E731
    letters = load(options=6).choices
    assert letters.tolist() == [[i] for i in tokenizer.ids.letters[:4]] + [[-1]] * 2
    texts = load(answer="text", answer_tokens=12, options=4).choices
    assert texts.shape == (4, 12)
    for row, option in zip(texts, film[0].options, strict=True):
        assert tokenizer.decode(row[row >= 0]) == option
        assert (np.diff((row >= 0).astype(int)) <= 0).all()
    with pytest.raises(PromptError, match=r"4 options are more than config.prompt.options=3"):
        load(options=3)
    with pytest.raises(PromptError, match=r"more than config.prompt.answer_tokens=1"):
        load(answer="text", answer_tokens=1)


# --- decoded frames that are kept ---


class Decoded:
    """Reads samples of 1 MB; lists what was read."""

    def __init__(self):
        self.calls = []

    def __call__(self, key):
        def read():
            self.calls.append(key)
            return Sample(np.zeros(1), np.full((4, 512, 512), len(self.calls), np.uint8), 1.0)

        return read


@pytest.fixture
def decoded():
    return Decoded()


def test_frames_are_decoded_once(decoded):
    cache = FrameCache(8)
    first = cache.get("a", decoded("a"))
    assert cache.get("a", decoded("a")) is first and decoded.calls == ["a"]
    cache.get("b", decoded("b"))
    assert decoded.calls == ["a", "b"]


def test_the_cache_is_bounded_and_the_oldest_goes(decoded):
    cache = FrameCache(3)
    for name in ("a", "b", "c", "a", "d"):  # "a" is used again: "b" is the oldest
        cache.get(name, decoded(name))
        assert cache._used == sum(a.frames.nbytes for a in cache._kept.values()) <= 3 * 2**20
    assert decoded.calls == ["a", "b", "c", "d"]
    cache.get("a", decoded("a"))
    assert len(decoded.calls) == 4
    cache.get("b", decoded("b"))
    assert decoded.calls[-1] == "b"


def test_a_cache_without_room_keeps_nothing(decoded):
    cache = FrameCache(0)
    for _ in range(2):
        cache.get("a", decoded("a"))
    assert len(decoded.calls) == 2 and not cache._kept and cache._used == 0


def test_a_cache_travels_empty(decoded):
    """It becomes the one of the process that it comes to, which had none of this size."""
    cache = FrameCache(3)
    cache.get("a", decoded("a"))
    FrameCache.shared.cache_clear()
    other = pickle.loads(pickle.dumps(cache))
    assert not other._kept and other._room == cache._room and other is FrameCache.shared(3)
    other.get("a", decoded("a"))
    assert len(decoded.calls) == 2


def test_what_one_loader_decodes_the_next_need_not(tokenizer, film, tmp_path, monkeypatch):
    """Phases of a run have loaders of their own. A file that is written anew is read anew."""
    asked, read = [], Decoder.read
    monkeypatch.setattr(
        Decoder, "read", lambda self, wanted: asked.append(wanted.path) or read(self, wanted)
    )
    path = tmp_path / "a.mp4"
    path.write_bytes(pathlib.Path(film[0].video).read_bytes())
    record = dataclasses.replace(film[0], video=str(path))
    for changes in ({}, {"answer": "text", "answer_tokens": 60}):
        pipeline.Loader(tokenizer, prompts(**changes), SEGMENTS)(0, record)
    assert asked == [str(path)]
    pipeline.Loader(tokenizer, prompts(), SEGMENTS + 1)(0, record)
    assert len(asked) == 2
    path.write_bytes(path.read_bytes() + b"\0")
    pipeline.Loader(tokenizer, prompts(), SEGMENTS)(0, record)
    assert len(asked) == 3
