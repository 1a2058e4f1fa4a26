"""Speed of this project against transformers on torch, side by side on this machine's CPU.

    python -m benchmarks.speed_vs_transformers     # about 150M parameters, medians of 5: 45 minutes

Both have the same random weights, see the same frames and prompts and read the same tokens: what
ours samples, theirs is made to sample too. Runs alternate, so that whatever else the machine does
falls on both. Three rows:

  prompt   vision tower and prefill of a prompt of about 2,000 tokens
  samples  8 samples of 128 tokens after that prompt
  loop     4 segments in a row, each with its clip, its prompt with the memory, and 8 samples

Theirs runs in two ways. "generate" is the library's own: `generate(num_return_sequences=8)`, which
repeats the prompt, and its clip, for each sample before it runs them (in `samples` it is given a
cache of the 8 prompts, made outside the clock). "bare" is what a user could write at best with the
library's model: the prompt is run once, its cache repeated, a loop draws the tokens without what
`generate` does between steps.

Beside each row is the floor: its operations over the fastest matrix product measured here.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from einops import rearrange
from flax import nnx

from benchmarks.side_by_side import (
    CLOCKS,
    OUTSIDE,
    Size,
    in_torch,
    make_batch,
    make_config,
    matmul_rate,
    operations,
    side_by_side,
    small_size,
    whole_samples,
)
from videomem_jax import command_line, rollout, run
from videomem_jax import grammar as fmt
from videomem_jax import memory as mem
from videomem_jax.batch import Batch
from videomem_jax.models.qwen3_vl import Qwen3VL, parameter_count
from videomem_jax.tokenizer import Tokenizer

SAMPLES, TOKENS = 8, 128
BARS = {"prompt": 1.3, "samples": 3.0, "loop": 4.0}


def size_of(tokenizer: Tokenizer, small: bool) -> Size:
    """The benchmark's sizes, or (small) some that only show that it runs."""
    if small:
        return small_size(tokenizer.ids)
    config = make_config(
        tokenizer.ids,
        vocab=32000,
        width=768,
        hidden=2048,
        layers=14,
        heads=12,
        kv=4,
        head=64,
        depth=8,
        tower=512,
        tower_hidden=2048,
        tower_heads=8,
        deepstack=(2, 5),
    )
    return Size(config, 4, 15, (14, 32))


class Ours:
    """The rows with this project: compiled as training and evaluation compile them."""

    def __init__(self, model: Qwen3VL, form: mem.Format, batch: Batch, memory: np.ndarray):
        graph, self.state = nnx.split(model)
        self.form, self.key = form, jax.random.key(0)
        self.batch = jax.device_put(batch)
        first = lambda tree: jax.tree.map(lambda a: a[:, 0], tree)  # noqa: E731
        sampling = mem.Sampling(SAMPLES, paths=1, temperature=1.0, greedy=False)
        full = mem.Memory(jnp.asarray(memory)[None, None], jnp.full((1, 1), len(memory)))

        def prompt(state, batch):
            model = nnx.merge(graph, state)
            features = mem.see(model, first(batch.clip))
            return mem.context(model, form, first(batch.prefix), features, full)

        def samples(state, batch, context, key):
            model = nnx.merge(graph, state)
            return rollout.sample(
                model, form.grammar, context, batch.choices, key, count=SAMPLES, temperature=1.0
            )

        def loop(state, batch, key):
            model = nnx.merge(graph, state)
            features = mem.see(model, batch.clip)
            return mem.loop(model, form, batch, features, key, sampling)

        self._prompt, self._samples, self._loop = map(jax.jit, (prompt, samples, loop))
        self.context = self.prompt()

    def prompt(self) -> rollout.Context:
        """Vision tower and prefill."""
        return jax.block_until_ready(self._prompt(self.state, self.batch))

    def samples(self) -> rollout.Completions:
        """8 samples after the prompt."""
        found = self._samples(self.state, self.batch, self.context, self.key)
        return jax.block_until_ready(found)

    def loop(self) -> mem.Steps:
        """The whole loop."""
        return jax.block_until_ready(self._loop(self.state, self.batch, self.key))


