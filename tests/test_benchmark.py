"""A model on a benchmark: numbers, restarts, what is lost, the page, and two runs compared."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data import benchmark_folders as folders
from videomem_jax import compare, evaluate, run, sharding
from videomem_jax import settings as cfg
from videomem_jax.benchmark import config as keys
from videomem_jax.benchmark import evaluation, reading
from videomem_jax.benchmark.reading import Way
from videomem_jax.data import benchmarks, records
from videomem_jax.data.benchmarks import mlvu
from videomem_jax.models.config import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
SIZES = {"frames": 2, "max_pixels": 6 * 32 * 32, "slots": 6, "batch": 4, "timelines": 3}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return folders.film_records(tmp_path_factory.mktemp("film"))


@pytest.fixture(scope="module")
def folder_of(found, tmp_path_factory):
    """Makes a folder of a kind."""
    return lambda kind: folders.make(kind, tmp_path_factory.mktemp("benchmark"), found)


@pytest.fixture(scope="module")
def config_of(weights):
    """Makes a configuration; four of the devices share a batch."""

    def make(name, folder, **changes):
        config = keys.default(name)
        config.data_dir, config.weights = str(folder), str(weights)
        config.mesh.data, config.mesh.fsdp = 2, 2
        for key, value in (SIZES | {"segments": "2"} | changes).items():
            config[key] = value
        config.mesh.tensor = 2
        return config

    return make


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def rows_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def timeless(results):
    kept = {k: v for k, v in results.items() if k not in ("seconds", "peak_rss_gb", "config")}
    return json.loads(json.dumps(kept))


# --- one whole evaluation ---


@pytest.fixture(scope="module")
def whole(config_of, folder_of, tmp_path_factory):
    """An evaluation of LongVideoBench in 1 and 2 segments; one video is broken."""
    folder = folder_of("longvideobench")
    broken = folder / "videos/lvb1.mp4"
    text = broken.read_bytes()
    broken.unlink()  # its other names are left alone
    broken.write_bytes(text[: len(text) // 3])
    config = config_of("longvideobench", folder, segments="2,1")
    workdir = tmp_path_factory.mktemp("out")
    evaluation.evaluate_benchmark(config, str(workdir))
    return config, workdir


def test_results(whole):
    _, workdir = whole
    results, rows = results_of(workdir), rows_of(workdir)
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
    assert read == [(row["segments"], row["id"]) for row in rows_of(workdir)[12:]]
    assert rows_of(tmp_path / "again") == rows_of(workdir)
    assert timeless(results_of(tmp_path / "again")) == timeless(results_of(workdir))


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
    assert len(rows_of(tmp_path / "again")) == 24
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


# --- other ways to read ---


NASTY = "<script>alert('x')</script>"


@pytest.mark.parametrize("changes", [{"memory": False}, {"video": False}, {"forced": False}])
def test_baselines(config_of, folder_of, tmp_path, changes):
    """And text of a benchmark is text on the page."""
    folder = folder_of("records")
    rows = [json.loads(line) for line in (folder / "test.jsonl").open()]
    rows[0] |= {"question": f"Who {NASTY}?", "category": NASTY}
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of("records", folder, limit=4, timelines=4, **changes)
    evaluation.evaluate_benchmark(config, str(tmp_path))
    (one,) = results_of(tmp_path)["readings"]
    assert one["accuracy"]["n"] == 4 and one["frames"] == 4
    assert one["frames_at_once"] == (4 if "memory" in changes else 2)
    assert len(one["provisional"]) == (1 if "memory" in changes else 2)
    steps = [step for row in rows_of(tmp_path) for step in row["steps"]]
    if "memory" in changes:
        assert all(step["memory"] == "" and len(step["times"]) == 4 for step in steps)
        assert any("reply" in step for step in steps)
    if "forced" in changes:  # a random model keeps to no format
        assert one["format_rate"] < 1 and any("reply" in step for step in steps)
    if "video" in changes:
        assert one["format_rate"] == 1
    page = (tmp_path / "report.html").read_text()
    assert NASTY not in page and "&lt;script&gt;alert" in page


def test_open_questions(config_of, folder_of, tmp_path):
    """Only where they are asked for, and apart from the accuracy."""
    folder = folder_of("mlvu")
    evaluation.evaluate_benchmark(config_of("mlvu", folder, open_ended=True), str(tmp_path))
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

    c = keys.freeze(config_of("mlvu", folder, open_ended=True))
    benchmark = benchmarks.read("mlvu", folder)
    asked = benchmark.questions
    (way,) = evaluation.plan(c, keys.settings(c))
    samples = evaluation.Samples(tmp_path)
    judged = evaluation.numbers(benchmark, way, samples, benchmark.lost, lenient)["open_ended"]
    assert (judged["metric"], judged["unjudged"]) == ("lenient", 1)
    assert (judged["mean"], judged["n"]) == (1, 1)


def test_options_of_several_tokens_are_answered(config_of, folder_of, weights):
    """Written token by token they would be mixed up; the most probable one is the answer."""
    folder = folder_of("videomme")
    c = keys.freeze(config_of("videomme", folder, answer="text"))
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


# --- mistakes, and the command itself ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segments": "four"}, "config.segments='four' must be numbers from 1 on"),
        ({"segments": "2,2"}, "each once"),
        ({"segments": "0"}, "numbers from 1 on"),
        ({"frames": 3}, "config.frames=3 must be an even number"),
        ({"frames": 4, "total_frames": 8}, "config.total_frames=8 must be 0 where config.frames"),
        ({"prompt": "mine"}, "config.prompt='mine' must be official or plain"),
        ({"batch": 3}, "config.batch=3 must be a multiple of the 4 parts"),
        ({"weights": "gone"}, "config.weights='gone' must be the folder of a Hugging Face model"),
        ({"weights": ""}, "give --config.weights=FOLDER"),
        ({"data_dir": ""}, "give --config.data_dir=FOLDER"),
    ],
)
def test_values_that_do_not_fit(config_of, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        evaluation.evaluate_benchmark(config_of("videomme", tmp_path, **changes), str(tmp_path))


def test_frames_are_shared_out(config_of, tmp_path):
    c = keys.freeze(config_of("videomme", tmp_path, frames=0, total_frames=64, segments="1,3,4,40"))
    ways = evaluation.plan(c, cfg.Settings())
    assert [(way.segments, way.frames) for way in ways] == [(1, 64), (3, 20), (4, 16), (40, 2)]


def command(environment, *flags):
    return subprocess.Popen(
        [sys.executable, "eval.py", *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_mistakes_on_the_command_line(environment):
    for flags, said in (
        (["--config=configs/eval.py:vidomme"], "names no benchmark: add one of :videomme, "),
        (["--config=configs/eval.py"], "names no benchmark: add one of :videomme, "),
        (
            ["--config=configs/eval.py:mlvu", "--config.dat_dir=x"],
            "config.dat_dir is not a key: did you mean data_dir?",
        ),
    ):
        process = command(environment, *flags)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err


@pytest.mark.slow
def test_a_killed_command_goes_on(folder_of, weights, environment, tmp_path):
    """SIGKILL after the first questions; the same command then gives what one left alone gives."""
    folder = folder_of("longtimescope")
    flags = [f"--config.{key}={value}" for key, value in SIZES.items()]
    flags += [f"--config.data_dir={folder}", f"--config.weights={weights}", "--config.segments=2"]

    def start(name):
        where = f"--workdir={tmp_path / name}"
        return command(environment, "--config=configs/eval.py:longtimescope", *flags, where)

    process, samples = start("killed"), tmp_path / "killed/samples.jsonl"
    deadline = time.monotonic() + 1200
    while not (samples.exists() and samples.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = samples.read_text().count("\n")
    assert before < 12 and not (tmp_path / "killed/results.json").exists()
    for name in ("killed", "whole"):
        process = start(name)
        out, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err
        assert "longtimescope, accuracy (95% interval)" in out
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert timeless(results_of(tmp_path / "killed")) == timeless(results_of(tmp_path / "whole"))
