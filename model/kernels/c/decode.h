/* Stored rows: where they begin, their scales, and 32 numbers of them at a time as float32. */
#pragma once
#include "vectors.h"
#if defined(HAVE_AVX512)
#include "decode/avx512.h"
#elif defined(HAVE_AVX2)
#include "decode/avx2.h"
#elif defined(HAVE_NEON)
#include "decode/neon.h"
#else
#include "decode/plain.h"
#endif

INLINE struct pair decode(const uint8_t *p, int format, float scale) {
    if (format == FLOAT4_E2M1FN) return decode_e2m1(p, scale);
    if (format == FLOAT8_E4M3FN) return decode_e4m3(p, scale);
    if (format == BFLOAT16) return decode_bf16((const uint16_t *)p);
    return decode_f32((const float *)p);
}

/* Bytes of 32 stored numbers. */
INLINE int64_t bytes_of_32(int format) {
    return format == FLOAT32 ? 128 : format == BFLOAT16 ? 64 : format == FLOAT8_E4M3FN ? 32 : 16;
}

/* Where a row begins, where its scales begin, and the scale at a place. */
INLINE const uint8_t *row_of(const struct matrix *w, int format, int64_t row) {
    return (const uint8_t *)w->values + row * (w->columns / 32 * bytes_of_32(format));
}

INLINE int64_t scale_row(const struct matrix *w, int64_t row) { return row / w->block_rows * w->scale_columns; }

INLINE float scale_at(const struct matrix *w, int64_t place) {
    if (!w->scale) return 1.f;
    return w->scale_is_float32 ? ((const float *)w->scale)[place] : e8m0(((const uint8_t *)w->scale)[place]);
}

/* Columns that share one scale; all of them if there is none. */
INLINE int64_t step_columns(const struct matrix *w) { return w->scale ? w->block_columns : w->columns; }
