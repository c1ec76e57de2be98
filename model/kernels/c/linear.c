/* Matrix products: one row of x with rows of the stored weight (one_row.h), a few (few_rows.h); many rows with a strip of
 * the weight that is decoded once. */
#include "few_rows.h"
#include "threads.h"

/* Rows of a weight that are decoded at once for many rows of x. */
#define ROWS_PER_STRIP 16
/* Of a weight that one row of x is multiplied with, what a thread takes at once: some microseconds of reading. */
#define BYTES_PER_TURN (1 << 18)

/* How products are added up; a constant wherever it is an argument. */
enum arithmetic {
    TWO_ROUNDINGS, /* float32 pairs: the product is rounded, then the sum */
    FUSED,         /* float32 pairs whose products are exact */
    BF16_DOT,      /* bfloat16 in natural order, by vdpbf16ps */
};

/* Products of `mt` rows of paired x with `ot` rows of paired weights; mt, ot and exact are constants. */
INLINE void float_tile(int exact, int mt, int ot, const float *w, int64_t w_stride, int64_t columns, const float *x,
                       int64_t x_stride, float *y, int64_t y_stride) {
    sixteen sum[6][4];
    for (int m = 0; m < mt; m++)
        for (int o = 0; o < ot; o++) sum[m][o] = zeros();
    for (int64_t k = 0; k < columns; k += 16) {
        sixteen weight[4];
        for (int o = 0; o < ot; o++) weight[o] = load_sixteen(w + o * w_stride + k);
        for (int m = 0; m < mt; m++) {
            sixteen value = load_sixteen(x + m * x_stride + k);
            for (int o = 0; o < ot; o++) sum[m][o] = add_product(value, weight[o], sum[m][o], exact);
        }
    }
    for (int m = 0; m < mt; m++) horizontal_sums(sum[m], ot, y + m * y_stride);
}

#ifdef HAVE_DOT
/* The same for bfloat16 x and weights in their natural order. */
INLINE void dot_tile(int mt, int ot, const uint16_t *w, int64_t w_stride, int64_t columns, const uint16_t *x,
                     int64_t x_stride, float *y, int64_t y_stride) {
    lanes sum[6][4];
    for (int m = 0; m < mt; m++)
        for (int o = 0; o < ot; o++) sum[m][o] = splat(0.f);
    for (int64_t k = 0; k < columns; k += 32) {
        __m512bh weight[4];
        for (int o = 0; o < ot; o++) weight[o] = (__m512bh)_mm512_loadu_si512(w + o * w_stride + k);
        for (int m = 0; m < mt; m++) {
            __m512bh value = (__m512bh)_mm512_loadu_si512(x + m * x_stride + k);
            for (int o = 0; o < ot; o++) sum[m][o] = (lanes)_mm512_dpbf16_ps((__m512)sum[m][o], value, weight[o]);
        }
    }
    for (int m = 0; m < mt; m++) horizontal_sums(sum[m], ot, y + m * y_stride);
}
#endif

/* Element i of data of the type that `kind` multiplies. */
INLINE const void *element(int kind, const void *p, int64_t i) {
    return (const uint8_t *)p + i * (int64_t)(kind == BF16_DOT ? sizeof(uint16_t) : sizeof(float));
}

INLINE void tile(int kind, int mt, int ot, const void *w, int64_t w_stride, int64_t columns, const void *x,
                 int64_t x_stride, float *y, int64_t y_stride) {
#ifdef HAVE_DOT
    if (kind == BF16_DOT) {
        dot_tile(mt, ot, w, w_stride, columns, x, x_stride, y, y_stride);
        return;
    }
#endif
    float_tile(kind == FUSED, mt, ot, w, w_stride, columns, x, x_stride, y, y_stride);
}

