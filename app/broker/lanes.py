"""Lanes: whose message comes next, where several tenants share a list.

A lane is a list of a queue and, beside it, a list for each tenant that has messages in it. The list
itself is for whoever has none: services that push by themselves, and an API without keys. While
nobody else waits a lane is that list, and nothing more.

Who comes next is start-time fair queueing (Goyal, Vin and Cheng, 1996). Each tenant has a tag, in
nanoseconds of the device over its weight; the least tag is served, and grows by what its message is
taken to cost. The lane's clock `v` is the tag that was served last: who had nothing waiting begins
there, so that idling saves up nothing and many waiting jobs of others are no debt of his. When jobs
end, workers tell what they took of the device, and tags are corrected by the difference. Every
sixteenth turn goes to whoever was served longest ago, so that nobody starves, however little his
weight.

A worker that is sated takes a message of a newcomer all the same, one who had nothing waiting: so
that a lone job does not wait for what is ahead of it in that worker, too. In the lane of calls that
are waited for everybody is a newcomer.

The scripts below keep all of that on the server: it holds across workers, and a loss of it costs
nothing but who comes first. Keys, for the list L of the queue Q, and `sep` written as `:`:

    L:of:<tenant>  list: messages of a tenant
    L:tags         sorted set: tenants with messages by their tags
    L:since        the same tenants by the turn in which they were served last, or came
    L:past         tenants without messages by their tags, where those are beyond `v`
    L:fresh        newcomers by the turn in which they came
    L:fair         hash: `v`, `turn`, and the mean cost of a job, of all and of `of <tenant>`
    Q:bell         list: has an element while tenants have messages; workers wait for it
    Q:new          the same while there are newcomers
    gristmill.weights  hash: weights of tenants that are not 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from app.broker.queues import LIVE, PATIENT_SHARE, Layout, queue_name
from app.jobs import DEFAULT_TENANT, LIVE_PRIORITY

BELL: Final = "bell"
NEW: Final = "new"
WEIGHTS: Final = "gristmill.weights"

FIRST_NS: Final = 1_000_000
"""What a job is taken to cost while none has ended."""
LEAST_NS: Final = 100_000
"""What a job that ran is taken to have cost at least: some engines measure nothing."""
MEMORY: Final = 64
"""Jobs after which a mean has mostly forgotten what was before."""

RULE: Final = f"""
local function try(...)  -- a full server, or one that refuses, keeps nobody from his message
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then return false end
  return reply
