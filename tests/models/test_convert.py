"""Weights on disk: round trips, and the sentence for everything that can be wrong with a folder."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from videomem_jax.models import convert
from videomem_jax.models.config import ConfigError, Qwen3VLConfig

QUERY = "model.language_model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(make):
    return make.model(make.config({"tie_word_embeddings": False}))


@pytest.fixture
def folder(model, tmp_path):
    convert.save_pretrained(model, tmp_path)
    return tmp_path


def assert_equal(a, b):
    """Both models have the same config and the same bits."""
    assert a.config == b.config
    left, right = (jax.tree.leaves(nnx.state(x, nnx.Param)) for x in (a, b))
    for x, y in zip(left, right, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_exact(make, tmp_path, tied):
    model = make.model(make.config({"tie_word_embeddings": tied}), seed=1)
    convert.save_pretrained(model, tmp_path)
    again = convert.load_pretrained(tmp_path)
    assert_equal(model, again)
    assert (again.lm_head is None) == tied
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    convert.save_pretrained(again, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_names_shapes_and_layout_are_the_checkpoints(model, folder):
    stored = load_file(folder / "model.safetensors")
    assert stored["model.visual.patch_embed.proj.weight"].shape == (32, 3, 2, 16, 16)
    assert stored["model.visual.deepstack_merger_list.1.norm.bias"].shape == (128,)
    assert stored["model.visual.pos_embed.weight"].shape == (16, 32)
    assert stored["model.language_model.layers.1.mlp.down_proj.weight"].shape == (32, 48)
    assert stored["lm_head.weight"].shape == (97, 32)
    kernel = np.asarray(model.language_model.layers.self_attn.q_proj.kernel[...])
    np.testing.assert_array_equal(stored[QUERY], kernel[1].T)
    kernel = np.asarray(model.visual.patch_embed.kernel[...])
    assert (
        stored["model.visual.patch_embed.proj.weight"][5, 2, 1, 3, 7]
        == kernel[np.ravel_multi_index((2, 1, 3, 7), (3, 2, 16, 16)), 5]
    )


def test_several_files_with_an_index(model, tmp_path):
    convert.save_pretrained(model, tmp_path, max_file_bytes=100_000)
    files = {p.name for p in tmp_path.glob("*.safetensors")}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and files == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(
        x.size * 4 for x in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
    assert_equal(model, convert.load_pretrained(tmp_path))

    # A later save in one file must not leave the old ones, nor the other way round.
    convert.save_pretrained(model, tmp_path)
    names = {"config.json", "model.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == names
    convert.save_pretrained(model, tmp_path, max_file_bytes=100_000)
    assert not (tmp_path / "model.safetensors").exists()


def test_bfloat16(model, tmp_path):
    convert.save_pretrained(model, tmp_path, dtype=jnp.bfloat16)
    assert load_file(tmp_path / "model.safetensors")[QUERY].dtype == ml_dtypes.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    half = convert.load_pretrained(tmp_path, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    full = convert.load_pretrained(tmp_path)
    as_half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param))
    for expected, a, b in zip(
        *(jax.tree.leaves(s) for s in (as_half, nnx.state(half), nnx.state(full))), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(expected))
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(b), np.asarray(expected, np.float32))
    # Weights that came in as bfloat16 and were not trained go out with the same bits.
    convert.save_pretrained(full, tmp_path / "again", dtype=jnp.bfloat16)
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("axis, small_shard", [(0, 2**26), (1, 2**26), (1, 0)])
def test_reads_into_shards(model, folder, monkeypatch, axis, small_shard):
    monkeypatch.setattr("videomem_jax.models.convert.read._SMALL_SHARD", small_shard)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))

    def place(leaf):
        """Splits kernels where the devices divide them; [in, out] for axis 0, 1."""
        spec = [None] * leaf.ndim
        if leaf.ndim == 3 and leaf.shape[axis - 2] % mesh.size == 0:
            spec[axis - 2] = "fsdp"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    loaded = convert.load_pretrained(folder, shardings=lambda state: jax.tree.map(place, state))
    assert_equal(model, loaded)
    kernel = loaded.language_model.layers.mlp.up_proj.kernel[...]
    assert kernel.sharding.is_equivalent_to(place(kernel), kernel.ndim)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    replicated = convert.load_pretrained(folder, shardings=everywhere)
    assert_equal(model, replicated)
    assert replicated.visual.pos_embed[...].sharding == everywhere


def test_tied_model_may_carry_a_copy_of_its_embedding(make, tmp_path):
    model = make.model(make.config())
    convert.save_pretrained(model, tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    head = stored["model.language_model.embed_tokens.weight"].copy()
    save_file(stored | {"lm_head.weight": head}, path)
    assert_equal(model, convert.load_pretrained(tmp_path))
    head[40, 3] += 1
    save_file(stored | {"lm_head.weight": head}, path)
    with pytest.raises(
        convert.WeightsError, match=r"lm_head.weight differs .* tie_word_embeddings"
    ):
        convert.load_pretrained(tmp_path)


def change(**tensors):
    """Replaces tensors of the one file (None takes one away); `_` in a name stands for `.`."""

    def apply(folder):
        path = folder / "model.safetensors"
        stored = load_file(path)
        for name, make in tensors.items():
            value = make(stored.pop(name, None)) if callable(make) else make
            stored |= {} if value is None else {name: value}
        save_file(stored, path)

    return apply


def index(**places):
    """Puts an index in place of the one file; `places` are entries beside the file's own."""

    def apply(folder):
        one, part = folder / "model.safetensors", folder / "model-00001-of-00001.safetensors"
        names = dict.fromkeys(load_file(one), part.name) | places
        one.rename(part)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return apply


