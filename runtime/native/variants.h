/* One source for several sets of instructions, where the compiler's own vectors are enough. */
#ifndef GEMMA_EXPORT_VARIANTS_H
#define GEMMA_EXPORT_VARIANTS_H

#include "product.h"

/* Defines `FUNCTION_chosen()`: an inline function without a result, compiled for the processor's instructions unless
 * GEMMA_EXPORT_KERNELS asks for less. PARAMETERS declares what it takes, ARGUMENTS names it, both in parentheses. */
#if defined(__x86_64__)
#define VARIANTS(FUNCTION, PARAMETERS, ARGUMENTS)                                                            \
    static void FUNCTION##_portable PARAMETERS { FUNCTION ARGUMENTS; }                                       \
    __attribute__((target("avx2"))) static void FUNCTION##_avx2 PARAMETERS { FUNCTION ARGUMENTS; }           \
    __attribute__((target("avx512f"))) static void FUNCTION##_avx512 PARAMETERS { FUNCTION ARGUMENTS; }      \
    static void(*FUNCTION##_chosen(void)) PARAMETERS {                                                       \
        const Kernels *kernels = chosen_kernels();                                                           \
        if (kernels == &avx512_vnni_kernels) return FUNCTION##_avx512;                                       \
        return kernels == &avx2_kernels ? FUNCTION##_avx2 : FUNCTION##_portable;                             \
    }
#else
#define VARIANTS(FUNCTION, PARAMETERS, ARGUMENTS)                      \
    static void FUNCTION##_portable PARAMETERS { FUNCTION ARGUMENTS; } \
    static void(*FUNCTION##_chosen(void)) PARAMETERS { return FUNCTION##_portable; }
#endif

#endif