end
local function lane_of(list, sep)
  local at = {{list = list, of = list .. sep .. 'of' .. sep}}
  at.is_live = string.sub(list, -#sep - {len(LIVE)}) == sep .. '{LIVE}'
  for _, what in ipairs({{'tags', 'since', 'past', 'fresh', 'fair'}}) do
    at[what] = list .. sep .. what
  end
  return at
end
local function list_of(at, tenant) return tenant == '' and at.list or at.of .. tenant end
local function exact(number) return string.format('%.17g', number) end
local function noted(at, field) return tonumber(try('HGET', at.fair, field) or 0) end
local function cost(at, tenant)
  local mean = try('HGET', at.fair, 'of ' .. tenant) or try('HGET', at.fair, 'all')
  return tonumber(mean or {FIRST_NS})
end
local function enter(at, tenant, do_)
  if try('ZSCORE', at.tags, tenant) then return false end
  local v, past = noted(at, 'v'), tonumber(try('ZSCORE', at.past, tenant) or 0)
  local is_new, turn = at.is_live or past <= v, noted(at, 'turn')
  do_('ZADD', at.tags, exact(math.max(v, past)), tenant)
  do_('ZADD', at.since, turn, tenant)
  do_('ZREM', at.past, tenant)
  if is_new then do_('ZADD', at.fresh, turn, tenant) end
  return is_new
end
local function leave(at, tenant, tag)
  for _, kept in ipairs({{at.tags, at.since, at.fresh}}) do try('ZREM', kept, tenant) end
  local v = noted(at, 'v')
  try('ZREMRANGEBYSCORE', at.past, '-inf', exact(v))
  if tag and tag > v then try('ZADD', at.past, exact(tag), tenant) end
end
local function next_of(at)
  if redis.call('LLEN', at.list) > 0 then enter(at, '', try) end
  local turn = try('HINCRBY', at.fair, 'turn', 1)
  local by = turn and turn % {PATIENT_SHARE} == 0 and at.since or at.tags
  local tenant = redis.call('ZRANGE', by, 0, 0)[1]
  if tenant and by == at.tags then
    local tag = tonumber(redis.call('ZSCORE', at.tags, tenant))
    if tag > noted(at, 'v') then try('HSET', at.fair, 'v', exact(tag)) end
  end
  return tenant
end
local function charge(at, tenant, jobs, weights)
  local weight = tonumber(try('HGET', weights, tenant) or 1)
  local tag = tonumber(try('ZSCORE', at.tags, tenant) or 0) + jobs * cost(at, tenant) / weight
  if redis.call('LLEN', list_of(at, tenant)) == 0 then return leave(at, tenant, tag) end
  try('ZADD', at.tags, exact(tag), tenant)
  try('ZADD', at.since, noted(at, 'turn'), tenant)
  if not at.is_live then try('ZREM', at.fresh, tenant) end
end
local function others(at)
  local count = redis.call('ZCARD', at.tags)
  if count > 0 and redis.call('ZSCORE', at.tags, '') then count = count - 1 end
  return count
end
local function ring(bell, do_)
  if redis.call('LLEN', bell) == 0 then do_('LPUSH', bell, '') end
end
local function ring_or_mute(queue, sep, lanes)
  local waiting, new = 0, 0
  for _, at in ipairs(lanes) do
    waiting, new = waiting + others(at), new + redis.call('ZCARD', at.fresh)
  end
  for name, count in pairs({{{BELL} = waiting, {NEW} = new}}) do
    local bell = queue .. sep .. name
    if count > 0 then ring(bell, try) else try('DEL', bell) end
  end
end
"""
"""Functions of the scripts. A `do_` says what becomes of a refusal: `redis.call` or `try`."""

PUSH: Final = f"""{RULE}
local sep, tenant = ARGV[2], ARGV[3]
local at = lane_of(KEYS[1] .. ARGV[1], sep)
local is_new = enter(at, tenant, redis.call)
redis.call('LPUSH', list_of(at, tenant), ARGV[4])
ring(KEYS[1] .. sep .. '{BELL}', redis.call)
if is_new then ring(KEYS[1] .. sep .. '{NEW}', redis.call) end
"""
"""KEYS: the queue. ARGV: what follows its name in its list's, `sep`, the tenant, the message."""

_COUNT: Final = f"""{RULE}
local found = {{}}
for _, list in ipairs(KEYS) do
  local at = lane_of(list, ARGV[1])
  local all = redis.call('LLEN', list)
  for _, tenant in ipairs(redis.call('ZRANGE', at.tags, 0, -1)) do
    if tenant ~= '' then all = all + redis.call('LLEN', list_of(at, tenant)) end
  end
  local own = redis.call('LLEN', list_of(at, ARGV[2]))
  found[#found + 1] = {{all, own, others(at)}}
end
return found
"""
"""KEYS: lists. ARGV: `sep`, the tenant. Of each lane: messages, the tenant's own, and tenants."""

_USED: Final = f"""{RULE}
local weights, sep = KEYS[1], ARGV[1]
for place = 2, #KEYS do
  local at, base = lane_of(KEYS[place], sep), 4 * (place - 2) + 1
  local tenant, ended, ran, ns = ARGV[base + 1], ARGV[base + 2], ARGV[base + 3], ARGV[base + 4]
  local mean, weight = cost(at, tenant), tonumber(try('HGET', weights, tenant) or 1)
  local spent = math.max(tonumber(ns), ran * {LEAST_NS})
  local extra = (spent - ended * mean) / weight
  local tag, v = try('ZSCORE', at.tags, tenant), noted(at, 'v')
  if tag then
    redis.call('ZADD', at.tags, exact(tag + extra), tenant)
  elseif redis.call('EXISTS', at.fair) == 1 then
    local past = math.max(v, tonumber(try('ZSCORE', at.past, tenant) or 0)) + extra
    leave(at, tenant, past)
    if past <= v then redis.call('ZREM', at.past, tenant) end
  end
  if tonumber(ran) > 0 then
    for field, was in pairs({{['of ' .. tenant] = mean, all = tonumber(
        try('HGET', at.fair, 'all') or mean)}}) do
      local now = was + (spent / ran - was) * math.min(1, ran / {MEMORY})
      redis.call('HSET', at.fair, field, exact(now))
    end
  end
end
"""
"""KEYS: the weights, then lists. ARGV: `sep`, and for each list the tenant, jobs that ended, those
that ran, and nanoseconds of the device."""

_RING: Final = f"""{RULE}
local sep, steps = ARGV[1], #ARGV - 1
for _, queue in ipairs(KEYS) do
  local lanes = {{}}
  for step = 1, steps do lanes[step] = lane_of(queue .. ARGV[step + 1], sep) end
  ring_or_mute(queue, sep, lanes)
end
"""
"""KEYS: queues. ARGV: `sep`, and what follows a queue's name in each of its lists'."""


@dataclass(frozen=True, slots=True)
class Length:
    """How long a lane is, as one tenant sees it. In messages."""

    all: int
    own: int
    tenants: int  #: that have lists of their own there


Whose = tuple[str, int, str]
"""Model, priority and tenant."""


@dataclass(frozen=True, slots=True)
class Used:
    """What jobs of a tenant took."""

    ended: int = 0
    ran: int = 0  #: of these
    device_ns: int = 0

    def __add__(self, other: Used) -> Used:
        return Used(
            self.ended + other.ended, self.ran + other.ran, self.device_ns + other.device_ns
        )


def own_list(tenant: str, priority: int = 0) -> str:
    """The tenant, or "" for one whose messages are in the list of all."""
    return "" if tenant == DEFAULT_TENANT and priority != LIVE_PRIORITY else tenant


def lengths(client: Any, lists: Sequence[str], sep: str, tenant: str) -> list[Length]:
    """Of the lanes of these lists, by their whole keys. One round trip."""
    found = client.eval(_COUNT, len(lists), *lists, sep, tenant) if lists else []
    return [Length(*each) for each in found]


def note_used(client: Any, used: Mapping[Whose, Used], layout: Layout) -> None:
    """Correct the tags of tenants by what their jobs took."""
    keys = [layout.prefix + WEIGHTS]
    given: list[Any] = [layout.sep]
    for (model, priority, tenant), each in used.items():
        keys.append(layout.lane(queue_name(model), priority))
        given += [own_list(tenant, priority), each.ended, each.ran, each.device_ns]
    client.eval(_USED, len(keys), *keys, *given)


def ring(client: Any, queues: Sequence[str], ends: Sequence[str], sep: str) -> None:
    """Have workers woken where a bell was heard by one that died, or is not there any more."""
    client.eval(_RING, len(queues), *queues, sep, *ends)


def tenants(client: Any, list_: str, sep: str) -> list[str]:
    """Who has a list of his own beside this one, and messages in it. The keys of these lists."""
    named = client.zrange(f"{list_}{sep}tags", 0, -1)
    return [f"{list_}{sep}of{sep}{name.decode()}" for name in named if name]
