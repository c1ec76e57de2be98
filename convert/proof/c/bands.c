/* The proof's own loops over bytes. Nothing here is shared with what converts.

   FP4 codes against FP8 codes: the difference of two block exponents says which E4M3 byte has the value of an E2M1
   code, a table of 16 bytes, in which a vector register looks 16 codes up at once. The tables come from the caller
   (values/formats.py), which makes them code by code in integers. */

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
typedef __m128i lanes;
#define TARGET __attribute__((target("ssse3")))
#define READ(from) _mm_loadu_si128((const __m128i *)(from))
#define WRITE(to, x) _mm_storeu_si128((__m128i *)(to), x)
#define EACH(x) _mm_set1_epi8((char)(x))
#define AND(a, b) _mm_and_si128(a, b)
#define OR(a, b) _mm_or_si128(a, b)
#define XOR(a, b) _mm_xor_si128(a, b)
#define AND_NOT(a, b) _mm_andnot_si128(b, a)
#define SAME(a, b) _mm_cmpeq_epi8(a, b)
#define MINUS(a, b) _mm_sub_epi8(a, b)
#define UPPER(x) AND(_mm_srli_epi16(x, 4), EACH(0x0f))
#define FROM_TABLE(table, x) _mm_shuffle_epi8(table, x)
#define FIRST_PAIRS(a, b) _mm_unpacklo_epi8(a, b)
#define LAST_PAIRS(a, b) _mm_unpackhi_epi8(a, b)
#elif defined(__aarch64__)
#include <arm_neon.h>
typedef uint8x16_t lanes;
#define TARGET
#define READ(from) vld1q_u8(from)
#define WRITE(to, x) vst1q_u8(to, x)
#define EACH(x) vdupq_n_u8(x)
#define AND(a, b) vandq_u8(a, b)
#define OR(a, b) vorrq_u8(a, b)
#define XOR(a, b) veorq_u8(a, b)
#define AND_NOT(a, b) vbicq_u8(a, b)
#define SAME(a, b) vceqq_u8(a, b)
#define MINUS(a, b) vsubq_u8(a, b)
#define UPPER(x) vshrq_n_u8(x, 4)
#define FROM_TABLE(table, x) vqtbl1q_u8(table, x)
#define FIRST_PAIRS(a, b) vzip1q_u8(a, b)
#define LAST_PAIRS(a, b) vzip2q_u8(a, b)
#else
#define NO_TABLE_LOOKUP
#endif

#define GROUP 32       /* elements: 16 bytes of FP4, 32 of FP8 */
#define SIGN 0x80      /* of an E4M3 byte */
#define VALUE 0x7f     /* the rest of it; NaN if all of its bits are set */
#define AT_MOST 127    /* groups counted in lanes of 8 bits, two in each */

/* Whether dsv4_proof_fp4_in_fp8 is there and this processor can run it. */
int32_t dsv4_proof_has_table_lookup(void)
{
#if defined(NO_TABLE_LOOKUP)
    return 0;
#elif defined(__x86_64__)
    return __builtin_cpu_supports("ssse3") != 0;
#else
    return 1;
#endif
}

/* The largest of (byte & mask), 0 of no bytes. */
uint8_t dsv4_proof_largest(const uint8_t *bytes, int64_t count, uint8_t mask)
{
    uint8_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint8_t value = bytes[i] & mask;
        largest = value > largest ? value : largest;
    }
    return largest;
}

/* How often each byte occurs. In four tables: the same byte twice in a row does not wait for the first count. */
void dsv4_proof_count(const uint8_t *bytes, int64_t count, int64_t *uses)
{
    int64_t more[3][256] = {{0}};
    for (int byte = 0; byte < 256; byte++)
        uses[byte] = 0;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        uses[bytes[i]]++;
        more[0][bytes[i + 1]]++;
        more[1][bytes[i + 2]]++;
        more[2][bytes[i + 3]]++;
    }
    for (; i < count; i++)
        uses[bytes[i]]++;
    for (int byte = 0; byte < 256; byte++)
        uses[byte] += more[0][byte] + more[1][byte] + more[2][byte];
}

#if !defined(NO_TABLE_LOOKUP)

/* Exponents of the block scales of a matrix: [.., columns], one for `block_rows` rows and `block_groups` groups. */
struct scales {
    const int32_t *exponents;
    int64_t columns, block_rows, block_groups;
};

