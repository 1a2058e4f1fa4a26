# %% [markdown]
# # Looking at an evaluation
#
# What `eval.py` leaves of a benchmark, offline: tables and figures, single questions with all
# their memories, and two runs compared question by question. It computes nothing that needs an
# accelerator. Write the folders of two runs below; with none, a small example is made.

# %% tags=["parameters"]
# The project's git URL, where this notebook is not in a checkout of it.
REPOSITORY = ""  # @param {type:"string"}
RUN_A = ""  # @param {type:"string"}  a folder with results.json, such as runs/videomme/base
RUN_B = ""  # @param {type:"string"}  another, of the same benchmark
RUN, QUESTIONS = "evaluate", 64  # of the example

# %%
import os
import pathlib
import subprocess
import sys

here = pathlib.Path.cwd()
root = next((p for p in (here, *here.parents) if (p / "train.py").is_file()), here / "videomem_jax")
if not root.is_dir():
    if not REPOSITORY:
        raise SystemExit("REPOSITORY is empty: write the project's git URL into the first cell")
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, root], check=True)
os.chdir(root)
sys.path.insert(0, str(root))

from videomem_jax import notebook

notebook.install()

# %% [markdown]
# ## The example
#
# The shipped base model on the embedded task: with video, and with grey frames in its place. Any
# JSONL file of records is a benchmark like this one (`configs/eval.py:records`); so are
# Video-MME, LongVideoBench, MLVU, LVBench and LongTimeScope as they lie on disk.

# %%
if not RUN_A:
    folder = notebook.folder(RUN)
    RUN_A, RUN_B = folder / "grey", folder / "video"
    notebook.run(
        "-c",
        "from videomem_jax.data import needle; "
        f"test = needle.SplitSpec({max(QUESTIONS // 4, 1)}, 4, segments=4, part='test', seed=3); "
        f"needle.build({str(folder / 'data')!r}, {{'test': test}})",
    )
    for run, video in ((RUN_A, False), (RUN_B, True)):
        notebook.run(
            "eval.py",
            "--config=configs/eval.py:records",
            f"--config.data_dir={folder / 'data' / 'test.jsonl'}",
            "--config.weights=videomem_jax/assets/tiny_base",
            "--config.frames=8",
            f"--config.max_pixels={6 * 32 * 32}",
            "--config.slots=10",
            "--config.answer=text",
            "--config.batch=16",
            f"--config.video={video}",
            f"--workdir={run}",
        )

# %% [markdown]
# ## Tables, figures, timelines
#
# The page that `eval.py` wrote: accuracy with 95% intervals, after each clip and by kind of
# question, and questions in full.

# %%
notebook.page(pathlib.Path(RUN_B) / "report.html", 900)

# %% [markdown]
# ## Single questions
#
# Those answered wrong, or right, of a kind or of all; change the numbers and run the cell again.

# %%
KIND, WRONG, FIRST, COUNT = "", True, 0, 2

for number in range(FIRST, FIRST + COUNT):
    notebook.picture(RUN_B, kind=KIND, wrong=WRONG, number=number)

# %% [markdown]
# ## Two runs
#
# Their difference on the questions that both were asked, with its interval, and McNemar's exact
# test.

# %%
notebook.run("-m", "videomem_jax.compare", RUN_A, RUN_B)

# %% [markdown]
# ## Your own numbers
#
# `samples.jsonl` has a line a question, with every memory and provisional answer. Here: how long
# memories are after each clip, and how often an answer was changed for the better or the worse.

# %%
import json
import statistics

with open(pathlib.Path(RUN_B) / "samples.jsonl") as file:
    rows = [json.loads(line) for line in file]
for t in range(len(rows[0]["steps"])):
    tokens = statistics.mean(row["steps"][t]["tokens"] for row in rows)
    before = [t and row["steps"][t - 1]["answer"] == row["gold"] for row in rows]
    after = [row["steps"][t]["answer"] == row["gold"] for row in rows]
    better = sum(b > a for a, b in zip(before, after, strict=True)) if t else 0
    worse = sum(b < a for a, b in zip(before, after, strict=True))
    print(f"clip {t + 1}: {tokens:5.1f} tokens, {better:3d} better, {worse:3d} worse")
