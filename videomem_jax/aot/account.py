"""Operations of the steps by hand, from the model's sizes: what the compiled program is held to.

An operation is a multiplication or an addition of a matrix product; everything else is small beside
them. The forward pass of a linear map takes 2 operations a parameter and token, its backward pass
4: 2 for the gradient by the input, 2 for that by the weight.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from videomem_jax import grammar
from videomem_jax import settings as cfg
from videomem_jax.models.attention import computed_pairs
from videomem_jax.models.config import Qwen3VLConfig

# Beside the memory's slots: its opening tag, its closing tag and the turn's end, less the token
# that is kept to open the completions. An instruction's few tokens are left out.
AROUND_MEMORY = 6


class Operations(NamedTuple):
    """Of one step over all chips.

    model: what the method needs, nothing computed twice; products: what the program computes in
    products that the compiler sees; kernels: what hand-written kernels compute, which it does not.
    """

    model: float
    products: float
    kernels: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers that the account is made of, for `rows` prompts with `each` completions.

    prompt, completion: tokens, padding of both counted.
    """

    rows: int
    each: int
    prompt: int
    completion: int

    @property
    def completed(self) -> int:
        """Completion tokens in all."""
        return self.rows * self.each * self.completion

    @property
    def tokens(self) -> int:
        """Tokens that go through the decoder in prefill and update."""
        return self.rows * self.prompt + self.completed


def sizes(s: cfg.Settings, batch: int, paths: int, each: int) -> Sizes:
    """Of one segment of a batch."""
    prompt = s.prompt.prefix_tokens + s.memory.slots + AROUND_MEMORY
    return Sizes(
        batch * paths, each, prompt, s.memory.slots + s.prompt.answer_tokens + grammar.TAGS
    )


