"""The ablations: statistics, the table of runs, what is run and in which order, the page."""

import concurrent.futures
import json
import os
import runpy
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.ablations import data, inference, page, paper, runs, stats, tables
from benchmarks.ablations.results import Results
from benchmarks.ablations.runs import RunError, Runs, Stopped
from benchmarks.ablations.stats import Estimate
from benchmarks.ablations.variants import CONFIG, QUICK, STUDIES, TABLES, VARIANTS, WHOLE
from tests.commands import ROOT
from videomem_jax import settings

NAN = float("nan")

# --- statistics ---


def test_an_estimate_is_a_mean_with_students_interval():
    e = stats.estimate([0.5, 0.6, 0.7])
    assert e.n == 3 and e.mean == pytest.approx(0.6)
    # 97.5% quantile of Student's t with 2 degrees of freedom, from a printed table.
    assert e.high - e.mean == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert e.mean - e.low == pytest.approx(e.high - e.mean)
    one = stats.estimate([0.5])
    assert (one.mean, one.n) == (0.5, 1) and np.isnan([one.low, one.high]).all()


def test_a_difference_is_paired_by_seed():
    e = stats.difference({0: 0.1, 1: 0.5, 7: 0.9}, {1: 0.6, 0: 0.2, 3: 0.0})
    assert e.n == 2 and [e.mean, e.low, e.high] == pytest.approx([0.1, 0.1, 0.1])
    assert stats.difference({0: 0.1}, {1: 0.1}) is None


@pytest.mark.parametrize(
    ("paper_says", "here", "found"),
    [
        (2.0, Estimate(0.1, 0.05, 0.15, 3), "agrees in direction"),
        (-2.0, Estimate(0.1, 0.05, 0.15, 3), "the opposite direction"),
        (2.0, Estimate(0.1, -0.05, 0.25, 3), "not to be told apart from no difference"),
        (2.0, Estimate(0.1, NAN, NAN, 1), "one seed, which agrees in direction"),
        (-2.0, Estimate(0.1, NAN, NAN, 1), "one seed, which does not agree in direction"),
        (2.0, Estimate(0.0, NAN, NAN, 1), "one seed, which does not agree in direction"),
        (0.01, Estimate(0.1, -0.05, 0.25, 3), "none to be told from zero, which agrees"),
        (0.01, Estimate(0.1, 0.05, 0.15, 3), "which does not agree"),
        (0.01, Estimate(0.1, NAN, NAN, 1), "which does not agree"),
    ],
)
def test_agreement(paper_says, here, found):
    assert stats.agreement(paper_says, here) == found


def test_steps_to_a_share_of_the_end():
    curve = [*np.linspace(0.4, 0.8, 101), *[0.8] * 99]
    assert stats.settled(curve) == pytest.approx(0.8)
    # A straight line is its own mean: 0.718 lies between those of 80 and 81.
    assert stats.steps_to(curve, 0.718) == 81
    assert stats.steps_to([0.1, 0.9, 0.1, 0.1, 0.1], 0.6, window=3) is None
    assert stats.steps_to([0.1, 0.9, 0.9, 0.1, 0.1], 0.6, window=3) == 2


def steps(count, seconds):
    """Rows of PRPO steps; the first compiles."""
    row = {"phase": "prpo", "seconds/rollout": seconds, "seconds/update": 1.0, "seconds/data": 0.5}
    row |= {"reward/answer": 0.8, "no_signal": 0.25, "accuracy/segment_4": 0.5}
    rows = [row | {"step": i + 1} for i in range(count)]
    rows[0] = rows[0] | {"seconds/rollout": 60.0}
    return rows


def test_as_many_steps_as_take_the_same_time():
    assert stats.step_seconds(steps(5, 0.5)) == 2.0
    assert stats.equal_time(300, steps(5, 0.5), steps(5, 1.5)) == 200
    assert stats.equal_time(300, steps(5, 0.5), steps(5, 1200.0)) == 1


# --- the table of runs ---


