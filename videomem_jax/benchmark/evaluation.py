"""The whole evaluation of a model on a benchmark: questions in, results.json and a page out."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import config_dict
from tqdm import tqdm

from videomem_jax import hosts, metrics, run, sharding
from videomem_jax import judge as judges
from videomem_jax import settings as cfg
from videomem_jax.atomic_file import replacing
from videomem_jax.benchmark import config as keys
from videomem_jax.benchmark import page, reading, scores
from videomem_jax.benchmark.config import Config
from videomem_jax.benchmark.reading import Way
from videomem_jax.benchmark.samples import Samples, claim, hash_texts, hash_weights
from videomem_jax.data import benchmarks
from videomem_jax.data.benchmarks import Benchmark, Lost
from videomem_jax.data.records import RecordError
from videomem_jax.models.config import ConfigError


def evaluate_benchmark(config: config_dict.ConfigDict, workdir: str | None) -> None:
    """Reads what is not yet read, then writes the results and prints them.

    Args:
      config: as of `configs/eval.py`.
      workdir: for the results; by default runs/BENCHMARK/MODEL.

    Raises:
      ConfigError, RecordError, LLMError: one sentence on what cannot be used, before anything
        expensive.
    """
    began = time.perf_counter()
    c = keys.freeze(config)
    run.prepare(c.runtime)
    mesh = sharding.make_mesh(c.mesh)
    sharding.check_batch(mesh, batch=c.batch)
    s = keys.settings(c)
    benchmark = chosen(benchmarks.read(c.benchmark, c.data_dir, c.allow_outside), c)
    ways = plan(c, s)
    folder = pathlib.Path(workdir or default_workdir(c))
    asked = same_everywhere(identity(c, s, benchmark))
    judge, samples = hosts.first_does(lambda: open_folder(folder, asked, c)) or (None, None)
    for note in benchmark.notes:
        print(note)

    lost = read(c, s, benchmark, ways, samples, mesh)

    def conclude() -> None:
        results = summarise(benchmark, ways, s.prompt.segments, samples, lost, judge) | {
            "depends_on": asked | depends_on(c, benchmark, ways),
            "config": json.loads(config.to_json()),
            "versions": run.versions(),
            "seconds": round(time.perf_counter() - began, 1),
            "peak_rss_gb": round(metrics.peak_rss_gb(), 2),
        }
        with replacing(folder / "results.json") as file:
            file.write(json.dumps(results, indent=1).encode())
        shown = page.write(folder, c.timelines)
        print(table(results))
        print(f"results: {folder / 'results.json'}\nreport: {shown}")

    hosts.first_does(conclude)


def open_folder(
    folder: pathlib.Path, asked: Mapping[str, Any], c: Config
) -> tuple[judges.Judge, Samples]:
    """The judge of open-ended answers, and the answers that the folder holds already.

    Raises:
      ConfigError, LLMError: see `claim` and `judge_of`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, asked)
    return judge_of(c, folder), Samples(folder)


