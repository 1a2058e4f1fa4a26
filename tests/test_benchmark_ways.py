"""A model on a benchmark in other ways: baselines, open questions, a judge, long options."""

import json

import numpy as np
import pytest

from tests.commands import results_of, samples_of
from tests.endpoint import serving
from videomem_jax import sharding
from videomem_jax.benchmark import config as keys
from videomem_jax.benchmark import evaluation, reading
from videomem_jax.benchmark.reading import Way
from videomem_jax.data import benchmarks
from videomem_jax.data.benchmarks import mlvu
from videomem_jax.llm import LLMError

NASTY = "<script>alert('x')</script>"


@pytest.mark.parametrize("changes", [{"memory": False}, {"video": False}, {"forced": False}])
def test_baselines(benchmark_config, benchmark_folder, tmp_path, changes):
    """And text of a benchmark is text on the page."""
    folder = benchmark_folder("records")
    rows = [json.loads(line) for line in (folder / "test.jsonl").open()]
    rows[0] |= {"question": f"Who {NASTY}?", "category": NASTY}
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = benchmark_config("records", folder, limit=4, timelines=4, **changes)
    evaluation.evaluate_benchmark(config, str(tmp_path))
    (one,) = results_of(tmp_path)["readings"]
    assert one["accuracy"]["n"] == 4 and one["frames"] == 4
    assert one["frames_at_once"] == (4 if "memory" in changes else 2)
    assert len(one["provisional"]) == (1 if "memory" in changes else 2)
    steps = [step for row in samples_of(tmp_path) for step in row["steps"]]
    if "memory" in changes:
        assert all(step["memory"] == "" and len(step["times"]) == 4 for step in steps)
        assert any("reply" in step for step in steps)
    if "forced" in changes:  # a random model keeps to no format
        assert one["format_rate"] < 1 and any("reply" in step for step in steps)
    if "video" in changes:
        assert one["format_rate"] == 1
    page = (tmp_path / "report.html").read_text()
    assert NASTY not in page and "&lt;script&gt;alert" in page


def test_open_questions(benchmark_config, benchmark_folder, tmp_path):
    """Only where they are asked for, and apart from the accuracy."""
    folder = benchmark_folder("mlvu")
    evaluation.evaluate_benchmark(benchmark_config("mlvu", folder, open_ended=True), str(tmp_path))
    results = results_of(tmp_path)
    (one,) = results["readings"]
    assert one["open_ended"]["metric"] == "exact match" and one["open_ended"]["n"] == 2
    assert one["of_all_questions"]["n"] == 11  # with the one whose answer is no candidate
    tasks = one["by"]["task"]
    assert set(tasks) == set(mlvu.CHOICE)
    # M-Avg: every task counts the same, however many questions it has.
    mean = np.mean([share["mean"] for share in tasks.values()])
    assert one["accuracy"]["mean"] == pytest.approx(mean)
    assert [lost["cause"] for lost in one["lost"]] == ["answer"]

    # Another judge: one that takes the first and has nothing to say of the second.
    def lenient(cases):
        assert [case.reference for case in cases] == [q.answer for q in asked if q.is_open]
        return [True, None]

    c = keys.freeze(benchmark_config("mlvu", folder, open_ended=True))
    benchmark = benchmarks.read("mlvu", folder)
    asked = benchmark.questions
    (way,) = evaluation.plan(c, keys.settings(c))
    samples = evaluation.Samples(tmp_path)
    judged = evaluation.numbers(benchmark, way, samples, benchmark.lost, lenient)["open_ended"]
    assert (judged["metric"], judged["unjudged"]) == ("judged by an LLM", 1)
    assert (judged["mean"], judged["n"]) == (1, 1)


def test_a_judge_behind_an_endpoint(benchmark_config, benchmark_folder, tmp_path):
    """Asked once for each answer, before which it must be there; its key is written nowhere."""
    pytest.importorskip("openai")
    folder = benchmark_folder("mlvu")
    with serving(lambda *_: '{"correct": true}') as server:
        config = benchmark_config("mlvu", folder, open_ended=True)
        config.judge.url, config.judge.model, config.judge.retries = server.url, "m", 0
        evaluation.evaluate_benchmark(config, str(tmp_path))
        (one,) = results_of(tmp_path)["readings"]
        judged = one["open_ended"]
        assert (judged["metric"], judged["mean"], judged["n"]) == ("judged by an LLM", 1, 2)
        asked = len(server.calls)
        evaluation.evaluate_benchmark(config, str(tmp_path))
        assert len(server.calls) == asked  # all verdicts were on disk
    config.judge.model = "another"
    with pytest.raises(LLMError, match="the judge at .* failed"):
        evaluation.evaluate_benchmark(config, str(tmp_path))


def test_options_of_several_tokens_are_answered(benchmark_config, benchmark_folder, weights):
    """Written token by token they would be mixed up; the most probable one is the answer."""
    folder = benchmark_folder("videomme")
    c = keys.freeze(benchmark_config("videomme", folder, answer="text"))
    s, mesh = keys.settings(c), sharding.make_mesh(c.mesh)
    loaded = evaluation.load(s, mesh)
    asked = benchmarks.read("videomme", folder).questions[:4]
    asked = [
        benchmarks.Question(**{**vars(q), "options": tuple(f"the {o} card" for o in q.options)})
        for q in asked
    ]
    reader = reading.Reader(loaded, s, mesh, Way(2, 2), asked)
    assert reader._form.grammar.room > 2
    for items, _ in reader.read(asked):
        for _, steps in items:
            assert all(step.well_formed and step.answer in "ABCD" for step in steps)
            assert steps[-1].tokens > 0