/* y [m_count, o_count] = x @ w.T, o_count at most 4, in tiles of six rows of x and fewer; kind is a constant. */
INLINE void products(int kind, const void *w, int64_t w_stride, int64_t o_count, int64_t columns, const void *x,
                     int64_t m_count, int64_t x_stride, float *y, int64_t y_stride) {
    int64_t m = 0;
#define TILE(MT, OT, O)                                                                                                \
    tile(kind, MT, OT, element(kind, w, (O)*w_stride), w_stride, columns, element(kind, x, m * x_stride), x_stride,    \
         y + m * y_stride + (O), y_stride)
    if (o_count == 4) {
        for (; m + 6 <= m_count; m += 6) TILE(6, 4, 0);
        for (; m + 4 <= m_count; m += 4) TILE(4, 4, 0);
        for (; m + 2 <= m_count; m += 2) TILE(2, 4, 0);
        for (; m < m_count; m++) TILE(1, 4, 0);
        return;
    }
    for (; m + 6 <= m_count; m += 6)
        for (int64_t o = 0; o < o_count; o++) TILE(6, 1, o);
    for (; m < m_count; m++)
        for (int64_t o = 0; o < o_count; o++) TILE(1, 1, o);
#undef TILE
}

static void rounded_products(const float *w, int64_t w_stride, int64_t o_count, int64_t columns, const float *x,
                             int64_t m_count, int64_t x_stride, float *y, int64_t y_stride) {
    products(TWO_ROUNDINGS, w, w_stride, o_count, columns, x, m_count, x_stride, y, y_stride);
}

static void exact_products(const float *w, int64_t w_stride, int64_t o_count, int64_t columns, const float *x,
                           int64_t m_count, int64_t x_stride, float *y, int64_t y_stride) {
    products(FUSED, w, w_stride, o_count, columns, x, m_count, x_stride, y, y_stride);
}

void OF_FORM(dsv4_products)(int exact, const float *w, int64_t w_stride, int64_t o_count, int64_t columns,
                            const float *x, int64_t m_count, int64_t x_stride, float *y, int64_t y_stride) {
    (exact ? exact_products : rounded_products)(w, w_stride, o_count, columns, x, m_count, x_stride, y, y_stride);
}

#ifdef HAVE_DOT
/* The same by vdpbf16ps, for bfloat16 in natural order whose products are exact. */
static void dot_products(const uint16_t *w, int64_t w_stride, int64_t o_count, int64_t columns, const uint16_t *x,
                         int64_t m_count, int64_t x_stride, float *y, int64_t y_stride) {
    products(BF16_DOT, w, w_stride, o_count, columns, x, m_count, x_stride, y, y_stride);
}

/* Whether this CPU's vdpbf16ps adds the odd product first and rounds after each, on numbers that tell. */
int32_t OF_FORM(dsv4_dot_is_in_order)(void) {
    uint32_t state = 12345;
    for (int round = 0; round < 2000; round++) {
        uint16_t a[32], b[32];
        float before[16], after[16];
        for (int i = 0; i < 80; i++) {
            state ^= state << 13, state ^= state >> 17, state ^= state << 5;
            uint32_t exponent = 118 + state / 65536 % 18;
            if (i < 32) a[i] = (uint16_t)((state & 0x807f) | exponent << 7);
            else if (i < 64) b[i - 32] = (uint16_t)((state & 0x807f) | exponent << 7);
            else before[i - 64] = widen_bf16((uint16_t)((state & 0x807f) | exponent << 7)) * 1.0001f;
        }
        __m512 sum = _mm512_dpbf16_ps(_mm512_loadu_ps(before), (__m512bh)_mm512_loadu_si512(a),
                                      (__m512bh)_mm512_loadu_si512(b));
        _mm512_storeu_ps(after, sum);
        for (int i = 0; i < 16; i++) {
            float expected = before[i] + widen_bf16(a[2 * i + 1]) * widen_bf16(b[2 * i + 1]);
            expected = expected + widen_bf16(a[2 * i]) * widen_bf16(b[2 * i]);
            if (expected != after[i]) return 0;
        }
    }
    return 1;
}
#endif

