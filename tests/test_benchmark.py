"""A model on a benchmark: numbers, restarts, what is lost, the page, and two runs compared."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from tests.commands import finish_pair, results_of, samples_of, start_pair, timeless
from tests.data.benchmark_folders import SIZES
from videomem_jax import compare, evaluate, run, sharding
from videomem_jax.benchmark import config as keys
from videomem_jax.benchmark import evaluation, reading
from videomem_jax.benchmark.reading import Way
from videomem_jax.data import benchmarks, records
from videomem_jax.models.config import ConfigError


@pytest.fixture(scope="module")
def whole(benchmark_config, benchmark_folder, tmp_path_factory):
    """An evaluation of LongVideoBench in 1 and 2 segments; one video is broken."""
    folder = benchmark_folder("longvideobench")
    broken = folder / "videos/lvb1.mp4"
    text = broken.read_bytes()
    broken.unlink()  # its other names are left alone
    broken.write_bytes(text[: len(text) // 3])
    config = benchmark_config("longvideobench", folder, segments="2,1")
    workdir = tmp_path_factory.mktemp("out")
    evaluation.evaluate_benchmark(config, str(workdir))
    return config, workdir


def test_results(whole):
    _, workdir = whole
    results, rows = results_of(workdir), samples_of(workdir)
    assert [one["segments"] for one in results["readings"]] == [1, 2]
    assert results["segments"] == 2 and len(rows) == 16
    for one in results["readings"]:
        steps = {row["id"]: row["steps"] for row in rows if row["segments"] == one["segments"]}
        gold = {row["id"]: row["gold"] for row in rows}
        assert all(len(found) == one["segments"] for found in steps.values())
        right = [steps[i][-1]["answer"] == gold[i] for i in steps]
        # The broken video's four questions are in the count, and wrong.
        assert len(steps) == 8 and one["accuracy"]["n"] == 12
        assert one["accuracy"]["mean"] == sum(right) / 12
        for segment, share in enumerate(one["provisional"]):
            right = [steps[i][segment]["answer"] == gold[i] for i in steps]
            assert share["mean"] == sum(right) / 12
        assert one["provisional"][-1] == one["accuracy"]
        assert len(one["lost"]) == 4 and sum(one["lost_by_cause"].values()) == 4
        assert all("lvb1.mp4" in lost["sentence"] for lost in one["lost"])
        for groups in one["by"].values():
            assert sum(share["n"] for share in groups.values()) == 12
        assert list(one["by"]["duration_group"]) == ["15", "60", "600"]
        assert one["by"]["duration_group"]["60"]["mean"] == 0
        assert one["frames"] == 2 * one["segments"] and one["format_rate"] == 1
        assert one["unanswered"] == 0
        assert 0 < one["memory_tokens"] <= 6
    assert results["chance"] == pytest.approx(np.mean([1 / 4, 1 / 5]))
    on = results["depends_on"]
    assert len(on["weights"]) == 64 and on["max_pixels"] == 6144 and on["prompt"] == "official"
    assert on["prompt_example"].endswith("from the given choices directly.")
    assert "greedy" in on["decoding"] and "jax" in results["versions"]


def test_it_reads_as_the_evaluation_of_a_run_does(whole, weights):
    """The same memories and answers as `evaluate.run`, given the same prompt."""
    config, workdir = whole
    c = keys.freeze(config)
    s, way = keys.settings(c), Way(2, 2, official=False)
    loaded = evaluation.load(s, sharding.make_mesh(c.mesh))
    asked = [q for q in benchmarks.read(c.benchmark, c.data_dir).questions if "lvb1" not in q.video]
    mesh = sharding.make_mesh(c.mesh)
    reader = reading.Reader(loaded, s, mesh, way, asked)
    ours = {q.id: steps for items, _ in reader.read(asked) for q, steps in items}
    sized = reading.fitted(s, loaded.tokenizer, asked, way)
    as_records = [records.Record(q.id, q.video, q.question, q.options, q.answer) for q in asked]
    loaded = run.Loaded(
        loaded.model,
        loaded.tokenizer,
        run.make_format(loaded.tokenizer, loaded.model, sized, forced=True),
    )
    evaluator = evaluate.Evaluator(loaded.model, loaded.form, mesh)
    items, _ = evaluate.run(
        *("it", evaluator, evaluator.place(loaded.model), loaded.form.grammar, as_records),
        *(loaded.tokenizer, sized, 2),
    )
    assert len(items) == len(ours) == 8
    for item in items:
        steps = ours[item.record.id]
        assert [step.memory for step in steps] == item.memories
        assert [step.answer for step in steps] == item.answers
        assert [step.tokens for step in steps] == item.tokens
        np.testing.assert_array_equal([step.times for step in steps], item.times)


def test_a_run_that_was_stopped_goes_on(whole, tmp_path, monkeypatch):
    """From any line, also a torn one: the same results, and nothing is read twice."""
    config, workdir = whole
    lines = (workdir / "samples.jsonl").read_bytes().splitlines(keepends=True)
    shutil.copytree(workdir, tmp_path / "again")
    (tmp_path / "again/samples.jsonl").write_bytes(b"".join(lines[:12]) + lines[12][:40])
    read = []
    add = evaluation.Samples.add

    def counted(self, segments, items):
        read.extend((segments, question.id) for question, _ in items)
        add(self, segments, items)

    monkeypatch.setattr(evaluation.Samples, "add", counted)
    evaluation.evaluate_benchmark(config, str(tmp_path / "again"))
    assert read == [(row["segments"], row["id"]) for row in samples_of(workdir)[12:]]
    assert samples_of(tmp_path / "again") == samples_of(workdir)
    assert timeless(results_of(tmp_path / "again")) == timeless(results_of(workdir))


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(whole, environment, tmp_path):
    """Also from the middle: what is there is read by the first, and nothing is read twice."""
    config, workdir = whole
    lines = (workdir / "samples.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("samples.jsonl", "identity.json"):
        shutil.copy(workdir / name, tmp_path)
    (tmp_path / "samples.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    values = SIZES | {"segments": config.segments, "data_dir": config.data_dir}
    values |= {"weights": config.weights} | {f"mesh.{k}": v for k, v in config.mesh.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    command = ("eval.py", "--config=configs/eval.py:longvideobench", *flags)
    how = {"environment": environment, "devices": 4}
    codes, outs, errs = finish_pair(start_pair(*command, f"--workdir={tmp_path}", **how), 600)
    assert codes == (0, 0), errs
    assert "longvideobench, accuracy (95% interval)" in outs[0] and not outs[1]
    place = lambda row: (row["segments"], row["id"])  # noqa: E731
    rows = samples_of(tmp_path)
    assert rows[:3] == samples_of(workdir)[:3] and len(rows) == len(lines)
    assert sorted(rows, key=place) == sorted(samples_of(workdir), key=place)
    assert timeless(results_of(tmp_path)) == timeless(results_of(workdir))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in workdir.iterdir()}


def test_a_folder_of_other_answers_is_refused(whole):
    config, workdir = whole
    changed = config.copy_and_resolve_references()
    changed.prompt = "plain"
    with pytest.raises(ConfigError, match="holds answers with prompt='official', not 'plain'"):
        evaluation.evaluate_benchmark(changed, str(workdir))


def test_what_was_lost_is_tried_again(whole, tmp_path):
    config, workdir = whole
    broken = pathlib.Path(config.data_dir) / "videos/lvb1.mp4"
    text = broken.read_bytes()
    shutil.copytree(workdir, tmp_path / "again")
    try:
        shutil.copy(broken.with_name("lvb0.mp4"), broken)
        evaluation.evaluate_benchmark(config, str(tmp_path / "again"))
    finally:
        broken.write_bytes(text)
    assert len(samples_of(tmp_path / "again")) == 24
    assert not any(one["lost"] for one in results_of(tmp_path / "again")["readings"])


def test_page(whole):
    _, workdir = whole
    page = (workdir / "report.html").read_text()
    results = results_of(workdir)
    assert page.count('<article class="timeline"') == 3
    assert f"{100 * results['accuracy']['mean']:.1f}%" in page
    for title in ("Accuracy after each segment", "Accuracy by number of segments"):
        assert title in page
    assert "By duration group" in page and "By question category" in page
    for lost in results["readings"][1]["lost"]:
        assert lost["id"] in page
    assert results["depends_on"]["weights"] in page
    assert "<script" not in page and "http-equiv" in page


def test_command_of_comparison(whole, capsys):
    _, workdir = whole
    compare.main([str(workdir), str(workdir), "--segments=1"])
    out = capsys.readouterr().out
    assert "longvideobench, 12 questions in both" in out and "p = 1" in out
    compare.main([str(workdir), str(workdir), "--json"])
    found = json.loads(capsys.readouterr().out)
    share = results_of(workdir)["accuracy"]["mean"]
    assert found["first"] == found["second"] == pytest.approx(share) and found["n"] == 12
    with pytest.raises(SystemExit):
        compare.main([str(workdir), str(workdir), "--segments=7"])
    assert "has no reading in 7 segments, but in 1, 2" in capsys.readouterr().err
