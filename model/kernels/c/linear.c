/* Matrix products: one row of x with rows of the stored weight (one_row.h), a few (few_rows.h); many rows with a strip of
 * the weight that is decoded once. */
#include "few_rows.h"
#include "many_rows.h"
#include "threads.h"

/* Of a weight that one row of x is multiplied with, what a thread takes at once: some microseconds of reading. */
#define BYTES_PER_TURN (1 << 18)
/* Of a decoded strip, which stays in the second level cache while rows of x pass by. */
#define FLOATS_OF_STRIP (1 << 17)
/* Of a weight that is decoded as a whole, and the rows of x from which on that pays. */
#define FLOATS_OF_THIN (1 << 19)
#define ROWS_OF_THIN 48

static void rounded_products(const float *w, int64_t w_stride, int64_t o_count, int64_t columns, const float *x,
                             int64_t m_count, int64_t x_stride, float *y, int64_t y_stride) {
    products(TWO_ROUNDINGS, (struct decoded){w, w_stride}, o_count, columns, (struct decoded){x, x_stride}, m_count, y,
             y_stride);
}

static void exact_products(const float *w, int64_t w_stride, int64_t o_count, int64_t columns, const float *x,
                           int64_t m_count, int64_t x_stride, float *y, int64_t y_stride) {
    products(FUSED, (struct decoded){w, w_stride}, o_count, columns, (struct decoded){x, x_stride}, m_count, y, y_stride);
}

void OF_FORM(dsv4_products)(int exact, const float *w, int64_t w_stride, int64_t o_count, int64_t columns,
                            const float *x, int64_t m_count, int64_t x_stride, float *y, int64_t y_stride) {
    (exact ? exact_products : rounded_products)(w, w_stride, o_count, columns, x, m_count, x_stride, y, y_stride);
}

#ifdef HAVE_DOT
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

/* Rows of the weight that are decoded at once. */
static int64_t strip_rows(const struct matrix *w) {
    int64_t rows = FLOATS_OF_STRIP / w->columns / TILE_COLUMNS * TILE_COLUMNS;
    return rows < TILE_COLUMNS ? TILE_COLUMNS : least(rows, STRIP_ROWS);
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
    void *whole;  /* the rows of a thin weight, decoded; null elsewhere */
};

struct linears {
    const struct part *parts;
    int64_t count, buffer_floats;
    float *buffers; /* of each worker: a decoded strip, or x times block scales, or some rows of x */
};

/* Whether a weight has so few rows that threads share out rows of x instead. These are prepared where they are used, and
 * the weight is decoded as a whole. */
INLINE int is_thin(const struct product *p, int32_t threads) {
    int64_t rows = p->stop - p->start;
    return p->m_count >= ROWS_OF_THIN && rows < 4 * threads * strip_rows(p->w) &&
           rows * padded(p->w->columns) <= FLOATS_OF_THIN;
}

/* Whether a product has the x of the one before it, in the same form. */
static int shares_x(const struct product *p, int64_t index, int32_t threads) {
    const struct product *before = p - 1;
    return index && before->x == p->x && before->m_count == p->m_count && before->x_stride == p->x_stride &&
           before->w->columns == p->w->columns && before->x_is_bf16 == p->x_is_bf16 && uses_dot(before) == uses_dot(p) &&
           !is_thin(before, threads) && !is_thin(p, threads);
}

/* Floats of x prepared, in the two forms that `struct part` names, and of a weight decoded as a whole. */
INLINE int64_t pairs_floats(const struct product *p, int32_t threads) {
    return is_thin(p, threads) || (uses_dot(p) && p->m_count > 1) ? 0 : p->m_count * padded(p->w->columns);
}

INLINE int64_t bf16_floats(const struct product *p, int32_t threads) {
    return uses_dot(p) && !is_thin(p, threads) ? (p->m_count * padded(p->w->columns) + 1) / 2 : 0;
}

INLINE int64_t whole_floats(const struct product *p, int32_t threads) {
    return is_thin(p, threads) ? (p->stop - p->start) * padded(p->w->columns) : 0;
}