class Account:
    """The operations of a run's steps.

    Of a prompt nobody needs what its last layer does with its keys and values.

    `flash`: as on a TPU, where a kernel computes attention, and a prompt runs its last layer whole;
    else as on a CPU.
    """

    def __init__(self, s: cfg.Settings, config: Qwen3VLConfig, flash: bool):
        self.settings, self.text, self.vision, self.flash = s, config.text, config.vision, flash
        t = config.text
        heads = (t.num_attention_heads + t.num_key_value_heads) * 2 * t.head_dim
        # Of the decoder's linear maps a layer, of those to keys and values, and of the head.
        self.linear = t.hidden_size * (heads + 3 * t.intermediate_size)
        keys_values = 2 * t.num_key_value_heads * t.head_dim
        self.linear_kv = t.hidden_size * keys_values
        self.head = t.hidden_size * t.vocab_size
        inputs = 5 * t.hidden_size + t.num_attention_heads * t.head_dim + t.intermediate_size
        outputs = heads - t.num_attention_heads * t.head_dim
        outputs += 2 * t.intermediate_size + 2 * t.hidden_size
        self.adapter = s.model.lora_rank * (inputs + outputs)
        self.adapter_kv = s.model.lora_rank * (2 * t.hidden_size + keys_values)

    def steps(self) -> dict[str, Operations]:
        """By the names of `programs.steps`."""
        s = self.settings
        t, k = s.prompt.segments, s.paths
        group = s.prpo.group_size // k
        trained = s.model.lora_rank == 0
        cold = sizes(s, s.coldstart.batch, 1, 1)
        rl = sizes(s, s.prpo.batch, k, group)
        read = sizes(s, s.eval.batch, 1, 1)
        reference = s.prpo.kl_coef > 0
        see = self._see
        return {
            "coldstart": _times(
                t, self.learning(cold, trained, False), see(cold.rows, s.model.train_vision)
            ),
            "rollout": _times(t, self.sampling(rl), see(s.prpo.batch)),
            "update": _times(s.learnt, self.learning(rl, trained, reference)),
            "evaluation": _times(t, self.sampling(read), see(read.rows)),
        }

    def _see(self, clips: int, trained: bool = False) -> Operations:
        """The vision tower over clips."""
        v, p = self.vision, self.settings.prompt
        if v is None:
            return Operations(0.0, 0.0, 0.0)
        patches = p.max_pixels // v.patch_size**2
        frames = clips * p.frames // v.temporal_patch_size
        merged, block = patches // v.spatial_merge_size**2, v.spatial_merge_size**2
        layer = v.hidden_size * (4 * v.hidden_size + 2 * v.intermediate_size)
        joined = v.hidden_size * block
        merger = joined * (joined + v.out_hidden_size)
        mergers = 1 + len(v.deepstack_visual_indexes)
        per_frame = 2 * patches * (v.depth * layer + v.patch_dim * v.hidden_size)
        per_frame += 2 * merged * mergers * merger
        per_frame += 4 * patches**2 * v.hidden_size * v.depth
        once = frames * per_frame * (3 if trained else 1)
        return Operations(once, once, 0.0)

    def _attention(self, z: Sizes) -> tuple[float, float, float]:
        """A forward pass of all layers: what is needed, what XLA's form computes, the kernel's."""
        unit, p, c, short = self._pair, z.prompt, z.completion, self._short
        needed = z.rows * p**2 / 2 * short + z.completed * (p + c / 2)
        whole = z.rows * p**2 * short + z.completed * (p + c)
        if not self.flash:
            return unit * needed, unit * whole, 0.0
        blocks = z.rows * (computed_pairs(1, p, 0) + computed_pairs(z.each, c, p))
        return unit * needed, 0.0, unit * blocks

    @property
    def _pair(self) -> int:
        """Operations of a query and a key in all layers: their product, and the value's share."""
        t = self.text
        return 4 * t.num_attention_heads * t.head_dim * t.num_hidden_layers

    @property
    def _short(self) -> float:
        """All layers but the last, as a share."""
        return 1 - 1 / self.text.num_hidden_layers

    def _maps(self, z: Sizes, layer: float, keys_values: float) -> tuple[float, float]:
        """A forward pass through linear maps: what is needed, and what is computed.

        layer, keys_values: parameters of a layer's, and of those of them to keys and values.
        """
        whole = 2 * layer * self.text.num_hidden_layers * z.tokens
        needed = whole - 2 * (layer - keys_values) * z.rows * z.prompt
        return needed, whole if self.flash else needed

    def sampling(self, z: Sizes) -> Operations:
        """Prefill, and as many decode steps as a completion has room for."""
        needed, _, _ = self._attention(z)
        # A decode step looks at its whole cache, filled or not.
        decode = z.completed * (z.prompt + z.completion) * self._pair
        prefill, kernels = z.rows * z.prompt**2 * self._pair * self._short, 0.0
        if self.flash:
            prefill, kernels = 0.0, z.rows * computed_pairs(1, z.prompt, 0) * self._pair
        linear = self._maps(z, self.linear, self.linear_kv)
        adapters = self._maps(z, self.adapter, self.adapter_kv)
        model, products = (
            a + b + 2 * self.head * z.completed for a, b in zip(linear, adapters, strict=True)
        )
        return Operations(model + needed, products + decode + prefill, kernels)

    def learning(self, z: Sizes, trained: bool, reference: bool) -> Operations:
        """Forward, backward, and forward again of what the backward pass does not find kept."""
        t, remat = self.text, self.settings.model.remat
        again = remat in ("all", "attention")
        least, forward = self._maps(z, self.linear, self.linear_kv)
        # A layer's last product is nothing that its backward pass asks for.
        last = t.hidden_size * t.intermediate_size / self.linear
        head = 2 * self.head * z.completed
        chunked = self.settings.model.chunk < z.completion
        fewest, adapters = self._maps(z, self.adapter, self.adapter_kv)
        needed, whole, kernel = self._attention(z)
        passes = 2 + trained  # forward, by the input, and by the weights that are trained
        model = (least + head) * passes + 3 * fewest + 3 * needed
        products = forward * (passes + again * (1 - last)) + head * (passes + chunked)
        # For the forward pass's 2 products the backward pass makes 5: 4, and the scores again.
        products += adapters * (3 + again) + whole * (3.5 + (remat in ("all", "products")))
        # The backward kernels make 7: both compute the weights again, and one their gradient.
        kernels = kernel * (1 + 3.5 + (remat == "all"))
        if reference:
            model += least + head + needed
            products += forward + head + whole
            kernels += kernel
        return Operations(model, products, kernels)


def decode_bytes(s: cfg.Settings, config: Qwen3VLConfig, rows: int, each: int) -> float:
    """Bytes of one decode step over all chips if every one is read once: weights and cache."""
    t, size = config.text, {"float32": 4, "bfloat16": 2}[s.model.dtype]
    account = Account(s, config, flash=True)
    weights = account.linear * t.num_hidden_layers + account.head
    z = sizes(s, rows, 1, each)
    token = 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim
    cache = token * (z.rows * z.prompt + z.completed)
    return size * (weights + cache)


def _times(count: int, *parts: Operations) -> Operations:
    return Operations(*(count * sum(values) for values in zip(*parts, strict=True)))
