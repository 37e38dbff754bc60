"""Which jobs have a message in Redis: read out of the lists themselves.

Nothing else is exact. Counts are wrong as soon as somebody else's messages lie in a queue; the
order of receipt says nothing of a queue that nobody reads; a set of ids beside the lists misses
what other producers send and what Celery puts back.

A script on the server picks the ids, so that a look at ten thousand messages moves 400 kB, and not
the requests in them. It stops after `MAX_IDS` messages or `MAX_BYTES`, a few milliseconds, so that
others get their turn. Lists are read from their new end: what is taken from the other end meanwhile
moves nothing, and what is added moves messages to where they are still met.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Final
from uuid import UUID

from app.jobs import job_id_of

MAX_IDS: Final = 1_000
MAX_BYTES: Final = 1_000_000

_READ_IDS: Final = """
local at, ids, bytes = tonumber(ARGV[1]), {}, 0
while #ids < tonumber(ARGV[2]) and bytes < tonumber(ARGV[3]) do
  local messages = redis.call('LRANGE', KEYS[1], at, at + 49)
  if #messages == 0 then return {-1, ids} end
  for _, message in ipairs(messages) do
    bytes = bytes + #message
    local ok, read = pcall(cjson.decode, message)
    local headers = ok and type(read) == 'table' and read.headers
    if type(headers) == 'table' then
      local more = type(headers.more) == 'table' and headers.more or {}
      for place = 0, #more do
        local id = more[place]
        if place == 0 then id = headers.id end
        if type(id) == 'string' then ids[#ids + 1] = id end
      end
    end
  end
  at = at + #messages
end
return {at, ids}
"""
"""The ids of the jobs in a list from a place on, and the place to go on from, or -1."""


def without_message(client: Any, lists: Mapping[str, Set[UUID]]) -> set[UUID]:
    """Those of these jobs that have no message in any of their lists. `lists` has the jobs whose
    messages may be in each: in another one nobody looks for them.

    Also without one is a job whose message a worker is just taking, so ask twice. Raises what
    redis-py raises.
    """
    missing: set[UUID] = set().union(*lists.values())
    read_ids = client.register_script(_READ_IDS)
    for key, ids in lists.items():
        at, looked_for = 0, missing & ids
        while at >= 0 and looked_for:
            at, found = read_ids(keys=[key], args=[at, MAX_IDS, MAX_BYTES])
            there = looked_for & {job_id_of(id.decode("utf-8", "replace")) for id in found}
            looked_for -= there
            missing -= there
    return missing
