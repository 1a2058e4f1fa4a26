"""Where the time of a step of PRPO goes on this machine, by what the compiled program does.

    python -m benchmarks.step_profile --run=runs/demo      # a run of train.py; 2 minutes

takes the run's settings, its data and the model with which PRPO began, times rollout and update,
and profiles one of each. Every moment is shared among the operations that run in it, so that the
parts sum to the time. Kinds are told by the names that XLA's CPU compiler gives:

  products      matrix products
  elementwise   what is computed entry by entry, with what was fused into it
  layout        copies, transpositions, slices, concatenations, writes into larger arrays
  reductions    sums and maxima along an axis
  other         random numbers, sorting, what devices exchange
  between       no operation runs: calls of the executor, conditions of loops

Beside them: how many operations ran, since each costs microseconds whatever its size. The floor is
the method's operations (`aot.account`) over the fastest matrix product measured here.
"""

import collections
import pathlib
import re
import statistics
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import jax

from benchmarks.side_by_side import clock, matmul_rate
from videomem_jax import command_line, run, settings, sharding
from videomem_jax.aot import account
from videomem_jax.data import pipeline
from videomem_jax.models.config import ConfigError
from videomem_jax.trainer import Trainer

# By the instruction's name without its number; the first that is found in it.
KINDS = {
    "products": ("ynn_fusion", "dot", "matmul", "convolution"),
    "other": ("rng", "sort", "all-reduce", "all-gather", "custom-call", "topk"),
    "reductions": ("reduce",),
    "layout": (
        "copy",
        "transpose",
        "slice",
        "concatenate",
        "pad",
        "broadcast",
        "gather",
        "scatter",
    ),
}
_OUTER = ("while", "conditional", "call", "tuple", "parameter", "get-tuple-element", "constant")


class Event(NamedTuple):
    """An operation that ran: nanoseconds from some moment on."""

    name: str
    begin: float
    end: float


def kind(name: str) -> str:
    """What an instruction does, by its name."""
    base = re.sub(r"[.\d]+$", "", name)
    for found, parts in KINDS.items():
        if any(part in base for part in parts):
            return found
    return "elementwise"


def shares(events: Iterable[Event]) -> dict[str, float]:
    """Seconds of each name, and of "between": a moment is shared among all that run in it."""
    marks = sorted(mark for e in events for mark in ((e.begin, 1, e.name), (e.end, -1, e.name)))
    running, found, last = collections.Counter(), collections.Counter(), None
    for moment, change, name in marks:
        if last is not None and moment > last:
            count = running.total()
            for other, times in running.items() if count else [("between", 1)]:
                found[other] += (moment - last) * times / max(count, 1) / 1e9
        running[name] += change
        running += collections.Counter()  # without zeros
        last = moment
    return dict(found)


def instructions(compiled: str) -> set[str]:
    """Of a compiled program's text, those that do something themselves."""
    names = re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = ", compiled, re.MULTILINE)
    return {name for name in names if not name.startswith(_OUTER)}


def profile(once, compiled: str) -> list[Event]:
    """What ran in one call, of these instructions."""
    wanted = instructions(compiled)
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        jax.block_until_ready(once())
        jax.profiler.stop_trace()
        (file,) = pathlib.Path(folder).glob("**/*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        return [
            Event(e.name, e.start_ns, e.start_ns + e.duration_ns)
            for plane in planes
            for line in plane.lines
            for e in line.events
            if e.name in wanted
        ]


def table(title: str, seconds: float, floor: float, events: list[Event], top: int) -> None:
    """Prints a part's kinds, the longest first, and the names that take most."""
    found = shares(events)
    times, counts = collections.Counter(), collections.Counter(kind(e.name) for e in events)
    for name, part in found.items():
        times[name if name == "between" else kind(name)] += part
    total = times.total()
    print(f"\n{title}: {seconds:.2f} s (floor {floor:.2f}); profiled {total:.2f} s")
    print(f"{'':12} {'seconds':>8} {'share':>6} {'operations':>11}")
    for name, part in times.most_common():
        print(f"{name:12} {part:8.2f} {part / total:6.0%} {counts[name] or '':>11}")
    names = collections.Counter()
    for name, part in found.items():
        names[re.sub(r"[.\d]+$", "", name)] += part
    print("of it: " + ", ".join(f"{name} {part:.2f}" for name, part in names.most_common(top)))


def main() -> None:
    """Profiles a run's step and prints the two tables."""
    parser = command_line.parser_of("benchmarks.step_profile", __doc__)
    parser.add_argument("--run", type=pathlib.Path, required=True, help="a folder of train.py")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed before (5)")
    parser.add_argument("--top", type=int, default=8, help="names of instructions to print (8)")
    flags = parser.parse_args()
    s = settings.of_run(flags.run)
    run.prepare(s.runtime)
    if jax.default_backend() != "cpu":
        raise ConfigError("this reads profiles of CPUs only: set JAX_PLATFORMS=cpu")
    s = settings.for_devices(s, jax.device_count())
    start = flags.run / "coldstart_model"
    loaded = run.load(s, start if start.is_dir() else None)
    trainer = Trainer(loaded.model, loaded.form, s, sharding.make_mesh(s.mesh), "prpo")
    records = run.training_data(s, s.data.train)
    loader = pipeline.Loader(loaded.tokenizer, s, s.prompt.segments, chains=False)
    batches = pipeline.Batches(records, loader, s, s.prpo.batch, s.seed, pipeline.Skips())
    try:
        batch = jax.device_put(next(batches), sharding.batch_sharding(trainer.mesh))
    finally:
        batches.close()
    rate, key, state = matmul_rate(), jax.random.key(s.seed), trainer.first
    counts = account.Account(s, loaded.model.config, flash=False).steps()

    def rollout():
        return trainer.rollout_step(state.trained, trainer.frozen, batch, key, state.step)

    rows = jax.block_until_ready(rollout())[0]

    def update():
        copy = jax.tree.map(
            lambda a: a.copy(), state
        )  # a step takes the place of what it was given
        return trainer.update_step(copy, trainer.frozen, trainer.reference, rows)

    programs = {
        "rollout": (
            rollout,
            trainer.rollout_step,
            (state.trained, trainer.frozen, batch, key, state.step),
        ),
        "update": (update, trainer.update_step, (state, trainer.frozen, trainer.reference, rows)),
    }
    for name, (once, step, args) in programs.items():
        jax.block_until_ready(once())
        again = lambda once=once: jax.block_until_ready(once())  # noqa: E731
        times = [clock(again) for _ in range(flags.repeats)]
        events = profile(once, step.lower(*args).compile().as_text())
        table(name, statistics.median(times), counts[name].model / rate, events, flags.top)


if __name__ == "__main__":
    command_line.entry(main)
