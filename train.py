"""Trains a model to read a video with a learned memory: cold start, then PRPO.

    python train.py --config=configs/demo.py --workdir=runs/demo
    python train.py --config=configs/prpo_tpu.py --workdir=/mnt/runs/a --config.prpo.group_size=4
    python train.py --config=configs/prpo_tpu.py --workdir=runs/plan --aot=v5p:2x2x4

Killed at any moment and started again with the same command, it goes on exactly. SIGTERM saves
first, and ends it with exit code 143. The trained model is left in WORKDIR/model as a Hugging Face
folder, metrics in WORKDIR/metrics.jsonl and WORKDIR/tensorboard. On several hosts, start the same
command on each, with a WORKDIR that all of them see (docs/scale.md).
"""

import functools
import pathlib
import sys
import time
from collections.abc import Callable

import jax
from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from videomem_jax import aot, command_line, compiled, export, hosts, run, settings, sharding
from videomem_jax.checkpoint import Checkpoints
from videomem_jax.data import pipeline
from videomem_jax.judged_rollout import JudgedRollout, OpenAnswers
from videomem_jax.metrics import MetricsWriter, peak_rss_gb
from videomem_jax.trainer import Trainer, TrainState

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, command_line.CONFIG_HELP, lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, model.")
_AOT = flags.DEFINE_string(
    "aot",
    None,
    "Only compile for a machine, such as v5p:2x2x4, h100:8 or cpu:8; see videomem_jax.aot",
)
_AOT_STEPS = flags.DEFINE_list("aot_steps", [], "Steps to compile with --aot; all by default.")


class Phase:
    """What both phases need around their step: data, checkpoints, metrics, progress."""

    def __init__(
        self, name, s, trainer, records, tokenizer, batch, workdir, watch, writer, notice, judge
    ):
        self.name, self.settings, self.trainer = name, s, trainer
        self.records, self.tokenizer, self.judge = records, tokenizer, judge
        self.watch, self.writer, self.notice = watch, writer, notice
        self.skips, self.clock = pipeline.Skips(), compiled.Clock()
        loader = pipeline.Loader(tokenizer, s, s.prompt.segments, chains=name == "coldstart")
        seed = s.seed + (0 if name == "coldstart" else 1)
        self.shard = sharding.batch_sharding(trainer.mesh)
        self.reader = hosts.reader(self.shard)
        self.batches = pipeline.Batches(records, loader, s, batch, seed, self.skips, self.reader)
        self.checkpoints = Checkpoints(workdir / "checkpoints" / name, s.checkpoints.keep)
        self.begin, self.state = 0, trainer.first
        found = self.checkpoints.restore(trainer.first)
        if found:
            self.begin, self.state, positions = found
            self._find(positions)
            print(f"{name}: going on from step {self.begin}")
        self.position = self.batches.get_state()
        writer.forget_after(name, self.begin)

    def _find(self, positions: list[dict]) -> None:
        """Goes on in the data after a checkpoint of as many readers, or of another number."""
        readers = hosts.gather(list(self.reader))
        if not any(positions):  # there are none where `models.convert` made the checkpoint
            return
        if [position["reader"] for position in positions] == readers:
            self.batches.set_state(positions[jax.process_index()]["at"])
        else:
            self.batches.skip_to(self.begin)

    def steps(self, steps: int, text: str) -> tqdm:
        """The steps that are left, with a bar."""
        left = range(self.begin, steps)
        return tqdm(left, desc=text, unit="step", disable=not hosts.first())

    def next_batch(self):
        """The next batch, and the seconds that the step waited for it.

        The metric "seconds/data_share" is their share of the whole step's time.
        """
        began = time.perf_counter()
        batch = hosts.spread(self.shard, next(self.batches))
        return batch, time.perf_counter() - began

    def after(self, step: int, steps: int, values: dict) -> None:
        """Metrics and, when it is time, a checkpoint of everything up to this step."""
        if step == self.begin + 1:
            said = self.clock.stop()
            self.watch.add("compile", self.clock.seconds)
            tqdm.write(f"{self.name}: {said}", file=sys.stdout)
        self.writer.write(self.name, step, values)
        self.position = self.batches.get_state()
        if step % self.settings.checkpoints.every == 0 or step == steps:
            self._save(step)
        if step < steps:
            self.stop_if_told(step)

    def _save(self, step: int) -> None:
        place = {"reader": list(self.reader), "at": self.position}
        self.checkpoints.save(step, self.state, place)

    def stop_if_told(self, step: int) -> None:
        """Saves what was done up to this step and raises `hosts.Stopped`, if told to stop."""
        if self.notice.reached():
            self._save(step)
            self.done()
            raise hosts.Stopped(
                f"{self.name}: told to stop, saved step {step}; the same command goes on from there"
            )

    def done(self) -> TrainState:
        """Waits for the checkpoints; the final state."""
        self.checkpoints.close()
        self.batches.close()
        if self.skips.counts:
            print(f"{self.name}: skipped records by cause: {dict(self.skips.counts)}")
        return self.state


def coldstart(phase: Phase) -> TrainState:
    """Supervised steps on chains of memory."""
    s, trainer = phase.settings, phase.trainer
    bar = phase.steps(s.coldstart.steps, "cold start")
    for i in bar:
        batch, waited = phase.next_batch()
        began = time.perf_counter()
        phase.state, values = trainer.supervised_step(phase.state, trainer.frozen, batch)
        values = jax.device_get(values)
        bar.set_postfix(loss=f"{values['loss']:.3f}")
        took = time.perf_counter() - began
        values |= {
            "seconds/step": took,
            "seconds/data": waited,
            "seconds/data_share": waited / (waited + took),
        }
        phase.after(i + 1, s.coldstart.steps, values)
    return phase.done()


