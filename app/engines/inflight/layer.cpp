// One decoder layer over packed tokens, in bfloat16, for CPUs that multiply it: attention and a
// feed-forward part, each behind a norm, before one, or both, and added to what came in.
//
// Sums are float32. Between the operations numbers are rounded to bfloat16 where transformers'
// own code does so. A weight is laid out in panels of WIDE outputs, [panel][input / 2][WIDE][2]:
// a product walks a panel once for each ROWS rows, with all its sums in registers. Weights in int8
// lie in fours, [panel][input / 4][WIDE][4], each 128 more than it means; for these each row of x is
// rounded to int8, too, by its largest number, and sums are exact.

#include <initializer_list>

#include "kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int WIDE = 2 * LANES;  // weights.py says the same
constexpr int ROWS = 12;         // 24 sums, 2 weights and a number from x: of 32 registers

struct Product {            // y = x W (+ bias), panels as above; weights.py mirrors it
    const uint32_t* weight;
    const bf16* bias;       // [outputs] or null
    const float* scale;     // [outputs] of weights in int8; null for bfloat16
    int32_t inputs, outputs;
};

inline float round_(float x) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_slli_epi32(
    _mm_cvtepu16_epi32((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x))), 16))); }
inline f32 round_(f32 x) {
    return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
}
inline void put(bf16* to, f32 x, int count) {
    const __mmask16 mask = count >= LANES ? 0xffff : (1u << std::max(count, 0)) - 1;
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
inline f32 get(const bf16* from, int count) {
    const __mmask16 mask = count >= LANES ? 0xffff : (1u << std::max(count, 0)) - 1;
    return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
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

enum Activation { SILU = 1, GELU = 2 };     // fused.py says the same; GELU by its tanh formula

inline f32 activate(f32 x, int activation) {
    // both are x times a logistic function
    const f32 at = activation == SILU ? x : x * (1.59576912f + 0.0713548163f * x * x);
    return round_(x / (1.0f + exp_any(-at)));
}

// What becomes of the WIDE sums of a row, at its outputs from `first` on.
inline void add_bias(const bf16* bias, int first, int count, f32& low, f32& high) {
    if (!bias) return;
    low += get(bias + first, count);
    high += get(bias + first + LANES, count - LANES);
}
struct Plain {
    bf16* out; int64_t stride; const bf16* bias; int outputs;
    void operator()(int row, int first, f32 low, f32 high) const {
        const int count = outputs - first;
        add_bias(bias, first, count, low, high);
        put(out + row * stride + first, low, count);
        put(out + row * stride + first + LANES, high, count - LANES);
    }
};
struct Added {              // to a residual, after a multiplication
    bf16* out; const bf16* residual; int64_t stride; const bf16* bias; int outputs; float times;
    void operator()(int row, int first, f32 low, f32 high) const {
        const int count = outputs - first;
        const int64_t at = row * stride + first;
        add_bias(bias, first, count, low, high);
        low = round_(round_(low) * times) + get(residual + at, count);
        high = round_(round_(high) * times) + get(residual + at + LANES, count - LANES);
        put(out + at, low, count);
        put(out + at + LANES, high, count - LANES);
    }
};
struct Gated {              // a panel has LANES gates, then the LANES numbers they are for
    bf16* out; int64_t stride; const bf16* bias; int activation;
    void operator()(int row, int first, f32 gate, f32 up) const {
        add_bias(bias, first, WIDE, gate, up);
        put(out + row * stride + first / 2, activate(round_(gate), activation) * round_(up), LANES);
    }
};
struct Activated {
    bf16* out; int64_t stride; const bf16* bias; int activation;
    void operator()(int row, int first, f32 low, f32 high) const {
        add_bias(bias, first, WIDE, low, high);
        put(out + row * stride + first, activate(round_(low), activation), LANES);
        put(out + row * stride + first + LANES, activate(round_(high), activation), LANES);
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
struct Fours {              // of int8, weights without sign
    typedef __m512i Sum;
    static void more(Sum& sum, __m512i weight, const uint32_t* number) {
#ifdef __AVX512VNNI__       // else nobody asks for it; as an intrinsic, GCC moves all sums around
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weight), "m"(*number));
#endif
    }
    static f32 value(Sum sum) { return (f32)_mm512_cvtepi32_ps(sum); }
};

// COUNT rows of x times one panel; a step is 32 bits of each output's inputs.
template <class Kind, int COUNT_, class Finish>
void block(const uint32_t* x, int64_t stride, const uint32_t* panel, const uint32_t* next,
           int steps, int row, int first, const Finish& finish) {
    typename Kind::Sum sums[COUNT_][2];
#pragma GCC unroll 12
    for (int r = 0; r < COUNT_; ++r) sums[r][0] = sums[r][1] = typename Kind::Sum{};
    for (int k = 0; k < steps; ++k) {
        const __m512i low = _mm512_loadu_si512(panel + k * WIDE);
        const __m512i high = _mm512_loadu_si512(panel + k * WIDE + LANES);
        if (next) {         // each panel is fetched while the one before it is used
            _mm_prefetch((const char*)(next + k * WIDE), _MM_HINT_T1);
            _mm_prefetch((const char*)(next + k * WIDE + LANES), _MM_HINT_T1);
        }
#pragma GCC unroll 12
        for (int r = 0; r < COUNT_; ++r) {
            Kind::more(sums[r][0], low, x + r * stride + k);
            Kind::more(sums[r][1], high, x + r * stride + k);
        }
    }
    f32 done[COUNT_][2];    // apart, or the compiler would keep the sums in memory
#pragma GCC unroll 12
    for (int r = 0; r < COUNT_; ++r) {
        done[r][0] = Kind::value(sums[r][0]);
        done[r][1] = Kind::value(sums[r][1]);
    }
    for (int r = 0; r < COUNT_; ++r) finish(row + r, first, done[r][0], done[r][1]);
}

// Panels shared out among the threads of the parallel region. Waits for nobody at its end.
template <class Kind, class Finish>
void walk(const Product& product, const uint32_t* x, int steps, int rows, const Finish& finish) {
    const int panels = (product.outputs + WIDE - 1) / WIDE, blocks = (rows + ROWS - 1) / ROWS;
#pragma omp for schedule(static) nowait
    for (int p = 0; p < panels; ++p) {
        const uint32_t* panel = product.weight + (int64_t)p * steps * WIDE;
        for (int b = 0; b < blocks; ++b) {
            const int row = (int64_t)rows * b / blocks, count = (int64_t)rows * (b + 1) / blocks - row;
            const uint32_t* from = x + (int64_t)row * steps;
            const uint32_t* next = b == 0 && p + 1 < panels ? panel + steps * WIDE : nullptr;
#define CASE(N) \
    case N: block<Kind, N>(from, steps, panel, next, steps, row, p * WIDE, finish); break;
            switch (count) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
                CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
            }
        }
    }
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

void round_rows(const bf16* x, int rows, int inputs, const Rounded& rounded) {
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) {
        const bf16* from = x + (int64_t)row * inputs;
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
    }
}

// x [rows][inputs]
template <class Finish>
void multiply(const Product& product, const bf16* x, int rows, const Rounded& rounded,
              const Finish& finish) {
    if (!product.scale)
        return walk<Pairs>(product, (const uint32_t*)x, product.inputs / 2, rows, finish);
    round_rows(x, rows, product.inputs, rounded);
    walk<Fours>(product, (const uint32_t*)rounded.numbers, product.inputs / 4, rows,
                Scaled<Finish>{product.scale, rounded, finish});
}

// Room for the rows of the largest of some products, until the next call in this thread.
Rounded room_for(int rows, std::initializer_list<const Product*> products) {
    static thread_local std::vector<float> room;
    int64_t inputs = 0;
    for (const Product* each : products)
        if (each->scale) inputs = std::max<int64_t>(inputs, each->inputs);
    const size_t needed = 2 * rows + rows * inputs / 4;
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
void normalise_row(const bf16* from, const Norm& norm, int width, bf16* to,
                   const bf16* residual = nullptr, float times = 1.0f) {
    f32 sum = {}, squares = {};
    if (norm.centred) for (int i = 0; i < width; i += LANES) sum += load(from + i);
    const float mean = _mm512_reduce_add_ps((__m512)sum) / width;
    for (int i = 0; i < width; i += LANES) { const f32 y = load(from + i) - mean; squares += y * y; }
    const float scale =
        1.0f / std::sqrt(_mm512_reduce_add_ps((__m512)squares) / width + norm.eps);
    for (int i = 0; i < width; i += LANES) {
        f32 y = (load(from + i) - mean) * scale;
        if (norm.rounds) y = round_(y);
        y *= load(norm.gain + i);
        if (norm.bias) y += load(norm.bias + i);
        if (residual) y = round_(round_(y) * times) + load(residual + i);
        put(to + i, y, LANES);
    }
}

void normalise(const bf16* x, const Norm& norm, int rows, int width, bf16* out,
               const bf16* residual = nullptr, float times = 1.0f) {
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) {
        const int64_t at = (int64_t)row * width;
        normalise_row(x + at, norm, width, out + at, residual ? residual + at : nullptr, times);
    }
}

// Rotates the first dims of a head in place, their first half against their second.
inline void rotate(bf16* head, int rotated, const bf16* cos, const bf16* sin) {
    const int half = rotated / 2;
    for (int d = 0; d < half; d += LANES) {
        bf16 *left = head + d, *right = left + half;
        const f32 a = load(left), b = load(right);
        put(left, round_(a * load(cos + d)) - round_(b * load(sin + d)), LANES);
        put(right, round_(b * load(cos + d + half)) + round_(a * load(sin + d + half)), LANES);
    }
}

}  // namespace

