"""What is compared: the table of training runs, and which of them each table of results needs.

A run is `configs/demo.py` with some keys overridden. The cold start is trained once a seed; runs
that `start` from it differ in PRPO only, see the same videos in the same order, and draw from the
same keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

CONFIG = "configs/demo.py"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A training run, once a seed.

    Attributes:
      name: of its folder, with the seed behind it.
      label: in tables.
      changes: keys of the config and their values.
      start: variant whose cold-started model it goes on from; "" starts from the shipped base.
      as_long_as: a variant that has as much training time: the number of steps follows from the
        median seconds of a step in that variant's run and in the run of `like`.
      like: see `as_long_as`.
    """

    name: str
    label: str
    changes: Mapping[str, Any]
    start: str = "coldstart"
    as_long_as: str = ""
    like: str = ""

    @property
    def model(self) -> str:
        """The trained model's name in the run's summary."""
        return "coldstart" if self.changes.get("prpo.steps") == 0 else "prpo"

    @property
    def needs(self) -> tuple[str, ...]:
        """Variants whose runs come before, of the same seed."""
        return tuple(filter(None, (self.start, self.as_long_as, self.like)))


def _prpo(name: str, label: str, **changes: Any) -> Variant:
    """PRPO from the cold start with some keys of `config.prpo` changed."""
    return Variant(name, label, {f"prpo.{key}": value for key, value in changes.items()})


# A whole video at once, with as many frames as four clips have, and nothing but answers to learn.
_ORDINARY = {
    "prpo.learnt": 0,
    "prpo.steps": 0,
    "data.task": "records",
    "data.coldstart": "ordinary.jsonl",
    "prompt.segments": 1,
    "prompt.frames": 32,
    "prompt.prefix_tokens": 320,
    "prompt.answer_from": "all",
    "coldstart.instruction": "",
}
_UNTAUGHT = {"coldstart.steps": 0, "eval.forced": True}
_GRPO = {"prpo.psp": False, "prpo.tcr": False, "prpo.expected": False}
_COMPONENTS = (
    _prpo("no_psp", "without PSP", psp=False),
    _prpo("no_tcr", "without TCR", tcr=False),
    _prpo("no_penalty", "without the memory penalty", penalty=False),
    _prpo("no_expected", "without expected rewards", expected=False),
    Variant("grpo", "GRPO (neither PSP nor TCR)", _GRPO),
    Variant("grpo_time", "GRPO, equal time", _GRPO, as_long_as="full", like="grpo"),
)
BUDGETS, SLOTS, GROUPS, PATHS = (4,), (1, 2, 4), (4, 16), (2, 4)
TAUS, GAMMAS = (0.1, 2.0), (0.98, 1.0)

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("coldstart", "cold start only", {"prpo.steps": 0}, start=""),
        Variant("ordinary", "ordinary supervised", _ORDINARY, start=""),
        # Never taught the format, they are held to it in evaluation, as the base is.
        Variant("prpo_only", "PRPO only", _UNTAUGHT, start=""),
        Variant(
            "prpo_forced",
            "PRPO only, held to the format",
            {**_UNTAUGHT, "prpo.forced": True},
            start="",
        ),
        _prpo("full", "cold start + PRPO"),
        *_COMPONENTS,
        *(Variant(f"budget_{n}", f"budget {n}", {"memory.budget": n}) for n in BUDGETS),
        *(Variant(f"slots_{n}", f"{n} slots", {"memory.slots": n}) for n in SLOTS),
        *(_prpo(f"group_{n}", f"group of {n}", group_size=n) for n in GROUPS),
        *(_prpo(f"paths_{n}", f"{n} paths", paths=n) for n in PATHS),
        *(_prpo(f"tau_{n}", f"tau_0 {n}", tau_0=n) for n in TAUS),
        *(_prpo(f"gamma_{n}", f"gamma {n}", gamma=n) for n in GAMMAS),
    )
}

# Studies of a trained model (`inference.py`), which need the runs of "full".
STUDIES = ("memory", "segments", "extent")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a table of results is made of."""

    variants: tuple[str, ...]
    studies: tuple[str, ...] = ()


TABLES = {
    "coldstart": Needs(("coldstart", "ordinary", "prpo_only", "prpo_forced", "full")),
    "components": Needs(("full", *(variant.name for variant in _COMPONENTS))),
    "tcr": Needs(("full", "no_tcr")),
    "memory": Needs(("full",), ("memory",)),
    "length": Needs(("full",), ("segments", "extent")),
    "budget": Needs(
        ("full", *(f"slots_{n}" for n in SLOTS), *(f"budget_{n}" for n in BUDGETS)),
    ),
    "group": Needs(("full", *(f"group_{n}" for n in GROUPS))),
    "paths": Needs(("full", *(f"paths_{n}" for n in PATHS), "no_psp")),
    "temperature": Needs(
        ("full", *(f"tau_{n}" for n in TAUS), *(f"gamma_{n}" for n in GAMMAS)),
    ),
    "cards": Needs(("full",), ("extent",)),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large all runs are.

    Attributes:
      changes: keys of the config that all runs share.
      videos: of each data set that only studies read, with 4 questions each.
    """

    changes: Mapping[str, Any]
    videos: int


# Longer videos are the studies' own. A training is cut to less than a third of the demo's: so many
# runs are to be had in hours, and methods differ in how fast they learn, too.
WHOLE = Sizes({"data.test_long": "", "prpo.steps": 80}, videos=50)
QUICK = Sizes(
    {
        "data.test_long": "",
        "data.train_videos": 8,
        "data.test_videos": 2,
        "coldstart.steps": 4,
        "prpo.steps": 3,
        "prpo.batch": 4,
        "eval.batch": 8,
    },
    videos=2,
)
