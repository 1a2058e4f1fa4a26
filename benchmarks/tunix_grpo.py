"""A step of GRPO on texts against Tunix's, side by side on this machine's CPU.

    python3 -m venv PEER && PEER/bin/pip install google-tunix==0.1.7
    python -m benchmarks.tunix_grpo --peer-python PEER/bin/python    # 12 minutes on two cores

Tunix is a JAX library of reinforcement learning for language models; it has an environment of its
own, since it asks for versions of its own. Both sides have one Qwen3 with the same random weights
in float32, read the same prompts, sample 8 completions of 64 tokens each, reward them alike (the
share of even ids) and take a step of AdamW on the same objective. Theirs is the library's own
learner with its own sampler, as it is set when nothing else is said but that there is no KL
penalty (ours has none either). No token ends a completion early. Steps of both alternate in two
processes that live on, so that whatever else the machine does falls on both.

Before the clock starts, theirs scores a rollout of ours: its log-probabilities and the norm of its
gradient must be ours.

Ours comes in two ways. "shared" is `config.prpo.psp=True` with its one path, and on one segment
that is GRPO: a group shares its prompt, which is run once in sampling and once in the update.
"alone" is `config.prpo.psp=False`, in which each completion has a memory, and so a prompt, of its
own; here these are equal, and run 8 times. Theirs too runs a prompt for each completion. The two
ratios are theirs to each of ours.

The floor of either way is its operations over the fastest matrix product measured here.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks.side_by_side import decoder_operations, matmul_rate
from videomem_jax import command_line, prpo, run, sharding, trainer
from videomem_jax import grammar as fmt
from videomem_jax import memory as mem
from videomem_jax import prompt as prompts
from videomem_jax import settings as cfg
from videomem_jax.batch import SHOWN, Batch, Chain, Clip, Prefix
from videomem_jax.models.config import Qwen3VLConfig, TextConfig
from videomem_jax.models.qwen3_vl import Qwen3VL, parameter_count
from videomem_jax.tokenizer import Tokenizer

# As it is before `command_line.entry` sets what suits this project's programs.
ENVIRONMENT = dict(os.environ)
PARTS = ("sampling", "update", "step")
RATE = 1e-5
# Between two programs in float32, of log-probabilities and of a gradient's norm.
CLOSE = {"gap": 1e-3, "gradient": 1e-3}


class Size(NamedTuple):
    """What is run: prompts and their tokens, completions of each and theirs."""

    batch: int
    prompt: int
    group: int
    completion: int


def architecture(small: bool) -> TextConfig:
    """A Qwen3 of 11M parameters, or (small) one that only shows that it runs."""
    return TextConfig(
        vocab_size=1024 if small else 8192,
        hidden_size=64 if small else 384,
        intermediate_size=128 if small else 1536,
        num_hidden_layers=2 if small else 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16 if small else 64,
        rope_theta=1e6,  # Tunix rotates by this whatever its configuration says
        mrope_section=(8, 0, 0) if small else (32, 0, 0),
        tie_word_embeddings=True,
    )


def sizes_of(small: bool) -> list[Size]:
    """Two prompts of middling length, and one that is long."""
    if small:
        return [Size(2, 24, 4, 12)]
    return [Size(2, 512, 8, 64), Size(1, 2000, 8, 64)]


def form_of(tokenizer: Tokenizer, size: Size, vocab: int) -> mem.Format:
    """A format that holds a completion to nothing but its length: any token at any place.

    One slot of memory is the least that there can be; the rest of the room is the answer's.
    """
    machine = fmt.build(tokenizer, vocab, 1, size.completion - 1 - fmt.TAGS)
    machine = dataclasses.replace(
        machine, allowed=jnp.ones_like(machine.allowed), end=jnp.full_like(machine.end, -1)
    )
    return mem.Format(machine, tokenizer.ids, prompts.turn_end(tokenizer))


def make_batch(form: mem.Format, size: Size, vocab: int) -> tuple[Batch, Int[np.ndarray, "b p"]]:
    """Random texts with an open question, and the prompts [b, p] that they become."""
    after = (form.ids.memory_open, form.ids.memory_close, *form.turn_end)
    b, p = size.batch, size.prompt - len(after)
    tokens = np.random.default_rng(0).integers(0, vocab, (b, 1, p)).astype(np.int32)
    room, none = form.grammar.room, np.full((b, 1), -1, np.int32)
    batch = Batch(
        prefix=Prefix(
            tokens=tokens,
            positions=np.broadcast_to(np.arange(p, dtype=np.int32), (b, 1, 3, p)),
            mask=np.ones((b, 1, p), bool),
            slot=np.full((b, 1, p), SHOWN, np.int32),
            next_position=np.full((b, 1), p, np.int32),
        ),
        clip=Clip(
            np.zeros((b, 1, 0, 4, 1), np.uint8),
            np.zeros((b, 1, 4, 2), np.int32),
            np.full((b, 1, 2), 2, np.int32),
        ),
        chain=Chain(np.zeros((b, 1, 1), np.int32), none, none),
        gold=np.zeros(b, np.int32),
        so_far=np.zeros((b, 1), np.int32),
        choices=np.full((b, 1, room), -1, np.int32),
        record=np.arange(b, dtype=np.int32),
        real=np.ones(b, bool),
    )
    whole = np.concatenate([tokens[:, 0], np.tile(np.int32(after), (b, 1))], axis=1)
    return batch, whole


class Rewarded(trainer.Trainer):
    """The trainer with the reward that Tunix is given too."""

    def judge(self, completions, *args):
        """As `Trainer.judge`; a completion earns the share of even ids among its tokens."""
        chosen, judged = super().judge(completions, *args)
        reward = (completions.tokens % 2 == 0).mean(-1).reshape(judged.advantages.shape)
        advantages = prpo.group_advantages(reward)
        return chosen, judged._replace(advantages=advantages)


class Ours:
    """Steps of GRPO as training does them."""

    def __init__(self, config: TextConfig, form: mem.Format, size: Size, batch: Batch, psp: bool):
        settings = cfg.Settings(
            prompt=cfg.Prompt(segments=1, frames=0, answer_tokens=form.grammar.room, options=1),
            memory=cfg.Memory(slots=1, budget=0),
            prpo=cfg.PRPO(
                batch=size.batch,
                accumulate=1,
                group_size=size.group,
                psp=psp,
                tcr=False,
                optimizer=cfg.Optimizer(learning_rate=RATE, warmup=0),
            ),
        )
        model = Qwen3VL(Qwen3VLConfig(config), rngs=nnx.Rngs(0))
        mesh = sharding.make_mesh(cfg.Mesh(1, 1, 1), jax.devices()[:1])
        self.trainer = Rewarded(model, form, settings, mesh, "prpo")
        self.state, self.batch, self._steps = self.trainer.first, batch, 0

    def sample(self) -> trainer.Rows:
        """A rollout: completions and their advantages."""
        key = jax.random.fold_in(jax.random.key(0), self._steps)
        t, s = self.trainer, self.state
        rows, _ = t.rollout_step(s.trained, t.frozen, self.batch, key, s.step)
        return jax.block_until_ready(rows)

    def update(self, rows: trainer.Rows) -> dict[str, Float[Array, ""]]:
        """An optimizer step on a rollout, and what the trainer says of it."""
        t = self.trainer
        self.state, said = t.update_step(self.state, t.frozen, t.reference, rows)
        self._steps += 1
        return jax.block_until_ready((self.state, said))[1]

    def step(self) -> dict[str, float]:
        """Seconds of each part of one step, and the number of tokens sampled."""
        began = time.perf_counter()
        rows = self.sample()
        middle = time.perf_counter()
        self.update(rows)
        end = time.perf_counter()
        seconds = zip(PARTS, (middle - began, end - middle, end - began), strict=True)
        return dict(seconds) | {"tokens": int(rows.mask.sum())}


class Theirs:
    """Tunix in a process of its own, which waits while ours works."""

    def __init__(self, python: str, folder: pathlib.Path):
        self._process = subprocess.Popen(
            [python, pathlib.Path(__file__).with_name("tunix_peer.py"), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | {"JAX_PLATFORMS": "cpu"},
        )
        self.found = self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"Tunix's side ended with exit code {self._process.wait()}")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        """As `Ours.step`."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def weights_of(model: Qwen3VL) -> dict[str, np.ndarray]:
    """Our weights by Tunix's names; only shapes differ, by a kernel's heads."""
    decoder = model.language_model
    found = {
        "embedder/input_embedding": decoder.embed_tokens[...],
        "final_norm/w": decoder.norm.scale[...],
    }
    layers = decoder.layers
    for i in range(model.config.text.num_hidden_layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"layers/{i}/attn/{name}/w"] = getattr(layers.self_attn, name).kernel[i]
        for name in ("q_norm", "k_norm"):
            found[f"layers/{i}/attn/{name}/w"] = getattr(layers.self_attn, name).scale[i]
        for name in ("gate_proj", "up_proj", "down_proj"):
            found[f"layers/{i}/mlp/{name}/kernel"] = getattr(layers.mlp, name).kernel[i]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"layers/{i}/{name}/w"] = getattr(layers, name).scale[i]
    return {name: np.asarray(value) for name, value in found.items()}


