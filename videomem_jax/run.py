"""What train.py and eval.py share: checks before anything expensive, the run's folder, its data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from videomem_jax import compiled, grammar, hosts, judge, prompt, settings
from videomem_jax.data import facts, needle, needle_chains, records, sources
from videomem_jax.memory import Format
from videomem_jax.models import convert
from videomem_jax.models.config import ConfigError, Qwen3VLConfig
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.tokenizer import Tokenizer

BASE = pathlib.Path(__file__).parent / "assets" / "tiny_base"

# Keys that may differ from start to start of one run: they change nothing in what it learns.
_REACHED = ("url", "key_env", "concurrency", "timeout", "retries", "limit", "patience")
_FREE = {
    *("eval", "runtime", "hardware", "devices", "mesh"),
    *(f"judge.{key}" for key in _REACHED),
    *("coldstart.accumulate", "prpo.accumulate", "model.remat"),
}


def prepare(runtime: settings.Runtime, stops: bool = False) -> None:
    """Joins the processes on other hosts, and looks for compiled programs; before any device.

    Args:
      runtime: of the settings.
      stops: see `hosts.start`.
    """
    hosts.start(runtime.wait, stops)
    compiled.keep(runtime.compiled)


def check_hardware(s: settings.Settings) -> None:
    """ConfigError if the config is made for other hardware than this machine has."""
    have, count = jax.default_backend(), jax.device_count()
    if s.hardware != "any" and have != s.hardware:
        raise ConfigError(
            f"this config needs {s.devices} {s.hardware.upper()} devices, but JAX finds "
            f"{count} {have.upper()} device{'s' * (count > 1)}: install requirements-{s.hardware}"
            f".txt on a {s.hardware.upper()} machine, or run --config=configs/demo.py here"
        )
    if count < s.devices:
        raise ConfigError(
            f"this config needs at least {s.devices} devices, but JAX finds {count}: use a larger "
            f"machine, or set --config.devices={count} with a mesh and batch that fit"
        )


def open_workdir(workdir: str, config: config_dict.ConfigDict, fresh: bool) -> pathlib.Path:
    """The run's folder, marked with its config.

    Args:
      workdir: path; made if `fresh`.
      config: of the run. A folder holds one config's run. What only says on which machines and how
        a step is computed, how the judge is reached, and `eval.*` may differ between starts.
      fresh: whether a new run may begin there.

    Raises:
      ConfigError: the folder is another config's, or (not `fresh`) holds no run, or not all hosts
        can see it.
    """
    if "://" in workdir:
        raise ConfigError(
            f"--workdir={workdir} is no folder: mount the bucket (gcsfuse does), and give the path"
        )
    path = pathlib.Path(workdir)
    hosts.first_does(lambda: _mark(path, config, fresh))
    if not all(hosts.gather((path / "config.json").exists())):
        raise ConfigError(
            f"--workdir={workdir}: not every host sees what the first one wrote there: give a "
            f"folder that all of them share"
        )
    return path


def _mark(path: pathlib.Path, config: config_dict.ConfigDict, fresh: bool) -> None:
    file = path / "config.json"
    new = json.loads(config.to_json())
    if file.exists():
        old = json.loads(file.read_text())
        key = _difference(old, new)
        if not key:
            return
        # A run that stopped before its first step (a wrong path, say) is in nobody's way.
        if (path / "metrics.jsonl").exists():
            raise ConfigError(
                f"{path} holds a run with config.{key[0]}={key[1]!r}, not {key[2]!r}: choose "
                f"another --workdir, or delete that one"
            )
    if not fresh:
        raise ConfigError(f"{path} holds no run: run train.py with this --workdir first")
    path.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(new, indent=1))
    part.replace(file)


def done(folder: pathlib.Path) -> bool:
    """Whether a model was left in a folder, as the first process sees it."""
    return hosts.gather((folder / "config.json").exists())[0]


def _difference(old: dict, new: dict, prefix: str = "") -> tuple | None:
    for key, value in old.items():
        if f"{prefix}{key}" in _FREE:
            continue
        if isinstance(value, dict) and isinstance(new.get(key), dict):
            found = _difference(value, new[key], f"{prefix}{key}.")
            if found:
                return found
        elif new.get(key) != value:
            return f"{prefix}{key}", value, new.get(key)
    return None


def make_data(s: settings.Settings) -> None:
    """Generates the embedded task's data where the config asks for it; done at once if there."""
    make = {"needle": _make_needle, "facts": _make_facts}.get(s.data.task)
    if make is None:
        return
    hosts.first_does(lambda: make(s))
    if not hosts.first():  # there by now, unless this host has a disk of its own
        make(s)


