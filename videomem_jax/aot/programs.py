"""Every jitted step of a run, lowered with shapes in place of arrays: no weights are needed."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from videomem_jax import grammar, memory, sharding
from videomem_jax import settings as cfg
from videomem_jax.batch import Batch, Chain, Clip, Prefix
from videomem_jax.evaluate import Evaluator
from videomem_jax.models.config import ConfigError, Qwen3VLConfig
from videomem_jax.models.presets import preset
from videomem_jax.models.qwen3_vl import Qwen3VL, abstract
from videomem_jax.tokenizer import TokenIds
from videomem_jax.trainer import Trainer


class Step(NamedTuple):
    """One step of a run; `lower` traces it."""

    name: str
    lower: Callable[[], jax.stages.Lowered]


def architecture(s: cfg.Settings) -> Qwen3VLConfig:
    """The model's sizes: from its folder if it is there, else from the size in the folder's name.

    Raises:
      ConfigError: neither says.
    """
    folder = pathlib.Path(s.model.weights)
    if s.model.weights and (folder / "config.json").is_file():
        return Qwen3VLConfig.load(folder)
    size = re.search(r"(?<!\d)(\d+b)(?![a-z])", folder.name.lower())
    if s.model.weights and not size:
        raise ConfigError(
            f"config.model.weights={s.model.weights!r}: --aot needs the model's sizes, but there "
            f"is no such folder and its name says none: give one like Qwen3-VL-8B-Instruct"
        )
    return preset(size[1] if size else "tiny")


def steps(s: cfg.Settings, config: Qwen3VLConfig, mesh: Mesh) -> Iterator[Step]:
    """The steps that a run with these settings compiles, and its evaluation."""
    form = stand_in(s, config)

    def model(dtype=s.model.param_dtype) -> Qwen3VL:
        made = abstract(
            config, jnp.dtype(s.model.dtype), remat=s.model.remat, attention=s.model.attention
        )
        graph, state = nnx.split(made)
        cast = lambda a: jax.ShapeDtypeStruct(a.shape, dtype)  # noqa: E731
        return nnx.merge(graph, jax.tree.map(cast, state))

    def told(b: int) -> Batch:
        shard = sharding.batch_sharding(mesh)
        one = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shard)  # noqa: E731
        return jax.tree.map(one, batch(s, config, b))

    if s.coldstart.steps:

        def supervised():
            t = Trainer(model(), form, s, mesh, "coldstart")
            return t.supervised_step.lower(t.first, t.frozen, told(s.coldstart.batch))

        yield Step("coldstart", supervised)
    if s.prpo.steps:
        t = Trainer(model(), form, s, mesh, "prpo")
        same = sharding.replicated(mesh)
        key = sharding.place(jax.eval_shape(lambda: jax.random.key(0)), same)
        args = (t.first.trained, t.frozen, told(s.prpo.batch), key, t.first.step)
        yield Step("rollout", lambda: t.rollout_step.lower(*args))

        def update():
            rows = jax.eval_shape(t.rollout_step, *args)[0]
            return t.update_step.lower(t.first, t.frozen, t.reference, rows)

        yield Step("update", update)

    def evaluation():
        evaluator = Evaluator(model(), form, mesh)
        params = evaluator.place(model())
        return evaluator.read_step.lower(params, form.grammar, told(s.eval.batch), None)

    yield Step("evaluation", evaluation)


def batch(s: cfg.Settings, config: Qwen3VLConfig, b: int) -> Batch:
    """The shapes of a batch of b examples, as `data.pipeline` makes them."""
    t, p, v = s.prompt.segments, s.prompt.prefix_tokens, config.vision
    # A text model's batches have the (empty) clips of a Qwen3-VL's.
    patch, temporal, values = (
        (v.patch_size, v.temporal_patch_size, v.patch_dim) if v else (16, 2, 1536)
    )
    patches = s.prompt.max_pixels // patch**2
    pairs = s.prompt.frames // temporal
    shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    whole = jnp.int32
    return Batch(
        prefix=Prefix(
            tokens=shape(whole, b, t, p),
            positions=shape(whole, b, t, 3, p),
            mask=shape(bool, b, t, p),
            slot=shape(whole, b, t, p),
            next_position=shape(whole, b, t),
        ),
        clip=Clip(
            patches=shape(jnp.uint8, b, t, pairs, patches, values),
            patch_positions=shape(whole, b, t, patches, 2),
            grid=shape(whole, b, t, 2),
        ),
        chain=Chain(
            memory=shape(whole, b, t, s.memory.slots),
            length=shape(whole, b, t),
            answer=shape(whole, b, t),
        ),
        gold=shape(whole, b),
        so_far=shape(whole, b, t),
        choices=shape(whole, b, s.prompt.options, s.prompt.answer_tokens),
        record=shape(whole, b),
        real=shape(bool, b),
    )


class _Vocabulary:
    """As much of a tokenizer as the format asks of it: the last ids have a meaning."""

    def __init__(self, size: int):
        last = range(size - 1, -1, -1)
        self.ids = TokenIds(*last[:11], letters=tuple(last[11:21]))

    def text_mask(self, size: int) -> np.ndarray:
        return np.arange(size) < self.ids.answer_close


def stand_in(s: cfg.Settings, config: Qwen3VLConfig) -> memory.Format:
    """A format of the right sizes: which ids mean what changes no program."""
    vocabulary = _Vocabulary(config.text.vocab_size)
    built = grammar.build(
        vocabulary,
        config.text.vocab_size,
        s.memory.slots,
        s.prompt.answer_tokens,
        from_memory=s.prompt.from_memory,
    )
    ids = vocabulary.ids
    # </memory>, then the turn's end: <|im_end|> newline <|im_start|> "assistant" newline.
    return memory.Format(built, ids, (ids.im_end, 0, ids.im_start, 1, 0))
