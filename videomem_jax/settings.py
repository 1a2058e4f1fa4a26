"""Every key of a configuration: name, meaning, default. `configs/*.py` start from `default()`.

A configuration is an `ml_collections.ConfigDict` while it is put together and overridden on the
command line, and one frozen `Settings` from there on (`freeze`), checked once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import typing

from ml_collections import config_dict

from videomem_jax import llm
from videomem_jax.models.config import ConfigError

# The parts of a run's settings that asking its model needs, and the file beside its weights.
_SIZES = ("prompt", "memory")
SIZES_FILE = "videomem.json"

# Parts of the parameters at most. In decoding the activations of all examples that share them move
# between layers (`sharding`): with more parts than this, that takes longer than reading weights.
_FSDP = 32


@dataclasses.dataclass(frozen=True)
class Model:
    """The model and what of it is trained."""

    weights: str = ""  # folder in Hugging Face's layout; "" is the tiny base model shipped here
    dtype: str = "float32"  # of the activations: float32 or bfloat16
    param_dtype: str = "float32"  # of the parameters; bfloat16 where only adapters are trained
    remat: str = "none"  # recomputed of a layer: none, all, or all but "attention" or "products"
    attention: str = "auto"  # auto (what the hardware has), xla, splash (TPU) or cudnn (GPU)
    chunk: int = 64  # positions of a completion whose logits exist at once
    lora_rank: int = 0  # train adapters of this rank in place of the weights; 0 trains the weights
    lora_alpha: float = 32.0  # adapters count lora_alpha / lora_rank
    train_vision: bool = False  # train the vision tower too, in the cold start


@dataclasses.dataclass(frozen=True)
class Data:
    """Where records come from and how they are read."""

    task: str = "records"  # of `folder`; or generated there: "needle" (videos), "facts" (texts)
    folder: str = "data"  # of the data sets; a record's video is named relative to its set's
    # One data set or several with weights, "VideoMarathon=3, own.jsonl=1": see data/sources.py.
    train: str = "train.jsonl"  # PRPO's records
    coldstart: str = "coldstart.jsonl"  # records with chains of memory
    # Of both phases; may have wildcards and be several: "temporality/*, scene/mc".
    kinds: str = ""  # values of `category` that are taken; "" for all
    sources: str = ""  # values of `source` that are taken; "" for all
    min_duration: float = 0.0  # seconds of video; videos that are shorter are left out
    max_duration: float = 0.0  # nor longer ones; 0 for no limit
    prepared: str = ""  # folder that data/prepare.py left: frames are read there, not decoded
    cache: str = ""  # folder for indexes of large data sets; "" is ~/.cache/videomem_jax
    test: str = "test.jsonl"  # records that eval.py asks
    test_long: str = ""  # longer videos, evaluated with `eval.long_segments`; "" for none
    workers: int = 0  # processes that decode; 0 decodes in threads of this one
    threads: int = 4  # threads that decode where there are no workers
    prefetch: int = 4  # batches decoded ahead
    cache_mb: int = 1024  # decoded frames kept in memory, in each process
    time_limit: float = 60.0  # seconds that decoding a record's video may take
    decoder_mb: int = 4096  # memory that it may take
    allow_outside: bool = False  # let records name files outside their folder
    # Of what is generated:
    train_videos: int = 600  # videos or texts, with 4 questions each
    test_videos: int = 125  # with 4 questions each
    long_videos: int = 100  # of `eval.long_segments` clips, with 4 questions each
    chain_cards: int = 4  # cards, or facts, in a memory of the cold start's chains
    chain_keep: float = 0.7  # chance that such a memory keeps one of them for a step
    chains: int = 1  # chains written for each record
    blank: float = 0.0  # needle: videos without a card for the cold start, a share of train_videos
    sentences: int = 12  # facts: of a text for each clip; three of them tell a fact


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Sizes of a segment's prompt."""

    segments: int = 4  # clips a video is cut into in training (T)
    frames: int = 32  # frames sampled from a clip (F), even; 0 where records are of texts only
    max_pixels: int = 128 * 32 * 32  # of a frame after resizing
    prefix_tokens: int = 3072  # room for question, options and clip
    answer: str = "letter"  # how an option is answered: "letter", or "text", its own words
    answer_tokens: int = 1  # room for an answer
    answer_from: str = "all"  # what an answer may be read off: "all", or question and "memory"
    options: int = 10  # most options that a question has
    instruction: str = ""  # said after the memory, in words that the model knows; "" for nothing

    @property
    def from_memory(self) -> bool:
        """Whether an answer may be read off the question and the new memory only."""
        return self.answer_from == "memory"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Sizes of a memory."""

    slots: int = 1280  # hard limit in tokens: more cannot be sampled
    budget: int = 1024  # L_max: tokens beyond it cost `prpo.beta` each


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 1e-6  # the peak
    warmup: int = 10  # steps
    final: float = 0.1  # learning rate at the end, as a share of the peak
    b1: float = 0.9  # decay of the mean of gradients
    b2: float = 0.95  # decay of the mean of their squares
    weight_decay: float = 0.0  # share of a parameter taken away a step, times the learning rate
    clip_norm: float = 1.0  # longest gradient that is not scaled down


@dataclasses.dataclass(frozen=True)
class Coldstart:
    """Supervised training on chains of memory."""

    steps: int = 800  # 0 leaves this phase out
    batch: int = 32  # examples; each gives one sequence a segment
    accumulate: int = 1  # micro-batches a step; 0: an example a device at a time
    answer_weight: float = 1.0  # of an answer's tokens in the loss; a memory's have 1
    instruction: str = ""  # in place of `prompt.instruction` here; "": the same
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)


@dataclasses.dataclass(frozen=True)
class PRPO:
    """Progressive grouped relative policy optimisation. Defaults follow the paper where it says."""

    steps: int = 1000  # rollouts; 0 leaves this phase out
    batch: int = 16  # examples a rollout
    accumulate: int = 4  # micro-batches an update; 0: an example a device at a time
    learnt: int = 0  # clips of each example that an update learns from; 0: all
    group_size: int = 8  # completions an example and step (G)
    psp: bool = True  # hand drawn memories on; off: each completion goes on with its own (GRPO)
    paths: int = 1  # memories drawn (K) where psp is on; must divide group_size
    tcr: bool = True  # reward every step; off: the answer counts after the last clip only
    evidence: bool = False  # the answer rewarded is that of a record's `evidence` so far
    discount: float = 1.0  # worth of a right answer for each clip that is still to come
    penalty: bool = True  # memory tokens beyond the budget cost
    # An open-ended answer is right by "exact" match or by the LLM of `judge`. With "choices" only
    # multiple choice earns a reward: open-ended records are left out.
    reward: str = "choices"  # "choices", "exact" or "judge"
    alpha: float = 1.0  # worth of a right answer
    beta: float = 0.005  # cost of a memory token beyond the budget
    beta_warmup: int = 0  # updates over which it rises from nothing
    tau_0: float = 1.0  # temperature of the draw of the memory at first
    gamma: float = 0.995  # its decay an update
    tau_min: float = 0.1  # its end
    temperature: float = 1.0  # of sampling
    forced: bool = False  # hold samples to the format, for a model that was never taught it
    clip_low: float = 0.2  # a ratio below 1 - clip_low gains nothing more
    clip_high: float = 0.2  # nor one above 1 + clip_high
    kl_coef: float = 0.0  # weight of KL(policy || cold start); 0 keeps no reference in memory
    entropy_coef: float = 0.0  # weight of an entropy bonus
    expected: bool = False  # a memory earns what its answers do on average, not the one drawn
    adv_norm: str = "std"  # "std" (GRPO) or "none" (Dr. GRPO)
    loss_agg: str = "seq"  # "seq" (GRPO), "token" (DAPO) or "constant" (Dr. GRPO)
    updates_per_rollout: int = 1  # optimizer steps on the same completions
    optimizer: Optimizer = Optimizer()


@dataclasses.dataclass(frozen=True)
class Judge:
    """The LLM that judges open-ended answers, behind an OpenAI-compatible endpoint."""

    url: str = ""  # such as http://localhost:8000/v1
    model: str = ""  # its name there
    key_env: str = "OPENAI_API_KEY"  # environment variable with the key, which is written nowhere
    concurrency: int = 32  # calls under way at a time
    timeout: float = 30.0  # seconds that one try may take
    retries: int = 3  # further tries
    extra: str = ""  # JSON object added to a request, such as {"chat_template_kwargs": {...}}
    name: str = ""  # stands for the URL in the cache of replies, for a model that moves
    limit: float = 180.0  # seconds for the answers of one segment; what is late has no verdict
    patience: int = 10  # rollouts in a row without any verdict after which a run stops

    def endpoint(self) -> llm.Endpoint:
        """The endpoint; LLMError, in one sentence, if it cannot be one."""
        how = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(llm.Endpoint)
            if hasattr(self, f.name)
        }
        return llm.Endpoint(**how)


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluation."""

    batch: int = 32  # examples read together
    long_segments: int = 8  # segments of the videos in data.test_long
    limit: int = 0  # questions of each set; 0 for all
    forced: bool = False  # hold all models to the format; base and blind reading always are
    only: str = ""  # readings by their names in the summary, such as "prpo,blind"; "" for all
    timelines: int = 12  # in the report


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices on each axis; -1 on one of them takes what is left.

    With fsdp and tensor 0 they are chosen (`for_devices`), and so is data unless it is above 0.
    """

    data: int = -1  # splits the batch
    fsdp: int = 1  # splits the batch and the parameters
    tensor: int = 1  # splits heads and hidden dimensions


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of the whole state."""

    every: int = 50  # steps
    keep: int = 2  # the newest of each phase that stay


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How the processes run; may differ from start to start."""

    compiled: str = "auto"  # folder of compiled programs; "auto": in the user's cache; "": none
    wait: int = 300  # seconds to wait for the processes on other hosts at the start


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run."""

    hardware: str = "any"  # what the run is meant for: any, tpu or gpu
    devices: int = 1  # how many of them it needs at least
    seed: int = 0  # of the order of data and of all draws
    model: Model = Model()
    data: Data = Data()
    prompt: Prompt = Prompt()
    memory: Memory = Memory()
    coldstart: Coldstart = Coldstart()
    prpo: PRPO = PRPO()
    judge: Judge = Judge()
    eval: Eval = Eval()
    mesh: Mesh = Mesh()
    checkpoints: Checkpoints = Checkpoints()
    runtime: Runtime = Runtime()

    @property
    def paths(self) -> int:
        """Memories carried in training: G without PSP."""
        return self.prpo.paths if self.prpo.psp else self.prpo.group_size

    @property
    def learnt(self) -> int:
        """Clips of each example that an update of PRPO learns from."""
        return self.prpo.learnt or self.prompt.segments