class Theirs:
    """The rows with transformers, given the tokens that ours sampled."""

    def __init__(self, model: Qwen3VL, form: mem.Format, batch: Batch, attention: str):
        self.model = in_torch(model, attention)
        self.form, self.batch = form, batch
        self.model.generation_config.eos_token_id = None  # so that all samples have all tokens
        self.text = torch.tensor(np.asarray(form.grammar.allowed[fmt.State.MEMORY]))

    def inputs(self, segment: int, memory: np.ndarray) -> dict[str, Any]:
        """A segment's prompt without its last token, which opens the samples."""
        ids, prefix = self.form.ids, jax.tree.map(lambda a: a[0, segment], self.batch.prefix)
        tail = [ids.memory_open, *memory, ids.memory_close, *self.form.turn_end[:-1]]
        tokens = np.concatenate([prefix.tokens[prefix.mask], tail])
        clip = self.batch.clip.patches[0, segment].astype(np.float32) / 127.5 - 1
        grid = [clip.shape[0], *self.batch.clip.grid[0, segment]]
        return {
            "input_ids": torch.tensor(tokens)[None].long(),
            "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
            "mm_token_type_ids": torch.tensor(tokens == ids.video_pad).int()[None] * 2,
            "pixel_values_videos": torch.tensor(rearrange(clip, "f q e -> (f q) e")),
            "video_grid_thw": torch.tensor([grid]),
        }

    @torch.inference_mode()
    def prompt(self, given: dict[str, Any]):
        """Vision tower and prefill; the cache."""
        return self.model(**given, use_cache=True, logits_to_keep=1).cache

    @torch.inference_mode()
    def samples(self, cache, start: int, tokens: np.ndarray, logprobs: list | None = None):
        """Decodes `tokens` [8, 128] after a repeated cache, drawing as if they were not known.

        Args:
          cache: of the 8 prompts; it grows.
          start: position of the first token that is read.
          tokens: what is to be drawn.
          logprobs: gets each drawn token's log-probability among ordinary text, if given.
        """
        known = torch.tensor(tokens).long()
        token = torch.full((len(known), 1), self.form.turn_end[-1])
        for index in range(known.shape[1]):
            position = torch.full((3, len(known), 1), start + index)
            out = self.model(input_ids=token, position_ids=position, cache=cache, use_cache=True)
            scores = out.logits[:, -1].masked_fill(~self.text, -1e30)
            torch.multinomial(torch.softmax(scores, -1), 1)
            token = known[:, index : index + 1]
            if logprobs is not None:
                logprobs.append(torch.log_softmax(scores, -1).gather(1, token)[:, 0].numpy())

    def generate(self, given: dict[str, Any], tokens: np.ndarray, cache=None):
        """Prompt and samples by the library's own loop, which is made to draw `tokens` [8, 128].

        With a `cache` of the 8 prompts they are not run again.
        """
        last = torch.full((1, 1), self.form.turn_end[-1])
        given = given | {
            "input_ids": torch.cat([given["input_ids"], last], 1),
            "attention_mask": torch.ones(1, given["input_ids"].shape[1] + 1, dtype=torch.long),
            "mm_token_type_ids": torch.cat([given["mm_token_type_ids"], 0 * last.int()], 1),
        }
        if cache is not None:
            given = {k: given[k].repeat(SAMPLES, 1) for k in ("input_ids", "attention_mask")}
            given["cache"] = cache
        return self.model.generate(
            **given,
            do_sample=True,
            num_return_sequences=1 if cache is not None else SAMPLES,
            max_new_tokens=tokens.shape[1],
            logits_processor=transformers.LogitsProcessorList([_Drawn(tokens)]),
        )

    def loop(self, steps: mem.Steps, by_generate: bool) -> None:
        """The whole loop, with the memories and samples of ours."""
        for segment in range(len(steps.before.length)):
            length = int(steps.before.length[segment, 0, 0])
            given = self.inputs(segment, np.asarray(steps.before.tokens[segment, 0, 0, :length]))
            tokens = np.asarray(steps.completions.tokens[segment, 0])
            if by_generate:
                self.generate(given, tokens)
                continue
            cache = self.prompt(given)
            cache.batch_repeat_interleave(SAMPLES)
            self.samples(cache, self.start(segment, length), tokens)

    def start(self, segment: int, length: int) -> int:
        """Position of the prompt's last token."""
        begin = int(self.batch.prefix.next_position[0, segment])
        return begin + 1 + length + len(self.form.turn_end)


