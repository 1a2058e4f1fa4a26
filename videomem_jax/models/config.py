"""Architecture of a Qwen3-VL, or of a text model of its kind: Hugging Face's fields, frozen."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what to do."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder.

    `mrope_section` counts rotary frequencies for (time, height, width): all for time where there
    are only texts. `qk_norm`: whether queries and keys are normed, as Qwen3's are and Llama's not.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    tie_word_embeddings: bool = False
    qk_norm: bool = True

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if sum(self.mrope_section) != self.head_dim // 2:
            raise ConfigError(
                f"mrope_section {self.mrope_section} must sum to half of head_dim={self.head_dim}"
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Its position table is a square of `num_position_embeddings` rows."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int = 2304
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)

    def __post_init__(self):
        side = round(self.num_position_embeddings**0.5)
        if side * side != self.num_position_embeddings:
            raise ConfigError(
                f"num_position_embeddings={self.num_position_embeddings} must be a square number"
            )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"vision hidden_size={self.hidden_size} must be a multiple of "
                f"num_heads={self.num_heads}"
            )
        if list(self.deepstack_visual_indexes) != sorted(set(self.deepstack_visual_indexes)) or any(
            not 0 <= i < self.depth for i in self.deepstack_visual_indexes
        ):
            raise ConfigError(
                f"deepstack_visual_indexes {self.deepstack_visual_indexes} must be increasing and "
                f"below the tower's depth {self.depth}"
            )

    @property
    def patch_dim(self) -> int:
        """Values in one patch vector (channels x frames x height x width)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """A whole Qwen3-VL, with the ids of its vision tokens; without `vision`, a text model.

    Those are Llama and Qwen3: the same decoder, and nothing else.
    """

    text: TextConfig
    vision: VisionConfig | None = None
    video_token_id: int = 151656
    image_token_id: int = 151655
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self):
        if self.vision is None:
            return
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"vision out_hidden_size={self.vision.out_hidden_size} must equal the decoder's "
                f"hidden_size={self.text.hidden_size}"
            )
        if len(self.vision.deepstack_visual_indexes) > self.text.num_hidden_layers:
            raise ConfigError(
                f"{len(self.vision.deepstack_visual_indexes)} DeepStack features do not fit into "
                f"{self.text.num_hidden_layers} decoder layers"
            )

    def to_hf(self) -> dict[str, Any]:
        """The contents of `config.json` as transformers reads it."""
        text = dataclasses.asdict(self.text)
        normed, section = text.pop("qk_norm"), text.pop("mrope_section")
        rope = {"rope_type": "default", "rope_theta": text["rope_theta"]}
        text |= {"hidden_act": "silu", "attention_bias": False, "max_position_embeddings": 262144}
        if self.vision is None:
            kind, name = ("qwen3", "Qwen3") if normed else ("llama", "Llama")
            return {
                "architectures": [f"{name}ForCausalLM"],
                "model_type": kind,
                "rope_parameters": rope,
                **text,
            }
        rope |= {"mrope_interleaved": True, "mrope_section": list(section)}
        text |= {"model_type": "qwen3_vl_text", "rope_scaling": rope}
        vision = dataclasses.asdict(self.vision)
        vision["deepstack_visual_indexes"] = list(self.vision.deepstack_visual_indexes)
        vision |= {"model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh"}
        ids = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name.endswith("_token_id")
        }
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "text_config": text,
            "vision_config": vision,
            "tie_word_embeddings": self.text.tie_word_embeddings,
            **ids,
        }

    @classmethod
    def from_hf(cls, raw: dict[str, Any], where: str = "config.json") -> Qwen3VLConfig:
        """Reads the contents of a `config.json`.

        Raises:
          ConfigError: for another architecture or a missing key, naming it and `where`.
        """
        kind = raw.get("model_type")
        if kind not in ("qwen3_vl", *_TEXT_MODELS):
            raise ConfigError(
                f"{where}: model_type is {kind!r}, but only dense Qwen3-VL ('qwen3_vl') can be "
                f"loaded, or for texts 'llama' and 'qwen3'"
            )
        try:
            if kind in _TEXT_MODELS:
                return cls(text=_text_model(raw, where))
            text, vision = dict(raw["text_config"]), dict(raw["vision_config"])
            rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
            text["mrope_section"] = tuple(rope.get("mrope_section", (24, 20, 20)))
            text["rope_theta"] = text.get("rope_theta", rope.get("rope_theta", 5e6))
            text["tie_word_embeddings"] = raw.get(
                "tie_word_embeddings", text.get("tie_word_embeddings", False)
            )
            vision["deepstack_visual_indexes"] = tuple(vision["deepstack_visual_indexes"])
            ids = {k: raw[k] for k in raw if k.endswith("_token_id") and k in _names(cls)}
            return cls(text=_pick(TextConfig, text), vision=_pick(VisionConfig, vision), **ids)
        except (KeyError, TypeError) as error:
            name = "Qwen3-VL" if kind == "qwen3_vl" else kind
            raise ConfigError(f"{where}: not a complete {name} config ({error})") from None

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Qwen3VLConfig:
        """Reads `folder/config.json`; ConfigError if it is absent, broken or another model's."""
        path = pathlib.Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text())
        except OSError:
            raise ConfigError(
                f"{path} does not exist: give the folder of a Hugging Face model"
            ) from None
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON ({error})") from None
        return cls.from_hf(raw, str(path))


# Text models by `model_type`: whether they norm queries and keys, and their file's defaults.
_TEXT_MODELS = {
    "llama": {"qk_norm": False, "rms_norm_eps": 1e-6},
    "qwen3": {"qk_norm": True, "rms_norm_eps": 1e-6, "head_dim": 128},
}


def _text_model(raw: dict[str, Any], where: str) -> TextConfig:
    """The decoder of a text model; ConfigError where it is another one than Qwen3-VL's."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for key, found, plain in (
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
        ("attention_bias", raw.get("attention_bias", False), False),
        ("mlp_bias", raw.get("mlp_bias", False), False),
        ("use_sliding_window", raw.get("use_sliding_window", False), False),
        ("rope_type", kind, "default"),
    ):
        if found != plain:
            raise ConfigError(f"{where}: {key} is {found!r}, but only {plain!r} can be loaded")
    heads = raw["num_attention_heads"]
    known = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads}
    known |= _TEXT_MODELS[raw["model_type"]]
    known |= {key: value for key, value in raw.items() if value is not None}
    theta = raw.get("rope_theta") or rope.get("rope_theta", 1e4)
    # The three positions of a text's token are one.
    section = (known["head_dim"] // 2, 0, 0)
    return _pick(TextConfig, known | {"rope_theta": theta, "mrope_section": section})


def _names(cls) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _pick(cls, raw: dict[str, Any]):
    return cls(**{k: v for k, v in raw.items() if k in _names(cls)})
