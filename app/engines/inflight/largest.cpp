// The largest number of each row of a table, and the first place where it is.

#include "kernels.h"

namespace {

// values [rows][width]. A row that holds NaN has NaN for its largest, at no certain place.
template <class T>
void find_largest(const T* values, int rows, int width, float* tops, int64_t* places) {
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; ++row) {
        const T* from = values + (int64_t)row * width;
        f32 high = f32{} - std::numeric_limits<float>::infinity();
        i32 at = COUNT, bad = {};
        int i = 0;
        for (; i + LANES <= width; i += LANES) {
            const f32 x = load(from + i);
            at = x > high ? COUNT + i : at;
            high = x > high ? x : high;
            bad |= x != x;
        }
        float top = largest(high);
        int place = width - 1;
        bool is_bad = false;
        for (int lane = 0; lane < LANES; ++lane) {
            if (high[lane] == top) place = std::min(place, (int)at[lane]);
            is_bad |= bad[lane] != 0;
        }
        for (; i < width; ++i) {
            const float x = widen(from[i]);
            if (x > top) { top = x; place = i; }
            is_bad |= x != x;
        }
        tops[row] = is_bad ? std::numeric_limits<float>::quiet_NaN() : top;
        places[row] = place;
    }
}

}  // namespace

extern "C" {
void largest_float32(const float* values, int32_t rows, int32_t width, float* tops,
                     int64_t* places) {
    find_largest(values, rows, width, tops, places);
}
void largest_bfloat16(const bf16* values, int32_t rows, int32_t width, float* tops,
                      int64_t* places) {
    find_largest(values, rows, width, tops, places);
}
}
