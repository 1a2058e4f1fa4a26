"""What the notebooks call: commands of the project in processes of their own, shown as they run.

    notebook.install()
    notebook.run("train.py", "--config=configs/demo.py", "--workdir=runs/demo", curves=("reward",))
    notebook.ask("film.mp4", "Who opens the door?", ["Ann", "Bo"], weights="runs/demo/model")

The notebook itself imports nothing that computes and holds no accelerator, which only one process
may have; what it installs goes into an environment beside it. So nothing has to be restarted.
Stopping a cell stops its command as SIGTERM does: train.py saves, and the same cell goes on.
"""

from __future__ import annotations

import contextlib
import html
import importlib.metadata
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence

_LINES = 14  # of a command's output that are shown
_SECONDS = 1.0  # from one look at a command to the next
_COLOURS = ("#cf5420", "#3b78c9", "#1f8a70", "#7c52b8")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_python = sys.executable


class CommandError(RuntimeError):
    """A command that failed; the message is what it said last."""


# --- what is needed ---


def hardware() -> str:
    """What this machine has: "tpu", "gpu" or "" for neither."""
    if any(pathlib.Path("/dev").glob("accel*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*")):
        return "tpu"
    return "gpu" if shutil.which("nvidia-smi") else ""


def install(root: str | os.PathLike = ".") -> None:
    """Installs the requirements of this machine's hardware, unless they are all there.

    They go into an environment of their own, `root/.venv-notebook`, which is used from then on.
    """
    global _python
    root, kind = pathlib.Path(root).resolve(), hardware()
    wanted = root / (f"requirements-{kind}.txt" if kind else "requirements.txt")
    lacking = missing(wanted)
    if not lacking:
        print(f"everything in {wanted.name} is there")
        return
    folder = root / ".venv-notebook"
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        print(f"installing {wanted.name} into {folder.name}: {', '.join(lacking[:4])} ...")
        _quietly(sys.executable, "-m", "pip", "install", "--quiet", "uv")
        uv = (sys.executable, "-m", "uv")
        _quietly(
            *uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(folder)
        )
        _quietly(*uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(wanted))
        (folder / "installed").touch()
    _python = str(python)
    print(f"commands run in {folder.name}")


def missing(file: pathlib.Path) -> list[str]:
    """Requirements of a file that this process's own environment does not meet."""
    from packaging.requirements import Requirement

    found = []
    for line in file.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            found += missing(file.parent / text[3:].strip())
            continue
        if not text or ((need := Requirement(text)).marker and not need.marker.evaluate()):
            continue
        # What an extra of jax brings, by the package that tells whether it is there.
        plugin = {"tpu": "libtpu", "cuda12": "jax-cuda12-plugin"}
        names = [need.name, *(plugin[extra] for extra in need.extras if extra in plugin)]
        try:
            versions = [importlib.metadata.version(name) for name in names]
        except importlib.metadata.PackageNotFoundError:
            found.append(text)
            continue
        if not need.specifier.contains(versions[0], prereleases=True):
            found.append(text)
    return found


def _environment() -> dict[str, str]:
    """Of a command: without the notebook's own way of drawing, which the command has not got."""
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return kept | {"PYTHONUNBUFFERED": "1"}


