// Attention of packed tokens over a paged KV cache, for CPUs that multiply pairs of bfloat16.
//
// Within a block keys lie as [head, dim / 2, place, 2] and values as [head, place / 2, dim, 2]: in
// pairs, as the instruction takes them. Sums are float32; weights are rounded to bfloat16. Which
// places are weighed together depends on their positions alone, so that a token's numbers are the
// same however its prompt was cut.

#include "kernels.h"

#ifdef __AVX512BF16__
namespace {

constexpr int SPAN_BLOCKS = 4, SPAN = SPAN_BLOCKS * BLOCK;  // places that are weighed together
constexpr int TILE = 12;        // rows with all their sums in registers: 24 of 32, for one block
constexpr float LOG2_E = 1.44269504f;

struct Span {                   // some blocks of one head, and what of them a run may see
    const uint32_t *keys[SPAN_BLOCKS], *values[SPAN_BLOCKS];
    int first, places;          // the position of the first place; places that are filled
    int blocks() const { return (places + BLOCK - 1) / BLOCK; }
};

inline void fetch(const uint32_t* from) { _mm_prefetch((const char*)from, _MM_HINT_T1); }
inline __m512bh pairs_at(const uint32_t* from) { return (__m512bh)_mm512_loadu_si512(from); }
inline __m512bh both(uint32_t pair) { return (__m512bh)_mm512_set1_epi32(pair); }

// 2^x within 3 millionths; 0 from -200 down. NaN stays NaN.
inline f32 exp2_(f32 x) {
    x = (f32)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);
    const __m512 n = _mm512_roundscale_ps((__m512)x, 0);
    const f32 r = x - (f32)n;
    f32 p = f32{} + 9.5700876e-3f;
    p = p * r + 5.5917859e-2f;
    p = p * r + 2.4024745e-1f;
    p = p * r + 6.9312181e-1f;
    p = p * r + 9.9999926e-1f;
    return (f32)_mm512_scalef_ps((__m512)p, n);
}
inline f32 tanh_(f32 x) { return 1.0f - 2.0f / (1.0f + exp2_(x * (2.0f * LOG2_E))); }

// scores[ROWS][SPAN] of NUM blocks = query[ROWS][pairs] x keys; the values are fetched meanwhile.
template <int ROWS, int NUM>
void score(const uint32_t* query, int pairs, const uint32_t* const* keys,
           const uint32_t* const* values, float* scores) {
    __m512 sums[ROWS][NUM * VECS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < NUM * VECS; ++v) sums[r][v] = _mm512_setzero_ps();
    for (int d = 0; d < pairs; ++d)
#pragma GCC unroll 8
        for (int v = 0; v < NUM * VECS; ++v) {
            const int at = d * BLOCK + v % VECS * LANES;
            const __m512bh key = pairs_at(keys[v / VECS] + at);
            fetch(values[v / VECS] + at);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], key, both(query[r * pairs + d]));
        }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < NUM * VECS; ++v) store(scores + r * SPAN + v * LANES, (f32)sums[r][v]);
}

template <int ROWS>
void score_all(const uint32_t* query, int pairs, const Span& span, float* scores) {
    constexpr int NUM = ROWS <= 3 ? 4 : ROWS <= 6 ? 2 : 1;  // few rows: more blocks at once
    int b = 0;
    for (; b + NUM <= span.blocks(); b += NUM)
        score<ROWS, NUM>(query, pairs, span.keys + b, span.values + b, scores + b * BLOCK);
    for (; b < span.blocks(); ++b)
        score<ROWS, 1>(query, pairs, span.keys + b, span.values + b, scores + b * BLOCK);
}

// One row's scores become weights; returns by how much what was summed up before shrinks.
float weigh(const Attention& layer, const Span& span, Sight seen, const float* bias, float* scores,
            bf16* weights, float& most, float& total) {
    const f32 none = f32{} - INFINITY;
    const bool all = seen.from <= span.first && seen.until >= span.first + span.places - 1;
    f32 high = none;
    for (int v = 0; v < span.blocks() * VECS; ++v) {
        f32 x = load(scores + v * LANES);
        if (layer.softcap > 0)
            x = tanh_(x * (layer.scale / layer.softcap)) * (layer.softcap * LOG2_E);
        else
            x *= layer.scale * LOG2_E;
        if (bias) x += load(bias + span.first + v * LANES) * LOG2_E;
        const i32 place = COUNT + (span.first + v * LANES);
        if (!all || span.places % BLOCK)
            x = (place < seen.from) | (place > seen.until) ? none : x;
        store(scores + v * LANES, x);
        high = x > high ? x : high;
    }
    const float top = std::max(most, _mm512_reduce_max_ps((__m512)high));
    const float base = top == -INFINITY ? 0.0f : top;  // nothing is seen yet
    f32 sum = {};
    for (int v = 0; v < span.blocks() * VECS; ++v) {
        const f32 weight = exp2_(load(scores + v * LANES) - base);
        store(weights + v * LANES, weight);
        sum += weight;
    }
    const float shrink = top == most ? 1.0f : std::exp2(most - top);
    total = total * shrink + _mm512_reduce_add_ps((__m512)sum);
    most = top;
    return shrink;
}

