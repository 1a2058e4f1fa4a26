"""The project as a model of lmms-eval, the field's evaluation harness.

    pip install -r requirements-lmms.txt && pip install -r requirements.txt -e .
    lmms-eval --model videomem_jax --model_args pretrained=DIR,segments=4 --tasks videomme

lmms-eval finds `manifest` by the entry point in pyproject.toml. The model's arguments are the keys
of `videomem_jax/benchmark/config.py`. A task's prompt is used word for word; where it lists options
A, B, ..., one of them is the reply.
"""

from __future__ import annotations

import os

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from videomem_jax import sharding
from videomem_jax.benchmark import config as keys
from videomem_jax.benchmark import evaluation, reading
from videomem_jax.data.benchmarks import Question, split_options
from videomem_jax.data.records import BadRecord
from videomem_jax.models.config import ConfigError


def manifest() -> ModelManifest:
    """What lmms-eval is told of the model."""
    name = f"{VideoMemJax.__module__}.{VideoMemJax.__qualname__}"
    return ModelManifest("videomem_jax", simple_class_path=name)


class VideoMemJax(lmms):
    """A model that reads videos with its memory, or, with memory=False, all frames at once."""

    is_simple = True

    def __init__(self, pretrained: str = "", batch_size: int | str = 1, **arguments):
        """Reads the model.

        Args:
          pretrained: folder in Hugging Face's layout.
          batch_size: questions read together; a multiple of the mesh's data x fsdp devices.
          **arguments: other keys of the configuration; `device` and `max_batch_size`, which
            lmms-eval always gives, have no meaning here.

        Raises:
          ConfigError: one sentence on what cannot be used.
        """
        super().__init__()
        c = _config({"weights": pretrained, "batch": batch_size, **arguments})
        self._settings, self._mesh = keys.settings(c), sharding.make_mesh(c.mesh)
        sharding.check_batch(self._mesh, batch=c.batch)
        ways = evaluation.plan(c, self._settings)
        if len(ways) > 1:
            raise ConfigError(f"segments={c.segments}: lmms-eval reads once, give one number")
        self._way = ways[0]
        self._loaded = evaluation.load(self._settings, self._mesh)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The reply to each request; empty where its video cannot be read."""
        questions = [self._question(number, *one.args) for number, one in enumerate(requests)]
        replies = [""] * len(requests)
        for is_open in (False, True):
            part = [question for question in questions if question.is_open == is_open]
            if not part:
                continue
            reader = reading.Reader(self._loaded, self._settings, self._mesh, self._way, part)
            for items, _ in reader.read(part):
                for question, steps in items:
                    replies[int(question.id)] = steps[-1].answer or steps[-1].reply or ""
        for one, reply in zip(requests, replies, strict=True):
            self.cache_hook.add_partial("generate_until", one.args[:2], reply)
        return replies

    def _question(self, number, context, _, doc_to_visual, doc_id, task, split) -> Question:
        """A request as a question whose right answer is not known."""
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(visuals) != 1 or not isinstance(visuals[0], str | os.PathLike):
            raise ConfigError(f"{task} does not give one video file a question, as is needed here")
        try:
            asked, options = split_options(context)
        except BadRecord:
            asked, options = context, ()
        return Question(str(number), os.fspath(visuals[0]), asked, options, "A", context)

    def loglikelihood(self, requests: list[Instance]):
        """lmms-eval's other kind of task."""
        raise ConfigError("videomem_jax has no loglikelihood of given texts: use a generation task")

    def generate_until_multi_round(self, requests: list[Instance]):
        """lmms-eval's third kind of task."""
        raise ConfigError("videomem_jax has no dialogues: use a task with one question a video")


# Keys that have no meaning under lmms-eval, or are groups of keys.
_OURS = ("benchmark", "data_dir", "open_ended", "limit", "mesh", "judge", "runtime")


def _config(given: dict) -> keys.Config:
    """The configuration of the model's arguments, as text or parsed."""
    config = keys.default("records")
    config.data_dir = "."  # the harness gives the questions
    for name, value in given.items():
        if name in ("device", "max_batch_size"):
            continue
        if name not in config or name in _OURS:
            raise ConfigError(f"{name} is not an argument of the model videomem_jax")
        kind = type(config[name])
        if kind is bool:
            good = str(value) in ("True", "False")
            value = str(value) == "True"
        else:
            good = kind is str or str(value).isdecimal()
            value = kind(value) if good else value
        if not good:
            raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}")
        config[name] = value
    return keys.freeze(config)
