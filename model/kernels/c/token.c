/* Operations that follow each other, in one call.
 *
 * All weights of a token pass through the processor's caches, and nothing else stays there: after a product, what the
 * interpreter and torch do is read from memory again, and a call takes two to three times as long as it does alone. So
 * a step of decoding has few calls. KernelTable has the same in single operations. */
#include "small.h"

/* A product of `rows` rows of x, one after the other, with all rows of w. */
static struct product whole(const struct matrix *w, const void *x, int x_is_bf16, void *y, int y_is_bf16,
                            int64_t rows) {
    return (struct product){w, x,       y,         rows,      w->columns,           w->rows,
                            0, w->rows, x_is_bf16, y_is_bf16, x_is_bf16 && w->exact};
}

/* Takes memory of whole lines of the cache from scratch. */
static void *take(void **scratch, int64_t bytes) {
    uint8_t *taken = *scratch;
    *scratch = taken + (bytes + 63) / 64 * 64;
    return taken;
}

static int64_t linear_scratch(const struct matrix *w, int x_is_bf16, int64_t rows, int32_t threads) {
    struct product p = whole(w, 0, x_is_bf16, 0, 0, rows);
    return OF_FORM(dsv4_linears_scratch)(&p, 1, threads);
}

int64_t OF_FORM(dsv4_gate_scratch)(const struct matrix *w, int32_t x_is_bf16, int64_t rows, int64_t count,
                                   int32_t threads) {
    return (rows * w->rows + w->rows + count) * (int64_t)sizeof(float) + 3 * 64 +
           linear_scratch(w, x_is_bf16, rows, threads);
}

/* The gate: x [rows, w->columns], scores sqrt(softplus(x @ w.T)) -> experts int64 [rows, count], those with the largest
 * sums of score and bias, or given where bias is null, and their weights float32 [rows, count]. */
void OF_FORM(dsv4_gate)(const struct matrix *w, const void *x, int32_t x_is_bf16, const float *bias, int64_t *experts,
                        float *weights, int64_t rows, int64_t count, float eps, float factor, void *scratch,
                        int32_t threads) {
    float *scores = take(&scratch, rows * w->rows * (int64_t)sizeof(float));
    float *biased = take(&scratch, w->rows * (int64_t)sizeof(float));
    float *terms = take(&scratch, count * (int64_t)sizeof(float));
    struct product p = whole(w, x, x_is_bf16, scores, 0, rows);
    OF_FORM(dsv4_linears)(&p, 1, scratch, threads);
    OF_FORM(dsv4_sqrtsoftplus)(scores, scores, rows * w->rows, threads);
    if (bias) OF_FORM(dsv4_choose_experts)(scores, bias, experts, biased, rows, w->rows, count);
    OF_FORM(dsv4_expert_weights)(scores, experts, weights, terms, rows, w->rows, count, eps, factor);
}

int64_t OF_FORM(dsv4_hc_mixes_scratch)(const struct matrix *fn, int32_t is_bf16, int64_t rows, int32_t threads) {
    return (rows * fn->rows + rows + threads * fn->columns) * (int64_t)sizeof(float) + 3 * 64 +
           linear_scratch(fn, is_bf16, rows, threads);
}

/* Streams h [rows, fn->columns] through fn, over their root mean square: float32 [rows, fn->rows], in scratch. */
static float *stream_mixes(const struct matrix *fn, const void *h, int32_t is_bf16, int64_t rows, float rms_eps,
                           void **scratch, int32_t threads) {
    float *mixes = take(scratch, rows * fn->rows * (int64_t)sizeof(float));
    float *factors = take(scratch, rows * (int64_t)sizeof(float));
    void *squares = take(scratch, threads * fn->columns * (int64_t)sizeof(float));
    struct product p = whole(fn, h, is_bf16, mixes, 0, rows);
    OF_FORM(dsv4_linears)(&p, 1, *scratch, threads);
    OF_FORM(dsv4_inverse_rms)(h, rms_eps, factors, squares, rows, fn->columns, is_bf16, threads);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t o = 0; o < fn->rows; o++) mixes[row * fn->rows + o] = mixes[row * fn->rows + o] * factors[row];
    return mixes;
}

/* The weights of a hyper-connection, from what its streams h [rows, fn->columns] are mixed to: see
 * `dsv4_hc_split_sinkhorn`. */
void OF_FORM(dsv4_hc_mixes)(const struct matrix *fn, const void *h, int32_t is_bf16, const float *scale,
                            const float *base, float *pre, float *post, float *comb, int64_t rows, int64_t n,
                            int64_t iterations, float rms_eps, float eps, void *scratch, int32_t threads) {
    float *mixes = stream_mixes(fn, h, is_bf16, rows, rms_eps, &scratch, threads);
    OF_FORM(dsv4_hc_split_sinkhorn)(mixes, scale, base, pre, post, comb, rows, n, iterations, eps);
}