def _make_needle(s: settings.Settings) -> None:
    d, t = s.data, s.prompt.segments
    try:
        splits = {
            "train": needle.SplitSpec(
                d.train_videos, 4, t, "train", seed=1, shares=needle.TRAIN_SHARES
            ),
            "test": needle.SplitSpec(d.test_videos, 4, t, "test", seed=3),
        }
        if d.test_long:
            splits["test_long"] = needle.SplitSpec(
                d.long_videos, 4, s.eval.long_segments, "test", seed=4
            )
        if blank := round(d.blank * d.train_videos):
            splits["blank"] = needle.SplitSpec(blank, 0, t, "train", seed=5)
    except ValueError as error:
        raise ConfigError(f"config.data.task='needle' cannot be made as asked: {error}") from None
    needle.build(d.folder, splits)
    needle_chains.write_chains(
        s.data.folder,
        budget_cards=s.data.chain_cards,
        keep=s.data.chain_keep,
        chains_per_record=s.data.chains,
        blank="blank" if blank else "",
    )


def _make_facts(s: settings.Settings) -> None:
    d, t = s.data, s.prompt.segments
    spec = functools.partial(facts.SplitSpec, sentences=d.sentences)
    try:
        splits = {
            "train": spec(d.train_videos, t, "train", seed=1),
            "test": spec(d.test_videos, t, "test", seed=3),
        }
        if d.test_long:
            splits["test_long"] = spec(d.long_videos, s.eval.long_segments, "test", seed=4)
    except ValueError as error:
        raise ConfigError(f"config.data.task='facts' cannot be made as asked: {error}") from None
    facts.build(d.folder, splits)
    facts.write_chains(d.folder, t, d.chain_cards, d.chain_keep, d.chains)


def read_records(s: settings.Settings, name: str) -> list[records.Record]:
    """The good records of one of the config's files that have options.

    Raises:
      RecordError: there are none.
    """
    path = pathlib.Path(s.data.folder) / name
    found, skipped = records.read_records(path, allow_outside=s.data.allow_outside)
    if skipped:
        print(f"{name}: {len(found)} records; {skipped.summary()}")
    chosen = [record for record in found if not record.is_open]
    elsewhere = f"python eval.py --config=configs/eval.py:records --config.data_dir={path}"
    if not chosen:
        raise records.RecordError(f"{path}: all records are open-ended; ask them with {elsewhere}")
    if len(chosen) < len(found):
        count = len(found) - len(chosen)
        print(f"{name}: {count} open-ended records are left out; {elsewhere} asks them")
    return chosen


def training_data(
    s: settings.Settings, names: str, chains: bool = False, open_ended: bool = False
) -> sources.Mixture:
    """The records of a phase, mixed and filtered as the config says.

    Args:
      s: the run's settings.
      names: of its data sets.
      chains: whether some records must have memories.
      open_ended: whether questions without options are of use.
    """
    mixture, skipped = sources.read_mixture(names, s.data, open_ended, chains)
    if skipped or len(mixture.parts) > 1 or any(p.left_out.total() for p in mixture.parts):
        print(f"{mixture.summary()}; {skipped.summary()}")
    if chains and not mixture.any_chain():
        raise records.RecordError(
            f"{pathlib.Path(s.data.folder) / names}: no record has 'memories', which the cold "
            f"start learns from: add them, or set --config.coldstart.steps=0"
        )
    return mixture


