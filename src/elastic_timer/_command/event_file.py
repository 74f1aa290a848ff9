"""What `elastic-timer run --events` writes; docs/reference/events.md and a schema describe it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

from elastic_timer._server.callbacks import contained_logger
from elastic_timer._server.events import Event

logger = contained_logger(__name__)


class EventFile:
    """Appends one JSON object a line, each in one write.

    Args:
        path: A file, or a FIFO that somebody reads. It stays open until the process ends, since a
            write to a FIFO that nobody empties may be under way until then.
        run_id: The run of the server.

    Raises:
        OSError: It can't be written to.
    """

    def __init__(self, path: str, run_id: str) -> None:
        self._path = path
        self._run_id = run_id
        self._host = os.uname().nodename
        try:
            # A FIFO's open would wait for a reader, for good where none comes.
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise OSError(
                    error.errno, "nobody reads it; start its reader first", path
                ) from None
            raise
        # A reader that is slow for a while is to miss nothing.
        os.set_blocking(self._fd, True)
        self._is_failing = False

    def append(self, event: Event) -> None:
        """Append one event; waits for as long as a FIFO is full. One that can't be is lost."""
        line = json.dumps(self._record(event)).encode() + b"\n"
        try:
            os.write(self._fd, line)
        except OSError as error:
            # Once, not for each: the log is what tells of them now.
            if not self._is_failing:
                logger.error("Events are lost, as %s takes none: %s", self._path, error.strerror)
            self._is_failing = True
        else:
            self._is_failing = False

    def _record(self, event: Event) -> dict[str, object]:
        record: dict[str, object] = {
            "time": event.time,
            "event": event.name,
            "run_id": self._run_id,
            **dict.fromkeys(("pid", "scope", "expiration_time", "signal")),
            "host": self._host,
        }
        for field in dataclasses.fields(event):
            value = getattr(event, field.name)
            if field.name == "timer":
                record["scope"] = value.scope_id
                record["expiration_time"] = value.expiration_time
                record["signal"] = value.signal
            else:  # Last of all the signal that was sent, where one was.
                record[field.name] = value
        return record
