/* The decoders, and the sums of a dot product, in plain C. */
#pragma once
#include "../sixteen.h"

INLINE void horizontal_sums(const sixteen *sums, int count, float *out) {
    for (int i = 0; i < count; i++) out[i] = horizontal_sum(sums[i]);
}

INLINE struct pair decode_f32(const float *p) {
    struct pair v;
    for (int i = 0; i < 16; i++) v.odd[i] = p[2 * i + 1], v.even[i] = p[2 * i];
    return v;
}

INLINE struct pair decode_bf16(const uint16_t *p) {
    struct pair v;
    for (int i = 0; i < 16; i++) v.odd[i] = widen_bf16(p[2 * i + 1]), v.even[i] = widen_bf16(p[2 * i]);
    return v;
}

/* Exponent and mantissa at their places in a float32, whose bias is 127 and not 7: 2**120 too small. */
INLINE struct pair decode_e4m3(const uint8_t *p, float scale) {
    ilanes odd, even;
    for (int i = 0; i < 16; i++) {
        uint32_t o = p[2 * i + 1], e = p[2 * i];
        odd[i] = (int32_t)((o & 0x80) << 24 | (o & 0x7f) << 20);
        even[i] = (int32_t)((e & 0x80) << 24 | (e & 0x7f) << 20);
    }
    return (struct pair){(lanes)odd * 0x1p120f * scale, (lanes)even * 0x1p120f * scale};
}

INLINE struct pair decode_e2m1(const uint8_t *p, float scale) {
    static const float table[16] = {0.f,  .5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                                    -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
    struct pair v;
    for (int i = 0; i < 16; i++) v.odd[i] = table[p[i] >> 4], v.even[i] = table[p[i] & 15];
    return (struct pair){v.odd * scale, v.even * scale};
}
