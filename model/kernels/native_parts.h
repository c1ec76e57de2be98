/* The small operations of parts.py. `x` and results are bfloat16 or float32; everything in between is float32. The
 * loops are compiled once for each, so that the compiler can turn them into vectors. Threads share out the rows. */

/* BODY for the rows [from, to) of each thread. */
#define SHARED(ROWS, BODY)                                                                                             \
    _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")                                 \
    for (int64_t share = 0; share < threads; share++) {                                                                \
        int64_t from = (ROWS) * share / threads, to = (ROWS) * (share + 1) / threads;                                  \
        BODY;                                                                                                          \
    }

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
INLINE void simulate_fp8(const void *x, void *out, int64_t from, int64_t to, int64_t columns, int64_t group,
                         int32_t is_bf16) {
    for (int64_t row = from; row < to; row++)
        for (int64_t start = 0; start < columns; start += group) {
            int64_t stop = start + group < columns ? start + group : columns, at = row * columns;
            float amax = 1e-4f, scale;
            for (int64_t k = start; k < stop; k++) {
                float v = fabsf(read(x, is_bf16, at + k));
                amax = v > amax ? v : amax;
            }
            float quotient = amax * (1.f / 448.f);
            uint32_t bits;
            memcpy(&bits, &quotient, 4);
            bits = ((bits >> 23) + ((bits & 0x7fffff) != 0)) << 23;
            memcpy(&scale, &bits, 4);
            for (int64_t k = start; k < stop; k++) {
                float v = read(x, is_bf16, at + k) / scale;
                v = v < -448.f ? -448.f : v > 448.f ? 448.f : v;
                write(out, is_bf16, at + k, round_e4m3(v) * scale);
            }
        }
}

void dsv4_simulate_fp8(const void *x, void *out, int64_t rows, int64_t columns, int64_t group, int32_t is_bf16,
                       int32_t threads) {
    SHARED(rows, if (is_bf16) simulate_fp8(x, out, from, to, columns, group, 1);
           else simulate_fp8(x, out, from, to, columns, group, 0))
}

/* Mean of the squares of a row, which are rounded to x's type first if `rounded`. */
INLINE float mean_square(const void *x, int64_t row, int64_t columns, int is_bf16, int rounded, float *scratch) {
    for (int64_t k = 0; k < columns; k++) {
        float v = read(x, is_bf16, row * columns + k);
        scratch[k] = rounded && is_bf16 ? bf16(to_bf16(v * v)) : v * v;
    }
    return tree_sum(scratch, columns) / (float)columns;
}

/* x [rows, columns] -> float32 [rows]; `scratch` holds threads * columns floats. */
void dsv4_mean_square(const void *x, float *out, float *scratch, int64_t rows, int64_t columns, int32_t is_bf16,
                      int32_t threads) {
    SHARED(rows, for (int64_t row = from; row < to; row++)
           out[row] = mean_square(x, row, columns, is_bf16, 0, scratch + share * columns))
}

INLINE void rms_norm(const void *x, const float *weight, float eps, void *out, float *scratch, int64_t from, int64_t to,
                     int64_t columns, int is_bf16) {
    for (int64_t row = from; row < to; row++) {
        int64_t at = row * columns;
        float factor = 1.f / sqrtf(mean_square(x, row, columns, is_bf16, 0, scratch) + eps);
        for (int64_t k = 0; k < columns; k++)
            write(out, is_bf16, at + k, read(x, is_bf16, at + k) * factor * weight[k]);
    }
}

/* x, out [rows, columns]; weight float32 [columns]; `scratch` holds threads * columns floats. */
void dsv4_rms_norm(const void *x, const float *weight, float eps, void *out, float *scratch, int64_t rows,
                   int64_t columns, int32_t is_bf16, int32_t threads) {
    SHARED(rows, if (is_bf16) rms_norm(x, weight, eps, out, scratch + share * columns, from, to, columns, 1);
           else rms_norm(x, weight, eps, out, scratch + share * columns, from, to, columns, 0))
}

