"""What the base model is taught: every exchange is true, fits its room, and marks what to learn."""

import collections
import dataclasses
import itertools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from videomem_jax.data import needle_video
from videomem_jax.models import layers
from videomem_jax.models.presets import preset
from videomem_jax.pretrain import __main__ as pretrain
from videomem_jax.pretrain import scenes, tasks, tower
from videomem_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base_tokenizer():
    """The base model's tokenizer, learnt from fewer lines."""
    return Tokenizer.train(tasks.corpus(0, lines=300), 640)


def read(text):
    """Cards of a text such as "red cat blue star"."""
    words = text.split()
    return list(zip(words[::2], words[1::2], strict=True))


def true_answer(question, cards):
    """The answer by looking through the cards, and the card (or cards) that it is about."""
    words = question.rstrip("?").split()
    if question.startswith("How many"):
        found = [card for card in cards if card[0] == words[2]]
        return str(len(found)), found
    if "picture was on" in question:
        (found,) = [card for card in cards if card[0] == words[-2]]
    elif words[-1] in ("first", "last"):
        found = cards[0 if words[-1] == "first" else -1]
    else:
        found = cards[[picture for _, picture in cards].index(words[-1]) + 1]
    return found[1], [found]


def filtered(asked, cards):
    """What is left of the cards when told "Only ...": by colours or by pictures."""
    wanted = set(asked.removeprefix("Only ").rstrip(".").split())
    which = 0 if wanted <= set(needle_video.COLOURS) else 1
    return [card for card in cards if card[which] in wanted]


def check(task, shown=()):
    """Whether an exchange's reply is what its prompt calls for."""
    order, cards = task.tail, [*read(task.notes or ""), *shown]
    if "Only" in task.question + order:
        asked = task.question if task.question else order
        assert read(task.reply) == filtered(asked, cards) and not task.answer
    elif order in (tasks.DESCRIBE, tasks.CONTINUE):
        assert read(task.reply) == (list(shown) if order == tasks.DESCRIBE else cards)
    else:
        answer, about = true_answer(task.question, cards)
        assert not task.options or task.options.count(answer) == 1
        assert task.answer == ("" if order == tasks.NAME else answer)
        told = {tasks.NAME: about, tasks.ANSWER: [], tasks.TELL_AND_ANSWER: cards}[order]
        assert read(task.reply) == told
    return order


def test_exchanges_are_true():
    rng, seen = np.random.default_rng(0), collections.Counter()
    for _ in range(1000):
        seen[check(tasks.without_clip(rng))] += 1
        shown = tasks.draw_cards(rng, int(rng.integers(0, 4)))
        seen[check(tasks.with_clip(rng, shown), shown)] += 1
    assert {tasks.DESCRIBE, tasks.CONTINUE, tasks.ANSWER, tasks.NAME} < set(seen)


def pointed_at(question, cards):
    """The cards that a question is about, by looking through all of them."""
    words = question.rstrip("?").split()
    if "came first" in question or "came last" in question:
        return [card for card in cards if card == cards[0 if words[-1] == "first" else -1]]
    if "came right after" in question:
        pairs = itertools.zip_longest(cards, cards[1:])
        return next(([a, b] if b else [a] for a, b in pairs if a[1] == words[-1]), [])
    return [card for card in cards if card[0] in words]


@pytest.mark.parametrize("absent", [0.2, 1.0])
def test_what_a_question_is_about_is_pointed_at(absent):
    rng, seen = np.random.default_rng(3), collections.Counter()
    pointing = tasks.Pointing(1.0, absent)
    for _ in range(1000):
        shown = tasks.draw_cards(rng, int(rng.integers(0, 4)))
        seen_and_read = (tasks.with_clip(rng, shown, pointing), shown)
        for task, there in (seen_and_read, (tasks.without_clip(rng, pointing), [])):
            if not task.question:  # an empty clip without notes is described
                continue
            found = read(task.reply)
            assert found == pointed_at(task.question, [*read(task.notes), *there])
            assert task.tail == tasks.POINT
            assert not task.answer and len(task.options) in (0, 4)
            seen[len(found)] += 1
    assert {0, 1, 2, 3} <= set(seen)
    # Of all questions, those that no card answers: few where they are about a card that is there.
    assert 0.1 < seen[0] / seen.total() < 0.3 if absent == 0.2 else seen[0] > 0.5 * seen.total()
    rng, same = np.random.default_rng(4), np.random.default_rng(4)
    for _ in range(50):  # nothing is pointed at unasked, and no other draw is another one then
        assert tasks.without_clip(rng) == tasks.without_clip(same, tasks.Pointing(0.0))


