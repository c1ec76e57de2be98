/* What the codes of a block say of its scale, for scale_choice.py, in one pass over memory. Plain loops over bytes,
   which compilers turn into vectors. */

#include <stdint.h>
#include <string.h>

#define GROUP_BYTES 16 /* of 32 codes of FP4, two to a byte */
#define LOWEST_BITS 0x1111111111111111u /* of each code of four bits */

enum found { FOLLOWS, DOES_NOT, ZEROS }; /* as in scale_choice.py */

/* What some magnitudes of a block are, a bit each. TOP: at least half of the largest code. LARGEST: the largest code.
   ODD: so small that there is no code under twice the scale. */
enum flag { ANY = 1, TOP = 2, LARGEST = 4, ODD = 8 };

static const uint8_t OF_FLAGS[16] = {
    ZEROS, DOES_NOT, ZEROS, FOLLOWS, ZEROS, DOES_NOT, ZEROS, DOES_NOT, /* none is ODD */
    ZEROS, DOES_NOT, ZEROS, FOLLOWS, ZEROS, DOES_NOT, ZEROS, FOLLOWS,
};

typedef uint64_t words __attribute__((vector_size(GROUP_BYTES)));

/* packed [groups * GROUP_BYTES], the codes of FP4 -> found [groups]. A code is 0bS_EE_M: 3, 4 and 6 have the upper bit of
   the exponent and another one, 6 has all three, and 0.5 and 1.5 have the lowest bit and not the upper. The flags of a
   code take its place. */
void dsv4_scale_choice_fp4(const uint8_t *packed, int64_t groups, uint8_t *found)
{
    for (int64_t group = 0; group < groups; group++) {
        words low;
        memcpy(&low, packed + group * GROUP_BYTES, sizeof low);
        words middle = low >> 1, high = low >> 2;
        words any = (low | middle | high) & LOWEST_BITS, top = high & (low | middle) & LOWEST_BITS;
        words largest = top & middle & low, odd = low & ~high & LOWEST_BITS;
        words flags = any | top << 1 | largest << 2 | odd << 3;
        uint64_t all = flags[0] | flags[1];
        all |= all >> 32;
        all |= all >> 16;
        all |= all >> 8;
        found[group] = OF_FLAGS[(all | all >> 4) & 0xf];
    }
}

/* In place: what the codes say -> 1 if the scale does not follow, else 0. */
void dsv4_scale_choice(uint8_t *found, const uint8_t *scales, int64_t count, uint8_t of_zeros, uint8_t low, uint8_t high)
{
    for (int64_t i = 0; i < count; i++) {
        uint8_t outside = (scales[i] < low) | (scales[i] > high);
        uint8_t not_that_of_zeros = scales[i] != of_zeros;
        found[i] = found[i] == ZEROS ? not_that_of_zeros : (uint8_t)(found[i] | outside);
    }
}

/* Codes of E4M3 [rows, columns] -> found, one a block. A magnitude is 0bEEEE_MMM; odd ones below 2**-5 are odd. */
void dsv4_scale_choice_fp8(const uint8_t *codes, int64_t rows, int64_t columns, int64_t block_rows,
    int64_t block_columns, uint8_t *found)
{
    for (int64_t top = 0; top < rows; top += block_rows)
        for (int64_t left = 0; left < columns; left += block_columns) {
            int64_t bottom = rows - top < block_rows ? rows : top + block_rows;
            int64_t wide = columns - left < block_columns ? columns - left : block_columns;
            uint8_t largest = 0, odd = 0;
            for (int64_t row = top; row < bottom; row++) {
                const uint8_t *from = codes + row * columns + left;
                for (int64_t column = 0; column < wide; column++) {
                    uint8_t magnitude = from[column] & 0x7f;
                    largest = magnitude > largest ? magnitude : largest;
                    odd |= (uint8_t)(magnitude & (magnitude < 0x10)); /* 0b0010_000: 2**-5 */
                }
            }
            int flags = (largest > 0) * ANY | (largest >= 0x76) * TOP | (largest == 0x7e) * LARGEST | (odd & 1) * ODD;
            *found++ = OF_FLAGS[flags];
        }
}
