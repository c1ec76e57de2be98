/* Sixteen lanes in one vector of the compiler: what AVX-512 has, and what plain C is compiled from. */
#pragma once
#include "vectors.h"

typedef lanes sixteen;

/* Thirty-two numbers of a row as their exact float32 values: the odd and the even elements. */
struct pair {
    sixteen odd, even;
};

INLINE sixteen zeros(void) { return splat(0.f); }

INLINE sixteen load_sixteen(const float *p) { return load(p); }

INLINE void store_sixteen(float *p, sixteen v) { store(p, v); }

INLINE sixteen add_product(sixteen a, sixteen b, sixteen sum, int exact) { return multiply_add(a, b, sum, exact); }
