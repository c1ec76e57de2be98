/* The operations that token.c puts together; small.c and experts.c say what each does. */
#pragma once
#include "products.h"

void OF_FORM(dsv4_simulate_fp8)(const void *x, void *out, int64_t rows, int64_t columns, int64_t quantized,
                                int64_t group, int32_t is_bf16, int32_t threads);
void OF_FORM(dsv4_inverse_rms)(const void *x, float eps, float *out, void *scratch, int64_t rows, int64_t columns,
                               int32_t is_bf16, int32_t threads);
void OF_FORM(dsv4_hc_split_sinkhorn)(const float *mixes, const float *scale, const float *base, float *pre,
                                     float *post, float *comb, int64_t rows, int64_t n, int64_t iterations, float eps);
void OF_FORM(dsv4_hc_head_weights)(float *mixes, const float *scale, const float *base, int64_t rows, int64_t n,
                                   float eps);
void OF_FORM(dsv4_hc_pre)(const float *weights, const void *h, void *out, int64_t rows, int64_t n, int64_t columns,
                          int32_t is_bf16, int32_t threads);
void OF_FORM(dsv4_simulate_index)(const void *x, void *out, void *scratch, int64_t rows, int64_t columns, int64_t group,
                                  int32_t is_bf16, int32_t threads);
void OF_FORM(dsv4_swiglu)(const void *gate, const void *up, const float *shares, void *out, int64_t rows,
                          int64_t columns, float limit, int32_t is_bf16, int32_t threads);
void OF_FORM(dsv4_sqrtsoftplus)(const float *x, float *out, int64_t count, int32_t threads);
void OF_FORM(dsv4_choose_experts)(const float *scores, const float *bias, int64_t *chosen, float *biased, int64_t rows,
                                  int64_t experts, int64_t count);
void OF_FORM(dsv4_expert_weights)(const float *scores, const int64_t *chosen, float *weights, float *terms,
                                  int64_t rows, int64_t experts, int64_t count, float eps, float factor);
void OF_FORM(dsv4_add_experts)(const void *outputs, const void *shared, const int64_t *experts, void *out,
                               float *scratch, int64_t rows, int64_t count, int64_t columns, int32_t is_bf16,
                               int32_t threads);
void OF_FORM(dsv4_rms_norm)(const void *x, const float *weight, float eps, void *out, void *scratch, int64_t rows,
                            int64_t columns, int32_t is_bf16, int32_t threads);
void OF_FORM(dsv4_head_norm)(const void *x, float eps, void *out, void *scratch, int64_t rows, int64_t columns,
                             int32_t is_bf16, int32_t threads);
void OF_FORM(dsv4_rotate)(void *x, const float *cos, const float *sin, int64_t rows, int64_t heads, int64_t columns,
                          int64_t pairs, int32_t is_bf16, int32_t threads);