def same_everywhere(asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked; ConfigError if another host has other questions or weights."""
    for host, other in enumerate(hosts.gather(asked)):
        for key, value in asked.items():
            if other[key] != value:
                raise ConfigError(
                    f"host {host} has other {key} than host {jax.process_index()}: give all of "
                    f"them the same --config.data_dir and --config.weights"
                )
    return asked


def judge_of(c: Config, folder: pathlib.Path) -> judges.Judge:
    """What says whether an open-ended answer is right; its verdicts are kept in `folder`.

    Raises:
      LLMError: the judge that the configuration names cannot be asked.
    """
    if not (c.open_ended and c.judge.url):
        return judges.exact
    judge = judges.open_judge(c.judge, folder / "judge.sqlite")
    judge.check()
    return judge


def chosen(benchmark: Benchmark, c: Config) -> Benchmark:
    """The questions that the configuration asks for."""
    keep = lambda items: tuple(one for one in items if c.open_ended or not one.is_open)  # noqa: E731
    questions, lost = keep(benchmark.questions), keep(benchmark.lost)
    if c.limit and c.limit < len(questions):
        places = np.linspace(0, len(questions) - 1, c.limit).round().astype(int)
        questions, lost = tuple(questions[i] for i in places), ()
    if not questions:
        raise RecordError(
            f"all questions of {c.data_dir} are open-ended: set --config.open_ended=True"
        )
    return dataclasses.replace(benchmark, questions=questions, lost=lost)


def plan(c: Config, s: cfg.Settings) -> list[Way]:
    """The ways in which all questions are read, by the number of segments."""
    how = {"memory": c.memory, "video": c.video, "forced": c.forced}
    return [
        Way(
            segments,
            keys.frames(c, s.prompt.frames, segments),
            **how,
            official=c.prompt == "official",
        )
        for segments in sorted(c.counts or (s.prompt.segments,))
    ]


def default_workdir(c: Config) -> str:
    """Where results go: by benchmark, model and baseline."""
    # "model" and "checkpoint-10" are names within a run.
    parts = pathlib.Path(os.path.abspath(c.weights)).parts[-2:]
    kind = "" if c.memory else "-at-once"
    kind += "" if c.video else "-blind"
    return os.path.join("runs", c.benchmark, "-".join(p for p in parts if p != os.sep) + kind)


def identity(c: Config, s: cfg.Settings, benchmark: Benchmark) -> dict[str, Any]:
    """All that an answer depends on but the number of segments."""
    return {
        "benchmark": c.benchmark,
        "questions": hash_texts(f"{q.id}\n{q.prompt}\n{q.answer}" for q in benchmark.questions),
        "weights": hash_weights(c.weights),
        "frames": s.prompt.frames,
        "total_frames": c.total_frames,
        "max_pixels": s.prompt.max_pixels,
        "slots": s.memory.slots,
        "answer": s.prompt.answer,
        "answer_from": s.prompt.answer_from,
        "prompt": c.prompt,
        "memory": c.memory,
        "video": c.video,
        "forced": c.forced,
        "dtype": s.model.dtype,
    }


def read(
    c: Config,
    s: cfg.Settings,
    benchmark: Benchmark,
    ways: Sequence[Way],
    samples: Samples | None,
    mesh: Mesh,
) -> dict[int, list[Lost]]:
    """Reads every question that has no sample yet; returns those lost, by number of segments.

    The processes share the questions, and only the first has `samples`. A question that was lost
    is tried again in the next run: its video may have been put right.
    """
    loaded = None
    lost = {}
    done = {(n, name) for n, name in hosts.gather(list(samples.rows) if samples else [])[0]}
    place = {q.id: number for number, q in enumerate(benchmark.questions)}
    for way in ways:
        todo = [q for q in benchmark.questions if (way.segments, q.id) not in done]
        gone = []
        with tqdm(
            total=len(place),
            initial=len(place) - len(todo),
            desc=f"{c.benchmark}, {way.segments} segment{'s' * (way.segments > 1)}",
            unit="question",
            disable=not hosts.first(),
        ) as bar:
            for is_open in (False, True):
                part = [q for q in todo if q.is_open == is_open]
                if not part:
                    continue
                loaded = loaded or load(s, mesh)
                # Room for all, also where some are read: a run that goes on computes the same.
                everything = [q for q in benchmark.questions if q.is_open == is_open]
                reader = reading.Reader(loaded, s, mesh, way, everything)
                for items, unread in reader.read(part):
                    if samples:
                        samples.add(way.segments, items)
                    gone += unread
                    bar.update(len(items) + len(unread))
        lost[way.segments] = [*benchmark.lost, *sorted(gone, key=lambda one: place[one.id])]
    return lost


def load(s: cfg.Settings, mesh: Mesh) -> run.Loaded:
    """The model, its parameters spread over the mesh as they are read."""
    return run.load(
        s,
        param_dtype=jnp.dtype(s.model.dtype),
        shardings=lambda params: sharding.parameter_shardings(mesh, params),
    )


def summarise(
    benchmark: Benchmark,
    ways: Sequence[Way],
    own: int,
    samples: Samples,
    lost: Mapping[int, Sequence[Lost]],
    judge: judges.Judge = judges.exact,
) -> dict[str, Any]:
    """The numbers: of each reading, and which of them is the one to quote.

    That is the one with the model's `own` number of segments, or with the most, if it has none.
    """
    readings = [numbers(benchmark, way, samples, lost[way.segments], judge) for way in ways]
    counts = [way.segments for way in ways]
    main = readings[counts.index(own) if own in counts else -1]
    options = [len(q.options) for q in benchmark.questions if not q.is_open]
    return {
        "benchmark": benchmark.name,
        "average": benchmark.average,
        "metric": f"mean over {benchmark.average}s" if benchmark.average else "accuracy",
        "accuracy": main["accuracy"],
        "segments": main["segments"],
        "chance": float(np.mean(1 / np.array(options))) if options else None,
        "notes": list(benchmark.notes),
        "readings": readings,
    }


def numbers(
    benchmark: Benchmark,
    way: Way,
    samples: Samples,
    lost: Sequence[Lost],
    judge: judges.Judge = judges.exact,
) -> dict[str, Any]:
    """The numbers of one reading. What is lost counts as wrong; what is open, by itself."""
    found = [(q, samples.rows.get((way.segments, q.id))) for q in benchmark.questions]
    answered = [(q, row["steps"]) for q, row in found if row]
    gone = {
        is_open: [
            scores.Mark(one.id, one.video or one.id, (False,), one.groups)
            for one in lost
            if one.is_open == is_open
        ]
        for is_open in (False, True)
    }
    marks = [
        scores.Mark(q.id, q.video, tuple(step["answer"] == q.answer for step in steps), q.groups)
        for q, steps in answered
        if not q.is_open
    ] + gone[False]
    opened = [(q, steps[-1]["answer"] or "") for q, steps in answered if q.is_open]
    verdicts = judge([judges.Case(q.question, q.answer, said) for q, said in opened])
    open_marks = [
        scores.Mark(q.id, q.video, (verdict,), q.groups)
        for (q, _), verdict in zip(opened, verdicts, strict=True)
        if verdict is not None
    ] + gone[True]
    all_steps = [step for _, steps in answered for step in steps]
    clips, frames = way.clips
    result = {
        "segments": way.segments,
        "frames": way.segments * way.frames,
        "frames_at_once": frames,
        "accuracy": scores.headline(marks, benchmark.average),
        "of_all_questions": scores.share(marks),
        "by": scores.by_group(marks),
        "provisional": [
            scores.headline(marks, benchmark.average, segment) for segment in range(clips)
        ],
        "unanswered": sum(steps[-1]["answer"] is None for _, steps in answered),
        "format_rate": _mean([step["well_formed"] for step in all_steps]),
        "memory_tokens": _mean([step["tokens"] for step in all_steps]),
        "lost": [dataclasses.asdict(one) for one in lost],
        "lost_by_cause": dict(Counter(one.cause for one in lost)),
    }
    if open_marks:
        result["open_ended"] = {
            "metric": "exact match" if judge is judges.exact else "judged by an LLM",
            "unjudged": verdicts.count(None),
        } | scores.share(open_marks)
    return result


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def depends_on(c: Config, benchmark: Benchmark, ways: Sequence[Way]) -> dict[str, Any]:
    """What the numbers depend on, beside the code and `identity`."""
    example = benchmark.questions[0]
    how = "the format forced" if c.forced else "free; of a malformed answer, the letter it names"
    if not c.memory:
        how = "a free reply, the letter it names"
    return {
        "model": os.path.abspath(c.weights),
        "data": os.path.abspath(c.data_dir),
        "limit": c.limit,
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "decoding": f"greedy; {how}",
        "frame_times": "centres of equal bins over the whole video",
        "prompt_example": reading.asked(example, ways[0]),
    }


def table(results: Mapping[str, Any]) -> str:
    """The headline numbers as text."""
    lines = ["", f"{results['benchmark']}, {results['metric']} (95% interval)"]
    for one in results["readings"]:
        share, lost = one["accuracy"], len(one["lost"])
        lines.append(f"  {one['segments']} segments, {one['frames']} frames: {_told(share)}")
        steps = "  ".join(_percent(step["mean"]) for step in one["provisional"])
        lines.append(f"    after each: {steps}")
        if one["unanswered"]:
            lines.append(f"    {one['unanswered']} without an answer, counted as wrong")
        if lost:
            causes = ", ".join(f"{n} {cause}" for cause, n in one["lost_by_cause"].items())
            lines.append(f"    {lost} lost, counted as wrong ({causes}), such as")
            lines += [f"      {each['sentence']}" for each in one["lost"][:3]]
        if "open_ended" in one:
            share = one["open_ended"]
            lines.append(f"    open questions, {share['metric']}: {_told(share)}")
    main = next(r for r in results["readings"] if r["segments"] == results["segments"])
    for name, groups in main["by"].items():
        lines.append(f"  by {name}, {results['segments']} segments")
        for value, share in groups.items():
            lines.append(f"    {value[:40]:40} {_percent(share['mean'])}   n={share['n']}")
    return "\n".join(lines)


def _told(share: scores.Share) -> str:
    bounds = f"{_percent(share['low'])} to {_percent(share['high'])}"
    return f"{_percent(share['mean'])}   {bounds}   n={share['n']}"


def _percent(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.1%}"