def judge_of(s: settings.Settings, workdir: pathlib.Path) -> judge.Judge | None:
    """PRPO's judge of open-ended answers; None where only multiple choice earns a reward.

    Raises:
      LLMError: the judge cannot be asked.
      ConfigError: there is no room for an answer in words.
    """
    if s.prpo.reward == "choices":
        return None
    if s.prompt.answer_tokens < 2:
        raise ConfigError(
            f"config.prompt.answer_tokens={s.prompt.answer_tokens} leaves no room for an answer in "
            f"words, as config.prpo.reward={s.prpo.reward!r} asks for: raise it, to 32 for instance"
        )
    if s.prpo.reward == "exact":
        return judge.exact
    judging = judge.open_judge(s.judge, workdir / "judge.sqlite")
    judging.check()
    return judging


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and the memory format."""

    model: Qwen3VL
    tokenizer: Tokenizer
    form: Format

    def instructed(self, text: str) -> Format:
        """The format with another instruction."""
        return self.form._replace(instruction=prompt.instruction(self.tokenizer, text))


def check_weights(s: settings.Settings) -> None:
    """ConfigError, at once, if the folder of weights that the config names is not one."""
    folder = pathlib.Path(s.model.weights or BASE)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"config.model.weights={s.model.weights!r}: {folder / name} does not exist: give "
                f"the folder of a Hugging Face model, such as hf download NAME --local-dir FOLDER "
                f"leaves"
            )


def load(s: settings.Settings, folder: str | pathlib.Path | None = None, **placing) -> Loaded:
    """Reads a Hugging Face folder, by default the one that the config names.

    Args:
      s: the run's settings.
      folder: of the weights.
      **placing: `shardings` and `param_dtype` for `convert.load_pretrained`.
    """
    folder = folder or s.model.weights or BASE
    tokenizer = Tokenizer.load(folder)
    sees = Qwen3VLConfig.load(folder).vision is not None
    if s.prompt.frames and not sees:
        raise ConfigError(
            f"config.prompt.frames={s.prompt.frames}, but the model of {folder} reads only texts: "
            f"set it to 0, with records of texts, or give a Qwen3-VL"
        )
    if sees and tokenizer.ids.video_pad is None:
        raise ConfigError(f"{folder}: the tokenizer lacks <|video_pad|>: it is not Qwen3-VL's")
    model = convert.load_pretrained(
        folder,
        dtype=jnp.dtype(s.model.dtype),
        remat=s.model.remat,
        attention=s.model.attention,
        **{"param_dtype": jnp.dtype(s.model.param_dtype)} | placing,
    )
    form = make_format(tokenizer, model, s)
    model.start_tokens(tokenizer.new_tags)
    return Loaded(model, tokenizer, form)


def make_format(
    tokenizer: Tokenizer, model: Qwen3VL, s: settings.Settings, forced: bool = False
) -> Format:
    """The memory format for a model's vocabulary."""
    vocab = model.config.text.vocab_size
    if len(tokenizer) > vocab:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding {vocab} rows: "
            f"python -m videomem_jax.models.convert add-rows makes room for the memory format's"
        )
    machine = grammar.build(
        tokenizer,
        vocab,
        s.memory.slots,
        s.prompt.answer_tokens,
        forced,
        from_memory=s.prompt.from_memory,
    )
    told = prompt.instruction(tokenizer, s.prompt.instruction)
    return Format(machine, tokenizer.ids, prompt.turn_end(tokenizer), told)


class Stopwatch:
    """Seconds spent under names, across restarts: kept in `timings.json` of the run's folder."""

    def __init__(self, workdir: pathlib.Path):
        self._file = workdir / "timings.json"
        self.seconds: dict[str, float] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the block's time to a name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Adds to a name and saves."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if not hosts.first():
            return
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(self.seconds))
        part.replace(self._file)

    def most(self, name: str, value: float) -> None:
        """Keeps the largest value seen under a name."""
        self.seconds[name] = max(self.seconds.get(name, 0.0), value)
        self.add(name, 0.0)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "av", "numpy")
    return {"python": sys.version.split()[0]} | {n: importlib.metadata.version(n) for n in names}