def cut(size):
    def apply(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return apply


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def edit_config(**keys):
    def apply(folder):
        path = folder / "config.json"
        raw = json.loads(path.read_text())
        for key, value in keys.items():
            if value is None:
                raw.pop(key)
            else:
                raw[key] = raw[key] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(raw))

    return apply


def both(*changes):
    def apply(folder):
        for one in changes:
            one(folder)

    return apply


WEIGHTS = {
    "missing": (
        change(**{QUERY: lambda old: None}),
        r"tensor model\S+layers.1.self_attn.q_proj.weight \[64, 32\] is missing, though config",
    ),
    "several missing": (
        change(**{QUERY: lambda old: None, "lm_head.weight": lambda old: None}),
        r"is missing \(and 1 more\)",
    ),
    "extra": (
        change(surplus=np.zeros(3, np.float32)),
        r"model.safetensors: tensor surplus is unexpected: the model that config.json describes",
    ),
    "shape": (
        change(**{QUERY: lambda old: old[:-1]}),
        r"safetensors: tensor \S+q_proj.weight has shape \[63, 32\], .* calls for \[64, 32\]",
    ),
    "quantised": (
        change(**{QUERY: lambda old: old.astype(np.int8)}),
        r"q_proj.weight is stored as I8, but only F32, F16, BF16 can be loaded",
    ),
    "cut short": (cut(200_000), r"model.safetensors is not a whole safetensors file \(.*download"),
    "cut in the header": (cut(100), r"model.safetensors is not a whole safetensors file"),
    "empty": (cut(0), r"model.safetensors is not a whole safetensors file"),
    "none": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"holds neither model.safetensors nor model.safetensors.index.json",
    ),
    "no file of the index": (
        index(surplus="model-00007.safetensors"),
        r"model-00007.safetensors does not exist, but model.safetensors.index.json names it",
    ),
    "not in the file of the index": (
        index(surplus="model-00001-of-00001.safetensors"),
        r"model-00001-of-00001.safetensors lacks surplus, which model.safetensors.index.json",
    ),
    "index without names": (
        both(index(), write("model.safetensors.index.json", "{}")),
        r"index.json is not an index of safetensors files \(KeyError: 'weight_map'\)",
    ),
    "index no JSON": (
        both(index(), write("model.safetensors.index.json", '{"weight_map": {')),
        r"index.json is not an index of safetensors files \(JSONDecodeError",
    ),
    "another depth": (
        edit_config(text_config={"num_hidden_layers": 3}),
        r"tensor model.language_model.layers.2\.\S+ .* is missing \(and 10 more\)",
    ),
}

CONFIGS = {
    "none": (lambda folder: (folder / "config.json").unlink(), r"config.json does not exist"),
    "no JSON": (write("config.json", "{"), r"config.json is not valid JSON"),
    "MoE": (
        edit_config(model_type="qwen3_vl_moe"),
        r"model_type is 'qwen3_vl_moe', but only dense",
    ),
    "no tower": (
        edit_config(vision_config=None),
        r"config.json: not a complete Qwen3-VL config \('vision_config'\)",
    ),
    "heads": (
        edit_config(text_config={"num_key_value_heads": 3}),
        r"num_attention_heads=4 must be a multiple of num_key_value_heads=3",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_bad_weights_are_named(folder, case):
    spoil, sentence = WEIGHTS[case]
    spoil(folder)
    with pytest.raises(convert.WeightsError, match=sentence) as caught:
        convert.load_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config_is_named(folder, case):
    spoil, sentence = CONFIGS[case]
    spoil(folder)
    with pytest.raises(ConfigError, match=sentence) as caught:
        convert.load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_split_layers_are_refused(folder, monkeypatch):
    monkeypatch.setattr("videomem_jax.models.convert.read._SMALL_SHARD", 0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    with pytest.raises(convert.WeightsError, match="the axis of layers is split over fsdp"):
        convert.load_pretrained(folder, shardings=split)


def test_failed_save_keeps_what_was_there(make, model, folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("videomem_jax.models.convert.write.save_file", full)
    with pytest.raises(convert.WeightsError, match=r"cannot be written \(.*No space left"):
        convert.save_pretrained(make.model(model.config, seed=5), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert_equal(model, convert.load_pretrained(folder))


def test_config_of_a_released_model_is_read(make):
    """`rope_scaling` of transformers 4 and `rope_parameters` of 5 give the same config."""
    config = make.config()
    raw = config.to_hf()
    assert Qwen3VLConfig.from_hf(raw) == config
    text = raw["text_config"]
    raw["text_config"] = {k: v for k, v in text.items() if k not in ("rope_theta", "rope_scaling")}
    raw["text_config"]["rope_parameters"] = text["rope_scaling"]
    assert Qwen3VLConfig.from_hf(raw) == config