// out[ROWS][dim] = out * shrink + weights[ROWS][SPAN] x values, WIDE vectors of dims from `at` on.
// The keys of `next`, if given, are fetched meanwhile.
template <int ROWS, int WIDE>
void mix(const uint32_t* weights, const float* shrink, const Span& span, const Span* next, int dim,
         int at, float* out) {
    __m512 sums[ROWS][WIDE];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < WIDE; ++v)
            sums[r][v] = (__m512)(load(out + r * dim + at + v * LANES) * shrink[r]);
    for (int t = 0; t < (span.places + 1) / 2; ++t) {
        const int block = t / (BLOCK / 2), place = t % (BLOCK / 2) * dim + at;
        const uint32_t* value = span.values[block] + place;
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; ++v) {
            const __m512bh pair = pairs_at(value + v * LANES);
            if (next) fetch(next->keys[block] + place + v * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; ++r)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pair, both(weights[r * SPAN / 2 + t]));
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < WIDE; ++v) store(out + r * dim + at + v * LANES, (f32)sums[r][v]);
}

template <int ROWS>
void mix_all(const uint32_t* weights, const float* shrink, const Span& span, const Span* next,
             int dim, float* out) {
    int at = 0;
    for (; at + 4 * LANES <= dim; at += 4 * LANES)
        mix<ROWS, 4>(weights, shrink, span, next, dim, at, out);
    for (; at < dim; at += LANES) mix<ROWS, 1>(weights, shrink, span, next, dim, at, out);
}

struct Rows {                   // query rows of one key head, and what they have summed up so far
    const bf16* query;          // [count][dim]
    float *out, *most, *total;  // [count][dim], [count], [count]
    const Sight* seen;          // [count]
    const float* const* bias;   // [count]: of place 0, or null
    int count;
};

// Some rows of a tile against one span.
void attend_tile(const Attention& layer, const Span& span, const Span* next, const Rows& rows) {
    alignas(64) float scores[TILE * SPAN];
    alignas(64) bf16 weights[TILE * SPAN];
    float shrink[TILE];
    const int dim = layer.dim;
#define SCORE(N) case N: score_all<N>((const uint32_t*)rows.query, dim / 2, span, scores); break;
    switch (rows.count) {
        SCORE(1) SCORE(2) SCORE(3) SCORE(4) SCORE(5) SCORE(6)
        SCORE(7) SCORE(8) SCORE(9) SCORE(10) SCORE(11) SCORE(12)
    }
    for (int r = 0; r < rows.count; ++r)
        shrink[r] = weigh(layer, span, rows.seen[r], rows.bias[r], scores + r * SPAN,
                          weights + r * SPAN, rows.most[r], rows.total[r]);
    for (int r = 0; r < rows.count; r += 6, next = nullptr) {
        const uint32_t* from = (const uint32_t*)(weights + r * SPAN);
#define MIX(N) case N: mix_all<N>(from, shrink + r, span, next, dim, rows.out + r * dim); break;
        switch (std::min(6, rows.count - r)) { MIX(1) MIX(2) MIX(3) MIX(4) MIX(5) MIX(6) }
    }
}

// The keys and values of a run's tokens, of one head, go to their places in the cache. A pair of
// places is never in two runs of one step.
void keep(const Step& step, const Attention& layer, int run, int head) {
    const int32_t* entry = step.runs + run * 4;
    const int dim = layer.dim;
    for (int token = entry[1]; token < entry[1] + entry[2]; ++token) {
        const int64_t block = step.slots[token] / BLOCK, place = step.slots[token] % BLOCK;
        const int64_t base = (block * layer.kv_heads + head) * (dim / 2) * BLOCK;
        const auto* key = (const uint32_t*)((const bf16*)layer.key + token * layer.key_token +
                                            head * layer.key_head);
        uint32_t* column = (uint32_t*)layer.keys + base + place;
        for (int d = 0; d < dim / 2; ++d) column[d * BLOCK] = key[d];
        const bf16* value =
            (const bf16*)layer.value + token * layer.value_token + head * layer.value_head;
        uint32_t* pair = (uint32_t*)layer.values + base + place / 2 * dim;
        for (int d = 0; d < dim; ++d)
            pair[d] = place % 2 ? (pair[d] & 0xffff) | (uint32_t)value[d].bits << 16 : value[d].bits;
    }
}

struct alignas(64) Line { float numbers[LANES]; };

