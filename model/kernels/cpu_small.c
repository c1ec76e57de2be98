/* The operations of reference_small.py. `x` and results are bfloat16 or float32; everything in between is float32. The
 * loops are compiled once for each, so that the compiler can turn them into vectors. Threads share out the rows. */
#include "cpu_vectors.h"

#define MOST_STREAMS 64
#define COLUMNS_PER_CHUNK 256 /* of weighted sums: they stay in the first level cache */

/* Nearest E4M3 value, ties to even, of |v| at most 448. */
INLINE float round_e4m3(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    float subnormal = rintf(v * 512.f) * 0x1p-9f, normal;
    bits = (bits + 0x7ffff + ((bits >> 20) & 1)) & 0xfff00000;
    memcpy(&normal, &bits, 4);
    return fabsf(v) < 0x1p-6f ? subnormal : normal;
}

/* x, out [rows, columns]; groups of `group` along a row; the last may be shorter. */
INLINE void simulate_fp8(const void *x, void *out, struct span rows, int64_t columns, int64_t group,
                         int32_t is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++)
        for (int64_t start = 0; start < columns; start += group) {
            int64_t stop = least(start + group, columns), at = row * columns;
            float amax = 1e-4f, scale;
            for (int64_t k = start; k < stop; k++) {
                float v = fabsf(load_as_float(x, is_bf16, at + k));
                amax = v > amax ? v : amax;
            }
            float quotient = amax * (1.f / 448.f);
            uint32_t bits;
            memcpy(&bits, &quotient, 4);
            bits = ((bits >> 23) + ((bits & 0x7fffff) != 0)) << 23;
            memcpy(&scale, &bits, 4);
            for (int64_t k = start; k < stop; k++) {
                float v = load_as_float(x, is_bf16, at + k) / scale;
                v = v < -448.f ? -448.f : v > 448.f ? 448.f : v;
                store_as(out, is_bf16, at + k, round_e4m3(v) * scale);
            }
        }
}

void dsv4_simulate_fp8(const void *x, void *out, int64_t rows, int64_t columns, int64_t group, int32_t is_bf16,
                       int32_t threads) {
    PARALLEL
    for (int64_t share = 0; share < threads; share++) {
        struct span mine = span_of(rows, share, threads);
        if (is_bf16) simulate_fp8(x, out, mine, columns, group, 1);
        else simulate_fp8(x, out, mine, columns, group, 0);
    }
}

/* Mean of the squares of a row, which are rounded to x's type first if `rounded`. */
INLINE float mean_square(const void *x, int64_t row, int64_t columns, int is_bf16, int rounded, float *scratch) {
    for (int64_t k = 0; k < columns; k++) {
        float v = load_as_float(x, is_bf16, row * columns + k);
        scratch[k] = rounded && is_bf16 ? rounded_to_bf16(v * v) : v * v;
    }
    return tree_sum(scratch, columns) / (float)columns;
}

/* Floats of scratch that an operation on rows with a mean of squares needs. */
int64_t dsv4_row_scratch(int64_t columns, int64_t threads) { return columns * threads; }

INLINE float inverse_rms(const void *x, int64_t row, int64_t columns, float eps, int is_bf16, float *scratch) {
    return 1.f / sqrtf(mean_square(x, row, columns, is_bf16, 0, scratch) + eps);
}

INLINE void inverse_rms_of_rows(const void *x, float eps, float *out, float *scratch, struct span rows,
                                int64_t columns, int is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++)
        out[row] = inverse_rms(x, row, columns, eps, is_bf16, scratch);
}

/* x [rows, columns] -> float32 [rows]. */
void dsv4_inverse_rms(const void *x, float eps, float *out, float *scratch, int64_t rows, int64_t columns,
                      int32_t is_bf16, int32_t threads) {
    PARALLEL
    for (int64_t share = 0; share < threads; share++) {
        struct span mine = span_of(rows, share, threads);
        if (is_bf16) inverse_rms_of_rows(x, eps, out, scratch + share * columns, mine, columns, 1);
        else inverse_rms_of_rows(x, eps, out, scratch + share * columns, mine, columns, 0);
    }
}

INLINE void rms_norm(const void *x, const float *weight, float eps, void *out, float *scratch, struct span rows,
                     int64_t columns, int is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++) {
        int64_t at = row * columns;
        float factor = inverse_rms(x, row, columns, eps, is_bf16, scratch);
        for (int64_t k = 0; k < columns; k++)
            store_as(out, is_bf16, at + k, load_as_float(x, is_bf16, at + k) * factor * weight[k]);
    }
}

/* x, out [rows, columns]; weight float32 [columns]. */
void dsv4_rms_norm(const void *x, const float *weight, float eps, void *out, float *scratch, int64_t rows,
                   int64_t columns, int32_t is_bf16, int32_t threads) {
    PARALLEL
    for (int64_t share = 0; share < threads; share++) {
        struct span mine = span_of(rows, share, threads);
        if (is_bf16) rms_norm(x, weight, eps, out, scratch + share * columns, mine, columns, 1);
        else rms_norm(x, weight, eps, out, scratch + share * columns, mine, columns, 0);
    }
}

