// What the kernels share: vectors, the types they are kept in, and how attention is asked for.
//
// Vectors are GCC's portable extension: the compiler maps them to whatever the machine has.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "crew.h"

struct bf16 { uint16_t bits; };

namespace {

// Numbers of one vector of this machine.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BLOCK = 32;         // tokens of a block; cache.py says the same
constexpr int VECS = BLOCK / LANES;
constexpr int RUN = 16;           // most tokens of one run; native.py says the same

typedef float f32 __attribute__((vector_size(LANES * 4)));
typedef int32_t i32 __attribute__((vector_size(LANES * 4)));
typedef uint32_t u32 __attribute__((vector_size(LANES * 4)));
typedef uint16_t u16 __attribute__((vector_size(LANES * 2)));

#if defined(__AVX512F__)
const i32 COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX__)
const i32 COUNT = {0, 1, 2, 3, 4, 5, 6, 7};
#else
const i32 COUNT = {0, 1, 2, 3};
#endif

inline f32 load(const float* from) { f32 x; std::memcpy(&x, from, sizeof x); return x; }
inline f32 load(const bf16* from) {
    u16 x; std::memcpy(&x, from, sizeof x);
    return (f32)(__builtin_convertvector(x, u32) << 16);
}
inline void store(float* to, f32 x) { std::memcpy(to, &x, sizeof x); }
#ifdef __AVX512BF16__
inline void store(bf16* to, f32 x) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#else
inline void store(bf16* to, f32 x) {
    u32 bits = (u32)x;
    u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;   // to nearest, ties to even
    u32 quiet = (bits >> 16) | 0x40;
    u16 y = __builtin_convertvector((u32)(x == x ? (f32)rounded : (f32)quiet), u16);
    std::memcpy(to, &y, sizeof y);
}
#endif
inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16; float y; std::memcpy(&y, &bits, 4); return y;
}

// Over the lanes, in halves.
template <class Both>
inline float reduce(f32 x, Both both) {
#pragma GCC unroll 4
    for (int apart = LANES / 2; apart; apart /= 2) x = both(x, __builtin_shuffle(x, COUNT ^ apart));
    return x[0];
}
inline float largest(f32 x) { return reduce(x, [](f32 a, f32 b) { return a > b ? a : b; }); }
inline float total_of(f32 x) { return reduce(x, [](f32 a, f32 b) { return a + b; }); }

// e^x for x <= 0, within 2 units in the last place; 0 below -87.
inline f32 exp_(f32 x) {
    const f32 zero = {};
    f32 n = __builtin_convertvector(
        __builtin_convertvector(x * 1.44269504f - 0.5f, i32), f32);
    f32 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32 p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    f32 scale = (f32)((__builtin_convertvector(n, i32) + 127) << 23);
    return x < -87.0f ? zero : p * scale;  // NaN stays NaN
}

}  // namespace

extern "C" {

struct Step {               // what all layers of a step share; native.py mirrors it
    const int32_t* runs;    // [num_runs][4]: row of tables, first token, tokens, its position
    const int32_t* tables;  // [rows][table_width]: block ids
    const int64_t* slots;   // [num_tokens]: block * BLOCK + place, where each token is kept
    const int32_t* lengths; // [rows]: tokens of each row, which all see all; null: none sees later
    int32_t num_runs, num_segments, table_width;
};

struct Attention {
    const void *query, *key, *value;  // [token, head, dim], dims contiguous, strides below
    void *keys, *values, *out;        // cache; out is [token, head, dim], contiguous
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    int32_t heads, kv_heads, dim, window;  // window 0: all tokens
    float scale, softcap;                  // softcap 0: none
    const float* sinks;                    // [heads]: scores without a value; or null
    const float* bias;  // [heads][2 * reach]: added to scores, by reach + place - own; or null
    int32_t reach;
};
}

namespace {

// Places that the token at position `own` sees, both included.
struct Sight { int from, until; };
inline Sight sight(const Step& step, const Attention& layer, int row, int own) {
    const int from = layer.window ? std::max(0, own - layer.window + 1) : 0;
    if (!step.lengths) return {from, own};
    const int last = step.lengths[row] - 1;
    return {from, layer.window ? std::min(last, own + layer.window - 1) : last};
}
// The number to add to the score of place 0; those of later places follow.
inline const float* bias_of(const Attention& layer, int head, int own) {
    return layer.bias ? layer.bias + (2 * head + 1) * (int64_t)layer.reach - own : nullptr;
}

}  // namespace

// All runs and heads of a step: two phases of a crew. T is float or bf16.
template <class T> void attend(Member& member, const Step& step, const Attention& layer);
#ifdef __AVX512BF16__
template <> void attend<bf16>(Member& member, const Step& step, const Attention& layer);
#endif
