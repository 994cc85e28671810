"""Shards of an isolated builder, done by whoever started it.

The builder's process knows no cluster. Its `map_shards` leaves the request in a folder of the workspace and says so with an event;
the caller gives the shards to its own `map_shards` and leaves each result in the folder. What is passed on stays pickled: the caller
imports nothing of the stage. An exception of a shard is raised in the caller, which ends the builder.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pesc.launch.events import Event, emit
from pesc.stage import MapShards

_POLL_SECONDS = 0.02
_REQUEST = "request"


def relayed_shards(work: Path) -> MapShards:
    """The `StageContext.map_shards` of a builder whose caller serves shards."""

    def map_shards(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        folder = Path(tempfile.mkdtemp(prefix="shards-", dir=work.resolve()))
        _write(folder / _REQUEST, [pickle.dumps((function, item), pickle.HIGHEST_PROTOCOL) for item in items])
        emit({"event": "shards", "folder": str(folder)})
        for index in range(len(items)):
            path = folder / str(index)
            while not path.exists():
                time.sleep(_POLL_SECONDS)
            result = pickle.loads(pickle.loads(path.read_bytes()))
            path.unlink()
            yield result
        (folder / _REQUEST).unlink()
        folder.rmdir()

    return map_shards


class ShardServer:
    """The caller's side: takes requests from events and does them a result at a time, between two reads of the builder's output."""

    def __init__(self, map_shards: MapShards) -> None:
        self._map_shards = map_shards
        self._calls: deque[Iterator[None]] = deque()

    def take(self, event: Event) -> bool:
        """Note a request; False when the event is of another kind."""
        if event["event"] != "shards":
            return False
        self._calls.append(self._serve(Path(event["folder"])))
        return True

    def step(self) -> bool:
        """Wait for the next result and pass it on; False when there is nothing to do.  Raises what the shard raised."""
        while self._calls:
            for _ in self._calls[0]:
                return True
            self._calls.popleft()
        return False

    def _serve(self, folder: Path) -> Iterator[None]:
        messages: list[bytes] = pickle.loads((folder / _REQUEST).read_bytes())
        for index, result in enumerate(self._map_shards(do_pickled, messages)):
            _write(folder / str(index), result)
            yield


def do_pickled(message: bytes) -> bytes:
    """function(item) of a pickled pair of the two, pickled."""
    function, item = pickle.loads(message)
    return pickle.dumps(function(item), pickle.HIGHEST_PROTOCOL)


def _write(path: Path, value: Any) -> None:
    """Write a pickle so that the other process sees it whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    partial.replace(path)