def prpo(phase: Phase) -> TrainState:
    """Rollouts and policy updates."""
    s, trainer = phase.settings, phase.trainer
    rollout_step = trainer.rollout_step
    if phase.judge is not None:
        answers = OpenAnswers(phase.records, phase.tokenizer, phase.judge)
        rollout_step = JudgedRollout(trainer, answers, s.judge.patience)
    bar = phase.steps(s.prpo.steps, "prpo")
    for i in bar:
        batch, waited = phase.next_batch()
        began = time.perf_counter()
        key = jax.random.fold_in(jax.random.key(s.seed), i)
        rows, seen = rollout_step(phase.state.trained, trainer.frozen, batch, key, phase.state.step)
        seen = jax.device_get(seen)
        rolled = time.perf_counter()
        phase.stop_if_told(i)  # a rollout is drawn again sooner than its update is computed
        for update in range(s.prpo.updates_per_rollout):
            phase.state, values = trainer.update_step(
                phase.state, trainer.frozen, trainer.reference, rows
            )
            # Before the first update nothing has moved: what is left is rounding.
            if update == 0:
                gap = values["logprob_gap"]
        values = jax.device_get(values) | seen | {"logprob_gap": float(gap)}
        ended = time.perf_counter()
        last = values[f"accuracy/segment_{s.prompt.segments}"]
        bar.set_postfix(
            reward=f"{values['reward']:.3f}",
            accuracy=f"{last:.2f}",
            memory=f"{values['memory_tokens']:.1f}",
        )
        values |= {
            "seconds/rollout": rolled - began,
            "seconds/update": ended - rolled,
            "seconds/data": waited,
            "seconds/data_share": waited / (waited + ended - began),
        }
        phase.after(i + 1, s.prpo.steps, values)
    return phase.done()


def train(config, workdir_flag: str, make_trainer: Callable[..., Trainer] = Trainer) -> None:
    """The whole run."""
    began = time.perf_counter()
    s = settings.freeze(config)
    run.prepare(s.runtime, stops=True)
    run.check_hardware(s)
    s = settings.for_devices(s, jax.device_count())
    mesh = sharding.make_mesh(s.mesh)
    sharding.check_batch(mesh, coldstart__batch=s.coldstart.batch, prpo__batch=s.prpo.batch)
    run.check_weights(s)
    workdir = run.open_workdir(workdir_flag, config, fresh=True)
    watch, writer = run.Stopwatch(workdir), MetricsWriter(workdir)

    with watch("data"):
        run.make_data(s)
    phases = (
        ("coldstart", s.coldstart.steps, s.data.coldstart, coldstart),
        ("prpo", s.prpo.steps, s.data.train, prpo),
    )
    # All of them now: a missing file is not to be found after hours of the first phase.
    data = {
        name: run.training_data(
            s,
            file,
            chains=name == "coldstart",
            open_ended=name == "coldstart" or s.prpo.reward != "choices",
        )
        for name, steps, file, _ in phases
        if steps
    }
    judge = run.judge_of(s, workdir) if "prpo" in data else None
    place = functools.partial(sharding.parameter_shardings, mesh)
    loaded = run.load(s, shardings=place)
    print(
        f"mesh {dict(mesh.shape)} on {jax.device_count()} {jax.default_backend()} device(s), "
        f"{jax.process_count()} process(es)"
    )

    exports = {"coldstart": workdir / "coldstart_model", "prpo": workdir / "model"}
    with hosts.Notice() as notice:
        for name, steps, _, loop in phases:
            folder = exports[name]
            if run.done(folder):
                print(f"{name}: done before")
            elif steps:
                with watch(name):
                    batch = s.coldstart.batch if name == "coldstart" else s.prpo.batch
                    form = loaded.form
                    if name == "coldstart" and s.coldstart.instruction:
                        form = loaded.instructed(s.coldstart.instruction)
                    if name == "prpo" and s.prpo.forced:
                        form = run.make_format(loaded.tokenizer, loaded.model, s, forced=True)
                    trainer = make_trainer(loaded.model, form, s, mesh, name)
                    phase = Phase(
                        name,
                        s,
                        trainer,
                        data[name],
                        loaded.tokenizer,
                        batch,
                        workdir,
                        watch,
                        writer,
                        notice,
                        judge,
                    )
                    state = loop(phase)
                    # config.json, which marks the phase as done, is written last.
                    source = s.model.weights or run.BASE
                    if hosts.first():
                        folder.mkdir(exist_ok=True)
                        settings.save_sizes(s, folder)
                    export.save(trainer.model(state), loaded.tokenizer, folder, source=source)
            if run.done(folder):
                loaded = run.load(s, folder, shardings=place)
    writer.close()
    watch.most("peak_rss_gb", peak_rss_gb())
    watch.add("train", time.perf_counter() - began)
    last = exports["prpo" if s.prpo.steps else "coldstart"]
    print(f"model in {last}; next: python eval.py with the same --config and --workdir")


def main(argv, make_trainer: Callable[..., Trainer] = Trainer):
    """Checks the flags, then trains."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")

    def work() -> None:
        config = command_line.given_config(_CONFIG.value)
        workdir = command_line.given_workdir(_WORKDIR.value)
        if _AOT.value:  # compiles the run's steps for a machine that need not be here
            s = settings.freeze(config)
            aot.check(s, _AOT.value, pathlib.Path(workdir), _AOT_STEPS.value)
        else:
            train(config, workdir, make_trainer)

    command_line.entry(work)


def start(make_trainer: Callable[..., Trainer] = Trainer) -> None:
    """The command; with a trainer of one's own, see docs/extending.md."""
    work = functools.partial(main, make_trainer=make_trainer)
    app.run(work, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
    start()
