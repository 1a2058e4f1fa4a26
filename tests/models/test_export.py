"""What goes out again: untouched tensors bit for bit, the files beside them, tags, LoRA merged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from videomem_jax import export
from videomem_jax.models import convert
from videomem_jax.models.qwen3_vl import FAVOUR
from videomem_jax.tokenizer import TAGS, Tokenizer

FILE = "model.safetensors"
DOWN = "model.language_model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
COMPANIONS = {
    "tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": "x"}}, "kept": 1},
    "added_tokens.json": {"x": 5},
    "preprocessor_config.json": {"patch_size": 16},
    "video_preprocessor_config.json": {"fps": 2},
    "generation_config.json": {"top_k": 20},
    "chat_template.json": {"chat_template": "{{ x }}"},
}


@pytest.fixture(params=[jnp.bfloat16, jnp.float32, jnp.float16], ids=["bf16", "f32", "f16"])
def source(request, make, tokenizer, tmp_path):
    """A released model's folder in one dtype, with its other files and keys of its own."""
    folder = tmp_path / "source"
    model = make.model(make.config({"vocab_size": 320, "tie_word_embeddings": False}), seed=3)
    convert.save_pretrained(model, folder, dtype=request.param, max_file_bytes=300_000)
    tokenizer.save(folder, tags=False)
    for name, content in COMPANIONS.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "training_args.bin").write_text("no part of a model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "x", "own": 7}))
    return folder


def stored(folder):
    """Every tensor of a folder."""
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


@pytest.mark.parametrize("kept", [jnp.float32, jnp.bfloat16], ids=["as-f32", "as-bf16"])
def test_untouched_tensors_keep_their_bits(source, tmp_path, kept):
    model = convert.load_pretrained(source, param_dtype=kept)
    down = model.language_model.layers.mlp.down_proj.kernel
    down[...] = down[...].at[1].add(0.5)
    convert.save_pretrained(model, tmp_path / "out", source=source)
    came, gone = stored(source), stored(tmp_path / "out")
    assert came.keys() == gone.keys()
    changed = {
        name
        for name in came
        if came[name].dtype != gone[name].dtype or came[name].tobytes() != gone[name].tobytes()
    }
    assert changed == {DOWN}
    assert gone[DOWN].dtype == kept
    np.testing.assert_array_equal(gone[DOWN], np.asarray(down[...][1]).T)


def test_other_keys_of_the_config_stay(source, tmp_path):
    model = convert.load_pretrained(source)
    convert.save_pretrained(model, tmp_path / "out", source=source)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    came = json.loads((source / "config.json").read_text())
    assert raw["own"] == 7 and "torch_dtype" not in raw
    assert raw["dtype"] == came["dtype"]
    assert raw["text_config"] == came["text_config"]


def test_a_dtype_that_was_asked_for_wins(source, tmp_path):
    model = convert.load_pretrained(source)
    convert.save_pretrained(model, tmp_path / "out", source=source, dtype=jnp.bfloat16)
    assert {v.dtype for v in stored(tmp_path / "out").values()} == {jnp.dtype(jnp.bfloat16)}


def test_a_folder_saved_over_its_own_source(source):
    came = stored(source)
    model = convert.load_pretrained(source)
    convert.save_pretrained(model, source, source=source)
    gone = stored(source)
    assert all(gone[name].tobytes() == came[name].tobytes() for name in came)


def test_another_models_source_is_refused(make, source, tmp_path):
    other = make.model(make.config({"vocab_size": 320, "num_hidden_layers": 3}))
    with pytest.raises(convert.WeightsError, match="config.json describes another model"):
        convert.save_pretrained(other, tmp_path / "out", source=source)


def test_companions_and_tags_go_along(source, tmp_path):
    out = tmp_path / "out"
    tokenizer, model = Tokenizer.load(source), convert.load_pretrained(source)
    assert len(tokenizer.new_tags) == len(TAGS)
    model.start_tokens(tokenizer.new_tags)
    export.save(model, tokenizer, out, source=source)

    names = {path.name for path in out.iterdir()}
    assert names >= {"tokenizer.json", "config.json", *COMPANIONS}
    assert "training_args.bin" not in names
    for name in set(COMPANIONS) - {"tokenizer_config.json", "added_tokens.json"}:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    ids = {tag: tokenizer._inner.token_to_id(tag) for tag in TAGS}
    config = json.loads((out / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    assert config["kept"] == 1 and added["5"] == {"content": "x"}
    assert {added[str(i)]["content"]: i for i in ids.values()} == ids
    assert json.loads((out / "added_tokens.json").read_text()) == {"x": 5} | ids

    again = Tokenizer.load(out)
    assert again.ids == tokenizer.ids and not again.new_tags
    rows = np.asarray(convert.load_pretrained(out).language_model.embed_tokens[...])
    for new, others in tokenizer.new_tags.items():
        start = FAVOUR * stored(source)[EMBEDDING][others].astype(np.float32).mean(0)
        np.testing.assert_allclose(rows[new], start, atol=1e-6)
    untouched = np.delete(np.arange(len(rows)), list(tokenizer.new_tags))
    np.testing.assert_array_equal(
        rows[untouched], stored(source)[EMBEDDING].astype(np.float32)[untouched]
    )


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "unlisted"])
def test_transformers_reads_the_tags(qwen, qwen_folder, make, tmp_path, listed):
    """The real tokenizer, as transformers loads it from the folder that is written."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    source = tmp_path / "source"
    model = make.model(make.config({"hidden_size": 8, "vocab_size": 151936}, {"depth": 2}))
    convert.save_pretrained(model, source)
    qwen.save(source, tags=False)
    raw = json.loads((qwen_folder / "tokenizer_config.json").read_text())
    if not listed:
        raw.pop("added_tokens_decoder")
    (source / "tokenizer_config.json").write_text(json.dumps(raw))
    export.save(model, Tokenizer.load(source), tmp_path / "out", source=source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    i = qwen.ids
    wanted = [i.memory_open, *qwen.encode("red card"), i.memory_close, i.answer_open]
    wanted += [i.letters[1], i.answer_close, i.im_end]
    text = "<memory>red card</memory><answer>B</answer><|im_end|>"
    assert theirs(text)["input_ids"] == wanted
    assert theirs.decode(wanted) == text


def peft_adapter(folder, shapes, rank, seed=0, **config):
    """An adapter as peft writes it; its matrices by module."""
    rng, tensors, made = np.random.default_rng(seed), {}, {}
    for module, (out, inputs) in shapes.items():
        a = rng.standard_normal((rank, inputs), np.float32)
        b = rng.standard_normal((out, rank), np.float32)
        made[module] = (a, b)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return made


Q = "model.language_model.layers.0.self_attn.q_proj"
FC = "model.visual.merger.linear_fc2"
HEAD = "lm_head"


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2}}])
def test_merge_lora(make, tmp_path, config):
    model = make.model(make.config({"tie_word_embeddings": False}))
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    shapes = {Q: (64, 32), FC: (32, 128), HEAD: (97, 32)}
    made = peft_adapter(tmp_path / "a", shapes, rank=4, **config)
    assert convert.merge_lora(model, tmp_path / "a") == 3
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    expected = {}
    for entry, leaf in zip(convert.tensors(model), jax.tree.leaves(before), strict=True):
        for i, name in enumerate(entry.names):
            expected[name] = entry.stored(leaf[i] if entry.stacked else leaf)
    for module, (a, b) in made.items():
        alpha = 2 if "alpha_pattern" in config and module == Q else 6
        scale = alpha / (2 if "use_rslora" in config else 4)
        expected[f"{module}.weight"] = expected[f"{module}.weight"] + scale * b @ a
    for entry, leaf in zip(convert.tensors(model), jax.tree.leaves(after), strict=True):
        for i, name in enumerate(entry.names):
            got = entry.stored(leaf[i] if entry.stacked else leaf)
            if name.removesuffix(".weight") in made:
                np.testing.assert_allclose(got, expected[name], rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(got, expected[name])


@pytest.mark.parametrize(
    "shapes, config, sentence",
    [
        ({Q: (64, 32)}, {"use_dora": True}, "use_dora=True, but only plain LoRA"),
        ({Q: (64, 32)}, {"lora_alpha": None}, "lora_alpha is missing"),
        ({Q: (64, 33)}, {}, r"lora_A \[4, 33\] and lora_B \[64, 4\] of model\S+ do not make"),
        ({Q + "x": (64, 32)}, {}, r"holds base_model\S+q_projx.lora_A.weight, which is no LoRA"),
        ({}, {}, "holds nothing, which is no LoRA"),
    ],
)
def test_bad_adapters_are_sentences(make, tmp_path, shapes, config, sentence):
    peft_adapter(tmp_path / "a", shapes, rank=4, **config)
    with pytest.raises(convert.WeightsError, match=sentence):
        convert.merge_lora(make.model(make.config()), tmp_path / "a")


def test_no_adapter(make, tmp_path):
    with pytest.raises(convert.WeightsError, match="adapter_config.json cannot be read"):
        convert.merge_lora(make.model(make.config()), tmp_path)
