"""Sampling against scoring, and what is sampled against the format."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from videomem_jax import grammar as fmt
from videomem_jax import memory, rollout
from videomem_jax.grammar import State

SLOTS, COUNT, VOCAB = 8, 100, 320
TEMPERATURE = 4.0  # high enough that all that may be drawn is drawn
SIZE = SLOTS + 1 + fmt.TAGS
KINDS = ("free", "forced", "loose")


@pytest.fixture(scope="module")
def opening(batch_of, tokenizer):
    """The first prompts of two examples, with memories of 0 and 3 tokens: (batch, memory)."""
    batch = batch_of(2, 1, SLOTS)
    tokens = np.full((2, 1, SLOTS), tokenizer.ids.pad, np.int32)
    tokens[1, 0, :3] = tokenizer.encode("xyz")
    return batch, memory.Memory(tokens, np.array([[0], [3]], np.int32))


def read(model, form, batch, before):
    """The opening's prompts, run."""
    features = memory.see(model, jax.tree.map(lambda a: a[:, 0], batch.clip))
    prefix = jax.tree.map(lambda a: a[:, 0], batch.prefix)
    return memory.context(model, form, prefix, features, before)


@pytest.fixture(scope="module")
def draw(tiny, form_of, opening):
    """Draws completions by a grammar, and scores them again; one compile serves all grammars."""
    form = form_of("free", SLOTS)

    def run(model, batch, before, grammar, key):
        context = read(model, form, batch, before)
        out = rollout.sample(
            *(model, grammar, context, batch.choices, key), count=COUNT, temperature=TEMPERATURE
        )
        again = rollout.score(
            *(model, grammar, context, batch.choices, out.tokens, out.mask),
            temperature=TEMPERATURE,
        )
        return out, again

    run = tiny.jit(run)
    return lambda grammar, seed=0: jax.tree.map(
        np.asarray, run(*opening, grammar, jax.random.key(seed))
    )


@pytest.fixture(scope="module")
def drawn(draw, form_of):
    """Completions of a kind of format, and their log-probabilities and entropies scored again."""
    return functools.cache(lambda kind: draw(form_of(kind, SLOTS).grammar))