TARGET static int64_t total(lanes counts)
{
    uint8_t each[16];
    int64_t sum = 0;
    WRITE(each, counts);
    for (int lane = 0; lane < 16; lane++)
        sum += each[lane];
    return sum;
}

/* What 16 bytes of FP8 show, against those expected: `wrong` has a bit set if a value differs or is no number. */
struct found {
    lanes wrong, lost, gained;
};

TARGET static inline struct found look(struct found sum, lanes expected, lanes there)
{
    lanes unequal = XOR(expected, there), value = AND(there, EACH(VALUE)), zero = SAME(value, EACH(0));
    sum.wrong = OR(sum.wrong, OR(AND_NOT(unequal, zero), AND(unequal, EACH(VALUE))));
    sum.wrong = OR(sum.wrong, SAME(value, EACH(VALUE)));
    sum.lost = MINUS(sum.lost, SAME(AND(AND(unequal, expected), EACH(SIGN)), EACH(SIGN)));
    sum.gained = MINUS(sum.gained, SAME(AND(AND(unequal, there), EACH(SIGN)), EACH(SIGN)));
    return sum;
}

/* A place in a row: a group of codes, the exponent of its scale, and how many groups that still holds for. */
struct place {
    const uint8_t *codes;
    const int32_t *exponent;
    int64_t left, block_groups;
};

static struct place row_of(const uint8_t *codes, int64_t row, int64_t row_bytes, const struct scales *scales)
{
    return (struct place){codes + row * row_bytes, scales->exponents + row / scales->block_rows * scales->columns,
        scales->block_groups, scales->block_groups};
}

static inline void step(struct place *place, int64_t group_bytes)
{
    place->codes += group_bytes;
    if (--place->left == 0) {
        place->left = place->block_groups;
        place->exponent++;
    }
}

/* The next groups of a row, at most AT_MOST. Adds zeros that lost and gained a sign; returns whether all values are
   equal and numbers. */
TARGET static int groups_equal(struct place *fp4, struct place *fp8, int64_t groups, const uint8_t *tables,
    int32_t least, int32_t most, int64_t *signs)
{
    struct found sum = {EACH(0), EACH(0), EACH(0)};
    for (int64_t group = 0; group < groups; group++) {
        int64_t difference = (int64_t)*fp4->exponent - *fp8->exponent;
        difference = difference < least ? least : difference > most ? most : difference;
        lanes table = READ(tables + 16 * (difference - least)), codes = READ(fp4->codes);
        lanes even = FROM_TABLE(table, AND(codes, EACH(0x0f))), odd = FROM_TABLE(table, UPPER(codes));
        sum = look(sum, FIRST_PAIRS(even, odd), READ(fp8->codes));
        sum = look(sum, LAST_PAIRS(even, odd), READ(fp8->codes + 16));
        step(fp4, GROUP / 2);
        step(fp8, GROUP);
    }
    signs[0] += total(sum.lost);
    signs[1] += total(sum.gained);
    return total(sum.wrong) == 0;
}

/* Whether FP4 codes [rows, 16 * groups] (low nibble first) and FP8 codes [rows, 32 * groups] have equal values, all of
   them numbers; zeros of either sign are equal. tables [most - least + 1, 16]: the E4M3 byte of each code for each
   difference of exponents, FP4's less FP8's, 0x7f where there is none; differences beyond count as the nearest.
   signs: zeros that are negative in FP4 alone, and in FP8 alone; of no meaning where values differ. */
TARGET int32_t dsv4_proof_fp4_in_fp8(const uint8_t *fp4, const uint8_t *fp8, int64_t rows, int64_t groups,
    const struct scales *fp4_scales, const struct scales *fp8_scales, const uint8_t *tables, int32_t least,
    int32_t most, int64_t *signs)
{
    signs[0] = signs[1] = 0;
    for (int64_t row = 0; row < rows; row++) {
        struct place narrow = row_of(fp4, row, groups * GROUP / 2, fp4_scales);
        struct place wide = row_of(fp8, row, groups * GROUP, fp8_scales);
        for (int64_t left = groups; left > 0; left -= AT_MOST)
            if (!groups_equal(&narrow, &wide, left < AT_MOST ? left : AT_MOST, tables, least, most, signs))
                return 0;
    }
    return 1;
}
#endif