def _quietly(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        said = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise CommandError(said.removeprefix("error: "))


def weights(name: str, folder: str | os.PathLike) -> str:
    """The folder of a model of the Hugging Face hub, downloaded if it is not there.

    Args:
      name: on the hub, such as "Qwen/Qwen3-VL-2B-Instruct", or a folder, which is used as it is.
      folder: into which models are downloaded.
    """
    if (pathlib.Path(name) / "config.json").is_file():
        return name
    target = pathlib.Path(folder) / name.rpartition("/")[2]
    code = f"import huggingface_hub as h; h.snapshot_download({name!r}, local_dir={str(target)!r})"
    if not (target / "config.json").is_file() or not any(target.glob("*.safetensors")):
        run("-c", code)
    return str(target)


# --- commands ---


def run(*command: object, curves: Sequence[str] = ()) -> None:
    """Runs a command of the project and shows what it writes while it runs.

    Args:
      command: what follows "python": a script or "-m" and a module, then arguments.
      curves: metrics to draw as they come, of the folder in "--workdir".

    Raises:
      CommandError: it failed.
    """
    words = [_python, *map(str, command)]
    workdir = next((w.partition("=")[2] for w in words if w.startswith("--workdir=")), None)
    process = subprocess.Popen(
        [*_ending_with_notebook(), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(),
        start_new_session=True,  # the notebook's interrupt is not the command's
    )
    output, screen = _Output(process), _Screen()
    try:
        while process.poll() is None:
            screen.show(output.tail(), _curves(workdir, curves))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        output.finish()
        screen.show(output.tail(), _curves(workdir, curves), last=True)
        print("stopped; the same cell goes on from there")
        raise
    output.finish()
    screen.show(output.tail(), _curves(workdir, curves), last=True)
    if process.returncode:
        raise CommandError(output.last() or f"exit code {process.returncode}")


def _ending_with_notebook() -> tuple[str, ...]:
    """What comes before a command for the kernel of Linux to stop it when the notebook ends.

    Else a notebook that is restarted would find the accelerator taken. It is a process that asks
    for this and becomes the command: a notebook has threads, and code between fork and exec could
    wait forever for what one of them held.
    """
    if sys.platform != "linux":
        return ()
    ask = f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)})"
    code = f"import ctypes, os, sys; {ask}; os.execv(sys.argv[1], sys.argv[1:])"
    return (sys.executable, "-I", "-S", "-c", code)


class _Output:
    """What a process writes, as a terminal would show it."""

    def __init__(self, process: subprocess.Popen):
        self._lines, self._lock = [""], threading.Lock()
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (process.stdout, process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: io.BufferedReader) -> None:
        again = False  # a progress bar begins its line anew with what comes after a "\r"
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")
        while piece := text.read(1):
            with self._lock:
                if piece == "\n":
                    self._lines.append("")
                elif piece != "\r":
                    self._lines[-1] = piece if again else self._lines[-1] + piece
                again = piece == "\r"
                del self._lines[: -4 * _LINES]

    def finish(self) -> None:
        """Waits until everything is read."""
        for reader in self._readers:
            reader.join()

    def tail(self) -> str:
        """The last lines."""
        with self._lock:
            return "\n".join([line for line in self._lines if line.strip()][-_LINES:])

    def last(self) -> str:
        """The last line, without the word that marks it as an error."""
        return self.tail().rpartition("\n")[2].removeprefix("error: ")


class _Screen:
    """A place in the notebook that is written over."""

    def __init__(self):
        self._handle, self._shown = None, ""
        if _in_notebook():
            from IPython.display import HTML, display

            self._html = HTML
            self._handle = display(HTML(""), display_id=True)

    def show(self, text: str, drawing: str, last: bool = False) -> None:
        """Writes it over what is there; in a terminal, only what is the last."""
        if self._handle is None:
            if last:
                print(text)
        elif text + drawing != self._shown:
            style = "max-height:22em;overflow:auto;margin:0;font-size:12px;line-height:1.45"
            page = f'<pre style="{style}">{html.escape(text)}</pre>{drawing}'
            self._handle.update(self._html(page))
            self._shown = text + drawing


