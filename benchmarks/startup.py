"""How long a training takes from its command to its first step, with and without compiled programs.

    python -m benchmarks.startup --data=runs/needle        # the demo's two phases, about 4 minutes

starts `train.py --config=configs/demo.py` in a folder of its own, waits until the first step stands
in metrics.jsonl, and stops it: first without any compiled program (cold), then with those that the
first start left (warm). Cold start and PRPO are started each by themselves. Data is made beforehand
if it is not there, and how long that takes is said; a start finds it made, as every start but the
first does. Beside the seconds: those for imports alone, and for compiling as train.py tells them.
"""

import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from videomem_jax import command_line

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = "configs/demo.py"
PHASES = {"cold start": {"prpo.steps": 0}, "PRPO": {"coldstart.steps": 0}}
BARS = {"cold": 40.0, "warm": 15.0}
_COMPILED = re.compile(r"programs? compiled in ([\d.]+) s")
_LIMIT = 600.0  # seconds that a start may take


class StartError(RuntimeError):
    """A training ended before its first step; the message says how."""


def command(workdir: pathlib.Path, **changes) -> list[str]:
    """What starts a training."""
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return [sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}", *flags]


def first_step(workdir: pathlib.Path, **changes) -> tuple[float, float]:
    """Seconds to the first step of a training, which then stops, and those spent on compiling.

    Raises:
      StartError: it ended, or did not get there in ten minutes.
    """
    rows, log = workdir / "metrics.jsonl", workdir.with_suffix(".log")
    began = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            command(workdir, **changes), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            while not (rows.exists() and rows.read_text().endswith("\n")):
                if process.poll() is not None or time.perf_counter() - began > _LIMIT:
                    raise StartError(f"no first step: {log.read_text()[-500:]}")
                time.sleep(0.02)
            seconds = time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    return seconds, sum(map(float, _COMPILED.findall(log.read_text())))


def imports() -> float:
    """Seconds for Python and all that train.py imports."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import train"], cwd=ROOT, check=True)
    return time.perf_counter() - began


def made(data: pathlib.Path, folder: pathlib.Path) -> float | None:
    """Makes the data; the seconds to the first step with it, or None if it was there."""
    if (data / "train.jsonl").exists():
        return None
    changes = {"data.folder": data, "runtime.compiled": folder / "first"}
    return first_step(folder / "data", **PHASES["cold start"], **changes)[0]


def main() -> None:
    """Measures and prints the table."""
    parser = command_line.parser_of("benchmarks.startup", __doc__)
    parser.add_argument(
        "--data", type=pathlib.Path, required=True, help="the demo's, made if need be"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each start (3)")
    flags = parser.parse_args()
    data = flags.data.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        first = made(data, folder)
        if first:
            print(f"the very first start, which makes the data: {first:.1f} s")
        print(f"imports: {statistics.median(imports() for _ in range(flags.repeats)):.1f} s")
        print(f"{'':12} {'':6} {'seconds':>8} {'bar':>6} {'compiling':>10}")
        for phase, changes in PHASES.items():
            found = {"cold": [], "warm": []}
            for repeat in range(flags.repeats):
                compiled = folder / f"compiled-{phase}-{repeat}"
                for kind, seen in found.items():
                    place = folder / f"{phase}-{kind}-{repeat}"
                    how = {"data.folder": data, "runtime.compiled": compiled} | changes
                    seen.append(first_step(place, **how))
            for kind, seen in found.items():
                seconds, compiling = (statistics.median(part) for part in zip(*seen, strict=True))
                print(f"{phase:12} {kind:6} {seconds:8.1f} {BARS[kind]:6.0f} {compiling:10.1f}")


if __name__ == "__main__":
    command_line.entry(main)
