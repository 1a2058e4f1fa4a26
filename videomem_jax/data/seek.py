"""Finding the frame that is on screen at a time, with as little decoding as can be.

Times here are ticks of the stream's time base, as packets and frames state them.
"""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterator, Sequence

import av

# Containers round presentation times (Matroska to a millisecond): a frame counts as shown this
# many seconds before its stamp.
TOLERANCE = 0.002
# How far, in seconds, the last frame may end before the length that the container states.
TAIL = 1.0
# Seconds that are read on rather than jumped in containers that do not list their keyframes.
_NO_INDEX = 10.0
# Frames by which decoding may run ahead of showing (the most that H.264 and HEVC allow).
_REORDER = 16


class VideoError(ValueError):
    """A video that cannot be used as asked; the message is one sentence that names the file.

    Attributes:
      cause: short name to count by: "missing", "broken", "no video", "too short", "shape", "slow",
        "memory" or "crash".
    """

    def __init__(self, sentence: str, cause: str = "broken"):
        super().__init__(sentence)
        self.cause = cause

    def __reduce__(self):
        return type(self), (str(self), self.cause)


def frames_at(
    path: str | os.PathLike, container, stream, times: Sequence[float], fps: float
) -> Iterator[av.VideoFrame]:
    """Yields the decoded frame on screen at each time: the last one with a stamp at or before it.

    Args:
      path: for messages.
      container, stream: of the opened video.
      times: seconds from the video's start, in rising order.
      fps: frames a second, on average.

    Raises:
      VideoError: the frames end before a time, or have no times.
    """
    # AVI has times of decoding only, so its packets do not tell when they are shown.
    if container.format.name != "avi":
        finder = _Finder(container, stream, fps)
        limits = [finder.ticks(time + TOLERANCE) for time in times]
        for i, limit in enumerate(limits):
            frame = finder.at(limit, limits[i + 1] if i + 1 < len(limits) else None)
            if frame is None:
                times = times[i:]
                break
            yield frame
        else:
            return
        stream.codec_context.skip_frame = "DEFAULT"
    yield from scanned(path, container, stream, times, fps)


def snapped(container, stream, times: Sequence[float], room: float, fps: float) -> list[float]:
    """The times, each moved to the nearest keyframe where the container lists one in reach.

    A keyframe is decoded alone, any other frame with all those from its keyframe on.

    Args:
      container, stream: of the opened video.
      times: seconds from the video's start.
      room: seconds by which a time may move.
      fps: frames a second, on average.
    """
    start, second = stream.start_time or 0, 1 / float(stream.time_base)
    # Matroska's list is read at the first jump.
    container.seek(int(start + times[0] * second), stream=stream)
    entries = stream.index_entries
    if not len(entries):
        return list(times)
    # The list tells when keyframes are decoded; they are shown as much later as the first one is.
    start -= max(0, start - entries[0].timestamp)
    found = []
    for time in times:
        at = int(start + time * second)
        places = (entries.search_timestamp(at, backward=backward) for backward in (True, False))
        keys = [(entries[i].timestamp - start) / second for i in places if i >= 0]
        key = min(keys, key=lambda key: abs(key - time), default=time)
        # Half a frame later, so that rounding does not ask for the frame before.
        found.append(key + 0.5 / fps if abs(key - time) + 0.5 / fps <= room else time)
    return found


