/* Matrix products: one row of x from the stored weight, many from a decoded strip of it. Part of native.c. */

/* Products of a single row of paired x with OT rows of a stored weight, decoded in registers. */
#define SINGLE(OT)                                                                                                     \
    INLINE void single_##OT(const struct matrix *w, int format, int exact, const float *x, int64_t row, float *y) {    \
        lanes sum[OT];                                                                                                 \
        const uint8_t *p[OT];                                                                                          \
        int64_t step = step_columns(w), scales[OT];                                                                    \
        for (int o = 0; o < OT; o++) {                                                                                 \
            sum[o] = splat(0.f);                                                                                       \
            p[o] = row_of(w, format, row + o);                                                                         \
            scales[o] = scale_row(w, row + o);                                                                         \
        }                                                                                                              \
        for (int64_t start = 0; start < w->columns; start += step) {                                                   \
            int64_t stop = start + step < w->columns ? start + step : w->columns;                                      \
            float scale[OT];                                                                                           \
            for (int o = 0; o < OT; o++) scale[o] = scale_at(w, scales[o]++);                                          \
            for (const float *value = x + start; value < x + stop; value += 32) {                                      \
                lanes odd = load(value), even = load(value + 16);                                                      \
                for (int o = 0; o < OT; o++) {                                                                         \
                    struct pair weight = decode(p[o], format, scale[o]);                                               \
                    sum[o] = multiply_add(odd, weight.odd, sum[o], exact);                                             \
                    sum[o] = multiply_add(even, weight.even, sum[o], exact);                                           \
                    p[o] += bytes_of_32(format);                                                                       \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        fold_each(sum, OT, y);                                                                                         \
    }

SINGLE(1)
SINGLE(4)

/* Products of MT rows of paired x with OT rows of paired weights, both float32. */
#define TILE(MT, OT)                                                                                                   \
    INLINE void tile_##MT##_##OT(const float *w, int64_t w_stride, int64_t columns, int exact, const float *x,         \
                                 int64_t x_stride, float *y, int64_t y_stride) {                                       \
        lanes sum[MT][OT];                                                                                             \
        for (int m = 0; m < MT; m++)                                                                                   \
            for (int o = 0; o < OT; o++) sum[m][o] = splat(0.f);                                                       \
        for (int64_t k = 0; k < columns; k += 16) {                                                                    \
            lanes weight[OT];                                                                                          \
            for (int o = 0; o < OT; o++) weight[o] = load(w + o * w_stride + k);                                       \
            for (int m = 0; m < MT; m++) {                                                                             \
                lanes value = load(x + m * x_stride + k);                                                              \
                for (int o = 0; o < OT; o++) sum[m][o] = multiply_add(value, weight[o], sum[m][o], exact);             \
            }                                                                                                          \
        }                                                                                                              \
        for (int m = 0; m < MT; m++) fold_each(sum[m], OT, y + m * y_stride);                                          \
    }

TILE(1, 1)
TILE(1, 4)
TILE(2, 4)
TILE(4, 4)
TILE(6, 1)
TILE(6, 4)

/* y [m_count, o_count] = x @ w.T for paired float32 x and w; o_count at most 4. */
#define PRODUCTS(NAME, PREFIX, TYPE, ...)                                                                              \
    static void NAME(const TYPE *w, int64_t w_stride, int64_t o_count, int64_t columns, const TYPE *x, int64_t m_count,\
                     int64_t x_stride, float *y, int64_t y_stride) {                                                   \
        int64_t m = 0;                                                                                                 \
        for (; m + 6 <= m_count; m += 6)                                                                               \
            if (o_count == 4)                                                                                          \
                PREFIX##6_4(w, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride, y + m * y_stride, y_stride); \
            else                                                                                                       \
                for (int64_t o = 0; o < o_count; o++)                                                                  \
                    PREFIX##6_1(w + o * w_stride, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride,           \
                                y + m * y_stride + o, y_stride);                                                       \
        for (; m + 4 <= m_count && o_count == 4; m += 4)                                                               \
            PREFIX##4_4(w, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride, y + m * y_stride, y_stride);     \
        for (; m + 2 <= m_count && o_count == 4; m += 2)                                                               \
            PREFIX##2_4(w, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride, y + m * y_stride, y_stride);     \
        for (; m < m_count; m++)                                                                                       \
            if (o_count == 4)                                                                                          \
                PREFIX##1_4(w, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride, y + m * y_stride, y_stride); \
            else                                                                                                       \
                for (int64_t o = 0; o < o_count; o++)                                                                  \
                    PREFIX##1_1(w + o * w_stride, w_stride, columns __VA_ARGS__, x + m * x_stride, x_stride,           \
                                y + m * y_stride + o, y_stride);                                                       \
    }

