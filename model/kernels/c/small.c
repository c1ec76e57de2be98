/* The operations of reference_small.py. `x` and results are bfloat16 or float32; everything in between is float32. The
 * loops are compiled once for each, so that the compiler can turn them into vectors. Threads share out the rows. */
#include "threads.h"
#include "vectors.h"

#define MOST_STREAMS 64
#define COLUMNS_PER_CHUNK 256 /* of weighted sums: they stay in the first level cache */

/* Rows [first, last). */
struct span {
    int64_t first, last;
};

/* An operation on rows: inputs x and y (bfloat16 or float32, as `out`) and a and b (float32), scratch of `columns`
 * floats a worker. */
struct rows {
    const void *x, *y;
    const float *a, *b;
    void *out;
    float *scratch;
    int64_t columns, n, pairs;
    float limit;
    int32_t is_bf16;
};

/* Defines NAME_rows, for dsv4_share: CALL(1) for bfloat16, CALL(0) for float32, with `j` and `mine` in scope. */
#define SHARED(NAME, CALL)                                                                                             \
    static void NAME##_rows(const void *job, int64_t first, int64_t last, int64_t worker) {                            \
        const struct rows *j = job;                                                                                    \
        struct span mine = {first, last};                                                                              \
        float *scratch = j->scratch + worker * j->columns;                                                             \
        (void)scratch;                                                                                                 \
        if (j->is_bf16) CALL(1);                                                                                       \
        else CALL(0);                                                                                                  \
    }

static void share(work *function, const struct rows *j, int64_t rows, int32_t threads) {
    dsv4_share(function, j, rows, dsv4_quarters(rows, threads), threads);
}

/* Nearest E4M3 value, ties to even, of |v| at most 448. */
INLINE lanes round_e4m3(lanes v) {
    ulanes bits = (ulanes)v, sign = bits & 0x80000000u;
    lanes whole = (v * 512.f + 0x1.8p23f) - 0x1.8p23f; /* nearest integers, as sums of this size have no fraction */
    lanes subnormal = (lanes)((ulanes)(whole * 0x1p-9f) | sign);
    lanes normal = (lanes)((bits + 0x7ffff + ((bits >> 20) & 1)) & 0xfff00000u);
    return choose_lanes((lanes)(bits ^ sign) < 0x1p-6f, subnormal, normal);
}

/* The power of two that is at least amax * inverse, from the bits of that. */
INLINE float group_scale(float amax, float inverse) {
    float quotient = amax * inverse, scale;
    uint32_t bits;
    memcpy(&bits, &quotient, 4);
    bits = ((bits >> 23) + ((bits & 0x7fffff) != 0)) << 23;
    memcpy(&scale, &bits, 4);
    return scale;
}

/* The largest magnitude of `count` elements from `first` on, or `least_one` if that is larger. */
INLINE float largest_magnitude(const void *x, int64_t first, int64_t count, float least_one, int is_bf16) {
    lanes largest = splat(least_one);
    for (int64_t k = 0; k < count; k += 16) {
        lanes v = load_some(x, is_bf16, first + k, count - k);
        v = (lanes)((ilanes)v & 0x7fffffff);
        largest = choose_lanes(v > largest, v, largest);
    }
    float result = largest[0];
    for (int i = 1; i < 16; i++) result = largest[i] > result ? largest[i] : result;
    return result;
}

/* x, out [rows, columns]; groups of `group` along the first `quantized` numbers of a row; the last may be shorter. */
INLINE void simulate_fp8(const void *x, void *out, struct span rows, int64_t columns, int64_t quantized, int64_t group,
                         int32_t is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++) {
        int64_t at = row * columns;
        for (int64_t k = quantized; k < columns; k++) store_as(out, is_bf16, at + k, load_as_float(x, is_bf16, at + k));
        for (int64_t start = 0; start < quantized; start += group) {
            int64_t stop = least(start + group, quantized);
            float scale = group_scale(largest_magnitude(x, at + start, stop - start, 1e-4f, is_bf16), 1.f / 448.f);
            for (int64_t k = start; k < stop; k += 16) {
                lanes v = clamp(load_some(x, is_bf16, at + k, stop - k) / scale, -448.f, 448.f);
                store_some(out, is_bf16, at + k, round_e4m3(v) * scale, stop - k);
            }
        }
    }
}