void OF_FORM(dsv4_decode_rows)(const struct matrix *w, int64_t row, int64_t count, int as_bf16, void *out) {
    int64_t step = step_columns(w);
    for (int64_t o = 0; o < count; o++) {
        const uint8_t *p = row_of(w, w->format, row + o);
        int64_t place = scale_row(w, row + o);
        for (int64_t start = 0; start < w->columns; start += step) {
            int64_t stop = least(start + step, w->columns);
            float scale = scale_at(w, place++);
#ifdef HAVE_DOT
            if (as_bf16) {
                decode_as_bf16(p, w->format, scale, stop - start, (uint16_t *)out + o * padded(w->columns) + start);
                p += (stop - start) / 32 * bytes_of_32(w->format);
                continue;
            }
#else
            (void)as_bf16;
#endif
            float *to = (float *)out + o * padded(w->columns) + start;
            for (int64_t k = start; k < stop; k += 32, to += 32, p += bytes_of_32(w->format)) {
                struct pair v = decode(p, w->format, scale);
                store_sixteen(to, v.odd);
                store_sixteen(to + 16, v.even);
            }
        }
    }
}

/* Rows of the weight that are decoded at once, so that they and the rows of x stay in the second level cache. */
static int64_t strip_rows(const struct matrix *w) {
    int64_t rows = 65536 / w->columns / 4 * 4;
    return rows < 4 ? 4 : least(rows, ROWS_PER_STRIP);
}

/* Rows of x with `count` rows of the weight, decoded in `strip`; sums [m_count, ROWS_PER_STRIP]. */
static void multiply_strip(const struct matrix *w, const void *strip, const float *x, const uint16_t *x_bf16,
                           int64_t m_count, int64_t count, int exact, float *sums) {
    int64_t apart = padded(w->columns);
    for (int64_t m = 0; m < m_count; m += 6)
        for (int64_t o = 0; o < count; o += 4) {
            int64_t rows = least(m_count - m, 6), columns = least(count - o, 4);
            float *to = sums + m * ROWS_PER_STRIP + o;
#ifdef HAVE_DOT
            if (x_bf16) {
                dot_products((const uint16_t *)strip + o * apart, apart, columns, w->columns, x_bf16 + m * apart, rows,
                             apart, to, ROWS_PER_STRIP);
                continue;
            }
#else
            (void)x_bf16;
#endif
            OF_FORM(dsv4_products)(exact, (const float *)strip + o * apart, apart, columns, w->columns, x + m * apart,
                                   rows, apart, to, ROWS_PER_STRIP);
        }
}

/* One product of a list: its x, prepared, and the rows of the weight in one item of the job; items are numbered through
 * the list. */
struct part {
    const struct product *product;
    float *pairs;   /* x as paired float32, padded; with `bf16` only for a single row */
    uint16_t *bf16; /* x as it is, padded; null where vdpbf16ps is not used */
    const void *tables; /* of the whole list, see one_row.h */
    int64_t rows_per_item, first_item;
    int scales_x; /* whether x, a single row, is multiplied by block scales instead of the weight */
};

struct linears {
    const struct part *parts;
    int64_t count, buffer_floats;
    float *buffers; /* of each worker: a decoded strip and its sums, or x times block scales */
};

/* Whether a product has the x of the one before it, in the same form. */
static int shares_x(const struct product *p, int64_t index) {
    const struct product *before = p - 1;
    return index && before->x == p->x && before->m_count == p->m_count && before->x_stride == p->x_stride &&
           before->w->columns == p->w->columns && before->x_is_bf16 == p->x_is_bf16 && uses_dot(before) == uses_dot(p);
}

/* Floats of x prepared, in the two forms that `struct part` names. */
INLINE int64_t pairs_floats(const struct product *p) {
    return uses_dot(p) && p->m_count > 1 ? 0 : p->m_count * padded(p->w->columns);
}

INLINE int64_t bf16_floats(const struct product *p) {
    return uses_dot(p) ? (p->m_count * padded(p->w->columns) + 1) / 2 : 0;
}

static int64_t buffer_floats(const struct product *list, int64_t count) {
    int64_t most = 0;
    for (const struct product *p = list; p < list + count; p++) {
        int64_t floats = p->m_count > 1 ? ROWS_PER_STRIP * (padded(p->w->columns) + p->m_count) : p->w->columns / 2;
        most = floats > most ? floats : most;
    }
    return most;
}

