"""Frames, sizes, patches and prompts held against transformers' Qwen3-VL processor.

Golden outputs serve where it cannot run (it needs torch and torchvision).
"""

import pathlib

import av
import numpy as np
import pytest

from tests.data import preprocessing as pre
from videomem_jax.data import qwen_frames, video
from videomem_jax.prompt import write_prefix

GOLDEN = pathlib.Path(__file__).parent / "golden" / "preprocessing.npz"


@pytest.fixture(scope="module", params=["golden", "live"])
def theirs(request):
    """Their outputs, as they were kept or made now."""
    if request.param == "golden":
        with np.load(GOLDEN) as found:
            return dict(found)
    folder = request.getfixturevalue("qwen_folder")
    try:  # a torchvision that does not fit its torch fails in many ways
        import torchvision  # noqa: F401
    except Exception as error:
        pytest.skip(f"torchvision cannot be used ({error})")
    return pre.theirs(folder)


def test_frame_indices(theirs):
    ours = [qwen_frames.frame_indices(total, fps, frames=asked) for total, fps, asked in pre.VIDEOS]
    np.testing.assert_array_equal(np.concatenate(ours), theirs["indices"])


@pytest.mark.parametrize("total, fps", [(0, 25.0), (10, 0.0)])
def test_no_frames_to_take(total, fps):
    with pytest.raises(ValueError, match="has none to take"):
        qwen_frames.frame_indices(total, fps)


def test_sizes(theirs):
    ours = [video.smart_resize(h, w, max_pixels=most) for h, w, _, most in pre.SIZES]
    np.testing.assert_array_equal(ours, theirs["sizes"])


def write(path, frames):
    """A video file that loses nothing."""
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=int(pre.FPS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("i", range(len(pre.ASKED)))
def test_patches(theirs, tmp_path, i):
    asked = pre.ASKED[i]
    write(tmp_path / "video.mkv", pre.frames_of(asked))
    size = video.smart_resize(*asked.size, max_pixels=asked.max_pixels)
    times = [index / pre.FPS for index in asked.indices]
    patches = video.patchify(video.read_frames(tmp_path / "video.mkv", times, size))
    grid = [len(patches), size[0] // 16, size[1] // 16]
    np.testing.assert_array_equal(grid, theirs[f"grid.{i}"])
    ours, other = patches.reshape(-1, 1536).astype(int), theirs[f"patches.{i}"].astype(int)
    assert ours.shape == other.shape
    assert np.abs(ours - other).max() <= 2
    assert (ours == other).mean() > 0.95


@pytest.mark.parametrize("i", range(len(pre.ASKED)))
def test_prompt_tokens(theirs, qwen, i):
    asked = pre.ASKED[i]
    times = np.array(asked.indices) / pre.FPS
    grid = tuple(map(int, theirs[f"grid.{i}"][1:]))
    prefix = write_prefix(qwen, asked.question, asked.options, times, grid, 1024)
    np.testing.assert_array_equal(prefix.tokens[prefix.mask], theirs[f"tokens.{i}"])
