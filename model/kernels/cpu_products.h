/* Products of many rows with up to four rows, and decoding of stored rows: cpu_linear.c has them for all. */
#pragma once
#include "cpu_vectors.h"

/* Distance of decoded rows: rows a power of two apart would share the same few lines of the cache. */
INLINE int64_t padded(int64_t columns) { return columns + 32; }

/* y [m_count, o_count] = x @ w.T for paired float32 x and w, o_count at most 4; strides in elements. `exact`: every
 * product is exact in float32. */
void dsv4_products(int exact, const float *w, int64_t w_stride, int64_t o_count, int64_t columns, const float *x,
                   int64_t m_count, int64_t x_stride, float *y, int64_t y_stride);

/* Rows [row, row + count) of w, decoded, `padded(columns)` apart: paired float32, or, if `as_bf16`, bfloat16 in natural
 * order, which needs HAVE_DOT. */
void dsv4_decode_rows(const struct matrix *w, int64_t row, int64_t count, int as_bf16, void *out);
