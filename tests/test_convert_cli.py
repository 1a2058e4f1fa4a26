"""`python -m videomem_jax.models.convert`: checkpoints to Hugging Face folders and back."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from videomem_jax import command_line, run, settings, sharding
from videomem_jax.checkpoint import Checkpoints
from videomem_jax.models import convert
from videomem_jax.models.convert.__main__ import main
from videomem_jax.trainer import Trainer

CONFIG = """
from videomem_jax import settings

def get_config():
    config = settings.default()
    config.model.weights = {weights!r}
    config.memory.slots = config.memory.budget = 8
    return config
"""


@pytest.fixture(scope="module")
def hf(tiny, tokenizer, tmp_path_factory):
    """A small model's folder; its tokenizer has the tags."""
    folder = tmp_path_factory.mktemp("hf")
    convert.save_pretrained(nnx.merge(tiny.graph, tiny.state), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def config(hf, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG.format(weights=str(hf)))
    return path


@pytest.fixture(scope="module")
def trained(hf, config, tmp_path_factory):
    """A run's PRPO checkpoints: step 0 as the command makes it, and step 5 with other weights."""
    workdir = tmp_path_factory.mktemp("run")
    folder = workdir / "checkpoints" / "prpo"
    main(["to-orbax", str(hf), str(folder), "--config", str(config)])
    s = settings.freeze(command_line._file_config([f"--config={config}"]))
    loaded = run.load(s)
    trainer = Trainer(loaded.model, loaded.form, s, sharding.make_mesh(s.mesh), "prpo")
    checkpoints = Checkpoints(folder, 9)
    step, state, positions = checkpoints.restore(trainer.first)
    assert step == 0 and positions == [{}]
    for ours, first in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.first), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(first))
    grown = jax.tree.map(lambda a: a + 1, state.trained)
    checkpoints.save(5, state._replace(trained=grown, step=jnp.int32(5)), {"next_index": 3})
    checkpoints.close()
    return folder


def test_there_and_back_is_exact(hf, trained, tmp_path):
    main(["to-hf", str(trained), str(tmp_path / "out"), "--step", "0"])
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_newest_checkpoint_is_taken(hf, trained, tmp_path, capsys):
    main(["to-hf", str(trained), str(tmp_path / "out")])
    assert "the model of prpo, step 5" in capsys.readouterr().out
    came, gone = (load_file(f / "model.safetensors") for f in (hf, tmp_path / "out"))
    for name, value in came.items():
        frozen = name.startswith("model.visual.")
        np.testing.assert_array_equal(gone[name], value if frozen else value + 1)


def test_dtype(trained, tmp_path):
    main(["to-hf", str(trained), str(tmp_path / "out"), "--dtype", "bfloat16"])
    kinds = {v.dtype for v in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {jnp.dtype(jnp.bfloat16)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_prpo_has_the_cold_starts_frozen_weights(hf, trained, tmp_path):
    """Where the cold start trained the tower, PRPO's checkpoints belong to what it left."""
    before = trained.parent.parent / "coldstart_model"
    before.mkdir()
    tensors = load_file(hf / "model.safetensors")
    tensors["model.visual.pos_embed.weight"] += 2
    save_file(tensors, before / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (before / name).write_bytes((hf / name).read_bytes())
    try:
        main(["to-hf", str(trained), str(tmp_path / "out")])
        main(["to-hf", str(trained), str(tmp_path / "other"), "--base", str(hf)])
    finally:
        for path in before.iterdir():
            path.unlink()
        before.rmdir()
    for folder, more in ("out", 2), ("other", 0):
        found = load_file(tmp_path / folder / "model.safetensors")
        name = "model.visual.pos_embed.weight"
        expected = load_file(hf / "model.safetensors")[name] + more
        np.testing.assert_array_equal(found[name], expected)


def test_merge_lora(hf, tmp_path):
    name = "model.language_model.layers.0.mlp.up_proj"
    a, b = np.ones((2, 32), np.float32), np.ones((48, 2), np.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    parts = {f"base_model.model.{name}.lora_{x}.weight": m for x, m in (("A", a), ("B", b))}
    save_file(parts, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    main(["merge-lora", str(hf), str(adapter), str(tmp_path / "out")])
    came, gone = (load_file(f / "model.safetensors") for f in (hf, tmp_path / "out"))
    for key, value in came.items():
        expected = value + 4 if key == f"{name}.weight" else value
        np.testing.assert_array_equal(gone[key], expected)


def said(capsys, *args):
    """The one sentence of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    assert ended.value.code == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text
    return text


def test_mistakes_are_sentences(hf, config, trained, tmp_path, capsys):
    out = tmp_path / "out"
    new = tmp_path / "run" / "checkpoints" / "prpo"
    assert "is no folder of checkpoints: give WORKDIR/check" in said(capsys, "to-hf", hf, out)
    assert "holds no checkpoint: there are none" in said(capsys, "to-hf", new, out)
    text = said(capsys, "to-hf", trained, out, "--step", 3)
    assert "holds no checkpoint of step 3: there are steps 0, 5" in text
    text = said(capsys, "to-hf", trained, out, "--base", tmp_path / "nowhere")
    assert "nowhere/tokenizer.json does not exist" in text
    text = said(capsys, "to-hf", trained, out, "--base", run.BASE)
    assert "has shape" in text and "--base" in text
    text = said(capsys, "to-orbax", hf, trained, "--config", config)
    assert "already holds checkpoints" in text
    text = said(capsys, "to-orbax", hf, new)
    assert "config.json does not exist: give the run's configuration" in text
    text = said(capsys, "to-orbax", hf, new, "--config", "nowhere.py")
    assert "nowhere.py does not exist" in text
    text = said(capsys, "to-orbax", run.BASE, new, "--config", config)
    assert "is not trained in this run, and differs from that of" in text
    text = said(capsys, "merge-lora", hf, tmp_path, out)
    assert "adapter_config.json cannot be read" in text
    assert not out.exists() and not new.exists()


def test_a_damaged_checkpoint_is_a_sentence(trained, tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "prpo"
    for path in (trained / "0").rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(trained)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "0/state cannot be read (" in said(capsys, "to-hf", folder, tmp_path / "out")


@pytest.mark.slow
def test_it_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "videomem_jax.models.convert", "to-hf", tmp_path, tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
