"""Speed of a training step of PRPO against transformers on torch, side by side on this CPU.

    python -m benchmarks.torch_prpo      # about 18M parameters, medians of 3: 6 minutes

One step is a rollout (T clips in a row, each with its prompt of about 2,000 tokens and G samples of
64, rewards, advantages, the draw of the memory) and an update (clipped objective, entropy bonus,
AdamW). Both start from the same random weights, see the same frames and read the same tokens: what
ours samples, theirs is made to sample too, with softmax and draw all the same. Both go on training,
and at every step loss, gradient norm and log-probabilities are held against each other: it is the
same step. (The bonus is the demo's. Without it the loss of an update that follows its rollout is 0
whatever the model is, for the advantages of a group sum to 0; that it agrees would say nothing.)

Theirs is what the field does at its best (`torch_loop`).

Beside each row is the floor of either way: its operations over the fastest matrix product measured
here. A backward pass counts as two forward ones.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import jax
import numpy as np
import torch
from flax import nnx

from benchmarks.side_by_side import (
    OUTSIDE,
    Size,
    make_batch,
    make_config,
    matmul_rate,
    operations,
    whole_samples,
)
from benchmarks.torch_loop import Step, Theirs
from videomem_jax import command_line, run, sharding
from videomem_jax import memory as mem
from videomem_jax import settings as cfg
from videomem_jax.batch import Batch
from videomem_jax.models.qwen3_vl import Qwen3VL, parameter_count
from videomem_jax.tokenizer import Tokenizer
from videomem_jax.trainer import Rows, Trainer

BAR = 4.0


def size_of(tokenizer: Tokenizer, args: argparse.Namespace) -> Size:
    """The sizes asked for, or (small) some that only show that it runs."""
    width, layers = (128, 2) if args.small else (args.width, args.layers)
    # The tower costs about as much for a clip as the decoder, as in Qwen3-VL-2B.
    config = make_config(
        tokenizer.ids,
        vocab=1024 if args.small else 8192,
        width=width,
        hidden=width * 8 // 3,
        layers=layers,
        heads=width // 64,
        kv=max(1, width // 192),
        head=64,
        depth=4,
        tower=width // 2,
        tower_hidden=2 * width,
        tower_heads=max(1, width // 128),
        deepstack=(1, 2),
    )
    if args.small:
        return Size(config, 2, 2, (4, 6))
    return Size(config, args.segments, args.pairs, (14, 32))


def settings_of(size: Size, args: argparse.Namespace) -> cfg.Settings:
    """The run's settings; what they do not say is the paper's."""
    slots = args.tokens - OUTSIDE
    return cfg.Settings(
        memory=cfg.Memory(slots=slots, budget=slots),
        prompt=cfg.Prompt(segments=size.segments),
        prpo=cfg.PRPO(
            batch=args.batch,
            group_size=args.group,
            accumulate=size.segments,
            entropy_coef=0.005,
            optimizer=cfg.Optimizer(learning_rate=args.rate, warmup=0, final=1.0),
        ),
    )


class Ours:
    """The step as training makes it."""

    def __init__(self, model: Qwen3VL, form: mem.Format, settings: cfg.Settings, batch: Batch):
        mesh = sharding.make_mesh(cfg.Mesh(1, 1, 1), jax.devices()[:1])
        self.trainer = Trainer(model, form, settings, mesh, "prpo")
        self.state, self.batch = self.trainer.first, batch

    def step(self, number: int) -> tuple[Step, Rows]:
        """The next step, and the completions that it learnt from."""
        made, key = self.trainer, jax.random.key(number)
        began = time.perf_counter()
        rows, _ = jax.block_until_ready(
            made.rollout_step(self.state.trained, made.frozen, self.batch, key, self.state.step)
        )
        rolled = time.perf_counter()
        self.state, said = jax.block_until_ready(
            made.update_step(self.state, made.frozen, made.reference, rows)
        )
        ended = time.perf_counter()
        loss, norm = float(said["loss"]), float(said["grad_norm"])
        rows = jax.tree.map(np.asarray, rows)
        old, advantages = rows.old, rows.advantages[..., 0]
        return Step(rolled - began, ended - rolled, loss, norm, old, advantages), rows


def floors(size: Size, prompt: int, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Operations of rollout and update, of ours and of theirs."""
    parts, clips = operations(size), size.segments * args.batch
    written = args.group * parts.write(args.tokens, prompt)
    rollout = clips * (parts.see + parts.read(prompt) + written)
    shared = 3 * clips * (parts.read(prompt) + written)
    apart = 3 * clips * args.group * (parts.read(prompt) + parts.write(args.tokens, prompt))
    found = {"rollout": (rollout, rollout), "update": (shared, apart)}
    return found | {"whole": (rollout + shared, rollout + apart)}