static int64_t buffer_floats(const struct product *list, int64_t count) {
    int64_t most = 0;
    for (const struct product *p = list; p < list + count; p++) {
        int64_t floats = p->m_count > 1 ? STRIP_ROWS * padded(p->w->columns) : p->w->columns / 2;
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
        if (!shares_x(list + i, i, threads))
            floats += pairs_floats(list + i, threads) + bf16_floats(list + i, threads) + whole_floats(list + i, threads);
    return parts_bytes(count) + floats * (int64_t)sizeof(float);
}

/* Row m of x as it is, and as paired float32; null is not wanted. */
INLINE void prepare_row(const struct product *p, int64_t m, uint16_t *bf16, float *pairs) {
    int64_t columns = p->w->columns;
    const uint8_t *x = (const uint8_t *)p->x + m * p->x_stride * (p->x_is_bf16 ? 2 : 4);
    if (bf16) memcpy(bf16, x, columns * sizeof(uint16_t));
    for (int64_t k = 0; pairs && k < columns; k += 32, x += p->x_is_bf16 ? 64 : 128) {
        struct pair v = p->x_is_bf16 ? decode_bf16((const uint16_t *)x) : decode_f32((const float *)x);
        store_sixteen(pairs + k, v.odd);
        store_sixteen(pairs + k + 16, v.even);
    }
}

static void prepare(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct part *part = job;
    int64_t apart = padded(part->product->w->columns);
    int paired = !part->bf16 || part->product->m_count == 1;
    (void)worker;
    for (int64_t m = first; m < last; m++)
        prepare_row(part->product, m, part->bf16 ? part->bf16 + m * apart : 0, paired ? part->pairs + m * apart : 0);
}

static void decode_whole(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct part *part = job;
    const struct product *p = part->product;
    int64_t at = first * padded(p->w->columns) * (int64_t)(uses_dot(p) ? sizeof(uint16_t) : sizeof(float));
    (void)worker;
    OF_FORM(dsv4_decode_rows)(p->w, p->start + first, last - first, uses_dot(p), (uint8_t *)part->whole + at);
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

/* Rows of the weight, or of x if that is thin. */
static int64_t rows_per_item(const struct product *p, int32_t threads) {
    if (is_thin(p, threads)) return TILE_ROWS;
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
        *part = (struct part){p, 0, 0, filled, rows_per_item(p, threads), items, 0, 0};
        int64_t rows = p->stop - p->start, shared = is_thin(p, threads) ? p->m_count : rows;
        if (p->m_count) items += (shared + part->rows_per_item - 1) / part->rows_per_item;
        if (is_thin(p, threads)) {
            part->whole = *floats, *floats += whole_floats(p, threads);
            dsv4_share(decode_whole, part, rows, 1, threads);
            continue;
        }
        if (shares_x(p, i, threads)) {
            part->pairs = parts[i - 1].pairs, part->bf16 = parts[i - 1].bf16;
            part->scales_x = scales_x(part);
            continue;
        }
        part->pairs = *floats, *floats += pairs_floats(p, threads);
        part->bf16 = uses_dot(p) ? (uint16_t *)*floats : 0, *floats += bf16_floats(p, threads);
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

/* Rows of x with a strip of the weight, in the way that the product is added up. */
static void multiply_by_strip(const struct product *p, const struct strip *strip) {
#ifdef HAVE_DOT
    if (uses_dot(p)) {
        multiply_strip(BF16_DOT, p, strip);
        return;
    }
#endif
    if (p->exact) multiply_strip(FUSED, p, strip);
    else multiply_strip(TWO_ROUNDINGS, p, strip);
}

/* Rows [first, last) of a product's weight, at most a strip of them, with many rows of x. */
static void many_rows(const struct part *part, int64_t first, int64_t last, float *buffer) {
    const struct product *p = part->product;
    int64_t apart = padded(p->w->columns);
    const void *x = part->bf16 ? (const void *)part->bf16 : part->pairs;
    struct strip strip = {{buffer, apart}, last - first, {x, apart}, p->m_count, 0, first - p->start};
    OF_FORM(dsv4_decode_rows)(p->w, first, last - first, part->bf16 != 0, buffer);
    multiply_by_strip(p, &strip);
}

/* Rows [first, last) of x, at most TILE_ROWS, with all rows of a thin weight. */
static void thin(const struct part *part, int64_t first, int64_t last, float *buffer) {
    const struct product *p = part->product;
    int64_t apart = padded(p->w->columns), rows = p->stop - p->start, size = uses_dot(p) ? 2 : 4;
    for (int64_t m = 0; m < last - first; m++)
        prepare_row(p, first + m, uses_dot(p) ? (uint16_t *)buffer + m * apart : 0, uses_dot(p) ? 0 : buffer + m * apart);
    for (int64_t o = 0; o < rows; o += STRIP_ROWS) {
        const uint8_t *weights = (const uint8_t *)part->whole + o * apart * size;
        struct strip strip = {{weights, apart}, least(rows - o, STRIP_ROWS), {buffer, apart}, last - first, first, o};
        multiply_by_strip(p, &strip);
    }
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
#endif

static void multiply(const void *job, int64_t first, int64_t last, int64_t worker) {
    const struct linears *all = job;
    const struct part *part = all->parts;
    for (int64_t item = first; item < last; item++) {
        while (part + 1 < all->parts + all->count && part[1].first_item <= item) part++;
        const struct product *p = part->product;
        int64_t offset = (item - part->first_item) * part->rows_per_item, row = p->start + offset;
        int64_t stop = least(row + part->rows_per_item, p->stop);
        float *buffer = all->buffers + worker * all->buffer_floats;
        if (part->whole) thin(part, offset, least(offset + part->rows_per_item, p->m_count), buffer);
        else if (p->m_count == 1) one_row(part, row, stop, buffer);
#ifdef HAVE_DOT
        else if (has_few_rows(p)) few_rows(part, row, stop, buffer);
#endif
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
