"""Commands as processes of their own, and what they leave."""

import concurrent.futures
import contextlib
import json
import pathlib
import re
import socket
import subprocess
import sys
import time

from videomem_jax import metrics

ROOT = pathlib.Path(__file__).parents[1]
DEMO = "--config=configs/demo.py"


def start(script, *args, environment):
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, script, *map(str, args)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process, limit=300):
    """Its exit code, and what it wrote."""
    try:
        out, err = process.communicate(timeout=limit)
    finally:
        process.kill()
    return process.returncode, out, err


# A process that has imported everything, and is copied for each command: what a command does is
# what it does when started by itself, without the seconds of importing.
SERVER = """
import gc, json, os, runpy, sys, traceback
import grain, jax, matplotlib.pyplot, optax, orbax.checkpoint, tqdm
from ml_collections import config_flags
from videomem_jax import evaluate, report, run, trainer
gc.collect()
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(job["env"])
        sys.argv = job["argv"]
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without a second spent on taking the copy down
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def copies(environment, folder):
    """Gives a function that runs a command in a copy of one process; what it writes is in `folder`.

    `call(script, *arguments, **variables)` returns its exit code and what it wrote.
    """
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def call(script, *args, **env):
        job = {"argv": [*map(str, (script, *args))], "env": {"JAX_LOG_COMPILES": "1"} | env}
        job |= {name: str(folder / name) for name in ("out", "err")}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return code, (folder / "out").read_text(), (folder / "err").read_text()

    yield call
    server.stdin.close()
    server.wait(30)


def numbers(workdir):
    """Everything in the metrics but the times, by phase and step; each once."""
    found = {}
    for row in metrics.read(workdir / "metrics.jsonl"):
        place = row["phase"], row["step"]
        assert place not in found
        found[place] = {k: v for k, v in row.items() if k != "time" and "seconds" not in k}
    return found


def results_of(folder):
    """The results of a benchmark's evaluation."""
    return json.loads((folder / "results.json").read_text())


def samples_of(folder):
    """Its answers, in the order in which they were read."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def timeless(results):
    """All of its results that do not depend on when and how fast they were computed."""
    kept = {k: v for k, v in results.items() if k not in ("seconds", "peak_rss_gb", "config")}
    return json.loads(json.dumps(kept))


def done(workdir):
    """Which steps have their row."""
    with contextlib.suppress(FileNotFoundError):
        return {(row["phase"], row["step"]) for row in metrics.read(workdir / "metrics.jsonl")}
    return set()


def until(workdir, phase, step, *processes):
    """Waits for a step's row, or for the end of a process."""
    deadline = time.monotonic() + 300
    while (phase, step) not in done(workdir) and all(p.poll() is None for p in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start_pair(script, *args, environment, devices=2):
    """The command as two processes of some CPU devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = environment.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    return [
        start(
            script,
            *args,
            environment=environment
            | {
                "XLA_FLAGS": flags,
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
            },
        )
        for i in range(2)
    ]


def finish_pair(pair, limit=300):
    """The exit codes of two processes, and what each wrote; without what Gloo tells itself."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ends = list(pool.map(lambda process: finish(process, limit), pair))
    codes, outs, errs = zip(*ends, strict=True)
    # Its threads write there at once and piece by piece: a line may have lost its beginning, and
    # the number at a line's end may stand by itself. Nothing of ours is a bare number.
    told = r"^.*(\[Gloo\]|peer ranks).*\n+|^[ \d]*\n"
    return codes, [re.sub(told, "", out, flags=re.M) for out in outs], errs