def hand_over(folder: pathlib.Path, ours: Ours, size: Size, whole: Int[np.ndarray, "b p"]) -> float:
    """Writes what theirs needs, a rollout of ours among it; the norm of our gradient on that."""
    config: TextConfig = ours.trainer.model(ours.state).config.text
    np.savez(folder / "weights.npz", **weights_of(ours.trainer.model(ours.state)))
    model = {
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "num_kv_heads": config.num_key_value_heads,
        "rope_theta": int(config.rope_theta),
        "norm_eps": config.rms_norm_eps,
        "use_tied_embedding": config.tie_word_embeddings,
    }
    sizes = size._asdict() | {"model": model, "rate": RATE}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    rows = ours.sample()
    flat = lambda a: np.asarray(a).reshape(size.batch * size.group, *a.shape[3:])  # noqa: E731
    np.savez(
        folder / "rollout.npz",
        prompts=whole,
        tokens=flat(rows.tokens),
        logprobs=flat(rows.old),
        advantages=flat(rows.advantages)[:, 0],
    )
    return float(ours.update(rows)["grad_norm"])


def operations(config: TextConfig, size: Size, times: int) -> dict[str, float]:
    """Multiplications and additions of a step, of matrix products alone.

    Args:
      config: of the model.
      size: of the step.
      times: that each prompt is run; keys and values are all that is wanted of it.
    """
    parts = decoder_operations(config)
    drawn = size.group * parts.write(size.completion, size.prompt)
    sampling = size.batch * (times * parts.read(size.prompt) + drawn)
    return {"sampling": sampling, "update": 3 * sampling, "step": 4 * sampling}


