// Layers of a decoder or an encoder over packed tokens, in bfloat16 or float32, for CPUs that
// multiply bfloat16: attention and a feed-forward part, each behind a norm, before one, or both, and
// added to what came in, with a norm of the sum or without.
//
// Sums are float32. Between the operations numbers are rounded to bfloat16 where transformers'
// own code does so. A weight is laid out in panels of WIDE outputs, [panel][input / 2][WIDE][2], in
// float32 [panel][input][WIDE]: a product walks a panel once for each ROWS rows, with all its sums
// in registers. Weights in int8 lie in fours, [panel][input / 4][WIDE][4], each 128 more than it
// means; for these each row of x is rounded to int8, too, by its largest number, and sums are exact.
//
// Memory is read ahead all along: a panel while the one before is used, also from product to
// product, and where many rows make a product long, the next layer's keys and values.

#include <array>
#include <type_traits>

#include "kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int WIDE = 2 * LANES;  // weights.py says the same
constexpr int ROWS = 12;         // 24 sums, 2 weights and a number from x: of 32 registers
constexpr int GROUP = 8 * ROWS;  // most rows of a piece, in all its panels together
constexpr int MOST_PANELS = 4;   // of a piece

struct Product {            // y = x W (+ bias), panels as above; weights.py mirrors it
    const uint32_t* weight;
    const void* bias;       // [outputs] of the numbers' type, or null
    const float* scale;     // [outputs] of weights in int8; null for others
    int32_t inputs, outputs;
};

inline float round_(float x) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_slli_epi32(
    _mm_cvtepu16_epi32((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x))), 16))); }
