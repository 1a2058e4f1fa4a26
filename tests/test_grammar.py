"""The format's state machine: every malformed output, and a slow parser beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videomem_jax import grammar as fmt
from videomem_jax.grammar import State

SLOTS, ROOM, SIZE = 4, 2, 16
CHOICES = ("A", "B", "C", "xy", "x", "yz")

# A completion, a sign a token, and what it says: (memory, answer), or None if malformed.
# [ ] the memory's tags, ( ) the answer's, . the turn's end, capitals the letters, x y z words,
# # padding, v a video token, s the turn's start, ? a row of the embedding that no token has.
CASES = {
    "well-formed": ("[xy](B).", ("xy", 1)),
    "empty memory": ("[](A).", ("", 0)),
    "full memory": ("[xyzx](C).", ("xyzx", 2)),
    "a choice of two words": ("[z](xy).", ("z", 3)),
    "a choice that begins another": ("[z](x).", ("z", 4)),
    "everything full": ("[xyzx](yz).", ("xyzx", 5)),
    "letters in the memory": ("[xAB](C).", ("xAB", 2)),
    "text after the end": ("[xy](B).xyz", ("xy", 1)),
    "another completion after the end": ("[xy](B).[z](A).", ("xy", 1)),
    "tags after the end": ("[](B).]](", ("", 1)),
    "nothing": ("", None),
    "only the end": (".", None),
    "only text": ("xyzxyz.", None),
    "no memory's opening": ("xy](B).", None),
    "no memory's closing": ("[xy(B).", None),
    "no answer's opening": ("[xy]B).", None),
    "no answer's closing": ("[xy](B.", None),
    "no letter": ("[xy]().", None),
    "no memory": ("(B).", None),
    "no answer": ("[xy].", None),
    "no end": ("[xy](B)", None),
    "no end, text in its place": ("[xy](B)xyz", None),
    "two letters": ("[xy](BC).", None),
    "no such option": ("[xy](J).", None),
    "a word that is no choice": ("[xy](z).", None),
    "half a choice": ("[xy](y).", None),
    "a choice turned round": ("[xy](yx).", None),
    "a letter and a word": ("[xy](Bx).", None),
    "a choice and more": ("[xy](xyz).", None),
    "padding after a choice": ("[xy](B#).", None),
    "unused row for an answer": ("[xy](?).", None),
    "a tag for an answer": ("[xy](().", None),
    "text before": ("x[xy](B).", None),
    "text between": ("[xy]x(B).", None),
    "text after": ("[xy](B)x.", None),
    "swapped parts": ("(B)[xy].", None),
    "swapped memory tags": ("]xy[(B).", None),
    "swapped answer tags": ("[xy])B(.", None),
    "answer's closing in the memory": ("[x)](B).", None),
    "memory's closing in the answer": ("[x](B]).", None),
    "answer's tags for the memory's": ("(xy)[B].", None),
    "opened twice": ("[[x](B).", None),
    "closed twice": ("[x]](B).", None),
    "answer opened twice": ("[x]((B).", None),
    "answer closed twice": ("[x](B)).", None),
    "two memories": ("[x][y](B).", None),
    "two answers": ("[x](B)(B).", None),
    "memory in the answer": ("[x]([y]B).", None),
    "answer in the memory": ("[x(B)y](B).", None),
    "one token too many": ("[xyzxy](B).", None),
    "all letters, too many": ("[ABABAB](B).", None),
    "end in the memory": ("[x.](B).", None),
    "end for a memory": ("[.](B).", None),
    "end for an answer": ("[x](.).", None),
    "padding in the memory": ("[x#](B).", None),
    "video in the memory": ("[vx](B).", None),
    "a turn's start in the memory": ("[xs](B).", None),
    "unused row in the memory": ("[x?y](B).", None),
    "a turn's start after it": ("[x](B)s.", None),
    "cut short in the memory": ("[xyzx", None),
    "cut short before the answer": ("[xy](", None),
    "cut short by the length": ("[xyzxyzxyzxyzx", None),
}


@pytest.fixture(scope="module")
def signs(tokenizer):
    """Ids of the signs in which the cases are written."""
    ids = tokenizer.ids
    letters = dict(zip("ABCDEFGHIJ", ids.letters, strict=True))
    words = dict(zip("xyz", tokenizer.encode("xyz"), strict=True))
    tags = {"[": ids.memory_open, "]": ids.memory_close}
    tags |= {"(": ids.answer_open, ")": ids.answer_close, ".": ids.im_end}
    return tags | letters | words | {"#": ids.pad, "v": ids.video_pad, "s": ids.im_start, "?": 319}


@pytest.fixture(scope="module")
def machine(form_of):
    return form_of("free", SLOTS, ROOM)


@pytest.fixture(scope="module")
def choices(signs):
    """Ids of the choices, padded with -1; the last two rows are of options that are not there."""
    table = np.full((len(CHOICES) + 2, ROOM), -1, np.int32)
    for row, choice in zip(table, CHOICES, strict=False):
        row[: len(choice)] = [signs[sign] for sign in choice]
    return table


@pytest.fixture(scope="module")
def follow(machine, choices):
    """Runs the machine over completions: the states before each token, the last, what they say."""

    @jax.jit
    def run(tokens):
        grammar = machine.grammar
        states = fmt.states(grammar, jnp.pad(tokens, ((0, 0), (0, 1))))
        each = jnp.broadcast_to(choices, (len(tokens), *choices.shape))
        return states, fmt.parse(grammar, tokens, states[:, -1], each, machine.ids.pad)

    return lambda tokens: jax.tree.map(np.asarray, run(jnp.asarray(tokens, jnp.int32)))


def said(parsed, row):
    """A row of what was parsed in the form of the reference."""
    if not parsed.well_formed[row]:
        return None
    return parsed.memory[row, : parsed.length[row]].tolist(), int(parsed.answer[row])


@pytest.fixture(scope="module")
def cases(signs, follow):
    """All cases at once, padded at the end."""
    tokens = np.full((len(CASES), SIZE), signs["#"])
    for row, (text, _) in zip(tokens, CASES.values(), strict=True):
        row[: len(text)] = [signs[sign] for sign in text]
    return tokens, *follow(tokens)


@pytest.mark.parametrize("case", CASES)
def test_completions(case, cases, signs, choices, parse_slowly):
    text, expected = CASES[case]
    row = list(CASES).index(case)
    tokens, states, parsed = cases[0][row], cases[1][row], cases[2]
    if expected:
        expected = [signs[sign] for sign in expected[0]], expected[1]
    assert said(parsed, row) == expected
    assert parse_slowly(tokens, SLOTS, choices) == expected
    length = len(expected[0]) if expected else 0
    assert parsed.length[row] == length
    assert (parsed.memory[row, length:] == signs["#"]).all()
    assert expected or parsed.answer[row] == -1
    # It has ended at the first end of a turn, well-formed or not.
    end = text.index(".") if "." in text else SIZE
    assert np.isin(states, [State.DONE, State.FAILED]).tolist() == [
        i > end for i in range(SIZE + 1)
    ]


@pytest.mark.parametrize(
    "text, state",
    {"[](A).": "DONE", "[](yx).": "DONE", "[]().": "FAILED", "[](xyz).": "FAILED"}.items(),
)
def test_any_text_that_fits_ends_the_format(signs, follow, text, state):
    """Whether it is a choice is the parser's to say."""
    tokens = [[signs[sign] for sign in text.ljust(SIZE, "#")]]
    assert follow(tokens)[0][0, -1] == State[state]


