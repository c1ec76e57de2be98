/* The way back of from_bf16.py in one pass over memory: BF16 values to codes and the scale of each block.

   A magnitude of BF16 is an integer whose upper bits are the exponent. So the largest of a block is a maximum of
   integers, dividing by a power of two subtracts from the exponent, and rounding to a format with fewer bits of mantissa
   adds and shifts, but for the format's subnormals: those have a threshold each. All of it is arithmetic in 16 bits, in
   vectors of a size that every processor has. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MAGNITUDE 0x7fff
#define INFINITE 0x7f80
#define MANTISSA_BITS 7
#define MANTISSA 0x7f
#define BIAS 127
#define BITS(exponent, mantissa) ((BIAS + (exponent)) << MANTISSA_BITS | (mantissa)) /* (1 + mantissa / 128) * 2^exponent */
#define GROUP 32 /* elements of FP4 that share a scale */
#define LANES 8
#define MOST_LIMITS 8

/* A number format. largest: BF16 bits of its largest value. mantissa_bits, sign: of a code. values: of the codes from 1
   to the smallest that is normal. limits: a magnitude above limits[i] rounds to values[i] or more; midway between two
   codes is a tie, which goes to the even one. */
struct format {
    int16_t largest, mantissa_bits, sign, values[MOST_LIMITS], limits[MOST_LIMITS];
};

#define E2M1 (struct format){BITS(2, 0x40), 1, 3, {BITS(-1, 0), BITS(0, 0)}, {BITS(-2, 0), BITS(-1, 0x40) - 1}}
#define E4M3 (struct format){BITS(8, 0x60), 3, 7, \
    {BITS(-9, 0), BITS(-8, 0), BITS(-8, 0x40), BITS(-7, 0), BITS(-7, 0x20), BITS(-7, 0x40), BITS(-7, 0x60), BITS(-6, 0)}, \
    {BITS(-10, 0), BITS(-9, 0x40) - 1, BITS(-8, 0x20), BITS(-8, 0x60) - 1, BITS(-7, 0x10), BITS(-7, 0x30) - 1, \
        BITS(-7, 0x50), BITS(-7, 0x70) - 1}}

typedef int16_t lanes __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

struct block {
    const uint16_t *values;
    int64_t rows, columns, stride;
};

INLINE lanes choose(lanes mask, lanes yes, lanes no)
{
    return (mask & yes) | (~mask & no);
}

/* Elements of a row from `column` on; zeros after its end. */
INLINE lanes load(const uint16_t *from, int64_t column, int64_t columns)
{
    lanes values = {0};
    if (column + LANES <= columns)
        memcpy(&values, from + column, sizeof values);
    else
        memcpy(&values, from + column, (size_t)(columns - column) * sizeof *from);
    return values;
}

/* Codes of LANES elements under the scale 2^(base / 128). Subtracts 1 from `count` for each that changes, and sets bits
   of `coarser` for each that has no code under twice the scale. */
INLINE lanes encode_lanes(lanes value, int16_t base, const struct format f, lanes *count, lanes *coarser)
{
    const int16_t subnormals = 1 << f.mantissa_bits, normal = f.values[subnormals - 1];
    const int16_t shift = MANTISSA_BITS - f.mantissa_bits, below_half = (1 << (shift - 1)) - 1;
    const int16_t first = normal >> shift, twice_normal = 2 * subnormals, sign = 1 << f.sign;
    lanes magnitude = (value & MAGNITUDE) - base, zero = {0}, low = zero, low_back = zero - base;
    lanes rounded = (magnitude + below_half + (magnitude >> shift & 1)) >> shift;
    for (int i = 0; i < subnormals; i++) {
        lanes above = magnitude > f.limits[i];
        low -= above;
        low_back = choose(above, zero + f.values[i], low_back);
    }
    lanes is_low = magnitude < normal;
    lanes code = choose(is_low, low, rounded - first + subnormals);
    lanes changed = choose(is_low, low_back, rounded << shift) != magnitude;
    *count += changed;
    *coarser |= changed | ((code < twice_normal) & code & 1);
    return code | (value >> 15 & sign);
}

/* Codes of a row, at `to`. Returns how many elements change; `base` and `coarser` as above. */
INLINE int32_t encode_row(const uint16_t *from, int64_t columns, int16_t base, const struct format f, uint8_t *to,
    lanes *coarser)
{
    lanes count = {0};
    int32_t changed = 0;
    for (int64_t column = 0; column < columns; column += LANES) {
        lanes codes = encode_lanes(load(from, column, columns), base, f, &count, coarser);
        bytes narrow = __builtin_convertvector(codes, bytes);
        memcpy(to + column, &narrow, (size_t)(column + LANES <= columns ? LANES : columns - column));
    }
    for (int lane = 0; lane < LANES; lane++)
        changed -= count[lane];
    return changed;
}

