/* Two forms of the kernels, A and B, on the same numbers in one program: exits 1 at the first bit that differs, else
 * prints one checksum of all results, which must be the same on every machine. For processors that no Python of ours
 * runs on, such as ARM under qemu; elsewhere tests/model/kernels compares the forms with the ones in torch.
 *
 * Compiled with -DA=plain -DB=neon and the like, and -DFORM=plain -DNO_VECTORS for the structs. */
#include "products.h"
#include <stdio.h>
#include <stdlib.h>

#define DECLARED(form) DECLARED_FOR(form)
#define DECLARED_FOR(form)                                                                                             \
    void dsv4_linears_##form(const struct product *, int64_t, void *, int32_t);                                        \
    void dsv4_sparse_attention_##form(const void *, const void *, const void *, const int32_t *, const float *, float, \
                                      int64_t, int64_t, int64_t, int64_t, int64_t, int32_t, void *, void *, int32_t);  \
    void dsv4_index_scores_##form(const struct matrix *, const void *, const float *, int64_t, int64_t, int32_t,       \
                                  float *, void *, int32_t);                                                           \
    void dsv4_simulate_fp8_##form(const void *, void *, int64_t, int64_t, int64_t, int64_t, int32_t,         \
                                 int32_t);                                                                             \
    void dsv4_simulate_index_##form(const void *, void *, void *, int64_t, int64_t, int64_t, int32_t, int32_t);        \
    void dsv4_rms_norm_##form(const void *, const float *, float, void *, void *, int64_t, int64_t, int32_t, int32_t); \
    void dsv4_swiglu_##form(const void *, const void *, const float *, void *, int64_t, int64_t, float, int32_t,       \
                            int32_t);                                                                                  \
    void dsv4_sqrtsoftplus_##form(const float *, float *, int64_t, int32_t);                                           \
    void dsv4_add_experts_##form(const void *, const void *, const int64_t *, void *, float *, int64_t, int64_t,       \
                                 int64_t, int32_t, int32_t);
#define CALL(form, name) CALL_OF(form, name)
#define CALL_OF(form, name) dsv4_##name##_##form
DECLARED(A)
DECLARED(B)

#define MOST (1 << 16) /* bytes of any result */
static uint8_t result_a[MOST], result_b[MOST], scratch[1 << 22];
static uint64_t state = 88172645463325252u, checksum = 14695981039346656037u;
static int compared;

static uint32_t next(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 16);
}

/* In [-4, 4) with 8 significant bits, so that it is a bfloat16. */
static float number(void) { return rounded_to_bf16((float)((double)next() / 4294967296.0 * 8.0 - 4.0)); }

static void fill(void *out, int64_t count, int is_bf16) {
    for (int64_t i = 0; i < count; i++) store_as(out, is_bf16, i, is_bf16 ? number() : number() * 1.0001f);
}

static void compare(const char *what, int64_t bytes) {
    if (bytes > MOST || memcmp(result_a, result_b, bytes)) {
        printf("%s differs\n", what);
        exit(1);
    }
    for (int64_t i = 0; i < bytes; i++) checksum = (checksum ^ result_a[i]) * 1099511628211u;
    memset(result_a, 1, MOST), memset(result_b, 2, MOST);
    compared++;
}

static void linears(int format, int x_is_bf16, int exact, int64_t m_count, float base) {
    enum { ROWS = 37, COLUMNS = 256 };
    static uint8_t values[ROWS * COLUMNS * 4], x[9 * COLUMNS * 4];
    static float scale[ROWS * COLUMNS / 32];
    int fp4 = format == FLOAT4_E2M1FN, quantized = fp4 || format == FLOAT8_E4M3FN;
    if (!quantized) fill(values, ROWS * COLUMNS, format == BFLOAT16);
    for (int i = 0; i < ROWS * COLUMNS && quantized; i++) {
        values[i] = (uint8_t)next();
        if (!fp4 && (values[i] & 0x7f) == 0x7f) values[i] = 0; /* NaN */
    }
    for (int i = 0; i < ROWS * COLUMNS / 32; i++) scale[i] = ldexpf(base, (int)(next() % 20) - 10);
    fill(x, 9 * COLUMNS, x_is_bf16);
    int64_t wide = quantized ? (fp4 ? 32 : 128) : COLUMNS;
    struct matrix w = {values, quantized ? scale : 0, ROWS, COLUMNS, fp4 ? 1 : 16, wide, COLUMNS / wide, format, 1, 0};
    struct product p = {&w, x, result_a, m_count, COLUMNS, ROWS - 1, 1, ROWS, x_is_bf16, 0, exact};
    CALL(A, linears)(&p, 1, scratch, 2);
    p.y = result_b;
    CALL(B, linears)(&p, 1, scratch, 2);
    compare("linears", m_count * (ROWS - 1) * 4);
}