def random_completions(signs, n, rng):
    """Well-formed ones with up to four tokens changed, left out, put in or exchanged."""
    rows = []
    for i in range(n):
        body = rng.choice(list("xyzAB"), rng.integers(0, SLOTS + 2))
        row = ["[", *body, "]", "(", *rng.choice([*CHOICES, "J", "y"]), ")", "."]
        for _ in range(i % 5):
            at, kind = rng.integers(0, len(row)), rng.integers(0, 4)
            new = rng.choice(list("[]().xyAB#v?"))
            if kind == 0:
                row[at] = new
            elif kind == 1 and len(row) > 1:
                del row[at]
            elif kind == 2:
                row.insert(at, new)
            else:
                other = rng.integers(0, len(row))
                row[at], row[other] = row[other], row[at]
        row = [*row, *rng.choice(list("[]().xA"), SIZE)][:SIZE]
        rows.append([signs[sign] for sign in row])
    return np.array(rows)


def test_random_completions_against_the_slow_parser(signs, choices, follow, parse_slowly):
    rng = np.random.default_rng(0)
    tokens = np.concatenate(
        [
            random_completions(signs, 800, rng),
            rng.choice([signs[s] for s in "[](A.)x"], (200, SIZE)),
        ]
    )
    _, parsed = follow(tokens)
    expected = [parse_slowly(row, SLOTS, choices) for row in tokens]
    assert [said(parsed, row) for row in range(len(tokens))] == expected
    good = sum(e is not None for e in expected)
    assert 100 < good < 900  # The test would say little if there were few of either.


def test_states_are_those_of_single_steps(signs, follow, machine):
    tokens = random_completions(signs, 300, np.random.default_rng(1))
    states, _ = follow(tokens)
    advance = jax.jit(lambda *args: fmt.advance(machine.grammar, *args))
    state = length = jnp.zeros(len(tokens), jnp.int32)
    for place in range(SIZE):
        np.testing.assert_array_equal(states[:, place], state)
        state, length = advance(state, length, jnp.asarray(tokens[:, place], jnp.int32))
    np.testing.assert_array_equal(states[:, -1], state)
    assert set(np.unique(states)) == set(State)


