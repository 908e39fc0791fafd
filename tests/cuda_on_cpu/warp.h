// Warp operations: shuffles, votes, matches and reductions.
//
// Each lane hands in an operand and waits. When every lane that the mask names, and that has not returned, waits at the
// same operation, the scheduler calls `complete` on all operands at once and lets the lanes go on.
#pragma once

namespace emulator {

constexpr uint32_t ALL_LANES = 0xFFFFFFFF;

template <class Operand>
void warp_operation(const char* name, uint32_t mask, Operand& operand, Complete complete, Place place) {
  Thread& thread = current_thread();
  thread.operation = name;
  thread.place = place;
  thread.mask = mask;
  if (!(mask >> thread.lane & 1))
    stop("%s at %s:%d: lane %u is not in its own mask 0x%08x", name, place.file, place.line, thread.lane, mask);
  thread.state = State::at_warp_operation;
  thread.operand = &operand;
  thread.complete = complete;
  yield_to_scheduler();
}

template <class Operand>
Operand& as(void* operand) {
  return *static_cast<Operand*>(operand);
}

template <class T>
struct Shuffle {
  T value, result;
  int source;  // a lane
};

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source, Place place) {
  static_assert(sizeof(T) <= 8, "a GPU shuffles at most 8 bytes");
  Shuffle<T> operand{value, value, source};
  warp_operation(
      name, mask, operand,
      [](Operands operands) {
        for (void* lane : operands) {
          if (!lane) continue;
          Shuffle<T>& to = as<Shuffle<T>>(lane);
          void* from = operands[to.source];
          // what a lane outside the mask holds is undefined
          if (from) to.result = as<Shuffle<T>>(from).value;
          else std::memset(static_cast<void*>(&to.result), 0xFF, sizeof(T));
        }
      },
      place);
  return operand.result;
}

// The first lane of this lane's segment of `width` lanes.
inline int segment_start(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    stop("a shuffle's width is %d, not a power of two up to 32", width);
  return static_cast<int>(current_thread().lane) & ~(width - 1);
}

struct Vote {
  uint32_t value, result;
};

// result = fold(all values) for each lane.
template <class Fold>
uint32_t vote(const char* name, uint32_t mask, uint32_t value, Fold, Place place) {
  Vote operand{value, 0};
  warp_operation(
      name, mask, operand,
      [](Operands operands) {
        for (void* lane : operands)
          if (lane) as<Vote>(lane).result = Fold::of(operands, as<Vote>(lane).value);
      },
      place);
  return operand.result;
}

struct Ballot {
  static uint32_t of(Operands operands, uint32_t) {
    uint32_t result = 0;
    for (unsigned i = 0; i < WARP; i++)
      if (operands[i] && as<Vote>(operands[i]).value) result |= 1u << i;
    return result;
  }
};

struct Match {
  static uint32_t of(Operands operands, uint32_t mine) {
    uint32_t result = 0;
    for (unsigned i = 0; i < WARP; i++)
      if (operands[i] && as<Vote>(operands[i]).value == mine) result |= 1u << i;
    return result;
  }
};

template <class Combine>
struct Reduce {
  static uint32_t of(Operands operands, uint32_t) {
    bool first = true;
    uint32_t result = 0;
    for (void* lane : operands) {
      if (!lane) continue;
      const uint32_t value = as<Vote>(lane).value;
      result = first ? value : Combine::of(result, value);
      first = false;
    }
    return result;
  }
};

struct Nothing {};

}  // namespace emulator

inline void __syncwarp(uint32_t mask = emulator::ALL_LANES, emulator::Place place = emulator::Place::here()) {
  emulator::Nothing nothing;
  emulator::warp_operation("__syncwarp", mask, nothing, [](emulator::Operands) {}, place);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, emulator::Place place = emulator::Place::here()) {
  const int lane = emulator::segment_start(width) + (source & (width - 1));
  return emulator::shuffle("__shfl_sync", mask, value, lane, place);
}

// The next three give a lane its own value where the source would lie outside its segment.
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, emulator::Place place = emulator::Place::here()) {
  const int lane = static_cast<int>(emulator::current_thread().lane), source = lane ^ bits;
  const bool inside = source < emulator::segment_start(width) + width;  // an earlier segment may be read
  return emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source & 31 : lane, place);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32,
                   emulator::Place place = emulator::Place::here()) {
  const int lane = static_cast<int>(emulator::current_thread().lane), source = lane + static_cast<int>(by);
  const bool inside = source < emulator::segment_start(width) + width;
  return emulator::shuffle("__shfl_down_sync", mask, value, inside ? source : lane, place);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, emulator::Place place = emulator::Place::here()) {
  const int lane = static_cast<int>(emulator::current_thread().lane), source = lane - static_cast<int>(by);
  const bool inside = source >= emulator::segment_start(width);
  return emulator::shuffle("__shfl_up_sync", mask, value, inside ? source : lane, place);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, emulator::Place place = emulator::Place::here()) {
  return emulator::vote("__ballot_sync", mask, predicate != 0, emulator::Ballot(), place);
}

inline int __any_sync(uint32_t mask, int predicate, emulator::Place place = emulator::Place::here()) {
  return emulator::vote("__any_sync", mask, predicate != 0, emulator::Ballot(), place) != 0;
}

inline int __all_sync(uint32_t mask, int predicate, emulator::Place place = emulator::Place::here()) {
  return emulator::vote("__all_sync", mask, predicate == 0, emulator::Ballot(), place) == 0;
}

template <class T>
uint32_t __match_any_sync(uint32_t mask, T value, emulator::Place place = emulator::Place::here()) {
  static_assert(sizeof(T) == 4, "the emulator matches 4-byte values only");
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return emulator::vote("__match_any_sync", mask, bits, emulator::Match(), place);
}

#define EMULATOR_REDUCE(name, type, expression)                                                                     \
  struct emulator_##name##_##type {                                                                                 \
    static uint32_t of(uint32_t left, uint32_t right) {                                                             \
      const type a = static_cast<type>(left), b = static_cast<type>(right);                                         \
      return static_cast<uint32_t>(expression);                                                                     \
    }                                                                                                               \
  };                                                                                                                \
  inline type __reduce_##name##_sync(uint32_t mask, type value, emulator::Place place = emulator::Place::here()) {  \
    return static_cast<type>(emulator::vote("__reduce_" #name "_sync", mask, static_cast<uint32_t>(value),          \
                                            emulator::Reduce<emulator_##name##_##type>(), place));                  \
  }
EMULATOR_REDUCE(add, unsigned, a + b)
EMULATOR_REDUCE(min, unsigned, a < b ? a : b)
EMULATOR_REDUCE(max, unsigned, a > b ? a : b)
EMULATOR_REDUCE(and, unsigned, a & b)
EMULATOR_REDUCE(or, unsigned, a | b)
EMULATOR_REDUCE(xor, unsigned, a ^ b)
EMULATOR_REDUCE(add, int, static_cast<unsigned>(a) + static_cast<unsigned>(b))
EMULATOR_REDUCE(min, int, a < b ? a : b)
EMULATOR_REDUCE(max, int, a > b ? a : b)
#undef EMULATOR_REDUCE
