"""Records whose clips are texts: their prompts, and a whole run with a tiny Llama."""

import dataclasses
import html
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from tests import random_folder
from tests.commands import numbers
from videomem_jax import answer_page, asking, llm, rollout, settings
from videomem_jax import memory as mem
from videomem_jax.aot import account, programs
from videomem_jax.ask import described
from videomem_jax.batch import SHOWN, TEXT
from videomem_jax.data import chain_writers, facts, pipeline, records, story, texts
from videomem_jax.models.config import ConfigError, Qwen3VLConfig, TextConfig
from videomem_jax.prompt import PromptError, assemble, turn_end, write_prefix, write_text_prefix
from videomem_jax.tokenizer import CHAT, Tokenizer
from videomem_jax.videomem import VideoMem

SENTENCES = 6
SIZES = {
    "data.task": "facts",
    "data.sentences": SENTENCES,
    "data.train_videos": 8,
    "data.test_videos": 2,
    "data.long_videos": 1,
    "prompt.prefix_tokens": 256,
    "memory.slots": 24,
    "memory.budget": 8,
    "model.lora_rank": 0,
    "coldstart.steps": 30,
    "coldstart.batch": 8,
    "coldstart.accumulate": 1,
    "coldstart.optimizer.learning_rate": 1e-2,
    "prpo.steps": 3,
    "prpo.batch": 4,
    "prpo.group_size": 4,
    "prpo.accumulate": 2,
    "eval.batch": 4,
    "eval.timelines": 8,
}


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A folder of the task."""
    folder = tmp_path_factory.mktemp("stories")
    spec = facts.SplitSpec(4, 4, "test", seed=0, sentences=SENTENCES)
    facts.build(folder, {"test": spec})
    return folder


@pytest.fixture(scope="module")
def llama(stories, tmp_path_factory):
    """A folder with a random Llama of two layers, whose tokenizer knows no vision."""
    folder = tmp_path_factory.mktemp("llama")
    texts = [path.read_text() for path in (stories / "test").glob("*.txt")]
    # Every name and thing is one token.
    words = [
        f" {word}"
        for kind in (story.NAMES, story.THINGS)
        for part in kind.values()
        for word in part
    ]
    tokenizer = Tokenizer.train([*texts, *9 * words], 1024, specials=CHAT)
    text = TextConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_theta=1e4,
        mrope_section=(8, 0, 0),
        tie_word_embeddings=True,
        qk_norm=False,
    )
    return random_folder.write(folder, Qwen3VLConfig(text), tokenizer, tags=False)


@pytest.fixture(scope="module")
def flags(llama, tmp_path_factory):
    keys = SIZES | {"model.weights": llama, "data.folder": tmp_path_factory.mktemp("data")}
    return ["--config=configs/text.py", *(f"--config.{k}={v}" for k, v in keys.items())]


def config_of(folder, **changes):
    config = settings.default()
    values = {k: v for k, v in SIZES.items() if k.startswith(("prompt", "memory"))}
    values |= {"data.folder": str(folder), "prompt.frames": 0, "prompt.answer_tokens": 8} | changes
    config.update_from_flattened_dict(values)
    return settings.freeze(config)


# --- prompts ---


def test_a_text_stands_in_the_place_of_frames(tokenizer):
    prefix = write_text_prefix(tokenizer, "Who?", ("Ann", "Bo"), " Ann came. ", 64)
    size = int(prefix.mask.sum())
    head = [tokenizer.ids.im_start, *tokenizer.encode("user\nWho?\nA. Ann\nB. Bo\n")]
    assert prefix.tokens[:size].tolist() == [*head, *tokenizer.encode("Ann came.\n")]
    assert prefix.slot.tolist() == (
        [TEXT] * len(head) + [SHOWN] * (size - len(head)) + [TEXT] * (64 - size)
    )
    assert (prefix.positions[:, :size] == np.arange(size)).all() and prefix.next_position == size
    with pytest.raises(PromptError, match=rf"take {size} tokens, but .*=8: raise it, or use more"):
        write_text_prefix(tokenizer, "Who?", ("Ann", "Bo"), "Ann came.", 8)


def test_what_follows_a_memory_may_be_kept_from_seeing_a_text(tokenizer, tiny, form_of):
    """With `from_memory`, as frames are hidden: all of the prompt from the clip on."""
    texts = write_text_prefix(tokenizer, "Who?", (), "Ann came.", 48)
    frames = write_prefix(tokenizer, "Who?", (), np.arange(2), (4, 4), 48)
    head = len(tokenizer.encode("user\nWho?\n")) + 1
    stamp = len(tokenizer.encode("<0.5 seconds>")) + 1
    none = mem.empty(1, 1, 4, 0)
    for prefix, shown in ((texts, head), (frames, head + stamp)):
        rows = jax.tree.map(lambda a: np.asarray(a)[None], prefix)
        prompt = assemble(rows, none.tokens[:, 0], none.length[:, 0], 5, turn_end(tokenizer))
        features = tiny.run(lambda m: m.see(np.zeros((1, 0, 4, 8)), None, None))
        context = tiny.run(lambda m, p=prompt, f=features: rollout.read(m, p, f))
        assert np.flatnonzero(context.question[0]).tolist() == list(range(shown))


def test_rows_of_texts_and_of_nothing(stories, llama):
    tokenizer = Tokenizer.load(llama)
    s = config_of(stories)
    found, _ = records.read_records(stories / "test.jsonl")
    loader = pipeline.Loader(tokenizer, s, 4)
    row, blank = loader(3, found[3]), loader.blank()
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), x) for x in (row, blank)]
    assert shapes[0] == shapes[1]
    assert row.clip.patches.shape[:2] == (4, 0) and not blank.real
    told = pathlib.Path(found[3].video).read_text()
    shown = [
        tokenizer.decode(tokens[slot == SHOWN])
        for tokens, slot in zip(row.prefix.tokens, row.prefix.slot, strict=True)
    ]
    assert " ".join(shown) == told.strip()
    assert row.so_far.tolist()[-1] == row.gold
    spans = loader.times(found[3])
    assert spans.shape == (4, 2) and spans[-1, 1] == len(told) - 1
    hidden = pipeline.Loader(tokenizer, s, 4, blind=True)(3, found[3])
    for tokens, slot in zip(hidden.prefix.tokens, hidden.prefix.slot, strict=True):
        assert tokenizer.decode(tokens[slot == SHOWN]) == ""


def test_texts_and_videos_share_a_batch(stories, tokenizer, film_records):
    """With frames, a text's row has the shapes of a video's; no token stands for its frames."""
    s = config_of(stories, **{"prompt.frames": 2, "prompt.max_pixels": 4 * 32 * 32})
    s = dataclasses.replace(s, prompt=dataclasses.replace(s.prompt, prefix_tokens=1024))
    text = records.read_records(stories / "test.jsonl")[0][0]
    loader = pipeline.Loader(tokenizer, s, 4)
    rows = [loader(i, record) for i, record in enumerate((text, film_records[0]))]
    batch = pipeline.stack(rows)
    assert (batch.prefix.slot[0] < 0).all() and (batch.prefix.slot[1] >= 0).any()


def test_a_video_is_no_text(stories, tokenizer, film_records):
    loader = pipeline.Loader(tokenizer, config_of(stories), 4)
    with pytest.raises(records.BadRecord, match=r"is no text \(.txt, .md\), but with .*frames=0"):
        loader(0, film_records[0])


def test_programs_are_known_before_there_is_data(stories, llama):
    s = config_of(stories)
    row = pipeline.Loader(Tokenizer.load(llama), s, 4).blank()
    told = programs.batch(s, Qwen3VLConfig.load(llama), 3)
    for known, made in zip(*map(jax.tree.leaves, (told, row)), strict=True):
        assert known.shape == (3, *made.shape) and known.dtype == made.dtype
    steps = account.Account(s, Qwen3VLConfig.load(llama), flash=False).steps()
    assert all(operations.model > 0 for operations in steps.values())


# --- chains ---


def test_clips_of_a_text_are_their_own_summaries(stories):
    """Nobody is asked to look at a text; the LLM goes through its clips."""
    (record, *_), _ = records.read_records(stories / "test.jsonl")
    endpoint, asked = types.SimpleNamespace(identity="an LLM"), []

    def ask(requests):
        asked.extend(requests)
        return [
            llm.Reply(("A", True) if request.read is not str else "Ann") for request in requests
        ]

    nobody = types.SimpleNamespace(endpoint=endpoint)
    client = types.SimpleNamespace(endpoint=endpoint, ask=ask)
    writer = chain_writers.EndpointWriter(nobody, client, config_of(stories), len)
    draft, read = writer.write(record), texts.read(record.video, 4)
    assert draft.summaries == read.clips and draft.memories == ("Ann",) * 4
    assert draft.times == tuple(map(tuple, read.spans.tolist()))
    for clip, request in zip(read.clips, asked[:4], strict=True):
        assert json.dumps(clip)[1:-1] in request.messages[-1]["content"]


# --- whole runs ---


@pytest.mark.slow
def test_cold_start_prpo_and_evaluation(flags, command, tmp_path):
    code, out, err = command("train.py", *flags, f"--workdir={tmp_path}")
    assert code == 0, err
    rows = numbers(tmp_path)
    losses = [rows["coldstart", step]["loss"] for step in range(1, 31)]
    assert losses[-1] < losses[0] / 2
    steps = [rows["prpo", step] for step in (1, 2, 3)]
    assert all(np.isfinite(row["reward"]) and row["logprob_gap"] < 1e-4 for row in steps)
    assert len({row["loss"] for row in steps}) == 3
    code, out, err = command("eval.py", *flags, f"--workdir={tmp_path}")
    assert code == 0, err
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name, count in {
        "base": 8,
        "coldstart": 8,
        "prpo": 8,
        "blind": 8,
        "prpo_8_segments": 4,
    }.items():
        assert summary["accuracy"][name]["n"] == count
    assert summary["format_rate"]["base"] == 1
    page = (tmp_path / "report.html").read_text()
    row = json.loads((tmp_path / "eval" / "prpo.jsonl").read_text().splitlines()[0])
    assert "characters 0\u2013" in page and page.count("<blockquote>") >= 4
    end = int(row["steps"][0]["times"][1])
    assert pathlib.Path(row["video"]).read_text()[:end] in html.unescape(page)


def test_a_text_model_and_frames_is_a_mistake(flags, mistake):
    text = mistake("train.py", *flags, "--config.prompt.frames=2")
    assert "config.prompt.frames=2, but the model of" in text and "reads only texts" in text


# --- asking ---


def test_a_text_is_asked(stories, llama, one_device, tmp_path):
    model = VideoMem.from_pretrained(llama, slots=6, prefix_tokens=192, answer="text")
    assert model.settings.prompt.frames == 0
    (record, *_), _ = records.read_records(stories / "test.jsonl")
    answer = model.ask(record.video, record.question, record.options, segments=2)
    spans = texts.read(record.video, 2).spans
    assert [segment.times for segment in answer.segments] == [tuple(span) for span in spans]
    assert answer.answer in record.options and sum(answer.probabilities) == pytest.approx(1)
    answer_page.write(answer, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"characters 0\u2013{spans[0, 1]:,}" in page and page.count("<blockquote>") == 2
    assert f"[1/2] characters 0-{spans[0, 1]:,}  memory: " in described(
        answer.segments[0], record.video
    )
    with pytest.raises(ConfigError, match="film.mp4 is no text .*, and the model reads only texts"):
        model.ask("film.mp4", "Who?")


def test_the_number_of_segments_follows_the_length_of_a_text(tmp_path):
    settings = config_of(tmp_path, **{"prompt.prefix_tokens": 100})
    (tmp_path / "a.md").write_text("One two three. " * 100)
    for segments, count in (("auto", 5), (None, 4), (7, 7)):
        assert len(asking.plan(tmp_path / "a.md", settings, segments)) == count
    assert len(asking.plan(tmp_path / "a.md", settings, "auto", start=750)) == 4
    with pytest.raises(ConfigError, match="segments=0 must be a number from 1 on"):
        asking.plan(tmp_path / "a.md", settings, 0)