PRODUCTS(products, tile_, float, , 0)
PRODUCTS(exact_products, tile_, float, , 1)

#ifdef HAVE_DOT
/* The same for bfloat16 x and weights in their natural order. */
#define DOT(MT, OT)                                                                                                    \
    INLINE void dot_##MT##_##OT(const uint16_t *w, int64_t w_stride, int64_t columns, const uint16_t *x,               \
                                int64_t x_stride, float *y, int64_t y_stride) {                                        \
        lanes sum[MT][OT];                                                                                             \
        for (int m = 0; m < MT; m++)                                                                                   \
            for (int o = 0; o < OT; o++) sum[m][o] = splat(0.f);                                                       \
        for (int64_t k = 0; k < columns; k += 32) {                                                                    \
            __m512bh weight[OT];                                                                                       \
            for (int o = 0; o < OT; o++) weight[o] = (__m512bh)_mm512_loadu_si512(w + o * w_stride + k);               \
            for (int m = 0; m < MT; m++) {                                                                             \
                __m512bh value = (__m512bh)_mm512_loadu_si512(x + m * x_stride + k);                                   \
                for (int o = 0; o < OT; o++)                                                                           \
                    sum[m][o] = (lanes)_mm512_dpbf16_ps((__m512)sum[m][o], value, weight[o]);                          \
            }                                                                                                          \
        }                                                                                                              \
        for (int m = 0; m < MT; m++) fold_each(sum[m], OT, y + m * y_stride);                                          \
    }

DOT(1, 1)
DOT(1, 4)
DOT(2, 4)
DOT(4, 4)
DOT(6, 1)
DOT(6, 4)
PRODUCTS(dot_products, dot_, uint16_t)

/* Whether this CPU's vdpbf16ps adds the odd product first and rounds after each, on numbers that tell. */
static int dot_is_in_order(void) {
    uint32_t state = 12345;
    for (int round = 0; round < 2000; round++) {
        uint16_t a[32], b[32];
        float before[16], after[16];
        for (int i = 0; i < 80; i++) {
            state ^= state << 13, state ^= state >> 17, state ^= state << 5;
            uint32_t exponent = 118 + state / 65536 % 18;
            if (i < 32) a[i] = (uint16_t)((state & 0x807f) | exponent << 7);
            else if (i < 64) b[i - 32] = (uint16_t)((state & 0x807f) | exponent << 7);
            else before[i - 64] = bf16((uint16_t)((state & 0x807f) | exponent << 7)) * 1.0001f;
        }
        __m512 sum = _mm512_dpbf16_ps(_mm512_loadu_ps(before), (__m512bh)_mm512_loadu_si512(a),
                                      (__m512bh)_mm512_loadu_si512(b));
        _mm512_storeu_ps(after, sum);
        for (int i = 0; i < 16; i++) {
            float expected = before[i] + bf16(a[2 * i + 1]) * bf16(b[2 * i + 1]);
            expected = expected + bf16(a[2 * i]) * bf16(b[2 * i]);
            if (expected != after[i]) return 0;
        }
    }
    return 1;
}

/* FP4 by a table of bfloat16: a byte b becomes the two indices b and b >> 4, of which the lookup uses five bits. The
 * table repeats after sixteen entries. Its values are exact, and so are they times the scale. */
INLINE __m512i words_of_e2m1(const uint8_t *p, __m512i table) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), table);
}

INLINE __m512i table_of_e2m1(float scale) {
    static const float values[16] = {0.f,  .5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                                     -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
    __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)(load(values) * scale), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
}

/* FP8 by shifting: exponent and mantissa to their places in a bfloat16, the bias from 7 to 127; the seven subnormals
 * from a table. `shift` is the exponent of the scale at its place. */
INLINE __m512i words_of_e4m3(const uint8_t *p, __m512i shift) {
    const __m512i subnormals = _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40,
                                                                     0x3c60));
    __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
    __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(0x7f));
    __m512i words = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    words = _mm512_mask_permutexvar_epi16(words, subnormal, magnitude, subnormals);
    words = _mm512_mask_add_epi16(words, _mm512_test_epi16_mask(magnitude, magnitude), words, shift);
    return _mm512_or_si512(words, _mm512_and_si512(_mm512_slli_epi16(codes, 8), _mm512_set1_epi16((short)0x8000)));
}

INLINE __m512i shift_of_scale(float scale) {
    int32_t bits;
    memcpy(&bits, &scale, 4);
    return _mm512_set1_epi16((short)(((bits >> 23) - 127) * 128));
}

