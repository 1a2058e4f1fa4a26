"""What transformers makes of a scene; needs torch."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from einops import rearrange

from tests.models.scenes import STEPS, Scene
from videomem_jax.models import convert
from videomem_jax.models.qwen3_vl import Qwen3VL


def pixels(scene: Scene, video: bool | None, row: int | None = None):
    """Patches of the images, or videos, or (None) both, as transformers takes them; their grids."""
    most, parts, grids = max(map(len, scene.pieces)), [], []
    for n, pieces in enumerate(scene.pieces):
        for i, piece in enumerate(pieces):
            if (row is None or n == row) and video in (None, piece.video):
                area = piece.grid[0] * piece.grid[1]
                patches = scene.patches[n * most + i, : piece.pairs, :area]
                parts.append(rearrange(patches, "f q e -> (f q) e"))
                grids.append([piece.pairs, *piece.grid])
    if not parts:
        return None
    values = np.concatenate(parts).astype(np.float32) / 127.5 - 1
    return torch.tensor(values), torch.tensor(grids)


def inputs(scene: Scene, row: int | None = None) -> dict[str, torch.Tensor]:
    """Keyword arguments of their forward; of one row without its padding if `row` is given."""
    part = np.s_[:] if row is None else np.s_[row : row + 1, : scene.mask[row].sum()]
    given = {
        "input_ids": torch.tensor(scene.tokens[part]).long(),
        "attention_mask": torch.tensor(scene.mask[part]).long(),
    }
    if scene.config.vision is None:
        return given
    given["mm_token_type_ids"] = torch.tensor(scene.kinds[part]).int()
    for video, values, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        if (found := pixels(scene, video, row)) is not None:
            given[values], given[grid] = found
    return given


def theirs(model: Qwen3VL, scene: Scene, folder) -> dict[str, np.ndarray]:
    """The outputs of `scenes.ours`, by transformers, which loads the weights from `folder`."""
    convert.save_pretrained(model, folder)
    kind = transformers.Qwen3VLForConditionalGeneration
    if scene.config.vision is None:
        kind = transformers.AutoModelForCausalLM
    reference = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    given, mask = inputs(scene), torch.tensor(scene.mask)
    out = {}
    if scene.config.vision is not None:
        grids = {key: given[key] for key in ("image_grid_thw", "video_grid_thw") if key in given}
        positions, _ = reference.model.get_rope_index(
            given["input_ids"],
            given["mm_token_type_ids"],
            attention_mask=given["attention_mask"],
            **grids,
        )
        out["positions"] = (positions * mask).numpy().astype(np.int32)
    if any(scene.pieces):
        with torch.no_grad():
            seen = reference.model.visual(*pixels(scene, None))
        out["features"] = seen.pooler_output
        out |= {f"deepstack.{i}": part for i, part in enumerate(seen.deepstack_features)}

    logits = reference(**given).logits
    out["logits"] = logits[mask]
    counted = scene.mask[:, 1:] & (scene.slot[:, 1:] < 0)
    wanted = torch.tensor(np.where(counted, scene.tokens[:, 1:], -100)).long()
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), wanted, ignore_index=-100, reduction="sum"
    )
    loss.backward()
    named = dict(reference.named_parameters())
    out |= {"loss": loss} | {f"grad.{name}": named[name].grad for name in scene.weights}

    rows = []
    for row in range(len(scene.tokens)):
        one = inputs(scene, row)
        with torch.no_grad():
            ids = reference.generate(**one, max_new_tokens=STEPS, do_sample=False)
        rows.append(ids[0, one["input_ids"].shape[1] :].numpy().astype(np.int32))
    out["greedy"] = np.stack(rows)
    numpy = lambda a: a.detach().numpy() if isinstance(a, torch.Tensor) else a  # noqa: E731
    return {key: np.asarray(numpy(value)) for key, value in out.items()}
