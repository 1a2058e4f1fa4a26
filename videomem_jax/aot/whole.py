"""What no chip of several may hold: an embedding, a stack of layers, the logits of all tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable

from videomem_jax import settings as cfg
from videomem_jax.models.config import Qwen3VLConfig

_FLOATS = ("f32", "bf16")


def held(
    arrays: Iterable[tuple[str, tuple[int, ...]]],
    s: cfg.Settings,
    config: Qwen3VLConfig,
    chips: int,
) -> list[str]:
    """Which of a program's arrays are held whole, in words.

    Args:
      arrays: dtypes and shapes on one chip (`costs.Program.arrays`).
      s: the run's settings.
      config: the model's sizes.
      chips: in all.
    """
    t, found = config.text, []
    d, vocab, depth = t.hidden_size, t.vocab_size, t.num_hidden_layers
    inputs = t.num_attention_heads * t.head_dim, t.intermediate_size
    outputs = (*inputs, t.num_key_value_heads * t.head_dim)
    stacks = {(depth, d, out) for out in outputs} | {(depth, into, d) for into in inputs}
    # Positions whose logits all chips together hold at once.
    rows = max(s.coldstart.batch, s.prpo.batch * s.prpo.group_size, s.eval.batch)
    most = rows * s.model.chunk * vocab / chips
    shares = {vocab, vocab // (s.mesh.fsdp * s.mesh.tensor)}
    for dtype, dims in sorted(set(arrays)):
        if dtype not in _FLOATS or not dims:
            continue
        kept = tuple(x for x in dims if x != 1)
        text = f"{dtype}[{','.join(map(str, dims))}]"
        if kept in ((vocab, d), (d, vocab)):
            found.append(f"a whole table of the vocabulary, {text}")
        elif kept in stacks:
            found.append(f"a whole stack of layers, {text}")
        elif dims[-1] in shares and d not in dims and math.prod(dims) > most:
            found.append(f"logits of more positions than a chunk has, {text}")
    return found