/* Columns [start, stop) of a stored row, which begin at p, as bfloat16. The scale is a moderate power of two. */
static void decode_words(const uint8_t *p, int format, float scale, int64_t count, uint16_t *out) {
    if (format == BFLOAT16) {
        memcpy(out, p, count * sizeof(uint16_t));
    } else if (format == FLOAT8_E4M3FN) {
        __m512i shift = shift_of_scale(scale);
        for (int64_t k = 0; k < count; k += 32) _mm512_storeu_si512(out + k, words_of_e4m3(p + k, shift));
    } else {
        __m512i table = table_of_e2m1(scale);
        for (int64_t k = 0; k < count; k += 32) _mm512_storeu_si512(out + k, words_of_e2m1(p + k / 2, table));
    }
}

/* One row of bfloat16 x with four rows of a weight. */
INLINE void dot_single(const struct matrix *w, int format, const uint16_t *x, int64_t row, float *y) {
    __m512 sum[4];
    const uint8_t *p[4];
    int64_t step = step_columns(w), scales[4];
    for (int o = 0; o < 4; o++) {
        sum[o] = _mm512_setzero_ps();
        p[o] = row_of(w, format, row + o);
        scales[o] = scale_row(w, row + o);
    }
    for (int64_t start = 0; start < w->columns; start += step) {
        int64_t stop = start + step < w->columns ? start + step : w->columns;
        __m512i table[4];
        for (int o = 0; o < 4 && format != BFLOAT16; o++) {
            float scale = scale_at(w, scales[o]++);
            table[o] = format == FLOAT4_E2M1FN ? table_of_e2m1(scale) : shift_of_scale(scale);
        }
        for (const uint16_t *value = x + start; value < x + stop; value += 32) {
            __m512bh one = (__m512bh)_mm512_loadu_si512(value);
            for (int o = 0; o < 4; o++) {
                __m512i weight = format == FLOAT4_E2M1FN   ? words_of_e2m1(p[o], table[o])
                                 : format == FLOAT8_E4M3FN ? words_of_e4m3(p[o], table[o])
                                                           : _mm512_loadu_si512(p[o]);
                sum[o] = _mm512_dpbf16_ps(sum[o], one, (__m512bh)weight);
                p[o] += bytes_of_32(format);
            }
        }
    }
    for (int o = 0; o < 4; o++) y[o] = fold((lanes)sum[o]);
}
#else
static int dot_is_in_order(void) { return 0; }
static void decode_words(const uint8_t *p, int format, float scale, int64_t count, uint16_t *out) {
    (void)p, (void)format, (void)scale, (void)count, (void)out;
}
#endif

/* 1 if bfloat16 products may go through vdpbf16ps on this machine. */
int32_t dsv4_has_dot(void) { return dot_is_in_order(); }

/* Distance of decoded rows: rows a power of two apart would share the same few lines of the cache. */
INLINE int64_t padded(int64_t columns) { return columns + 32; }

/* Rows [row, row + count) of w, decoded: paired float32, or bfloat16 in natural order if `words`. */
static void decode_rows(const struct matrix *w, int64_t row, int64_t count, int words, void *out) {
    int64_t step = step_columns(w);
    for (int64_t o = 0; o < count; o++) {
        const uint8_t *p = row_of(w, w->format, row + o);
        int64_t place = scale_row(w, row + o);
        for (int64_t start = 0; start < w->columns; start += step) {
            int64_t stop = start + step < w->columns ? start + step : w->columns;
            float scale = scale_at(w, place++);
            if (words) {
                decode_words(p, w->format, scale, stop - start, (uint16_t *)out + o * padded(w->columns) + start);
                p += (stop - start) / 32 * bytes_of_32(w->format);
                continue;
            }
            float *to = (float *)out + o * padded(w->columns) + start;
            for (int64_t k = start; k < stop; k += 32, to += 32, p += bytes_of_32(w->format)) {
                struct pair v = decode(p, w->format, scale);
                store(to, v.odd);
                store(to + 16, v.even);
            }
        }
    }
}

/* One row of x, up to four rows of w. */
static void one_row(const struct matrix *w, const float *x, const uint16_t *words, int64_t row, int64_t count, int exact,
                    float *y) {
#define CASE(FORMAT)                                                                                                   \
    if (w->format == FORMAT && count == 4) {                                                                           \
        if (exact) single_4(w, FORMAT, 1, x, row, y);                                                                  \
        else single_4(w, FORMAT, 0, x, row, y);                                                                        \
        return;                                                                                                        \
    }                                                                                                                  \
    if (w->format == FORMAT) {                                                                                         \
        for (int64_t o = 0; o < count; o++) single_1(w, FORMAT, exact, x, row + o, y + o);                             \
        return;                                                                                                        \
    }
#ifdef HAVE_DOT
    if (words && count == 4) {
        if (w->format == FLOAT4_E2M1FN) dot_single(w, FLOAT4_E2M1FN, words, row, y);
        else if (w->format == FLOAT8_E4M3FN) dot_single(w, FLOAT8_E4M3FN, words, row, y);
        else dot_single(w, BFLOAT16, words, row, y);
        return;
    }
#else
    (void)words;
#endif
    CASE(FLOAT32)
    CASE(BFLOAT16)
    CASE(FLOAT8_E4M3FN)
    CASE(FLOAT4_E2M1FN)
}

