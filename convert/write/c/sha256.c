/* SHA-256 (FIPS 180-4) of one file, or of two at the same time, by the SHA instructions of x86-64.

   Each of these instructions waits for the result of the one before it, so a core that hashes one file is idle half of
   the time. The rounds of a second file fit in between: two files take little more time than one. Libraries that
   Python has (OpenSSL's behind hashlib) hash one at a time. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define TARGET __attribute__((target("sha,sse4.1")))
#define INLINE TARGET static inline __attribute__((always_inline))
#define SHA_BIT (1u << 29)   /* of EBX, leaf 7 of CPUID */
#define SSE4_1_BIT (1u << 19) /* of ECX, leaf 1 */
#define HAS_INSTRUCTIONS
#endif

#define BLOCK 64       /* bytes that the rounds take in at once */
#define LENGTH_BYTES 8 /* of the number of bits that ends the last block */

/* Whether this processor has the instructions. */
int32_t dsv4_sha256_works(void)
{
#if defined(HAS_INSTRUCTIONS)
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & SSE4_1_BIT))
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & SHA_BIT);
#else
    return 0;
#endif
}

#if defined(HAS_INSTRUCTIONS)

/* The hash of `length` bytes; those that do not fill a block yet are in `rest`. */
struct hash {
    uint32_t state[8];
    uint64_t length;
    uint8_t rest[BLOCK];
};

static const uint32_t CONSTANTS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static const uint32_t FIRST_STATE[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

/* A hash in registers: words a, b, e, f and c, d, g, h of its state, and sixteen words of the message. */
struct lane {
    __m128i abef, cdgh, words[4];
};

INLINE struct lane state_of(const struct hash *hash)
{
    __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)hash->state), 0xb1);
    __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(hash->state + 4)), 0x1b);
    struct lane lane = {_mm_alignr_epi8(badc, hgfe, 8), _mm_blend_epi16(hgfe, badc, 0xf0), {{0}}};
    return lane;
}

