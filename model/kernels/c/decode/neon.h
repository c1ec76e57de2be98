/* The decoders, and the sums of a dot product, for NEON, which every 64-bit ARM processor has. */
#pragma once
#include "../vectors.h"

/* Four registers of four, by name: the compiler would keep an array of them in memory. */
typedef struct {
    float32x4_t a, b, c, d;
} sixteen;

struct pair {
    sixteen odd, even;
};

INLINE sixteen zeros(void) {
    float32x4_t zero = vdupq_n_f32(0.f);
    return (sixteen){zero, zero, zero, zero};
}

INLINE sixteen load_sixteen(const float *p) {
    return (sixteen){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}

INLINE void store_sixteen(float *p, sixteen v) {
    vst1q_f32(p, v.a), vst1q_f32(p + 4, v.b), vst1q_f32(p + 8, v.c), vst1q_f32(p + 12, v.d);
}

INLINE float32x4_t add_product4(float32x4_t x, float32x4_t y, float32x4_t sum, int exact) {
    return exact ? vfmaq_f32(sum, x, y) : vaddq_f32(vmulq_f32(x, y), sum);
}

INLINE sixteen add_product(sixteen x, sixteen y, sixteen sum, int exact) {
    return (sixteen){add_product4(x.a, y.a, sum.a, exact), add_product4(x.b, y.b, sum.b, exact),
                     add_product4(x.c, y.c, sum.c, exact), add_product4(x.d, y.d, sum.d, exact)};
}

/* 8 + 8 lanes, then 4 + 4. */
INLINE float32x4_t quarters(sixteen v) { return vaddq_f32(vaddq_f32(v.a, v.c), vaddq_f32(v.b, v.d)); }

/* The last two halves of two sums: [x0 + x2, x1 + x3, y0 + y2, y1 + y3]. */
INLINE float32x4_t halves(float32x4_t x, float32x4_t y) {
    return vaddq_f32(vcombine_f32(vget_low_f32(x), vget_low_f32(y)), vcombine_f32(vget_high_f32(x), vget_high_f32(y)));
}

/* The horizontal sums of `count` vectors; four at once, by the same additions, cost little more than one. */
INLINE void horizontal_sums(const sixteen *sums, int count, float *out) {
    if (count == 4) {
        float32x4_t ab = halves(quarters(sums[0]), quarters(sums[1])), cd = halves(quarters(sums[2]), quarters(sums[3]));
        vst1q_f32(out, vpaddq_f32(ab, cd));
        return;
    }
    for (int i = 0; i < count; i++) {
        float32x4_t four = quarters(sums[i]), two = halves(four, four);
        out[i] = vgetq_lane_f32(vpaddq_f32(two, two), 0);
    }
}

INLINE struct pair decode_f32(const float *p) {
    float32x4x2_t a = vld2q_f32(p), b = vld2q_f32(p + 8), c = vld2q_f32(p + 16), d = vld2q_f32(p + 24);
    return (struct pair){{a.val[1], b.val[1], c.val[1], d.val[1]}, {a.val[0], b.val[0], c.val[0], d.val[0]}};
}

INLINE float32x4_t upper_halves(const uint16_t *p) { /* of four pairs of bfloat16: the odd ones */
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(vld1q_u16(p)), vdupq_n_u32(0xffff0000)));
}

INLINE float32x4_t lower_halves(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(p)), 16));
}

INLINE struct pair decode_bf16(const uint16_t *p) {
    return (struct pair){{upper_halves(p), upper_halves(p + 8), upper_halves(p + 16), upper_halves(p + 24)},
                         {lower_halves(p), lower_halves(p + 8), lower_halves(p + 16), lower_halves(p + 24)}};
}

/* Four E4M3 in the upper bytes of 16 bits, by way of float16: see the form for AVX-512. */
INLINE float32x4_t from_upper_bytes4(uint16x4_t bytes, float scale) {
    uint16x4_t half = vand_u16(vreinterpret_u16_s16(vshr_n_s16(vreinterpret_s16_u16(bytes), 1)), vdup_n_u16(0xbfff));
    return vmulq_n_f32(vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(half)), 256.0f), scale);
}

INLINE sixteen from_upper_bytes(uint16x8_t low, uint16x8_t high, float scale) {
    return (sixteen){from_upper_bytes4(vget_low_u16(low), scale), from_upper_bytes4(vget_high_u16(low), scale),
                     from_upper_bytes4(vget_low_u16(high), scale), from_upper_bytes4(vget_high_u16(high), scale)};
}

INLINE struct pair decode_e4m3(const uint8_t *p, float scale) {
    uint16x8_t low = vreinterpretq_u16_u8(vld1q_u8(p)), high = vreinterpretq_u16_u8(vld1q_u8(p + 16));
    uint16x8_t upper = vdupq_n_u16(0xff00);
    return (struct pair){from_upper_bytes(vandq_u16(low, upper), vandq_u16(high, upper), scale),
                         from_upper_bytes(vshlq_n_u16(low, 8), vshlq_n_u16(high, 8), scale)};
}

/* Sixteen E2M1 codes, one a byte: both bytes of their bfloat16 from tables, then times the scale. */
INLINE sixteen lookup(uint8x16_t codes, float scale) {
    static const uint8_t upper[16] = {0,    0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                      0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
    static const uint8_t lower[16] = {0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0, 0, 0, 0x80, 0xc0, 0, 0x40, 0x80, 0xc0};
    uint8x16_t up = vqtbl1q_u8(vld1q_u8(upper), codes), low = vqtbl1q_u8(vld1q_u8(lower), codes);
    uint16x8_t first = vreinterpretq_u16_u8(vzip1q_u8(low, up)), last = vreinterpretq_u16_u8(vzip2q_u8(low, up));
    float32x4_t a = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(first), 16));
    float32x4_t b = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(first), 16));
    float32x4_t c = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(last), 16));
    float32x4_t d = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(last), 16));
    return (sixteen){vmulq_n_f32(a, scale), vmulq_n_f32(b, scale), vmulq_n_f32(c, scale), vmulq_n_f32(d, scale)};
}

/* Sixteen bytes, the even element in the low nibble. */
INLINE struct pair decode_e2m1(const uint8_t *p, float scale) {
    uint8x16_t bytes = vld1q_u8(p);
    return (struct pair){lookup(vshrq_n_u8(bytes, 4), scale), lookup(vandq_u8(bytes, vdupq_n_u8(0x0f)), scale)};
}
