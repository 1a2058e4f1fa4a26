"""lmms-eval with this project as its model: the harness gives the accuracy that eval.py gives.

Runs where lmms-eval is installed: `make test-lmms`.
"""

import json
import subprocess
import sys

import pytest

from videomem_jax.benchmark import config as keys
from videomem_jax.benchmark import evaluation

pytest.importorskip("lmms_eval")

# LongTimeScope, as lmms-eval scores it, from a folder on this disk.
TASK = """\
task: longtimescope_here
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder}/test-00000-of-00001.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function here.video
doc_to_text: input
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
process_results: !function here.timescope_process_results
metric_list:
  - metric: timescope_perception_score
    aggregation: !function here.timescope_aggregate_results
    higher_is_better: true
"""
FUNCTIONS = """\
from lmms_eval.tasks.longtimescope.utils import (
    timescope_aggregate_results,
    timescope_process_results,
)


def video(doc):
    return ["{folder}/" + doc["video"]]
"""


@pytest.mark.slow
def test_the_harness_gives_the_same_accuracy(weights, environment, benchmark_folder, tmp_path):
    folder = benchmark_folder("longtimescope")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "longtimescope_here.yaml").write_text(TASK.format(folder=folder))
    (tasks / "here.py").write_text(FUNCTIONS.format(folder=folder))
    sizes = {"segments": "2", "frames": 2, "max_pixels": 6 * 32 * 32, "slots": 6}
    given = ",".join(f"{key}={value}" for key, value in sizes.items())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", "videomem_jax"),
            *("--model_args", f"pretrained={weights},{given}", "--batch_size", "4"),
            *("--include_path", str(tasks), "--tasks", "longtimescope_here"),
            *("--output_path", str(tmp_path / "harness"), "--log_samples"),
        ],
        env=environment | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    # It exits with 0 after an error, too.
    written = list((tmp_path / "harness").rglob("*_results.json"))
    assert done.returncode == 0 and len(written) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(written[0].read_text())["results"]["longtimescope_here"]
    theirs = next(v for k, v in found.items() if k.startswith("timescope_perception_score,"))

    config = keys.default("longtimescope")
    config.data_dir, config.weights, config.batch = str(folder), str(weights), 4
    config.mesh.tensor = 2
    config.mesh.data = 4
    for key, value in sizes.items():
        config[key] = value
    evaluation.evaluate_benchmark(config, str(tmp_path / "ours"))
    results = json.loads((tmp_path / "ours/results.json").read_text())
    ours = results["accuracy"]
    assert ours["n"] == 12 and theirs == pytest.approx(100 * ours["mean"])

    # And reply by reply.
    (path,) = (tmp_path / "harness").rglob("*_samples_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    replies = {row["doc_id"]: row["filtered_resps"] for row in rows}
    lines = (tmp_path / "ours/samples.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        reply = replies[int(row["id"])]
        assert (reply if isinstance(reply, str) else reply[0]) == row["steps"][-1]["answer"]
    assert len(replies) == len(lines) == 12
