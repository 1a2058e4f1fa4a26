"""Decoding in processes of their own: a video can take so much time and memory, and no more.

A damaged video can make FFmpeg wait, loop, allocate without end or crash. All of that happens in
C, where no exception of Python reaches: FFmpeg asks its interrupt callback only between reads of
some protocols, and a deadline looked at between packets is not looked at inside one. So decoding
runs in a child process that is given

    a time limit   its own alarm, at which the kernel ends it wherever it is
    a size         RLIMIT_DATA, beyond which an allocation fails

and what becomes of it is told as a `VideoError` with its cause. A child is used again for the next
video. It serves whichever thread took it, in grain's workers as in the trainer's own process, and
costs a copy of the frames through a pipe. It ends when its parent does, however that ended.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from videomem_jax.data import video
from videomem_jax.data.sampling import Sample, Wanted, sample
from videomem_jax.data.video import VideoError, VideoInfo

# Seconds by which a child may outlive its alarm: only one that waits for a dead disk does.
_GRACE = 10.0


class Decoder:
    """Reads videos within a limit of time and memory; each call is given as much.

    As many child processes are started as threads read at the same time. They are shared by all
    Decoders of a process.

    Attributes:
      seconds: that reading may take.
      megabytes: of memory that it may take.

    Raises, all of its calls:
      VideoError: the video cannot be read as asked, or not within the limits.
    """

    def __init__(self, seconds: float, megabytes: int):
        self.seconds, self.megabytes = seconds, megabytes

    def read(self, wanted: Wanted) -> Sample:
        """The frames that are asked for, as `sampling.sample` reads them."""
        duration, (times, frames) = self._ask("sample", *wanted)
        return Sample(times, frames, duration)

    def probe(self, path: str | os.PathLike) -> VideoInfo:
        """A video's length and size, as `video.probe` reads them."""
        found, _ = self._ask("probe", os.fspath(path))
        return VideoInfo(*found)

    def times(
        self,
        path: str | os.PathLike,
        segments: int,
        frames: int,
        start: float | None = None,
        end: float | None = None,
        snap: float = 0.0,
    ) -> Float[np.ndarray, "t f"]:
        """Times of frames in seconds, as `video.sample_times` finds them."""
        _, (times,) = self._ask("times", os.fspath(path), segments, frames, start, end, snap)
        return times

    def frames(
        self, path: str | os.PathLike, times: Iterable[float], size: tuple[int, int]
    ) -> UInt8[np.ndarray, "f h w 3"]:
        """The frames at times in seconds, as `video.read_frames` reads them."""
        _, (frames,) = self._ask("frames", os.fspath(path), [float(t) for t in times], size)
        return frames

    def _ask(self, work: str, path: str, *arguments) -> _Answer:
        child = _Child.take(self.megabytes)
        try:
            found = child.ask(work, path, arguments, self.seconds)
        except VideoError as error:
            if child.alive:
                child.put_back()
            raise error
        except BaseException:  # it is in the middle of an answer
            child.end()
            raise
        child.put_back()
        return found


class _Answer(NamedTuple):
    """What a child gives back: what is written as JSON, and arrays."""

    found: Any
    arrays: tuple[np.ndarray, ...]