inline f32 round_(f32 x) {
    return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
}
// As numbers of this type are rounded: bfloat16, or not at all.
template <class T> inline f32 as(f32 x) { return x; }
template <> inline f32 as<bf16>(f32 x) { return round_(x); }
inline __mmask16 first_of(int count) {
    return count >= LANES ? 0xffff : (1u << std::max(count, 0)) - 1;
}
inline void put(bf16* to, f32 x, int count) {
    _mm256_mask_storeu_epi16(to, first_of(count), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
inline void put(float* to, f32 x, int count) {
    _mm512_mask_storeu_ps(to, first_of(count), (__m512)x);
}
inline f32 get(const bf16* from, int count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first_of(count), from);
    return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
inline f32 get(const float* from, int count) {
    return (f32)_mm512_maskz_loadu_ps(first_of(count), from);
}
// e^x within 2 units in the last place, for any x; infinite or 0 far out.
inline f32 exp_any(f32 x) {
    const __m512 n = _mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
    const f32 r = x - (f32)n * 0.693359375f + (f32)n * 2.12194440e-4f;
    f32 p = f32{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (f32)_mm512_scalef_ps((__m512)p, n);
}

enum Activation { SILU = 1, GELU_TANH = 2, GELU = 3, RELU = 4 };    // fused.py says the same

// The part of a normal distribution below x, within 2e-5: times x, within 5e-5 for any x.
inline f32 below(f32 x) {
    x = (f32)_mm512_min_ps(_mm512_set1_ps(4.25f), _mm512_max_ps(_mm512_set1_ps(-4.25f), (__m512)x));
    const f32 s = x * x;
    f32 p = f32{} + (5.34270044e-11f);
    p = p * s - 5.15736320e-09f;
    p = p * s + 2.20162113e-07f;
    p = p * s - 5.53628783e-06f;
    p = p * s + 9.25588721e-05f;
    p = p * s - 1.10390970e-03f;
    p = p * s + 9.80263388e-03f;
    p = p * s - 6.63273308e-02f;
    p = p * s + 3.98895905e-01f;
    return 0.5f + x * p;
}
// The same within 1e-7 (Abramowitz and Stegun, 7.1.26).
inline f32 below_exactly(f32 x) {
    const f32 z = (f32)_mm512_abs_ps((__m512)x) * 0.70710678f;
    const f32 t = 1.0f / (1.0f + 0.3275911f * z);
    f32 p = f32{} + 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    p = 0.5f * p * t * exp_any(-z * z);
    return x > 0 ? 1.0f - p : p;
}
template <class T> inline f32 activate(f32 x, int activation) {
    if (activation == RELU) return (f32)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x);
    if (activation == GELU)
        return as<T>(x * (sizeof(T) == sizeof(bf16) ? below(x) : below_exactly(x)));
    // both are x times a logistic function
    const f32 at = activation == SILU ? x : x * (1.59576912f + 0.0713548163f * x * x);
    return as<T>(x / (1.0f + exp_any(-at)));
}

// What becomes of the WIDE sums of a row, at its outputs from `first` on.
template <class T> inline void add_bias(const T* bias, int first, int count, f32& low, f32& high) {
    if (!bias) return;
    low += get(bias + first, count);
    high += get(bias + first + LANES, count - LANES);
}
template <class T> struct Plain {
    T* out; int64_t stride; const T* bias; int outputs;
    void operator()(int row, int first, f32 low, f32 high) const {
        const int count = outputs - first;
        add_bias(bias, first, count, low, high);
        put(out + row * stride + first, low, count);
        put(out + row * stride + first + LANES, high, count - LANES);
    }
};
template <class T> struct Added {   // to a residual, after a multiplication
    T* out; const T* residual; int64_t stride; const T* bias; int outputs; float times;
    void operator()(int row, int first, f32 low, f32 high) const {
        const int count = outputs - first;
        const int64_t at = row * stride + first;
        add_bias(bias, first, count, low, high);
        low = as<T>(as<T>(low) * times) + get(residual + at, count);
        high = as<T>(as<T>(high) * times) + get(residual + at + LANES, count - LANES);
        put(out + at, low, count);
        put(out + at + LANES, high, count - LANES);
    }
};
template <class T> struct Gated {   // a panel has LANES gates, then the LANES numbers they are for
    T* out; int64_t stride; const T* bias; int activation;
    void operator()(int row, int first, f32 gate, f32 up) const {
        add_bias(bias, first, WIDE, gate, up);
        put(out + row * stride + first / 2,
            activate<T>(as<T>(gate), activation) * as<T>(up), LANES);
    }
};
template <class T> struct Activated {
    T* out; int64_t stride; const T* bias; int activation;
    void operator()(int row, int first, f32 low, f32 high) const {
        add_bias(bias, first, WIDE, low, high);
        put(out + row * stride + first, activate<T>(as<T>(low), activation), LANES);
        put(out + row * stride + first + LANES, activate<T>(as<T>(high), activation), LANES);
    }
};

// How some neighbouring inputs in 32 bits are multiplied and added up.
struct Pairs {              // of bfloat16
    typedef __m512 Sum;
    static void more(Sum& sum, __m512i weight, const uint32_t* number) {
        sum = _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)_mm512_set1_epi32(*number));
    }
    static f32 value(Sum sum) { return (f32)sum; }
};
struct Singles {            // of float32
    typedef __m512 Sum;
    static void more(Sum& sum, __m512i weight, const uint32_t* number) {
        sum = _mm512_fmadd_ps((__m512)weight, (__m512)_mm512_set1_epi32(*number), sum);
    }
    static f32 value(Sum sum) { return (f32)sum; }
};
struct Fours {              // of int8, weights without sign
    typedef __m512i Sum;
    static void more(Sum& sum, __m512i weight, const uint32_t* number) {
#ifdef __AVX512VNNI__       // else nobody asks for it; as an intrinsic, GCC moves all sums around
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weight), "m"(*number));
#endif
    }
    static f32 value(Sum sum) { return (f32)_mm512_cvtepi32_ps(sum); }
};

// Where lines of memory begin that are wanted next, and how many pairs of them.
struct Lines { const uint32_t* from; int pairs; };

