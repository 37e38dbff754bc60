"""Takes many messages from Redis at once, and notes them as unacknowledged in the same step.

A script on the server moves them: a message is in its list or among the unacknowledged, and never
between. Where such a note is refused, for a right or for room, the message comes without it and is
in this worker's hands alone: if it is lost with the worker, rescue sends it again.

Where tenants share a list, `lanes` says whose message is next.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from redis.exceptions import ResponseError

from app.broker.lanes import RULE
from app.broker.queues import PATIENT_SHARE

MAX_BYTES: Final = 4_000_000
"""Of messages that are taken at once, as far as the last of them goes beyond it."""

MOST_OWED: Final = 100
"""Jobs that the patient end has given beyond its share, as far as they are held against it."""

_FETCH: Final = f"""{RULE}
local bytes, queues, sep = tonumber(ARGV[4]), tonumber(ARGV[6]), ARGV[8]
local room, taken, lanes, weights = {{}}, {{''}}, {{}}, KEYS[3]
local function note(tag, text)
  for _, kept in ipairs({{redis.pcall('ZADD', KEYS[2], ARGV[2], tag),
                         redis.pcall('HSET', KEYS[1], tag, text)}}) do
    if type(kept) == 'table' and kept.err then taken[1] = kept.err end
  end
end
local function is_shared(at) return try('EXISTS', at.tags) == 1 end
local function newcomer_of(at)
  if at.is_live then return next_of(at) end
  local tenant = redis.call('ZRANGE', at.fresh, 0, 0)[1]
  if tenant then try('ZREM', at.fresh, tenant) end
  return tenant
end
local function take(place, most, next_)
  local queue, got, at = place % queues, 0, lanes[place]
  room[queue] = room[queue] or tonumber(ARGV[10 + 3 * queue])
  while got < most and room[queue] > 0 and bytes > 0 do
    local tenant = is_shared(at) and (next_(at) or false)
    if tenant == false and next_ == newcomer_of then break end
    local item = redis.pcall('RPOP', list_of(at, tenant or ''))
    if type(item) == 'table' then taken[1] = item.err end
    if type(item) == 'string' then
      if #item < 64000000 then  -- nobody takes a larger one
        note(ARGV[1] .. (#taken - 1) / 3, '[' .. item .. ARGV[11 + 3 * queue])
      end
      local jobs = math.min(tonumber(string.match(item, '"num_jobs": ?(%d+)') or 1), 1000)
      taken[#taken + 1], taken[#taken + 2], taken[#taken + 3] = place, item, jobs
      room[queue], bytes, got = room[queue] - jobs, bytes - #item, got + jobs
      if tenant then charge(at, tenant, jobs, weights) end
    elseif tenant and type(item) ~= 'table' then
      leave(at, tenant)
      if try('ZSCORE', at.tags, tenant) then break end
    else
      break
    end
  end
  return got
end
local last, was_shared = #KEYS - 4, {{}}
for place = 0, last do
  lanes[place] = lane_of(KEYS[place + 4], sep)
  was_shared[place % queues] = was_shared[place % queues] or is_shared(lanes[place])
end
if ARGV[7] ~= '' then note(ARGV[1], ARGV[7]) end
local most, patient, early = tonumber(ARGV[3]), tonumber(ARGV[5]), 0
local next_ = ARGV[9] == '1' and newcomer_of or next_of
for first = last - queues + 1, 0, -math.max(queues, 1) do
  for queue = 0, queues - 1 do
    early = early + take(first + queue, patient - early, next_)
  end
end
most = most - early
for place = 0, last do most = most - take(place, most, next_) end
for queue, shared in pairs(was_shared) do
  if shared then
    local its = {{}}
    for place = queue, last, queues do its[#its + 1] = lanes[place] end
    ring_or_mute(ARGV[12 + 3 * queue], sep, its)
  end
end
taken[#taken + 1] = early
return taken
"""
"""KEYS: the hash and the index of the unacknowledged, the weights of tenants, then each queue's
list for the first step of priority, for the next one, and so on. ARGV: what tags begin with, now,
most jobs, most bytes, how many of them from the patient end, the number of queues, the note of a
message that was taken before, `sep`, whether only newcomers are served, and for each queue its
room, the end of its notes, and its key. Returns the last error, then each message's list, item and
jobs, then how many of these jobs came from the patient end."""

_SHA: Final = hashlib.sha1(_FETCH.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Taken:
    """A message as it came out of its list."""

    tag: str
    queue: str
    item: bytes
    num_jobs: int = 1
    payload: dict[str, Any] | None = None  #: if it is read already


class Fetcher:
    """Takes messages for one channel; `prefix` begins all of its delivery tags."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._number = 0  #: of calls
        self._due = 0.0  #: jobs that the patient end may give first
        self._first: Taken | None = None
        self._call: tuple[Any, ...] = ()

    def call(
        self,
        pipe: Any,
        own: tuple[str, str, str],
        lists: Sequence[Sequence[str]],
        rooms: Mapping[str, int],
        most: int,
        first: Taken | None,
        *,
        prefix: str = "",
        sep: str,
        only_new: bool = False,
    ) -> None:
        """Add a call to a pipeline. `own` are the keys of the notes, their index and the weights of
        tenants; `lists` those of each step of priority, of the queues of `rooms` in their order;
        `most` bounds the jobs of all. All keys are whole, `prefix` included. `first` was taken
        already and is to be noted with the others. `only_new` takes from newcomers alone."""
        self._number += 1
        self._first = first
        patient = 0 if only_new else max(0, int(self._due + most / PATIENT_SHARE))
        note = b"[" + first.item + _end(first.queue).encode() if first else b""
        given: list[Any] = [self._tag(""), time.time(), most, MAX_BYTES, patient, len(rooms), note]
        given += [sep, int(only_new)]
        for queue, room in rooms.items():
            given += [room, _end(queue), prefix + queue]
        keys = [*own, *(key for step in lists for key in step)]
        self._call = (_SHA, len(keys), *keys, *given)
        pipe.evalsha(*self._call)

    def load_and_repeat(self, client: Any) -> Any:
        """The reply to the last call, of a server that did not know the script."""
        client.script_load(_FETCH)
        try:
            return client.evalsha(*self._call)
        except ResponseError as error:
            return error

    def tags(self, most: int) -> list[str]:
        """Under which the last call may have noted so many messages, and the first."""
        return [self._tag(""), *map(self._tag, range(most))]

    @property
    def first(self) -> list[Taken]:
        """What was given to the last call."""
        return [replace(self._first, tag=self._tag(""))] if self._first else []

    def read(self, reply: Sequence[Any], queues: Sequence[str]) -> tuple[str, list[Taken]]:
        """What was refused, or "", and the messages in the order to handle them."""
        error, *given, early = reply
        rows = enumerate(zip(given[::3], given[1::3], given[2::3], strict=True))
        taken = [
            Taken(self._tag(number), queues[int(place) % len(queues)], item, int(num_jobs))
            for number, (place, item, num_jobs) in sorted(rows, key=lambda row: int(row[1][0]))
        ]
        total = sum(each.num_jobs for each in taken)
        self._due = max(-MOST_OWED, self._due + total / PATIENT_SHARE - int(early))
        return error.decode(errors="replace"), taken

    def _tag(self, number: object) -> str:
        return f"{self._prefix}{self._number}:{number}"


def _end(queue: str) -> str:
    return f',"",{json.dumps(queue)}]'
