"""Trains a model to read a video with a learned memory: cold start, then PRPO.

    python train.py --config=configs/demo.py --workdir=runs/demo
    python train.py --config=configs/prpo_tpu.py --workdir=gs://.../run --config.prpo.group_size=4

Killed at any moment and started again with the same command, it goes on exactly. The trained model
is left in WORKDIR/model as a Hugging Face folder, metrics in WORKDIR/metrics.jsonl and
WORKDIR/tensorboard.
"""

import time

import jax
from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from videomem_jax import export, run, settings, sharding
from videomem_jax.checkpoint import Checkpoints
from videomem_jax.data import pipeline
from videomem_jax.judged_rollout import JudgedRollout, OpenAnswers
from videomem_jax.metrics import MetricsWriter, peak_rss_gb
from videomem_jax.trainer import Trainer, TrainState

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, model.")


class Phase:
    """What both phases need around their step: data, checkpoints, metrics, progress."""

    def __init__(
        self, name, s, trainer, records, tokenizer, batch, workdir, watch, writer, judge=None
    ):
        self.name, self.settings, self.trainer = name, s, trainer
        self.records, self.tokenizer, self.judge = records, tokenizer, judge
        self.watch, self.writer = watch, writer
        self.skips = pipeline.Skips()
        loader = pipeline.Loader(tokenizer, s, s.prompt.segments, chains=name == "coldstart")
        seed = s.seed + (0 if name == "coldstart" else 1)
        self.batches = pipeline.training_batches(records, loader, s, batch, seed, self.skips)
        self.checkpoints = Checkpoints(workdir / "checkpoints" / name, s.checkpoints.keep)
        self.begin, self.state = 0, trainer.first
        found = self.checkpoints.restore(trainer.first)
        if found:
            self.begin, self.state, position = found
            if position:  # there is none where `models.convert` made the checkpoint
                self.batches.set_state(position)
            print(f"{name}: going on from step {self.begin}")
        writer.forget_after(name, self.begin)

    def next_batch(self):
        """The next batch, and the seconds that the step waited for it."""
        began = time.perf_counter()
        batch = next(self.batches)
        return batch, time.perf_counter() - began

    def after(self, step: int, steps: int, values: dict) -> None:
        """Metrics and, when it is time, a checkpoint of everything up to this step."""
        self.writer.write(self.name, step, values)
        if step % self.settings.checkpoints.every == 0 or step == steps:
            self.checkpoints.save(step, self.state, self.batches.get_state())

    def done(self) -> TrainState:
        """Waits for the checkpoints; the final state."""
        self.checkpoints.close()
        if self.skips.counts:
            print(f"{self.name}: skipped records by cause: {dict(self.skips.counts)}")
        return self.state


def coldstart(phase: Phase) -> TrainState:
    """Supervised steps on chains of memory."""
    s, trainer = phase.settings, phase.trainer
    bar = tqdm(range(phase.begin, s.coldstart.steps), desc="cold start", unit="step")
    for i in bar:
        batch, waited = phase.next_batch()
        began = time.perf_counter()
        phase.state, values = trainer.supervised_step(phase.state, trainer.frozen, batch)
        values = jax.device_get(values)
        took = time.perf_counter() - began
        if i == phase.begin:
            phase.watch.add("compile", took)
        bar.set_postfix(loss=f"{values['loss']:.3f}")
        values |= {"seconds/step": took, "seconds/data": waited}
        phase.after(i + 1, s.coldstart.steps, values)
    return phase.done()


def prpo(phase: Phase) -> TrainState:
    """Rollouts and policy updates."""
    s, trainer = phase.settings, phase.trainer
    rollout_step = trainer.rollout_step
    if phase.judge is not None:
        answers = OpenAnswers(phase.records, phase.tokenizer, phase.judge)
        rollout_step = JudgedRollout(trainer, answers, s.judge.patience)
    bar = tqdm(range(phase.begin, s.prpo.steps), desc="prpo", unit="step")
    for i in bar:
        batch, waited = phase.next_batch()
        began = time.perf_counter()
        key = jax.random.fold_in(jax.random.key(s.seed), i)
        rows, seen = rollout_step(phase.state.trained, trainer.frozen, batch, key, phase.state.step)
        seen = jax.device_get(seen)
        rolled = time.perf_counter()
        for update in range(s.prpo.updates_per_rollout):
            phase.state, values = trainer.update_step(
                phase.state, trainer.frozen, trainer.reference, rows
            )
            # Before the first update nothing has moved: what is left is rounding.
            if update == 0:
                gap = values["logprob_gap"]
        values = jax.device_get(values) | seen | {"logprob_gap": float(gap)}
        took = time.perf_counter() - rolled
        if i == phase.begin:
            phase.watch.add("compile", took + rolled - began)
        last = values[f"accuracy/segment_{s.prompt.segments}"]
        bar.set_postfix(
            reward=f"{values['reward']:.3f}",
            accuracy=f"{last:.2f}",
            memory=f"{values['memory_tokens']:.1f}",
        )
        values |= {
            "seconds/rollout": rolled - began,
            "seconds/update": took,
            "seconds/data": waited,
        }
        phase.after(i + 1, s.prpo.steps, values)
    return phase.done()


def train(config, workdir_flag: str) -> None:
    """The whole run."""
    began = time.perf_counter()
    s = settings.freeze(config)
    run.check_hardware(s)
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
        name: run.read_records(s, file, chains=name == "coldstart")
        for name, steps, file, _ in phases
        if steps
    }
    judge = run.judge_of(s, workdir) if "prpo" in data else None
    if "prpo" in data and judge is None:
        data["prpo"] = run.without_open(data["prpo"])
    loaded = run.load(s)
    print(f"mesh {dict(mesh.shape)} on {jax.device_count()} {jax.default_backend()} device(s)")

    exports = {"coldstart": workdir / "coldstart_model", "prpo": workdir / "model"}
    for name, steps, _, loop in phases:
        folder = exports[name]
        if (folder / "config.json").exists():
            print(f"{name}: done before")
        elif steps:
            with watch(name):
                batch = s.coldstart.batch if name == "coldstart" else s.prpo.batch
                trainer = Trainer(loaded.model, loaded.form, s, mesh, name)
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
                    judge,
                )
                state = loop(phase)
                # config.json, which marks the phase as done, is written last.
                source = s.model.weights or run.BASE
                folder.mkdir(exist_ok=True)
                settings.save_sizes(s, folder)
                export.save(trainer.model(state), loaded.tokenizer, folder, source=source)
        if (folder / "config.json").exists():
            loaded = run.load(s, folder)
    writer.close()
    watch.most("peak_rss_gb", peak_rss_gb())
    watch.add("train", time.perf_counter() - began)
    print(f"model in {exports['prpo']}; next: python eval.py with the same --config and --workdir")


def main(argv):
    """Checks the flags, then trains."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    run.entry(lambda: train(run.given_config(_CONFIG.value), run.given_workdir(_WORKDIR.value)))


if __name__ == "__main__":
    app.run(main, flags_parser=run.parse_flags)
