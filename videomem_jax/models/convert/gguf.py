"""A GGUF file (llama.cpp's format) of a Llama or Qwen3 as a Hugging Face folder.

Weights are dequantised, the rows of Llama's queries and keys put back in Hugging Face's order, and
the tokenizer is made from the file's own list. The `gguf` package reads it
(requirements-gguf.txt).
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from videomem_jax.models.config import ConfigError, Qwen3VLConfig, TextConfig
from videomem_jax.models.convert.table import HEAD, ONE_FILE, WeightsError, tensors
from videomem_jax.models.qwen3_vl import abstract
from videomem_jax.tokenizer import TAGS

_KINDS = ("llama", "qwen3")
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EMBEDDING = "model.embed_tokens.weight"
_WHOLE = {
    EMBEDDING: "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
# Rows of the embedding are made a multiple of this where the tags need more: they divide well.
_ROWS = 128
# Types of tokens that are no ordinary text: control, defined by the user, a row that is not used.
_CONTROL, _OWN, _UNUSED = 3, 4, 5
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert(file: str | os.PathLike, folder: str | os.PathLike, dtype=np.float32) -> None:
    """Writes config.json, weights and tokenizer of a GGUF file; config.json last.

    Where the embedding has no free rows for the tags of the memory format, it gets some, of zeros.

    Raises:
      WeightsError: the file cannot be read, or a tensor is missing or of another shape.
      ConfigError: it is of another architecture, or its tokenizer of another kind.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "reading a GGUF file needs: pip install -r requirements-gguf.txt"
        ) from None
    folder = pathlib.Path(folder)
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read as a GGUF file ({error})") from None
    facts = {name: field.contents() for name, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    made = _tokenizer(facts, str(file))
    rows = len(_array(gguf, stored, _WHOLE[EMBEDDING], str(file)))
    rows = rows_for(made.get_vocab_size() + len(TAGS), rows)
    config, raw = _config(facts, stored, rows, str(file))
    content = {}
    for entry in tensors(abstract(config)):
        for name in entry.names:
            value = _array(gguf, stored, _theirs(name), str(file))
            if name.endswith((".q_proj.weight", ".k_proj.weight")) and not config.text.qk_norm:
                value = _unpermuted(value, config.text.head_dim)
            if name in (EMBEDDING, HEAD):
                value = np.pad(value, ((0, entry.shape[0] - len(value)), (0, 0)))
            if value.shape != entry.shape:
                raise WeightsError(
                    f"{file}: tensor {_theirs(name)} has shape {list(value.shape)}, but its sizes "
                    f"call for {list(entry.shape)}"
                )
            content[name] = value.astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(content, folder / ONE_FILE, metadata={"format": "pt"})
    made.save(str(folder / "tokenizer.json"))
    ids = {key: facts.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")}
    words = facts["tokenizer.ggml.tokens"]
    told = {"tokenizer_class": "PreTrainedTokenizerFast"}
    told |= {f"{key}_token": words[i] for key, i in ids.items() if i is not None}
    if "tokenizer.chat_template" in facts:
        told["chat_template"] = facts["tokenizer.chat_template"]
    _write(folder / "tokenizer_config.json", told)
    raw |= {f"{key}_token_id": i for key, i in ids.items()} | {"dtype": np.dtype(dtype).name}
    _write(folder / "config.json", raw)


def _write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(
    facts: Mapping[str, Any], stored: Mapping[str, Any], rows: int, file: str
) -> tuple[Qwen3VLConfig, dict[str, Any]]:
    """The model's sizes, and its config.json."""
    kind = facts.get("general.architecture")
    if kind not in _KINDS:
        raise ConfigError(
            f"{file}: the architecture is {kind!r}, but only {' and '.join(_KINDS)} can be read"
        )
    if any(key.startswith(f"{kind}.rope.scaling.") for key in facts):
        raise ConfigError(f"{file}: its rotary embedding is scaled, which cannot be read")

    def size(key, default=None):
        value = facts.get(f"{kind}.{key}", default)
        if value is None:
            raise ConfigError(f"{file}: {kind}.{key} is missing")
        return value

    heads, width = size("attention.head_count"), size("embedding_length")
    head = size("attention.key_length", width // heads)
    text = TextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=size("feed_forward_length"),
        num_hidden_layers=size("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=size("attention.head_count_kv", heads),
        head_dim=head,
        # Kept as a float32: the shortest decimal that is the same is what was meant.
        rms_norm_eps=float(str(np.float32(size("attention.layer_norm_rms_epsilon")))),
        rope_theta=float(size("rope.freq_base", 1e4)),
        mrope_section=(head // 2, 0, 0),
        tie_word_embeddings="output.weight" not in stored,
        qk_norm=kind == "qwen3",
    )
    config = Qwen3VLConfig(text)
    return config, config.to_hf() | {"max_position_embeddings": size("context_length", 4096)}


def rows_for(words: int, rows: int) -> int:
    """Rows of an embedding that has `rows`, for so many tokens."""
    return rows if words <= rows else -(-words // _ROWS) * _ROWS


def _theirs(name: str) -> str:
    """A tensor's name in a GGUF file."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def _array(gguf, stored: Mapping[str, Any], name: str, file: str) -> np.ndarray:
    """A tensor in float32, [out, in]."""
    if name not in stored:
        raise WeightsError(f"{file}: tensor {name} is missing")
    tensor = stored[name]
    try:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise WeightsError(
            f"{file}: tensor {name} is stored as {tensor.tensor_type.name}, which the gguf package "
            f"cannot read"
        ) from None
    return value.reshape([int(n) for n in tensor.shape[::-1]])


def _unpermuted(value: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a head as halves that rotate together; llama.cpp keeps those of a pair adjacent."""
    rows = value.reshape(-1, head_dim // 2, 2, value.shape[1])
    return rows.swapaxes(1, 2).reshape(value.shape)


def _tokenizer(facts: Mapping[str, Any], file: str) -> tokenizers.Tokenizer:
    """The byte-level BPE tokenizer that the file lists."""
    model, kind = (facts.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN), "isolated")
    known = {
        "smollm": [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "qwen2": [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    }
    if model != "gpt2" or kind not in known:
        raise ConfigError(
            f"{file}: its tokenizer is {model!r}, splitting as {kind!r}, but only byte-level BPE "
            f"('gpt2') can be read, splitting as {', '.join(known)}"
        )
    words, types = list(facts["tokenizer.ggml.tokens"]), list(facts["tokenizer.ggml.token_type"])
    while types and types[-1] == _UNUSED:  # rows of the embedding that are free
        words.pop(), types.pop()
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges)
    )
    if kind == "qwen2":
        made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(known[kind])
    made.decoder = tokenizers.decoders.ByteLevel()
    for number, special in ((_CONTROL, True), (_OWN, False)):
        added = [word for word, of in zip(words, types, strict=True) if of == number]
        made.add_tokens([_added(word, special) for word in added])
    return made


def _added(word: str, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(word, special=special, normalized=False)
