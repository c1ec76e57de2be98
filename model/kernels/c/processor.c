/* What this processor has: compiled once, without any option that it might lack. Each answers for one form. */
#include <stdint.h>

int32_t dsv4_has_plain(void) { return 1; }

#if defined(__x86_64__)
#include <cpuid.h>

/* __builtin_cpu_supports also asks whether the system saves the registers. */
int32_t dsv4_has_avx2(void) {
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    __get_cpuid(1, &a, &b, &c, &d);
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (c >> 29 & 1); /* bit 29: float16 */
}

int32_t dsv4_has_avx512(void) {
    return dsv4_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

int32_t dsv4_has_avx512bf16(void) {
    unsigned a = 0, b, c, d;
    if (!dsv4_has_avx512() || !__builtin_cpu_supports("avx512vbmi")) return 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1); /* bit 5: bfloat16 */
}
#elif defined(__aarch64__)
int32_t dsv4_has_neon(void) { return 1; }
#endif

/* What the library was built from: compiled.py compares it with the files that are installed. */
const char *dsv4_fingerprint(void) { return DSV4_FINGERPRINT; }
