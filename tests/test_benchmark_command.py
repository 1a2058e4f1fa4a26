"""The evaluation on a benchmark as a command: mistakes in its values, and one that is killed."""

import re
import signal
import time

import pytest

from tests.commands import finish, results_of, samples_of, start, timeless
from tests.data.benchmark_folders import SIZES
from videomem_jax import settings as cfg
from videomem_jax.benchmark import config as keys
from videomem_jax.benchmark import evaluation
from videomem_jax.models.config import ConfigError


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
def test_values_that_do_not_fit(benchmark_config, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        evaluation.evaluate_benchmark(
            benchmark_config("videomme", tmp_path, **changes), str(tmp_path)
        )


def test_frames_are_shared_out(benchmark_config, tmp_path):
    c = keys.freeze(
        benchmark_config("videomme", tmp_path, frames=0, total_frames=64, segments="1,3,4,40")
    )
    ways = evaluation.plan(c, cfg.Settings())
    assert [(way.segments, way.frames) for way in ways] == [(1, 64), (3, 20), (4, 16), (40, 2)]


def test_mistakes_on_the_command_line(command):
    for flags, said in (
        (["--config=configs/eval.py:vidomme"], "names no benchmark: add one of :videomme, "),
        (["--config=configs/eval.py"], "names no benchmark: add one of :videomme, "),
        (
            ["--config=configs/eval.py:mlvu", "--config.dat_dir=x"],
            "config.dat_dir is not a key: did you mean data_dir?",
        ),
    ):
        code, _, err = command("eval.py", *flags)
        assert code == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err


@pytest.mark.slow
def test_a_killed_command_goes_on(benchmark_folder, weights, environment, tmp_path):
    """SIGKILL after the first questions; the same command then gives what one left alone gives."""
    folder = benchmark_folder("longtimescope")
    flags = [f"--config.{key}={value}" for key, value in SIZES.items()]
    flags += [f"--config.data_dir={folder}", f"--config.weights={weights}", "--config.segments=2"]

    def begin(name):
        command = ("eval.py", "--config=configs/eval.py:longtimescope", *flags)
        return start(*command, f"--workdir={tmp_path / name}", environment=environment)

    process, samples = begin("killed"), tmp_path / "killed/samples.jsonl"
    deadline = time.monotonic() + 1200
    while not (samples.exists() and samples.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = samples.read_text().count("\n")
    assert before < 12 and not (tmp_path / "killed/results.json").exists()
    for name in ("killed", "whole"):
        code, out, err = finish(begin(name), 1200)
        assert code == 0, err
        assert "longtimescope, accuracy (95% interval)" in out
    assert samples_of(tmp_path / "killed") == samples_of(tmp_path / "whole")
    assert timeless(results_of(tmp_path / "killed")) == timeless(results_of(tmp_path / "whole"))