#define CALL(is_bf16) simulate_fp8(j->x, j->out, mine, j->columns, j->pairs, j->n, is_bf16)
SHARED(simulate_fp8, CALL)
#undef CALL

void OF_FORM(dsv4_simulate_fp8)(const void *x, void *out, int64_t rows, int64_t columns, int64_t quantized,
                                int64_t group, int32_t is_bf16, int32_t threads) {
    struct rows j = {.x = x, .out = out, .columns = columns, .pairs = quantized, .n = group, .is_bf16 = is_bf16};
    share(simulate_fp8_rows, &j, rows, threads);
}

/* Mean of the squares of a row, which are rounded to x's type first if `rounded`. */
INLINE float mean_square(const void *x, int64_t row, int64_t columns, int is_bf16, int rounded, float *scratch) {
    for (int64_t k = 0; k < columns; k++) {
        float v = load_as_float(x, is_bf16, row * columns + k);
        scratch[k] = rounded && is_bf16 ? rounded_to_bf16(v * v) : v * v;
    }
    return tree_sum(scratch, columns) / (float)columns;
}

/* Bytes of scratch that an operation on rows with a mean of squares needs. */
int64_t OF_FORM(dsv4_row_scratch)(int64_t columns, int64_t threads) {
    return columns * threads * (int64_t)sizeof(float);
}

INLINE float inverse_rms(const void *x, int64_t row, int64_t columns, float eps, int is_bf16, float *scratch) {
    return 1.f / sqrtf(mean_square(x, row, columns, is_bf16, 0, scratch) + eps);
}

INLINE void inverse_rms_of_rows(const void *x, float eps, float *out, float *scratch, struct span rows,
                                int64_t columns, int is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++)
        out[row] = inverse_rms(x, row, columns, eps, is_bf16, scratch);
}

#define CALL(is_bf16) inverse_rms_of_rows(j->x, j->limit, j->out, scratch, mine, j->columns, is_bf16)
SHARED(inverse_rms, CALL)
#undef CALL

/* x [rows, columns] -> float32 [rows]. */
void OF_FORM(dsv4_inverse_rms)(const void *x, float eps, float *out, void *scratch, int64_t rows, int64_t columns,
                               int32_t is_bf16, int32_t threads) {
    struct rows j = {.x = x, .out = out, .scratch = scratch, .columns = columns, .limit = eps, .is_bf16 = is_bf16};
    share(inverse_rms_rows, &j, rows, threads);
}

INLINE void rms_norm(const void *x, const float *weight, float eps, void *out, float *scratch, struct span rows,
                     int64_t columns, int is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++) {
        int64_t at = row * columns;
        float factor = inverse_rms(x, row, columns, eps, is_bf16, scratch);
        for (int64_t k = 0; k < columns; k += 16) {
            lanes v = load_some(x, is_bf16, at + k, columns - k) * factor;
            store_some(out, is_bf16, at + k, v * load_some(weight, 0, k, columns - k), columns - k);
        }
    }
}

#define CALL(is_bf16) rms_norm(j->x, j->a, j->limit, j->out, scratch, mine, j->columns, is_bf16)
SHARED(rms_norm, CALL)
#undef CALL

/* x, out [rows, columns]; weight float32 [columns]. */
void OF_FORM(dsv4_rms_norm)(const void *x, const float *weight, float eps, void *out, void *scratch, int64_t rows,
                            int64_t columns, int32_t is_bf16, int32_t threads) {
    struct rows j = {.x = x, .a = weight, .out = out, .scratch = scratch, .columns = columns, .limit = eps,
                     .is_bf16 = is_bf16};
    share(rms_norm_rows, &j, rows, threads);
}

