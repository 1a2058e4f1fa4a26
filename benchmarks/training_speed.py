"""What a step of PRPO costs on this machine: against GRPO, and as its sizes grow.

    python -m benchmarks.training_speed                 # all rows, about 30 minutes
    python -m benchmarks.training_speed --rows grpo     # one of them
    python -m benchmarks.training_speed --small         # sizes that only show that it runs

A model of 14M parameters with random weights reads clips with prompts of about 2,000 tokens and
samples 8 completions of 64 tokens each, in 4 segments. No sample ends early.

  grpo      a step (rollout and update) against GRPO, which is PRPO with psp and tcr off: each
            completion goes on with a memory, and so a prompt, of its own
  shared    the update with the prompt of a group run once, against once for each completion; the
            gradients are compared, too
  group     tokens sampled a second, by the number of completions
  growth    seconds of a step by the number of segments, of frames, and of memory tokens

Runs of the two sides alternate, and medians are shown. Floors are operations (`aot.account`: what
the method needs, nothing twice) over the fastest float32 matrix product measured here, and for
sampling the bytes of the weights over those that a product with a vector reads a second, whichever
takes longer.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from benchmarks.side_by_side import (
    OUTSIDE,
    Size,
    clock,
    make_batch,
    make_config,
    matmul_rate,
    side_by_side,
    small_size,
    whole_samples,
)
from videomem_jax import command_line, run, sharding
from videomem_jax import settings as cfg
from videomem_jax.aot import account
from videomem_jax.batch import Batch
from videomem_jax.models.config import Qwen3VLConfig
from videomem_jax.models.qwen3_vl import Qwen3VL, parameter_count
from videomem_jax.tokenizer import Tokenizer
from videomem_jax.trainer import Rows, Trainer, TrainState

ROWS = ("grpo", "shared", "group", "growth")
GROUPS = (1, 2, 4, 8, 16, 32)
GROWTH = {"segments": (1, 2, 4, 8), "frames": (8, 16, 24, 32), "memory tokens": (15, 31, 63, 127)}


class Shape(NamedTuple):
    """Sizes of a step: T, frames of a clip, tokens of a completion, G, examples."""

    segments: int = 4
    frames: int = 30
    completion: int = 64
    group: int = 8
    batch: int = 1


class Rates(NamedTuple):
    """What the machine does at best: operations and bytes a second."""

    operations: float
    bytes: float


def rates() -> Rates:
    """Of the fastest of several matrix products, and of reading a matrix once, in float32."""
    many, read = jnp.ones((64, 1024, 1024)), jax.jit(lambda a: a @ jnp.ones(a.shape[-1]))
    seconds = min(clock(lambda: read(many).block_until_ready()) for _ in range(9))
    return Rates(matmul_rate(), many.nbytes / seconds)


def paired(repeats: int, *calls: Callable[[], Any]) -> list[float]:
    """Medians of the seconds of calls that take turns; each is called once before."""
    first, *others = (lambda *_, once=once: jax.block_until_ready(once()) for once in calls)
    return side_by_side(repeats, time.perf_counter, first, *others)


def size_of(tokenizer: Tokenizer, small: bool) -> Size:
    """14M parameters (11M of them the decoder's layers), or (small) some that only show it runs."""
    if small:
        return small_size(tokenizer.ids)
    config = make_config(
        tokenizer.ids,
        vocab=2048,
        width=384,
        hidden=1024,
        layers=7,
        heads=6,
        kv=2,
        head=64,
        depth=4,
        tower=128,
        tower_hidden=512,
        tower_heads=2,
        deepstack=(1,),
    )
    return Size(config, 4, 15, (14, 32))


class Bench:
    """A random model and the steps that train it, made as training makes them."""

    def __init__(self, small: bool):
        self.tokenizer = Tokenizer.load(run.BASE)
        self.size = size_of(self.tokenizer, small)
        self.config = self.size.config
        model = Qwen3VL(self.config, rngs=nnx.Rngs(0))
        self.parameters = parameter_count(model)
        self._graph, self._state = nnx.split(model)

    def settings(self, shape: Shape, batch: Batch, **prpo: Any) -> cfg.Settings:
        """Of PRPO on a batch of these sizes; a micro-batch of the update is one prompt."""
        height, width = self.size.grid
        prompts = shape.segments * shape.batch * (1 if prpo.get("psp", True) else shape.group)
        sizes = {"group_size": shape.group, "batch": shape.batch, "accumulate": prompts}
        return cfg.Settings(
            model=cfg.Model(chunk=1024),
            prompt=cfg.Prompt(
                segments=shape.segments,
                frames=shape.frames,
                max_pixels=256 * height * width,
                prefix_tokens=batch.prefix.tokens.shape[-1],
            ),
            memory=cfg.Memory(slots=shape.completion - OUTSIDE, budget=0),
            prpo=cfg.PRPO(**sizes | prpo),
        )

    def batch(self, shape: Shape) -> Batch:
        """Examples with random frames."""
        size = self.size._replace(segments=shape.segments, pairs=shape.frames // 2)
        return make_batch(self.tokenizer, size, shape.completion - OUTSIDE, shape.batch)

    def trainer(self, s: cfg.Settings) -> Trainer:
        """The steps with these settings; no sample ends before it has all its tokens."""
        form = whole_samples(self.tokenizer, self.config.text.vocab_size, s.memory.slots)
        # A copy: a step may take the place of what it was given.
        model = nnx.merge(self._graph, jax.tree.map(jnp.copy, self._state))
        return Trainer(model, form, s, sharding.make_mesh(s.mesh, jax.devices()[:1]), "prpo")


class Step:
    """One trainer's rollout, update, and both."""

    def __init__(self, trainer: Trainer, batch: Batch):
        self.trainer, self.key = trainer, jax.random.key(0)
        self.batch = jax.device_put(batch)

    def rollout(self) -> Rows:
        """All segments."""
        t = self.trainer
        first = t.first
        rows, _ = t.rollout_step(first.trained, t.frozen, self.batch, self.key, first.step)
        return rows

    def update(self, rows: Rows) -> TrainState:
        """One optimizer step from the first state, which stays as it is."""
        t = self.trainer
        state = jax.tree.map(jnp.copy, t.first)
        return t.update_step(state, t.frozen, t.reference, rows)[0]

    def whole(self) -> TrainState:
        """A step of training."""
        return self.update(self.rollout())


def apart(rows: Rows) -> Rows:
    """Every completion as a row of its own, with the prompt that it shared."""
    r = rows.tokens.shape[2]
    deep = rows.features.deepstack

    def own(a):
        return a.reshape(a.shape[0], -1, 1, *a.shape[3:])

    many = lambda a: jnp.repeat(a, r, axis=1)  # noqa: E731
    told = ("tokens", "mask", "weights", "old", "advantages")
    features = rows.features._replace(
        embeds=many(rows.features.embeds), deepstack=jnp.repeat(deep, r, axis=2)
    )
    return rows._replace(
        prefix=jax.tree.map(many, rows.prefix),
        features=features,
        choices=many(rows.choices),
        before=jax.tree.map(many, rows.before),
        **{name: own(getattr(rows, name)) for name in told},
    )


def first_moments(state: TrainState) -> list[np.ndarray]:
    """Of AdamW after one step: the gradient, times a constant."""
    is_adam = lambda x: hasattr(x, "mu") and hasattr(x, "nu")  # noqa: E731
    adam = next(s for s in jax.tree.leaves(state.opt, is_leaf=is_adam) if is_adam(s))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(adam.mu)]


def needed(s: cfg.Settings, config: Qwen3VLConfig) -> dict[str, float]:
    """Operations of a rollout and an update, nothing computed twice."""
    steps = account.Account(s, config, flash=False).steps()
    return {name: steps[name].model for name in ("rollout", "update")}


def grpo(bench: Bench, rate: Rates, shape: Shape, repeats: int) -> None:
    """PRPO against GRPO."""
    batch = bench.batch(shape)
    sides = {"PRPO": {}, "GRPO": {"psp": False, "tcr": False}}
    settings = {name: bench.settings(shape, batch, **how) for name, how in sides.items()}
    steps = {name: Step(bench.trainer(s), batch) for name, s in settings.items()}
    rows = {name: step.rollout() for name, step in steps.items()}
    calls = [step.rollout for step in steps.values()]
    calls += [lambda n=n, step=step: step.update(rows[n]) for n, step in steps.items()]
    found = paired(repeats, *calls)
    seconds = {n: (found[i], found[i + 2]) for i, n in enumerate(sides)}
    counts = {n: needed(s, bench.config) for n, s in settings.items()}
    print(f"\n{'':6} {'rollout':>9} {'update':>9} {'step':>9} {'floor':>9}  seconds")
    for name, (roll, update) in seconds.items():
        floor = sum(counts[name].values()) / rate.operations
        print(f"{name:6} {roll:9.2f} {update:9.2f} {roll + update:9.2f} {floor:9.2f}")
    time_of = [sum(seconds[name]) for name in sides]
    count_of = [sum(counts[name].values()) for name in sides]
    real, allowed = time_of[1] / time_of[0], count_of[1] / count_of[0]
    print(
        f"a step of PRPO is {real:.2f} x as fast (bar 5); operations allow {allowed:.2f} x, "
        f"{allowed / real:.2f} times as much (bar 1.3)"
    )


def shared(bench: Bench, rate: Rates, shape: Shape, repeats: int) -> None:
    """The update with a group's prompt shared and not."""
    batch = bench.batch(shape)
    settings = bench.settings(shape, batch)
    many = shape.segments * shape.batch * shape.group
    one = Step(bench.trainer(settings), batch)
    other = Step(bench.trainer(bench.settings(shape, batch, accumulate=many)), batch)
    rows = one.rollout()
    alone = jax.device_put(apart(rows), other.trainer.row_shardings)
    together, separate = first_moments(one.update(rows)), first_moments(other.update(alone))
    largest = max(np.abs(g).max() for g in separate)
    gap = max(np.abs(a - b).max() for a, b in zip(together, separate, strict=True)) / largest
    times = paired(repeats, lambda: one.update(rows), lambda: other.update(alone))
    counts = account.Account(settings, bench.config, flash=False)
    z = account.sizes(settings, shape.batch, 1, shape.group)
    lone = dataclasses.replace(z, rows=z.rows * z.each, each=1)
    floors = [
        shape.segments * counts.learning(size, True, False).model / rate.operations
        for size in (z, lone)
    ]
    print(f"\n{'update':10} {'seconds':>9} {'floor':>9}")
    for name, seconds, floor in zip(("shared", "not"), times, floors, strict=True):
        print(f"{name:10} {seconds:9.2f} {floor:9.2f}")
    print(
        f"shared {times[1] / times[0]:.2f} x as fast (bar 4; operations allow "
        f"{floors[1] / floors[0]:.2f} x); gradients differ by {gap:.1e} of the largest"
    )


def group(bench: Bench, rate: Rates, shape: Shape, repeats: int, groups: Sequence[int]) -> None:
    """Tokens a second against the group's size, in a rollout of one segment."""
    print(
        f"\n{'G':>3} {'tokens/s':>9} {'seconds':>9} {'floor':>9} {'read':>9} {'weights':>9} "
        f"{'products':>9}  seconds of the floor's parts"
    )
    steps, floors = [], []
    for count in groups:
        size = shape._replace(segments=1, group=count)
        batch = bench.batch(size)
        s = bench.settings(size, batch)
        steps.append(Step(bench.trainer(s), batch))
        counts = account.Account(s, bench.config, flash=False)
        z = account.sizes(s, size.batch, 1, count)
        prefill = counts.sampling(dataclasses.replace(z, completion=0)).model
        see = needed(s, bench.config)["rollout"] - counts.sampling(z).model
        drawn = counts.sampling(z).model - prefill
        read = (prefill + see) / rate.operations
        weights = size.completion * account.decode_bytes(s, bench.config, 1, 0) / rate.bytes
        floors.append((read, weights, drawn / rate.operations))
    times = paired(repeats, *(step.rollout for step in steps))
    for count, seconds, (read, weights, products) in zip(groups, times, floors, strict=True):
        tokens = count * shape.completion * shape.batch
        floor = read + max(weights, products)
        print(
            f"{count:3d} {tokens / seconds:9.0f} {seconds:9.2f} {floor:9.2f} {read:9.2f} "
            f"{weights:9.2f} {products:9.2f}"
        )


def growth(
    bench: Bench, shape: Shape, repeats: int, sizes: dict[str, Sequence[int]], out: pathlib.Path
) -> None:
    """Seconds of a step against each of its sizes, with a plot."""
    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(sizes))
    change = {
        "segments": lambda n: shape._replace(segments=n),
        "frames": lambda n: shape._replace(frames=n),
        "memory tokens": lambda n: shape._replace(completion=n + OUTSIDE),
    }
    for axes, (what, values) in zip(panels, sizes.items(), strict=True):
        steps = []
        for value in values:
            size = change[what](value)
            batch = bench.batch(size)
            s = bench.settings(size, batch)
            steps.append(Step(bench.trainer(s), batch))
        times = np.array(paired(repeats, *(step.whole for step in steps)))
        slope, start = np.polyfit(values, times, 1)
        off = np.abs(times / (start + slope * np.array(values)) - 1).max()
        print(f"\n{what:>14} {'seconds':>9} {'line':>9}")
        for value, seconds in zip(values, times, strict=True):
            print(f"{value:14d} {seconds:9.2f} {start + slope * value:9.2f}")
        print(f"{start:.2f} + {slope:.3f} s each; at most {off:.1%} off that line")
        axes.plot(values, times, "o", color="#2a6fbb", label="measured")
        axes.plot(values, start + slope * np.array(values), color="#8a8f98", label="line")
        axes.set_xlabel(what)
        axes.set_ylabel("seconds of a step")
        axes.set_xlim(0)
        axes.set_ylim(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(
        f"A step of PRPO: {shape.segments} segments of {shape.frames} frames, {shape.group} "
        f"completions of {shape.completion} tokens, one of them changed",
        fontsize=11,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    print(f"\nplot: {out}")


def main() -> None:
    """Measures the rows asked for and prints a table of each."""
    parser = command_line.parser_of("benchmarks.training_speed", __doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (3)")
    parser.add_argument("--small", action="store_true", help="sizes that only show that it runs")
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        default=pathlib.Path("runs/training_speed.png"),
        help="of the growth",
    )
    flags: argparse.Namespace = parser.parse_args()
    bench, shape = Bench(flags.small), Shape()
    groups, sizes = GROUPS, GROWTH
    if flags.small:
        shape, groups = Shape(2, 4, 16, 4), (1, 4)
        sizes = {"segments": (1, 2), "frames": (2, 4), "memory tokens": (7, 9)}
    rate = rates()
    length = bench.batch(shape).prefix.tokens.shape[-1] + shape.completion
    print(
        f"{bench.parameters / 1e6:.1f}M parameters; prompts of about {length} tokens; jax "
        f"{jax.__version__}; {rate.operations / 1e9:.0f} GFLOP/s, {rate.bytes / 1e9:.1f} GB/s"
    )
    if "grpo" in flags.rows:
        grpo(bench, rate, shape, flags.repeats)
    if "shared" in flags.rows:
        shared(bench, rate, shape, flags.repeats)
    if "group" in flags.rows:
        group(bench, rate, shape, flags.repeats, groups)
    if "growth" in flags.rows:
        smaller = shape._replace(frames=min(shape.frames, 16))
        growth(bench, smaller, flags.repeats, sizes, flags.plot)


if __name__ == "__main__":
    command_line.entry(main)
