"""Settings: every mistake gets a sentence that names the key, and a config comes back whole."""

import ast
import dataclasses
import functools
import importlib.util
import inspect
import operator
import pathlib
import re

import pytest
from ml_collections import config_dict

from videomem_jax import settings
from videomem_jax.models.config import ConfigError

# Of training runs; configs/eval.py has keys of its own (tests/test_benchmark.py).
FOLDER = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "eval")


def wrong(keys):
    """A configuration with some keys changed."""
    config = settings.default()
    config.update_from_flattened_dict(keys)
    return config


def said(config) -> str:
    """The sentence with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        settings.freeze(config)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hardware", "cpu", "one of any, tpu, gpu"),
        ("model.dtype", "float16", "one of float32, bfloat16"),
        ("prompt.answer", "word", "one of letter, text"),
        ("prompt.answer_tokens", 0, "at least 1"),
        ("prompt.options", 0, "at least 1"),
        ("data.task", "film", "one of records, needle"),
        ("prpo.adv_norm", "mean", "one of std, none"),
        ("prpo.loss_agg", "mean", "one of seq, token, constant"),
        ("prompt.segments", 0, "at least 1"),
        ("prompt.prefix_tokens", 0, "at least 1"),
        ("memory.slots", 0, "at least 1"),
        ("coldstart.batch", 0, "at least 1"),
        ("coldstart.accumulate", -1, "0 or more"),
        ("prpo.batch", -4, "at least 1"),
        ("prpo.learnt", 99, "must be 0 to segments"),
        ("prpo.accumulate", -1, "0 or more"),
        ("prpo.updates_per_rollout", 0, "at least 1"),
        ("eval.batch", 0, "at least 1"),
        ("eval.long_segments", 0, "at least 1"),
        ("checkpoints.every", 0, "at least 1"),
        ("checkpoints.keep", 0, "at least 1"),
        ("data.prefetch", 0, "at least 1"),
        ("data.threads", 0, "at least 1"),
        ("data.decoder_mb", 0, "at least 1"),
        ("data.time_limit", 0.0, "above 0"),
        ("data.blank", -0.1, "0 or more"),
        ("data.cache_mb", -1, "0 or more"),
        ("data.min_duration", -1.0, "0 or more"),
        ("data.max_duration", -1.0, "0 or more"),
        ("coldstart.steps", -1, "0 or more"),
        ("prpo.steps", -1, "0 or more"),
        ("data.workers", -1, "0 or more"),
        ("eval.limit", -1, "0 or more"),
        ("prompt.frames", 7, "an even number, since frames go in pairs"),
        ("prompt.frames", -2, "an even number, since frames go in pairs, or 0 for texts"),
        ("prompt.max_pixels", 3 * 1024, "at least 4 of them"),
        ("prompt.max_pixels", 5000, "a multiple of 32*32"),
        ("memory.budget", 1281, "0 to slots=1280"),
        ("memory.budget", -1, "0 to slots=1280"),
        ("prpo.group_size", 1, "at least 2: an advantage is relative to a group"),
        ("prpo.paths", 3, "a divisor of group_size=8"),
        ("prpo.paths", 0, "a divisor of group_size=8"),
        ("prpo.paths", 16, "a divisor of group_size=8"),
        ("prpo.gamma", 1.5, "above 0 and at most 1"),
        ("prpo.gamma", 0.0, "above 0 and at most 1"),
        ("prpo.tau_0", 0.0, "above 0"),
        ("prpo.tau_min", -0.1, "above 0"),
        ("prpo.temperature", 0.0, "above 0"),
        ("coldstart.optimizer.learning_rate", 0.0, "above 0"),
        ("prpo.optimizer.learning_rate", -1e-6, "above 0"),
        ("coldstart.accumulate", 3, "a divisor of segments=4, or 4 times a divisor of batch=32"),
        ("prpo.accumulate", 12, "a divisor of segments=4, or 4 times a divisor of batch=16"),
    ],
)
def test_a_wrong_value_is_named(key, value, expected):
    sentence = said(wrong({key: value}))
    assert sentence.startswith(f"config.{key}={value!r} must be ")
    assert expected in sentence


@pytest.mark.parametrize(
    "keys",
    [
        {"prpo.accumulate": 8},
        {"prpo.accumulate": 64},
        {"prpo.accumulate": 1},
        {"coldstart.accumulate": 2, "prompt.segments": 6},
        {"prpo.paths": 8},
        {"memory.budget": 1280},
        {"memory.budget": 0},
        {"coldstart.steps": 0, "prpo.steps": 0},
        {"prompt.max_pixels": 4096, "prompt.frames": 2},
        {"prpo.beta": 1},
    ],
)
def test_the_edges_of_what_is_right(keys):
    got = settings.freeze(wrong({"prpo.accumulate": 1} | keys))
    for key, value in keys.items():
        assert operator.attrgetter(key)(got) == value


def test_integers_become_floats_and_nothing_else_changes_type():
    """As plain dictionaries, which unlike a ConfigDict let everything pass."""
    config = settings.default().to_dict()
    config["prpo"]["beta"] = 1
    assert type(settings.freeze(config).prpo.beta) is float
    for key, value, kind in (
        ("seed", 1.0, "int"),
        ("seed", True, "int"),
        ("prpo.psp", 1, "bool"),
        ("prpo.beta", "0.1", "float"),
        ("prpo.beta", True, "float"),
        ("data.folder", None, "str"),
    ):
        changed = settings.default().to_dict()
        *groups, name = key.split(".")
        functools.reduce(dict.get, groups, changed)[name] = value
        assert said(changed) == f"config.{key}={value!r} must be of type {kind}"


def test_default_is_locked_and_suggests():
    config = settings.default()
    with pytest.raises(AttributeError, match="group_size"):
        config.prpo.grop_size = 4
    with pytest.raises(AttributeError):
        config.new = 1
    with pytest.raises(TypeError):
        config.prpo.group_size = "four"


def test_unknown_and_missing_keys():
    config = settings.default().unlock()
    config.prpo.grop_size = 4
    assert said(config).startswith("config.prpo.grop_size is not a key; there are steps, batch,")
    config = settings.default().unlock()
    del config.memory["budget"]
    assert said(config).startswith("config.memory.budget is missing: start from")


def test_a_run_that_is_older_than_a_key_has_its_default(tmp_path):
    config, file = wrong({"prpo.forced": True, "prpo.optimizer.b2": 0.9}), tmp_path / "config.json"
    file.write_text(config.to_json())
    assert settings.of_run(tmp_path) == settings.freeze(config)
    with config.unlocked():
        del config.prpo["forced"], config.prpo.optimizer["b1"], config["data"]
    file.write_text(config.to_json())
    default = settings.Settings()
    got = settings.of_run(tmp_path)
    assert got.prpo.optimizer == dataclasses.replace(default.prpo.optimizer, b2=0.9)
    assert (got.prpo.forced, got.data) == (False, default.data)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "not what train.py writes"),
        ("{", "not what train.py writes"),
        ("[1]", "not what train.py writes"),
        ('{"prpo": {"was": 1}}', "config.prpo.was is not a key"),
        ('{"prpo": 1}', "config.prpo"),
    ],
)
def test_a_run_whose_settings_cannot_be_read(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        settings.of_run(tmp_path)


def test_freezing_gives_the_same_values_back():
    assert settings.freeze(settings.default()) == settings.Settings()
    config = settings.default()
    config.prpo.optimizer.learning_rate = 3e-4
    config.data.folder = "elsewhere"
    frozen = settings.freeze(config)
    assert dataclasses.asdict(frozen) == config.to_dict()
    again = config_dict.ConfigDict(dataclasses.asdict(frozen))
    assert settings.freeze(again) == frozen
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.seed = 1


def test_paths_without_propagation_are_the_group():
    assert settings.freeze(wrong({"prpo.paths": 2})).paths == 2
    assert settings.freeze(wrong({"prpo.paths": 2, "prpo.psp": False})).paths == 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert config.is_locked
    settings.freeze(config)
    # The launch command is in the docstring.
    assert f"--config=configs/{path.name}" in module.__doc__


def test_the_papers_numbers():
    spec = importlib.util.spec_from_file_location("prpo_tpu", CONFIGS[0].with_name("prpo_tpu.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    s = settings.freeze(module.get_config())
    assert (s.prompt.segments, s.prompt.frames, s.prompt.max_pixels) == (4, 32, 128 * 32 * 32)
    assert (s.prpo.group_size, s.memory.budget, s.prpo.batch) == (8, 1024, 16)
    assert (s.prpo.alpha, s.prpo.beta) == (1.0, 0.005)
    assert (s.prpo.tau_0, s.prpo.gamma, s.prpo.tau_min) == (1.0, 0.995, 0.1)
    assert (s.prpo.optimizer.learning_rate, s.coldstart.optimizer.learning_rate) == (1e-6, 1e-5)
    assert s.coldstart.steps == 800 and s.hardware == "tpu"


def test_every_key_is_explained():
    """By a comment on its line; a group of keys by the docstring of its class."""
    source = inspect.getsource(settings)
    lines = source.splitlines()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    assert "PRPO" in classes
    for node in classes.values():
        assert ast.get_docstring(node), node.name
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and field.annotation.id not in classes:
                line = lines[field.lineno - 1]
                assert re.search(r"  # \S", line), f"{node.name}.{field.target.id} has no comment"


@pytest.mark.parametrize(
    ("devices", "batch", "mesh", "accumulate"),
    [
        (1, 16, (1, 1, 1), 64),
        (8, 16, (1, 8, 1), 8),
        (16, 16, (1, 16, 1), 4),
        (32, 16, (1, 16, 2), 4),
        (128, 16, (1, 16, 8), 4),
        (256, 256, (8, 32, 1), 4),
    ],
)
def test_mesh_and_micro_batches_follow_the_devices(devices, batch, mesh, accumulate):
    """Examples of 4 segments: one prompt a device at a time, parameters in 32 parts at most."""
    s = settings.Settings(
        mesh=settings.Mesh(fsdp=0, tensor=0),
        prpo=settings.PRPO(batch=batch, accumulate=0),
        coldstart=settings.Coldstart(batch=2 * batch, accumulate=3),
        eval=settings.Eval(batch=2 * batch),
    )
    got = settings.for_devices(s, devices)
    assert dataclasses.astuple(got.mesh) == mesh
    assert got.prpo.accumulate == accumulate
    assert got.coldstart.accumulate == 3  # what is said stays


def test_copies_of_the_parameters_that_are_said_stay():
    s = settings.Settings(mesh=settings.Mesh(data=2, fsdp=0, tensor=0))
    assert dataclasses.astuple(settings.for_devices(s, 32).mesh) == (2, 8, 2)


def test_a_mesh_that_is_said_stays():
    s = settings.Settings(mesh=settings.Mesh(data=2, fsdp=2, tensor=-1))
    assert settings.for_devices(s, 8).mesh == s.mesh