/* w1, w3 and w2 of an expert. */
struct expert {
    const struct matrix *gate, *up, *down;
};

/* At most: as if no two products shared their x. */
int64_t OF_FORM(dsv4_token_experts_scratch)(const struct expert *expert, int64_t count, int32_t is_bf16,
                                            int32_t threads) {
    int64_t width = expert->gate->columns, inner = expert->gate->rows, size = is_bf16 ? 2 : 4;
    int64_t inward = 2 * linear_scratch(expert->gate, is_bf16, 1, threads);
    int64_t outward = linear_scratch(expert->down, is_bf16, 1, threads);
    int64_t each = 2 * inner * size + width * size + (int64_t)sizeof(float) + 2 * (int64_t)sizeof(struct product) +
                   (inward > outward ? inward : outward);
    return (count + 1) * each + width * size + width * (int64_t)sizeof(float) + 8 * 64;
}

/* The experts of one token: x and out [1, width]; `all` experts, of which number `shared` is the shared one; `experts`
 * are the chosen `count`, `shares` float32 their weights. x and the activations are quantized in groups of `group`, or
 * not if it is 0. The outputs are added as `dsv4_add_experts` does. */
void OF_FORM(dsv4_token_experts)(const void *x, const struct expert *all, const int64_t *experts, const float *shares,
                                 void *out, int64_t count, int64_t shared, int64_t group, float limit, int32_t is_bf16,
                                 void *scratch, int32_t threads) {
    int64_t width = all->gate->columns, inner = all->gate->rows, size = is_bf16 ? 2 : 4, total = count + 1;
    uint8_t *gate = take(&scratch, total * inner * size), *up = take(&scratch, total * inner * size);
    uint8_t *outputs = take(&scratch, total * width * size), *quantized = take(&scratch, width * size);
    float *weights = take(&scratch, total * (int64_t)sizeof(float));
    float *sums = take(&scratch, width * (int64_t)sizeof(float));
    struct product *list = take(&scratch, 2 * total * (int64_t)sizeof(struct product));
    if (group) OF_FORM(dsv4_simulate_fp8)(x, quantized, 1, width, width, group, is_bf16, 1), x = quantized;
    for (int64_t i = 0; i < total; i++) {
        const struct expert *expert = all + (i < count ? experts[i] : shared);
        list[i] = whole(expert->gate, x, is_bf16, gate + i * inner * size, is_bf16, 1);
        list[total + i] = whole(expert->up, x, is_bf16, up + i * inner * size, is_bf16, 1);
        weights[i] = i < count ? shares[i] : 1.f;
    }
    OF_FORM(dsv4_linears)(list, 2 * total, scratch, threads);
    OF_FORM(dsv4_swiglu)(gate, up, weights, gate, total, inner, limit, is_bf16, threads);
    if (group) OF_FORM(dsv4_simulate_fp8)(gate, gate, total, inner, inner, group, is_bf16, threads);
    for (int64_t i = 0; i < total; i++) {
        const struct expert *expert = all + (i < count ? experts[i] : shared);
        list[i] = whole(expert->down, gate + i * inner * size, is_bf16, outputs + i * width * size, is_bf16, 1);
    }
    OF_FORM(dsv4_linears)(list, total, scratch, threads);
    OF_FORM(dsv4_add_experts)(outputs, outputs + count * width * size, experts, out, sums, 1, count, width, is_bf16, 1);
}

int64_t OF_FORM(dsv4_queries_scratch)(const struct matrix *wq_a, const struct matrix *wkv, const struct matrix *wq_b,
                                      int32_t is_bf16, int64_t rows, int32_t threads) {
    int64_t inward = linear_scratch(wq_a, is_bf16, rows, threads) + linear_scratch(wkv, is_bf16, rows, threads);
    int64_t outward = linear_scratch(wq_b, is_bf16, rows, threads);
    return rows * (wq_a->columns + 2 * wq_a->rows) * (int64_t)sizeof(float) +
           threads * (wq_a->rows + wkv->rows) * (int64_t)sizeof(float) + 4 * 64 +
           (inward > outward ? inward : outward);
}

/* Queries and keys of x [rows, wq_a->columns]: the low-rank query qr [rows, wq_a->rows] = norm(x @ wq_a.T); q
 * [rows, heads, c] = qr @ wq_b.T, whose heads are normed if `norm_heads`, rotated; kv [rows, c] = norm(x @ wkv.T),
 * rotated, of which the first `quantized` numbers are as FP8 in groups of `key_group`. x and qr are quantized in groups
 * of `group` in front of the products, or not if it is 0. */