def _in_notebook() -> bool:
    """Whether this process is a notebook's."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


def _curves(workdir: str | None, names: Sequence[str]) -> str:
    """Metrics of a run so far as small drawings, side by side."""
    if not names or not workdir:
        return ""
    rows = []
    with contextlib.suppress(OSError):
        for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # the line that is just being written
                rows.append(json.loads(line))
    drawn = [_curve(name, rows, _COLOURS[i % 4]) for i, name in enumerate(names)]
    return f'<div style="display:flex;flex-wrap:wrap;gap:16px">{"".join(drawn)}</div>'


def _curve(name: str, rows: Sequence[Mapping], colour: str, width=300, height=110) -> str:
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    if not points:
        return ""
    (first, _), (last, now) = points[0], points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    across = lambda x: 4 + (width - 8) * (x - first) / max(last - first, 1)  # noqa: E731
    up = lambda y: height - 18 - (height - 42) * (y - low) / ((high - low) or 1)  # noqa: E731
    line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
    text = 'font-family="sans-serif" font-size="11" fill="gray"'
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{html.escape(name)}">'
        f'<text x="4" y="12" {text}>{html.escape(name)}: {now:.3g}</text>'
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        f'<circle cx="{across(last):.1f}" cy="{up(now):.1f}" r="3" fill="{colour}"/>'
        f'<text x="4" y="{height - 3}" {text}>step {first}</text>'
        f'<text x="{width - 4}" y="{height - 3}" text-anchor="end" {text}>{last}</text></svg>'
    )


# --- what commands leave ---


def ask(
    video: str | os.PathLike,
    question: str,
    options: Sequence[str] = (),
    weights: str | os.PathLike = "runs/demo/model",
    **flags: object,
) -> None:
    """Asks a model about a video: the memories as they are written, then with their frames.

    Args:
      video: a file.
      question: in words.
      options: to choose from; none for an answer in words.
      weights: folder of the model.
      **flags: of `python -m videomem_jax.ask`, such as `segments="auto"` or `slots=64`.
    """
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    words += ["--options", *options] if options else []
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "answer.html"
        command = ("-m", "videomem_jax.ask", video, question, f"--weights={weights}")
        run(*command, f"--report={report}", *words)
        page(report, 640)


def picture(run_folder: str | os.PathLike, **flags: object) -> None:
    """Shows a question of an evaluation: frames, memories and answers, clip by clip.

    Args:
      run_folder: that eval.py left.
      **flags: of `python -m videomem_jax.picture`, such as `kind="count"` or `wrong=True`.
    """
    words = []
    for name, value in flags.items():
        if value not in (False, None, ""):
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder) / "picture.png"
        _quietly(_python, "-m", "videomem_jax.picture", str(run_folder), f"--out={target}", *words)
        if _in_notebook():
            from IPython.display import Image, display

            display(Image(target.read_bytes(), width=1100))


def page(path: str | os.PathLike, height: int = 720) -> None:
    """Shows a page that a command left; in a terminal, says where it is."""
    if not _in_notebook():
        print(path)
        return
    from IPython.display import display

    text = html.escape(pathlib.Path(path).read_text())
    style = f"width:100%;height:{height}px;border:1px solid #8884;border-radius:6px"
    display({"text/html": f'<iframe srcdoc="{text}" style="{style}"></iframe>'}, raw=True)


def upload(folder: str | os.PathLike) -> None:
    """A button that puts a file into a folder; no cell waits for it."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from ipywidgets import FileUpload
    except ImportError:
        print(f"put your video into {folder.resolve()}")
        return

    def keep(change: Mapping) -> None:
        for file in change["new"]:
            (folder / pathlib.Path(file["name"]).name).write_bytes(bytes(file["content"]))

    from IPython.display import display

    button = FileUpload(accept="video/*", description="your video")
    button.observe(keep, names="value")
    display(button)


def newest(folder: str | os.PathLike, otherwise: str | os.PathLike) -> pathlib.Path:
    """The file that was put into a folder last; `otherwise`, if there is none."""
    files = [path for path in pathlib.Path(folder).glob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime, default=pathlib.Path(otherwise))


def folder(name: str, drive: str | os.PathLike = "/content/drive/MyDrive") -> pathlib.Path:
    """Where a run is kept: on Google Drive where that is mounted, else in `runs/`."""
    drive = pathlib.Path(drive)
    if drive.is_dir():
        place = drive / "videomem_jax" / name
        print(f"the run is kept in {place}")
    else:
        place = pathlib.Path("runs") / name
        print(
            f"the run is kept in {place}, on this machine only. To keep it on Google Drive, mount "
            f"that with the button in the files' panel on the left, and run this cell again."
        )
    place.mkdir(parents=True, exist_ok=True)
    steps = sorted(place.glob("**/checkpoints/*/*"), key=lambda path: path.stat().st_mtime)
    done = [path.parent.name for path in place.glob("**/*model/config.json")]
    if done or steps:
        what = ", ".join(sorted(set(done))) or f"a checkpoint, {steps[-1].relative_to(place)}"
        print(f"found there: {what}; training goes on from it")
    return place
