"""What the benchmarks of speed share: inputs, weights in torch, clocks, operations."""

import dataclasses
import statistics
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from videomem_jax import grammar as fmt
from videomem_jax import memory as mem
from videomem_jax import prompt as prompts
from videomem_jax.batch import Batch, Chain, Clip, Prefix
from videomem_jax.data.video import patch_positions
from videomem_jax.models import convert
from videomem_jax.models.config import Qwen3VLConfig, TextConfig, VisionConfig
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.tokenizer import TokenIds, Tokenizer

OUTSIDE = fmt.TAGS + 1  # tokens of a completion that are none of its memory
CLOCKS = {"wall": time.perf_counter, "work": time.process_time}


class Size(NamedTuple):
    """What is run: segments, frame pairs a clip and their grid in patches."""

    config: Qwen3VLConfig
    segments: int
    pairs: int
    grid: tuple[int, int]


def make_config(
    ids: TokenIds,
    *,
    vocab: int,
    width: int,
    hidden: int,
    layers: int,
    heads: int,
    kv: int,
    head: int,
    depth: int,
    tower: int,
    tower_hidden: int,
    tower_heads: int,
    deepstack: tuple[int, ...],
) -> Qwen3VLConfig:
    """A Qwen3-VL with tied embeddings.

    Args:
      ids: of the tokenizer.
      vocab: rows of the embedding.
      width, hidden, layers: of the decoder and of its feed-forward parts.
      heads, kv, head: its query heads, its key heads, the dimensions of each.
      depth, tower, tower_hidden, tower_heads: of the vision tower: layers, width, feed-forward
        width, heads.
      deepstack: layers of the tower whose features go to the decoder.
    """
    fifth = 5 * head // 32  # rotary frequencies are dealt out as in Qwen's checkpoints
    text = TextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head,
        mrope_section=(head // 2 - 2 * fifth, fifth, fifth),
        tie_word_embeddings=True,
    )
    vision = VisionConfig(
        depth=depth,
        hidden_size=tower,
        intermediate_size=tower_hidden,
        num_heads=tower_heads,
        out_hidden_size=width,
        num_position_embeddings=2304,
        deepstack_visual_indexes=deepstack,
    )
    return Qwen3VLConfig(
        text, vision, ids.video_pad, ids.image_pad, ids.vision_start, ids.vision_end
    )


def small_size(ids: TokenIds) -> Size:
    """What only shows that a benchmark runs: 2 segments of 4 small frames."""
    config = make_config(
        ids,
        vocab=1024,
        width=64,
        hidden=128,
        layers=2,
        heads=4,
        kv=2,
        head=32,
        depth=2,
        tower=32,
        tower_hidden=64,
        tower_heads=2,
        deepstack=(0,),
    )
    return Size(config, 2, 2, (4, 6))


def make_batch(tokenizer: Tokenizer, size: Size, slots: int, examples: int = 1) -> Batch:
    """Examples with random frames and one question, whose prompts are equally long."""
    rng, (height, width) = np.random.default_rng(0), size.grid
    question, options = "What was seen first?", ["a red card", "a boat", "a house", "the moon"]
    frames = np.arange(2 * size.pairs)
    prefixes = []
    for segment in range(size.segments):
        times = segment * 2.0 * len(frames) + 2.0 * frames + 1.0
        prefixes.append(prompts.write_prefix(tokenizer, question, options, times, size.grid, 2**14))
    longest = max(int(prefix.mask.sum()) for prefix in prefixes)
    cut = lambda a: a[..., :longest] if np.ndim(a) else a  # noqa: E731
    each = lambda a: np.repeat(a[None], examples, axis=0)  # noqa: E731
    prefix = jax.tree.map(lambda *a: each(np.stack([cut(x) for x in a])), *prefixes)
    lead = (examples, size.segments)
    shape = (*lead, size.pairs, height * width, size.config.vision.patch_dim)
    places = patch_positions(16 * height, 16 * width)
    repeat = lambda a: np.broadcast_to(a, (*lead, *np.shape(a))).astype(np.int32)  # noqa: E731
    none = np.full(lead, -1, np.int32)
    return Batch(
        prefix=Prefix(*prefix),
        clip=Clip(rng.integers(0, 256, shape).astype(np.uint8), repeat(places), repeat(size.grid)),
        chain=Chain(np.zeros((*lead, slots), np.int32), none, none),
        gold=np.zeros(examples, np.int32),
        so_far=np.zeros(lead, np.int32),
        choices=each(np.array(tokenizer.ids.letters[:4], np.int32)[:, None]),
        record=np.zeros(examples, np.int32),
        real=np.ones(examples, bool),
    )


