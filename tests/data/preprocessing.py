"""The inputs on which preprocessing is compared, and what transformers makes of them."""

from typing import NamedTuple

import numpy as np

FPS = 5.0
# (frames, frames a second, frames asked for)
VIDEOS = [
    (total, fps, asked)
    for total in (1, 3, 4, 9, 100, 749, 5000, 90_000)
    for fps in (1.0, 23.976, 29.97, 60.0)
    for asked in (None, 1, 2, 16, 33)
    if asked is None or asked <= total
]
# Height, width, frames, and most pixels a frame.
SIZES = [
    (height, width, frames, tokens * 32 * 32)
    for height, width in ((32, 32), (47, 33), (90, 120), (192, 320), (1080, 1920), (2160, 999))
    for frames in (2, 8, 32)
    for tokens in (4, 16, 128, 768)
]


class Asked(NamedTuple):
    """A question about a video of `count` frames, of which `indices` are taken."""

    question: str
    options: tuple[str, ...]
    size: tuple[int, int]
    count: int
    indices: tuple[int, ...]
    max_pixels: int


ASKED = (
    Asked("Who opens the door?", ("the cat.", "No one"), (70, 100), 40, (0, 13, 26, 39), 8 * 1024),
    Asked(
        "Что дальше? 接下来\n呢", ("A. (1)", "\u00fc 7"), (100, 61), 21, (0, 3, 20, 20), 4 * 1024
    ),
    Asked("How many are there?", (), (64, 64), 4, (1, 2), 16 * 1024),
)


def frames_of(asked: Asked) -> np.ndarray:
    """Frames [count, h, w, 3] of waves, edges and noise; the same anywhere."""
    rng, (height, width) = np.random.RandomState(asked.count), asked.size
    y, x = np.mgrid[:height, :width]
    frames = []
    for i in range(asked.count):
        wave = 100 + 60 * np.sin((x + 3 * i) / 7.0) + 40 * np.cos(y / (4.0 + i % 5))
        frame = np.stack([wave, wave[::-1], 255 * ((x + y + 5 * i) // 16 % 2)], -1)
        frame[: height // 4] += rng.randint(-60, 60, (height // 4, width, 3))
        frames.append(np.clip(frame, 0, 255).astype(np.uint8))
    return np.stack(frames)


def text_of(asked: Asked) -> str:
    """The user's turn up to the video."""
    lettered = "".join(f"{letter}. {o}\n" for letter, o in zip("ABCD", asked.options, strict=False))
    return f"<|im_start|>user\n{asked.question}\n{lettered}"


def theirs(tokenizer_folder) -> dict[str, np.ndarray]:
    """What transformers makes of all inputs; needs torch and torchvision.

    Keys: indices (joined), sizes, and of each question tokens.i, grid.i, patches.i (0..255).
    """
    import torch
    import transformers
    from transformers.models.qwen3_vl import video_processing_qwen3_vl as processing
    from transformers.video_utils import VideoMetadata

    video = processing.Qwen3VLVideoProcessor(cap_pixels_per_frame=False)
    found = {}
    indices = []
    for total, fps, asked in VIDEOS:
        metadata = VideoMetadata(total_num_frames=total, fps=fps)
        indices.append(video.sample_frames(metadata, num_frames=asked))
    found["indices"] = np.concatenate(indices).astype(np.int32)
    found["sizes"] = np.array(
        [
            processing.smart_resize(
                frames, h, w, factor=32, min_pixels=frames * 4096, max_pixels=frames * most
            )
            for h, w, frames, most in SIZES
        ],
        np.int32,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    image = transformers.Qwen2VLImageProcessor(patch_size=16, merge_size=2)
    processor = transformers.Qwen3VLProcessor(image, tokenizer, video)
    for i, asked in enumerate(ASKED):
        taken = frames_of(asked)[list(asked.indices)]
        number = len(asked.indices)
        out = processor(
            # The placeholder alone: with vision_start and vision_end around it, as chat templates
            # write it, this version of transformers leaves these two around the whole video.
            text=[text_of(asked) + "<|video_pad|>"],
            videos=[torch.tensor(taken).permute(0, 3, 1, 2)],
            video_metadata=[
                VideoMetadata(
                    total_num_frames=asked.count, fps=FPS, frames_indices=list(asked.indices)
                )
            ],
            do_sample_frames=False,
            size={"shortest_edge": number * 4096, "longest_edge": number * asked.max_pixels},
            return_tensors="pt",
        )
        found[f"tokens.{i}"] = out["input_ids"][0].numpy().astype(np.int32)
        found[f"grid.{i}"] = out["video_grid_thw"][0].numpy().astype(np.int32)
        pixels = (out["pixel_values_videos"].numpy() + 1) * 127.5
        found[f"patches.{i}"] = pixels.round().astype(np.uint8)
    return found