class _Drawn(transformers.LogitsProcessor):
    """Leaves `generate` nothing to draw but known tokens."""

    def __init__(self, tokens: np.ndarray):
        self._tokens, self._next = torch.tensor(tokens).long(), 0

    def __call__(self, input_ids, scores):
        token = self._tokens[:, self._next, None]
        self._next += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def least(size: Size, prompt: int) -> dict[str, float]:
    """Multiplications and additions of each row, of matrix products alone."""
    parts = operations(size)
    read = parts.see + parts.read(prompt)
    drawn = SAMPLES * parts.write(TOKENS, prompt)
    return {"prompt": read, "samples": drawn, "loop": size.segments * (read + drawn)}


def main():
    """Runs the rows asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument("--rows", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--small", action="store_true", help="sizes that only show that it runs")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="'work' counts seconds of this process on all cores: for a machine that is not idle, "
        "best with OMP_NUM_THREADS=1 and one core (taskset -c 0)",
    )
    parser.add_argument("--attention", default="sdpa", help="theirs: sdpa or eager")
    args = parser.parse_args()

    tokenizer = Tokenizer.load(run.BASE)
    size = size_of(tokenizer, args.small)
    slots = TOKENS - OUTSIDE
    model = Qwen3VL(size.config, rngs=nnx.Rngs(0))
    vocab = size.config.text.vocab_size
    form = whole_samples(tokenizer, vocab, slots)
    batch = make_batch(tokenizer, size, slots)
    words = np.flatnonzero(tokenizer.text_mask(vocab))
    memory = np.random.default_rng(1).choice(words, slots).astype(np.int32)

    theirs = Theirs(model, form, batch, args.attention)
    given, start = theirs.inputs(0, memory), theirs.start(0, slots)
    prompt = given["input_ids"].shape[1]
    print(
        f"{parameter_count(model) / 1e6:.0f}M parameters; prompt of {prompt + 1} tokens; "
        f"torch {torch.__version__} on {torch.get_num_threads()} threads, jax {jax.__version__}"
    )
    rate = matmul_rate(CLOCKS[args.clock])
    floor = {k: v / rate for k, v in least(size, prompt).items()}
    ours = Ours(model, form, batch, memory)

    def repeated():
        cache = theirs.prompt(given)
        cache.batch_repeat_interleave(SAMPLES)
        return cache

    done, logprobs = ours.samples(), []
    tokens = np.asarray(done.tokens[0])
    assert bool(done.mask.all()), "every sample must have all its tokens"
    theirs.samples(repeated(), start, tokens, logprobs)
    text = slice(1, 1 + slots)
    gap = np.abs(np.stack(logprobs, 1)[:, text] - np.asarray(done.logprobs[0])[:, text]).max()
    print(f"same tokens; their log-probabilities differ by at most {gap:.1e}")

    now = CLOCKS[args.clock]
    print(
        f"{'':8} {'seconds':>9} {'bare':>9} {'':7} {'generate':>9} {'':7} {'bar':>5} {'floor':>9}"
    )

    def row(name: str, mine: float, bare: float, *more: float) -> None:
        other = more[0] if more else bare  # a prompt alone is one call of the model
        print(
            f"{name:8} {mine:9.2f} {bare:9.2f} {bare / mine:6.2f}x {other:9.2f} "
            f"{other / mine:6.2f}x {BARS[name]:5.1f} {floor[name]:9.2f}",
            flush=True,
        )

    if "prompt" in args.rows:
        times = side_by_side(args.repeats, now, ours.prompt, lambda _: theirs.prompt(given))
        row("prompt", *times)
    if "samples" in args.rows:
        times = side_by_side(
            args.repeats,
            now,
            ours.samples,
            lambda cache: theirs.samples(cache, start, tokens),
            lambda cache: theirs.generate(given, tokens, cache),
            prepare=repeated,
        )
        row("samples", *times)
    if "loop" in args.rows:
        steps = ours.loop()
        assert bool(steps.completions.mask.all()), "every sample must have all its tokens"
        times = side_by_side(
            args.repeats,
            now,
            ours.loop,
            lambda _: theirs.loop(steps, by_generate=False),
            lambda _: theirs.loop(steps, by_generate=True),
        )
        row("loop", *times)


if __name__ == "__main__":
    command_line.entry(main)