/* Bytes of the parts of a list: what lies behind them begins a line of the cache. */
static int64_t parts_bytes(int64_t count) { return (count * (int64_t)sizeof(struct part) + 63) / 64 * 64; }

/* Floats of the tables that some product of a list needs. */
static int64_t table_floats(const struct product *list, int64_t count) {
    for (const struct product *p = list; p < list + count; p++)
        if (needs_tables(p)) return TABLE_BYTES / (int64_t)sizeof(float);
    return 0;
}

int64_t OF_FORM(dsv4_linears_scratch)(const struct product *list, int64_t count, int32_t threads) {
    int64_t floats = table_floats(list, count) + threads * buffer_floats(list, count);
    for (int64_t i = 0; i < count; i++)
        if (!shares_x(list + i, i)) floats += pairs_floats(list + i) + bf16_floats(list + i);
    return parts_bytes(count) + floats * (int64_t)sizeof(float);
}

static void prepare(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct part *part = job;
    const struct product *p = part->product;
    int64_t columns = p->w->columns;
    (void)worker;
    for (int64_t m = first; m < last; m++) {
        const uint8_t *x = (const uint8_t *)p->x + m * p->x_stride * (p->x_is_bf16 ? 2 : 4);
        if (part->bf16) memcpy(part->bf16 + m * padded(columns), x, columns * sizeof(uint16_t));
        if (part->bf16 && p->m_count > 1) continue;
        for (int64_t k = 0; k < columns; k += 32, x += p->x_is_bf16 ? 64 : 128) {
            struct pair v = p->x_is_bf16 ? decode_bf16((const uint16_t *)x) : decode_f32((const float *)x);
            store_sixteen(part->pairs + m * padded(columns) + k, v.odd);
            store_sixteen(part->pairs + m * padded(columns) + k + 16, v.even);
        }
    }
}

/* Whether the only row of x can be multiplied by the block scales of FP8, once it is prepared. */
static int scales_x(const struct part *part) {
    const struct product *p = part->product;
    if (p->m_count != 1 || p->w->format != FLOAT8_E4M3FN) return 0;
#if defined(HAVE_DOT)
    return part->bf16 && can_be_scaled(part->bf16, p->w->columns);
#elif defined(HAVE_AVX2)
    return p->exact && can_be_scaled(part->pairs, p->w->columns);
#else
    return 0;
#endif
}

/* Whether few_rows.h has the product. */
INLINE int has_few_rows(const struct product *p) {
#ifdef HAVE_DOT
    return uses_dot(p) && p->m_count > 1 && p->m_count <= MOST_FEW && has_known_scales(p->w);
#else
    (void)p;
    return 0;
#endif
}

static int64_t rows_per_item(const struct product *p) {
    if (p->m_count > 1 && !has_few_rows(p)) return strip_rows(p->w);
    int64_t rows = BYTES_PER_TURN / (p->w->columns / 32 * bytes_of_32(p->w->format)) / 4 * 4;
    return rows < 4 ? 4 : rows;
}

/* Fill the parts, prepare each x once, and return the number of items. `floats` is the scratch behind the parts. */
static int64_t begin(const struct product *list, int64_t count, struct part *parts, float **floats, int32_t threads) {
    int64_t items = 0, tables = table_floats(list, count);
    const void *filled = *floats;
    if (tables) fill_tables(*floats);
    *floats += tables;
    for (int64_t i = 0; i < count; i++) {
        const struct product *p = list + i;
        struct part *part = parts + i;
        *part = (struct part){p, 0, 0, filled, rows_per_item(p), items, 0};
        if (p->m_count) items += (p->stop - p->start + part->rows_per_item - 1) / part->rows_per_item;
        if (shares_x(p, i)) {
            part->pairs = parts[i - 1].pairs, part->bf16 = parts[i - 1].bf16;
            part->scales_x = scales_x(part);
            continue;
        }
        part->pairs = *floats, *floats += pairs_floats(p);
        part->bf16 = uses_dot(p) ? (uint16_t *)*floats : 0, *floats += bf16_floats(p);
        dsv4_share(prepare, part, p->m_count, dsv4_quarters(p->m_count, threads), threads);
        part->scales_x = scales_x(part);
    }
    return items;
}

