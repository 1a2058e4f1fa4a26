"""Replies of models on disk."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from typing import Any


class LLMError(ValueError):
    """An endpoint or its cache that cannot be used; the message is one sentence."""


class Cache:
    """Replies by key, in one SQLite file; safe against a kill at any moment."""

    def __init__(self, path: str | os.PathLike):
        self.path, self._lock = os.fspath(path), threading.Lock()
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        self._file = self._guarded(
            lambda: sqlite3.connect(self.path, timeout=30.0, check_same_thread=False)
        )
        self._run("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")

    def get(self, key: str) -> str | None:
        """The reply of a key, if there is one."""
        rows = self._run("SELECT reply FROM replies WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put(self, key: str, reply: str) -> None:
        """Keeps a reply; the newest of a key stays."""
        # Generated text may hold half a surrogate pair, which no file can.
        text = reply.encode(errors="replace").decode()
        self._run("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, text)

    def _run(self, statement: str, *values: str) -> list[tuple]:
        def run():
            with self._lock, self._file:
                return self._file.execute(statement, values).fetchall()

        return self._guarded(run)

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except sqlite3.Error as error:
            raise LLMError(
                f"{self.path} cannot be used as a cache of replies ({error}): free some disk space "
                f"if that is the cause, or delete the file; its replies are then asked for again"
            ) from None
