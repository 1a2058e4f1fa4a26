"""For all tests: 8 virtual devices, compiled code kept on disk, a tiny tokenizer and model."""

import functools
import os
import pathlib

# Before jax starts: it reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx

from tests import random_folder
from tests.commands import DEMO, copies, finish, start
from tests.compiling import hasty_options
from tests.data import benchmark_folders
from tests.steps import batch, rolled, trainer_of  # noqa: F401 (fixtures)
from videomem_jax import grammar as fmt
from videomem_jax.batch import Batch, Chain, Clip, Prefix
from videomem_jax.benchmark import config as keys
from videomem_jax.memory import Format
from videomem_jax.models.config import Qwen3VLConfig, TextConfig, VisionConfig
from videomem_jax.models.qwen3_vl import abstract
from videomem_jax.pretrain import tasks
from videomem_jax.prompt import turn_end, write_prefix
from videomem_jax.tokenizer import Tokenizer
from videomem_jax.videomem import VideoMem

QWEN = pathlib.Path(__file__).parents[2] / "shared" / "tokenizer" / "qwen3"
LINES = (
    "the cat was on the red card and the boat on the blue card",
    "which picture was on the red card? the first card, the last card",
    "user assistant seconds <1.0 seconds><13.5 seconds>",
)
# Rows of the model's embedding: more than the tokenizer has tokens, as in Qwen's checkpoints.
VOCAB = 320


def pytest_configure(config):
    """Keeps compiled code in pytest's cache folder, so that the next run finds it."""
    flags.FLAGS.mark_as_parsed()  # grain's workers read flags, which a command would have parsed
    if getattr(config, "cache", None) is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def hasty() -> dict:
    """`compiler_options` with which tests compile."""
    return hasty_options()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer with a few words of its own."""
    return Tokenizer.train(LINES, VOCAB - 16)


@pytest.fixture(scope="session")
def qwen_folder() -> pathlib.Path:
    """The real Qwen3 tokenizer's folder, where the machine has it."""
    if not (QWEN / "tokenizer.json").is_file():
        pytest.skip(f"{QWEN} is not there")
    return QWEN


@pytest.fixture(scope="session")
def qwen(qwen_folder) -> Tokenizer:
    """The real Qwen3 tokenizer."""
    return Tokenizer.load(qwen_folder)


class TinyModel:
    """A Qwen3-VL of two layers whose every parameter is random."""

    def __init__(self):
        text = TextConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_theta=1e4,
            mrope_section=(4, 2, 2),
            tie_word_embeddings=True,
        )
        vision = VisionConfig(
            depth=1,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            out_hidden_size=32,
            num_position_embeddings=16,
            patch_size=4,
            deepstack_visual_indexes=(0,),
        )
        self.config = Qwen3VLConfig(text=text, vision=vision)
        self.graph, shapes = nnx.split(abstract(self.config))
        rng = np.random.default_rng(0)

        def draw(path, leaf):
            kind, noise = path[-2].key, rng.standard_normal(leaf.shape, np.float32)
            if kind == "scale":
                return 1 + 0.2 * noise
            return noise * (leaf.shape[-2] ** -0.5 if kind == "kernel" else 0.3)

        values = jax.tree_util.tree_map_with_path(draw, shapes)
        self.state = jax.tree.map(jax.numpy.asarray, values)

    def jit(self, function):
        """`function(model, *args)` with the parameters as an argument, hastily compiled."""
        compiled = jax.jit(
            lambda state, *args: function(nnx.merge(self.graph, state), *args),
            compiler_options=hasty_options(),
        )
        return functools.partial(compiled, self.state)

    def run(self, function, *args):
        """`function(model, *args)`, once."""
        return self.jit(function)(*args)


@pytest.fixture(scope="session")
def tiny() -> TinyModel:
    return TinyModel()


