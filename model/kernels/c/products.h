/* Products of rows with stored matrices, in lists, and decoding of stored rows: linear.c has them for all. */
#pragma once
#include "decode.h"

/* Distance of decoded rows: rows a power of two apart would share the same few lines of the cache. */
INLINE int64_t padded(int64_t columns) { return columns + 32; }

/* y [m_count, stop - start] = x [m_count, columns] @ rows [start, stop) of w; strides in elements. x and y are bfloat16
 * or float32. `exact`: x is bfloat16 and every product is exact in float32. The same struct is declared in cpu.py. */
struct product {
    const struct matrix *w;
    const void *x;
    void *y;
    int64_t m_count, x_stride, y_stride, start, stop;
    int32_t x_is_bf16, y_is_bf16, exact;
};

/* y [m_count, o_count] = x @ w.T for paired float32 x and w, o_count at most 4; strides in elements. `exact`: every
 * product is exact in float32. */
void OF_FORM(dsv4_products)(int exact, const float *w, int64_t w_stride, int64_t o_count, int64_t columns,
                            const float *x, int64_t m_count, int64_t x_stride, float *y, int64_t y_stride);

/* Rows [row, row + count) of w, decoded, `padded(columns)` apart: paired float32, or, if `as_bf16`, bfloat16 in natural
 * order, which needs HAVE_DOT. */
void OF_FORM(dsv4_decode_rows)(const struct matrix *w, int64_t row, int64_t count, int as_bf16, void *out);

/* The code of each format of a matrix: binding.py asks for it by the format's name. */
int64_t OF_FORM(dsv4_float32)(void);
int64_t OF_FORM(dsv4_bfloat16)(void);
int64_t OF_FORM(dsv4_float8_e4m3fn)(void);
int64_t OF_FORM(dsv4_float4_e2m1fn)(void);

/* Bytes of scratch of `dsv4_linears`, and all products of a list. */
int64_t OF_FORM(dsv4_linears_scratch)(const struct product *list, int64_t count, int32_t threads);
void OF_FORM(dsv4_linears)(const struct product *list, int64_t count, void *scratch, int32_t threads);