def finish(made, name, seed, accuracy, rows=()):
    """Makes up what a run leaves, for a run of its config."""
    variant, folder = VARIANTS[name], made.of(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = runpy.run_path(str(ROOT / CONFIG))["get_config"]()
    config.update_from_flattened_dict(made.changes(variant, seed))
    share = lambda mean: {"mean": mean, "low": 0.0, "high": 1.0, "n": 500}  # noqa: E731
    summary = {
        "accuracy": {variant.model: share(accuracy), "base": share(0.26)},
        "format_rate": {variant.model: 0.99, "base": 1.0},
        "memory_tokens": {variant.model: 6.5},
        "config": json.loads(config.to_json()),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def three(tmp_path):
    """Runs of three seeds of which none is there."""
    return Runs(tmp_path / "all", WHOLE, 3)


@pytest.mark.parametrize("sizes", [WHOLE, QUICK], ids=["whole", "quick"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_run_is_a_config_of_the_demo(name, sizes, tmp_path):
    made = Runs(tmp_path, sizes, 1)
    for other, seconds in (("full", 0.5), ("grpo", 1.5)):
        finish(made, other, 0, 0.5, steps(300, seconds))
    config = runpy.run_path(str(ROOT / CONFIG))["get_config"]()
    for key, value in made.changes(VARIANTS[name], 0).items():
        inside = config
        *path, last = key.split(".")
        for part in path:
            inside = inside[part]
        assert last in inside, f"{key} is no key"
        assert inside[last] != value or key in ("seed", "data.folder"), f"{key} changes nothing"
        inside[last] = value  # of the key's type, or this is an error
    s = settings.freeze(config)
    untaught = name in ("prpo_only", "prpo_forced")
    assert (s.coldstart.steps == 0) == bool(VARIANTS[name].start or untaught)
    assert (s.prpo.steps == 0) == (VARIANTS[name].model == "coldstart")
    if name == "grpo_time":
        assert s.prpo.steps == 200


def test_what_tables_need_exists_and_is_needed():
    used = {name for needs in TABLES.values() for name in needs.variants}
    assert used == set(VARIANTS) and set(tables.SWEEPS) >= {"budget", "group", "paths"}
    assert {study for needs in TABLES.values() for study in needs.studies} == set(STUDIES)
    assert {need for v in VARIANTS.values() for need in v.needs} <= set(VARIANTS)
    assert set(paper.COMPONENTS) <= set(TABLES["components"].variants)
    assert set(paper.COLDSTART) == {"base", *TABLES["coldstart"].variants}


def test_cells_of_studies():
    s = settings.Settings()
    for study in STUDIES:
        assert [cell.name for cell in inference.cells(study, s)] == inference.names(study)
    longest = inference.cells("extent", s)[len(data.LENGTHS) - 1]
    assert longest == inference.Cell("clips32_cards8", "clips32_cards8.jsonl", 32)
    assert {cell.segments for cell in inference.cells("segments", s)} >= {1, 4, 16}


# --- what is run ---


@pytest.fixture
def called(three, monkeypatch):
    """The commands that `work` gives, each of which leaves what it should."""
    seen, broken = [], set()

    def call(self, command, log):
        where = {part.partition("=")[0]: part.partition("=")[2] for part in command}
        folder = (where.get("--workdir") or where.get("--run") or "").rpartition("/")[2]
        seen.append((command[0] if command[0] != "-m" else command[1], folder))
        if folder in broken:
            raise RunError(f"{folder} broke")
        name, _, seed = folder.rpartition("-")
        if command[0] == "eval.py":
            finish(three, name, int(seed), 0.5, steps(300, 1.0 + 0.5 * (name == "grpo")))
        if study := where.get("--study"):
            cells = dict.fromkeys(inference.names(study), {})
            file = three.of(name, int(seed)) / "studies" / f"{study}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(dict.fromkeys(inference.models(True), cells)))

    monkeypatch.setattr(runs.Caller, "call", call)
    return seen, broken


def test_runs_come_after_what_they_need_and_once(three, called):
    seen, _ = called
    assert runs.work(three, ["memory", "coldstart"]) == []
    trained = [folder for script, folder in seen if script == "train.py"]
    assert len(set(trained)) == len(trained) == 15
    assert trained.index("coldstart-2") < trained.index("full-2")
    assert ("benchmarks.ablations.inference", "full-1") in seen
    assert seen[seen.index(("train.py", "ordinary-0")) - 1][0] == "benchmarks.ablations.data"
    count = len(seen)
    assert runs.work(three, ["memory", "coldstart"]) == [] and len(seen) == count
    assert runs.work(three, ["components"]) == []
    config = three.summary("grpo_time", 0)["config"]
    assert config["prpo"]["steps"] == 250 and config["prpo"]["psp"] is False


def test_others_do_not_wait_for_a_run_that_fails(three, called):
    seen, broken = called
    broken.add("coldstart-1")
    assert runs.work(three, ["coldstart"]) == ["coldstart-1 broke"]
    folders = {folder for script, folder in seen if script == "eval.py"}
    assert {"full-0", "full-2", "ordinary-1", "prpo_only-1"} <= folders and "full-1" not in folders


def test_a_folder_of_other_runs_is_no_folder_of_these(three):
    finish(three, "full", 0, 0.5)
    quick = Runs(three.folder, QUICK, 1)
    with pytest.raises(RunError, match=r"full-0 is a run with config\.data\.train_videos=600, not"):
        quick.check(VARIANTS["full"], 0)


def test_a_failing_and_a_stopped_command(three, tmp_path):
    caller = runs.Caller(1, tmp_path)
    with pytest.raises(RunError, match="exit code 3 of python -c 'import sys; sys.exit"):
        caller.call(["-c", "import sys; sys.exit(3)"], "one")
    with pytest.raises(Stopped, match="the same command goes on"):
        caller.call(["-c", f"import sys; sys.exit({128 + signal.SIGTERM})"], "one")
    two = runs.Caller(2, tmp_path)
    with pytest.raises(RunError, match="sys.exit.*, see .*broken.log"):
        two.call(["-c", "import sys; print('why'); sys.exit(4)"], "broken")
    assert (tmp_path / "broken.log").read_text() == "why\n"


def test_told_to_stop_it_tells_its_commands(three, monkeypatch):
    """And begins no other: runs are to be found as they were left."""
    before = signal.getsignal(signal.SIGTERM)
    hang = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    monkeypatch.setattr(Runs, "commands", lambda *_: [["-c", hang]])
    with pytest.raises(Stopped):
        runs.work(three, ["coldstart"])
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores can't be given out here")
def test_runs_at_once_have_cores_of_their_own(tmp_path):
    caller = runs.Caller(2, tmp_path)
    show = "import os, time; time.sleep(0.3); print(sorted(os.sched_getaffinity(0)))"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: caller.call(["-c", show], name), ("a", "b")))
    a, b = (json.loads((tmp_path / f"{name}.log").read_text()) for name in "ab")
    mine = sorted(os.sched_getaffinity(0))
    assert sorted({*a, *b}) == mine and (len(mine) == 1 or not {*a} & {*b})


def test_two_at_once_do_what_one_does(three, called):
    seen, broken = called
    broken.add("coldstart-1")
    assert runs.work(three, ["memory", "coldstart"], jobs=2) == ["coldstart-1 broke"]
    trained = [folder for script, folder in seen if script == "train.py"]
    assert len(set(trained)) == len(trained) == 14  # all but full-1, and its study
    assert trained.index("coldstart-2") < trained.index("full-2")


# --- the page ---


def cell(mean, ends=(0.3, 0.6)):
    """What a study keeps of a reading."""
    shares = [{"mean": share} for share in np.linspace(*ends, 4)]
    return {"accuracy": {"mean": mean}, "early": {"mean": mean}, "by_segment": shares}


@pytest.fixture
def some(three):
    """Made-up results: two seeds of the main runs, one of GRPO, one seed's studies."""
    for seed in (0, 1):
        finish(three, "coldstart", seed, 0.46 + 0.02 * seed)
        finish(three, "full", seed, 0.72 + 0.02 * seed, steps(300, 0.5))
        finish(three, "no_psp", seed, 0.62 + 0.02 * seed, steps(300, 1.5))
        finish(three, "no_tcr", seed, 0.82 + 0.02 * seed, steps(300, 0.5))
    finish(three, "grpo", 0, 0.6, steps(300, 4.5))
    folder = three.of("full", 0) / "studies"
    folder.mkdir()
    found = {
        model: {"own": cell(0.7), "wiped": cell(0.3), "swapped": cell(0.2)}
        for model in ("start", "trained")
    }
    found["base"] = {"own": cell(0.3, (0.3, 0.2))}
    (folder / "memory.json").write_text(json.dumps(found))
    extent = {n: cell(0.7 if "clips4" in n else 0.56) for n in inference.names("extent")}
    (folder / "extent.json").write_text(json.dumps({"trained": extent, "start": extent}))
    return three


def row_of(text, label):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [part.strip() for part in line.strip("|").split("|")]


def test_the_page_says_what_the_runs_say(some, tmp_path):
    out = tmp_path / "RESULTS.md"
    gone = page.write(some, out)
    text = out.read_text()
    # 97.5% quantile of Student's t with one degree of freedom: 12.706, times 1 point.
    first = text.split("## ")[1]
    full = row_of(first, "cold start + PRPO")
    assert full[1:4] == ["73.0 (60.3 to 85.7)", "99.0", "2"] and "64.2 / 58.5 / 63.3" in full
    assert row_of(first, "base")[1] == "26.0"  # the same for all seeds
    assert row_of(first, "ordinary supervised")[1] == "missing"
    # (64.2 - 61.9 + 58.5 - 54.4 + 63.3 - 60.7) / 3, from the paper's table.
    assert "cold start + PRPO: +3.0 points in the paper (mean of the three), +26.0 points" in text
    assert "Without PSP: -2.1 points in the paper (mean of the two), -10.0 points" in text
    assert "-10.0 points (-10.0 to -10.0) here: agrees in direction." in text
    assert "+10.0 points (+10.0 to +10.0) here: the opposite direction." in text
    assert "A step of GRPO takes 3.00 times as long as one of PRPO" in text
    assert row_of(text, "GRPO (neither PSP nor TCR)")[1] == "60.0"
    assert row_of(text, "groups with a signal, %")[1:3] == ["75.0", "75.0"]
    assert row_of(text, "completions rewarded for their answer, %")[1] == "40.0"
    assert "last clip changes by -40.0 points" in text  # with the memory wiped
    assert "changes by -20.0% of itself" in text and "this does not agree" in text
    assert "grpo-1" in gone and "full-2" in gone and "full-0" not in gone.replace("of full-0", "")
    assert "`grpo-1`" in text and "next to untrained" not in text


def test_every_number_has_its_run_and_every_run_its_command(some, tmp_path):
    page.write(some, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert row_of(text, "`full`")[3:] == ["72.0", "74.0", "missing"]
    for name in VARIANTS:
        assert f"# {name}\n" in text
        assert name == "grpo_time" or f"--workdir={some.of(name, 0)} " in text
    assert "the number of steps of grpo_time follows" not in text  # both of its runs are there
    for key in TABLES:
        assert f"--only {key}`" in text
    images = {
        line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")
    }
    assert "RESULTS/coldstart.png" in images and "RESULTS/memory.png" in images
    for image in images:
        assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")


def test_one_level_for_both_rewards(three):
    high, low = (
        [row | {"accuracy/segment_4": top * min(1, row["step"] / 100)} for row in steps(300, 1)]
        for top in (0.8, 0.5)
    )
    finish(three, "full", 0, 0.8, high)
    finish(three, "no_tcr", 0, 0.5, low)
    rows = {row[0]: row for row in tables.tcr(Results(three)).rows}
    own, common = (
        rows[f"steps to 90% of {what}"] for what in ("the final accuracy", "that with TCR")
    )
    assert all(int(cell) in (90, 91) for cell in own[1:3])
    assert common[1] == own[1] and common[2:4] == ["not reached", ""]
    for name in ("full", "no_tcr"):  # a seed that does get there
        finish(three, name, 1, 0.8, high)
    (common,) = (row for row in tables.tcr(Results(three)).rows if row[0] == common[0])
    assert common[2:4] == ["not reached by 1 of 2", ""]


def test_a_quick_page_says_so(some, tmp_path):
    page.write(some, tmp_path / "RESULTS.md", quick=True)
    assert "their numbers mean nothing" in (tmp_path / "RESULTS.md").read_text()


def test_without_runs_there_is_no_page(three, tmp_path):
    assert "no run is finished" in page.write(three, tmp_path / "RESULTS.md")
    assert not (tmp_path / "RESULTS.md").exists()


def test_a_sweep_has_the_demos_own_value(some):
    found = tables.swept(Results(some), "budget")
    assert found[0] == "full" and list(found) == sorted(found)
    assert tables.swept(Results(some), "paths") == {
        1: "full",
        2: "paths_2",
        4: "paths_4",
        8: "no_psp",
    }


# --- all of it ---


@pytest.mark.slow
def test_quick_runs_go_from_the_film_to_the_page(environment, tmp_path):
    """A cold start, PRPO and a study, each a command of its own; again, there is nothing to do."""
    command = [sys.executable, "-m", "benchmarks.ablations", "--quick", "--only=memory"]
    command.append(f"--folder={tmp_path}")

    def once():
        how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        return subprocess.run(command, **how)

    first = once()
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("\n$ python ") == 6
    found = json.loads((tmp_path / "full-0/studies/memory.json").read_text())
    assert set(found) == {"base", "start", "trained"}
    for cells in found.values():
        assert set(cells) == {"own", "wiped", "swapped"}
        assert all(len(one["by_segment"]) == 4 for one in cells.values())
        assert all(one["accuracy"]["n"] == 8 and not one["skipped"] for one in cells.values())
    # Before the first clip there is nothing to wipe: the first answers are the same.
    base = found["base"]
    assert base["own"]["by_segment"][0] == base["wiped"]["by_segment"][0]
    assert "`full-0`" not in (tmp_path / "RESULTS.md").read_text().split("##")[0]
    again = once()
    assert again.returncode == 0 and "$ python" not in again.stdout
