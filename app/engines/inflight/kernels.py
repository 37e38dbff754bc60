# mypy: ignore-errors
"""Triton kernels of the CUDA path. What they compute is written in torch in `paged` and `drawing`.

Import this where Triton is known to be there. All arrays are contiguous unless a stride is given.
A cache holds [page, PAGE, kv_heads, dim] of keys and of values. A step's segments are [4, room]
int32: where the segment's pages begin in `tables`, its first token, its tokens, and the position of
the first. `counts` is how many segments have one token (they come first), and how many tiles there
are. Programs beyond those counts leave at once, so that a recorded launch serves any smaller step.
"""

import triton
import triton.language as tl


@triton.jit
def _capped(scores, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        # tanh by exp, of what is bounded: exp of a large number would be infinite.
        bent = tl.exp(-2.0 * tl.abs(scores) / softcap)
        bent = softcap * (1.0 - bent) / (1.0 + bent)
        scores = tl.where(scores < 0, -bent, bent)
    return scores


@triton.jit
def _rotated(source, gain, cos, sin, dims, mine, eps, DIM: tl.constexpr, NORM: tl.constexpr):
    """Heads at `source` [heads, 1], normalised with NORM, rotated by one position's cos and sin."""
    HALF: tl.constexpr = DIM // 2
    kind = source.dtype.element_ty
    wide = dims < DIM
    partner = (dims + HALF) % DIM
    x = tl.load(source + dims[None, :], mask=mine, other=0.0).to(tl.float32)
    y = tl.load(source + partner[None, :], mask=mine, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x_gain = tl.load(gain + dims, mask=wide, other=0.0)[None, :]
        y_gain = tl.load(gain + partner, mask=wide, other=0.0)[None, :]
        x = ((x * scale).to(kind) * x_gain).to(tl.float32)
        y = ((y * scale).to(kind) * y_gain).to(tl.float32)
    c = tl.load(cos + dims, mask=wide, other=0.0).to(tl.float32)
    s = tl.load(sin + dims, mask=wide, other=0.0).to(tl.float32)
    s = tl.where(dims < HALF, -s, s)
    return (x * c[None, :] + y * s[None, :]).to(kind)


@triton.jit(do_not_specialize=["room"])
def attend_rows(
    query,  # [tokens, heads, dim]
    query_token,  # strides
    query_head,
    keys,
    values,
    out,  # [tokens, heads, dim]
    segments,
    room,
    tables,
    counts,
    partial,  # [segments, SPLITS, heads, dim] float32
    extrema,  # [segments, SPLITS, heads, 2] float32: largest score, sum of weights
    arrived,  # [segments, kv_heads] int32, zeros between launches
    cos,  # [positions, dim], and so sin: read with ROTATE
    sin,
    query_gain,  # [dim], and so key_gain: read with NORM
    key_gain,
    eps,
    scale,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
):
    """Segments of one token. The context of each is cut into up to SPLITS parts, of LEAST tokens or
    more, so that one row can fill the chip; the part that ends last merges them.

    With ROTATE `query` is [tokens, heads + 2 · kv_heads, dim], keys and values behind the queries
    and nothing rotated; the last part keeps the token's own key and value in the cache."""
    segment = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if segment >= tl.load(counts):
        return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    table = tables + tl.load(segments + segment)
    token = tl.load(segments + room + segment).to(tl.int64)
    end = tl.load(segments + 3 * room + segment) + 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(end - WINDOW, 0)
    length = end - begin
    span = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N, LEAST)
    used = tl.cdiv(length, span)
    if split >= used:
        return
    low = begin + split * span
    high = tl.minimum(low + span, end)

    heads = kv_head * GROUP + tl.arange(0, BLOCK_G)
    real = tl.arange(0, BLOCK_G) < GROUP
    dims = tl.arange(0, BLOCK_D)
    wide = dims < DIM
    mine = real[:, None] & wide[None, :]
    source = query + token * query_token + heads[:, None] * query_head
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if ROTATE:
        line = (end - 1) * DIM
        q = _rotated(source, query_gain, cos + line, sin + line, dims, mine, eps, DIM, NORM)
        if split == used - 1:
            # Its own key and value, for every query head alike, beside the cache and then in it.
            own = query + token * query_token + (HEADS + kv_head) * query_head
            own = own + 0 * heads[:, None]
            k = _rotated(own, key_gain, cos + line, sin + line, dims, mine, eps, DIM, NORM)
            v = tl.load(own + KV_HEADS * query_head + dims[None, :], mask=mine, other=0.0)
            score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
            top = _capped(score * scale, softcap, SOFTCAP)
            total = tl.full([BLOCK_G], 1.0, tl.float32)
            mixed = v.to(tl.float32)
            page = tl.load(table + (end - 1) // PAGE).to(tl.int64)
            at = ((page * PAGE + (end - 1) % PAGE) * KV_HEADS + kv_head) * DIM
            once = (tl.arange(0, BLOCK_G) == 0)[:, None] & wide[None, :]
            tl.store(keys + at + dims[None, :] + 0 * heads[:, None], k, mask=once)
            tl.store(values + at + dims[None, :] + 0 * heads[:, None], v, mask=once)
            high = high - 1
    else:
        q = tl.load(source + dims[None, :], mask=mine, other=0.0)
    for first in range(low, high, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        inside = places < high
        page = tl.load(table + places // PAGE, mask=inside, other=0).to(tl.int64)
        at = ((page * PAGE + places % PAGE) * KV_HEADS + kv_head) * DIM
        k = tl.load(
            keys + at[None, :] + dims[:, None], mask=inside[None, :] & wide[:, None], other=0.0
        )
        v = tl.load(
            values + at[:, None] + dims[None, :], mask=inside[:, None] & wide[None, :], other=0.0
        )
        scores = _capped(tl.dot(q, k, input_precision=PRECISION) * scale, softcap, SOFTCAP)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None]
        mixed += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = higher

    to = out + (token * HEADS + heads[:, None]) * DIM + dims[None, :]
    if used == 1:
        tl.store(to, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mine)
    else:
        part = (segment * SPLITS + split) * HEADS + heads
        tl.store(partial + part[:, None] * DIM + dims[None, :], mixed, mask=mine)
        tl.store(extrema + part * 2, top, mask=real)
        tl.store(extrema + part * 2 + 1, total, mask=real)
        tl.debug_barrier()
        counter = arrived + segment * KV_HEADS + kv_head
        before = tl.atomic_add(counter, 1, sem="acq_rel")
        if before == used - 1:
            tl.store(counter, 0)
            top = tl.full([BLOCK_G], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_G], tl.float32)
            mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
            for other in range(used):
                # Past the first-level cache: another program wrote this.
                part = (segment * SPLITS + other) * HEADS + heads
                theirs = tl.load(
                    partial + part[:, None] * DIM + dims[None, :],
                    mask=mine,
                    other=0.0,
                    cache_modifier=".cg",
                )
                its_top = tl.load(extrema + part * 2, mask=real, other=0.0, cache_modifier=".cg")
                its_total = tl.load(
                    extrema + part * 2 + 1, mask=real, other=1.0, cache_modifier=".cg"
                )
                higher = tl.maximum(top, its_top)
                fade = tl.exp(top - higher)
                grow = tl.exp(its_top - higher)
                total = total * fade + its_total * grow
                mixed = mixed * fade[:, None] + theirs * grow[:, None]
                top = higher
            tl.store(to, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=["room", "tile_room"])
def attend_chunks(
    query,
    query_token,
    query_head,
    keys,
    values,
    out,
    segments,
    room,
    tables,
    counts,
    tiles,  # [2, tile_room] int32: segment, and how many of its tokens come before
    tile_room,
    scale,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles of up to QUERIES tokens of one segment, each with all heads of one key head."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if tile >= tl.load(counts + 1):
        return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    segment = tl.load(tiles + tile)
    skipped = tl.load(tiles + tile_room + tile)
    table = tables + tl.load(segments + segment)
    origin = tl.load(segments + room + segment).to(tl.int64)
    count = tl.load(segments + 2 * room + segment)
    start = tl.load(segments + 3 * room + segment)

    rows = tl.arange(0, BLOCK_M)
    token = skipped + rows // GROUP
    real = (rows < QUERIES * GROUP) & (token < count)
    heads = kv_head * GROUP + rows % GROUP
    position = start + token
    dims = tl.arange(0, BLOCK_D)
    wide = dims < DIM
    mine = real[:, None] & wide[None, :]
    q = tl.load(
        query
        + (origin + token[:, None]) * query_token
        + heads[:, None] * query_head
        + dims[None, :],
        mask=mine,
        other=0.0,
    )
    end = start + tl.minimum(skipped + QUERIES, count)
    begin = 0
    if WINDOW:
        begin = tl.maximum(start + skipped - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    top = tl.full([BLOCK_M], -1e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        inside = places < end
        page = tl.load(table + places // PAGE, mask=inside, other=0).to(tl.int64)
        at = ((page * PAGE + places % PAGE) * KV_HEADS + kv_head) * DIM
        k = tl.load(
            keys + at[None, :] + dims[:, None], mask=inside[None, :] & wide[:, None], other=0.0
        )
        v = tl.load(
            values + at[:, None] + dims[None, :], mask=inside[:, None] & wide[None, :], other=0.0
        )
        scores = _capped(tl.dot(q, k, input_precision=PRECISION) * scale, softcap, SOFTCAP)
        seen = places[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (places[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None]
        mixed += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    to = out + ((origin + token[:, None]) * HEADS + heads[:, None]) * DIM + dims[None, :]
    tl.store(to, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mine)


@triton.jit
def normalise(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Root mean square norm of each row, times `weight`: [tokens, WIDTH] → the same."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    wide = places < WIDTH
    row = tl.load(x + token * WIDTH + places, mask=wide, other=0.0).to(tl.float32)
    gain = tl.load(weight + places, mask=wide, other=0.0)
    row = row * tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps)
    normal = (row.to(out.dtype.element_ty) * gain).to(out.dtype.element_ty)
    tl.store(out + token * WIDTH + places, normal, mask=wide)


@triton.jit
def rotate_and_keep(
    qkv,  # [tokens, heads + 2 · kv_heads, dim]; the queries are rotated in place
    positions,  # [tokens] int64
    slots,  # [tokens] int64: page · PAGE + place
    keys,
    values,
    cos,  # [positions, dim]
    sin,
    query_gain,  # [dim], read if NORM
    key_gain,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    """Rotates queries and keys by their positions, and keeps keys and values in the cache."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    places = tl.arange(0, BLOCK)
    wide = places < HALF
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * DIM + places
    low = tl.load(source, mask=wide, other=0.0)
    high = tl.load(source + HALF, mask=wide, other=0.0)
    slot = tl.load(slots + token)
    if head >= HEADS + KV_HEADS:
        to = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * DIM + places
        tl.store(to, low, mask=wide)
        tl.store(to + HALF, high, mask=wide)
        return
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    kind = qkv.dtype.element_ty
    if NORM:
        scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / DIM + eps)
        gain = query_gain
        if head >= HEADS:
            gain = key_gain
        one = tl.load(gain + places, mask=wide, other=0.0)
        two = tl.load(gain + HALF + places, mask=wide, other=0.0)
        low = ((low * scale).to(kind) * one).to(tl.float32)
        high = ((high * scale).to(kind) * two).to(tl.float32)
    at = tl.load(positions + token) * DIM + places
    cos_low = tl.load(cos + at, mask=wide, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + at + HALF, mask=wide, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + at, mask=wide, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + at + HALF, mask=wide, other=0.0).to(tl.float32)
    turned_low = (low * cos_low - high * sin_low).to(kind)
    turned_high = (high * cos_high + low * sin_high).to(kind)
    if head < HEADS:
        tl.store(source, turned_low, mask=wide)
        tl.store(source + HALF, turned_high, mask=wide)
    else:
        to = keys + (slot * KV_HEADS + head - HEADS) * DIM + places
        tl.store(to, turned_low, mask=wide)
        tl.store(to + HALF, turned_high, mask=wide)


@triton.jit
def gate(both, out, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) · up: both [tokens, 2 · INNER], gates first → [tokens, INNER]."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = places < INNER
    gates = tl.load(both + token * 2 * INNER + places, mask=wide, other=0.0).to(tl.float32)
    ups = tl.load(both + (token * 2 + 1) * INNER + places, mask=wide, other=0.0)
    kind = out.dtype.element_ty
    gates = (gates / (1.0 + tl.exp(-gates))).to(kind)
    tl.store(out + token * INNER + places, (gates * ups).to(kind), mask=wide)


@triton.jit
def largest_of_parts(logits, tops, ids, width, parts, BLOCK: tl.constexpr):
    """Each part's largest logit and its first place; +inf where a part holds NaN."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    places = part * BLOCK + tl.arange(0, BLOCK)
    inside = places < width
    z = tl.load(logits + row * width + places, mask=inside, other=float("-inf")).to(tl.float32)
    z = tl.where(z != z, float("inf"), z)
    top = tl.max(z, 0)
    place = tl.min(tl.where((z == top) & inside, places, 2147483647), 0)
    tl.store(tops + row * parts + part, top)
    tl.store(ids + row * parts + part, place)


@triton.jit
def _mixed_bits(x):
    """A hash of 32 bits: every bit of the result depends on every bit given."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _ordered(z):
    """Floats as whole numbers without sign, in the same order."""
    bits = z.to(tl.uint32, bitcast=True)
    sign = bits >> 31
    return bits ^ tl.where(sign == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def _float_of(order):
    """The float that is `order` among them."""
    sign = order >> 31
    bits = order ^ tl.where(sign == 1, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["count", "room"])
def take_tokens(
    tokens,  # [4, room] int32, as they are staged
    last,  # [slots] int64, each slot's last token
    ids,  # [count] int64, and so are the next two
    positions,
    slots,
    count,
    room,
    BLOCK: tl.constexpr,
):
    """What the model takes, from what the host staged; a token below 0 is its slot's last one."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    token = tl.load(tokens + at, mask=inside, other=0).to(tl.int64)
    row = tl.load(tokens + 3 * room + at, mask=inside, other=0)
    known = tl.load(last + row, mask=inside & (token < 0), other=0)
    tl.store(ids + at, tl.where(token < 0, known, token), mask=inside)
    position = tl.load(tokens + room + at, mask=inside, other=0)
    tl.store(positions + at, position.to(tl.int64), mask=inside)
    slot = tl.load(tokens + 2 * room + at, mask=inside, other=0)
    tl.store(slots + at, slot.to(tl.int64), mask=inside)


@triton.jit
def _give(tokens, last, row, slot, token):
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(last + slot, tl.maximum(token, 0).to(tl.int64))


@triton.jit(do_not_specialize=["room"])
def choose(
    logits,  # [rows, width]
    tops,  # of largest_of_parts
    ids,
    samples,  # [8, room] int32, as they are staged
    room,
    tokens,  # [rows] int64
    last,  # [slots] int64, each slot's last token
    width,
    parts,
    BITS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The likeliest token of a greedy row; else a draw among those that the row's limits leave."""
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, BLOCK_PARTS)
    best = tl.load(tops + row * parts + each, mask=each < parts, other=float("-inf"))
    where = tl.load(ids + row * parts + each, mask=each < parts, other=2147483647)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, where, 2147483647), 0)
    slot = tl.load(samples + room + row)
    temperature = tl.load(samples + 5 * room + row).to(tl.float32, bitcast=True)
    if (top == float("inf")) | (top == float("-inf")):
        _give(tokens, last, row, slot, tl.full([], -1, tl.int32))
        return
    if temperature <= 0:
        _give(tokens, last, row, slot, token)
        return
    low_key = tl.load(samples + 2 * room + row).to(tl.uint32, bitcast=True)
    high_key = tl.load(samples + 3 * room + row).to(tl.uint32, bitcast=True)
    top_k = tl.load(samples + 4 * room + row)
    top_p = tl.load(samples + 6 * room + row).to(tl.float32, bitcast=True)
    min_p = tl.load(samples + 7 * room + row).to(tl.float32, bitcast=True)
    source = logits + row * width
    places = tl.arange(0, BLOCK)

    # Limits are lowest logits, found bit by bit: how much is at a candidate or above it?
    lowest = tl.full([], float("-inf"), tl.float32)
    if min_p > 0:
        lowest = top + temperature * tl.log(min_p)
    if top_k > 0:
        floor = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(BITS):
            candidate = floor | bit
            bit = bit >> 1
            above = tl.zeros([BLOCK], tl.int32)
            for first in range(0, width, BLOCK):
                z = tl.load(
                    source + first + places, mask=first + places < width, other=-float("inf")
                )
                z = z.to(tl.float32)
                above += ((_ordered(z) >= candidate) & (z > -float("inf"))).to(tl.int32)
            floor = tl.where(tl.sum(above, 0) >= top_k, candidate, floor)
        back = _float_of(floor)
        # Fewer tokens than top_k in all: the search ends at the bottom, which is no number.
        lowest = tl.where(back == back, tl.maximum(lowest, back), lowest)
    if top_p < 1:
        mass = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            z = tl.load(source + first + places, mask=first + places < width, other=-float("inf"))
            z = z.to(tl.float32)
            mass += tl.where(z >= lowest, tl.exp((z - top) / temperature), 0.0)
        # Never nothing: the likeliest is inside, however small top_p is.
        needed = tl.maximum(top_p * tl.sum(mass, 0), 1e-30)
        # The least likely token inside is the largest that has `needed` at it or above.
        floor = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(BITS):
            candidate = floor | bit
            bit = bit >> 1
            mass = tl.zeros([BLOCK], tl.float32)
            for first in range(0, width, BLOCK):
                z = tl.load(
                    source + first + places, mask=first + places < width, other=-float("inf")
                )
                z = z.to(tl.float32)
                among = (_ordered(z) >= candidate) & (z >= lowest)
                mass += tl.where(among, tl.exp((z - top) / temperature), 0.0)
            floor = tl.where(tl.sum(mass, 0) >= needed, candidate, floor)
        back = _float_of(floor)
        lowest = tl.where(back == back, tl.maximum(lowest, back), lowest)
    lowest = tl.minimum(lowest, top)

    # An exponential race: each token ends after a random time over its weight; the first wins.
    winning = tl.full([BLOCK], -float("inf"), tl.float32)
    winner = tl.zeros([BLOCK], tl.int32)
    for first in range(0, width, BLOCK):
        at = first + places
        z = tl.load(source + at, mask=at < width, other=-float("inf")).to(tl.float32)
        noise = _mixed_bits(at.to(tl.uint32) * 0x9E3779B1 ^ low_key)
        noise = _mixed_bits(noise + high_key)
        u = (noise.to(tl.float32) + 0.5) * 2.3283064365386963e-10
        time = tl.where(u < 0.001, u * (1 + u * (0.5 + u * 0.33333334)), -tl.log(1 - u))
        score = (z - top) / temperature - tl.log(time)
        score = tl.where((z >= lowest) & (z > -float("inf")), score, -float("inf"))
        better = score > winning
        winner = tl.where(better, at, winner)
        winning = tl.where(better, score, winning)
    first_place = tl.max(winning, 0)
    token = tl.min(tl.where(winning == first_place, winner, 2147483647), 0)
    _give(tokens, last, row, slot, token)
