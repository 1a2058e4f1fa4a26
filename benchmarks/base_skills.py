"""What a tiny base model sees and knows: captions of unseen clips, questions about texts and clips.

    python -m benchmarks.base_skills                     # the base that is shipped
    python -m benchmarks.base_skills --model FOLDER

Captions are of the clips of the demo's validation videos, whose film and handwriting no training
saw. Every figure is the share of what the model would write itself that is right: of words, given
the right ones before them; of captions and answers, whole. Takes about a minute.
"""

import argparse
import collections
import itertools
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from videomem_jax import run
from videomem_jax.data import needle, records, video
from videomem_jax.data.needle_video import CLIP_SECONDS, COLOURS, DIGITS
from videomem_jax.models import convert
from videomem_jax.pretrain import __main__ as pretrain
from videomem_jax.pretrain import scenes, tasks
from videomem_jax.tokenizer import Tokenizer

BATCH, TEXTS = 50, 1500
VIDEOS = needle.SplitSpec(videos=100, questions_per_video=1, segments=4, part="val", seed=9)


def captions(tokenizer: Tokenizer, folder: pathlib.Path) -> Iterator[tuple[tuple, dict]]:
    """A row for each clip of unseen videos, with its caption's words."""
    needle.build(folder, {"val": VIDEOS})
    frames = pretrain.FRAMES["clip"]
    for record in records.read_records(folder / "val.jsonl")[0]:
        for clip in range(VIDEOS.segments):
            cards = [
                (card["colour"], card["picture"])
                for card in record.meta["cards"]
                if card["segment"] == clip
            ]
            step = CLIP_SECONDS / frames
            times = clip * CLIP_SECONDS + step * (np.arange(frames) + 0.5)
            row = pretrain.encode(tokenizer, tasks.of_frames(cards), times, pretrain.CLIP_PREFIX)
            row["patches"] = video.patchify(video.read_frames(record.video, times, pretrain.SIZE))
            yield tuple(itertools.chain.from_iterable(cards)), row


def kind_of(question: str) -> str:
    """What a question asks for."""
    kinds = {"How": "count", "Which picture": "colour", "right after": "after"}
    return next((k for text, k in kinds.items() if text in question), question[16:-1])


def questions(tokenizer: Tokenizer, rng: np.random.Generator) -> Iterator[tuple[tuple, dict]]:
    """A row for each question about a short text, with its kind and how it is to be answered."""
    while True:
        cards = tasks.draw_cards(rng, int(rng.integers(2, 6)))
        question, options, answer, name = tasks.ask(rng, cards) or ("",) * 4
        if not question:
            continue
        kind = kind_of(question)
        how, reply, told = (
            (tasks.ANSWER, "", answer),
            (tasks.TELL_AND_ANSWER, tasks.text(cards), answer),
            (tasks.NAME, name, ""),
        )[int(rng.integers(3))]
        task = tasks.Task(question, options, how, reply, told, notes=tasks.text(cards))
        row = pretrain.encode(tokenizer, task, np.zeros(0), pretrain.TEXT_PREFIX)
        yield (kind, how), row


def pointed(tokenizer: Tokenizer, rng: np.random.Generator) -> Iterator[tuple[tuple, dict]]:
    """A row for each question about notes and an unseen clip: its kind, and where its cards are.

    The reply is to name these cards, which may be in the notes, in the clip, in both or nowhere.
    """
    painter = scenes.Painter(pretrain.SIZE, "val")
    while True:
        shown = tasks.draw_cards(rng, int(rng.integers(0, 4)))
        notes = tasks.draw_cards(rng, int(rng.integers(0, 6 - len(shown))), shown)
        scene = painter.scene(rng, shown, pretrain.FRAMES["clip"])
        task = tasks.point(rng, [*notes, *shown], tasks.text(notes), tasks.Pointing(1.0).absent)
        row = pretrain.encode(tokenizer, tasks.marked(rng, task), scene.times, pretrain.CLIP_PREFIX)
        row["patches"] = scene.patches
        found = set(task.reply.split()[1::2])
        parts = {"notes": notes, "clip": shown}
        where = [name for name, part in parts.items() if found & {p for _, p in part}]
        yield (kind_of(task.question), f"in {' and '.join(where)}" if where else "nowhere"), row


def judged(right, rows) -> Iterator[tuple[tuple, dict, np.ndarray]]:
    """Label, row and which reply tokens are right, of each of the rows."""
    rows = iter(rows)
    while part := tuple(itertools.islice(rows, BATCH)):
        batch = {key: np.stack([row[key] for _, row in part]) for key in part[0][1]}
        for (label, row), good in zip(part, jax.device_get(right(batch)), strict=True):
            yield label, row, good


def table(title: str, shares: dict[str, list[bool]]) -> None:
    """Prints the share of True under each name."""
    print(f"\n{title}")
    for name, found in sorted(shares.items()):
        print(f"  {name:32} {np.mean(found):7.1%}   n={len(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(run.BASE), help="folder of the model")
    folder = parser.parse_args().model
    tokenizer = Tokenizer.load(folder)
    graph, params = nnx.split(convert.load_pretrained(folder))
    replies = jax.jit(lambda params, batch: pretrain.replies(nnx.merge(graph, params), batch)[1])
    right = lambda batch: replies(params, batch)  # noqa: E731

    seen = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        rows = captions(tokenizer, pathlib.Path(place))
        for words, _, good in judged(right, rows):
            seen["whole captions"].append(good.all())
            for word, fine in zip((*words, "end"), good, strict=False):
                kind = "colours" if word in COLOURS else "digits" if word in DIGITS else "emoji"
                seen["ends" if word == "end" else kind].append(fine)
    table("clips of unseen film and handwriting", seen)

    known = collections.defaultdict(list)
    rows = itertools.islice(questions(tokenizer, np.random.default_rng(5)), TEXTS)
    for (kind, how), _, good in judged(right, rows):
        known[f"{kind}: {how}"].append(good.all())
    table("questions about texts of 2 to 5 cards, by what the reply is to be", known)

    found = collections.defaultdict(list)
    rows = itertools.islice(pointed(tokenizer, np.random.default_rng(6)), TEXTS)
    for (kind, where), _, good in judged(right, rows):
        found[f"{kind}: {where}"].append(good.all())
    table("which cards a question is about, by where they are", found)


if __name__ == "__main__":
    main()