INLINE int32_t any(lanes flags)
{
    int64_t halves[2];
    memcpy(halves, &flags, sizeof halves);
    return (halves[0] | halves[1]) != 0;
}

/* Codes of a block. coarser: whether any element has no code under twice the scale. */
INLINE int32_t encode(struct block b, int32_t byte, const struct format f, uint8_t *to, int64_t to_stride,
    int32_t *coarser)
{
    int32_t changed = 0;
    lanes flags = {0};
    for (int64_t row = 0; row < b.rows; row++)
        changed += encode_row(b.values + row * b.stride, b.columns, (int16_t)((byte - BIAS) * (1 << MANTISSA_BITS)), f,
            to + row * to_stride, &flags);
    *coarser = any(flags);
    return changed;
}

INLINE int32_t largest_of(struct block b)
{
    lanes largest = {0};
    int32_t found = 0;
    for (int64_t row = 0; row < b.rows; row++)
        for (int64_t column = 0; column < b.columns; column += LANES) {
            lanes magnitude = load(b.values + row * b.stride, column, b.columns) & MAGNITUDE;
            largest = choose(magnitude > largest, magnitude, largest);
        }
    for (int lane = 0; lane < LANES; lane++)
        found = largest[lane] > found ? largest[lane] : found;
    return found;
}

/* Scale byte and codes of one block. Returns 0 if it has infinity or NaN, or is so small that BF16's subnormals count. */
INLINE int32_t convert(struct block b, const struct format f, uint8_t *to, int64_t to_stride, uint8_t *scale,
    int32_t *changed)
{
    int32_t top = largest_of(b), byte = BIAS;
    int32_t coarser;
    if (top >= INFINITE)
        return 0;
    if (top)
        byte += (top >> MANTISSA_BITS) - (f.largest >> MANTISSA_BITS) + ((top & MANTISSA) > (f.largest & MANTISSA));
    if (byte - BIAS + (f.values[0] >> MANTISSA_BITS) - 2 <= 0) /* a quarter of the smallest code is not normal in BF16 */
        return 0;
    int32_t may_be_coarser = top && (top & MANTISSA) == (f.largest & MANTISSA);
    *changed = encode(b, byte, f, to, to_stride, &coarser);
    if (may_be_coarser && !coarser)
        *changed = encode(b, ++byte, f, to, to_stride, &coarser);
    *scale = (uint8_t)byte;
    return 1;
}

static struct block block_at(const uint16_t *values, int64_t rows, int64_t columns, int64_t top, int64_t left,
    int64_t block_rows, int64_t block_columns)
{
    int64_t high = rows - top < block_rows ? rows - top : block_rows;
    int64_t wide = columns - left < block_columns ? columns - left : block_columns;
    return (struct block){values + top * columns + left, high, wide, columns};
}

/* values [rows, columns] -> codes [rows, columns], scales and changed [ceil(rows / block_rows), ceil(columns /
   block_columns)]. Returns how many blocks were left out: those of `convert`, which the caller treats in another way. */
int64_t dsv4_bf16_to_fp8(const uint16_t *values, int64_t rows, int64_t columns, int64_t block_rows,
    int64_t block_columns, uint8_t *codes, uint8_t *scales, int32_t *changed)
{
    int64_t left_out = 0, at = 0;
    for (int64_t top = 0; top < rows; top += block_rows)
        for (int64_t left = 0; left < columns; left += block_columns, at++) {
            struct block b = block_at(values, rows, columns, top, left, block_rows, block_columns);
            left_out += !convert(b, E4M3, codes + top * columns + left, columns, scales + at, changed + at);
        }
    return left_out;
}

/* The same for blocks of one row and GROUP columns: packed [rows, columns / 2], the even element in the low bits. */
int64_t dsv4_bf16_to_fp4(const uint16_t *values, int64_t rows, int64_t columns, uint8_t *packed, uint8_t *scales,
    int32_t *changed)
{
    int64_t left_out = 0, at = 0;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t left = 0; left < columns; left += GROUP, at++) {
            struct block b = block_at(values, rows, columns, row, left, 1, GROUP);
            uint8_t codes[GROUP], *to = packed + (row * columns + left) / 2;
            left_out += !convert(b, E2M1, codes, GROUP, scales + at, changed + at);
            for (int64_t pair = 0; pair < b.columns / 2; pair++)
                to[pair] = (uint8_t)(codes[2 * pair] | codes[2 * pair + 1] << 4);
        }
    return left_out;
}