class _Child:
    """A decoding process and the pipes to it."""

    _idle: collections.defaultdict[int, list[_Child]] = collections.defaultdict(list)
    _lock = threading.Lock()

    def __init__(self, megabytes: int):
        self.megabytes, self.alive = megabytes, True
        root = str(Path(__file__).parents[2])
        paths = filter(None, (root, os.environ.get("PYTHONPATH")))
        # One thread for numpy, which has nothing to do here; each would count as memory.
        few = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "videomem_jax.data.decoder", str(megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | few | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        # Starting is not the first video's time.
        if not self._process.stdout.readline():
            self.end()
            raise VideoError(
                f"the decoder does not start (exit code {self._process.returncode}); what it says "
                f"stands above.",
                "crash",
            )
        self._answers = select.poll()
        self._answers.register(self._process.stdout, select.POLLIN)

    @classmethod
    def take(cls, megabytes: int) -> _Child:
        """A child that is idle, or a new one."""
        with cls._lock:
            while cls._idle[megabytes]:
                child = cls._idle[megabytes].pop()
                if child._process.poll() is None:
                    return child
                child.end()
        return cls(megabytes)

    def put_back(self) -> None:
        """Lets others take it."""
        with self._lock:
            self._idle[self.megabytes].append(self)

    def ask(self, work: str, path: str, arguments: tuple, seconds: float) -> _Answer:
        """Has one of `_WORK` done; after a VideoError it may not be `alive`."""
        asked = json.dumps([seconds, work, path, *arguments]).encode() + b"\n"
        try:
            self._process.stdin.write(asked)
            self._process.stdin.flush()
            if not self._answers.poll(1000 * (seconds + _GRACE)):
                self._kill_without_waiting()
                raise VideoError(f"{path}: {_late(seconds)}", "slow")
            said = self._process.stdout.readline()
            if not said.endswith(b"\n"):
                raise EOFError
            answer = json.loads(said)
            if "sentence" in answer:
                raise VideoError(answer["sentence"], answer["cause"])
            arrays = tuple(np.empty(*about) for about in answer["arrays"])
            for array in arrays:
                _fill(self._process.stdout, array)
            return _Answer(answer["found"], arrays)
        except (EOFError, BrokenPipeError):
            raise self._ended(path, seconds) from None

    def _ended(self, path: str, seconds: float) -> VideoError:
        """Why the process ended by itself."""
        self.end()
        code = self._process.returncode
        if code == -signal.SIGALRM:
            return VideoError(f"{path}: {_late(seconds)}", "slow")
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return VideoError(f"{path}: the decoder crashed on it ({how}).", "crash")

    def end(self) -> None:
        """Ends the process, if it has not ended."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        self._close()

    def _kill_without_waiting(self) -> None:
        """For a process that the kernel cannot end yet."""
        self.alive = False
        self._process.kill()
        self._close()

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:  # what was not sent to a dead process
                continue


# A forked process must not talk into its parent's pipes.
os.register_at_fork(after_in_child=_Child._idle.clear)


def _late(seconds: float) -> str:
    return (
        f"decoding took longer than time_limit={seconds:g} seconds: the video may be broken or "
        f"without end; raise the limit if it is not."
    )


def _fill(pipe: IO[bytes], array: np.ndarray) -> None:
    """Reads an array's bytes; EOFError if they end before."""
    room = memoryview(array).cast("B")
    while len(room):
        count = pipe.readinto(room)
        if not count:
            raise EOFError
        room = room[count:]


def _serve(megabytes: int) -> None:
    """A child's life: a line of JSON for each call in, a line of JSON and the arrays out."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    room = megabytes * 2**20 if hard == resource.RLIM_INFINITY else min(megabytes * 2**20, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (room, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What the parent made of these signals is inherited.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to act upon
    # Nothing that a library prints may get between the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        seconds, work, *arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer, arrays = _answer(work, *arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(json.dumps(answer).encode() + b"\n")
        for array in arrays:
            out.write(memoryview(np.ascontiguousarray(array)).cast("B"))
        out.flush()


def _end_with_parent() -> None:
    """Waits until the other end of the input is closed: nobody wants an answer any more."""
    closed = select.poll()
    closed.register(0, 0)
    closed.poll()
    os._exit(0)


def _sample(*wanted) -> _Answer:
    times, frames, duration = sample(Wanted(*wanted))
    return _Answer(duration, (times, frames))


def _probe(path: str) -> _Answer:
    return _Answer(dataclasses.astuple(video.probe(path)), ())


def _times(path: str, *how) -> _Answer:
    return _Answer(None, (video.sample_times(path, *how),))


def _frames(path: str, times: list[float], size: list[int]) -> _Answer:
    height, width = size
    return _Answer(None, (video.read_frames(path, times, (height, width)),))


_WORK: dict[str, Callable[..., _Answer]] = {
    "sample": _sample,
    "probe": _probe,
    "times": _times,
    "frames": _frames,
}


def _answer(work: str, path: str, *arguments) -> tuple[dict, tuple[np.ndarray, ...]]:
    large = f"{path}: decoding it takes more memory than decoder_mb allows."
    try:
        found, arrays = _WORK[work](path, *arguments)
    except VideoError as error:
        said = large if error.cause == "memory" else str(error)
        return {"sentence": said, "cause": error.cause}, ()
    except MemoryError:
        return {"sentence": large, "cause": "memory"}, ()
    # What a damaged file makes of the decoder's numbers has no end: a rate of 1/0, a size of 0.
    except Exception as error:
        sentence = f"{path}: the video cannot be read ({type(error).__name__}: {error})."
        return {"sentence": " ".join(sentence.split()), "cause": "broken"}, ()
    return {"found": found, "arrays": [(a.shape, a.dtype.name) for a in arrays]}, arrays


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