INLINE void head_norm(const void *x, float eps, void *out, float *scratch, int64_t from, int64_t to, int64_t columns,
                      int is_bf16) {
    for (int64_t row = from; row < to; row++) {
        float mean = mean_square(x, row, columns, is_bf16, 1, scratch);
        mean = is_bf16 ? bf16(to_bf16(bf16(to_bf16(mean)) + eps)) : mean + eps;
        float factor = 1.f / sqrtf(mean);
        if (is_bf16) factor = bf16(to_bf16(factor));
        for (int64_t k = row * columns; k < (row + 1) * columns; k++)
            write(out, is_bf16, k, read(x, is_bf16, k) * factor);
    }
}

/* x, out [rows, columns]; `scratch` holds threads * columns floats. */
void dsv4_head_norm(const void *x, float eps, void *out, float *scratch, int64_t rows, int64_t columns, int32_t is_bf16,
                    int32_t threads) {
    SHARED(rows, if (is_bf16) head_norm(x, eps, out, scratch + share * columns, from, to, columns, 1);
           else head_norm(x, eps, out, scratch + share * columns, from, to, columns, 0))
}

INLINE void rotate(const void *x, const float *cos, const float *sin, void *out, int64_t from, int64_t to,
                   int64_t heads, int64_t columns, int64_t pairs, int is_bf16) {
    int64_t size = is_bf16 ? 2 : 4, plain = columns - 2 * pairs;
    for (int64_t row = from; row < to; row++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t at = (row * heads + head) * columns;
            memcpy((char *)out + at * size, (const char *)x + at * size, plain * size);
            for (int64_t i = 0; i < pairs; i++) {
                float even = read(x, is_bf16, at + plain + 2 * i), odd = read(x, is_bf16, at + plain + 2 * i + 1);
                float c = cos[row * pairs + i], s = sin[row * pairs + i];
                write(out, is_bf16, at + plain + 2 * i, even * c - odd * s);
                write(out, is_bf16, at + plain + 2 * i + 1, even * s + odd * c);
            }
        }
}

/* x, out [rows, heads, columns]; cos, sin float32 [rows, pairs]; the last 2 * pairs dims turn. */
void dsv4_rotate(const void *x, const float *cos, const float *sin, void *out, int64_t rows, int64_t heads,
                 int64_t columns, int64_t pairs, int32_t is_bf16, int32_t threads) {
    SHARED(rows, if (is_bf16) rotate(x, cos, sin, out, from, to, heads, columns, pairs, 1);
           else rotate(x, cos, sin, out, from, to, heads, columns, pairs, 0))
}

INLINE float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

/* Divide each of n rows (stride 1) or columns (stride n) of an n x n matrix by its sum plus eps. */
static void normalize(float *comb, int64_t n, int by_columns, float eps) {
    float line[64];
    for (int64_t i = 0; i < n; i++) {
        float *first = comb + (by_columns ? i : i * n);
        int64_t stride = by_columns ? n : 1;
        for (int64_t j = 0; j < n; j++) line[j] = first[j * stride];
        float divisor = tree_sum(line, n) + eps;
        for (int64_t j = 0; j < n; j++) first[j * stride] = first[j * stride] / divisor;
    }
}