// The first position whose span a run looks at, and the one behind the last that it sees.
inline int begin(const Step& step, const Attention& layer, const int32_t* entry) {
    return sight(step, layer, entry[0], entry[3]).from / SPAN * SPAN;
}
inline int end_of(const Step& step, const Attention& layer, const int32_t* entry) {
    return sight(step, layer, entry[0], entry[3] + entry[2] - 1).until + 1;
}

Span span_of(const Step& step, const Attention& layer, int run, int head, int first) {
    const int32_t *entry = step.runs + run * 4, *table = step.tables + entry[0] * step.table_width;
    Span span;
    span.first = first;
    span.places = std::min(SPAN, end_of(step, layer, entry) - first);
    for (int b = 0; b < SPAN_BLOCKS; ++b) {
        const int64_t block = table[first / BLOCK + std::min(b, span.blocks() - 1)];
        const int64_t base = (block * layer.kv_heads + head) * (layer.dim / 2) * BLOCK;
        span.keys[b] = (const uint32_t*)layer.keys + base;
        span.values[b] = (const uint32_t*)layer.values + base;
    }
    return span;
}

// A run of tokens of one sequence, `num` of its key heads from `head` on and the query heads that
// share them. Row r of a head is token r / group. What comes next in memory is fetched ahead: the
// next head's keys, behind the last head those of the next span or run.
void attend_run(const Step& step, const Attention& layer, int run, int head, int num,
                float* scratch, Right& right) {
    const int32_t* entry = step.runs + run * 4;
    const int first_token = entry[1], end = end_of(step, layer, entry), dim = layer.dim;
    const int group = layer.heads / layer.kv_heads, count = entry[2] * group, all = num * count;
    float *out = scratch, *most = out + all * dim, *total = most + all;
    bf16* query = (bf16*)(total + all);
    static thread_local std::vector<Sight> seen;
    static thread_local std::vector<const float*> bias;
    seen.resize(all);
    bias.resize(all);
    for (int r = 0; r < all; ++r) {
        const int token = first_token + r % count / group;
        const int at = (head + r / count) * group + r % group;
        std::memcpy(query + r * dim,
                    (const bf16*)layer.query + token * layer.query_token + at * layer.query_head,
                    dim * sizeof(bf16));
        most[r] = layer.sinks ? layer.sinks[at] * LOG2_E : -INFINITY;
        total[r] = layer.sinks ? 1.0f : 0.0f;
        const int own = entry[3] + r % count / group;
        seen[r] = sight(step, layer, entry[0], own);
        bias[r] = bias_of(layer, at, own);
    }
    std::fill(out, out + all * dim, 0.0f);
    const int tiles = (count + TILE - 1) / TILE, after = std::min(run + 1, step.num_runs - 1);
    for (int first = begin(step, layer, entry); first < end; first += SPAN)
        for (int h = 0; h < num; ++h) {
            const Span span = span_of(step, layer, run, head + h, first);
            const Span next = h + 1 < num         ? span_of(step, layer, run, head + h + 1, first)
                              : first + SPAN < end ? span_of(step, layer, run, head, first + SPAN)
                                                   : span_of(step, layer, after, head,
                                                             begin(step, layer,
                                                                   step.runs + after * 4));
            for (int tile = 0; tile < tiles; ++tile) {
                const int row = count * tile / tiles, r = h * count + row;
                attend_tile(layer, span, tile ? nullptr : &next,
                            {query + r * dim, out + r * dim, most + r, total + r, &seen[r],
                             &bias[r], count * (tile + 1) / tiles - row});
            }
        }
    if (!right.take()) return;
    for (int r = 0; r < all; ++r) {
        const int64_t token = first_token + r % count / group;
        bf16* to = (bf16*)layer.out +
                   (token * layer.heads + (head + r / count) * group + r % group) * dim;
        for (int d = 0; d < dim; d += LANES)
            store(to + d, load(out + r * dim + d) * (1.0f / total[r]));
    }
}

}  // namespace

template <> void attend<bf16>(Member& member, const Step& step, const Attention& layer) {
    const bool one_each = step.num_runs == step.num_segments;
    // Many rows that decode: each with all heads, which lie one after the other.
    const bool whole = one_each && step.num_runs >= 4 * member.threads;
    const int num = whole ? layer.kv_heads : 1, parts = layer.kv_heads / num;
    static thread_local std::vector<Line> scratch;
    const size_t rows = (size_t)RUN * num * (layer.heads / layer.kv_heads);
    const size_t lines = rows * (layer.dim * 3 / 2 + 2) / LANES + 1;
    if (scratch.size() < lines) scratch.resize(lines);
    member.split_items(step.num_runs * layer.kv_heads, [&](int i) {
        keep(step, layer, i / layer.kv_heads, i % layer.kv_heads);
    });
    member.split(step.num_runs * parts, [&](int i, Right& right) {
        attend_run(step, layer, i / parts, i % parts * num, num, scratch[0].numbers, right);
    });
}
#endif