static void attention(int is_bf16) {
    enum { QUERIES = 3, HEADS = 6, C = 64, WINDOW = 70, COMPRESSED = 20, LISTED = 100 };
    static float q[QUERIES * HEADS * C], window[WINDOW * C], compressed[COMPRESSED * C], sink[HEADS];
    static int32_t index[QUERIES * LISTED];
    fill(q, QUERIES * HEADS * C, is_bf16), fill(window, WINDOW * C, is_bf16), fill(compressed, COMPRESSED * C, is_bf16);
    fill(sink, HEADS, 0);
    for (int i = 0; i < QUERIES * LISTED; i++) index[i] = (int32_t)(next() % (WINDOW + COMPRESSED + 1)) - 1;
    for (int i = 0; i < QUERIES; i++) index[i * LISTED] = 0;
    CALL(A, sparse_attention)
    (q, window, compressed, index, sink, .125f, QUERIES, HEADS, C, LISTED, WINDOW, is_bf16, result_a, scratch, 2);
    CALL(B, sparse_attention)
    (q, window, compressed, index, sink, .125f, QUERIES, HEADS, C, LISTED, WINDOW, is_bf16, result_b, scratch, 2);
    compare("attention", QUERIES * HEADS * C * (is_bf16 ? 2 : 4));
}

static void scores(int rounded) {
    enum { QUERIES = 5, HEADS = 12, C = 64, KEYS = 31 };
    static float q[QUERIES * HEADS * C], weights[QUERIES * HEADS], keys[KEYS * C];
    fill(q, QUERIES * HEADS * C, rounded), fill(weights, QUERIES * HEADS, 0), fill(keys, KEYS * C, rounded);
    struct matrix w = {keys, 0, KEYS, C, 1, C, 1, rounded ? BFLOAT16 : FLOAT32, 0, 0};
    CALL(A, index_scores)(&w, q, weights, QUERIES, HEADS, rounded, (float *)result_a, scratch, 2);
    CALL(B, index_scores)(&w, q, weights, QUERIES, HEADS, rounded, (float *)result_b, scratch, 2);
    compare("index_scores", QUERIES * KEYS * 4);
}

static void small(int is_bf16) {
    enum { ROWS = 7, COLUMNS = 128 };
    static float x[ROWS * COLUMNS], y[ROWS * COLUMNS], weight[ROWS * COLUMNS];
    int64_t bytes = ROWS * COLUMNS * (is_bf16 ? 2 : 4);
    fill(x, ROWS * COLUMNS, is_bf16), fill(y, ROWS * COLUMNS, is_bf16), fill(weight, ROWS * COLUMNS, 0);
    CALL(A, simulate_fp8)(x, result_a, ROWS, COLUMNS, COLUMNS - 32, 64, is_bf16, 2);
    CALL(B, simulate_fp8)(x, result_b, ROWS, COLUMNS, COLUMNS - 32, 64, is_bf16, 2);
    compare("simulate_fp8", bytes);
    CALL(A, simulate_index)(x, result_a, scratch, ROWS, COLUMNS, 32, is_bf16, 2);
    CALL(B, simulate_index)(x, result_b, scratch, ROWS, COLUMNS, 32, is_bf16, 2);
    compare("simulate_index", bytes);
    CALL(A, rms_norm)(x, weight, 1e-6f, result_a, scratch, ROWS, COLUMNS, is_bf16, 2);
    CALL(B, rms_norm)(x, weight, 1e-6f, result_b, scratch, ROWS, COLUMNS, is_bf16, 2);
    compare("rms_norm", bytes);
    CALL(A, swiglu)(x, y, weight, result_a, ROWS, COLUMNS, 3.f, is_bf16, 2);
    CALL(B, swiglu)(x, y, weight, result_b, ROWS, COLUMNS, 3.f, is_bf16, 2);
    compare("swiglu", bytes);
    CALL(A, sqrtsoftplus)(weight, (float *)result_a, ROWS * COLUMNS, 2);
    CALL(B, sqrtsoftplus)(weight, (float *)result_b, ROWS * COLUMNS, 2);
    compare("sqrtsoftplus", ROWS * COLUMNS * 4);
    static const int64_t experts[] = {4, 0, 2, 1, 9, 5};
    CALL(A, add_experts)(x, y, experts, result_a, (float *)scratch, 2, 3, COLUMNS, is_bf16, 2);
    CALL(B, add_experts)(x, y, experts, result_b, (float *)scratch, 2, 3, COLUMNS, is_bf16, 2);
    compare("add_experts", 2 * COLUMNS * (is_bf16 ? 2 : 4));
}

int main(void) {
    memset(result_a, 1, MOST), memset(result_b, 2, MOST);
    for (int format = FLOAT32; format <= FLOAT4_E2M1FN; format++)
        for (int64_t m_count = 1; m_count <= 9; m_count += m_count == 1 ? 1 : 7) {
            linears(format, 0, 0, m_count, 1.f);
            linears(format, 1, 0, m_count, 1.3f);
            if (format != FLOAT32) linears(format, 1, 1, m_count, 1.f);
        }
    for (int is_bf16 = 0; is_bf16 < 2; is_bf16++) attention(is_bf16), scores(is_bf16), small(is_bf16);
    printf("%d results, checksum %016llx\n", compared, (unsigned long long)checksum);
    return 0;
}