INLINE void head_norm(const void *x, float eps, void *out, float *scratch, struct span rows, int64_t columns,
                      int is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++) {
        float mean = mean_square(x, row, columns, is_bf16, 1, scratch);
        mean = is_bf16 ? rounded_to_bf16(rounded_to_bf16(mean) + eps) : mean + eps;
        float factor = 1.f / sqrtf(mean);
        if (is_bf16) factor = rounded_to_bf16(factor);
        for (int64_t k = row * columns, stop = k + columns; k < stop; k += 16)
            store_some(out, is_bf16, k, load_some(x, is_bf16, k, stop - k) * factor, stop - k);
    }
}

#define CALL(is_bf16) head_norm(j->x, j->limit, j->out, scratch, mine, j->columns, is_bf16)
SHARED(head_norm, CALL)
#undef CALL

/* x, out [rows, columns]. */
void OF_FORM(dsv4_head_norm)(const void *x, float eps, void *out, void *scratch, int64_t rows, int64_t columns,
                             int32_t is_bf16, int32_t threads) {
    struct rows j = {.x = x, .out = out, .scratch = scratch, .columns = columns, .limit = eps, .is_bf16 = is_bf16};
    share(head_norm_rows, &j, rows, threads);
}

INLINE void rotate(void *x, const float *cos, const float *sin, struct span rows, int64_t heads, int64_t columns,
                   int64_t pairs, int is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t at = (row * heads + head + 1) * columns - 2 * pairs;
            for (int64_t i = 0; i < pairs; i++) {
                float even = load_as_float(x, is_bf16, at + 2 * i), odd = load_as_float(x, is_bf16, at + 2 * i + 1);
                float c = cos[row * pairs + i], s = sin[row * pairs + i];
                store_as(x, is_bf16, at + 2 * i, even * c - odd * s);
                store_as(x, is_bf16, at + 2 * i + 1, even * s + odd * c);
            }
        }
}

#define CALL(is_bf16) rotate(j->out, j->a, j->b, mine, j->n, j->columns, j->pairs, is_bf16)
SHARED(rotate, CALL)
#undef CALL

