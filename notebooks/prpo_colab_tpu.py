# %% [markdown]
# # Qwen3-VL-2B learns to remember, on one TPU chip
#
# Fine-tunes Qwen3-VL-2B with LoRA on a v5e or v6e chip, such as Colab lends: a cold start on
# chains of memory, then PRPO, and the same question about a film before and after.
#
# Choose a TPU runtime (v5e-1 or v6e-1) and *Run all*. No cell waits for you, and nothing has to
# be restarted: what computes are commands in processes of their own, and the notebook leaves the
# chip to them. If the machine goes away, run all again on the next one: downloads and finished
# parts are not repeated where the run is kept on Google Drive, and training goes on from its last
# checkpoint.
#
# To keep it there, mount Drive with the button in the files' panel on the left before you start.

# %% tags=["parameters"]
# The project's git URL, where this notebook is not in a checkout of it.
REPOSITORY = ""  # @param {type:"string"}
MODEL = "Qwen/Qwen3-VL-2B-Instruct"  # @param {type:"string"}  on the Hugging Face hub, or a folder
RUN = "qwen3_vl_2b"  # @param {type:"string"}
COLDSTART_STEPS = 100  # @param {type:"integer"}
PRPO_STEPS = 100  # @param {type:"integer"}
VIDEOS = 200  # @param {type:"integer"}
FLAGS = []  # more flags of train.py, such as "--config.prpo.group_size=4"
ASK = {}  # more flags of videomem_jax.ask, such as {"segments": "auto"}

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

# Finds the run's folder, on Google Drive where that is mounted, and what is in it already.
folder = notebook.folder(RUN)

# %%
notebook.install()
weights = notebook.weights(MODEL, "runs/models")

# %% [markdown]
# ## Before
#
# A question about *Big Buck Bunny* (© 2008 Blender Foundation, CC BY 3.0), which comes with the
# project. The model was never taught to keep a memory; it is held to the format, so that it can
# be asked.

# %%
FILM = "videomem_jax/assets/film/bbb_320x192_1fps.mp4"
QUESTION = "What does the rabbit do to the squirrel in the end?"
OPTIONS = ["lets it go", "flies it like a kite", "feeds it", "runs away from it"]

notebook.ask(FILM, QUESTION, OPTIONS, weights, **ASK)

# %% [markdown]
# ## Training
#
# `configs/prpo_colab.py`: adapters of rank 16, the weights stay as they are; 4 clips of 16
# frames, memories of up to 256 tokens, groups of 8. The data is the embedded task: stretches of
# the film with picture cards in between, and questions about these that need a memory. For your
# own, give `--config.data.task=records --config.data.folder=...` in `FLAGS`.
#
# Compiling takes some minutes in the first run and is kept. Stop the cell at any time: it saves
# first, and goes on when it is run again.

# %%
TRAIN = [
    "train.py",
    "--config=configs/prpo_colab.py",
    f"--workdir={folder / 'run'}",
    f"--config.model.weights={weights}",
    "--config.data.task=needle",
    f"--config.data.folder={root / 'runs' / 'needle_colab'}",
    f"--config.data.train_videos={VIDEOS}",
    f"--config.data.test_videos={max(VIDEOS // 8, 1)}",
    f"--config.coldstart.steps={COLDSTART_STEPS}",
    f"--config.prpo.steps={PRPO_STEPS}",
    "--config.checkpoints.every=10",
    *FLAGS,
]

notebook.run(*TRAIN, curves=("loss", "reward", "accuracy/segment_4", "memory_tokens"))

# %% [markdown]
# ## After
#
# The same question; then the first of the unseen ones of the task, before and after.

# %%
model = folder / "run" / "model"
notebook.ask(FILM, QUESTION, OPTIONS, model, **ASK)

# %%
import json

with open(root / "runs" / "needle_colab" / "test.jsonl") as file:
    first = json.loads(file.readline())
video = root / "runs" / "needle_colab" / first["video"]
for each in (weights, model):
    notebook.ask(video, first["question"], first["options"], each, **ASK)
print("right:", first["options"]["ABCD".index(first["answer"])])

# %% [markdown]
# ## The model
#
# `model` is a Hugging Face folder of whole weights, the adapters added: transformers, vLLM and
# this project read it. Where the run is on Drive, it is there too.

# %%
for path in sorted(model.iterdir()):
    print(f"{path.stat().st_size / 1e6:10.1f} MB  {path}")