def agree(found: dict[str, float], norm: float) -> None:
    """Says how far the two programs are apart, which must not be far."""
    apart = abs(found["gradient"] / norm - 1)
    print(
        f"a rollout of ours: log-probabilities differ by at most {found['gap']:.1e}, "
        f"the gradient's norm by {apart:.1e} of it"
    )
    if found["gap"] > CLOSE["gap"] or not apart <= CLOSE["gradient"]:
        raise RuntimeError("the two sides do not compute the same")


def medians(repeats: int, size: Size, sides: dict) -> dict[str, dict[str, float]]:
    """Median seconds of each side's parts over alternating steps, which must sample all tokens."""
    found = {name: [] for name in sides}
    for index in range(-2, repeats):  # the first compiles, and sharding may have changed after it
        for name, side in sides.items():
            step = side.step()
            assert step["tokens"] == size.batch * size.group * size.completion, (name, step)
            if index >= 0:
                found[name].append(step)
    return {
        name: {part: statistics.median(step[part] for step in steps) for part in PARTS}
        for name, steps in found.items()
    }


def compare(
    config: TextConfig, size: Size, rate: float, repeats: int, python: str | None
) -> dict[str, dict[str, float]]:
    """Runs one size and prints its rows; the medians by side and part."""
    tokenizer = Tokenizer.load(run.BASE)
    form = form_of(tokenizer, size, config.vocab_size)
    batch, whole = make_batch(form, size, config.vocab_size)
    ways = {"shared": True, "alone": False}
    sides = {name: Ours(config, form, size, batch, psp) for name, psp in ways.items()}
    print(f"\n{size.batch} x {size.group} completions of {size.completion} after {size.prompt}")
    with tempfile.TemporaryDirectory() as folder:
        if python:
            norm = hand_over(pathlib.Path(folder), sides["shared"], size, whole)
            sides["tunix"] = Theirs(python, pathlib.Path(folder))
        try:
            if python:
                found = sides["tunix"].found
                agree(found, norm)
                print(f"jax {jax.__version__} here, {found['jax']} there")
            times = medians(repeats, size, sides)
        finally:
            if python:
                sides["tunix"].close()
    floor = [operations(config, size, n) for n in (1, size.group)]
    columns = ("shared", "alone", "tunix", "/ shared", "/ alone", "floor", f"floor x{size.group}")
    print(f"{'seconds':10}" + "".join(f"{name:>9}" for name in columns))
    for part in PARTS:
        cells = [f"{times[way][part]:9.2f}" for way in ways]
        if python:
            cells.append(f"{times['tunix'][part]:9.2f}")
            cells += [f"{times['tunix'][part] / times[way][part]:8.2f}x" for way in ways]
        else:
            cells += [f"{'':9}"] * 3
        cells += [f"{each[part] / rate:9.2f}" for each in floor]
        print(f"{part:10}" + "".join(cells), flush=True)
    return times


def main():
    """Runs all sizes and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="a Python that has Tunix; without it ours alone")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    parser.add_argument("--small", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--sizes", type=int, nargs="+", help="which of the sizes; all by default")
    args = parser.parse_args()
    config, sizes = architecture(args.small), sizes_of(args.small)
    count = parameter_count(Qwen3VL(Qwen3VLConfig(config), rngs=nnx.Rngs(0)))
    print(f"{count / 1e6:.1f}M parameters, float32, {os.cpu_count()} processors")
    rate = matmul_rate()
    for index in args.sizes or range(len(sizes)):
        compare(config, sizes[index], rate, args.repeats, args.peer_python)


if __name__ == "__main__":
    command_line.entry(main)
