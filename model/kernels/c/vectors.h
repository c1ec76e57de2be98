/* Vectors of sixteen lanes, conversions, and functions of them.
 *
 * A dot product has sixteen lanes, in the order of summation that deterministic.py defines. Of every 32 elements, lane l
 * adds the product of element 2l + 1 and then that of 2l, each sum rounded to float32. That is the order of vdpbf16ps,
 * which some CPUs have for bfloat16; elsewhere the odd and the even elements are two vectors of sixteen float32.
 * Products and sums are rounded one by one (-ffp-contract=off); where the product of the inputs is exact in float32
 * (8 significant bits times 8, no underflow), a fused multiply-add rounds the same, and is used.
 * Work is split over outputs only, never inside a sum. Lengths of dot products are multiples of 32.
 *
 * "Paired" float32 data: of every 32 elements first the sixteen odd ones, then the sixteen even ones.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

/* What this form of the library is made of; NO_VECTORS is given for the plain one. */
#if defined(NO_VECTORS)
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HAVE_AVX512 1
#include <immintrin.h>
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define HAVE_DOT 1
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HAVE_AVX2 1
#include <immintrin.h>
#elif defined(__aarch64__)
#define HAVE_NEON 1
#include <arm_neon.h>
#endif

/* Each form is compiled from the same files, with -DFORM=avx2 and the like, which ends the names of its functions. */
#define JOINED(name, form) name##_##form
#define WITH_FORM(name, form) JOINED(name, form)
#define OF_FORM(name) WITH_FORM(name, FORM)

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t ilanes __attribute__((vector_size(64)));
typedef uint32_t ulanes __attribute__((vector_size(64)));

enum format { FLOAT32, BFLOAT16, FLOAT8_E4M3FN, FLOAT4_E2M1FN };

/* A weight [rows, columns] as stored. Scales are E8M0 bytes or float32, one per block_rows x block_columns.
 * The same struct is declared in binding.py. */
struct matrix {
    const void *values;
    const void *scale;
    int64_t rows, columns;
    int64_t block_rows, block_columns, scale_columns;
    int32_t format, scale_is_float32;
    int32_t exact; /* whether its products with bfloat16 are exact in float32 */
};

INLINE float widen_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE uint16_t round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t nan = (bits >> 16) | 0x40, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : nearest);
}

/* Rounded to bfloat16, as float32. */
INLINE float rounded_to_bf16(float value) { return widen_bf16(round_bf16(value)); }

