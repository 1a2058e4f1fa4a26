"""Trains the demo's base model: `make base`, or `python -m videomem_jax.pretrain --out FOLDER`.

Deterministic for a seed on one kind of machine. The result is a Hugging Face folder (config.json,
model.safetensors, tokenizer.json) like that of any other weights.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import trange

from videomem_jax import command_line, prompt
from videomem_jax.data import video
from videomem_jax.models import convert, layers
from videomem_jax.models.config import Qwen3VLConfig
from videomem_jax.models.presets import preset
from videomem_jax.models.qwen3_vl import Qwen3VL, parameter_count
from videomem_jax.pretrain import scenes, tasks, tower
from videomem_jax.tokenizer import Tokenizer

SIZE, GRID = (64, 96), (4, 6)
# Frames of a scene by its kind, and the chance of each number of cards in it.
FRAMES = {"pair": 2, "clip": 8}
CARDS = {"pair": (0.1, 0.9), "clip": (0.1, 0.3, 0.35, 0.25)}
# Room for a prompt about two frames, a clip, a text; and for a reply.
PAIR_PREFIX, CLIP_PREFIX, TEXT_PREFIX, REPLY = 36, 116, 54, 17
TALK_PREFIX, TALK = 32, 96
# An answer is one token of a reply of up to 16, and the hardest one.
ANSWER_WEIGHT = 3.0
# Peak learning rates: of matrices under Muon, of all else under Adam.
MUON_RATE, ADAM_RATE = 3e-2, 3e-3
# Tokens that a fresh model's first heads look back, one a key head.
LOOKS_BACK = (1, 2)


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of training.

    steps: updates.
    frames: "pair" or "clip", what the exchanges with pixels show, and how many a step.
    texts: exchanges about a text a step.
    talks: texts a step with many exchanges about each.
    clip_talks: clips a step with many exchanges about each.
    pointing: how many exchanges, and of those in a talk, ask for what a question is about.
    marked: share of those with notes in which notes and reply stand between marks.
    """

    steps: int
    frames: str
    seen: int
    texts: int
    talks: int
    clip_talks: int = 0
    pointing: tasks.Pointing = tasks.NEVER
    marked: float = 0.0

    def dressed(self, rng: np.random.Generator, task: tasks.Task) -> tasks.Task:
        """An exchange of this part, in marks or not."""
        return tasks.marked(rng, task) if self.marked and rng.random() < self.marked else task


# First the tower by itself: updates, and pairs of frames in each.
TOWER_STEPS, TOWER_PAIRS = 1500, 384
# Then the decoder, in courses: a share of the peak learning rates, and parts. It learns captions of
# two frames far sooner than those of a clip. The tower is left as it is: trained on, it had
# forgotten half of the digits after 700 steps.
# Once clips are known, mostly texts: look-ups are learnt soon, but after two courses 20% of the
# replies "Continue and answer." on what came after a card were still wrong; after three, 2%.
# Last, to point at what a question is about, with words or brackets around notes and reply. A
# memory stands in tags, which start as these brackets: without them the base went on from
# `<memory>` as if the card's colour had been said. First at what is mostly there; then at what may
# not be, else it took that for granted; then in many questions about one clip.
COURSES = (
    (1.0, (Part(300, "pair", 64, 12, 32), Part(1300, "clip", 30, 10, 12))),
    (0.6, (Part(900, "clip", 12, 16, 32),)),
    (0.6, (Part(700, "clip", 6, 16, 48),)),
    (0.6, (Part(1600, "clip", 14, 12, 16, pointing=tasks.Pointing(0.6), marked=0.6),)),
    (0.4, (Part(700, "clip", 20, 12, 8, pointing=tasks.Pointing(0.6, absent=0.6), marked=0.6),)),
    (
        0.5,
        (
            Part(
                600,
                "clip",
                14,
                8,
                4,
                clip_talks=10,
                pointing=tasks.Pointing(0.7, absent=0.4, narrow=0.4),
                marked=0.7,
            ),
        ),
    ),
)


def encode(tokenizer: Tokenizer, task: tasks.Task, times: np.ndarray, size: int):
    """One exchange as arrays: the prompt's prefix with the tail in it, and the reply."""
    told = tokenizer.encode_memory(task.reply)
    marks = [tokenizer.encode(mark) for mark in task.marks or ()]
    before, after, line, end = marks or ([], [], tokenizer.encode("\n") if told else [], [])
    pieces = [(before, 1.0), (told, 1.0), (after, 1.0)]
    if task.answer:
        # As short as it can be told, like options that are answered by their text.
        (answer,) = prompt.answers(tokenizer, [task.answer], "text", 1, 1).tolist()
        # An answer's marks are those that its notes have not got: which, cannot be known.
        known = 0.0 if marks else 1.0
        pieces += [(line, known), (answer, ANSWER_WEIGHT), (end, known)]
    pieces.append(([tokenizer.ids.im_end], 1.0))
    reply = [token for piece, _ in pieces for token in piece]
    weight = [weight for piece, weight in pieces for _ in piece]
    return encode_reply(tokenizer, task, times, size, reply, weight, REPLY)