def test_talks_are_true():
    rng = np.random.default_rng(1)
    for i in range(300):
        shown = tasks.draw_cards(rng, int(rng.integers(0, 4))) if i % 3 == 0 else None
        notes, turns = tasks.talk(rng, tasks.Pointing(0.3 * (i % 2)), shown)
        cards = [*read(notes.removeprefix("Notes: ")), *(shown or ())]
        assert len(cards) <= 6 and turns
        for asked, told in turns:
            kind, *names = asked.rstrip(".").split()
            if asked.endswith(f" {tasks.POINT}"):
                question = asked.removesuffix(f" {tasks.POINT}")
                assert (i % 2 or not cards) and read(told) == pointed_at(question, cards)
                assert told or shown is not None
            elif kind == "Only":
                assert read(told) == filtered(asked, cards)
            elif kind == "Colours":
                colour = {picture: colour for colour, picture in cards}
                assert told.split() == [colour[name] for name in names]
            elif kind == "Pictures":
                assert all(name in [c for c, _ in cards] for name in names)
                assert told.split() == [p for n in names for c, p in cards if c == n]
            elif kind == "After":
                after = {a: b for (_, a), (_, b) in itertools.pairwise(cards)}
                assert told.split() == [after[name] for name in names]
            elif kind == "Count":
                assert [told] == [str([c for c, _ in cards].count(name)) for name in names]
            else:
                assert told == true_answer(asked, cards)[0]


@pytest.fixture(scope="module")
def painter():
    return scenes.Painter(pretrain.SIZE)


