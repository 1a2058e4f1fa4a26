"""The loop over the clips against a plain one, memories handed on, and supervised chains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from videomem_jax import grammar as fmt
from videomem_jax import memory, prpo, rollout
from videomem_jax import prompt as prompts
from videomem_jax.batch import Chain
from videomem_jax.grammar import Parsed
from videomem_jax.memory import Memory, Sampling
from videomem_jax.models.qwen3_vl import abstract
from videomem_jax.models.vision import VisionFeatures

SLOTS, GROUP, SEGMENTS, ANSWER_WEIGHT = 5, 4, 3, 2.5
ALL = slice(None)


@pytest.fixture(scope="module")
def film(tiny, batch_of):
    """Two examples of three segments, and the features of their clips."""
    batch = batch_of(2, SEGMENTS, SLOTS)
    return batch, tiny.run(memory.see, batch.clip)


def at(tree, *place):
    """The part of every array at this place (a slice is of all)."""
    return jax.tree.map(lambda a: a[place], tree)


def chooser(paths):
    """A choice as in training: advantages of a reward, and a draw by them."""

    def choose(completions, parsed, segment, key):
        rewards = parsed.well_formed + 0.3 * parsed.length + 0.1 * segment
        a = prpo.group_advantages(rewards)
        chosen = prpo.draw_paths(key, a, parsed.well_formed, jnp.float32(0.7), paths)
        return chosen, (a, chosen)

    return choose


def run_plainly(tiny, form, batch, features, key, sampling, choose):
    """A Python loop of `memory.step`; memories are followed in lists."""
    b, k, each = 2, sampling.paths, sampling.group // sampling.paths
    step = tiny.jit(lambda model, *args: memory.step(model, form, *args, sampling))
    chooses = jax.jit(choose)
    carried = [[[] for _ in range(k)] for _ in range(b)]
    for t in range(SEGMENTS):
        length = np.array([[len(m) for m in row] for row in carried], np.int32)
        tokens = [[m + [form.ids.pad] * (SLOTS - len(m)) for m in row] for row in carried]
        before = Memory(np.array(tokens, np.int32), length)
        draw, choice = jax.random.split(jax.random.fold_in(key, t))
        completions, parsed = step(
            at(batch.prefix, ALL, t),
            VisionFeatures(features.embeds[:, t], features.deepstack[:, :, t]),
            *(before, batch.choices, draw),
        )
        chosen, extra = chooses(completions, parsed, t, choice)
        yield memory.Steps(before, completions, parsed, extra)
        good, said, lengths = (np.asarray(a) for a in parsed[:3])
        carried = [
            [
                said[i, j, : lengths[i, j]].tolist() if good[i, j] else carried[i][j // each]
                for j in np.asarray(chosen)[i]
            ]
            for i in range(b)
        ]


@pytest.fixture(scope="module")
def looped(tiny, form_of, film):
    """What the loop leaves behind, for a number of paths."""
    form = form_of("loose", SLOTS)

    @functools.cache
    def of(paths):
        sampling = Sampling(GROUP, paths, 1.0, False)
        loop = lambda model, *args: memory.loop(model, form, *args, sampling, chooser(paths))  # noqa: E731
        return jax.tree.map(np.asarray, tiny.run(loop, *film, jax.random.key(3)))

    return of


@pytest.mark.parametrize("paths", [1, 2, GROUP])
def test_loop_is_a_plain_loop_of_steps(tiny, form_of, film, looped, paths):
    sampling = Sampling(GROUP, paths, 1.0, False)
    args = (tiny, form_of("loose", SLOTS), *film, jax.random.key(3), sampling, chooser(paths))
    steps = looped(paths)
    assert steps.completions.tokens.shape[:3] == (SEGMENTS, 2 * paths, GROUP // paths)
    for t, plain in enumerate(run_plainly(*args)):
        got = at(steps, t)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
            if a.dtype == np.float32:
                np.testing.assert_allclose(a, b, atol=1e-5)
            else:
                np.testing.assert_array_equal(a, b)
    # The case says something: some are malformed, some not, and memories differ.
    assert 0 < steps.parsed.well_formed.sum() < steps.parsed.well_formed.size
    assert len(set(steps.before.length[1:].ravel().tolist())) > 1


@pytest.mark.parametrize("paths", [1, 2, GROUP])
def test_group_counts_path_by_path(looped, film, parse_slowly, paths):
    """[t, b*k, r] and [t, b, g] are the same completions in the same order."""
    steps = looped(paths)
    out = steps.completions
    tokens = np.where(out.mask, out.tokens, 0).reshape(SEGMENTS, 2, GROUP, -1)
    for place in np.ndindex(SEGMENTS, 2, GROUP):
        parsed = at(steps.parsed, *place)
        said = parse_slowly(tokens[place], SLOTS, film[0].choices[place[1]])
        assert bool(parsed.well_formed) == (said is not None)
        if said:
            assert (parsed.memory[: parsed.length].tolist(), int(parsed.answer)) == said


def test_each_segment_and_path_has_its_own_draws(looped):
    tokens = looped(GROUP).completions.tokens
    first = [tuple(row) for row in tokens[:, :, 0].reshape(-1, tokens.shape[-1])]
    assert len(set(first)) > len(first) // 2


def test_each_path_is_read_by_itself(tiny, form_of, film, tokenizer, each=24):
    """Completions of k memories of b examples, against every one of the prompts alone."""
    form, (batch, features) = form_of("forced", SLOTS), film
    words = np.array(tokenizer.encode("bdfhjklmnpqtuvwxz.,!"), np.int32).reshape(2, 2, SLOTS)
    before = Memory(words, np.array([[0, 4], [SLOTS, 2]], np.int32))
    prefix, seen = (
        at(batch.prefix, ALL, 1),
        VisionFeatures(features.embeds[:, 1], features.deepstack[:, :, 1]),
    )
    sampling = Sampling(2 * each, 2, 4.0, False)
    step = tiny.jit(lambda model, *args: memory.step(model, form, *args, sampling))
    out, parsed = step(prefix, seen, before, batch.choices, jax.random.key(0))
    answers = np.asarray(parsed.answer).reshape(2, 2, each)

    @tiny.jit
    def score(model, prefix, features, before, choices, tokens, mask):
        context = memory.context(model, form, prefix, features, before)
        return rollout.score(model, form.grammar, context, choices, tokens, mask, temperature=4.0)[
            0
        ]

    for i, j in np.ndindex(2, 2):
        row, one = 2 * i + j, slice(i, i + 1)
        alone = VisionFeatures(seen.embeds[one], seen.deepstack[:, one])
        memories = at(before, one, slice(j, j + 1))
        drawn = out.tokens[row][None], out.mask[row][None]
        got = score(at(prefix, one), alone, memories, batch.choices[one], *drawn)
        expected = np.where(out.mask[row], out.logprobs[row], 0)
        np.testing.assert_allclose(got[0], expected, atol=1e-4)
        assert set(answers[i, j].tolist()) == set(range(2 + i))


def test_seeing_all_clips_is_seeing_each(tiny, film):
    batch, features = film
    see = tiny.jit(lambda model, clip: model.see(clip.patches, clip.patch_positions, clip.grid))
    for t in range(SEGMENTS):
        alone = see(at(batch.clip, ALL, t))
        np.testing.assert_allclose(features.embeds[:, t], alone.embeds, atol=1e-5)
        np.testing.assert_allclose(features.deepstack[:, :, t], alone.deepstack, atol=1e-5)


def test_a_tower_without_deepstack_is_seen_with(tiny, film):
    vision = dataclasses.replace(tiny.config.vision, deepstack_visual_indexes=())
    graph, state = nnx.split(abstract(dataclasses.replace(tiny.config, vision=vision)))
    see = lambda state, clip: memory.see(nnx.merge(graph, state), clip)  # noqa: E731
    got = jax.eval_shape(see, state, film[0].clip)
    assert got.deepstack.shape == (0, *got.embeds.shape)


def test_empty():
    got = memory.empty(2, 3, SLOTS, 7)
    assert got.tokens.shape == (2, 3, SLOTS) and (got.tokens == 7).all()
    assert got.length.shape == (2, 3) and not got.length.any()


def test_handing_on():
    """Malformed completions hand on the memory of the path that they came from."""
    before = Memory(
        jnp.array([[[1, 2, 0], [3, 0, 0]], [[4, 5, 6], [0, 0, 0]]]), jnp.array([[2, 1], [3, 0]])
    )
    said = jnp.arange(10, 34).reshape(2, 4, 3)
    good = jnp.array([[True, False, False, True], [False] * 4])
    parsed = Parsed(good, jnp.where(good[..., None], said, 0), good * 3, good - 1)
    hand_on = jax.jit(memory.hand_on)
    got = hand_on(before, parsed, jnp.array([[3, 1], [2, 0]]))
    np.testing.assert_array_equal(got.tokens, [[[19, 20, 21], [1, 2, 0]], [[0, 0, 0], [4, 5, 6]]])
    np.testing.assert_array_equal(got.length, [[3, 2], [0, 3]])
    got = hand_on(before, parsed, jnp.array([[2, 0], [3, 1]]))
    np.testing.assert_array_equal(got.tokens, [[[3, 0, 0], [10, 11, 12]], [[0, 0, 0], [4, 5, 6]]])
    np.testing.assert_array_equal(got.length, [[1, 3], [0, 3]])


def test_an_instruction_stands_between_memory_and_the_turns_end(tiny, form_of, film, tokenizer):
    batch, features = film
    plain = form_of("free", SLOTS)
    told = plain._replace(instruction=prompts.instruction(tokenizer, "Tell."))
    assert tokenizer.decode(told.instruction) == "Tell." and len(told.instruction) > 1
    assert prompts.instruction(tokenizer, "") == ()
    seen = VisionFeatures(features.embeds[:, 0], features.deepstack[:, :, 0])
    before, prefix = memory.empty(2, 1, SLOTS, plain.ids.pad), at(batch.prefix, ALL, 0)

    def by_hand(model, prefix, seen):
        after = (plain.ids.memory_close, *told.instruction, *plain.turn_end)
        rows = prompts.assemble(
            *(prefix, before.tokens[:, 0], before.length[:, 0], plain.ids.memory_open, after)
        )
        return rollout.read(model, rows, seen)

    run = lambda form: tiny.run(  # noqa: E731
        lambda model, *args: memory.context(model, form, *args, before), prefix, seen
    )
    got, expected = run(told), tiny.run(by_hand, prefix, seen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)
    assert (got.position - run(plain).position == len(told.instruction)).all()


def test_handing_on_an_empty_memory_forgets():
    before = Memory(jnp.array([[[1, 2]]]), jnp.array([[2]]))
    one = jnp.ones((1, 1), bool)
    parsed = Parsed(one, jnp.zeros((1, 1, 2), int), one * 0, one * 0)
    got = memory.hand_on(before, parsed, jnp.array([[0]]))
    assert got.length.tolist() == [[0]] and got.tokens.tolist() == [[[0, 0]]]


def test_the_choice_of_evaluation():
    parsed = Parsed(*(jnp.zeros((3, 1), int),) * 4)
    chosen, extra = memory.first_of_each(None, parsed, jnp.int32(0), jax.random.key(0))
    assert chosen.shape == (3, 1) and not chosen.any() and extra == ()


# The options of each example; those that only fill a batch up have none.
ROOM, CHOICES = 2, [["x", "y", "zy"], ["yx", "xz", "y"], ["", "", ""]]


@pytest.fixture(scope="module")
def chains(batch_of, form_of, tokenizer):
    """Two examples and one that only fills the batch up; options are answered by their text.

    The first: memories "x", "", "xyzxy" with answers "x", none, "zy". The second: none, "yz", "z"
    with answers "y", "xz", none.
    """
    form, words = (
        form_of("free", SLOTS, ROOM),
        dict(zip("xyz", tokenizer.encode("xyz"), strict=True)),
    )
    texts = [["x", "", "xyzxy"], ["", "yz", "z"], ["x", "y", "z"]]
    pad = form.ids.pad
    tokens = [[[words[w] for w in m] + [pad] * (SLOTS - len(m)) for m in row] for row in texts]
    chain = Chain(
        memory=np.array(tokens, np.int32),
        length=np.array([[1, 0, 5], [-1, 2, 1], [1, 1, 1]], np.int32),
        answer=np.array([[0, -1, 2], [2, 1, -1], [0, 0, 0]], np.int32),
    )
    choices = [[[words[w] for w in c] + [-1] * (ROOM - len(c)) for c in row] for row in CHOICES]
    batch = batch_of(3, 3, SLOTS)._replace(
        chain=chain,
        choices=np.array(choices, np.int32),
        real=np.array([True, True, False]),
    )
    supervised = jax.jit(lambda batch: memory.supervised(batch, form, ANSWER_WEIGHT))
    return batch, words, form, jax.tree.map(np.asarray, supervised(batch))


def test_supervised_memories_before(chains):
    _, words, form, (before, _, _) = chains
    expected = [["", "x", ""], ["", "", "yz"]]
    for place in np.ndindex(2, 3):
        row = [words[w] for w in expected[place[0]][place[1]]]
        assert before.length[place] == len(row)
        assert before.tokens[place].tolist() == row + [form.ids.pad] * (SLOTS - len(row))


def test_supervised_targets(chains):
    _, words, form, (_, tokens, weights) = chains
    ids = form.ids
    signs = {"[": ids.memory_open, "]": ids.memory_close, "(": ids.answer_open}
    signs |= {")": ids.answer_close, ".": ids.im_end} | words
    # What is written ("_": not to be learnt, so that anything may stand there), and its weight.
    expected = [["[x](x).", "[](_).", "[xyzxy](zy)."], ["", "[yz](xz).", "[z](__)."], [""] * 3]
    size = SLOTS + ROOM + fmt.TAGS
    assert tokens.shape == weights.shape == (3, 3, size)
    for place in np.ndindex(3, 3):
        text = expected[place[0]][place[1]]
        answer = range(text.find("(") + 1, text.find(")"))
        weight = [ANSWER_WEIGHT if i in answer else 1.0 for i in range(len(text))]
        weight = [0.0 if sign == "_" else w for sign, w in zip(text, weight, strict=True)]
        assert weights[place].tolist() == weight + [0.0] * (size - len(text))
        got = tokens[place][weights[place] > 0].tolist()
        assert got == [signs[sign] for sign in text if sign != "_"]


def test_supervised_targets_are_well_formed(chains):
    """What is taught is what the parser takes: also where an answer is not to be learnt."""
    batch, words, form, (_, tokens, _) = chains

    @jax.jit
    def parse(tokens):
        final = fmt.states(form.grammar, jnp.pad(tokens, ((0, 0), (0, 0), (0, 1))))[..., -1]
        choices = jnp.broadcast_to(batch.choices[:, None], (3, 3, *batch.choices.shape[1:]))
        return fmt.parse(form.grammar, tokens, final, choices, form.ids.pad)

    parsed = at(parse(tokens), slice(2))
    assert parsed.well_formed.all()
    np.testing.assert_array_equal(parsed.length, [[1, 0, 5], [0, 2, 1]])
    np.testing.assert_array_equal(parsed.answer, [[0, 0, 2], [2, 1, 0]])
    assert parsed.memory[1, 1, :2].tolist() == [words["y"], words["z"]]
