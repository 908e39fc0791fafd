// Threads, blocks and launches as the emulator keeps them, and the block-wide barriers. scheduler.cpp runs them.
#pragma once

#include <cstddef>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

namespace emulator {

constexpr unsigned WARP = 32;

// Where in the CUDA source a thread waits. Taken by default arguments, so it names the caller's line.
struct Place {
  const char* file = "";
  int line = 0;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Place& other) const { return line == other.line && !std::strcmp(file, other.file); }
};

enum class State : unsigned char { ready, at_warp_operation, at_barrier, returned };

// A copy from global to shared memory that was started and not waited for.
struct AsyncCopy {
  unsigned char* shared;
  const unsigned char* global;
  unsigned bytes;
  bool valid;  // else zeros are written
};

// What a warp operation computes, once all of its lanes are there: an operand for each lane, null if it takes no part.
using Operands = void* const (&)[WARP];
using Complete = void (*)(Operands);

struct Thread {
  uint3 index;
  unsigned lane, warp;
  State state;
  void* stack_pointer;
  char* stack;             // its lowest address
  void* sanitizer_frames;  // the address sanitizer's own record of this stack
  // what it waits for
  const char* operation;
  Place place;
  uint32_t mask;
  void* operand;
  Complete complete;
  bool vote;
  unsigned votes, voters;  // the answer at a barrier
  // the last copies are in no group yet; groups[i] is how many copies the i-th open group holds
  std::vector<AsyncCopy> copies;
  std::vector<unsigned> groups;
};

struct Block {
  uint3 index;
  dim3 shape, grid;
  std::vector<Thread> threads;
  unsigned live;
  unsigned char* dynamic_shared;
  std::size_t dynamic_bytes;
  unsigned char poison;  // fills memory that holds nothing yet
  const std::function<void()>* body;
  void* scheduler_stack_pointer;
};

// The only thread-local data of the emulator; scheduler.cpp overwrites all other such data, the blocks' shared memory.
struct Context {
  Block* block;
  Thread* thread;
};
inline thread_local Context context = {nullptr, nullptr};

// Prints what is wrong, and where the block's threads are, and aborts.
[[noreturn]] void stop(const char* format, ...) __attribute__((format(printf, 1, 2)));

void yield_to_scheduler();
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

// Stops unless the bytes lie in the block's shared memory and the address is a multiple of `alignment`.
void check_shared(const void* pointer, std::size_t bytes, std::size_t alignment, const char* operation);

// Asynchronous copies of the current thread. A wait leaves the latest `pending` groups unfinished.
void commit_copies();
void wait_for_copies(std::size_t pending);
void wait_for_all_copies();

inline Thread& current_thread() {
  if (!context.thread) stop("device code was called outside a kernel");
  return *context.thread;
}

inline Block& current_block() {
  if (!context.block) stop("device code was called outside a kernel");
  return *context.block;
}

inline unsigned char* dynamic_shared() { return current_block().dynamic_shared; }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t,
                   Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}

// Waits until all threads that have not returned are at this same barrier.
inline Thread& barrier(const char* name, bool vote, Place place) {
  Thread& thread = current_thread();
  thread.state = State::at_barrier;
  thread.operation = name;
  thread.place = place;
  thread.vote = vote;
  yield_to_scheduler();
  return thread;
}

}  // namespace emulator

// Schedules: 0 runs warps and lanes forward, 1 in reverse, 2 and more in an order drawn from that seed. 0 workers means
// one for each CPU. Both hold for the launches that follow.
extern "C" void emulator_set_schedule(int schedule);
extern "C" void emulator_set_workers(unsigned workers);

inline void __syncthreads(emulator::Place place = emulator::Place::here()) {
  emulator::barrier("__syncthreads", false, place);
}

inline int __syncthreads_count(int predicate, emulator::Place place = emulator::Place::here()) {
  return static_cast<int>(emulator::barrier("__syncthreads_count", predicate, place).votes);
}

inline int __syncthreads_or(int predicate, emulator::Place place = emulator::Place::here()) {
  return emulator::barrier("__syncthreads_or", predicate, place).votes != 0;
}

inline int __syncthreads_and(int predicate, emulator::Place place = emulator::Place::here()) {
  const emulator::Thread& thread = emulator::barrier("__syncthreads_and", predicate, place);
  return thread.votes == thread.voters;
}
