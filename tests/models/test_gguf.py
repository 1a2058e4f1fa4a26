"""GGUF files as Hugging Face folders: what is written with the gguf package is read back."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests.models import scenes
from videomem_jax.data import story
from videomem_jax.models import convert
from videomem_jax.models.config import ConfigError, Qwen3VLConfig, TextConfig
from videomem_jax.models.convert.__main__ import main
from videomem_jax.models.convert.gguf import convert as read
from videomem_jax.tokenizer import CHAT, TAGS, Tokenizer

gguf = pytest.importorskip("gguf")

VOCAB = 512
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def words():
    """A tokenizer's list: with as many tokens as the embedding has rows, none is free for a tag."""
    corpus = [f" {word}" for part in story.THINGS.values() for word in part]
    tokenizer = Tokenizer.train(corpus * 9, VOCAB, specials=CHAT)
    inner = json.loads(tokenizer._inner.to_str())
    tokens = [*inner["model"]["vocab"], *CHAT]
    tokens += [f"<row {i}>" for i in range(VOCAB - len(tokens))]
    return tokens, [" ".join(pair) for pair in inner["model"]["merges"]], tokenizer


def model_of(kind, tied=True):
    text = TextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        mrope_section=(8, 0, 0),
        tie_word_embeddings=tied,
        qk_norm=kind == "qwen3",
    )
    return scenes.random_model(Qwen3VLConfig(text))


def paired(weight, head):
    """Rows of a head, whose halves rotate together, pair by pair as llama.cpp has them."""
    out = np.empty_like(weight)
    for first in range(0, len(weight), head):
        for i in range(head // 2):
            out[first + 2 * i] = weight[first + i]
            out[first + 2 * i + 1] = weight[first + head // 2 + i]
    return out


def write(path, model, words, kind, **changes):
    """A GGUF file of a model; `changes` replace facts, or (None) leave a tensor out."""
    tokens, merges, _ = words
    text = model.config.text
    out = gguf.GGUFWriter(path, changes.get("architecture", kind))
    out.add_context_length(2048)
    out.add_embedding_length(text.hidden_size)
    out.add_block_count(text.num_hidden_layers)
    out.add_feed_forward_length(text.intermediate_size)
    out.add_head_count(text.num_attention_heads)
    out.add_head_count_kv(text.num_key_value_heads)
    if kind == "qwen3":
        out.add_key_length(text.head_dim)
    out.add_layer_norm_rms_eps(text.rms_norm_eps)
    out.add_rope_freq_base(text.rope_theta)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(changes.get("pre", "qwen2"))
    out.add_token_list(tokens)
    free = 5 if changes.get("free") else 1
    types = [3 if t in CHAT else free if t.startswith("<row") else 1 for t in tokens]
    out.add_token_types(types)
    out.add_token_merges(merges)
    out.add_bos_token_id(tokens.index("<|im_start|>"))
    out.add_eos_token_id(tokens.index("<|im_end|>"))
    for entry, leaf in zip(
        convert.tensors(model), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True
    ):
        for i, name in enumerate(entry.names):
            value = entry.stored(np.asarray(leaf[i] if entry.stacked else leaf))
            part = name.split(".")
            theirs = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
            theirs = f"{theirs.get(part[-2], '')}.weight"
            if part[1] == "layers":
                theirs = f"blk.{part[2]}.{NAMES[part[-2]]}.weight"
            if kind == "llama" and part[-2] in ("q_proj", "k_proj"):
                value = paired(value, text.head_dim)
            if changes.get("without") == theirs:
                continue
            how = None
            if part[-2] in ("up_proj", "embed_tokens"):
                how = gguf.GGMLQuantizationType.Q8_0
                value = gguf.quants.quantize(value, how)
            out.add_tensor(theirs, value, raw_dtype=how)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen3", True)])
def test_weights_and_config_come_back(words, tmp_path, kind, tied):
    model = model_of(kind, tied)
    main(["from-gguf", str(write(tmp_path / "m.gguf", model, words, kind)), str(tmp_path / "hf")])
    again = convert.load_pretrained(tmp_path / "hf")
    rows = again.config.text.vocab_size
    assert rows == VOCAB + 128  # room for the tags
    assert again.config == Qwen3VLConfig(
        TextConfig(**{**vars(model.config.text), "vocab_size": rows})
    )
    convert.save_pretrained(model, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("ours", "hf"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        found = theirs[name]
        if len(found) == rows:
            assert not found[VOCAB:].any()
            found = found[:VOCAB]
        close = 0.02 if "up_proj" in name or "embed" in name else 0  # those were quantised
        np.testing.assert_allclose(found, value, rtol=0, atol=close * np.abs(value).max())
        assert close == 0 or not np.array_equal(found, value)


def test_the_tokenizer_comes_back(words, tmp_path):
    tokens, _, tokenizer = words
    read(write(tmp_path / "m.gguf", model_of("llama"), words, "llama"), tmp_path / "hf")
    again = Tokenizer.load(tmp_path / "hf")
    for text in ("the lamp and the ladder", "It's 1987: Zoë   naïve\n\n中文", "<|im_start|>?"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text
    assert again.ids.im_end == tokens.index("<|im_end|>") and again.ids.video_pad is None
    assert again.ids.memory_open == len(tokens) and len(again) == len(tokens) + len(TAGS)
    told = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert told["eos_token"] == "<|im_end|>"


def test_transformers_reads_both_alike(words, tmp_path):
    pytest.importorskip("accelerate")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    read(write(tmp_path / "m.gguf", model_of("llama"), words, "llama"), tmp_path / "hf")
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.arange(40).reshape(2, 20)
    theirs = load(tmp_path, gguf_file="m.gguf", dtype=torch.float32)(ids).logits
    ours = load(tmp_path / "hf", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(ours[..., :VOCAB], theirs, rtol=0, atol=0)


def test_rows_that_are_free_are_for_the_tags(words, tmp_path):
    read(write(tmp_path / "m.gguf", model_of("llama"), words, "llama", free=True), tmp_path / "hf")
    assert convert.load_pretrained(tmp_path / "hf").config.text.vocab_size == VOCAB
    ids = Tokenizer.load(tmp_path / "hf").ids
    assert words[0][ids.memory_open].startswith("<row") and ids.answer_close < VOCAB


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"architecture": "gemma"}, ConfigError, "the architecture is 'gemma', but only llama and"),
        ({"pre": "dbrx"}, ConfigError, "splitting as 'dbrx', but only byte-level BPE"),
        (
            {"without": "blk.1.ffn_up.weight"},
            convert.WeightsError,
            "tensor blk.1.ffn_up.weight is missing",
        ),
    ],
)
def test_what_cannot_be_read_is_named(words, tmp_path, changes, error, sentence):
    path = write(tmp_path / "m.gguf", model_of("llama"), words, "llama", **changes)
    with pytest.raises(error, match=f"m.gguf: .*{sentence}"):
        read(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_another_file_is_named(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"no model" * 9)
    with pytest.raises(convert.WeightsError, match="m.gguf cannot be read as a GGUF file"):
        read(tmp_path / "m.gguf", tmp_path / "hf")
    with pytest.raises(convert.WeightsError, match="cannot be read as a GGUF file"):
        read(tmp_path / "none.gguf", tmp_path / "hf")