void OF_FORM(dsv4_queries)(const void *x, const struct matrix *wq_a, const struct matrix *wkv,
                           const struct matrix *wq_b, const float *q_norm, const float *kv_norm, const float *cos,
                           const float *sin, void *qr, void *q, void *kv, int64_t rows, int64_t pairs, int64_t group,
                           int64_t quantized, int64_t key_group, float eps, int32_t norm_heads, int32_t is_bf16,
                           void *scratch, int32_t threads) {
    int64_t width = wq_a->columns, rank = wq_a->rows, c = wkv->rows, heads = wq_b->rows / c, size = is_bf16 ? 2 : 4;
    void *input = take(&scratch, rows * width * size), *low = take(&scratch, rows * rank * size);
    void *squares = take(&scratch, threads * (rank + c) * (int64_t)sizeof(float));
    if (group) OF_FORM(dsv4_simulate_fp8)(x, input, rows, width, width, group, is_bf16, threads), x = input;
    struct product inward[2] = {whole(wq_a, x, is_bf16, low, is_bf16, rows), whole(wkv, x, is_bf16, kv, is_bf16, rows)};
    OF_FORM(dsv4_linears)(inward, 2, scratch, threads);
    OF_FORM(dsv4_rms_norm)(low, q_norm, eps, qr, squares, rows, rank, is_bf16, threads);
    if (group) OF_FORM(dsv4_simulate_fp8)(qr, low, rows, rank, rank, group, is_bf16, threads);
    struct product outward = whole(wq_b, group ? low : qr, is_bf16, q, is_bf16, rows);
    OF_FORM(dsv4_linears)(&outward, 1, scratch, threads);
    if (norm_heads) OF_FORM(dsv4_head_norm)(q, eps, q, squares, rows * heads, c, is_bf16, threads);
    OF_FORM(dsv4_rotate)(q, cos, sin, rows, heads, c, pairs, is_bf16, threads);
    OF_FORM(dsv4_rms_norm)(kv, kv_norm, eps, kv, squares, rows, c, is_bf16, threads);
    OF_FORM(dsv4_rotate)(kv, cos, sin, rows, 1, c, pairs, is_bf16, threads);
    if (quantized) OF_FORM(dsv4_simulate_fp8)(kv, kv, rows, c, quantized, key_group, is_bf16, threads);
}

int64_t OF_FORM(dsv4_project_scratch)(const struct matrix *wo_a, const struct matrix *wo_b, int64_t groups,
                                      int32_t is_bf16, int64_t rows, int32_t threads) {
    int64_t inward = groups * linear_scratch(wo_a, is_bf16, rows, threads);
    int64_t outward = linear_scratch(wo_b, is_bf16, rows, threads);
    return rows * wo_b->columns * (int64_t)sizeof(float) + groups * (int64_t)sizeof(struct product) + 2 * 64 +
           (inward > outward ? inward : outward);
}

/* The end of attention: output [rows, heads, c] is rotated, in place; then each of `groups` groups of heads is
 * multiplied by its rows of wo_a, and all results, quantized in groups of `group` or not if it is 0, by wo_b:
 * y [rows, wo_b->rows]. */
void OF_FORM(dsv4_project)(void *output, const float *cos, const float *sin, const struct matrix *wo_a,
                           const struct matrix *wo_b, void *y, int64_t rows, int64_t heads, int64_t c, int64_t pairs,
                           int64_t groups, int64_t group, int32_t is_bf16, void *scratch, int32_t threads) {
    int64_t size = is_bf16 ? 2 : 4, width = wo_b->columns, rank = width / groups;
    uint8_t *low = take(&scratch, rows * width * size);
    struct product *list = take(&scratch, groups * (int64_t)sizeof(struct product));
    OF_FORM(dsv4_rotate)(output, cos, sin, rows, heads, c, pairs, is_bf16, threads);
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *x = (uint8_t *)output + g * wo_a->columns * size;
        list[g] = whole(wo_a, x, is_bf16, low + g * rank * size, is_bf16, rows);
        list[g].x_stride = heads * c, list[g].y_stride = width, list[g].start = g * rank, list[g].stop = (g + 1) * rank;
    }
    OF_FORM(dsv4_linears)(list, groups, scratch, threads);
    if (group) OF_FORM(dsv4_simulate_fp8)(low, low, rows, width, width, group, is_bf16, threads);
    struct product outward = whole(wo_b, low, is_bf16, y, is_bf16, rows);
    OF_FORM(dsv4_linears)(&outward, 1, scratch, threads);
}