def gaps(mine: Step, other: Step) -> dict[str, float]:
    """By how much two steps differ; loss and norm relative to ours."""
    return {
        "loss": abs(other.loss / mine.loss - 1),
        "gradient norm": abs(other.norm / mine.norm - 1),
        "log-probabilities": float(np.abs(other.old - mine.old).max()),
        "advantages": float(np.abs(other.advantages - mine.advantages).max()),
    }


def steps(ours: Ours, theirs: Theirs, count: int) -> Iterator[tuple[Step, Step]]:
    """So many steps of both, by turns."""
    for number in range(count):
        mine, rows = ours.step(number)
        yield mine, theirs.step(rows, number)


def main(argv: list[str] | None = None) -> list[tuple[Step, Step]]:
    """Prints how the steps agree, and the table; returns the steps, the one that warms up first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="steps timed, after one")
    parser.add_argument("--small", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--width", type=int, default=384, help="of the decoder")
    parser.add_argument("--layers", type=int, default=6, help="of the decoder")
    parser.add_argument("--pairs", type=int, default=16, help="frame pairs a clip")
    parser.add_argument("--segments", type=int, default=4, help="clips an example (T)")
    parser.add_argument("--group", type=int, default=8, help="completions a clip (G)")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion")
    parser.add_argument("--batch", type=int, default=1, help="examples")
    parser.add_argument("--rate", type=float, default=1e-5, help="learning rate")
    parser.add_argument("--attention", default="sdpa", help="theirs: sdpa or eager")
    # Of 1, 2 and 8 it was the fastest on two cores.
    parser.add_argument(
        "--micro", type=int, default=2, help="theirs: sequences run together in the update"
    )
    args = parser.parse_args(argv)

    tokenizer = Tokenizer.load(run.BASE)
    size = size_of(tokenizer, args)
    settings = settings_of(size, args)
    slots, vocab = settings.memory.slots, size.config.text.vocab_size
    model = Qwen3VL(size.config, rngs=nnx.Rngs(0))
    form = whole_samples(tokenizer, vocab, slots)
    batch = make_batch(tokenizer, size, slots, args.batch)
    prompt = batch.prefix.tokens.shape[-1] + 2 + slots + len(form.turn_end)
    print(
        f"{parameter_count(model) / 1e6:.0f}M parameters; {args.batch} x {size.segments} prompts "
        f"of {prompt} tokens, {args.group} samples of {args.tokens} each; "
        f"torch {torch.__version__} on {torch.get_num_threads()} threads, jax {jax.__version__}"
    )
    rate = matmul_rate()
    theirs = Theirs(model, form, settings, batch, args.attention, args.micro)
    ours, done = Ours(model, form, settings, batch), []
    for mine, other in steps(ours, theirs, 1 + args.repeats):
        done.append((mine, other))
        differ = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps(mine, other).items())
        print(
            f"step {len(done)}: loss {mine.loss:.6f} and {other.loss:.6f}, gradient norm "
            f"{mine.norm:.5f} and {other.norm:.5f}; differences: {differ}",
            flush=True,
        )
    _table(done[1:], floors(size, prompt, args), rate)
    return done


def _table(timed: list[tuple[Step, Step]], floor: dict, rate: float) -> None:
    print(
        f"{'':8} {'ours':>8} {'theirs':>8} {'ratio':>8} {'bar':>5} {'floor':>8} {'of theirs':>10}"
    )
    parts = {
        "rollout": lambda step: step.rollout,
        "update": lambda step: step.update,
        "whole": lambda step: step.rollout + step.update,
    }
    for name, seconds in parts.items():
        mine, other = (statistics.median(map(seconds, side)) for side in zip(*timed, strict=True))
        least, apart = (part / rate for part in floor[name])
        bar = BAR if name == "whole" else ""
        print(
            f"{name:8} {mine:8.2f} {other:8.2f} {other / mine:7.2f}x {bar:>5} {least:8.2f} "
            f"{apart:10.2f}"
        )


if __name__ == "__main__":
    command_line.entry(main)
