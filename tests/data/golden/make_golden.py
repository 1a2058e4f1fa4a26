"""Makes the golden outputs of preprocessing: what transformers gives for `preprocessing`'s inputs.

    python -m tests.data.golden.make_golden TOKENIZER_FOLDER

Needs torch, torchvision, transformers and the real Qwen3 tokenizer.
"""

import pathlib
import sys

import numpy as np

from tests.data import preprocessing

if __name__ == "__main__":
    path = pathlib.Path(__file__).parent / "preprocessing.npz"
    np.savez_compressed(path, **preprocessing.theirs(sys.argv[1]))
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")