def encode_tail(tokenizer: Tokenizer, task: tasks.Task) -> list[int]:
    """What stands between a clip and the turn's end."""
    if task.notes is None:
        return tokenizer.encode(task.tail)
    if task.marks is None:
        return tokenizer.encode(f"Notes: {task.notes}\n{task.tail}")
    before, after, *_ = (tokenizer.encode(mark) for mark in task.marks)
    return [
        *before,
        *tokenizer.encode_memory(task.notes),
        *after,
        *tokenizer.encode(f"\n{task.tail}"),
    ]


def encode_talk(
    tokenizer: Tokenizer,
    notes: str,
    turns: Sequence[tuple[str, str]],
    times: np.ndarray | tuple[()] = (),
    size: int = TALK_PREFIX,
):
    """Notes and many exchanges about them, one after another; the replies are to be learnt.

    Before the notes stands a clip, if it has frames at `times`.
    """
    reply, weight = [], []
    for asked, answer in turns:
        space = "" if answer.isdigit() or not answer else " "
        ask, told = tokenizer.encode(asked), tokenizer.encode(f"{space}{answer}\n")
        if len(reply) + len(ask) + len(told) > TALK:
            break
        reply += [*ask, *told]
        weight += [0.0] * len(ask) + [1.0] * len(told)
    task = tasks.Task("", (), notes, "")
    return encode_reply(tokenizer, task, np.array(times), size, reply, weight, TALK)


def encode_reply(tokenizer, task, times, size, reply, weight, room):
    """A prompt and the ids that go on from it, with the weight of each in the loss."""
    asked = (tokenizer, task.question, task.options)
    long = prompt.write_prefix(*asked, times, GRID, 4 * size)
    used = int(long.mask.sum())
    tail = [*encode_tail(tokenizer, task), *prompt.turn_end(tokenizer)]
    total = used + len(tail)
    if total > size or len(reply) > room:
        raise ValueError(f"an exchange takes {total} + {len(reply)} tokens: raise the sizes")
    position = int(long.next_position) + np.arange(len(tail))
    tokens, slot = long.tokens[:size].copy(), long.slot[:size].copy()
    positions = long.positions[:, :size].copy()
    tokens[used:total], positions[:, used:total] = tail, position
    return {
        # The prompt's last token opens the reply.
        "tokens": tokens,
        "positions": positions,
        "mask": np.arange(size) < total - 1,
        "slot": slot,
        "last": np.int32(tail[-1]),
        "position": np.int32(position[-1]),
        "reply": np.pad(np.array(reply, np.int32), (0, room - len(reply))),
        "length": np.int32(len(reply)),
        "weight": np.pad(np.array(weight, np.float32), (0, room - len(weight))),
    }


def draw(rng: np.random.Generator, tokenizer: Tokenizer, painter: scenes.Painter, part: Part):
    """One step's exchanges: with frames, about texts, many about one text, many about one clip."""
    chances, frames = CARDS[part.frames], FRAMES[part.frames]
    size = PAIR_PREFIX if part.frames == "pair" else CLIP_PREFIX

    def shown():
        number = int(rng.choice(len(chances), p=chances))
        palette = part.pointing.palette(rng)
        cards = tasks.draw_cards(rng, number, palette=palette)
        return cards, palette, painter.scene(rng, cards, frames)

    seen, watched = [], []
    for _ in range(part.seen):
        cards, palette, scene = shown()
        if part.frames == "pair":
            task = tasks.of_frames(cards)
        else:
            task = tasks.with_clip(rng, cards, part.pointing, palette)
        row = encode(tokenizer, part.dressed(rng, task), scene.times, size)
        seen.append(row | {"patches": scene.patches})
    texts = (tasks.without_clip(rng, part.pointing) for _ in range(part.texts))
    read = [
        encode(tokenizer, part.dressed(rng, task), np.zeros((0,)), TEXT_PREFIX) for task in texts
    ]
    talks = [encode_talk(tokenizer, *tasks.talk(rng, part.pointing)) for _ in range(part.talks)]
    for _ in range(part.clip_talks):
        cards, palette, scene = shown()
        notes, turns = tasks.talk(rng, part.pointing, cards, palette)
        row = encode_talk(tokenizer, notes, turns, scene.times, size)
        watched.append(row | {"patches": scene.patches})
    stack = lambda rows: {k: np.stack([r[k] for r in rows]) for k in rows[0]}  # noqa: E731
    return [stack(rows) for rows in (seen, read, talks, watched) if rows]


