"""Asking: against the evaluation that reads the same video, and what a user can get wrong."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from tests.data import damage, training_folders
from videomem_jax import VideoMem, asking, evaluate, run, sharding
from videomem_jax import grammar as fmt
from videomem_jax import memory as mem
from videomem_jax import prompt as prompts
from videomem_jax import settings as cfg
from videomem_jax.data import records, video
from videomem_jax.data.needle_video import ASSETS
from videomem_jax.models.config import ConfigError
from videomem_jax.prompt import PromptError

FILM = ASSETS / "film/bbb_320x192_1fps.mp4"
BASE = ASSETS / "tiny_base"
QUESTION = "which picture was on the red card?"
WORDS = ("cat", "boat", "frog", "tree")
# As the demo's, but with fewer frames.
SIZES = {"frames": 4, "max_pixels": 6 * 32 * 32, "prefix_tokens": 104, "answer": "text"}
SIZES |= {"options": 4, "slots": 6}


@pytest.fixture(scope="module")
def model():
    """The shipped base model, on one device, held to the format."""
    return VideoMem.from_pretrained(BASE, devices=jax.devices()[:1], **SIZES)


@pytest.fixture(scope="module")
def answer(model):
    return model.ask(FILM, QUESTION, WORDS, segments=3)


def test_every_segment_says_what_it_should(answer, model):
    assert [s.number for s in answer.segments] == [1, 2, 3] and len(answer.segments) == 3
    times = np.array([s.times for s in answer.segments])
    np.testing.assert_allclose(times, video.sample_times(FILM, 3, 4, snap=asking.SNAP))
    assert 0 < np.abs(times - video.sample_times(FILM, 3, 4)).max() < asking.SNAP * 600 / 12
    for segment in answer.segments:
        assert segment.of == 3 and 0 <= segment.tokens <= 6
        assert segment.answer == WORDS[segment.choice]
        assert sum(segment.probabilities) == pytest.approx(1, abs=1e-5)
        assert np.argmax(segment.probabilities) == segment.choice
        assert bool(segment.memory) == (segment.tokens > 0)
    assert answer.answer == answer.segments[-1].answer
    assert answer.choice == answer.segments[-1].choice
    assert json.loads(json.dumps(answer.to_row()))["segments"][2]["of"] == 3


def test_it_is_what_the_evaluation_makes_of_the_same_video(model):
    """Segment after segment gives what the loop inside jit gives."""
    settings = model.settings
    prompt = dataclasses.replace(settings.prompt, segments=3)
    settings = dataclasses.replace(settings, prompt=prompt, eval=cfg.Eval(batch=1))
    loaded = run.load(settings, BASE)
    mesh = sharding.make_mesh(cfg.Mesh(), jax.devices()[:1])
    evaluator = evaluate.Evaluator(loaded.model, loaded.form, mesh)
    grammar = run.make_format(loaded.tokenizer, loaded.model, settings, forced=True).grammar
    record = records.Record("1", str(FILM), QUESTION, WORDS, "A")
    (item,), _ = evaluate.run(
        *("ask", evaluator, evaluator.place(loaded.model), grammar, [record]),
        *(loaded.tokenizer, settings, 3),
    )
    exact = model.ask(FILM, QUESTION, WORDS, segments=3, snap=0.0).segments
    assert [s.memory for s in exact] == item.memories
    assert [s.tokens for s in exact] == item.tokens
    assert ["ABCD"[s.choice] for s in exact] == item.answers


def test_probabilities_of_one_token_are_a_softmax(model, answer):
    """Against the logits where the answer is, from one plain pass over prompt and completion."""
    choices = model._choices(WORDS)
    assert choices.shape == (1, 4, 1)
    caught = []
    step = model._step

    def catch(*args):
        caught.append((args, step(*args)))
        return caught[-1][1]

    model._step = catch
    try:
        model.ask(FILM, QUESTION, WORDS, segments=3)
    finally:
        model._step = step
    (params, _, _, prefix, clip, memory, _), (written, *_) = caught[2]
    after, ids = answer.segments[2], model._tokenizer.ids
    words = np.asarray(written.tokens)[0, 0, : int(written.length[0, 0])]
    body = [ids.memory_open, *words.tolist(), ids.memory_close, ids.answer_open]

    def logits(params, prefix, clip, memory):
        qwen = nnx.merge(model._graph, params)
        whole = prompts.assemble(
            *(prefix, memory.tokens[:, 0], memory.length[:, 0], ids.memory_open),
            (ids.memory_close, *prompts.turn_end(model._tokenizer)),
        )
        n = len(body)
        position = jax.numpy.broadcast_to(whole.next_position[:, None] + np.arange(n), (3, 1, n))
        hidden, _ = qwen.prefill(
            jax.numpy.concatenate([whole.tokens, np.array([body])], 1),
            jax.numpy.concatenate([np.moveaxis(whole.positions, 1, 0), position], 2),
            jax.numpy.concatenate([whole.mask, np.ones((1, n), bool)], 1),
            mem.see(qwen, clip),
            jax.numpy.concatenate([whole.slot, np.full((1, n), -1)], 1),
        )
        return qwen.logits(hidden[:, -1])[0]

    prefix, memory = jax.tree.map(np.asarray, (prefix, memory))
    found = np.asarray(jax.jit(logits)(params, prefix, clip, memory))
    wanted = jax.nn.softmax(found[choices[0, :, 0]])
    np.testing.assert_allclose(after.probabilities, wanted, atol=2e-4)


def test_an_open_question_has_a_free_answer(model):
    answer = model.ask(FILM, "what is on the red card?", segments=2)
    for segment in answer.segments:
        assert segment.answer and segment.choice is None and segment.probabilities is None
        assert segment.tokens <= 6
    assert not set("<>|") & set(answer.answer)


def test_options_of_several_tokens(model):
    """However they are mixed up in writing, one of them is the answer, and memory is kept."""
    options = ("the red cat on a boat", "the red", "a boat in the tree", "blue")
    answer = model.ask(FILM, QUESTION, options, segments=2)
    for segment in answer.segments:
        assert segment.answer in options
        assert np.argmax(segment.probabilities) == options.index(segment.answer)
        assert sum(segment.probabilities) == pytest.approx(1, abs=1e-5)
    choices = model._choices(options)
    assert choices.shape[-1] > 2 and (choices[0, 3, 1:] == -1).all()


def test_a_segment_costs_no_compile_and_no_memory(model, answer):
    """All segments but the first run what is there; nothing of an earlier one is held."""
    before = model._step._cache_size()
    live = []
    for segment in model.read(FILM, QUESTION, WORDS, segments=6):
        live.append(sum(a.nbytes for a in jax.live_arrays()))
        assert segment.number <= 6
    assert model._step._cache_size() == before
    assert max(live[1:]) - min(live[1:]) < 10_000


def test_a_video_without_end_has_a_time_limit_for_each_segment(model, tmp_path, monkeypatch):
    """What comes before is read, and the limit is not that of the whole answer."""
    path = tmp_path / "film.mkv"
    training_folders.write_film(path, 0.0, form="matroska")
    data = dataclasses.replace(model.settings.data, time_limit=5.0)
    monkeypatch.setattr(model, "settings", dataclasses.replace(model.settings, data=data))
    segments = model.read(path, QUESTION, WORDS, segments=4)
    assert next(segments).number == 1
    damage.endless(path, share=0.05)  # from here on
    with pytest.raises(video.VideoError, match="longer than time_limit=5 seconds") as caught:
        list(segments)
    assert caught.value.cause == "slow"


def test_auto_follows_the_length(model):
    settings, duration = model.settings, video.probe(FILM).duration
    assert len(asking.plan(FILM, settings, "auto")) == -(-duration // asking.AUTO_SECONDS)
    many = dataclasses.replace(settings.prompt, segments=9)
    assert len(asking.plan(FILM, dataclasses.replace(settings, prompt=many), "auto")) == 9
    # As far as there are frames.
    assert len(asking.plan(FILM, settings, "auto", 200)) == 2
    assert asking.plan(FILM, settings, "auto", 200).shape[1] == 200


def test_sizes_travel_with_a_model(tmp_path):
    assert cfg.load_sizes(tmp_path).prompt == cfg.Prompt()
    sized = dataclasses.replace(
        cfg.Settings(),
        prompt=cfg.Prompt(segments=3, frames=6, answer="text"),
        memory=cfg.Memory(slots=12, budget=4),
    )
    cfg.save_sizes(sized, tmp_path)
    found = cfg.load_sizes(tmp_path)
    assert (found.prompt, found.memory) == (sized.prompt, sized.memory)
    found = cfg.load_sizes(tmp_path, slots=3, answer="letter")
    assert (found.memory.slots, found.prompt.answer, found.prompt.frames) == (3, "letter", 6)
    with pytest.raises(ConfigError, match="slot is not a size of prompt or memory; there are"):
        cfg.load_sizes(tmp_path, slot=3)
    with pytest.raises(ConfigError, match="config.prompt.frames=3 must be an even number"):
        cfg.load_sizes(tmp_path, frames=3)
    # Of an older version, which had not got all keys.
    older = {"prompt": {"frames": 6}, "memory": {"slots": 9, "budget": 4}}
    (tmp_path / cfg.SIZES_FILE).write_text(json.dumps(older))
    found = cfg.load_sizes(tmp_path)
    assert found.prompt == cfg.Prompt(frames=6) and found.memory.slots == 9
    (tmp_path / cfg.SIZES_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r"videomem\.json is not what train.py writes"):
        cfg.load_sizes(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"video": "gone.mp4"}, video.VideoError, "gone.mp4: there is no such video file"),
        ({"question": " "}, records.RecordError, "'question' must not be empty"),
        (
            {"options": ["cat"]},
            records.RecordError,
            "'options' must hold 2 to 26 strings, or none for .*, found 1",
        ),
        ({"options": ["a", "a"]}, records.RecordError, "'options' must differ"),
        ({"options": "cat"}, records.RecordError, "options must be a list of strings"),
        ({"options": list("abcdefghijk")}, PromptError, "11 options, but 10 letters"),
        ({"options": ["a", "b " * 90]}, PromptError, "more than config.prompt.answer_tokens=64"),
        ({"segments": 0}, ConfigError, "segments=0 must be a number from 1 on, or 'auto'"),
        ({"segments": "all"}, ConfigError, "segments='all' must be"),
        ({"frames": 5}, ConfigError, "frames=5 must be an even number"),
        ({"segments": 400}, video.VideoError, "400 segments of 4 frames need 1600"),
    ],
)
def test_what_cannot_be_asked(model, change, error, said):
    asked = {"video": FILM, "question": QUESTION, "options": WORDS, "segments": 2} | change
    with pytest.raises(error, match=said):
        model.read(**asked)


def test_what_is_no_model(tmp_path):
    with pytest.raises(ConfigError, match="holds no model: give the folder"):
        VideoMem.from_pretrained(tmp_path)


def test_importing_the_package_is_cheap():
    code = "import sys, videomem_jax; assert 'jax' not in sys.modules; videomem_jax.VideoMem"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_open_questions_in_the_format(form_of, tokenizer):
    """Free text between the answer's tags is well-formed where there are no choices, and only."""
    grammar, ids = form_of("forced", 4, 3).grammar, tokenizer.ids
    x, y, z = tokenizer.encode("xyz")
    open_, choices = np.full((2, 3), -1), np.array([[x, -1, -1], [x, y, -1]])
    answers = [[x], [x, y, z], [], [x, y, z, z], [z]]
    rows = np.full((len(answers), 16), ids.pad)
    for row, told in zip(rows, answers, strict=True):
        text = [ids.memory_open, z, ids.memory_close, ids.answer_open, *told]
        text += [ids.answer_close, ids.im_end]
        row[: len(text)] = text

    @jax.jit
    def parse(tokens, table):
        final = fmt.states(grammar, jax.numpy.pad(tokens, ((0, 0), (0, 1))))[:, -1]
        table = jax.numpy.broadcast_to(table, (len(tokens), *table.shape))
        return fmt.parse(grammar, tokens, final, table, ids.pad), fmt.told(grammar, tokens)

    parsed, told = parse(rows, open_)
    assert parsed.well_formed.tolist() == [True, True, False, False, True]
    assert parsed.answer.tolist() == [-1] * 5 and parsed.length.tolist() == [1, 1, 0, 0, 1]
    assert told[0].tolist() == [x, -1, -1] and told[1].tolist() == [x, y, z]
    parsed, _ = parse(rows, choices)
    assert parsed.well_formed.tolist() == [True, False, False, False, False]
    text = set(np.flatnonzero(tokenizer.text_mask(320)).tolist())
    for state, also in ((fmt.State.ANSWER, set()), (fmt.State.ANSWERED, {ids.answer_close})):
        allowed = fmt.permitted(grammar, np.full(1, state), open_[None])[0]
        assert set(np.flatnonzero(allowed).tolist()) == text | also