extern "C" {

struct Decoder {            // a layer; fused.py mirrors it
    Product qkv, mixed, gated, down;
    Norm before_attention, after_attention, before_mlp, after_mlp, query, key;
    int32_t width, inner;
    int32_t rotated;        // dims of each head, from the first on; cos and sin are as wide
    int32_t across;         // whether queries and keys are normalised across all their heads
    int32_t activation, gates;  // gates: the activated numbers are for others
    float times;            // of what is added to a residual
    Attention attention;    // but for query, key, value, out and their strides
};

#ifdef __AVX512VNNI__
void has_int8() {}          // that it is there says that weights may be in int8
#endif

// out = x W (+ bias): x [rows][inputs], out [rows][outputs]
void multiply_bfloat16(const Product* product, const bf16* x, bf16* out, int32_t rows) {
    const Plain finish{out, product->outputs, product->bias, product->outputs};
    const Rounded rounded = room_for(rows, {product});
#pragma omp parallel
    multiply(*product, x, rows, rounded, finish);
}

// Queries and keys are made ready: normalised, if the layer does that, and rotated.
static void turn(const Decoder& layer, bf16* qkv, int rows, const bf16* cos, const bf16* sin) {
    const int dim = layer.attention.dim, heads = layer.attention.heads;
    const int kv_heads = layer.attention.kv_heads, together = layer.across ? heads : 1;
    const int keys = layer.across ? kv_heads : 1;
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) {
        bf16 *query = qkv + (int64_t)row * layer.qkv.outputs, *key = query + heads * dim;
        const int64_t at = (int64_t)row * layer.rotated;
        for (int h = 0; layer.query.gain && h < heads; h += together)
            normalise_row(query + h * dim, layer.query, together * dim, query + h * dim);
        for (int h = 0; layer.key.gain && h < kv_heads; h += keys)
            normalise_row(key + h * dim, layer.key, keys * dim, key + h * dim);
        for (int h = 0; h < heads + kv_heads; ++h)
            rotate(query + h * dim, layer.rotated, cos + at, sin + at);
    }
}