def make_clip(config: VisionConfig, grids, pairs: int, pad: int = 0, seed: int = 0) -> Clip:
    """Random clips, one a grid (height and width in patches), `pad` patches of padding a pair."""
    rng, m = np.random.default_rng(seed), config.spatial_merge_size
    size = max(h * w for h, w in grids) + pad
    patches = rng.integers(0, 256, (len(grids), pairs, size, config.patch_dim)).astype(np.uint8)
    positions = np.zeros((len(grids), size, 2), np.int32)
    for row, (h, w) in enumerate(grids):
        blocks = np.indices((h, w)).reshape(2, h // m, m, w // m, m).transpose(1, 3, 2, 4, 0)
        positions[row, : h * w] = blocks.reshape(-1, 2)
    return Clip(patches, positions, np.array(grids, np.int32))


@pytest.fixture(scope="session")
def clip_of(tiny):
    """Makes clips for the tiny model."""
    return functools.partial(make_clip, tiny.config.vision)


@pytest.fixture(scope="session")
def form_of(tokenizer):
    """Makes formats: "free" as in training, "forced" as in evaluation, or "loose".

    With a random model a free completion is never well-formed and a forced one always is. "loose"
    keeps to the format but for one wrong token that may be drawn wherever one token is right, so
    that about half are well-formed; all text is made of three words, so that memories end early.
    """

    def make(kind: str, slots: int, room: int = 1) -> Format:
        ids, words = tokenizer.ids, tokenizer.encode("xyz")
        built = fmt.build(tokenizer, VOCAB, slots, room, forced=kind == "forced")
        if kind == "loose":
            allowed = np.array(fmt.build(tokenizer, VOCAB, slots, room, forced=True).allowed)
            for state in (fmt.State.START, fmt.State.REMEMBERED, fmt.State.FULL_ANSWER):
                allowed[state, words[0]] = True
            allowed[fmt.State.ANSWER] = False
            allowed[fmt.State.ANSWER, list(ids.letters[:4])] = True
            allowed[fmt.State.MEMORY] = False
            allowed[fmt.State.MEMORY, [*words, ids.memory_close]] = True
            allowed[fmt.State.BROKEN] = False
            allowed[fmt.State.BROKEN, [*words, ids.im_end]] = True
            built = built.replace(allowed=jax.numpy.array(allowed))
        return Format(built, ids, turn_end(tokenizer))

    return make


@pytest.fixture(scope="session")
def batch_of(tokenizer, clip_of):
    """Makes a random batch of b examples of t segments, of two frame pairs each."""

    def make(b: int, t: int, slots: int, size: int = 96) -> Batch:
        grid, rows = (2, 4), [[], []]
        for i in range(b):
            question = "which picture was on the red card?"[: 20 + 9 * i]
            options = ["cat", "boat", "red", "blue"][: 2 + i % 3]
            for s in range(t):
                times = np.arange(4) + 4.0 * s
                rows[0].append(write_prefix(tokenizer, question, options, times, grid, size))
                clip = clip_of([grid], 2, seed=i * t + s)
                rows[1].append(jax.tree.map(lambda a: a[0], clip))
        prefix, clip = (
            jax.tree.map(lambda *a: np.stack(a).reshape(b, t, *np.shape(a[0])), *part)
            for part in rows
        )
        # Two to four options, answered by their letters.
        choices = np.full((b, 4, 1), -1, np.int32)
        for i in range(b):
            choices[i, : 2 + i % 3, 0] = tokenizer.ids.letters[: 2 + i % 3]
        return Batch(
            prefix=Prefix(*prefix),
            clip=Clip(*clip),
            chain=Chain(
                memory=np.zeros((b, t, slots), np.int32),
                length=np.full((b, t), -1, np.int32),
                answer=np.full((b, t), -1, np.int32),
            ),
            gold=(np.arange(b) % 2).astype(np.int32),
            so_far=np.zeros((b, t), np.int32),
            choices=choices,
            record=np.arange(b, dtype=np.int32),
            real=np.ones(b, bool),
        )

    return make


def slow_parse(tokens, ids, text, slots, choices):
    """What a completion says, without a state machine: (memory, answer), or None if malformed.

    `text` marks the ids of ordinary text; `choices` are lists of ids, padded with -1.
    """
    tokens = [int(token) for token in tokens]
    choices = [[int(i) for i in choice if i >= 0] for choice in choices]
    if ids.im_end not in tokens:
        return None
    tokens = tokens[: tokens.index(ids.im_end)]
    if tokens[:1] != [ids.memory_open] or ids.memory_close not in tokens:
        return None
    close = tokens.index(ids.memory_close)
    memory, told = tokens[1:close], tokens[close + 1 :]
    if len(memory) > slots or not all(text[i] for i in memory):
        return None
    if told[:1] != [ids.answer_open] or told[-1:] != [ids.answer_close]:
        return None
    answer = told[1:-1]
    return (memory, choices.index(answer)) if answer and answer in choices else None


@pytest.fixture(scope="session")
def parse_slowly(tokenizer):
    """The reference of the parser: `(tokens, slots, choices) -> (memory, answer)`, or None."""
    text = tokenizer.text_mask(VOCAB)
    return lambda tokens, slots, choices: slow_parse(tokens, tokenizer.ids, text, slots, choices)


@pytest.fixture
def one_device(monkeypatch):
    """A model that is asked runs on one device, for which it is sooner compiled."""
    made = VideoMem.from_pretrained.__func__

    def make(cls, folder, **how):
        return made(cls, folder, devices=jax.devices()[:1], **how)

    monkeypatch.setattr(VideoMem, "from_pretrained", classmethod(make))


# --- what commands need ---


@pytest.fixture(scope="session")
def environment(request):
    """Of a command as a user gives it: one device, compiled code kept as the tests' own."""
    found = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    others = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    found |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(others), "COLUMNS": "200"}
    if getattr(request.config, "cache", None) is not None:
        found["JAX_COMPILATION_CACHE_DIR"] = str(request.config.cache.mkdir("jax"))
        found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    return found


