"""The notebooks from their sources, the scripts beside them.

    python notebooks/build.py                       writes the .ipynb
    python notebooks/build.py check                 fails if one is not as its source makes it
    python notebooks/build.py run quickstart "PRPO_STEPS=2" --out=runs/notebooks

"run" runs a notebook from top to bottom with the values of its first cell (tagged "parameters")
changed, fails if it does not show what it promises, and leaves it with its outputs in --out.
"""

import argparse
import pathlib
import sys
import time

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
NAMES = ("quickstart", "prpo_colab_tpu", "evaluate")
# What a notebook's outputs hold, and how often at least: curves, pages, frames of videos, results.
_PROMISED = {
    "quickstart": {
        "<polyline": 5,
        "data:image/jpeg": 20,
        "<iframe": 4,
        "memory:": 6,
        "accuracy on unseen videos": 1,
    },
    "prpo_colab_tpu": {
        "<polyline": 4,
        "data:image/jpeg": 20,
        "<iframe": 4,
        "memory:": 8,
        "model.safetensors": 1,
    },
    "evaluate": {"<iframe": 1, "image/png": 2, "McNemar": 1, "clip 4:": 1},
}
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def make(name: str) -> nbformat.NotebookNode:
    """The notebook of a source; the same one each time."""
    made = jupytext.read(FOLDER / f"{name}.py")
    for i, cell in enumerate(made.cells):
        cell.id = f"cell-{i}"
    metadata = {"kernelspec": _KERNEL, "colab": {"name": f"{name}.ipynb"}}
    if name.endswith("tpu"):
        metadata |= {"accelerator": "TPU", "colab": metadata["colab"] | {"gpuType": "V5E1"}}
    made.metadata = metadata
    nbformat.validate(made)
    return made


def text(name: str) -> str:
    """The notebook's file."""
    return nbformat.writes(make(name), version=4, indent=1) + "\n"


def run(name: str, changes: list[str], out: pathlib.Path) -> pathlib.Path:
    """Runs a notebook; nbclient's error, which names cell and line, if one of its cells fails."""
    from nbclient import NotebookClient

    notebook = make(name)
    at = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ()))
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(changes)))
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    try:
        NotebookClient(
            notebook, timeout=1200, resources={"metadata": {"path": str(FOLDER.parent)}}
        ).execute()
    finally:
        nbformat.write(notebook, out / f"{name}.ipynb")
    shown = "\n".join(str(cell.outputs) for cell in notebook.cells if cell.cell_type == "code")
    for what, least in _PROMISED[name].items():
        if shown.count(what) < least:
            sys.exit(f"{name}: {what!r} {shown.count(what)} times in the outputs, not {least}")
    print(f"{name}: {len(notebook.cells)} cells in {time.perf_counter() - began:.0f} s")
    return out / f"{name}.ipynb"


def main() -> None:
    """Reads the command line and does what it says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", default="write", choices=("write", "check", "run"))
    parser.add_argument("name", nargs="?", choices=NAMES, help="of the notebook to run")
    parser.add_argument("changes", nargs="*", help="lines for its parameters, such as STEPS=2")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/notebooks"))
    given = parser.parse_args()
    if given.what == "run":
        print(run(given.name or parser.error("which notebook?"), given.changes, given.out))
        return
    old = [n for n in NAMES if _stored(n) != text(n)]
    if given.what == "write":
        for name in old:
            (FOLDER / f"{name}.ipynb").write_text(text(name))
    elif old:
        print(f"{', '.join(old)}: not as its source makes it; run make notebooks", file=sys.stderr)
        sys.exit(1)
    print(
        f"{len(NAMES)} notebooks, {len(old)} of them new" if old else "notebooks: as their sources"
    )


def _stored(name: str) -> str:
    path = FOLDER / f"{name}.ipynb"
    return path.read_text() if path.is_file() else ""


if __name__ == "__main__":
    main()