// done[COUNT] = COUNT rows of x times one panel; a step is 32 bits of each output's inputs.
template <class Kind, int COUNT_>
void block(const uint32_t* x, int64_t stride, const uint32_t* panel, Lines next, int steps,
           f32 (*done)[2]) {
    typename Kind::Sum sums[COUNT_][2];
#pragma GCC unroll 12
    for (int r = 0; r < COUNT_; ++r) sums[r][0] = sums[r][1] = typename Kind::Sum{};
    for (int k = 0; k < steps; ++k) {
        const __m512i low = _mm512_loadu_si512(panel + k * WIDE);
        const __m512i high = _mm512_loadu_si512(panel + k * WIDE + LANES);
        if (k < next.pairs) {
            _mm_prefetch((const char*)(next.from + k * WIDE), _MM_HINT_T1);
            _mm_prefetch((const char*)(next.from + k * WIDE + LANES), _MM_HINT_T1);
        }
#pragma GCC unroll 12
        for (int r = 0; r < COUNT_; ++r) {
            Kind::more(sums[r][0], low, x + r * stride + k);
            Kind::more(sums[r][1], high, x + r * stride + k);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < COUNT_; ++r) {
        done[r][0] = Kind::value(sums[r][0]);
        done[r][1] = Kind::value(sums[r][1]);
    }
}

template <class T> int steps_of(const Product& product) {
    return product.inputs * (product.scale ? 1 : (int)sizeof(T)) / 4;
}
inline int panels_of(const Product& product) { return (product.outputs + WIDE - 1) / WIDE; }

// Keys and values that a layer's attention will read, once each: this thread's part.
class Cached {
public:
    Cached() = default;
    Cached(const Step& step, const Attention& layer, int64_t block_bytes)
        : step(&step), layer(&layer), bytes(block_bytes), run(omp_get_thread_num()) { begin(); }

    Lines take(int most) {
        if (!step || run >= step->num_runs) return {nullptr, 0};
        const char* base = (const char*)(of_values ? layer->values : layer->keys);
        const int64_t id = step->tables[(int64_t)entry()[0] * step->table_width + block];
        const Lines found{(const uint32_t*)(base + id * bytes + done),
                          (int)std::min<int64_t>(most, (bytes - done) / PAIR)};
        done += found.pairs * PAIR;
        if (done + PAIR > bytes) go_on();
        return found;
    }

private:
    static constexpr int PAIR = 4 * WIDE;
    const Step* step = nullptr;
    const Attention* layer = nullptr;
    int64_t bytes = 0, done = 0;
    int run = 0, block = 0, last = 0;
    bool of_values = false;

    const int32_t* entry() const { return step->runs + run * 4; }
    void begin() {          // a sequence has its runs one after the other, and is read once
        while (run < step->num_runs && run && entry()[0] == entry()[-4])
            run += omp_get_num_threads();
        if (run >= step->num_runs) return;
        block = sight(*step, *layer, entry()[0], entry()[3]).from / BLOCK;
        last = entry()[3] / BLOCK;
    }
    void go_on() {
        done = 0;
        of_values = !of_values;
        if (of_values || ++block <= last) return;
        run += omp_get_num_threads();
        begin();
    }
};

// What is read behind a product's own panels.
struct Ahead { const Product* product; Cached* cached; };

// How a product is cut into pieces: all of some panels, or some rows of each.
struct Cut {
    int panels, groups;     // pieces in either direction
    Cut(int num_panels, int rows, int threads) {
        const int most = std::min(MOST_PANELS, std::max(1, GROUP / rows));
        const int even = threads * ((num_panels + most * threads - 1) / (most * threads));
        panels = std::min(num_panels, even);
        groups = (rows + GROUP - 1) / GROUP;
    }
    int pieces() const { return panels * groups; }
};

// A product: one phase.
template <class T, class Kind, class Finish>
void walk(Member& member, const Product& product, const uint32_t* x, int rows, const Ahead& ahead,
          const Finish& finish) {
    const int steps = steps_of<T>(product), panels = panels_of(product);
    const Cut cut(panels, rows, member.threads);
    const int last = member.share(panels, 1) - 1;
    member.split(cut.pieces(), [&](int piece, Right& right) {
        const int part = piece / cut.groups, group = piece % cut.groups;
        const int first = (int64_t)panels * part / cut.panels;
        const int end = (int64_t)panels * (part + 1) / cut.panels;
        const int row = (int64_t)rows * group / cut.groups;
        const int count = (int64_t)rows * (group + 1) / cut.groups - row;
        const int blocks = (count + ROWS - 1) / ROWS;
        f32 sums[GROUP][2], (*to)[2] = sums;
        for (int p = first; p < end; ++p, to += count) {
            const uint32_t* panel = product.weight + (int64_t)p * steps * WIDE;
            Lines next{panel + steps * WIDE, steps};
            if (p == last) {
                next.pairs = ahead.product ? std::min(steps, steps_of<T>(*ahead.product)) : 0;
                if (next.pairs)
                    next.from = ahead.product->weight +
                                (int64_t)member.share(panels_of(*ahead.product)) *
                                    steps_of<T>(*ahead.product) * WIDE;
            }
            for (int b = 0; b < blocks; ++b) {
                const int at = (int64_t)count * b / blocks;
                const int num = (int64_t)count * (b + 1) / blocks - at;
                const uint32_t* from = x + (int64_t)(row + at) * steps;
                if (b || group) next = ahead.cached ? ahead.cached->take(steps) : Lines{nullptr, 0};
#define CASE(N) case N: block<Kind, N>(from, steps, panel, next, steps, to + at); break;
                switch (num) {
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
                    CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
                }
            }
        }
        if (!right.take()) return;
        to = sums;
        for (int p = first; p < end; ++p, to += count)
            for (int r = 0; r < count; ++r) finish(row + r, p * WIDE, to[r][0], to[r][1]);
    });
}

struct Rounded {            // room for rows in int8, shared by all threads
    int8_t* numbers;
    float *scales, *offsets;  // [rows]; what 128 more in each weight adds to a row's sums
};

template <class Finish>
struct Scaled {             // sums of int8 become what they mean
    const float* scale; const Rounded& x; const Finish& finish;
    void operator()(int row, int first, f32 low, f32 high) const {
        low = (low - x.offsets[row]) * load(scale + first) * x.scales[row];
        high = (high - x.offsets[row]) * load(scale + first + LANES) * x.scales[row];
        finish(row, first, low, high);
    }
};

template <class T>
void round_rows(Member& member, const T* x, int rows, int inputs, const Rounded& rounded) {
    member.split_items(rows, [&](int row) {
        const T* from = x + (int64_t)row * inputs;
        __m512 most = _mm512_setzero_ps();
        f32 sum = {};       // NaN is not the largest of anything, but spoils a sum
        for (int i = 0; i < inputs; i += LANES) {
            most = _mm512_max_ps(_mm512_abs_ps((__m512)load(from + i)), most);
            sum += load(from + i);
        }
        const float largest = _mm512_reduce_max_ps(most), all = _mm512_reduce_add_ps((__m512)sum);
        const f32 to = f32{} + (largest > 0 ? 127.0f / largest : 0.0f);
        __m512i total = _mm512_setzero_si512();
        for (int i = 0; i < inputs; i += LANES) {
            const __m512i number = _mm512_cvtps_epi32((__m512)(load(from + i) * to));
            total = _mm512_add_epi32(total, number);
            _mm_storeu_si128((__m128i*)(rounded.numbers + (int64_t)row * inputs + i),
                             _mm512_cvtepi32_epi8(number));
        }
        rounded.scales[row] = all - all == 0 ? largest / 127.0f : NAN;
        rounded.offsets[row] = 128.0f * _mm512_reduce_add_epi32(total);
    });
}

// x [rows][inputs]
template <class T, class Finish>
void multiply(Member& member, const Product& product, const T* x, int rows,
              const Rounded& rounded, const Ahead& ahead, const Finish& finish) {
    typedef std::conditional_t<sizeof(T) == sizeof(bf16), Pairs, Singles> Kind;
    if (!product.scale)
        return walk<T, Kind>(member, product, (const uint32_t*)x, rows, ahead, finish);
    round_rows(member, x, rows, product.inputs, rounded);
    walk<T, Fours>(member, product, (const uint32_t*)rounded.numbers, rows, ahead,
                   Scaled<Finish>{product.scale, rounded, finish});
}

// Room for so many rows, until the next call in this thread.
Rounded room_for(int rows, int inputs) {
    static thread_local std::vector<float> room;
    const size_t needed = 2 * rows + (size_t)rows * inputs / 4;
    if (room.size() < needed) room.resize(needed);
    float* scales = room.data();
    return {(int8_t*)(scales + 2 * rows), scales, scales + rows};
}

struct Norm {               // fused.py mirrors it
    const float *gain, *bias;  // no gain: no norm; bias or null
    float eps;
    int32_t centred, rounds;   // whether the mean is taken away; bfloat16 before the gain?
};

// One row; `to` may be `from`. Added to a residual, if there is one, after a multiplication.
template <class T>
void normalise_row(const T* from, const Norm& norm, int width, T* to, const T* residual = nullptr,
                   float times = 1.0f) {
    f32 sum = {}, squares = {};
    if (norm.centred) for (int i = 0; i < width; i += LANES) sum += load(from + i);
    const float mean = _mm512_reduce_add_ps((__m512)sum) / width;
    for (int i = 0; i < width; i += LANES) { const f32 y = load(from + i) - mean; squares += y * y; }
    const float scale =
        1.0f / std::sqrt(_mm512_reduce_add_ps((__m512)squares) / width + norm.eps);
    for (int i = 0; i < width; i += LANES) {
        f32 y = (load(from + i) - mean) * scale;
        if (norm.rounds) y = as<T>(y);
        y *= load(norm.gain + i);
        if (norm.bias) y += load(norm.bias + i);
        if (residual) y = as<T>(as<T>(y) * times) + load(residual + i);
        put(to + i, y, LANES);
    }
}

template <class T>
void normalise(Member& member, const T* x, const Norm& norm, int rows, int width, T* out,
               const T* residual = nullptr, float times = 1.0f) {
    member.split_items(rows, [&](int row) {
        const int64_t at = (int64_t)row * width;
        normalise_row(x + at, norm, width, out + at, residual ? residual + at : nullptr, times);
    });
}

// Rotates the first dims of a head in place, their first half against their second.
template <class T> inline void rotate(T* head, int rotated, const T* cos, const T* sin) {
    const int half = rotated / 2;
    for (int d = 0; d < half; d += LANES) {
        T *left = head + d, *right = left + half;
        const f32 a = load(left), b = load(right);
        put(left, as<T>(a * load(cos + d)) - as<T>(b * load(sin + d)), LANES);
        put(right, as<T>(b * load(cos + d + half)) + as<T>(a * load(sin + d + half)), LANES);
    }
}

}  // namespace