INLINE void keep_state(struct hash *hash, const struct lane *lane)
{
    __m128i feba = _mm_shuffle_epi32(lane->abef, 0x1b), dchg = _mm_shuffle_epi32(lane->cdgh, 0xb1);
    _mm_storeu_si128((__m128i *)hash->state, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128((__m128i *)(hash->state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

INLINE void load_words(struct lane *lane, const uint8_t *block)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    for (int i = 0; i < 4; i++)
        lane->words[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(block + 16 * i)), big_endian);
}

/* Rounds 4 * i to 4 * i + 3, and the words that rounds 4 * (i + 4) and so on need. */
INLINE void four_rounds(struct lane *lane, int i)
{
    __m128i *words = lane->words, now = words[i % 4];
    __m128i sum = _mm_add_epi32(now, _mm_loadu_si128((const __m128i *)(CONSTANTS + 4 * i)));
    lane->cdgh = _mm_sha256rnds2_epu32(lane->cdgh, lane->abef, sum);
    lane->abef = _mm_sha256rnds2_epu32(lane->abef, lane->cdgh, _mm_shuffle_epi32(sum, 0x0e));
    __m128i late = words[(i + 3) % 4], seven_before = _mm_alignr_epi8(late, words[(i + 2) % 4], 4);
    __m128i begun = _mm_add_epi32(_mm_sha256msg1_epu32(now, words[(i + 1) % 4]), seven_before);
    words[i % 4] = _mm_sha256msg2_epu32(begun, late);
}

INLINE void rounds(struct lane *lanes, int count, int i)
{
    for (int lane = 0; lane < count; lane++)
        four_rounds(lanes + lane, i);
}

/* So many blocks of each of `count` hashes, which is a constant wherever this is called. */
INLINE void blocks_of(struct hash *const *hashes, const uint8_t *const *data, int64_t blocks, int count)
{
    struct lane lanes[2];
    for (int lane = 0; lane < count; lane++)
        lanes[lane] = state_of(hashes[lane]);
    for (int64_t block = 0; block < blocks; block++) {
        struct lane before[2];
        for (int lane = 0; lane < count; lane++) {
            before[lane] = lanes[lane];
            load_words(lanes + lane, data[lane] + BLOCK * block);
        }
        for (int i = 0; i < 16; i += 4) {
            rounds(lanes, count, i);
            rounds(lanes, count, i + 1);
            rounds(lanes, count, i + 2);
            rounds(lanes, count, i + 3);
        }
        for (int lane = 0; lane < count; lane++) {
            lanes[lane].abef = _mm_add_epi32(lanes[lane].abef, before[lane].abef);
            lanes[lane].cdgh = _mm_add_epi32(lanes[lane].cdgh, before[lane].cdgh);
        }
    }
    for (int lane = 0; lane < count; lane++)
        keep_state(hashes[lane], lanes + lane);
}

TARGET static void blocks_of_one(struct hash *hash, const uint8_t *data, int64_t blocks)
{
    blocks_of(&hash, &data, blocks, 1);
}

TARGET static void blocks_of_two(struct hash *const hashes[2], const uint8_t *const data[2], int64_t blocks)
{
    blocks_of(hashes, data, blocks, 2);
}

/* Complete the block that earlier bytes began. Returns how many of the bytes that took. */
static int64_t complete(struct hash *hash, const uint8_t *data, int64_t size)
{
    int64_t begun = hash->length % BLOCK, missing = begun ? BLOCK - begun : 0, taken = missing < size ? missing : size;
    memcpy(hash->rest + begun, data, taken);
    hash->length += taken;
    if (missing && taken == missing)
        blocks_of_one(hash, hash->rest, 1);
    return taken;
}

/* What is left when whole blocks were hashed. */
static void keep_rest(struct hash *hash, const uint8_t *data, int64_t size)
{
    memcpy(hash->rest, data, size % BLOCK);
}

void dsv4_sha256_begin(struct hash *hash)
{
    memset(hash, 0, sizeof *hash);
    memcpy(hash->state, FIRST_STATE, sizeof hash->state);
}

/* The next `size` bytes of a file. */
void dsv4_sha256_update(struct hash *hash, const uint8_t *data, int64_t size)
{
    int64_t taken = complete(hash, data, size), left = size - taken;
    if (left == 0)
        return;
    data += taken;
    blocks_of_one(hash, data, left / BLOCK);
    keep_rest(hash, data + left / BLOCK * BLOCK, left);
    hash->length += left;
}

/* The next bytes of two files, which are hashed at the same time as far as both go. */
void dsv4_sha256_update_two(
    struct hash *first, const uint8_t *data, int64_t size, struct hash *second, const uint8_t *other, int64_t other_size)
{
    int64_t taken = complete(first, data, size), other_taken = complete(second, other, other_size);
    int64_t blocks = (size - taken) / BLOCK, other_blocks = (other_size - other_taken) / BLOCK;
    int64_t both = blocks < other_blocks ? blocks : other_blocks;
    struct hash *const hashes[2] = {first, second};
    const uint8_t *const begins[2] = {data + taken, other + other_taken};
    blocks_of_two(hashes, begins, both);
    first->length += BLOCK * both;
    second->length += BLOCK * both;
    taken += BLOCK * both;
    other_taken += BLOCK * both;
    dsv4_sha256_update(first, data + taken, size - taken);
    dsv4_sha256_update(second, other + other_taken, other_size - other_taken);
}

/* The digest of the bytes so far, 32 bytes; more may follow. */
void dsv4_sha256_digest(const struct hash *so_far, uint8_t *digest)
{
    struct hash hash = *so_far;
    int64_t used = hash.length % BLOCK;
    uint64_t bits = 8 * hash.length;
    memset(hash.rest + used, 0, BLOCK - used);
    hash.rest[used] = 0x80;
    if (used + 1 + LENGTH_BYTES > BLOCK) {
        blocks_of_one(&hash, hash.rest, 1);
        memset(hash.rest, 0, BLOCK);
    }
    for (int i = 0; i < LENGTH_BYTES; i++)
        hash.rest[BLOCK - 1 - i] = bits >> (8 * i);
    blocks_of_one(&hash, hash.rest, 1);
    for (int i = 0; i < 32; i++)
        digest[i] = hash.state[i / 4] >> (24 - 8 * (i % 4));
}
#endif
