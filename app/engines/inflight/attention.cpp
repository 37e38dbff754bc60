// Attention of packed tokens over a paged KV cache, for CPUs.
//
// Keys lie as [block, head, dim, place] and values as [block, head, place, dim], so that both
// products run along contiguous memory: scores over the places of a block, outputs over the dims.
// The arithmetic is float32 whatever the cache holds.

#include "kernels.h"

namespace {

constexpr int MOST = LANES == 8 ? 2 : 4;    // vectors of four rows: AVX2 has 16 registers in all
constexpr int ABREAST = std::min(VECS, MOST);

// scores[ROWS][BLOCK] = query[ROWS][dim] x keys[dim][BLOCK]
template <int ROWS, class T>
void score(const float* query, int dim, const T* keys, float* scores) {
    for (int place = 0; place < BLOCK; place += ABREAST * LANES) {
        f32 sum[ROWS][ABREAST] = {};
        for (int d = 0; d < dim; ++d)
            for (int v = 0; v < ABREAST; ++v) {
                f32 key = load(keys + d * BLOCK + place + v * LANES);
                for (int r = 0; r < ROWS; ++r) sum[r][v] += key * query[r * dim + d];
            }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < ABREAST; ++v)
                store(scores + r * BLOCK + place + v * LANES, sum[r][v]);
    }
}

// out[ROWS][dim] = out * shrink + weights[ROWS][places] x values[places][dim], WIDE vectors of dims
template <int ROWS, int WIDE, class T>
void mix(const float* weights, const float* shrink, int places, const T* values, int dim,
         float* out) {
    f32 sum[ROWS][WIDE];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < WIDE; ++v) sum[r][v] = load(out + r * dim + v * LANES) * shrink[r];
    for (int t = 0; t < places; ++t)
        for (int v = 0; v < WIDE; ++v) {
            f32 value = load(values + t * dim + v * LANES);
            for (int r = 0; r < ROWS; ++r) sum[r][v] += value * weights[r * BLOCK + t];
        }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < WIDE; ++v) store(out + r * dim + v * LANES, sum[r][v]);
}

template <int ROWS, class T>
void mix_all(const float* weights, const float* shrink, int places, const T* values, int dim,
             float* out) {
    int d = 0;
    for (; d + MOST * LANES <= dim; d += MOST * LANES)
        mix<ROWS, MOST>(weights, shrink, places, values + d, dim, out + d);
    for (; d < dim; d += LANES)
        mix<ROWS, 1>(weights, shrink, places, values + d, dim, out + d);
}

// Runs f<4>, f<3>, f<2> or f<1> over the rows, so that each has its sums in registers.
#define BY_ROWS(rows, CALL)                                     \
    for (int r = 0; r < (rows);) switch (std::min(4, (rows) - r)) { \
        case 4: CALL(4); r += 4; break;                         \
        case 3: CALL(3); r += 3; break;                         \
        case 2: CALL(2); r += 2; break;                         \
        default: CALL(1); r += 1; }

// The keys and values of a run's tokens, of one head, go to their places in the cache.
template <class T>
void keep(const Step& step, const Attention& layer, int run, int head) {
    const int32_t* entry = step.runs + run * 4;
    for (int token = entry[1]; token < entry[1] + entry[2]; ++token) {
        const int64_t block = step.slots[token] / BLOCK, place = step.slots[token] % BLOCK;
        const int64_t base = (block * layer.kv_heads + head) * layer.dim * BLOCK;
        const T* key = (const T*)layer.key + token * layer.key_token + head * layer.key_head;
        const T* value =
            (const T*)layer.value + token * layer.value_token + head * layer.value_head;
        T* column = (T*)layer.keys + base + place;
        for (int d = 0; d < layer.dim; ++d) column[d * BLOCK] = key[d];
        std::memcpy((T*)layer.values + base + place * layer.dim, value, layer.dim * sizeof(T));
    }
}