class _Finder:
    """Goes through a video by its packets, whose times say what to decode before it is decoded.

    Decoding begins at the last keyframe that it can, leaves out on its way what no other frame
    refers to, and ends with the frame that is wanted.
    """

    def __init__(self, container, stream, fps: float):
        self._container, self._stream = container, stream
        self._codec = stream.codec_context
        # Others' decoders (libdav1d) are told when they open, for good, what to leave out.
        self._leaves_out = not self._codec.name.startswith("lib")
        self._second = 1 / float(stream.time_base)
        self._reorder = math.ceil(_REORDER * self._second / fps)
        self._packets: Iterator = iter(())
        self._queue: collections.deque = collections.deque()  # read, not decoded
        self._inside: set[int] = set()  # times of what the decoder holds
        self._ready: dict[int, av.VideoFrame] = {}  # decoded, to be shown later
        self._shown: av.VideoFrame | None = None
        self._fresh = True  # the decoder needs a keyframe
        self._ended = False
        self._silent = False  # there are packets that do not say when they are shown
        self._read = -math.inf  # what is still to be read is shown at or after this
        self._delay = 0  # by which keyframes are decoded before they are shown

    def ticks(self, time: float) -> int:
        """Seconds from the start as ticks."""
        return (self._stream.start_time or 0) + math.floor(time * self._second)

    def at(self, limit: int, then: int | None) -> av.VideoFrame | None:
        """The frame on screen.

        Args:
          limit: when.
          then: when the next one will be asked for, no earlier; None if none will.

        Returns:
          The frame; None where the packets do not tell, or there is none.
        """
        target = math.inf
        if self._jumps(limit):
            target = limit - self._delay
            self._seek(target)
        self._read_to(limit)
        # Containers seek by times of decoding, which run ahead of those of showing, and some to
        # any packet. Then look further back, even before the start.
        back = 0
        while not self._reachable(wanted := self._wanted(limit)):
            if self._silent or target < self.ticks(-TAIL):
                return None
            back += 0 if target == math.inf else back + math.ceil(self._second)
            target = limit - self._delay - back
            self._seek(target)
            self._read_to(limit)
        # Where the last frame should have made room long ago, the file is cut short: see `scanned`.
        if self._silent or (self._ended and wanted + (TAIL + 0.5) * self._second < limit):
            return None
        if self._shown is None or self._shown.pts != wanted:
            self._shown = self._ready.pop(wanted, None)
            if self._shown is None:
                self._decode(wanted, last=then is None or self._jumps(then))
            self._ready = {pts: frame for pts, frame in self._ready.items() if pts > wanted}
        return self._shown

    def _jumps(self, limit: int) -> bool:
        """Whether seeking to `limit` saves reading."""
        entries = self._stream.index_entries
        if not len(entries):
            return limit - self._read > _NO_INDEX * self._second
        index = entries.search_timestamp(int(limit - self._delay))
        return index >= 0 and entries[index].timestamp > self._read

    def _seek(self, target: int) -> None:
        self._container.seek(int(target), stream=self._stream, backward=True)
        self._packets = self._container.demux(self._stream)
        self._queue.clear()
        self._ready.clear()
        self._empty_decoder()
        self._shown, self._ended, self._read = None, False, -math.inf

    def _empty_decoder(self) -> None:
        self._codec.flush_buffers()
        self._inside.clear()
        self._fresh = True

    def _read_to(self, limit: float) -> None:
        """Reads packets until none that follows can be shown at or before `limit`."""
        while not self._ended and self._read <= limit:
            self._read_one()
        # Times of decoding may be guesses. What is shown at or before `limit` has no more frames
        # before it that are shown behind it than the codec reorders.
        depth = self._codec.reorder_depth
        while not self._ended and sum(time > limit for time in self._times()) <= depth:
            self._read_one()

    def _read_one(self) -> None:
        packet = next(self._packets, None)
        if packet is None or not packet.size or packet.pts is None:
            self._silent |= packet is not None and bool(packet.size)
            self._ended = True
            return
        self._queue.append(packet)
        decoded_at = packet.pts - self._reorder if packet.dts is None else packet.dts
        self._read = max(self._read, decoded_at)
        if packet.is_keyframe and packet.dts is not None:
            self._delay = max(self._delay, packet.pts - packet.dts)

    def _times(self) -> set[int]:
        """When what was read, and not yet passed, is shown."""
        times = {packet.pts for packet in self._queue if not packet.is_discard}
        times |= self._inside | self._ready.keys()
        return times if self._shown is None else times | {self._shown.pts}

    def _wanted(self, limit: int) -> int | None:
        """The time of the frame on screen at `limit`; None if it is not among what was read."""
        return max((time for time in self._times() if time <= limit), default=None)

    def _reachable(self, wanted: int | None) -> bool:
        """Whether the wanted frame can be decoded from here."""
        queued = wanted is not None and any(p.pts == wanted for p in self._queue)
        return wanted is not None and not (queued and self._fresh and self._begin(wanted) is None)

    def _begin(self, wanted: int) -> int | None:
        """Place in the queue of the last keyframe from which `wanted` can be decoded."""
        begin = None
        for i, packet in enumerate(self._queue):
            # What is decoded behind a keyframe but shown before it needs frames from before it.
            if packet.is_keyframe and packet.pts <= wanted:
                begin = i
            if packet.pts == wanted:
                return begin
        return None

    def _decode(self, wanted: int, last: bool) -> None:
        """Decodes until the wanted frame is there.

        Args:
          wanted: its time.
          last: whether decoding goes on elsewhere; then the frame need not wait for others.
        """
        begin = self._begin(wanted)
        if begin is not None and (begin or self._fresh):
            for _ in range(begin):
                self._queue.popleft()
            self._empty_decoder()
        given = wanted in self._inside
        # Frames come in the order of showing: behind it, it will not come (a packet may have none).
        while self._shown is None and not any(pts > wanted for pts in self._ready):
            if not self._queue and not self._ended:
                self._read_one()
            packet = self._queue.popleft() if self._queue and not (given and last) else None
            self._feed(packet, wanted)
            given |= packet is not None and packet.pts == wanted
            if packet is None:  # all that the decoder held is out
                self._empty_decoder()
                return

    def _feed(self, packet: av.Packet | None, wanted: int) -> None:
        """Gives the decoder a packet (None: there are no more) and takes the frames it gives."""
        skip = self._leaves_out and packet is not None and packet.pts < wanted
        self._codec.skip_frame = "NONREF" if skip else "DEFAULT"
        if packet is not None and not skip:
            self._inside.add(packet.pts)
        for frame in self._codec.decode(packet):
            self._inside.discard(frame.pts)
            if frame.pts == wanted:
                self._shown = frame
            elif frame.pts is not None and frame.pts > wanted:
                self._ready[frame.pts] = frame
        self._fresh = False