def test_any_leading_axes(signs, machine, choices):
    tokens = random_completions(signs, 24, np.random.default_rng(2))
    final = np.random.default_rng(3).choice([State.DONE, State.FAILED], 24)
    parse = jax.jit(lambda *args: fmt.parse(machine.grammar, *args, machine.ids.pad))
    each = np.tile(choices, (24, 1, 1))
    each[12:] = each[12:, ::-1]
    flat = parse(tokens, final, each)
    cube = parse(*(a.reshape(2, 3, 4, *a.shape[1:]) for a in (tokens, final, each)))
    assert len(set(flat.answer.tolist())) > 3
    for got, expected in zip(cube, flat, strict=True):
        np.testing.assert_array_equal(got, expected.reshape(2, 3, 4, *expected.shape[1:]))


@pytest.fixture(scope="module")
def permitted(choices):
    """What may be sampled in a state, as a set; in the second row, the first has no choices."""
    ask = jax.jit(fmt.permitted)

    def of(grammar, state, table=choices):
        two = jnp.stack([jnp.full_like(table, -1), jnp.asarray(table)])
        return set(np.flatnonzero(ask(grammar, jnp.full(2, state), two)[1]).tolist())

    return of


@pytest.fixture(scope="module")
def text(tokenizer):
    return set(np.flatnonzero(tokenizer.text_mask(320)).tolist())


def test_what_may_be_sampled(form_of, tokenizer, permitted, text):
    grammar, ids = form_of("free", SLOTS, ROOM).grammar, tokenizer.ids
    tags = {ids.memory_open, ids.memory_close, ids.answer_open, ids.answer_close, ids.im_end}
    for state in State:
        expected = {
            State.MEMORY: text | {ids.memory_close},
            State.FULL: {ids.memory_close},
        }.get(state, text | tags)
        assert permitted(grammar, state) == expected


def test_what_may_be_sampled_when_forced(form_of, tokenizer, permitted, text, signs, choices):
    grammar, ids = form_of("forced", SLOTS, ROOM).grammar, tokenizer.ids
    of_choices = {signs[sign] for sign in "ABCxyz"}
    expected = {
        State.START: {ids.memory_open},
        State.MEMORY: text | {ids.memory_close},
        State.FULL: {ids.memory_close},
        State.REMEMBERED: {ids.answer_open},
        State.ANSWER: of_choices,
        State.ANSWERED: of_choices | {ids.answer_close},
        State.FULL_ANSWER: {ids.answer_close},
        State.CLOSED: {ids.im_end},
    }
    for state, allowed in expected.items():
        assert permitted(grammar, state) == allowed
    for count in (1, 2, 6):
        fewer = np.where(np.arange(len(choices))[:, None] < count, choices, -1)
        allowed = {signs[sign] for choice in CHOICES[:count] for sign in choice}
        assert permitted(grammar, State.ANSWER, fewer) == allowed


def test_permitted_has_any_axes_after_the_row(form_of, choices):
    grammar = form_of("forced", SLOTS, ROOM).grammar
    two = np.stack([choices, np.full_like(choices, -1)])
    states = np.random.default_rng(0).integers(0, len(State), (2, 3, 4))
    ask = jax.jit(fmt.permitted)
    got = ask(grammar, states, two)
    for place in np.ndindex(3, 4):
        np.testing.assert_array_equal(got[:, *place], ask(grammar, states[:, *place], two))


@pytest.mark.parametrize("by", ["letter", "text"])
def test_a_forced_walk_keeps_to_the_format(form_of, signs, choices, parse_slowly, by, n=200):
    """Whatever is picked among what may be sampled; by letter it always names an option."""
    table = choices[:3, :1] if by == "letter" else choices
    grammar = form_of("forced", SLOTS, table.shape[1]).grammar

    @jax.jit
    def walk(key):
        def one(carry, key):
            state, length = carry
            allowed = fmt.permitted(grammar, state, jnp.broadcast_to(table, (n, *table.shape)))
            # The memory's end is picked as often as all words together.
            weights = jnp.where(allowed, 0.0, -jnp.inf).at[:, signs["]"]].add(5.0)
            token = jax.random.categorical(key, weights)
            return fmt.advance(grammar, state, length, token), token

        zero = jnp.zeros(n, jnp.int32)
        return jax.lax.scan(one, (zero, zero), jax.random.split(key, grammar.size))

    (state, _), tokens = walk(jax.random.key(0))
    assert (state == State.DONE).all()
    said = [parse_slowly(row, SLOTS, table) for row in np.asarray(tokens).T]
    good = [s for s in said if s]
    assert {len(memory) for memory, _ in good} == set(range(SLOTS + 1))
    assert {answer for _, answer in good} == set(range(3 if by == "letter" else len(CHOICES)))
    assert len(good) == n or by == "text"
