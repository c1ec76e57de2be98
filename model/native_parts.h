/* The small operations of parts.py. `x` and results are bfloat16 or float32; everything in between is float32. The
 * loops are compiled once for each, so that the compiler can turn them into vectors. */

INLINE float read(const void *x, int is_bf16, int64_t i) {
    return is_bf16 ? bf16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

INLINE void write(void *x, int is_bf16, int64_t i, float value) {
    if (is_bf16) ((uint16_t *)x)[i] = to_bf16(value);
    else ((float *)x)[i] = value;
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
INLINE void simulate_fp8(const void *x, void *out, int64_t rows, int64_t columns, int64_t group, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++)
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

void dsv4_simulate_fp8(const void *x, void *out, int64_t rows, int64_t columns, int64_t group, int32_t is_bf16) {
    if (is_bf16) simulate_fp8(x, out, rows, columns, group, 1);
    else simulate_fp8(x, out, rows, columns, group, 0);
}

/* x [rows, columns] -> float32 [rows]; `scratch` holds `columns` floats. */
void dsv4_mean_square(const void *x, float *out, float *scratch, int64_t rows, int64_t columns, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t k = 0; k < columns; k++) {
            float v = read(x, is_bf16, row * columns + k);
            scratch[k] = v * v;
        }
        out[row] = tree_sum(scratch, columns) / (float)columns;
    }
}

/* x, out [rows, columns]; weight float32 [columns]; `scratch` holds `columns` floats. */
void dsv4_rms_norm(const void *x, const float *weight, float eps, void *out, float *scratch, int64_t rows,
                   int64_t columns, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * columns;
        float mean;
        dsv4_mean_square((const char *)x + at * (is_bf16 ? 2 : 4), &mean, scratch, 1, columns, is_bf16);
        float factor = 1.f / sqrtf(mean + eps);
        for (int64_t k = 0; k < columns; k++)
            write(out, is_bf16, at + k, read(x, is_bf16, at + k) * factor * weight[k]);
    }
}

/* x, out [rows, heads, columns]; cos, sin float32 [rows, pairs]; the last 2 * pairs dims turn. */
void dsv4_rotate(const void *x, const float *cos, const float *sin, void *out, int64_t rows, int64_t heads,
                 int64_t columns, int64_t pairs, int32_t is_bf16) {
    int64_t size = is_bf16 ? 2 : 4, plain = columns - 2 * pairs;
    for (int64_t row = 0; row < rows; row++)
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

/* h [rows, n, columns], weights [rows, n] -> out [rows, columns]. */
INLINE void collapse(const float *weights, const void *h, void *out, int64_t rows, int64_t n, int64_t columns,
                   int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < columns; k++) {
            float total = weights[row * n] * read(h, is_bf16, row * n * columns + k);
            for (int64_t j = 1; j < n; j++)
                total = total + weights[row * n + j] * read(h, is_bf16, (row * n + j) * columns + k);
            write(out, is_bf16, row * columns + k, total);
        }
}

void dsv4_collapse(const float *weights, const void *h, void *out, int64_t rows, int64_t n, int64_t columns, int32_t is_bf16) {
    if (is_bf16) collapse(weights, h, out, rows, n, columns, 1);
    else collapse(weights, h, out, rows, n, columns, 0);
}

/* output [rows, columns], h and out [rows, n, columns], post [rows, n], comb [rows, n, n]. */
INLINE void expand(const void *output, const void *h, const float *post, const float *comb, void *out, int64_t rows,
                 int64_t n, int64_t columns, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t to = 0; to < n; to++) {
            const float *c = comb + row * n * n + to;
            for (int64_t k = 0; k < columns; k++) {
                float total = c[0] * read(h, is_bf16, row * n * columns + k);
                for (int64_t j = 1; j < n; j++)
                    total = total + c[j * n] * read(h, is_bf16, (row * n + j) * columns + k);
                float own = post[row * n + to] * read(output, is_bf16, row * columns + k);
                write(out, is_bf16, (row * n + to) * columns + k, own + total);
            }
        }
}

void dsv4_expand(const void *output, const void *h, const float *post, const float *comb, void *out, int64_t rows, int64_t n,
                 int64_t columns, int32_t is_bf16) {
    if (is_bf16) expand(output, h, post, comb, out, rows, n, columns, 1);
    else expand(output, h, post, comb, out, rows, n, columns, 0);
}

/* gate, up, out [rows, columns]; share [rows] or null. */
INLINE void swiglu(const void *gate, const void *up, const float *share, void *out, int64_t rows, int64_t columns,
                 float limit, int32_t is_bf16) {
    for (int64_t row = 0; row < rows; row++)
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
                write(out, is_bf16, at + i, share ? share[row] * value : value);
            }
        }
}

void dsv4_swiglu(const void *gate, const void *up, const float *share, void *out, int64_t rows, int64_t columns,
                 float limit, int32_t is_bf16) {
    if (is_bf16) swiglu(gate, up, share, out, rows, columns, limit, 1);
    else swiglu(gate, up, share, out, rows, columns, limit, 0);
}