INLINE void head_norm(const void *x, float eps, void *out, float *scratch, struct span rows, int64_t columns,
                      int is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++) {
        float mean = mean_square(x, row, columns, is_bf16, 1, scratch);
        mean = is_bf16 ? rounded_to_bf16(rounded_to_bf16(mean) + eps) : mean + eps;
        float factor = 1.f / sqrtf(mean);
        if (is_bf16) factor = rounded_to_bf16(factor);
        for (int64_t k = row * columns; k < (row + 1) * columns; k++)
            store_as(out, is_bf16, k, load_as_float(x, is_bf16, k) * factor);
    }
}

/* x, out [rows, columns]. */
void dsv4_head_norm(const void *x, float eps, void *out, float *scratch, int64_t rows, int64_t columns, int32_t is_bf16,
                    int32_t threads) {
    PARALLEL
    for (int64_t share = 0; share < threads; share++) {
        struct span mine = span_of(rows, share, threads);
        if (is_bf16) head_norm(x, eps, out, scratch + share * columns, mine, columns, 1);
        else head_norm(x, eps, out, scratch + share * columns, mine, columns, 0);
    }
}

INLINE void rotate(const void *x, const float *cos, const float *sin, void *out, struct span rows,
                   int64_t heads, int64_t columns, int64_t pairs, int is_bf16) {
    int64_t size = is_bf16 ? 2 : 4, plain = columns - 2 * pairs;
    for (int64_t row = rows.first; row < rows.last; row++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t at = (row * heads + head) * columns;
            memcpy((char *)out + at * size, (const char *)x + at * size, plain * size);
            for (int64_t i = 0; i < pairs; i++) {
                float even = load_as_float(x, is_bf16, at + plain + 2 * i);
                float odd = load_as_float(x, is_bf16, at + plain + 2 * i + 1);
                float c = cos[row * pairs + i], s = sin[row * pairs + i];
                store_as(out, is_bf16, at + plain + 2 * i, even * c - odd * s);
                store_as(out, is_bf16, at + plain + 2 * i + 1, even * s + odd * c);
            }
        }
}

/* x, out [rows, heads, columns]; cos, sin float32 [rows, pairs]; the last 2 * pairs dims turn. */
void dsv4_rotate(const void *x, const float *cos, const float *sin, void *out, int64_t rows, int64_t heads,
                 int64_t columns, int64_t pairs, int32_t is_bf16, int32_t threads) {
    PARALLEL
    for (int64_t share = 0; share < threads; share++) {
        struct span mine = span_of(rows, share, threads);
        if (is_bf16) rotate(x, cos, sin, out, mine, heads, columns, pairs, 1);
        else rotate(x, cos, sin, out, mine, heads, columns, pairs, 0);
    }
}

INLINE float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

/* Divide each of n rows (stride 1) or columns (stride n) of an n x n matrix by its sum plus eps. */
static void normalize(float *comb, int64_t n, int by_columns, float eps) {
    float line[MOST_STREAMS];
    for (int64_t i = 0; i < n; i++) {
        float *first = comb + (by_columns ? i : i * n);
        int64_t stride = by_columns ? n : 1;
        for (int64_t j = 0; j < n; j++) line[j] = first[j * stride];
        float divisor = tree_sum(line, n) + eps;
        for (int64_t j = 0; j < n; j++) first[j * stride] = first[j * stride] / divisor;
    }
}

int64_t dsv4_most_streams(void) { return MOST_STREAMS; }

/* mixes [rows, (2 + n) n] -> pre, post [rows, n], comb [rows, n, n]; n at most MOST_STREAMS. */
void dsv4_hc_split_sinkhorn(const float *mixes, const float *scale, const float *base, float *pre, float *post, float *comb,
                      int64_t rows, int64_t n, int64_t iterations, float eps) {
    for (int64_t row = 0; row < rows; row++) {
        const float *m = mixes + row * (2 + n) * n;
        float *c = comb + row * n * n;
        for (int64_t j = 0; j < n; j++) {
            pre[row * n + j] = sigmoid(m[j] * scale[0] + base[j]) + eps;
            post[row * n + j] = 2.f * sigmoid(m[n + j] * scale[1] + base[n + j]);
        }
        for (int64_t i = 0; i < n; i++) {
            float largest = -INFINITY, line[MOST_STREAMS];
            for (int64_t j = 0; j < n; j++) {
                int64_t at = 2 * n + i * n + j;
                c[i * n + j] = m[at] * scale[2] + base[at];
                if (c[i * n + j] > largest) largest = c[i * n + j];
            }
            for (int64_t j = 0; j < n; j++) line[j] = c[i * n + j] = exponential(c[i * n + j] - largest);
            float sum = tree_sum(line, n);
            for (int64_t j = 0; j < n; j++) c[i * n + j] = c[i * n + j] / sum + eps;
        }
        normalize(c, n, 1, eps);
        for (int64_t i = 1; i < iterations; i++) {
            normalize(c, n, 0, eps);
            normalize(c, n, 1, eps);
        }
    }
}