@pytest.fixture(scope="session")
def command(environment, tmp_path_factory):
    """Runs a command: (exit code, standard output, standard error). Compiling is written there."""
    with copies(environment, tmp_path_factory.mktemp("written")) as call:
        yield call


@pytest.fixture
def mistake(command, tmp_path):
    """The sentence that a command ends with: the one thing that it writes, before any compile."""

    def call(script, *args, **env):
        if not any(str(arg).startswith("--workdir") for arg in args):
            args = (*args, f"--workdir={tmp_path / 'run'}")
        code, out, err = command(script, *args, **env)
        assert code == 2, (code, out, err)
        assert not out and err.startswith("error: ") and err.count("\n") == 1, (out, err)
        return err.removeprefix("error: ").rstrip()

    return call


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder with a random model of two layers that reads the demo's videos."""
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = Tokenizer.train(tasks.corpus(0), 640)
    text = TextConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e4,
        mrope_section=(4, 2, 2),
        tie_word_embeddings=True,
    )
    vision = VisionConfig(1, 16, 24, 2, 32, 16, deepstack_visual_indexes=(0,))
    return random_folder.write(folder, Qwen3VLConfig(text, vision), tokenizer)


@pytest.fixture(scope="session")
def film_records(tmp_path_factory):
    """Questions about three videos cut from the film."""
    return benchmark_folders.film_records(tmp_path_factory.mktemp("film"))


@pytest.fixture(scope="session")
def benchmark_folder(film_records, tmp_path_factory):
    """Makes a new folder of a kind of benchmark, of the film's questions."""
    return lambda kind: benchmark_folders.make(
        kind, tmp_path_factory.mktemp("benchmark"), film_records
    )


@pytest.fixture(scope="session")
def benchmark_config(weights):
    """Makes an evaluation of small sizes; four of the devices share a batch."""

    def make(name, folder, **changes):
        config = keys.default(name)
        config.data_dir, config.weights = str(folder), str(weights)
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
        for key, value in (benchmark_folders.SIZES | {"segments": "2"} | changes).items():
            config[key] = value
        return config

    return make


@pytest.fixture(scope="session")
def small(weights, tmp_path_factory):
    """Flags of a run of half a minute."""
    keys = {
        "model.weights": weights,
        "data.folder": tmp_path_factory.mktemp("data"),
        "data.train_videos": 4,
        "data.test_videos": 2,
        "data.long_videos": 1,
        "data.threads": 2,
        "prompt.frames": 4,
        "coldstart.steps": 60,
        "coldstart.batch": 16,
        "coldstart.accumulate": 1,
        "coldstart.optimizer.learning_rate": 1e-2,
        "prpo.steps": 10,
        "prpo.batch": 4,
        "prpo.group_size": 4,
        "prpo.accumulate": 1,
        "prpo.optimizer.learning_rate": 1e-3,
        "eval.batch": 8,
        "eval.timelines": 2,
        "checkpoints.every": 3,
    }
    return [DEMO, *(f"--config.{key}={value}" for key, value in keys.items())]


@pytest.fixture(scope="session")
def finished(small, environment, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = finish(
        start("train.py", *small, f"--workdir={workdir}", environment=environment)
    )
    assert code == 0, err
    assert "next: python eval.py" in out
    return workdir