def grounds(scene):
    """Colours of a scene's frames at their four corners: [f, 4, 3]."""
    height, width = pretrain.SIZE
    frames = einops.rearrange(
        scene.patches,
        "t (bh bw mh mw) (c tp ph pw) -> (t tp) (bh mh ph) (bw mw pw) c",
        bh=height // 32,
        bw=width // 32,
        mh=2,
        mw=2,
        tp=2,
        ph=16,
        pw=16,
    )
    return frames[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(int)


def test_scenes_show_their_cards_in_order(painter):
    rng = np.random.default_rng(3)
    for count in (1, 2, 3, 4) * 5:
        cards = tasks.draw_cards(rng, count)
        corners, at = grounds(painter.scene(rng, cards, 8)), 0
        for colour, _ in cards:
            far = np.abs(corners - needle_video.COLOURS[colour]).max((1, 2))
            found = np.flatnonzero(far[at:] < 40)
            assert len(found), (colour, far)
            at += int(found[0]) + 1
            at += at % 2  # no two in one patch


def test_scenes_differ_but_not_for_one_seed(painter):
    rng = np.random.default_rng(4)
    first, second = (painter.scene(rng, [("red", "cat")], 8) for _ in range(2))
    assert (first.patches != second.patches).mean() > 0.5
    again = painter.scene(np.random.default_rng(4), [("red", "cat")], 8)
    np.testing.assert_array_equal(first.patches, again.patches)
    np.testing.assert_array_equal(first.times, again.times)
    assert np.unique(np.diff(first.times)).tolist() == [scenes.STEP]


def test_pairs_show_what_they_are_named(painter):
    """By the ground's colour at the corners; where a card is bent its ground goes on there."""
    pool = tower.Pool(painter, 24, [0])
    patches, names = pool.pairs(np.random.default_rng(0), 200)
    none = np.array(tower.NAMES) - 1
    carded = (names < none).all(-1)
    assert ((names == none).all(-1) | carded).all() and 0.7 < carded.mean() < 0.95
    colours, seen = list(needle_video.COLOURS.values()), set()
    for pair, (colour, picture) in zip(patches[carded], names[carded], strict=True):
        far = np.abs(grounds(scenes.Scene(pair, np.zeros(2))) - colours[colour]).max((1, 2))
        assert (far < 40).sum() >= 1
        seen.add((colour, picture))
    assert len(seen) > 10


def test_a_pool_is_painted_anew_from_its_oldest_on(painter):
    pool, same = (tower.Pool(painter, 6, [1]) for _ in range(2))
    before = pool._cards.copy()
    np.testing.assert_array_equal(before, same._cards)
    pool.renew(np.random.default_rng(2), 4)
    assert ((pool._cards != before).any((1, 2, 3)) == ([True] * 4 + [False] * 2)).all()
    pool.renew(np.random.default_rng(3), 2)
    assert (pool._cards != before).any((1, 2, 3)).all()


def test_the_tower_learns_to_name(painter):
    """Heads of zeros know nothing: both names cost as much as a guess; some steps halve that."""
    model = pretrain.fresh_model(preset("tiny", vocab_size=480), 0)
    patches, names = tower.Pool(painter, 8, [3]).pairs(np.random.default_rng(1), 16)
    graph, params = nnx.split(model.visual)
    heads = jnp.zeros((3, 128, sum(tower.NAMES)))

    @jax.jit
    def loss(params):
        each, _ = tower.losses(
            nnx.merge(graph, params[0]), params[1], patches, names, pretrain.SIZE
        )
        return each.sum(), each

    grad = jax.jit(jax.grad(loss, has_aux=True))
    params = (params, heads)
    _, first = grad(params)
    np.testing.assert_allclose(first, sum(np.log(tower.NAMES)), rtol=1e-5)
    transform = optax.adam(3e-3)
    opt = transform.init(params)
    for _ in range(20):
        grads, each = grad(params)
        updates, opt = transform.update(grads, opt)
        params = optax.apply_updates(params, updates)
    assert (each < 0.5 * first).all(), each


def test_a_step_of_exchanges(base_tokenizer, painter):
    """As the videos' own frames go through the pipeline: the same patches, the same room."""
    for kind, frames in pretrain.FRAMES.items():
        part = pretrain.Part(1, kind, seen=5, texts=2, talks=3, clip_talks=2)
        drawn = pretrain.draw(np.random.default_rng(5), base_tokenizer, painter, part)
        seen, texts, talks, watched = drawn
        height, width = pretrain.GRID
        assert seen["patches"].shape == (5, frames // 2, height * width, 3 * 2 * 16 * 16)
        assert (seen["slot"] >= 0).sum() == 5 * frames // 2 * height * width // 4
        assert [len(batch["reply"]) for batch in (texts, talks, watched)] == [2, 3, 2]
        assert watched["patches"].shape[1:] == seen["patches"].shape[1:]
        for batch in drawn:
            assert (batch["weight"].sum(-1) > 0).all()


def test_a_narrow_palette_has_many_cards_of_a_colour():
    rng, pointing = np.random.default_rng(7), tasks.Pointing(1.0, narrow=1.0)
    assert tasks.Pointing(1.0).palette(rng) == ()
    for _ in range(50):
        palette = pointing.palette(rng)
        shown = tasks.draw_cards(rng, 2, palette=palette)
        task = tasks.with_clip(rng, shown, tasks.NEVER, palette)
        cards = [*read(task.notes or ""), *shown]
        assert {colour for colour, _ in cards} <= set(palette) and len(set(palette)) == 2


def test_every_exchange_fits(base_tokenizer):
    rng = np.random.default_rng(2)
    for i in range(300):
        pretrain.encode(base_tokenizer, tasks.without_clip(rng), np.zeros(0), pretrain.TEXT_PREFIX)
        shown = tasks.draw_cards(rng, int(rng.integers(0, 4)))
        times = np.arange(pretrain.FRAMES["clip"]) * 2.0 + 3 * i
        for share in (0.0, 1.0):
            plain = tasks.with_clip(rng, shown, tasks.Pointing(share))
            for task in (plain, tasks.marked(rng, plain)):
                row = pretrain.encode(base_tokenizer, task, times, pretrain.CLIP_PREFIX)
                assert row["length"] <= pretrain.REPLY


def test_marks_stand_around_notes_reply_and_answer(base_tokenizer):
    rng, seen = np.random.default_rng(6), set()
    for _ in range(300):
        plain = tasks.without_clip(rng, tasks.Pointing(0.3))
        task = tasks.marked(rng, plain)
        assert dataclasses.replace(task, marks=None) == plain
        (a, b, c, d), answer = task.marks, f"{task.marks[2]}{task.answer}{task.marks[3]}"
        row = pretrain.encode(base_tokenizer, task, np.zeros(0), pretrain.TEXT_PREFIX)
        asked = base_tokenizer.decode(row["tokens"][row["mask"]])
        assert f"\n{a} {task.notes}{b}\n{task.tail}\nassistant" in asked
        told = row["reply"][: row["length"] - 1]
        text = f"{a} {task.reply}{b}" if task.reply else a + b
        found = base_tokenizer.decode(told).replace(" " + task.answer, task.answer)
        assert found == text.replace(" " + task.answer, task.answer) + answer * bool(task.answer)
        # Which marks are an answer's is not to be known.
        free = base_tokenizer.decode(
            row["reply"][: row["length"]][row["weight"][: row["length"]] == 0]
        )
        assert free == (c + d) * bool(task.answer)
        seen |= {(a, b), (c, d), bool(task.answer), bool(task.reply)}
    assert seen == {*tasks.MARKS, True, False}
    described = tasks.of_frames([("red", "cat")])
    assert tasks.marked(rng, described) == described  # it has no notes to be like


def test_what_is_learnt_of_a_talk(base_tokenizer):
    turns = [("Colours cat.", "red"), ("How many red cards were there?", "1")]
    row = pretrain.encode_talk(base_tokenizer, "Notes: red cat", turns)
    learnt = row["reply"][row["weight"] > 0]
    assert base_tokenizer.decode(learnt) == "red\n1"
    assert row["length"] == (row["weight"] > 0).sum() + sum(
        len(base_tokenizer.encode(asked)) for asked, _ in turns
    )
    whole = pretrain.encode_talk(base_tokenizer, "Notes: red cat", turns * 20)
    assert pretrain.TALK - 16 < whole["length"] <= pretrain.TALK


def test_an_answer_weighs_more(base_tokenizer):
    task = tasks.Task(*("Which card came last?", (), "Continue and answer.", "red cat", "cat"))
    task = dataclasses.replace(task, notes="red cat")
    row = pretrain.encode(base_tokenizer, task, np.zeros(0), pretrain.TEXT_PREFIX)
    (at,) = np.flatnonzero(row["weight"] == pretrain.ANSWER_WEIGHT)
    assert base_tokenizer.decode(row["reply"][[at]]) == "cat" and at == row["length"] - 2


def test_first_heads_of_a_fresh_model_look_back(base_tokenizer):
    config = preset("tiny", vocab_size=480)
    decoder = pretrain.fresh_model(config, 0).language_model
    text, tokens = config.text, np.random.default_rng(0).integers(0, 480, 40)
    x = decoder.embed_tokens[...][tokens]
    x = x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))
    turns = decoder.turns(jnp.broadcast_to(jnp.arange(40), (3, 40)))
    group = text.num_attention_heads // text.num_key_value_heads

    def turned(linear, norm, head):
        y = (x @ linear.kernel[...][0]).reshape(40, -1, text.head_dim)[:, head]
        y = y / jnp.sqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True)) * norm.scale[...][0]
        return layers.rotate(y[:, None], turns)[:, 0]

    attention = decoder.layers.self_attn
    for kv_head, back in enumerate(pretrain.LOOKS_BACK):
        q = turned(attention.q_proj, attention.q_norm, kv_head * group)
        k = turned(attention.k_proj, attention.k_norm, kv_head)
        scores = jnp.where(jnp.tri(40, dtype=bool), q @ k.T * text.head_dim**-0.5, -jnp.inf)
        weights = np.array(jax.nn.softmax(scores, axis=-1))[back:]
        assert (weights.argmax(-1) == np.arange(40 - back)).all()
        assert weights.max(-1).mean() > 0.5
