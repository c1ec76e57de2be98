/* The cast of fp4_to_fp8.py in one pass over memory: what a processor can do that torch has no operation for.

   A group of 32 elements has one k = s - S, and for one k a code of four bits has one E4M3 byte: a table of 16 bytes,
   which is what a vector register holds and the byte shuffle of every processor looks up in, 16 codes at a time.
   The tables come from the caller, so that the numbers are written down once, in Python. */

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
typedef __m128i bytes;
#define TARGET __attribute__((target("ssse3")))
#define LOAD(from) _mm_loadu_si128((const __m128i *)(from))
#define STORE(to, x) _mm_storeu_si128((__m128i *)(to), x)
#define FILL(x) _mm_set1_epi8((char)(x))
#define LOW_NIBBLES(x) _mm_and_si128(x, FILL(0x0f))
#define HIGH_NIBBLES(x) _mm_and_si128(_mm_srli_epi16(x, 4), FILL(0x0f))
#define LOOK_UP(table, x) _mm_shuffle_epi8(table, x)
#define FIRST_OF_BOTH(a, b) _mm_unpacklo_epi8(a, b)
#define LAST_OF_BOTH(a, b) _mm_unpackhi_epi8(a, b)
#define EQUAL(a, b) _mm_cmpeq_epi8(a, b)
#define SUBTRACT(a, b) _mm_sub_epi8(a, b)
#elif defined(__aarch64__)
#include <arm_neon.h>
typedef uint8x16_t bytes;
#define TARGET
#define LOAD(from) vld1q_u8(from)
#define STORE(to, x) vst1q_u8(to, x)
#define FILL(x) vdupq_n_u8(x)
#define LOW_NIBBLES(x) vandq_u8(x, FILL(0x0f))
#define HIGH_NIBBLES(x) vshrq_n_u8(x, 4)
#define LOOK_UP(table, x) vqtbl1q_u8(table, x)
#define FIRST_OF_BOTH(a, b) vzip1q_u8(a, b)
#define LAST_OF_BOTH(a, b) vzip2q_u8(a, b)
#define EQUAL(a, b) vceqq_u8(a, b)
#define SUBTRACT(a, b) vsubq_u8(a, b)
#else
#define NO_BYTE_SHUFFLE /* is known for this processor: the cast in torch serves it */
#endif

#define GROUP 16           /* bytes of 32 codes */
#define NEGATIVE_ZERO 0x80
#define GROUPS_COUNTED 127 /* in lanes of 8 bits, two codes of a group in each */

/* Whether this processor has the instructions: they are newer than x86-64 itself. */
int32_t dsv4_fp4_to_fp8_works(void)
{
#if defined(NO_BYTE_SHUFFLE)
    return 0;
#elif defined(__x86_64__)
    return __builtin_cpu_supports("ssse3") != 0;
#else
    return 1;
#endif
}

#if !defined(NO_BYTE_SHUFFLE)

TARGET static int64_t sum(bytes lanes)
{
    uint8_t each[16];
    int64_t total = 0;
    STORE(each, lanes);
    for (int lane = 0; lane < 16; lane++)
        total += each[lane];
    return total;
}

/* Groups of one row, at most GROUPS_COUNTED of them. Returns how many codes became -0. */
TARGET static int64_t cast_groups(const uint8_t *packed, const uint8_t *scale, const uint8_t *block_scale,
    int64_t first, int64_t last, int64_t block_groups, const uint8_t *tables, int32_t k_min, int32_t k_max, uint8_t *out)
{
    bytes zeros = FILL(0);
    for (int64_t group = first; group < last; group++) {
        int32_t k = scale[group] - block_scale[group / block_groups];
        k = k < k_min ? k_min : k > k_max ? k_max : k;
        bytes table = LOAD(tables + 16 * (k - k_min)), codes = LOAD(packed + GROUP * group);
        bytes even = LOOK_UP(table, LOW_NIBBLES(codes)), odd = LOOK_UP(table, HIGH_NIBBLES(codes));
        bytes begin = FIRST_OF_BOTH(even, odd), end = LAST_OF_BOTH(even, odd);
        STORE(out + 2 * GROUP * group, begin);
        STORE(out + 2 * GROUP * group + 16, end);
        zeros = SUBTRACT(zeros, EQUAL(begin, FILL(NEGATIVE_ZERO))); /* equal is -1 */
        zeros = SUBTRACT(zeros, EQUAL(end, FILL(NEGATIVE_ZERO)));
    }
    return sum(zeros);
}

/* packed [rows, 16 * groups], scale [rows, groups], block_scale [.., ceil(groups / block_groups)] of blocks of
   block_rows rows, tables [k_max - k_min + 1, 16]: the E4M3 byte of each code for each k; a k outside is the nearest
   inside. Writes out [rows, 32 * groups] and returns how many of its codes are -0. */
int64_t dsv4_fp4_to_fp8(const uint8_t *packed, const uint8_t *scale, const uint8_t *block_scale, const uint8_t *tables,
    int32_t k_min, int32_t k_max, uint8_t *out, int64_t rows, int64_t groups, int64_t block_rows, int64_t block_groups)
{
    int64_t zeros = 0, block_columns = (groups + block_groups - 1) / block_groups;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t first = 0; first < groups; first += GROUPS_COUNTED) {
            int64_t last = first + GROUPS_COUNTED < groups ? first + GROUPS_COUNTED : groups;
            zeros += cast_groups(packed + row * groups * GROUP, scale + row * groups,
                block_scale + row / block_rows * block_columns, first, last, block_groups, tables, k_min, k_max,
                out + row * groups * 2 * GROUP);
        }
    return zeros;
}
#endif