def replies(model: Qwen3VL, batch):
    """Cross-entropy of each reply token, and whether it is the likeliest: [n, c].

    What is not to be learnt is free and right.
    """
    n, room = batch["reply"].shape
    features, slot = None, None
    if "patches" in batch:
        where = jnp.broadcast_to(video.patch_positions(*SIZE), (n, GRID[0] * GRID[1], 2))
        features = model.see(batch["patches"], where, jnp.broadcast_to(jnp.array(GRID), (n, 2)))
        slot = batch["slot"]
    positions = jnp.moveaxis(batch["positions"], 1, 0)
    _, kv = model.prefill(batch["tokens"], positions, batch["mask"], features, slot, hidden=False)
    inputs = jnp.concatenate([batch["last"][:, None], batch["reply"][:, :-1]], 1)[:, None]
    position = jnp.broadcast_to(batch["position"][:, None, None] + jnp.arange(room), inputs.shape)
    mask = jnp.arange(room) < batch["length"][:, None]
    hidden = model.complete(
        inputs, jnp.broadcast_to(position, (3, *position.shape)), mask[:, None], kv, batch["mask"]
    )
    logp = jax.nn.log_softmax(model.logits(hidden[:, 0]))
    chosen = jnp.take_along_axis(logp, batch["reply"][..., None], -1)[..., 0]
    learn = batch["weight"] > 0
    return -chosen * learn, (jnp.argmax(logp, -1) == batch["reply"]) | ~learn


def whole_replies(model: Qwen3VL, batch):
    """Share of replies that greedy decoding gets entirely right."""
    return replies(model, batch)[1].all(-1).mean()


def train_step(graph, transform, state, frozen, batches):
    """One update on all kinds of exchanges; the losses of each."""
    params, opt = state

    def loss(params):
        model, parts = nnx.merge(graph, params, frozen), []
        for batch in batches:
            nll = replies(model, batch)[0] * batch["weight"]
            parts.append(nll.sum() / batch["weight"].sum())
        return sum(parts), jnp.stack(parts)

    grads, value = jax.grad(loss, has_aux=True)(params)
    updates, opt = transform.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), value