/* sums[k] = weights[0] * h[0, k] + weights[stride] * h[1, k] + ..., in that order; h [n, columns] from element `at`. */
INLINE void weighted(const float *weights, int64_t stride, const void *h, int64_t at, int64_t n, int64_t columns,
                     int64_t count, int is_bf16, float *sums) {
    for (int64_t k = 0; k < count; k++) sums[k] = weights[0] * load_as_float(h, is_bf16, at + k);
    for (int64_t j = 1; j < n; j++)
        for (int64_t k = 0; k < count; k++)
            sums[k] = sums[k] + weights[j * stride] * load_as_float(h, is_bf16, at + j * columns + k);
}

INLINE void hc_pre(const float *weights, const void *h, void *out, struct span rows, int64_t n,
                     int64_t columns, int is_bf16) {
    float sums[COLUMNS_PER_CHUNK];
    for (int64_t row = rows.first; row < rows.last; row++)
        for (int64_t k = 0; k < columns; k += COLUMNS_PER_CHUNK) {
            int64_t count = least(columns - k, COLUMNS_PER_CHUNK);
            weighted(weights + row * n, 1, h, row * n * columns + k, n, columns, count, is_bf16, sums);
            for (int64_t i = 0; i < count; i++) store_as(out, is_bf16, row * columns + k + i, sums[i]);
        }
}

/* h [rows, n, columns], weights [rows, n] -> out [rows, columns]. */
void dsv4_hc_pre(const float *weights, const void *h, void *out, int64_t rows, int64_t n, int64_t columns,
                   int32_t is_bf16, int32_t threads) {
    PARALLEL
    for (int64_t share = 0; share < threads; share++) {
        struct span mine = span_of(rows, share, threads);
        if (is_bf16) hc_pre(weights, h, out, mine, n, columns, 1);
        else hc_pre(weights, h, out, mine, n, columns, 0);
    }
}

INLINE void hc_post(const void *output, const void *h, const float *post, const float *comb, void *out, struct span rows, int64_t n, int64_t columns, int is_bf16) {
    float sums[COLUMNS_PER_CHUNK];
    for (int64_t row = rows.first; row < rows.last; row++)
        for (int64_t k = 0; k < columns; k += COLUMNS_PER_CHUNK)
            for (int64_t stream = 0; stream < n; stream++) {
                int64_t count = least(columns - k, COLUMNS_PER_CHUNK), at = (row * n + stream) * columns + k;
                weighted(comb + row * n * n + stream, n, h, row * n * columns + k, n, columns, count, is_bf16, sums);
                for (int64_t i = 0; i < count; i++) {
                    float own = post[row * n + stream] * load_as_float(output, is_bf16, row * columns + k + i);
                    store_as(out, is_bf16, at + i, own + sums[i]);
                }
            }
}

/* output [rows, columns], h and out [rows, n, columns], post [rows, n], comb [rows, n, n]. */
void dsv4_hc_post(const void *output, const void *h, const float *post, const float *comb, void *out, int64_t rows,
                 int64_t n, int64_t columns, int32_t is_bf16, int32_t threads) {
    PARALLEL
    for (int64_t share = 0; share < threads; share++) {
        struct span mine = span_of(rows, share, threads);
        if (is_bf16) hc_post(output, h, post, comb, out, mine, n, columns, 1);
        else hc_post(output, h, post, comb, out, mine, n, columns, 0);
    }
}

INLINE void swiglu(const void *gate, const void *up, const float *shares, void *out, struct span rows,
                   int64_t columns, float limit, int is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++)
        for (int64_t start = 0; start < columns; start += 16) {
            int64_t n = least(columns - start, 16), at = row * columns + start;
            float gates[16] = {0}, decay[16];
            for (int64_t i = 0; i < n; i++) {
                float g = load_as_float(gate, is_bf16, at + i);
                gates[i] = g > limit ? limit : g;
            }
            for (int i = 0; i < 16; i++) decay[i] = -gates[i];
            exponentials(decay);
            for (int64_t i = 0; i < n; i++) {
                float u = load_as_float(up, is_bf16, at + i);
                u = u < -limit ? -limit : u > limit ? limit : u;
                float value = gates[i] / (1.f + decay[i]) * u;
                store_as(out, is_bf16, at + i, shares ? shares[row] * value : value);
            }
        }
}

/* gate, up, out [rows, columns]; shares [rows] or null. */
void dsv4_swiglu(const void *gate, const void *up, const float *shares, void *out, int64_t rows, int64_t columns,
                 float limit, int32_t is_bf16, int32_t threads) {
    PARALLEL
    for (int64_t share = 0; share < threads; share++) {
        struct span mine = span_of(rows, share, threads);
        if (is_bf16) swiglu(gate, up, shares, out, mine, columns, limit, 1);
        else swiglu(gate, up, shares, out, mine, columns, limit, 0);
    }
}