@pytest.mark.parametrize("vocab", [1, 7, 48, 320])
def test_a_draw_inverts_the_cumulative_sums(vocab):
    key, shape = jax.random.key(vocab), (4, 500)
    scores = np.random.default_rng(0).standard_normal((*shape, vocab)) * 3
    forbidden = np.random.default_rng(1).random((*shape, vocab)) < 0.5
    forbidden[..., vocab // 2] = False
    logp = rollout.log_softmax(jnp.asarray(scores, jnp.float32), ~forbidden, 1.0)
    got = np.asarray(jax.jit(rollout.draw)(key, logp))
    share = np.exp(np.asarray(logp, np.float64))
    sums = share.cumsum(-1)
    mark = np.asarray(jax.random.uniform(key, shape), np.float64) * sums[..., -1]
    # Where the number lies as near to a border as float32 tells, either side is right.
    low, high = ((sums <= (mark + off)[..., None]).sum(-1) for off in (-1e-6, 1e-6))
    assert ((low <= got) & (got <= high)).all() and (low == high).mean() > 0.99
    assert not np.take_along_axis(forbidden, got[..., None], -1).any()


def test_no_draw_meets_what_has_no_chance():
    """Not even with a random number that sums round up to, or down to nothing."""
    share = jnp.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for mark, wanted in ((0.0, 1), (0.25, 3), (0.7499, 3), (1.0, 4), (1.1, 4)):
        assert int(rollout._passed(share, jnp.float32(mark))[0]) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_sampling(drawn, kind):
    out, (logprobs, entropies) = drawn(kind)
    mask = out.mask
    np.testing.assert_allclose(logprobs[mask], out.logprobs[mask], atol=1e-4)
    np.testing.assert_allclose(entropies[mask], out.entropy[mask], atol=1e-4)
    assert (logprobs[~mask] == 0).all() and (entropies[~mask] == 0).all()
    assert (out.logprobs[mask] <= 0).all() and (out.entropy[mask] >= 0).all()
    # Where one token is forced there is nothing to choose.
    if kind == "forced":
        assert (out.logprobs[:, :, 0] == 0).all() and (out.entropy[:, :, 0] == 0).all()


def test_scores_a_few_positions_at_a_time(tiny, form_of, opening, drawn):
    """Values and gradients, the last part being filled up."""
    form, (batch, before) = form_of("free", SLOTS), opening
    tokens, mask = (a[:, :4] for a in drawn("loose")[0][:2])

    def run(model, chunk):
        graph, params = nnx.split(model)

        def total(params):
            model = nnx.merge(graph, params)
            context = read(model, form, batch, before)
            scores = rollout.score(
                *(model, form.grammar, context, batch.choices, tokens, mask),
                temperature=TEMPERATURE,
                chunk=chunk,
            )
            weighted = [jnp.sum(a * jnp.cos(jnp.arange(a.size)).reshape(a.shape)) for a in scores]
            return sum(weighted), scores

        return jax.grad(total, has_aux=True)(params)

    whole, parts = (
        jax.tree.map(np.asarray, tiny.run(functools.partial(run, chunk=chunk)))
        for chunk in (None, 5)
    )
    assert SIZE % 5 and np.abs(whole[1][0]).max() > 0.1
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def test_answers_from_memory(draw, drawn, form_of):
    """What follows a memory is drawn without the clip, what stands in it as ever."""
    out, (logprobs, entropies) = draw(form_of("forced", SLOTS).grammar.replace(from_memory=True))
    np.testing.assert_allclose(logprobs[out.mask], out.logprobs[out.mask], atol=1e-4)
    np.testing.assert_allclose(entropies[out.mask], out.entropy[out.mask], atol=1e-4)
    everything = drawn("forced")[0]
    states = np.array(fmt.states(form_of("forced", SLOTS).grammar, out.tokens))
    # Same keys, so the same memories; behind them the prompt is not what it was.
    before = states <= State.FULL
    np.testing.assert_array_equal(out.tokens[before], everything.tokens[before])
    np.testing.assert_allclose(out.logprobs[before], everything.logprobs[before], atol=1e-5)
    answer = states == State.ANSWER
    assert (np.abs(out.entropy - everything.entropy)[answer] > 1e-4).mean() > 0.9


def test_what_is_seen_of_a_prompt(form_of):
    question, pad = [True, True, False, False, False], [True, True, True, True, False]
    context = rollout.Context(None, jnp.array([pad]), jnp.array([question]), None, None)
    grammar = form_of("free", SLOTS).grammar
    state = jnp.array([[list(State)]])
    np.testing.assert_array_equal(rollout.visible(grammar, context, state), [pad])
    seen = rollout.visible(grammar.replace(from_memory=True), context, state)[0, 0]
    for which, row in zip(State, seen, strict=True):
        hidden = State.REMEMBERED <= which <= State.DONE
        np.testing.assert_array_equal(row, question if hidden else pad, err_msg=which.name)


@pytest.mark.parametrize("from_memory", [False, True])
def test_choices_are_weighed_as_they_would_be_drawn(tiny, form_of, opening, tokenizer, from_memory):
    """Each by the probability with which the completion goes on with it, scored one by one."""
    grammar = form_of("forced", SLOTS).grammar.replace(from_memory=from_memory)

    def run(model, batch, before, grammar, key):
        context, choices = read(model, form_of("forced", SLOTS), batch, before), batch.choices
        out = rollout.sample(model, grammar, context, choices, key, count=1, temperature=1.0)
        tokens = out.tokens[:, 0]
        weighed = rollout.choice_logprobs(model, grammar, context, choices, tokens)
        at = jnp.argmax(tokens == tokenizer.ids.answer_open, axis=-1) + 1
        shape = (*choices.shape[:2], SIZE)
        here = jnp.arange(SIZE) == at[:, None, None]
        each = jnp.where(here, choices, jnp.broadcast_to(tokens[:, None], shape))
        mask = jnp.broadcast_to(out.mask, shape)
        scores, _ = rollout.score(model, grammar, context, choices, each, mask, temperature=1.0)
        return weighed, jnp.where(here, scores, 0.0).sum(-1)

    weighed, scores = tiny.jit(run)(*opening, grammar, jax.random.key(3))
    there = opening[0].choices[..., 0] >= 0
    assert there.sum(-1).tolist() == [2, 3]
    np.testing.assert_allclose(weighed[there], scores[there], atol=1e-4)
    assert (np.asarray(weighed)[~there] == -np.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_known_as_their_answers_would_be_drawn(drawn, opening, form_of, kind):
    out, _ = drawn(kind)
    choices = opening[0].choices[..., 0]
    states = np.array(fmt.states(form_of(kind, SLOTS).grammar, out.tokens))
    begins, told = (states == State.ANSWER) & out.mask, 0
    assert (out.options[~begins.any(-1)] == -np.inf).all()
    for n, r, c in zip(*np.nonzero(begins), strict=True):
        there = choices[n] >= 0
        assert (out.options[n, r][~there] == -np.inf).all()
        total = np.exp(out.options[n, r][there]).sum()
        assert total == pytest.approx(1, abs=1e-5) if kind == "forced" else total < 1 + 1e-5
        drawn_one = choices[n] == out.tokens[n, r, c]
        np.testing.assert_allclose(out.options[n, r][drawn_one], out.logprobs[n, r, c], atol=1e-5)
        told += drawn_one.any()
    assert told > 3 or kind == "free"


@pytest.mark.parametrize("kind", KINDS)
def test_masks_end_with_the_completions(drawn, tokenizer, kind):
    """Up to and including the end, however long the others are."""
    out, _ = drawn(kind)
    lengths = out.mask.sum(-1)
    np.testing.assert_array_equal(out.mask, np.arange(SIZE) < lengths[..., None])
    for row, length, state in zip(
        out.tokens.reshape(-1, SIZE), lengths.ravel(), out.state.ravel(), strict=True
    ):
        ends = np.flatnonzero(row[:length] == tokenizer.ids.im_end).tolist()
        assert ends == ([length - 1] if state in (State.DONE, State.FAILED) else [])
        assert ends or length == SIZE
    if kind == "loose":
        assert len(set(lengths.ravel())) > 8


def test_the_loop_stops_with_the_last_completion(draw, form_of, tokenizer):
    """Of memories of no word or one: what is behind was never written."""
    grammar, ids = form_of("forced", SLOTS).grammar, tokenizer.ids
    only, got = np.arange(VOCAB) == ids.memory_close, []
    for first in (ids.memory_close, *tokenizer.encode("x")):
        words = only | (np.arange(VOCAB) == first)
        out, (logprobs, _) = draw(
            grammar.replace(allowed=grammar.allowed.at[State.MEMORY].set(words))
        )
        last = out.mask.sum(-1).max()
        assert (out.state == State.DONE).all()
        assert not out.tokens[..., last:].any() and not out.logprobs[..., last:].any()
        np.testing.assert_allclose(logprobs, np.where(out.mask, out.logprobs, 0), atol=1e-4)
        got.append(last)
    assert got[0] == 1 + fmt.TAGS < got[1]


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_what_the_completions_say(drawn, parse_slowly, opening, tokenizer, kind):
    """Ended in the format, with whatever letter; when forced, with an option's."""
    out, _ = drawn(kind)
    tokens = np.where(out.mask, out.tokens, 0)
    letters = [[[letter] for letter in tokenizer.ids.letters]] * 2
    for choices, done in ((letters, "format"), (opening[0].choices, "choice")):
        said = [
            [parse_slowly(row, SLOTS, table) for row in rows]
            for rows, table in zip(tokens, choices, strict=True)
        ]
        good = np.array([[s is not None for s in rows] for rows in said])
        assert good.all() == (kind == "forced") and good.any() == (kind != "free")
        if done == "format":
            np.testing.assert_array_equal(out.state == State.DONE, good)
    if kind == "forced":
        for options, rows in zip((2, 3), said, strict=True):
            assert {answer for _, answer in rows} == set(range(options))


def test_completions_are_drawn_by_themselves(draw, form_of):
    out, _ = draw(form_of("free", SLOTS).grammar)
    rows = out.tokens.reshape(2 * COUNT, -1)
    assert len(set(map(tuple, rows.tolist()))) == 2 * COUNT


def test_all_text_and_only_text_comes_in_memories(draw, form_of, tokenizer):
    first = np.arange(VOCAB) == tokenizer.ids.memory_open
    grammar = form_of("free", SLOTS).grammar
    out, _ = draw(grammar.replace(allowed=grammar.allowed.at[State.START].set(first)))
    text, close = tokenizer.text_mask(VOCAB), tokenizer.ids.memory_close
    lengths, seen = set(), set()
    for row in out.tokens.reshape(-1, SIZE).tolist():
        inside = row[1 : row.index(close)]
        assert text[inside].all()
        lengths.add(len(inside))
        seen |= set(inside)
    assert max(lengths) == SLOTS and len(seen) > 0.9 * text.sum()


def test_tokens_come_as_often_as_they_are_likely(draw, form_of):
    """The first token, of four that may be drawn."""
    grammar = form_of("loose", SLOTS).grammar
    first = grammar.allowed.at[State.START].set(grammar.allowed[State.MEMORY])
    parts = [draw(grammar.replace(allowed=first), seed)[0] for seed in range(4)]
    tokens, logprobs, entropies = (
        np.concatenate([getattr(part, name)[..., 0] for part in parts], 1)
        for name in ("tokens", "logprobs", "entropy")
    )
    for row in range(2):
        p = {token: np.exp(logprobs[row][tokens[row] == token][0]) for token in set(tokens[row])}
        assert len(p) == 4 and abs(sum(p.values()) - 1) < 1e-5
        for token, likely in p.items():
            bar = 4.5 * np.sqrt(likely * (1 - likely) / tokens.shape[1])
            assert abs((tokens[row] == token).mean() - likely) <= bar
        entropy = -sum(q * np.log(q) for q in p.values())
        np.testing.assert_allclose(entropies[row], entropy, rtol=1e-4)


def test_greedy(tiny, form_of, opening):
    """The most likely token each time, whatever the key."""
    form = form_of("forced", SLOTS)

    def run(model, batch, before, key):
        context = read(model, form, batch, before)
        out = rollout.sample(
            *(model, form.grammar, context, batch.choices, key),
            count=2,
            temperature=TEMPERATURE,
            greedy=True,
        )
        # The whole distributions that the tokens were taken from, in one pass.
        n, r, c = out.tokens.shape
        first = jnp.broadcast_to(context.last[:, None, None], (n, r, 1))
        inputs = jnp.concatenate([first, out.tokens[..., :-1]], -1)
        position = jnp.broadcast_to(context.position[:, None, None] + jnp.arange(c), (3, n, r, c))
        hidden = model.complete(inputs, position, out.mask, context.kv, context.mask)
        states = fmt.states(form.grammar, out.tokens)
        allowed = fmt.permitted(form.grammar, states, batch.choices)
        return out, rollout.log_softmax(model.logits(hidden), allowed, TEMPERATURE)

    run = tiny.jit(run)
    (out, logp), (other, _) = (
        jax.tree.map(np.asarray, run(*opening, jax.random.key(seed))) for seed in range(2)
    )
    for part, again in zip(out, other, strict=True):
        np.testing.assert_array_equal(part, again)
        np.testing.assert_array_equal(part[:, 0], part[:, 1])
    np.testing.assert_array_equal(out.tokens[out.mask], logp.argmax(-1)[out.mask])
    np.testing.assert_allclose(out.logprobs[out.mask], logp.max(-1)[out.mask], atol=1e-4)


def test_masked_softmax_by_hand():
    logits = jnp.log(jnp.array([1.0, 2.0, 5.0, 3.0]))
    allowed = jnp.array([True, True, False, True])

    @functools.partial(jax.jit, static_argnums=1)
    def both(x, temperature):
        logp = rollout.log_softmax(x, allowed, temperature)
        return jnp.exp(logp), rollout.entropy(logp)

    p, entropy = both(logits, 1.0)
    np.testing.assert_allclose(p, [1 / 6, 2 / 6, 0, 3 / 6], rtol=1e-5)
    np.testing.assert_allclose(both(logits, 0.5)[0], [1 / 14, 4 / 14, 0, 9 / 14], rtol=1e-5)
    p = np.array([1, 2, 3]) / 6
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(), rtol=1e-5)
    slope = jax.jit(jax.grad(lambda x: both(x, 1.0)[1]))(logits)
    assert np.isfinite(slope).all() and slope[2] == 0