def main(out: pathlib.Path, seed: int) -> None:
    """Trains the base and leaves it in a folder."""
    tokenizer = Tokenizer.train(tasks.corpus(seed), vocab_size=640)
    config = preset("tiny", vocab_size=-(-len(tokenizer) // 8) * 8)
    painter = scenes.Painter(SIZE)

    ids = tokenizer.ids
    config = dataclasses.replace(
        config,
        video_token_id=ids.video_pad,
        image_token_id=ids.image_pad,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
    )
    model = fresh_model(config, seed)
    print(f"{len(tokenizer)} tokens, {parameter_count(model):,} parameters")
    tower.train(model.visual, optimizer(TOWER_STEPS), SIZE, TOWER_STEPS, TOWER_PAIRS, seed)
    graph, params, frozen = nnx.split(model, lambda path, _: path[0] != "visual", ...)
    right = jax.jit(lambda *params, batch: whole_replies(nnx.merge(graph, *params), batch))
    out.mkdir(parents=True, exist_ok=True)

    def save(params):
        convert.save_pretrained(nnx.merge(graph, params, frozen), out)
        tokenizer.save(out, tags=False)

    save(params)
    begin = 0
    for rate, parts in COURSES:
        transform = optimizer(sum(part.steps for part in parts), rate)
        state = params, transform.init(params)
        step = jax.jit(functools.partial(train_step, graph, transform), donate_argnums=0)
        for part in parts:
            state = train(part, begin, state, frozen, step, right, painter, tokenizer, save, seed)
            begin += part.steps
        params = state[0]


def fresh_model(config: Qwen3VLConfig, seed: int) -> Qwen3VL:
    """A model to train from nothing, with a start that spares it most of the way to look-ups.

    Blocks start as the identity, and token embeddings as large as what blocks will add, so that
    deeper layers find the tokens that they compare. Heads of the first layer start by looking one
    and two tokens back: to look up what stands after a word, or on the next card, is then one more
    head. In 250 steps on texts the head that looks one back took recall from 64% to 99%.
    """
    model = Qwen3VL(config, rngs=nnx.Rngs(seed))
    decoder, vision, text = model.language_model, model.visual, config.text
    attention, d, h = decoder.layers.self_attn, text.hidden_size, text.head_dim
    for linear in (
        attention.o_proj,
        decoder.layers.mlp.down_proj,
        vision.blocks.attn.proj,
        vision.blocks.mlp.linear_fc2,
    ):
        linear.kernel[...] = jnp.zeros_like(linear.kernel[...])

    # A part that all embeddings share gives queries and keys a constant part, for which the
    # projections have no bias. It moves all logits alike, which is nothing.
    keys = jax.random.split(jax.random.key(seed), 1 + len(LOOKS_BACK))
    shared = jax.random.normal(keys[0], (d,))
    table = decoder.embed_tokens
    table[...] = table[...] * math.sqrt(d) + shared
    decoder.norm.scale[...] = decoder.norm.scale[...] / math.sqrt(d)

    # The key of a constant query, turned by so many positions: their product is largest there.
    turning = jnp.arange(h // 2) < 3  # the frequencies that tell neighbours apart
    query = jnp.concatenate([turning, jnp.zeros(h // 2)])
    constant = shared[:, None] / jnp.linalg.norm(shared)
    group = text.num_attention_heads // text.num_key_value_heads
    for kv_head, back in enumerate(LOOKS_BACK):
        angle = back * layers.frequencies(h, text.rope_theta)
        key = jnp.concatenate([turning * jnp.cos(angle), turning * jnp.sin(angle)])
        head = kv_head * group
        for linear, at, direction in (
            (attention.q_proj, head, query),
            (attention.k_proj, kv_head, key),
        ):
            kernel = linear.kernel[...].at[0, :, at * h : (at + 1) * h].set(constant * direction)
            linear.kernel[...] = kernel
        out = jax.random.normal(keys[1 + kv_head], (h, d)) * h**-0.5
        kernel = attention.o_proj.kernel[...].at[0, head * h : (head + 1) * h].set(out)
        attention.o_proj.kernel[...] = kernel
    for norm in (attention.q_norm, attention.k_norm):
        norm.scale[...] = norm.scale[...].at[0].set(1 + 0.8 * jnp.tile(turning, 2))
    return model


def optimizer(steps: int, rate: float = 1.0) -> optax.GradientTransformation:
    """Muon for the matrices of layers, Adam for the rest, at `rate` of the peak learning rates.

    On texts alone the loss was 0.41 after 300 steps, and 0.74 with AdamW for all.
    """
    muon, adam = (
        optax.warmup_cosine_decay_schedule(0.0, rate * peak, 50, steps)
        for peak in (MUON_RATE, ADAM_RATE)
    )

    def matrices(params):
        def dimensions(path, leaf):
            names = [str(getattr(key, "key", key)) for key in path]
            matrix = "kernel" in names and "patch_embed" not in names
            # Layers are stacked: the last two axes are a layer's matrix.
            return (
                optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if matrix else None
            )

        return jax.tree_util.tree_map_with_path(dimensions, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            muon,
            adam_learning_rate=adam,
            adam_b2=0.98,
            weight_decay=0.01,
            muon_weight_dimension_numbers=matrices,
        ),
    )


def train(part: Part, begin: int, state, frozen, step, right, painter, tokenizer, save, seed):
    """Trains for one part; returns the state, whose parameters are saved on the way."""
    pool, losses = concurrent.futures.ThreadPoolExecutor(1), []

    def exchanges(i):
        rng = np.random.default_rng([seed, i])
        return pool.submit(draw, rng, tokenizer, painter, part)

    coming = exchanges(begin)
    bar = trange(begin, begin + part.steps, desc=f"base, {part.frames}s", unit="step")
    for i in bar:
        batches = coming.result()
        coming = exchanges(i + 1)
        state, loss = step(state, frozen, batches)
        losses.append(jax.device_get(loss))
        last = i == begin + part.steps - 1
        if i % 50 == 49 or last:
            whole = [float(right(state[0], frozen, batch=batch)) for batch in batches]
            parts = ", ".join(f"{x:.3f}" for x in np.mean(losses[-50:], axis=0))
            bar.write(f"step {i + 1}: losses {parts}; whole replies right {whole}")
        if i % 250 == 249 or last:
            save(state[0])
    return state


if __name__ == "__main__":
    parser = command_line.parser_of("videomem_jax.pretrain", __doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the base model")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tasks and order")
    given = parser.parse_args()
    main(given.out, given.seed)
