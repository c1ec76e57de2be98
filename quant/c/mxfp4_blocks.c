/* The two directions of mxfp4_blocks.py in one pass over memory, eight bytes at a time in a 64-bit word. */

#include <stdint.h>
#include <string.h>

enum { CODES = 16, BLOCK = 17 };
static const uint64_t LOW = 0x0f0f0f0f0f0f0f0f, EVEN = 0x00ff00ff00ff00ff;

/* Bytes 0 to 3 of a word at the even places, and zeros between them. */
static inline uint64_t spread(uint64_t word)
{
    word &= 0xffffffff;
    word = (word | word << 16) & 0x0000ffff0000ffff;
    return (word | word << 8) & EVEN;
}

/* The bytes at the even places of a word, side by side as bytes 0 to 3. */
static inline uint64_t gather(uint64_t word)
{
    word &= EVEN;
    word = (word | word >> 8) & 0x0000ffff0000ffff;
    return (word | word >> 16) & 0xffffffff;
}

/* codes [count, 16] in the release's order and scales [count] -> blocks [count, 17]. */
void dsv4_to_mxfp4_blocks(const uint8_t *codes, const uint8_t *scales, uint8_t *blocks, int64_t count)
{
    for (int64_t i = 0; i < count; i++, codes += CODES, blocks += BLOCK) {
        uint64_t half[2], mixed[2];
        memcpy(half, codes, CODES);
        uint64_t even = (half[0] & LOW) | (half[1] & LOW) << 4, odd = (half[0] >> 4 & LOW) | (half[1] & ~LOW);
        mixed[0] = spread(even) | spread(odd) << 8;
        mixed[1] = spread(even >> 32) | spread(odd >> 32) << 8;
        blocks[0] = scales[i];
        memcpy(blocks + 1, mixed, CODES);
    }
}

/* blocks [count, 17] -> codes [count, 16] in the release's order. */
void dsv4_codes_of_mxfp4_blocks(const uint8_t *blocks, uint8_t *codes, int64_t count)
{
    for (int64_t i = 0; i < count; i++, codes += CODES, blocks += BLOCK) {
        uint64_t half[2], mixed[2];
        memcpy(mixed, blocks + 1, CODES);
        uint64_t even = gather(mixed[0]) | gather(mixed[1]) << 32;
        uint64_t odd = gather(mixed[0] >> 8) | gather(mixed[1] >> 8) << 32;
        half[0] = (even & LOW) | (odd & LOW) << 4;
        half[1] = (even >> 4 & LOW) | (odd & ~LOW);
        memcpy(codes, half, CODES);
    }
}