def whole_samples(tokenizer: Tokenizer, vocab: int, slots: int) -> mem.Format:
    """The format when every sample is as long as it can be.

    Held to the format, it is that but where it closes its memory.
    """
    machine = fmt.build(tokenizer, vocab, slots, forced=True)
    allowed = machine.allowed.at[fmt.State.MEMORY, tokenizer.ids.memory_close].set(False)
    machine = dataclasses.replace(machine, allowed=allowed)
    return mem.Format(machine, tokenizer.ids, prompts.turn_end(tokenizer))


def in_torch(model: Qwen3VL, attention: str) -> transformers.Qwen3VLForConditionalGeneration:
    """The model with the same weights; `attention` is sdpa or eager."""
    with tempfile.TemporaryDirectory() as folder:
        convert.save_pretrained(model, folder)
        return transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        ).eval()


class Operations(NamedTuple):
    """Multiplications and additions of matrix products alone.

    see: the vision tower on one clip.
    token: all layers of the decoder for one token, without attention.
    pair: attention of one query to one key, in all layers.
    head: the logits of one token.
    layers: of the decoder.
    keys_values: those of one token, in one layer.
    """

    see: float
    token: float
    pair: float
    head: float
    layers: int
    keys_values: float

    def read(self, tokens: int) -> float:
        """The decoder on so many tokens in a row, for their keys and values."""
        whole = tokens * self.token + self.pair * tokens * tokens / 2
        return whole * (1 - 1 / self.layers) + tokens * self.keys_values

    def write(self, tokens: int, prompt: int) -> float:
        """So many tokens after a prompt that has been read, with their logits."""
        return tokens * (self.token + self.head + self.pair * (prompt + tokens / 2))


def decoder_operations(t: TextConfig) -> Operations:
    """What the parts of a step cost where there are texts only."""
    heads, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    layer = t.hidden_size * (2 * heads + 2 * kv + 3 * t.intermediate_size)
    return Operations(
        see=0.0,
        token=2 * t.num_hidden_layers * layer,
        pair=4 * t.num_hidden_layers * heads,
        head=2 * t.hidden_size * t.vocab_size,
        layers=t.num_hidden_layers,
        keys_values=4 * t.hidden_size * kv,
    )


def operations(size: Size) -> Operations:
    """What the parts of a step cost."""
    v = size.config.vision
    patches = size.grid[0] * size.grid[1]
    joined = v.hidden_size * v.spatial_merge_size**2
    merger = joined * (joined + v.out_hidden_size) / v.spatial_merge_size**2
    block = v.hidden_size * (4 * v.hidden_size + 2 * v.intermediate_size)
    patch = 2 * (v.patch_dim * v.hidden_size + v.depth * block)
    patch += 2 * (1 + len(v.deepstack_visual_indexes)) * merger
    patch += 4 * v.depth * v.hidden_size * patches
    return decoder_operations(size.config.text)._replace(see=size.pairs * patches * patch)


def matmul_rate(now=time.perf_counter, side: int = 2048) -> float:
    """Operations a second of the fastest float32 matrix product of jax, torch and numpy here."""
    a = np.random.default_rng(0).standard_normal((side, side), np.float32)
    x, t = jnp.asarray(a), torch.tensor(a)
    product = jax.jit(lambda x: x @ x)
    best = {}
    for name, once in (
        ("jax", lambda: product(x).block_until_ready()),
        ("torch", lambda: t @ t),
        ("numpy", lambda: a @ a),
    ):
        once()
        best[name] = 2 * side**3 / min(clock(once, now) for _ in range(7))
    print("matrix product: " + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in best.items()))
    return max(best.values())


def clock(once, now=time.perf_counter) -> float:
    """Seconds of one call, by `now`."""
    began = now()
    once()
    return now() - began


def side_by_side(repeats: int, now, ours, *theirs, prepare=lambda: None) -> list[float]:
    """Medians of alternating runs; `prepare()` makes what each of `theirs` takes, off the clock."""
    ours()  # compiling, and what a first call sets up
    for once in theirs:
        once(prepare())
    found = [[] for _ in range(1 + len(theirs))]
    for _ in range(repeats):
        found[0].append(clock(ours, now))
        for once, times in zip(theirs, found[1:], strict=True):
            given = prepare()
            times.append(clock(lambda: once(given), now))  # noqa: B023
    return [statistics.median(times) for times in found]