def default() -> config_dict.ConfigDict:
    """A configuration with every key at its default; new keys are refused."""
    config = config_dict.ConfigDict(dataclasses.asdict(Settings()))
    return config.lock()


def of_run(workdir: pathlib.Path) -> Settings:
    """The settings of a run, as its config.json has them.

    A key that the file has not got is younger than the run: its default is what was.

    Raises:
      ConfigError: the file is no configuration, or one that this version cannot have.
    """
    file = workdir / "config.json"
    try:
        found = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} is not what train.py writes ({error!r})") from None
    return freeze(config_dict.ConfigDict(_filled(found, dataclasses.asdict(Settings()))))


def _filled(found: dict, defaults: dict) -> dict:
    """What was found, and of all keys that it has not got the default."""
    values = defaults | found
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(values[key], dict):
            values[key] = _filled(values[key], default)
    return values


def freeze(config: config_dict.ConfigDict) -> Settings:
    """The settings of a configuration, checked.

    Raises:
      ConfigError: one sentence naming the key, what it holds and what it may hold.
    """
    settings = build(Settings, config, "config")
    _check(settings)
    return settings


def for_devices(settings: Settings, count: int) -> Settings:
    """The settings with what they leave to the number of devices chosen for it.

    The batch is cut into as many parts as devices and batches allow; `tensor` takes the devices
    that are left. Parameters are cut into `_FSDP` parts at most, and `data` repeats those.

    Args:
      settings: with `mesh.fsdp=0` and `mesh.tensor=0`, or an `accumulate` of 0.
      count: of devices.
    """
    s, mesh = settings, settings.mesh
    if mesh.fsdp == mesh.tensor == 0:
        parts = math.gcd(count, s.coldstart.batch, s.prpo.batch, s.eval.batch)
        data = mesh.data if mesh.data > 0 else parts // math.gcd(parts, _FSDP)
        fsdp = max(parts // data, 1)
        mesh = Mesh(data, fsdp, max(count // (data * fsdp), 1))
    # Parts of the batch; a mesh that does not fit is `sharding.make_mesh`'s to refuse.
    rows = count // mesh.tensor if mesh.tensor > 0 else max(mesh.data, 1) * max(mesh.fsdp, 1)

    def accumulate(part, clips):
        whole = clips * max(part.batch // max(rows, 1), 1)
        return dataclasses.replace(part, accumulate=part.accumulate or whole)

    return dataclasses.replace(
        s,
        mesh=mesh,
        coldstart=accumulate(s.coldstart, s.prompt.segments),
        prpo=accumulate(s.prpo, s.learnt),
    )


def save_sizes(settings: Settings, folder: str | os.PathLike) -> None:
    """Writes what a question to the model needs, beside its weights: `folder/videomem.json`."""
    sizes = {key: dataclasses.asdict(getattr(settings, key)) for key in _SIZES}
    (pathlib.Path(folder) / SIZES_FILE).write_text(json.dumps(sizes, indent=1) + "\n")


def load_sizes(folder: str | os.PathLike, **changes) -> Settings:
    """Settings for asking the model of a folder.

    Args:
      folder: of the model. If `save_sizes` wrote there, prompt and memory are as in its training;
        else they have their defaults, which are Qwen3-VL's.
      **changes: values of keys of `prompt` and `memory`, such as `max_pixels=64 * 32 * 32`.

    Raises:
      ConfigError: the file cannot be used, or a key is unknown or has a wrong value.
    """
    values = dataclasses.asdict(Settings())
    # Asking has no updates: whatever the number of segments, it need not divide.
    values["coldstart"]["accumulate"] = values["prpo"]["accumulate"] = 1
    file = pathlib.Path(folder) / SIZES_FILE
    if file.is_file():
        try:
            found = json.loads(file.read_text())
            # A key that the file has not got is younger than the file: its default is what was.
            values |= {key: _filled(dict(found[key]), values[key]) for key in _SIZES}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is not what train.py writes ({error!r})") from None
    keys = {key: part for part in reversed(_SIZES) for key in values[part]}
    for key, value in changes.items():
        if key not in keys:
            raise ConfigError(
                f"{key} is not a size of prompt or memory; there are {', '.join(keys)}"
            )
        values[keys[key]][key] = value
    if "slots" in changes:  # the budget is training's
        values["memory"]["budget"] = min(values["memory"]["budget"], values["memory"]["slots"])
    return freeze(config_dict.ConfigDict(values))


def build(cls, config, where: str):
    """A dataclass of settings from a configuration that has exactly its keys.

    Raises:
      ConfigError: a key is unknown, missing or of another type; `where` stands before its name.
    """
    kinds = typing.get_type_hints(cls)
    unknown = sorted(set(config) - set(kinds))
    if unknown:
        raise ConfigError(f"{where}.{unknown[0]} is not a key; there are {', '.join(kinds)}")
    values = {}
    for name, kind in kinds.items():
        if name not in config:
            raise ConfigError(
                f"{where}.{name} is missing: start from videomem_jax.settings.default()"
            )
        value = config[name]
        if dataclasses.is_dataclass(kind) and isinstance(value, dict | config_dict.ConfigDict):
            value = build(kind, value, f"{where}.{name}")
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif type(value) is not kind:
            raise ConfigError(f"{where}.{name}={value!r} must be of type {kind.__name__}")
        values[name] = value
    return cls(**values)


def check_judge(judge: Judge) -> None:
    """ConfigError if the judge of a configuration can be no endpoint."""
    try:
        llm.check_key_name(judge.key_env)
        if judge.url:
            judge.endpoint()
    except llm.LLMError as error:
        raise ConfigError(f"config.judge: {error}") from None


def _check(s: Settings) -> None:
    def need(good: bool, key: str, value, what: str) -> None:
        if not good:
            raise ConfigError(f"config.{key}={value!r} must be {what}")

    def one_of(key: str, value: str, *choices: str) -> None:
        need(value in choices, key, value, "one of " + ", ".join(choices))

    one_of("hardware", s.hardware, "any", "tpu", "gpu")
    one_of("model.dtype", s.model.dtype, "float32", "bfloat16")
    one_of("model.param_dtype", s.model.param_dtype, "float32", "bfloat16")
    one_of("model.remat", s.model.remat, "none", "all", "attention", "products")
    one_of("model.attention", s.model.attention, "auto", "xla", "splash", "cudnn")
    need(s.model.lora_rank >= 0, "model.lora_rank", s.model.lora_rank, "0 or more")
    need(
        s.model.param_dtype == "float32" or s.model.lora_rank > 0,
        "model.param_dtype",
        s.model.param_dtype,
        "float32 where the weights are trained (config.model.lora_rank=0): a step's change would "
        "be lost in rounding",
    )
    need(
        s.model.lora_rank == 0 or not s.model.train_vision,
        "model.train_vision",
        s.model.train_vision,
        "off with adapters (config.model.lora_rank above 0)",
    )
    one_of("prompt.answer", s.prompt.answer, "letter", "text")
    one_of("prompt.answer_from", s.prompt.answer_from, "all", "memory")
    one_of("data.task", s.data.task, "records", "needle", "facts")
    one_of("prpo.reward", s.prpo.reward, "choices", "exact", "judge")
    one_of("prpo.adv_norm", s.prpo.adv_norm, "std", "none")
    one_of("prpo.loss_agg", s.prpo.loss_agg, "seq", "token", "constant")
    for key, value in (
        ("prompt.segments", s.prompt.segments),
        ("prompt.prefix_tokens", s.prompt.prefix_tokens),
        ("prompt.answer_tokens", s.prompt.answer_tokens),
        ("prompt.options", s.prompt.options),
        ("memory.slots", s.memory.slots),
        ("coldstart.batch", s.coldstart.batch),
        ("prpo.batch", s.prpo.batch),
        ("prpo.updates_per_rollout", s.prpo.updates_per_rollout),
        ("model.chunk", s.model.chunk),
        ("eval.batch", s.eval.batch),
        ("eval.long_segments", s.eval.long_segments),
        ("judge.concurrency", s.judge.concurrency),
        ("judge.patience", s.judge.patience),
        ("checkpoints.every", s.checkpoints.every),
        ("checkpoints.keep", s.checkpoints.keep),
        ("data.sentences", s.data.sentences),
        ("data.prefetch", s.data.prefetch),
        ("data.threads", s.data.threads),
        ("data.decoder_mb", s.data.decoder_mb),
        ("runtime.wait", s.runtime.wait),
    ):
        need(value >= 1, key, value, "at least 1")
    for key, value in (
        ("coldstart.steps", s.coldstart.steps),
        ("prpo.steps", s.prpo.steps),
        ("data.blank", s.data.blank),
        ("data.workers", s.data.workers),
        ("data.cache_mb", s.data.cache_mb),
        ("data.min_duration", s.data.min_duration),
        ("data.max_duration", s.data.max_duration),
        ("eval.limit", s.eval.limit),
        ("judge.retries", s.judge.retries),
        ("coldstart.accumulate", s.coldstart.accumulate),
        ("prpo.accumulate", s.prpo.accumulate),
    ):
        need(value >= 0, key, value, "0 or more")
    check_judge(s.judge)
    need(
        s.prpo.reward != "judge" or s.judge.url,
        "judge.url",
        s.judge.url,
        "set for prpo.reward='judge', such as http://localhost:8000/v1",
    )
    least, most = s.data.min_duration, s.data.max_duration
    need(
        not most or most >= least, "data.max_duration", most, f"0 or at least min_duration={least}"
    )
    f = s.prompt.frames
    what = "an even number, since frames go in pairs, or 0 for texts"
    need(f >= 0 and f % 2 == 0, "prompt.frames", f, what)
    pixels = s.prompt.max_pixels
    tokens, rest = divmod(pixels, 32 * 32)
    what = "a multiple of 32*32 (a token's pixels), at least 4 of them"
    need(tokens >= 4 and not rest, "prompt.max_pixels", pixels, what)
    budget, g, k = s.memory.budget, s.prpo.group_size, s.prpo.paths
    need(0 <= budget <= s.memory.slots, "memory.budget", budget, f"0 to slots={s.memory.slots}")
    need(g >= 2, "prpo.group_size", g, "at least 2: an advantage is relative to a group")
    need(1 <= k <= g and g % k == 0, "prpo.paths", k, f"a divisor of group_size={g}")
    need(0 < s.prpo.gamma <= 1, "prpo.gamma", s.prpo.gamma, "above 0 and at most 1")
    plain = (s.prpo.adv_norm, s.prpo.reward, s.prompt.answer_tokens) == ("none", "choices", 1)
    need(
        plain or not s.prpo.expected,
        "prpo.expected",
        s.prpo.expected,
        "off unless prpo.adv_norm='none', prompt.answer_tokens=1 and prpo.reward='choices'",
    )
    need(0 <= s.prpo.discount <= 1, "prpo.discount", s.prpo.discount, "0 to 1")
    for key, value in (
        ("data.time_limit", s.data.time_limit),
        ("prpo.tau_0", s.prpo.tau_0),
        ("prpo.tau_min", s.prpo.tau_min),
        ("prpo.temperature", s.prpo.temperature),
        ("judge.timeout", s.judge.timeout),
        ("judge.limit", s.judge.limit),
        ("coldstart.answer_weight", s.coldstart.answer_weight),
        ("coldstart.optimizer.learning_rate", s.coldstart.optimizer.learning_rate),
        ("prpo.optimizer.learning_rate", s.prpo.optimizer.learning_rate),
    ):
        need(value > 0, key, value, "above 0")
    clips = s.prompt.segments
    need(0 <= s.prpo.learnt <= clips, "prpo.learnt", s.prpo.learnt, f"0 to segments={clips}")
    for phase, batch, parts, t in (
        ("coldstart", s.coldstart.batch, s.coldstart.accumulate, clips),
        ("prpo", s.prpo.batch, s.prpo.accumulate, s.learnt),
    ):
        fits = parts == 0 or t % parts == 0 or (parts % t == 0 and batch % (parts // t) == 0)
        name = "segments" if t == clips else "prpo.learnt"
        what = f"a divisor of {name}={t}, or {t} times a divisor of batch={batch}"
        need(fits, f"{phase}.accumulate", parts, what)