// Rows of one block: how much the running sums shrink, and the new weights in place of the scores.
// Row r of a run is token r / group of the run, for query head `head` + r % group.
void weigh(const Step& step, const Attention& layer, const int32_t* entry, int head, int first,
           float* scores, float* most, float* total, float* shrink) {
    const f32 none = f32{} - INFINITY;
    const int group = layer.heads / layer.kv_heads, rows = entry[2] * group;
    for (int r = 0; r < rows; ++r) {
        const int own = entry[3] + r / group;
        const Sight seen = sight(step, layer, entry[0], own);
        const int from = seen.from - first, until = seen.until - first;
        const float* bias = bias_of(layer, head + r % group, own);
        f32 row[VECS], high = none;
        for (int v = 0; v < VECS; ++v) {
            row[v] = load(scores + r * BLOCK + v * LANES);
            if (layer.softcap > 0)
                for (int i = 0; i < LANES; ++i)
                    row[v][i] = layer.softcap * std::tanh(row[v][i] / layer.softcap);
            if (bias) row[v] += load(bias + first + v * LANES);
            const i32 place = COUNT + v * LANES;
            row[v] = (place < from) | (place > until) ? none : row[v];
            high = row[v] > high ? row[v] : high;
        }
        const float top = std::max(most[r], largest(high));
        shrink[r] = top == most[r] ? 1.0f : std::exp(most[r] - top);
        f32 sum = {};
        for (int v = 0; v < VECS; ++v) {
            f32 weight = top == -INFINITY ? f32{} : exp_(row[v] - top);
            store(scores + r * BLOCK + v * LANES, weight);
            sum += weight;
        }
        total[r] = total[r] * shrink[r] + total_of(sum);
        most[r] = top;
    }
}

// One run of tokens of one sequence, one key head and the query heads that share it.
template <class T>
void attend_run(const Step& step, const Attention& layer, int run, int head, float* scratch,
                Right& right) {
    const int32_t *entry = step.runs + run * 4, *table = step.tables + entry[0] * step.table_width;
    const int first_token = entry[1], tokens = entry[2], position = entry[3];
    const int dim = layer.dim, group = layer.heads / layer.kv_heads, rows = tokens * group;
    float *query = scratch, *out = query + rows * dim, *scores = out + rows * dim;
    float *most = scores + rows * BLOCK, *total = most + rows, *shrink = total + rows;
    for (int r = 0; r < rows; ++r) {
        const T* from = (const T*)layer.query + (first_token + r / group) * layer.query_token +
                        (head * group + r % group) * layer.query_head;
        for (int d = 0; d < dim; ++d) query[r * dim + d] = widen(from[d]) * layer.scale;
        most[r] = layer.sinks ? layer.sinks[head * group + r % group] : -INFINITY;
        total[r] = layer.sinks ? 1.0f : 0.0f;
    }
    std::fill(out, out + rows * dim, 0.0f);
    const int last = sight(step, layer, entry[0], position + tokens - 1).until;
    const int begin = sight(step, layer, entry[0], position).from / BLOCK;
    for (int b = begin; b * BLOCK <= last; ++b) {
        const int64_t base = ((int64_t)table[b] * layer.kv_heads + head) * dim * BLOCK;
        const T *keys = (const T*)layer.keys + base, *values = (const T*)layer.values + base;
        const int places = std::min(BLOCK, last - b * BLOCK + 1);
#define SCORE(N) score<N>(query + r * dim, dim, keys, scores + r * BLOCK)
        BY_ROWS(rows, SCORE)
        weigh(step, layer, entry, head * group, b * BLOCK, scores, most, total, shrink);
#define MIX(N) mix_all<N>(scores + r * BLOCK, shrink + r, places, values, dim, out + r * dim)
        BY_ROWS(rows, MIX)
    }
    if (!right.take()) return;
    for (int r = 0; r < rows; ++r) {
        T* to = (T*)layer.out + ((int64_t)(first_token + r / group) * layer.heads +
                                 head * group + r % group) * dim;
        for (int d = 0; d < dim; d += LANES)
            store(to + d, load(out + r * dim + d) * (1.0f / total[r]));
    }
}

}  // namespace

template <class T>
void attend(Member& member, const Step& step, const Attention& layer) {
    const int group = layer.heads / layer.kv_heads;
    const size_t rows = RUN * group, room = rows * (2 * layer.dim + BLOCK + 3);
    static thread_local std::vector<float> scratch;
    if (scratch.size() < room) scratch.resize(room);
    const int heads = layer.kv_heads;
    member.split_items(step.num_runs * heads,
                       [&](int i) { keep<T>(step, layer, i / heads, i % heads); });
    member.split(step.num_runs * heads, [&](int i, Right& right) {
        attend_run<T>(step, layer, i / heads, i % heads, scratch.data(), right);
    });
}

template void attend<float>(Member&, const Step&, const Attention&);
#ifndef __AVX512BF16__     // else attention_bfloat16.cpp does it
template void attend<bf16>(Member&, const Step&, const Attention&);
#endif

template <class T> void attend_alone(const Step& step, const Attention& layer) {
    together(step.num_runs * layer.kv_heads,
             [&](Member& member) { attend<T>(member, step, layer); });
}
extern "C" void attend_float32(const Step* step, const Attention* layer) {
    attend_alone<float>(*step, *layer);
}
extern "C" void attend_bfloat16(const Step* step, const Attention* layer) {
    attend_alone<bf16>(*step, *layer);
}
