# %% [markdown]
# # videomem_jax: the whole method in small
#
# A vision-language model reads a video clip by clip and writes what matters into a bounded text
# memory. Here a tiny one (Qwen3-VL's architecture with 1.7 million parameters) learns that on a
# film with picture cards in between: first by a cold start on chains of memory, then by PRPO,
# reinforcement learning with a reward at every clip.
#
# It runs on a CPU in about ten minutes, and on a GPU or one TPU chip sooner. Choose *Run all*: no
# cell waits for you, and nothing has to be restarted. A cell that is stopped goes on where it was
# when it is run again.

# %% tags=["parameters"]
# The project's git URL, where this notebook is not in a checkout of it.
REPOSITORY = ""  # @param {type:"string"}
RUN = "quickstart"
VIDEOS, COLDSTART_STEPS, PRPO_STEPS = 160, 150, 30
FLAGS = []  # more flags of train.py, such as "--config.prpo.group_size=4"

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
folder = notebook.folder(RUN)
data = f"--config.data.folder={folder / 'data'}"

# %% [markdown]
# ## The task, and the cold start
#
# The next cell cuts stretches of the film into videos of four clips, with cards in between, and
# asks about them: what was on the red card, which came first, which came right after another, how
# many there were of a colour. Then it trains the shipped base model, which can describe a clip
# and tell what a question is about but knows no memory, on chains of memory: texts of which a
# clip's is right if it holds some of the cards so far. What a question needs is not in them.

# %%
TRAIN = ["train.py", "--config=configs/demo.py", data, "--config.checkpoints.every=10", *FLAGS]
TRAIN += [f"--config.data.train_videos={VIDEOS}", f"--config.data.test_videos={VIDEOS // 8}"]
TRAIN += ["--config.data.test_long="]

coldstart = folder / "coldstart"
notebook.run(
    *TRAIN,
    f"--workdir={coldstart}",
    f"--config.coldstart.steps={COLDSTART_STEPS}",
    "--config.prpo.steps=0",
    curves=("loss", "grad_norm"),
)

# %% [markdown]
# ## A memory being written
#
# The model reads a video that it has not seen. After each clip it writes a new memory: green
# words are new in it, struck ones it has dropped. Frames with a card are those that it can use.

# %%
import json

with open(folder / "data" / "test.jsonl") as file:
    questions = [json.loads(line) for line in file]
question = next(q for q in questions if q["category"] == "colour")


def ask(weights):
    video = folder / "data" / question["video"]
    notebook.ask(video, question["question"], question["options"], weights)
    print("right:", question["options"]["ABCD".index(question["answer"])])


ask(coldstart / "coldstart_model")

# %% [markdown]
# ## PRPO
#
# For each question and clip, from one memory, the model writes eight completions. Each is
# rewarded for the right answer, for the format, and for a memory no longer than it need be; the
# better ones become more likely, and one of them hands its memory on to the next clip. The curves
# are drawn as the numbers come.

# %%
prpo = folder / "prpo"
PRPO = [
    *TRAIN,
    f"--workdir={prpo}",
    f"--config.model.weights={coldstart / 'coldstart_model'}",
    "--config.coldstart.steps=0",
    f"--config.prpo.steps={PRPO_STEPS}",
]

notebook.run(*PRPO, curves=("reward", "accuracy/segment_4", "memory_tokens"))

# %% [markdown]
# The same question again. A run of this length shows how it goes, not how far: `make demo` is the
# same with 120 and 280 steps.

# %%
ask(prpo / "model")

# %% [markdown]
# ## Evaluation
#
# On videos that were not trained on, beside the model before PRPO and the same model without
# video.

# %%
notebook.run("eval.py", *PRPO[1:])
notebook.page(prpo / "report.html")

# %% [markdown]
# ## Your own video
#
# The button takes a video from your machine; until then the next cell asks about the film. Write
# a question and options, and run it again. So small a model knows cards and colours, not your
# holidays: for those, take a Qwen3-VL (`prpo_colab_tpu.ipynb`).

# %%
notebook.upload(folder / "uploads")

# %%
QUESTION = "Which card came first?"  # @param {type:"string"}
OPTIONS = "cat, boat, star, apple"  # @param {type:"string"}

video = notebook.newest(folder / "uploads", "videomem_jax/assets/film/bbb_320x192_1fps.mp4")
notebook.ask(video, QUESTION, [text.strip() for text in OPTIONS.split(",")], prpo / "model")
