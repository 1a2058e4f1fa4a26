"""Sizes of Qwen3-VL by name: the four dense releases and the demo's tiny one."""

from __future__ import annotations

from videomem_jax.models.config import ConfigError, Qwen3VLConfig, TextConfig, VisionConfig


def _released(d, mlp, layers, heads, tied, vision_d, vision_mlp, depth, deepstack) -> Qwen3VLConfig:
    text = TextConfig(
        vocab_size=151936,
        hidden_size=d,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )
    vision = VisionConfig(
        depth=depth,
        hidden_size=vision_d,
        intermediate_size=vision_mlp,
        num_heads=16,
        out_hidden_size=d,
        deepstack_visual_indexes=deepstack,
    )
    return Qwen3VLConfig(text=text, vision=vision)


def preset(name: str, vocab_size: int | None = None) -> Qwen3VLConfig:
    """The architecture called `name`: tiny, 2b, 4b, 8b or 32b.

    Args:
      name: the size.
      vocab_size: rows of the embedding, for `tiny`, whose tokenizer is made by the project.

    Raises:
      ConfigError: for an unknown name.
    """
    small, large = (1024, 4096, 24, (5, 11, 17)), (1152, 4304, 27, (8, 16, 24))
    if name == "2b":
        return _released(2048, 6144, 28, 16, True, *small)
    if name == "4b":
        return _released(2560, 9728, 36, 32, True, *small)
    if name == "8b":
        return _released(4096, 12288, 36, 32, False, *large)
    if name == "32b":
        return _released(5120, 25600, 64, 64, False, *large)
    if name == "tiny":
        text = TextConfig(
            vocab_size=vocab_size or 512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rope_theta=1e4,
            mrope_section=(6, 5, 5),
            tie_word_embeddings=True,
        )
        vision = VisionConfig(
            depth=4,
            hidden_size=96,
            intermediate_size=192,
            num_heads=4,
            out_hidden_size=128,
            num_position_embeddings=64,
            deepstack_visual_indexes=(1, 2),
        )
        return Qwen3VLConfig(text=text, vision=vision)
    raise ConfigError(f"model preset {name!r} is unknown: choose tiny, 2b, 4b, 8b or 32b")