extern "C" {

struct Layer {              // native.py mirrors it
    Product qkv, mixed, gated, down;
    Norm before_attention, after_attention, before_mlp, after_mlp, query, key;
    Norm attention_sum, mlp_sum;    // of what came in and what was added to it
    int32_t width, inner;
    int32_t rotated;        // dims of each head, from the first on; cos and sin are as wide
    int32_t across;         // whether queries and keys are normalised across all their heads
    int32_t activation, gates;  // gates: the activated numbers are for others
    int32_t place;          // in the cache
    float times;            // of what is added to a residual
    Attention attention;    // how; not of what
};

#ifdef __AVX512VNNI__
void has_int8() {}          // that it is there says that weights may be in int8
#endif
}

namespace {

// Queries and keys are made ready: normalised, if the layer does that, and rotated.
template <class T>
void turn(Member& member, const Layer& layer, T* qkv, int rows, const T* cos, const T* sin) {
    if (!layer.query.gain && !layer.key.gain && !layer.rotated) return;
    const int dim = layer.attention.dim, heads = layer.attention.heads;
    const int kv_heads = layer.attention.kv_heads, together = layer.across ? heads : 1;
    const int keys = layer.across ? kv_heads : 1;
    member.split_items(rows, [&](int row) {
        T *query = qkv + (int64_t)row * layer.qkv.outputs, *key = query + heads * dim;
        const int64_t at = (int64_t)row * layer.rotated;
        for (int h = 0; layer.query.gain && h < heads; h += together)
            normalise_row(query + h * dim, layer.query, together * dim, query + h * dim);
        for (int h = 0; layer.key.gain && h < kv_heads; h += keys)
            normalise_row(key + h * dim, layer.key, keys * dim, key + h * dim);
        for (int h = 0; h < heads + kv_heads; ++h)
            rotate(query + h * dim, layer.rotated, cos + at, sin + at);
    });
}

// out = sum_norm(residual + times * norm(x W (+ bias))), x [rows][inputs], out and residual
// [rows][width]
template <class T>
void add(Member& member, const Product& product, const Norm& norm, const Norm& sum_norm, const T* x,
         const T* residual, const Rounded& rounded, const Ahead& ahead, T* room, T* out, int rows,
         float times) {
    const int width = product.outputs;
    const T* bias = (const T*)product.bias;
    if (norm.gain) {
        multiply(member, product, x, rows, rounded, ahead, Plain<T>{room, width, bias, width});
        normalise(member, room, norm, rows, width, out, residual, times);
    } else {
        multiply(member, product, x, rows, rounded, ahead,
                 Added<T>{out, residual, width, bias, width, times});
    }
    if (sum_norm.gain) normalise(member, out, sum_norm, rows, width, out);
}

inline std::array<const Product*, 4> products_of(const Layer& layer) {
    return {&layer.qkv, &layer.mixed, &layer.gated, &layer.down};
}

// What layers write between their operations: of the widest of them.
template <class T> struct Room {
    T *normed, *qkv, *mixed, *gated;
    Rounded rounded;

    Room(const Layer* const* layers, int count, int rows) {
        size_t widths[4] = {};
        int inputs = 0;
        for (int l = 0; l < count; ++l) {
            const Layer& layer = *layers[l];
            const int own[4] = {layer.width, layer.qkv.outputs, layer.mixed.inputs, layer.inner};
            for (int i = 0; i < 4; ++i) widths[i] = std::max<size_t>(widths[i], own[i]);
            for (const Product* each : products_of(layer))
                if (each->scale) inputs = std::max(inputs, each->inputs);
        }
        static thread_local std::vector<T> room;
        const size_t needed = rows * (widths[0] + widths[1] + widths[2] + widths[3]);
        if (room.size() < needed) room.resize(needed);
        normed = room.data();
        qkv = normed + rows * widths[0];
        mixed = qkv + rows * widths[1];
        gated = mixed + rows * widths[2];
        rounded = room_for(rows, inputs);
    }
};

// One layer by all threads: x and out [rows][width], which may be the same; cos and sin
// [rows][rotated]. `next` is the layer behind it, or null.
template <class T>
void run_one(Member& member, const Step& step, const Layer& layer, const Attention& attention,
             const Layer* next, Cached& cached, const Room<T>& room, const T* x, const T* cos, const T* sin, T* out,
             int rows) {
    const int width = layer.width, qkv_width = layer.qkv.outputs;
    const Rounded& rounded = room.rounded;
    const auto prepared = [&](const Norm& norm, const T* from) {
        if (norm.gain) normalise(member, from, norm, rows, width, room.normed);
        return norm.gain ? room.normed : from;
    };
    multiply(member, layer.qkv, prepared(layer.before_attention, x), rows, rounded,
             Ahead{&layer.mixed, nullptr},
             Plain<T>{room.qkv, qkv_width, (const T*)layer.qkv.bias, qkv_width});
    turn(member, layer, room.qkv, rows, cos, sin);
    attend<T>(member, step, attention);
    add(member, layer.mixed, layer.after_attention, layer.attention_sum, room.mixed, x, rounded,
        Ahead{&layer.gated, &cached}, room.normed, out, rows, layer.times);
    const T* from = prepared(layer.before_mlp, out);
    const T* bias = (const T*)layer.gated.bias;
    const Ahead ahead{&layer.down, &cached};
    if (layer.gates)
        multiply(member, layer.gated, from, rows, rounded, ahead,
                 Gated<T>{room.gated, layer.inner, bias, layer.activation});
    else
        multiply(member, layer.gated, from, rows, rounded, ahead,
                 Activated<T>{room.gated, layer.inner, bias, layer.activation});
    add(member, layer.down, layer.after_mlp, layer.mlp_sum, room.gated, out, rounded,
        Ahead{next ? &next->qkv : nullptr, &cached}, room.normed, out, rows, layer.times);
}

// How a layer attends, with what is kept at its place.
template <class T>
Attention attention_of(const Layer& layer, const Attention* caches, const Room<T>& room) {
    Attention found = layer.attention;
    found.keys = caches[layer.place].keys;
    found.values = caches[layer.place].values;
    found.query = room.qkv;
    found.key = room.qkv + found.heads * found.dim;
    found.value = room.qkv + (found.heads + found.kv_heads) * found.dim;
    found.out = room.mixed;
    found.query_token = found.key_token = found.value_token = layer.qkv.outputs;
    found.query_head = found.key_head = found.value_head = found.dim;
    return found;
}

// Layers one after the other: x and out [rows][width], cos and sin [rows][rotated].
template <class T>
void run(const Step& step, const Layer* const* layers, int count, const Attention* caches,
         const T* x, const T* cos, const T* sin, T* out, int rows) {
    const Room<T> room(layers, count, rows);
    int pieces = 0;
    for (int l = 0; l < count; ++l) {
        pieces = std::max(pieces, step.num_runs * layers[l]->attention.kv_heads);
        for (const Product* each : products_of(*layers[l]))
            pieces = std::max(pieces, panels_of(*each) * (rows / GROUP + 1));
    }
    together(pieces, [&](Member& member) {
        for (int l = 0; l < count; ++l) {
            const Layer* next = l + 1 < count ? layers[l + 1] : nullptr;
            const Attention attention = attention_of(*layers[l], caches, room);
            const Attention later = next ? attention_of(*next, caches, room) : attention;
            const int64_t bytes = (int64_t)later.kv_heads * later.dim * BLOCK * sizeof(T);
            Cached cached = next ? Cached(step, later, bytes) : Cached();
            run_one(member, step, *layers[l], attention, next, cached, room, l ? out : x, cos, sin,
                    out, rows);
        }
    });
}

// out = x W (+ bias): x [rows][inputs], out [rows][outputs]
template <class T> void multiply_alone(const Product& product, const T* x, T* out, int rows) {
    const Plain<T> finish{out, product.outputs, (const T*)product.bias, product.outputs};
    const Rounded rounded = room_for(rows, product.scale ? product.inputs : 0);
    together(panels_of(product) * (rows / GROUP + 1), [&](Member& member) {
        multiply(member, product, x, rows, rounded, Ahead{nullptr, nullptr}, finish);
    });
}

}  // namespace

extern "C" {
#define OF_TYPE(T, NAME)                                                                     \
    void multiply_##NAME(const Product* product, const T* x, T* out, int32_t rows) {         \
        multiply_alone(*product, x, out, rows);                                              \
    }                                                                                        \
    void layers_##NAME(const Step* step, const Layer* const* layers, int32_t count,          \
                       const Attention* caches, const T* x, const T* cos, const T* sin, T* out, \
                       int32_t rows) {                                                       \
        run(*step, layers, count, caches, x, cos, sin, out, rows);                           \
    }
OF_TYPE(bf16, bfloat16)
OF_TYPE(float, float32)
}
#endif
