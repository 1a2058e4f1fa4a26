"""Evaluates a run: base, cold start and PRPO on unseen videos, and the same model without video.

    python eval.py --config=configs/demo.py --workdir=runs/demo

Leaves WORKDIR/eval/*.jsonl (every memory and answer), WORKDIR/summary.json and
WORKDIR/report.html, and prints a table. Or evaluates a model on a benchmark:

    python eval.py --config=configs/eval.py:videomme --config.data_dir=DIR --config.weights=DIR
"""

import functools
import json
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from videomem_jax import command_line, evaluate, hosts, metrics, report, run, settings, sharding
from videomem_jax.benchmark import evaluation

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, command_line.CONFIG_HELP, lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run that train.py left, or for a benchmark's results."
)


def evaluate_run(config, workdir_flag: str) -> None:
    """The whole evaluation."""
    began = time.perf_counter()
    s = settings.freeze(config)
    run.prepare(s.runtime)
    run.check_hardware(s)
    s = settings.for_devices(s, jax.device_count())
    mesh = sharding.make_mesh(s.mesh)
    sharding.check_batch(mesh, eval__batch=s.eval.batch)
    run.check_weights(s)
    workdir = run.open_workdir(workdir_flag, config, fresh=False)
    watch = run.Stopwatch(workdir)
    run.make_data(s)
    limit = s.eval.limit or None
    records = run.read_records(s, s.data.test)[:limit]
    long = run.read_records(s, s.data.test_long)[:limit] if s.data.test_long else []

    models = {"base": None, "coldstart": workdir / "coldstart_model", "prpo": workdir / "model"}
    models = {k: v for k, v in models.items() if v is None or run.done(v)}
    place = functools.partial(sharding.parameter_shardings, mesh)
    loaded = {name: run.load(s, folder, shardings=place) for name, folder in models.items()}
    base, best = loaded["base"], list(loaded)[-1]
    evaluator = evaluate.Evaluator(base.model, base.form, mesh)
    # The base was never taught the format: it is held to it, the trained models if asked for. Nor
    # is a model that sees nothing sure of it, and a reply without an answer would be no guess.
    forced = run.make_format(base.tokenizer, base.model, s, forced=True).grammar
    # A cold start that was told something else is asked as it was trained, and as PRPO begins.
    readers = dict.fromkeys(loaded, evaluator)
    if "coldstart" in loaded and s.coldstart.instruction:
        form = base.instructed(s.coldstart.instruction)
        readers["coldstart"] = evaluate.Evaluator(base.model, form, mesh)
    t = s.prompt.segments
    jobs = [(name, name, readers[name], records, t, False) for name in loaded]
    if "prpo" in loaded and readers.get("coldstart", evaluator) is not evaluator:
        jobs.insert(2, ("prpo_start", "coldstart", evaluator, records, t, False))
    jobs.append(("blind", best, readers[best], records, t, True))
    if s.data.test_long:
        t = s.eval.long_segments
        jobs.append((f"{best}_{t}_segments", best, readers[best], long, t, False))
    jobs = evaluate.chosen(jobs, s.eval.only)
    items, skipped = {}, {}
    for name, model, reader, test, segments, blind in jobs:
        items[name], skips = evaluate.run(
            name,
            reader,
            reader.place(loaded[model].model),
            forced if model == "base" or blind or s.eval.forced else base.form.grammar,
            test,
            base.tokenizer,
            s,
            segments,
            blind,
        )
        skipped[name] = dict(skips.counts)
        if hosts.first():
            evaluate.write(workdir / "eval" / f"{name}.jsonl", items[name])
    if not hosts.first():
        return
    watch.most("peak_rss_gb", metrics.peak_rss_gb())
    watch.add("eval", time.perf_counter() - began)

    summary = summarise(items, skipped, workdir, watch) | {
        "config": json.loads(config.to_json()),
        "versions": run.versions(),
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1))
    page = report.write(workdir, s.eval.timelines)
    print(table(summary))
    print(f"report: {page}")


def summarise(items, skipped, workdir, watch) -> dict:
    """The numbers of a run, from its items, its metrics and its clock."""
    shares = {name: evaluate.accuracy(found) for name, found in items.items()}
    stages = [name for name in ("base", "coldstart", "prpo_start", "prpo") if name in items]
    for name in {"coldstart", "prpo"} & set(items):
        shares[f"{name}_by_segment"] = evaluate.by_segment(items[name])
        shares[f"{name}_by_kind"] = evaluate.by(items[name], lambda i: i.record.category)
        shares[f"{name}_by_needle_segment"] = evaluate.by(
            items[name], lambda i: i.record.meta.get("needle_segment")
        )
    log = workdir / "metrics.jsonl"
    rows = [r for r in metrics.read(log) if r["phase"] == "prpo"] if log.exists() else []
    clock = watch.seconds
    seconds = {
        k: round(clock.get(k, 0.0), 1) for k in ("data", "coldstart", "prpo", "eval", "compile")
    }
    seconds["total"] = round(clock.get("train", 0.0) + clock.get("eval", 0.0), 1)
    return {
        "accuracy": shares,
        "memory_tokens": {name: evaluate.memory_tokens(items[name]) for name in stages},
        "format_rate": {k: evaluate.format_rate(v) for k, v in items.items()},
        "skipped": skipped,
        "logprob_gap": max((r["logprob_gap"] for r in rows), default=None),
        "seconds": seconds,
        "peak_rss_gb": round(clock.get("peak_rss_gb", 0.0), 2),
    }


def table(summary: dict) -> str:
    """The headline numbers as text."""
    accuracy, lines = summary["accuracy"], ["", "accuracy on unseen videos (95% interval)"]
    for name, share in accuracy.items():
        if isinstance(share, dict) and "mean" in share:
            bounds = f"{share['low']:6.1%} to {share['high']:6.1%}"
            lines.append(f"  {name:18} {share['mean']:6.1%}   {bounds}   n={share['n']}")
    for name in ("coldstart", "prpo"):
        if f"{name}_by_segment" in accuracy:
            row = "  ".join(f"{a['mean']:6.1%}" for a in accuracy[f"{name}_by_segment"])
            lines.append(f"after each segment, {name:10} {row}")
    for name, tokens in summary["memory_tokens"].items():
        lines.append(f"mean memory, {name:10} {tokens:.1f} tokens")
    clock = "  ".join(f"{k} {v:.0f}" for k, v in summary["seconds"].items())
    return "\n".join([*lines, f"seconds: {clock}   peak memory {summary['peak_rss_gb']} GB"])


def evaluate_either(config) -> None:
    """A model on a benchmark, where the config is one for that; else a run."""
    if "benchmark" in config:
        evaluation.evaluate_benchmark(config, _WORKDIR.value)
    else:
        evaluate_run(config, command_line.given_workdir(_WORKDIR.value))


def main(argv):
    """Checks the flags, then evaluates."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    command_line.entry(lambda: evaluate_either(command_line.given_config(_CONFIG.value)))


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
