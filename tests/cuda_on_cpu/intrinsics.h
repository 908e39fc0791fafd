// Device functions of one thread: atomics, fences, fast arithmetic, bit operations.
#pragma once

#include <algorithm>
#include <atomic>

// ---- memory ---------------------------------------------------------------------------------------------------------

// The CPU orders memory for the kernel: a missing fence shows here only to the compiler.
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
template <class T>
void __stcg(T* pointer, T value) {
  *pointer = value;
}

namespace emulator {

// Replaces *pointer by change(*pointer) in one step and gives what was there.
template <class T, class Change>
T atomic_update(T* pointer, Change change) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "atomics are on 2, 4 or 8 bytes");
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T))
    stop("an atomic operation on the misaligned address %p", static_cast<void*>(pointer));
  Bits* word = reinterpret_cast<Bits*>(pointer);
  Bits before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  T old;
  do {
    std::memcpy(static_cast<void*>(&old), &before, sizeof(T));
    const T changed = change(old);
    std::memcpy(&after, static_cast<const void*>(&changed), sizeof(T));
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

template <class T>
struct Same {  // keeps an argument out of template deduction
  using type = T;
};
template <class T>
using same = typename Same<T>::type;

}  // namespace emulator

template <class T>
T atomicAdd(T* pointer, emulator::same<T> value) {
  return emulator::atomic_update(pointer, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* pointer, emulator::same<T> value) {
  return emulator::atomic_update(pointer, [&](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMax(T* pointer, emulator::same<T> value) {
  return emulator::atomic_update(pointer, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* pointer, emulator::same<T> value) {
  return emulator::atomic_update(pointer, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicAnd(T* pointer, emulator::same<T> value) {
  return emulator::atomic_update(pointer, [&](T old) { return old & value; });
}
template <class T>
T atomicOr(T* pointer, emulator::same<T> value) {
  return emulator::atomic_update(pointer, [&](T old) { return old | value; });
}
template <class T>
T atomicXor(T* pointer, emulator::same<T> value) {
  return emulator::atomic_update(pointer, [&](T old) { return old ^ value; });
}
template <class T>
T atomicExch(T* pointer, emulator::same<T> value) {
  return emulator::atomic_update(pointer, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* pointer, emulator::same<T> expected, emulator::same<T> value) {
  return emulator::atomic_update(pointer, [&](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* pointer, unsigned limit) {
  return emulator::atomic_update(pointer, [&](unsigned old) { return old >= limit ? 0u : old + 1; });
}
inline unsigned atomicDec(unsigned* pointer, unsigned limit) {
  return emulator::atomic_update(pointer, [&](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

[[noreturn]] inline void __trap() { emulator::stop("__trap"); }

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// The fast functions are exact here, so results differ from a GPU's in the last bits.
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __log10f(float x) { return std::log10(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmin(static_cast<C>(a), static_cast<C>(b));
  else return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmax(static_cast<C>(a), static_cast<C>(b));
  else return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}

// Half-precision functions that NVIDIA's headers keep from host compilers. In double, products are exact and sums
// nearly so: what follows is one rounding, as on a GPU.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                        __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(static_cast<double>(__bfloat162float(a)) * __bfloat162float(b) + __bfloat162float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                            __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}
inline __half hexp2(__half x) { return __float2half(std::exp2(__half2float(x))); }
inline __half2 h2exp2(__half2 x) { return __halves2half2(hexp2(__low2half(x)), hexp2(__high2half(x))); }
inline __half hexp(__half x) { return __float2half(std::exp(__half2float(x))); }
inline __half hlog2(__half x) { return __float2half(std::log2(__half2float(x))); }
inline __half hrsqrt(__half x) { return __float2half(rsqrtf(__half2float(x))); }
inline __half hrcp(__half x) { return __float2half(1 / __half2float(x)); }
inline __half hsqrt(__half x) { return __float2half(std::sqrt(__half2float(x))); }

// ---- bits -----------------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }

inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}

// The shifted high:low pair's upper word, and its lower word; the shift is taken modulo 32.
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

// Of each selector nibble the low three bits pick a byte; the fourth asks for copies of that byte's sign, as prmt does.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned nibble = selector >> (4 * i) & 15;
    unsigned byte = static_cast<unsigned>(both >> (8 * (nibble & 7))) & 0xFF;
    if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << (8 * i);
  }
  return result;
}

inline int __dp4a(int a, int b, int c) {
  unsigned sum = static_cast<unsigned>(c);
  for (int i = 0; i < 4; i++)
    sum += static_cast<unsigned>(static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i)));
  return static_cast<int>(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; i++) c += (a >> (8 * i) & 0xFF) * (b >> (8 * i) & 0xFF);
  return c;
}

template <class To, class From>
To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::lrint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::llrint(x)); }
inline unsigned __float2uint_rz(float x) { return static_cast<unsigned>(x); }
inline int __half2int_rn(__half x) { return __float2int_rn(__half2float(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