int64_t OF_FORM(dsv4_raw_keys_scratch)(const struct matrix *wkv, const struct matrix *wgate, int32_t is_bf16,
                                       int64_t rows, int32_t threads) {
    return linear_scratch(wkv, is_bf16, rows, threads) + linear_scratch(wgate, is_bf16, rows, threads);
}

/* What a compressor takes from each token: raw float32 [rows, 2, wkv->rows] = x @ wkv.T, and x @ wgate.T plus the row of
 * ape [ratio, wkv->rows] of its position. */
void OF_FORM(dsv4_raw_keys)(const void *x, const struct matrix *wkv, const struct matrix *wgate, const float *ape,
                            const int64_t *positions, float *raw, int64_t rows, int64_t ratio, int32_t is_bf16,
                            void *scratch, int32_t threads) {
    int64_t width = wkv->rows;
    struct product list[2] = {whole(wkv, x, is_bf16, raw, 0, rows), whole(wgate, x, is_bf16, raw + width, 0, rows)};
    list[0].y_stride = list[1].y_stride = 2 * width;
    OF_FORM(dsv4_linears)(list, 2, scratch, threads);
    for (int64_t row = 0; row < rows; row++) {
        float *gate = raw + (2 * row + 1) * width;
        const float *bias = ape + positions[row] % ratio * width;
        for (int64_t k = 0; k < width; k++) gate[k] = gate[k] + bias[k];
    }
}

int64_t OF_FORM(dsv4_index_queries_scratch)(const struct matrix *wq_b, const struct matrix *proj, int32_t is_bf16,
                                            int64_t rows, int32_t threads) {
    return (rows * (wq_b->columns + proj->rows) + threads * wq_b->rows) * (int64_t)sizeof(float) + 3 * 64 +
           linear_scratch(wq_b, is_bf16, rows, threads) + linear_scratch(proj, is_bf16, rows, threads);
}

/* Queries of the indexer: q [rows, heads, d] = qr [rows, wq_b->columns] @ wq_b.T, rotated, and the weights of the heads
 * [rows, heads] = x [rows, proj->columns] @ proj.T times `scale`. With `group` qr is quantized in front of the product,
 * in groups of so many, and q behind it as `dsv4_simulate_index` in groups of `index_group`. */
void OF_FORM(dsv4_index_queries)(const void *x, const void *qr, const struct matrix *wq_b, const struct matrix *proj,
                                 const float *cos, const float *sin, void *q, void *weights, int64_t rows,
                                 int64_t pairs, int64_t group, int64_t index_group, float scale, int32_t is_bf16,
                                 void *scratch, int32_t threads) {
    int64_t rank = wq_b->columns, heads = proj->rows, d = wq_b->rows / heads;
    void *low = take(&scratch, rows * rank * (int64_t)sizeof(float));
    float *wide = take(&scratch, rows * heads * (int64_t)sizeof(float));
    void *line = take(&scratch, threads * wq_b->rows * (int64_t)sizeof(float));
    if (group) OF_FORM(dsv4_simulate_fp8)(qr, low, rows, rank, rank, group, is_bf16, threads), qr = low;
    struct product list[2] = {whole(wq_b, qr, is_bf16, q, is_bf16, rows), whole(proj, x, is_bf16, wide, 0, rows)};
    OF_FORM(dsv4_linears)(list, 2, scratch, threads);
    OF_FORM(dsv4_rotate)(q, cos, sin, rows, heads, d, pairs, is_bf16, threads);
    if (group) OF_FORM(dsv4_simulate_index)(q, q, line, rows * heads, d, index_group, is_bf16, threads);
    for (int64_t i = 0; i < rows * heads; i++)
        store_as(weights, is_bf16, i, (is_bf16 ? rounded_to_bf16(wide[i]) : wide[i]) * scale);
}

int64_t OF_FORM(dsv4_head_vector_scratch)(const struct matrix *fn, int32_t is_bf16, int64_t rows, int32_t threads) {
    return OF_FORM(dsv4_hc_mixes_scratch)(fn, is_bf16, rows, threads);
}

/* The streams h [rows, n, fn->columns / n] as one, out [rows, fn->columns / n], by the weights that a stack ends with:
 * sigmoid(mixes * scale + base) + eps, n = fn->rows. */
void OF_FORM(dsv4_head_vector)(const struct matrix *fn, const void *h, int32_t is_bf16, const float *scale,
                               const float *base, void *out, int64_t rows, float rms_eps, float eps, void *scratch,
                               int32_t threads) {
    int64_t n = fn->rows;
    float *mixes = stream_mixes(fn, h, is_bf16, rows, rms_eps, &scratch, threads);
    OF_FORM(dsv4_hc_head_weights)(mixes, scale, base, rows, n, eps);
    OF_FORM(dsv4_hc_pre)(mixes, h, out, rows, n, fn->columns / n, is_bf16, threads);
}
