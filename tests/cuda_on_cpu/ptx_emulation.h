// What kvcli/runtime/csrc/cuda/ptx.cuh gives a GPU, for the emulator: the same names, arguments and layouts.
#pragma once

#include "emulator.h"

namespace kvrt::ptx {

using emulator::Place;

// ---- matrix products ------------------------------------------------------------------------------------------------

namespace detail {

// An .aligned instruction is undefined unless all 32 lanes take part.
inline void need_all_lanes(const char* name, emulator::Operands operands) {
  for (unsigned i = 0; i < emulator::WARP; i++)
    if (!operands[i]) emulator::stop("%s: lane %u of the warp does not take part", name, i);
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

template <class T>
void multiply(emulator::Operands operands) {
  need_all_lanes("mma_m16n8k16", operands);
  float a[16][16], b[16][8];
  const auto unpack = [](uint32_t word, float& low, float& high) {
    T pair[2];
    std::memcpy(static_cast<void*>(pair), &word, sizeof word);
    low = static_cast<float>(pair[0]);
    high = static_cast<float>(pair[1]);
  };
  for (unsigned lane = 0; lane < 32; lane++) {
    const Mma& operand = emulator::as<Mma>(operands[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; i++) {
      float* at = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
      unpack(operand.a[i], at[0], at[1]);
    }
    for (unsigned i = 0; i < 2; i++) unpack(operand.b[i], b[2 * t + 8 * i][g], b[2 * t + 8 * i + 1][g]);
  }
  for (unsigned lane = 0; lane < 32; lane++) {
    const Mma& operand = emulator::as<Mma>(operands[lane]);
    for (unsigned i = 0; i < 4; i++) {
      const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = operand.d[i];
      for (unsigned k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
      operand.d[i] = sum;
    }
  }
}

template <int matrices>
struct Ldmatrix {
  uint32_t* r;
  const void* shared;
  bool transposed;
};

template <int matrices>
void load(emulator::Operands operands) {
  need_all_lanes("ldmatrix", operands);
  using Operand = Ldmatrix<matrices>;
  uint16_t tile[8][8];
  for (int m = 0; m < matrices; m++) {
    for (int row = 0; row < 8; row++)
      std::memcpy(tile[row], emulator::as<Operand>(operands[8 * m + row]).shared, sizeof tile[row]);
    for (unsigned lane = 0; lane < 32; lane++) {
      const Operand& operand = emulator::as<Operand>(operands[lane]);
      const unsigned g = lane / 4, t = 2 * (lane % 4);
      const uint32_t low = operand.transposed ? tile[t][g] : tile[g][t];
      const uint32_t high = operand.transposed ? tile[t + 1][g] : tile[g][t + 1];
      operand.r[m] = low | high << 16;
    }
  }
}

template <int matrices>
void ldmatrix(const char* name, uint32_t (&r)[matrices], const void* shared, bool transposed, Place place) {
  emulator::Thread& thread = emulator::current_thread();
  thread.place = place;
  if (thread.lane < 8 * matrices) emulator::check_shared(shared, 16, 16, name);
  Ldmatrix<matrices> operand{r, shared, transposed};
  emulator::warp_operation(name, emulator::ALL_LANES, operand, load<matrices>, place);
}

}  // namespace detail

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place = Place::here()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "elements are __half or __nv_bfloat16");
  detail::Mma operand{d, a, b};
  emulator::warp_operation("mma_m16n8k16", emulator::ALL_LANES, operand, detail::multiply<T>, place);
}

// ---- shared memory to fragments -------------------------------------------------------------------------------------

inline void ldmatrix_x1(uint32_t (&r)[1], const void* shared, Place place = Place::here()) {
  detail::ldmatrix("ldmatrix_x1", r, shared, false, place);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared, Place place = Place::here()) {
  detail::ldmatrix("ldmatrix_x2", r, shared, false, place);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, Place place = Place::here()) {
  detail::ldmatrix("ldmatrix_x4", r, shared, false, place);
}
inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* shared, Place place = Place::here()) {
  detail::ldmatrix("ldmatrix_x1_trans", r, shared, true, place);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared, Place place = Place::here()) {
  detail::ldmatrix("ldmatrix_x2_trans", r, shared, true, place);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, Place place = Place::here()) {
  detail::ldmatrix("ldmatrix_x4_trans", r, shared, true, place);
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

namespace detail {

// The destination holds garbage from here until the thread waits, and the source is read at that wait: a missing wait,
// a missing barrier after it, and a copy into memory that others still read all give wrong results.
inline void start_copy(const char* name, void* shared, const void* global, unsigned bytes, bool valid, Place place) {
  emulator::Thread& thread = emulator::current_thread();
  thread.place = place;
  emulator::check_shared(shared, bytes, bytes, name);
  if (reinterpret_cast<uintptr_t>(global) % bytes)
    emulator::stop("%s (%s:%d): the global address %p is not a multiple of %u", name, place.file, place.line, global,
                   bytes);
  std::memset(shared, emulator::current_block().poison, bytes);
  thread.copies.push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, valid});
}

}  // namespace detail

inline void cp_async4(void* shared, const void* global, Place place = Place::here()) {
  detail::start_copy("cp_async4", shared, global, 4, true, place);
}
inline void cp_async8(void* shared, const void* global, Place place = Place::here()) {
  detail::start_copy("cp_async8", shared, global, 8, true, place);
}
inline void cp_async16(void* shared, const void* global, Place place = Place::here()) {
  detail::start_copy("cp_async16", shared, global, 16, true, place);
}
inline void cp_async4_zfill(void* shared, const void* global, bool valid, Place place = Place::here()) {
  detail::start_copy("cp_async4_zfill", shared, global, 4, valid, place);
}
inline void cp_async8_zfill(void* shared, const void* global, bool valid, Place place = Place::here()) {
  detail::start_copy("cp_async8_zfill", shared, global, 8, valid, place);
}
inline void cp_async16_zfill(void* shared, const void* global, bool valid, Place place = Place::here()) {
  detail::start_copy("cp_async16_zfill", shared, global, 16, valid, place);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int pending>
void cp_async_wait() {
  static_assert(pending >= 0);
  emulator::wait_for_copies(pending);
}

inline void cp_async_wait_all() { emulator::wait_for_all_copies(); }

// ---- loads and arithmetic -------------------------------------------------------------------------------------------

inline uint4 load_streaming16(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16)
    emulator::stop("load_streaming16: the address %p is not a multiple of 16", global);
  uint4 value;
  std::memcpy(&value, global, sizeof value);
  return value;
}

inline float exp2_approx(float x) { return std::exp2(x); }

template <int table>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (unsigned i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

}  // namespace kvrt::ptx
