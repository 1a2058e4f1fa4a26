"""Llama and Qwen3, which are Qwen3-VL's decoder alone, held against transformers in float32."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from tests.models import scenes
from videomem_jax import run, settings
from videomem_jax.models import convert
from videomem_jax.models.config import ConfigError, Qwen3VLConfig
from videomem_jax.models.convert.__main__ import main
from videomem_jax.tokenizer import CHAT, TAGS, Tokenizer

SCENES = [(seed, qk_norm) for seed in (0, 6, 12, 18) for qk_norm in (False, True)]


@pytest.mark.parametrize(("seed", "qk_norm"), SCENES)
def test_logits_gradients_and_greedy_tokens(tmp_path, seed, qk_norm):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("tests.models.reference")
    torch.set_num_threads(1)
    scene = scenes.draw_text(seed, qk_norm)
    model = scenes.random_model(scene.config, seed)
    theirs = reference.theirs(model, scene, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == (
        "qwen3" if qk_norm else "llama"
    )
    assert scenes.compare(scenes.ours(model, scene), theirs, "") == 7 + qk_norm


@pytest.mark.parametrize("qk_norm", [False, True])
def test_round_trip(tmp_path, qk_norm):
    model = scenes.random_model(scenes.draw_text(6, qk_norm).config)
    convert.save_pretrained(model, tmp_path)
    again = convert.load_pretrained(tmp_path)
    assert again.config == model.config and again.visual is None
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (model, again)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    convert.save_pretrained(again, tmp_path / "again", source=tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_clips_of_text_have_no_features():
    scene = scenes.draw_text(0, False)
    model = scenes.random_model(scene.config)
    features = model.see(
        *(np.zeros(shape, np.int32) for shape in ((3, 0, 4, 8), (3, 4, 2), (3, 2)))
    )
    d = scene.config.text.hidden_size
    assert features.embeds.shape == (3, 0, d) and features.deepstack.shape == (0, 3, 0, d)
    positions = scene.positions()
    arrays = scene.tokens[:2], positions[:, :2], scene.mask[:2]
    with_features = model.prefill(*arrays, features, scene.slot[:2])[0]
    np.testing.assert_array_equal(with_features, model.prefill(*arrays)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_rows_for_the_tags_are_added(tmp_path, tied):
    tokenizer = Tokenizer.train(["a text of few words"], 300, specials=CHAT)
    text = dataclasses.replace(
        scenes.draw_text(0, False).config.text,
        vocab_size=len(tokenizer) - len(TAGS),
        tie_word_embeddings=tied,
    )
    model = scenes.random_model(Qwen3VLConfig(text))
    convert.save_pretrained(model, tmp_path / "full")
    tokenizer.save(tmp_path / "full", tags=False)
    s = settings.load_sizes(tmp_path / "full", frames=0)
    with pytest.raises(
        ConfigError, match=f"has {len(tokenizer)} tokens, .* {text.vocab_size} rows"
    ):
        run.load(s, tmp_path / "full")
    main(["add-rows", str(tmp_path / "full"), str(tmp_path / "more")])
    more = run.load(s, tmp_path / "more")
    rows = more.model.config.text.vocab_size
    assert rows % 128 == 0 and rows >= len(tokenizer)
    assert more.tokenizer.encode("a text") == tokenizer.encode("a text")
    tokens = np.arange(8)[None]
    arrays = tokens, np.broadcast_to(np.arange(8), (3, 1, 8)), np.ones((1, 8), bool)
    before, after = (m.logits(m.prefill(*arrays)[0]) for m in (model, more.model))
    np.testing.assert_allclose(before, after[..., : text.vocab_size], rtol=0, atol=1e-5)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_theta": 100000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def test_what_a_published_config_says():
    config = Qwen3VLConfig.from_hf(LLAMA)
    text = config.text
    assert config.vision is None and not text.qk_norm and text.tie_word_embeddings
    assert (text.head_dim, text.rope_theta, text.rms_norm_eps) == (64, 1e5, 1e-5)
    assert Qwen3VLConfig.from_hf(LLAMA | {"model_type": "qwen3"}).text.head_dim == 128


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("use_sliding_window", True),
    ],
)
def test_other_architectures_are_refused(key, value):
    with pytest.raises(ConfigError, match=r"^config.json: \w+ is .*, but only .* can be loaded$"):
        Qwen3VLConfig.from_hf(LLAMA | {key: value})
