"""Data sets of the ablations beside those of the demo, in the same folder.

    python -m benchmarks.ablations.data --folder=runs/ablations/needle --videos=50

* `ordinary.jsonl`: the training questions and answers without chains of memory, for models that see
  a whole video at once;
* `clips<N>_cards<M>.jsonl` and their videos: test questions about videos of N clips of 16 s with
  about M cards in all (`GRID`). At two cards a clip there would be too few pictures beyond ten
  clips; with the number of cards fixed, a longer video has more film between them.
"""

from __future__ import annotations

import dataclasses
import pathlib

from videomem_jax import command_line
from videomem_jax.data import needle, records

# Clips and cards: longer videos of equally many cards, then more cards in equally long videos.
LENGTHS, CARDS = (4, 8, 16, 32), (8, 12, 16, 20)
FEW, CLIPS = CARDS[0], 8
GRID = (*((clips, FEW) for clips in LENGTHS), *((CLIPS, cards) for cards in CARDS[1:]))


def name(clips: int, cards: int) -> str:
    """Of a data set."""
    return f"clips{clips}_cards{cards}"


def make(folder: pathlib.Path, videos: int) -> None:
    """Writes all data sets; what is there is kept.

    Args:
      folder: with the demo's data, of which `train.jsonl` is read.
      videos: of each set of test questions.

    Raises:
      RecordError: there is no `train.jsonl`.
    """
    train, _ = records.read_records(folder / "train.jsonl")
    empty = (dataclasses.replace(record, memories=("",)) for record in train)
    records.write_records(folder / "ordinary.jsonl", empty)
    splits = {
        name(clips, cards): needle.SplitSpec(
            videos, 4, segments=clips, part="test", seed=100 + number, cards=cards
        )
        for number, (clips, cards) in enumerate(GRID)
    }
    needle.build(folder, splits)


def main() -> None:
    parser = command_line.parser_of("benchmarks.ablations.data", __doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="of the demo's data")
    parser.add_argument("--videos", type=int, default=50, help="of each set")
    flags = parser.parse_args()
    command_line.entry(lambda: make(flags.folder, flags.videos))


if __name__ == "__main__":
    main()