// out = residual + times * norm(x W (+ bias)): x [rows][inputs], out and residual [rows][width]
static void add(const Product& product, const Norm& norm, const bf16* x, const bf16* residual,
                const Rounded& rounded, bf16* room, bf16* out, int rows, float times) {
    const int width = product.outputs;
    if (norm.gain) {
        multiply(product, x, rows, rounded, Plain{room, width, product.bias, width});
#pragma omp barrier
        normalise(room, norm, rows, width, out, residual, times);
    } else {
        multiply(product, x, rows, rounded,
                 Added{out, residual, width, product.bias, width, times});
#pragma omp barrier
    }
}

// x and out [rows][width], not the same; cos and sin [rows][rotated].
void decode_bfloat16(const Step* step, const Decoder* layer, const bf16* x, const bf16* cos,
                     const bf16* sin, bf16* out, int32_t rows) {
    Attention attention = layer->attention;
    const int dim = attention.dim, width = layer->width, inner = layer->inner;
    const int mixed_width = attention.heads * dim, qkv_width = layer->qkv.outputs;
    static thread_local std::vector<bf16> room;
    const size_t needed = (size_t)rows * (width + qkv_width + mixed_width + inner);
    if (room.size() < needed) room.resize(needed);
    bf16 *normed = room.data(), *qkv = normed + (size_t)rows * width;
    bf16 *mixed = qkv + (size_t)rows * qkv_width, *gated = mixed + (size_t)rows * mixed_width;
    attention.query = qkv;
    attention.key = qkv + mixed_width;
    attention.value = qkv + mixed_width + attention.kv_heads * dim;
    attention.out = mixed;
    attention.query_token = attention.key_token = attention.value_token = qkv_width;
    attention.query_head = attention.key_head = attention.value_head = dim;
    const Rounded rounded =
        room_for(rows, {&layer->qkv, &layer->mixed, &layer->gated, &layer->down});
    const auto prepared = [&](const Norm& norm, const bf16* from) {
        if (norm.gain) normalise(from, norm, rows, width, normed);
        return norm.gain ? normed : from;
    };
#pragma omp parallel
    {
        multiply(layer->qkv, prepared(layer->before_attention, x), rows, rounded,
                 Plain{qkv, qkv_width, layer->qkv.bias, qkv_width});
#pragma omp barrier
        turn(*layer, qkv, rows, cos, sin);
        attend<bf16>(*step, attention);
#pragma omp barrier
        add(layer->mixed, layer->after_attention, mixed, x, rounded, normed, out, rows,
            layer->times);
        const bf16* from = prepared(layer->before_mlp, out);
        const bf16* bias = layer->gated.bias;
        if (layer->gates)
            multiply(layer->gated, from, rows, rounded,
                     Gated{gated, inner, bias, layer->activation});
        else
            multiply(layer->gated, from, rows, rounded,
                     Activated{gated, inner, bias, layer->activation});
#pragma omp barrier
        add(layer->down, layer->after_mlp, gated, out, rounded, normed, out, rows, layer->times);
    }
}
}
#endif
