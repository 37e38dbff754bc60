// One decoder layer of the Llama kind over packed tokens, in bfloat16, for CPUs that multiply it.
//
// Sums are float32. Between the operations numbers are rounded to bfloat16 where transformers'
// own code does so. A weight is laid out in panels of WIDE outputs, [panel][input / 2][WIDE][2]:
// a product walks a panel once for each ROWS rows, with all its sums in registers.

#include "kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int WIDE = 2 * LANES;  // weights.py says the same
constexpr int ROWS = 12;         // 24 sums, 2 weights and a number from x: of 32 registers

struct Product {            // y = x W (+ bias), panels as above; weights.py mirrors it
    const uint32_t* weight;
    const bf16* bias;       // [outputs] or null
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

// What becomes of the WIDE sums of a row, at its outputs from `first` on.
struct Plain {
    bf16* out; int64_t stride; const bf16* bias; int outputs;
    void operator()(int row, int first, f32 low, f32 high) const {
        const int count = outputs - first;
        if (bias) { low += get(bias + first, count); high += get(bias + first + LANES, count - LANES); }
        put(out + row * stride + first, low, count);
        put(out + row * stride + first + LANES, high, count - LANES);
    }
};
struct Added {              // to a residual
    bf16* out; const bf16* residual; int64_t stride; const bf16* bias; int outputs;
    void operator()(int row, int first, f32 low, f32 high) const {
        const int count = outputs - first;
        const int64_t at = row * stride + first;
        if (bias) { low += get(bias + first, count); high += get(bias + first + LANES, count - LANES); }
        put(out + at, round_(low) + get(residual + at, count), count);
        put(out + at + LANES, round_(high) + get(residual + at + LANES, count - LANES), count - LANES);
    }
};
struct Gated {              // a panel has LANES gates, then the LANES numbers they are for
    bf16* out; int64_t stride;
    void operator()(int row, int first, f32 gate, f32 up) const {
        gate = round_(gate);
        put(out + row * stride + first / 2, round_(gate / (1.0f + exp_any(-gate))) * round_(up), LANES);
    }
};

// COUNT rows of x times one panel.
template <int COUNT_, class Finish>
void block(const uint32_t* x, int64_t stride, const uint32_t* panel, const uint32_t* next,
           int pairs, int row, int first, const Finish& finish) {
    __m512 sums[COUNT_][2];
    for (int r = 0; r < COUNT_; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int k = 0; k < pairs; ++k) {
        const __m512bh low = (__m512bh)_mm512_loadu_si512(panel + k * WIDE);
        const __m512bh high = (__m512bh)_mm512_loadu_si512(panel + k * WIDE + LANES);
        if (next) {         // each panel is fetched while the one before it is used
            _mm_prefetch((const char*)(next + k * WIDE), _MM_HINT_T1);
            _mm_prefetch((const char*)(next + k * WIDE + LANES), _MM_HINT_T1);
        }
#pragma GCC unroll 12
        for (int r = 0; r < COUNT_; ++r) {
            const __m512bh number = (__m512bh)_mm512_set1_epi32(x[r * stride + k]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], low, number);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], high, number);
        }
    }
    for (int r = 0; r < COUNT_; ++r) finish(row + r, first, (f32)sums[r][0], (f32)sums[r][1]);
}

// Panels shared out among the threads of the parallel region. Waits for nobody at its end.
template <class Finish>
void multiply(const Product& product, const bf16* x, int64_t stride, int rows,
              const Finish& finish) {
    const int pairs = product.inputs / 2, panels = (product.outputs + WIDE - 1) / WIDE;
    const int blocks = (rows + ROWS - 1) / ROWS;
#pragma omp for schedule(static) nowait
    for (int p = 0; p < panels; ++p) {
        const uint32_t* panel = product.weight + (int64_t)p * pairs * WIDE;
        for (int b = 0; b < blocks; ++b) {
            const int row = (int64_t)rows * b / blocks, count = (int64_t)rows * (b + 1) / blocks - row;
            const uint32_t* from = (const uint32_t*)(x + row * stride);
            const uint32_t* next = b == 0 && p + 1 < panels ? panel + pairs * WIDE : nullptr;
#define CASE(N) case N: block<N>(from, stride / 2, panel, next, pairs, row, p * WIDE, finish); break;
            switch (count) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
                CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
            }
        }
    }
}

void normalise(const bf16* x, const bf16* weight, float eps, int rows, int width, bf16* out) {
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) {
        const bf16* from = x + (int64_t)row * width;
        f32 squares = {};
        for (int i = 0; i < width; i += LANES) { const f32 y = load(from + i); squares += y * y; }
        const float scale = 1.0f / std::sqrt(_mm512_reduce_add_ps((__m512)squares) / width + eps);
        for (int i = 0; i < width; i += LANES)
            put(out + (int64_t)row * width + i, round_(load(from + i) * scale) * load(weight + i), LANES);
    }
}

// Rotates the heads of each row in place, first half against second half.
void rotate(bf16* x, int64_t stride, int rows, int heads, int dim, const bf16* cos, const bf16* sin) {
    const int half = dim / 2;
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row)
        for (int head = 0; head < heads; ++head)
            for (int d = 0; d < half; d += LANES) {
                bf16 *left = x + row * stride + head * dim + d, *right = left + half;
                const bf16 *c = cos + (int64_t)row * dim + d, *s = sin + (int64_t)row * dim + d;
                const f32 a = load(left), b = load(right);
                put(left, round_(a * load(c)) - round_(b * load(s)), LANES);
                put(right, round_(b * load(c + half)) + round_(a * load(s + half)), LANES);
            }
}

}  // namespace

extern "C" {

struct Decoder {            // a layer; fused.py mirrors it
    Product qkv, mixed, gated, down;
    const bf16 *attention_norm, *mlp_norm;
    float attention_eps, mlp_eps;
    int32_t width, inner;
    Attention attention;    // but for query, key, value, out and their strides
};

// out = x W (+ bias): x [rows][inputs], out [rows][outputs]
void multiply_bfloat16(const Product* product, const bf16* x, bf16* out, int32_t rows) {
    const Plain finish{out, product->outputs, product->bias, product->outputs};
#pragma omp parallel
    multiply(*product, x, product->inputs, rows, finish);
}

// x and out [rows][width], not the same; cos and sin [rows][dim].
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
    const int heads = attention.heads + attention.kv_heads;
#pragma omp parallel
    {
        normalise(x, layer->attention_norm, layer->attention_eps, rows, width, normed);
        multiply(layer->qkv, normed, width, rows, Plain{qkv, qkv_width, layer->qkv.bias, qkv_width});
#pragma omp barrier
        rotate(qkv, qkv_width, rows, heads, dim, cos, sin);
        attend<bf16>(*step, attention);
#pragma omp barrier
        multiply(layer->mixed, mixed, mixed_width, rows,
                 Added{out, x, width, layer->mixed.bias, width});
#pragma omp barrier
        normalise(out, layer->mlp_norm, layer->mlp_eps, rows, width, normed);
        multiply(layer->gated, normed, width, rows, Gated{gated, inner});
#pragma omp barrier
        multiply(layer->down, gated, inner, rows, Added{out, out, width, layer->down.bias, width});
    }
}
}
#endif