/* x [rows, heads, columns], in place; cos, sin float32 [rows, pairs]; the last 2 * pairs dims turn. */
void OF_FORM(dsv4_rotate)(void *x, const float *cos, const float *sin, int64_t rows, int64_t heads, int64_t columns,
                          int64_t pairs, int32_t is_bf16, int32_t threads) {
    struct rows j = {.a = cos, .b = sin, .out = x, .columns = columns, .n = heads, .pairs = pairs, .is_bf16 = is_bf16};
    share(rotate_rows, &j, rows, threads);
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

int64_t OF_FORM(dsv4_most_streams)(void) { return MOST_STREAMS; }

/* mixes [rows, (2 + n) n] -> pre, post [rows, n], comb [rows, n, n]; n at most MOST_STREAMS. */
void OF_FORM(dsv4_hc_split_sinkhorn)(const float *mixes, const float *scale, const float *base, float *pre,
                                     float *post, float *comb,
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

/* The weights of the streams at the end of a stack, in place: mixes [rows, n], scale [1], base [n]. */
void OF_FORM(dsv4_hc_head_weights)(float *mixes, const float *scale, const float *base, int64_t rows, int64_t n,
                                   float eps) {
    for (int64_t i = 0; i < rows * n; i++) mixes[i] = sigmoid(mixes[i] * scale[0] + base[i % n]) + eps;
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

#define CALL(is_bf16) hc_pre(j->a, j->x, j->out, mine, j->n, j->columns, is_bf16)
SHARED(hc_pre, CALL)
#undef CALL

/* h [rows, n, columns], weights [rows, n] -> out [rows, columns]. */
void OF_FORM(dsv4_hc_pre)(const float *weights, const void *h, void *out, int64_t rows, int64_t n, int64_t columns,
                          int32_t is_bf16, int32_t threads) {
    struct rows j = {.x = h, .a = weights, .out = out, .columns = columns, .n = n, .is_bf16 = is_bf16};
    share(hc_pre_rows, &j, rows, threads);
}

/* The same, then over its root mean square and times `norm` float32 [columns]; scratch of a row for each thread. */
void OF_FORM(dsv4_hc_input)(const float *weights, const void *h, const float *norm, float eps, void *out, void *scratch,
                            int64_t rows, int64_t n, int64_t columns, int32_t is_bf16, int32_t threads) {
    OF_FORM(dsv4_hc_pre)(weights, h, out, rows, n, columns, is_bf16, threads);
    OF_FORM(dsv4_rms_norm)(out, norm, eps, out, scratch, rows, columns, is_bf16, threads);
}

INLINE void hc_post(const void *output, const void *h, const float *post, const float *comb, void *out,
                    struct span rows, int64_t n, int64_t columns, int is_bf16) {
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

#define CALL(is_bf16) hc_post(j->x, j->y, j->a, j->b, j->out, mine, j->n, j->columns, is_bf16)
SHARED(hc_post, CALL)
#undef CALL

/* output [rows, columns], h and out [rows, n, columns], post [rows, n], comb [rows, n, n]. */
void OF_FORM(dsv4_hc_post)(const void *output, const void *h, const float *post, const float *comb, void *out,
                           int64_t rows, int64_t n, int64_t columns, int32_t is_bf16, int32_t threads) {
    struct rows j = {.x = output, .y = h, .a = post, .b = comb, .out = out, .columns = columns, .n = n,
                     .is_bf16 = is_bf16};
    share(hc_post_rows, &j, rows, threads);
}

INLINE void swiglu(const void *gate, const void *up, const float *shares, void *out, struct span rows,
                   int64_t columns, float limit, int is_bf16) {
    for (int64_t row = rows.first; row < rows.last; row++)
        for (int64_t start = 0; start < columns; start += 16) {
            int64_t n = columns - start, at = row * columns + start;
            lanes g = load_some(gate, is_bf16, at, n), u = clamp(load_some(up, is_bf16, at, n), -limit, limit);
            float decay[16];
            g = choose_lanes(g > limit, splat(limit), g);
            store(decay, -g);
            exponentials(decay);
            lanes value = g / (1.f + load(decay)) * u;
            store_some(out, is_bf16, at, shares ? shares[row] * value : value, n);
        }
}

#define CALL(is_bf16) swiglu(j->x, j->y, j->a, j->out, mine, j->columns, j->limit, is_bf16)
SHARED(swiglu, CALL)
#undef CALL

/* gate, up, out [rows, columns]; shares [rows] or null. */
void OF_FORM(dsv4_swiglu)(const void *gate, const void *up, const float *shares, void *out, int64_t rows,
                          int64_t columns, float limit, int32_t is_bf16, int32_t threads) {
    struct rows j = {.x = gate, .y = up, .a = shares, .out = out, .columns = columns, .limit = limit,
                     .is_bf16 = is_bf16};
    share(swiglu_rows, &j, rows, threads);
}

/* log(1 + y) of y >= 0, the steps of deterministic.py. */
INLINE double log1p_of(double y) {
    int exponent;
    double mantissa = frexp(1.0 + y, &exponent); /* in [0.5, 1) */
    if (mantissa < 0x1.6a09e667f3bcdp-1) mantissa = mantissa * 2.0, exponent--;
    int tiny = y < 0.25; /* 1 + y would round y away */
    double s = tiny ? y / (2.0 + y) : (mantissa - 1.0) / (mantissa + 1.0), square = s * s, series = 0.0;
    for (int k = 12; k >= 0; k--) series = series * square + 1.0 / (2 * k + 1);
    return (tiny ? 0.0 : (double)exponent) * 0x1.62e42fefa39efp-1 + 2.0 * s * series;
}

static void sqrtsoftplus_rows(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct rows *j = job;
    const float *x = j->x;
    float *out = j->out;
    (void)worker;
    for (int64_t i = first; i < last; i++) {
        double wide = x[i] > 700.f ? 700.0 : x[i], at_most_40 = wide > 40.0 ? 40.0 : wide;
        float softplus = (float)(wide > 40.0 ? wide : log1p_of(exponential64(at_most_40)));
        out[i] = (float)sqrt((double)softplus);
    }
}

/* x, out float32 [count]. */
void OF_FORM(dsv4_sqrtsoftplus)(const float *x, float *out, int64_t count, int32_t threads) {
    struct rows j = {.x = x, .out = out};
    share(sqrtsoftplus_rows, &j, count, threads);
}

/* Nearest E2M1 value, ties to even, of |v| at most 6: steps of 0.5 below 2, of 1 below 4, then of 2. */
INLINE float round_e2m1(float v) {
    float magnitude = fabsf(v), step = magnitude < 2.f ? .5f : magnitude < 4.f ? 1.f : 2.f;
    return copysignf(rintf(magnitude / step) * step, v);
}

/* x times the orthonormal Hadamard matrix, rounded to x's type, then through FP4 in groups. */
INLINE void simulate_index(const void *x, void *out, float *values, struct span rows, int64_t columns, int64_t group,
                           int is_bf16) {
    float orthonormal = (float)(1.0 / sqrt((double)columns));
    for (int64_t row = rows.first; row < rows.last; row++) {
        int64_t at = row * columns;
        for (int64_t k = 0; k < columns; k++) values[k] = load_as_float(x, is_bf16, at + k);
        for (int64_t half = 1; half < columns; half *= 2)
            for (int64_t start = 0; start < columns; start += 2 * half)
                for (int64_t k = start; k < start + half; k++) {
                    float upper = values[k], lower = values[k + half];
                    values[k] = upper + lower, values[k + half] = upper - lower;
                }
        for (int64_t k = 0; k < columns; k++) {
            values[k] = values[k] * orthonormal;
            if (is_bf16) values[k] = rounded_to_bf16(values[k]);
        }
        for (int64_t start = 0; start < columns; start += group) {
            float amax = 6.f * 0x1p-126f;
            for (int64_t k = start; k < least(start + group, columns); k++)
                amax = fabsf(values[k]) > amax ? fabsf(values[k]) : amax;
            float scale = group_scale(amax, 1.f / 6.f);
            for (int64_t k = start; k < least(start + group, columns); k++) {
                float v = values[k] / scale;
                v = v < -6.f ? -6.f : v > 6.f ? 6.f : v;
                store_as(out, is_bf16, at + k, round_e2m1(v) * scale);
            }
        }
    }
}

#define CALL(is_bf16) simulate_index(j->x, j->out, scratch, mine, j->columns, j->n, is_bf16)
SHARED(simulate_index, CALL)
#undef CALL

/* x, out [rows, columns], columns a power of two. */
void OF_FORM(dsv4_simulate_index)(const void *x, void *out, void *scratch, int64_t rows, int64_t columns, int64_t group,
                                  int32_t is_bf16, int32_t threads) {
    struct rows j = {.x = x, .out = out, .scratch = scratch, .columns = columns, .n = group, .is_bf16 = is_bf16};
    share(simulate_index_rows, &j, rows, threads);
}

static void pool_rows(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct rows *j = job;
    int64_t n = j->columns, whole = (n + 15) / 16 * 16;
    float *weights = j->scratch + worker * 2 * whole, *terms = weights + whole, *out = j->out;
    for (int64_t row = first; row < last; row++) {
        const float *kv = j->a + row * n, *gate = j->b + row * n;
        float largest = -INFINITY;
        for (int64_t i = 0; i < n; i++) largest = gate[i] > largest ? gate[i] : largest;
        for (int64_t i = 0; i < whole; i++) weights[i] = i < n ? gate[i] - largest : 0.f;
        for (int64_t i = 0; i < n; i += 16) exponentials(weights + i);
        memcpy(terms, weights, n * sizeof(float));
        float sum = tree_sum(terms, n);
        for (int64_t i = 0; i < n; i++) terms[i] = kv[i] * (weights[i] / sum);
        out[row] = tree_sum(terms, n);
    }
}

int64_t OF_FORM(dsv4_pool_scratch)(int64_t n, int64_t threads) {
    return threads * 2 * ((n + 15) / 16 * 16) * (int64_t)sizeof(float);
}

/* kv, gate float32 [rows, n] -> out float32 [rows]. */
void OF_FORM(dsv4_pool)(const float *kv, const float *gate, float *out, void *scratch, int64_t rows, int64_t n,
                        int32_t threads) {
    struct rows j = {.a = kv, .b = gate, .out = out, .scratch = scratch, .columns = n};
    share(pool_rows, &j, rows, threads);
}