INLINE float e8m0(uint8_t code) {
    uint32_t bits = code ? (uint32_t)code << 23 : 1u << 22;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE lanes load(const float *p) {
    lanes v;
    memcpy(&v, p, 64);
    return v;
}

INLINE void store(float *p, lanes v) { memcpy(p, &v, 64); }

INLINE lanes splat(float x) { return (lanes){0} + x; }

INLINE lanes choose_lanes(ilanes mask, lanes a, lanes b) { return (lanes)((mask & (ilanes)a) | (~mask & (ilanes)b)); }

/* NaN stays NaN. */
INLINE lanes clamp(lanes v, float low, float high) {
    return choose_lanes(v < low, splat(low), choose_lanes(v > high, splat(high), v));
}

/* Element i of bfloat16 or float32 data. */
INLINE float load_as_float(const void *x, int is_bf16, int64_t i) {
    return is_bf16 ? widen_bf16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

INLINE void store_as(void *x, int is_bf16, int64_t i, float value) {
    if (is_bf16) ((uint16_t *)x)[i] = round_bf16(value);
    else ((float *)x)[i] = value;
}

/* Sum of the sixteen lanes, by halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1. */
INLINE float horizontal_sum(lanes v) {
#ifdef HAVE_AVX512
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float a[16];
    memcpy(a, &v, 64);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
#endif
}

INLINE lanes multiply_add(lanes a, lanes b, lanes c, int exact) {
#ifdef HAVE_AVX512
    if (exact) return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    (void)exact;
#endif
    lanes product = a * b;
    return product + c;
}

typedef float floats8 __attribute__((vector_size(32)));
typedef int32_t ints8 __attribute__((vector_size(32)));
typedef double doubles8 __attribute__((vector_size(64)));
typedef int64_t longs8 __attribute__((vector_size(64)));

INLINE doubles8 choose(longs8 mask, doubles8 a, doubles8 b) {
    return (doubles8)((mask & (longs8)a) | (~mask & (longs8)b));
}

/* exp of float32 through float64, the polynomial of deterministic.py, eight at a time. */
INLINE floats8 exponential8(floats8 x) {
    doubles8 v = __builtin_convertvector(x, doubles8), bound = (doubles8){0} + 700.0;
    v = choose(v < -bound, -bound, choose(v > bound, bound, v));
    doubles8 t = v * 0x1.71547652b82fep+0 + 0.5;
    doubles8 truncated = __builtin_convertvector(__builtin_convertvector(t, ints8), doubles8);
    doubles8 n = choose(truncated > t, truncated - 1.0, truncated); /* floor */
    doubles8 r = (v - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    static const double factorials[14] = {1.0, 1.0, 2.0, 6.0, 24.0, 120.0, 720.0, 5040.0, 40320.0, 362880.0, 3628800.0,
                                          39916800.0, 479001600.0, 6227020800.0};
    doubles8 value = (doubles8){0} + 1.0 / factorials[13];
    for (int k = 12; k >= 0; k--) value = value * r + 1.0 / factorials[k];
    longs8 whole = __builtin_convertvector(__builtin_convertvector(n, ints8), longs8);
    return __builtin_convertvector(value * (doubles8)((whole + 1023) << 52), floats8);
}

INLINE float exponential(float x) { return exponential8((floats8){x})[0]; }

/* One at a time, and not rounded: exp of a float64 of at most 700. */
INLINE double exponential64(double x) {
    double v = x < -700.0 ? -700.0 : x, n = floor(v * 0x1.71547652b82fep+0 + 0.5);
    double r = (v - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33, value = 1.0 / 6227020800.0, power;
    static const double factorials[13] = {1.0,    1.0,     2.0,      6.0,       24.0,       120.0,      720.0,
                                          5040.0, 40320.0, 362880.0, 3628800.0, 39916800.0, 479001600.0};
    for (int k = 12; k >= 0; k--) value = value * r + 1.0 / factorials[k];
    int64_t bits = ((int64_t)n + 1023) << 52;
    memcpy(&power, &bits, 8);
    return value * power;
}

INLINE void exponentials(float *x) {
    for (int i = 0; i < 16; i += 8) {
        floats8 v;
        memcpy(&v, x + i, 32);
        v = exponential8(v);
        memcpy(x + i, &v, 32);
    }
}

/* Rounded to bfloat16, as float32. A NaN stays what it is if its lower half is zero, as in those from bfloat16. */
INLINE lanes nearest_lanes(lanes v) {
    ulanes bits = (ulanes)v;
    return (lanes)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

/* Rounded to bfloat16, as float32, if `rounded`. */
INLINE lanes rounded_lanes(lanes v, int rounded) {
    if (!rounded) return v;
    ulanes is_nan = (ulanes)(v != v), nan = ((ulanes)v | 0x400000) & 0xffff0000u;
    return (lanes)((is_nan & nan) | (~is_nan & (ulanes)nearest_lanes(v)));
}

typedef uint16_t ushorts __attribute__((vector_size(32)));

/* Elements i to i + 15 of bfloat16 or float32 data. */
INLINE lanes load_lanes(const void *x, int is_bf16, int64_t i) {
    if (!is_bf16) return load((const float *)x + i);
    ushorts bits;
    memcpy(&bits, (const uint16_t *)x + i, 32);
    return (lanes)(__builtin_convertvector(bits, ulanes) << 16);
}

INLINE void store_lanes(void *x, int is_bf16, int64_t i, lanes v) {
    if (!is_bf16) {
        store((float *)x + i, v);
        return;
    }
    ushorts bits = __builtin_convertvector((ulanes)rounded_lanes(v, 1) >> 16, ushorts);
    memcpy((uint16_t *)x + i, &bits, 32);
}

/* The first `count` of these, all sixteen if there are more; the others are loaded as zeros. */
INLINE lanes load_some(const void *x, int is_bf16, int64_t i, int64_t count) {
    if (count >= 16) return load_lanes(x, is_bf16, i);
    lanes v = splat(0.f);
    for (int64_t k = 0; k < count; k++) v[k] = load_as_float(x, is_bf16, i + k);
    return v;
}

INLINE void store_some(void *x, int is_bf16, int64_t i, lanes v, int64_t count) {
    if (count >= 16) store_lanes(x, is_bf16, i, v);
    else
        for (int64_t k = 0; k < count; k++) store_as(x, is_bf16, i + k, v[k]);
}

#define LEAST_OF_NONE 0x10000

/* The least magnitude, zeros aside, of bfloat16 numbers, as its bits; LEAST_OF_NONE if all are zero. */
static inline int32_t least_bf16(const uint16_t *x, int64_t count) {
    uint16_t lowest = 0xffff; /* magnitude less one, of which zero has the largest */
    for (int64_t i = 0; i < count; i++) {
        uint16_t before = (uint16_t)((x[i] & 0x7fff) - 1);
        lowest = before < lowest ? before : lowest;
    }
    return lowest + 1;
}

/* The same of numbers in float32 that are bfloat16 numbers. */
static inline int32_t least_bf16_of_float(const float *x, int64_t count) {
    uint32_t lowest = 0xffffffff;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits = (bits & 0x7fffffff) - 1;
        lowest = bits < lowest ? bits : lowest;
    }
    return (int32_t)((lowest + (uint64_t)1) >> 16);
}

/* Whether products of bfloat16 numbers, of which these are the least, are exact in float32 and multiples of its least
 * normal number, 2**-126, and so are sums of them: nothing is subnormal, which vdpbf16ps would take for zero. */
INLINE int are_exact(int32_t least_a, int32_t least_b) {
    const int32_t normal = 1 << 7; /* a number's last bit is 2**(biased exponent - 134) */
    return least_a >= normal && least_b >= normal && (least_a >> 7) + (least_b >> 7) >= 2 * 134 - 126;
}

/* Sum by halves; an odd element waits for the next round. Overwrites x. */
static inline float tree_sum(float *x, int64_t n) {
    while (n > 1) {
        int64_t half = n / 2;
        for (int64_t i = 0; i < half; i++) x[i] = x[i] + x[i + half];
        if (n % 2) x[half] = x[n - 1];
        n = half + n % 2;
    }
    return x[0];
}
