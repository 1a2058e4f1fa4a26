"""The paper's tables in small: what each part of the method is worth, on the demo's task.

    python -m benchmarks.ablations                      # all of them, 3 seeds: many hours
    python -m benchmarks.ablations --quick              # the same with next to no training: minutes
    python -m benchmarks.ablations --jobs 2             # two runs at once, logs in runs/ablations
    python -m benchmarks.ablations --only components    # one table; several with commas
    python -m benchmarks.ablations --write              # only the page, of what there is

Every run is the ordinary train.py and eval.py with configs/demo.py in a folder of its own below
--folder. It is skipped where it is finished and goes on where it was stopped, so that the same
command can be given again at any time. At the end all summaries become one page with its plots,
which says what is missing: docs/RESULTS.md, or FOLDER/RESULTS.md with --quick, whose numbers mean
nothing. With --out=FILE it is written elsewhere.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from benchmarks.ablations import page
from benchmarks.ablations.runs import Runs, Stopped, work
from benchmarks.ablations.variants import QUICK, TABLES, WHOLE
from videomem_jax import command_line, hosts


def tables(text: str) -> list[str]:
    """Keys of tables, in order; for argparse."""
    chosen = text.split(",")
    if unknown := [key for key in chosen if key not in TABLES]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is no table; there are {', '.join(TABLES)}"
        )
    return [key for key in TABLES if key in chosen]


def jobs(text: str) -> int:
    """A positive number; for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of runs, such as 2")
    return int(text)


def main() -> None:
    parser = command_line.parser_of("benchmarks.ablations", __doc__)
    parser.add_argument("--folder", help="of all runs (runs/ablations, or runs/ablations-quick)")
    parser.add_argument("--quick", action="store_true", help="tiny runs, one seed")
    parser.add_argument("--only", type=tables, default=list(TABLES), help=", ".join(TABLES))
    parser.add_argument("--seeds", type=int, help="how many (3, or 1 with --quick)")
    parser.add_argument("--jobs", type=jobs, default=1, help="runs at once, each on its cores (1)")
    parser.add_argument("--write", action="store_true", help="train nothing, write the page")
    parser.add_argument("--out", type=pathlib.Path, help="the page")
    flags = parser.parse_args()
    seeds = flags.seeds or (1 if flags.quick else 3)
    folder = pathlib.Path(flags.folder or f"runs/ablations{'-quick' * flags.quick}")
    runs = Runs(folder, QUICK if flags.quick else WHOLE, seeds)
    out = flags.out or (folder / "RESULTS.md" if flags.quick else pathlib.Path("docs/RESULTS.md"))
    failed = []
    if not flags.write:
        try:
            failed = work(runs, flags.only, flags.jobs)
        except Stopped as stop:
            print(stop)
            sys.exit(hosts.EXIT_STOPPED)
    missing = page.write(runs, out, quick=flags.quick)
    print(f"results: {os.path.relpath(out)}{f'; {missing}' if missing else ''}")
    for sentence in failed:
        print(f"error: {sentence}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
