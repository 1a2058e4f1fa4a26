"""TensorBoard's event files."""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary


class EventFile:
    """A new event file in a folder, which is made."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies when the disk is full, and `write` would wait for it
        # for ever.
        self._events = EventsWriter(str(folder / "events"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the finite ones of a step's numbers, and leaves them on disk."""
        shown = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=shown))
        self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """Closes it."""
        self._events.close()
