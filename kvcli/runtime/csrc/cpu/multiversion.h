// KVRT_CLONES before a function without templates: compiled for several instruction sets, the loader picks one.
//
// For loops that the compiler vectorises by itself. Contraction is off, so all of them round alike.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define KVRT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define KVRT_CLONES
#endif