/* mixes [rows, (2 + n) n] -> pre, post [rows, n], comb [rows, n, n]; n at most 64. */
void dsv4_split_mixes(const float *mixes, const float *scale, const float *base, float *pre, float *post, float *comb,
                      int64_t rows, int64_t n, int64_t iterations, float eps) {
    for (int64_t row = 0; row < rows; row++) {
        const float *m = mixes + row * (2 + n) * n;
        float *c = comb + row * n * n;
        for (int64_t j = 0; j < n; j++) {
            pre[row * n + j] = sigmoid(m[j] * scale[0] + base[j]) + eps;
            post[row * n + j] = 2.f * sigmoid(m[n + j] * scale[1] + base[n + j]);
        }
        for (int64_t i = 0; i < n; i++) {
            float largest = -INFINITY, line[64];
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

#define CHUNK 256 /* columns at once: the sums stay in the first level cache */

/* sums[k] = weights[0] * h[0, k] + weights[stride] * h[1, k] + ..., in that order; h [n, columns] from element `at`. */
INLINE void weighted(const float *weights, int64_t stride, const void *h, int64_t at, int64_t n, int64_t columns,
                     int64_t count, int is_bf16, float *sums) {
    for (int64_t k = 0; k < count; k++) sums[k] = weights[0] * read(h, is_bf16, at + k);
    for (int64_t j = 1; j < n; j++)
        for (int64_t k = 0; k < count; k++)
            sums[k] = sums[k] + weights[j * stride] * read(h, is_bf16, at + j * columns + k);
}

INLINE void collapse(const float *weights, const void *h, void *out, int64_t from, int64_t to, int64_t n,
                     int64_t columns, int is_bf16) {
    float sums[CHUNK];
    for (int64_t row = from; row < to; row++)
        for (int64_t k = 0; k < columns; k += CHUNK) {
            int64_t count = columns - k < CHUNK ? columns - k : CHUNK;
            weighted(weights + row * n, 1, h, row * n * columns + k, n, columns, count, is_bf16, sums);
            for (int64_t i = 0; i < count; i++) write(out, is_bf16, row * columns + k + i, sums[i]);
        }
}

/* h [rows, n, columns], weights [rows, n] -> out [rows, columns]. */
void dsv4_collapse(const float *weights, const void *h, void *out, int64_t rows, int64_t n, int64_t columns,
                   int32_t is_bf16, int32_t threads) {
    SHARED(rows, if (is_bf16) collapse(weights, h, out, from, to, n, columns, 1);
           else collapse(weights, h, out, from, to, n, columns, 0))
}

INLINE void expand(const void *output, const void *h, const float *post, const float *comb, void *out, int64_t from,
                   int64_t to, int64_t n, int64_t columns, int is_bf16) {
    float sums[CHUNK];
    for (int64_t row = from; row < to; row++)
        for (int64_t k = 0; k < columns; k += CHUNK)
            for (int64_t stream = 0; stream < n; stream++) {
                int64_t count = columns - k < CHUNK ? columns - k : CHUNK, at = (row * n + stream) * columns + k;
                weighted(comb + row * n * n + stream, n, h, row * n * columns + k, n, columns, count, is_bf16, sums);
                for (int64_t i = 0; i < count; i++) {
                    float own = post[row * n + stream] * read(output, is_bf16, row * columns + k + i);
                    write(out, is_bf16, at + i, own + sums[i]);
                }
            }
}

/* output [rows, columns], h and out [rows, n, columns], post [rows, n], comb [rows, n, n]. */
void dsv4_expand(const void *output, const void *h, const float *post, const float *comb, void *out, int64_t rows,
                 int64_t n, int64_t columns, int32_t is_bf16, int32_t threads) {
    SHARED(rows, if (is_bf16) expand(output, h, post, comb, out, from, to, n, columns, 1);
           else expand(output, h, post, comb, out, from, to, n, columns, 0))
}

INLINE void swiglu(const void *gate, const void *up, const float *shares, void *out, int64_t from, int64_t to,
                   int64_t columns, float limit, int is_bf16) {
    for (int64_t row = from; row < to; row++)
        for (int64_t start = 0; start < columns; start += 16) {
            int64_t n = columns - start < 16 ? columns - start : 16, at = row * columns + start;
            float gates[16] = {0}, decay[16];
            for (int64_t i = 0; i < n; i++) {
                float g = read(gate, is_bf16, at + i);
                gates[i] = g > limit ? limit : g;
            }
            for (int i = 0; i < 16; i++) decay[i] = -gates[i];
            exponentials(decay);
            for (int64_t i = 0; i < n; i++) {
                float u = read(up, is_bf16, at + i);
                u = u < -limit ? -limit : u > limit ? limit : u;
                float value = gates[i] / (1.f + decay[i]) * u;
                write(out, is_bf16, at + i, shares ? shares[row] * value : value);
            }
        }
}

/* gate, up, out [rows, columns]; shares [rows] or null. */
void dsv4_swiglu(const void *gate, const void *up, const float *shares, void *out, int64_t rows, int64_t columns,
                 float limit, int32_t is_bf16, int32_t threads) {
    SHARED(rows, if (is_bf16) swiglu(gate, up, shares, out, from, to, columns, limit, 1);
           else swiglu(gate, up, shares, out, from, to, columns, limit, 0))
}