def scanned(
    path: str | os.PathLike, container, stream, times: Sequence[float], fps: float
) -> Iterator[av.VideoFrame]:
    """As `frames_at`, told by decoded frames alone: for packets without times, and for tests."""
    origin = (stream.start_time or 0) * stream.time_base
    frames, shown, ahead = iter(()), None, None

    def stamp(frame) -> float:
        if frame.pts is None:
            raise VideoError(f"{path}: its frames have no times; remux it to .mp4 or .mkv.")
        return float(frame.pts * frame.time_base - origin)

    for time in times:
        limit = time + TOLERANCE
        # `ahead` is None before the first time and behind the last frame.
        if shown is None or (
            ahead is not None and _keyframe_between(stream, stamp(ahead), limit, origin)
        ):
            frames, shown = _seek(container, stream, limit, origin, stamp)
            ahead = next(frames, None)
        while ahead is not None and stamp(ahead) <= limit:
            shown, ahead = ahead, next(frames, None)
        if shown is None or (ahead is None and stamp(shown) + 1 / fps + TAIL < time):
            raise VideoError(
                f"{path}: the video is broken or cut short: its frames end before {time:.2f} s."
            )
        yield shown


def decoded(container, stream) -> Iterator[av.VideoFrame]:
    """The frames from where the container stands, with the times at which they are shown."""
    if container.format.name != "avi":
        yield from container.decode(stream)
        return
    # Frames come out in the order of showing: each takes the place of a packet in turn, but for
    # empty packets, which stand for no frame.
    places = collections.deque()
    for packet in container.demux(stream):
        if packet.size:
            places.append(packet.dts)
        for frame in packet.decode():
            frame.pts = places.popleft() if places else None
            yield frame


def _keyframe_between(stream, position: float, limit: float, origin) -> bool:
    """Whether decoding from a keyframe is shorter than decoding on from `position`."""
    entries = stream.index_entries
    if not len(entries):
        return limit - position > _NO_INDEX
    index = entries.search_timestamp(int((limit + origin) / stream.time_base))
    if index < 0:
        return False
    return float(entries[index].timestamp * stream.time_base - origin) > position


def _seek(container, stream, limit: float, origin, stamp):
    """Seeks to a keyframe at or before `limit`; returns the frames after it, and it."""
    back = 0.0
    while True:
        target = limit - back
        offset = int((target + origin) / stream.time_base)
        if container.format.name == "avi":  # has nothing before its start to seek to
            offset = max(offset, 0)
        container.seek(offset, stream=stream, backward=True)
        frames = decoded(container, stream)
        first = next(frames, None)
        # The first frame decoded from there may be shown after `limit`, or there may be none.
        if (first is not None and stamp(first) <= limit) or target < -TAIL:
            return frames, first
        back = 2 * back + 1.0