#define STRIP 16

/* Rows of the weight that are decoded once for many rows of x, so that both stay in the second level cache. */
static int64_t strip_rows(const struct matrix *w) {
    int64_t rows = 65536 / w->columns / 4 * 4;
    return rows < 4 ? 4 : rows > STRIP ? STRIP : rows;
}

/* Rows of x, `stride` elements apart, as paired float32 and, if `words`, as bfloat16, both padded. */
static void prepare(const void *x, int is_bf16, int64_t m_count, int64_t stride, int64_t columns, float *pairs,
                    uint16_t *words, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && m_count > 1)
    for (int64_t m = 0; m < m_count; m++) {
        const uint8_t *p = (const uint8_t *)x + m * stride * (is_bf16 ? 2 : 4);
        if (words) memcpy(words + m * padded(columns), p, columns * sizeof(uint16_t));
        if (words && m_count > 1) continue; /* nothing else will be looked at */
        for (int64_t k = 0; k < columns; k += 32, p += is_bf16 ? 64 : 128) {
            struct pair v = is_bf16 ? decode_bf16((const uint16_t *)p) : decode_f32((const float *)p);
            store(pairs + m * padded(columns) + k, v.odd);
            store(pairs + m * padded(columns) + k + 16, v.even);
        }
    }
}

/* Rows of x with `count` rows of the weight, which lie decoded in `strip`; sums [m_count, count at most 16]. */
static void many_rows(const struct matrix *w, const void *strip, const float *x, const uint16_t *words, int64_t m_count,
                      int64_t count, int exact, float *sums) {
    int64_t apart = padded(w->columns);
    for (int64_t m = 0; m < m_count; m += 6)
        for (int64_t o = 0; o < count; o += 4) {
            int64_t rows = m_count - m < 6 ? m_count - m : 6, columns = count - o < 4 ? count - o : 4;
            float *to = sums + m * STRIP + o;
#ifdef HAVE_DOT
            if (words) {
                dot_products((const uint16_t *)strip + o * apart, apart, columns, w->columns, words + m * apart, rows,
                             apart, to, STRIP);
                continue;
            }
#endif
            (exact ? exact_products : products)((const float *)strip + o * apart, apart, columns, w->columns,
                                                x + m * apart, rows, apart, to, STRIP);
        }
}

/* y [m_count, stop - start], bfloat16 or float32, = x [m_count, columns] @ rows [start, stop) of w. x is bfloat16 or
 * float32 with rows `x_stride` apart. exact: products are exact in float32; dot: vdpbf16ps may compute them.
 * scratch holds (2 * m_count + threads * 16) * (columns + 32) + threads * 16 * m_count floats. */
void dsv4_linear(const struct matrix *w, const void *values, int64_t m_count, int64_t x_stride, int64_t start,
                 int64_t stop, void *y, float *scratch, int32_t x_is_bf16, int32_t y_is_bf16, int32_t exact,
                 int32_t dot, int32_t threads) {
    int64_t stride = padded(w->columns);
    float *x = scratch;
    uint16_t *words = exact && dot ? (uint16_t *)(scratch + m_count * stride) : 0;
    prepare(values, x_is_bf16, m_count, x_stride, w->columns, x, words, threads);
    scratch += 2 * m_count * stride;
    int64_t y_stride = stop - start, strip = m_count > 1 ? strip_rows(w) : 4, strips = (y_stride + strip - 1) / strip;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t share = 0; share < threads; share++) {
        float *sums = scratch + share * STRIP * (stride + m_count), *buffer = sums + STRIP * m_count;
        for (int64_t at = strips * share / threads; at < strips * (share + 1) / threads; at++) {
            int64_t row = start + at * strip, count = stop - row < strip ? stop - row : strip;
            if (m_count == 1) {
                one_row(w, x, words, row, count, exact, sums);
            } else {
                decode_rows(w, row, count, words != 0, buffer);
                many_rows(w, buffer, x, words, m_count, count, exact, sums);
            }
            for (int64_t m = 0; m < m_count; m++)
                for (int64_t o = 0; o < count; o++)
                    write(y, y_is_bf16, m * y_stride + at * strip + o, sums[m * STRIP + o]);
        }
    }
}