/* Rows [first, last) of a product's weight with its only row of x. */
static void one_row(const struct part *part, int64_t first, int64_t last, float *buffer) {
    const struct product *p = part->product;
    struct one_x x = {part->pairs, part->bf16, part->scales_x ? (uint16_t *)buffer : 0, -1, part->tables};
    for (int64_t row = first; row < last; row += 4) {
        int64_t count = least(last - row, 4);
        float sums[4];
        one_row_by_four(p->w, &x, row, count, p->exact, sums);
        for (int64_t o = 0; o < count; o++) store_as(p->y, p->y_is_bf16, row - p->start + o, sums[o]);
    }
}

/* The same, at most a strip of them, with many rows of x. */
static void many_rows(const struct part *part, int64_t first, int64_t last, float *buffer) {
    const struct product *p = part->product;
    int64_t count = last - first;
    float *sums = buffer, *strip = buffer + ROWS_PER_STRIP * p->m_count;
    OF_FORM(dsv4_decode_rows)(p->w, first, count, part->bf16 != 0, strip);
    multiply_strip(p->w, strip, part->pairs, part->bf16, p->m_count, count, p->exact, sums);
    for (int64_t m = 0; m < p->m_count; m++)
        for (int64_t o = 0; o < count; o++)
            store_as(p->y, p->y_is_bf16, m * p->y_stride + first - p->start + o, sums[m * ROWS_PER_STRIP + o]);
}

#ifdef HAVE_DOT
/* The same with a few rows of x. */
static void few_rows(const struct part *part, int64_t first, int64_t last, float *buffer) {
    const struct product *p = part->product;
    struct few_x x = {part->bf16, padded(p->w->columns)};
    for (; first + 4 <= last; first += 4) {
        float sums[4 * MOST_FEW];
        few_rows_by_four(p->m_count, p->w, x, part->tables, first, sums);
        for (int64_t m = 0; m < p->m_count; m++)
            for (int64_t o = 0; o < 4; o++)
                store_as(p->y, p->y_is_bf16, m * p->y_stride + first - p->start + o, sums[4 * m + o]);
    }
    if (first < last) many_rows(part, first, last, buffer);
}
#else
#define few_rows many_rows
#endif

static void multiply(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct linears *all = job;
    const struct part *part = all->parts;
    for (int64_t item = first; item < last; item++) {
        while (part + 1 < all->parts + all->count && part[1].first_item <= item) part++;
        int64_t row = part->product->start + (item - part->first_item) * part->rows_per_item;
        int64_t stop = least(row + part->rows_per_item, part->product->stop);
        float *buffer = all->buffers + worker * all->buffer_floats;
        if (part->product->m_count == 1) one_row(part, row, stop, buffer);
        else if (has_few_rows(part->product)) few_rows(part, row, stop, buffer);
        else many_rows(part, row, stop, buffer);
    }
}

void OF_FORM(dsv4_linears)(const struct product *list, int64_t count, void *scratch, int32_t threads) {
    struct part *parts = scratch;
    float *floats = (float *)((uint8_t *)scratch + parts_bytes(count));
    int64_t items = begin(list, count, parts, &floats, threads);
    struct linears all = {parts, count, buffer_floats(list, count), floats};
    dsv4_share(multiply, &all, items, 1, threads);
}

int64_t OF_FORM(dsv4_float32)(void) { return FLOAT32; }
int64_t OF_FORM(dsv4_bfloat16)(void) { return BFLOAT16; }
int64_t OF_FORM(dsv4_float8_e4m3fn)(void) { return FLOAT8_E4M3FN; }
int64_t OF_FORM(dsv4_float4_e2m1fn)(void) { return FLOAT4_E2M1FN; }
