// Static and dynamic shared memory, and the mapping that holds the fibers' stacks. A part of scheduler.cpp.
#pragma once

#include <link.h>
#include <sys/mman.h>

#include "fibers.h"

namespace emulator {
namespace {

constexpr std::size_t PAGE = 4096;
constexpr std::size_t GUARD = 1024;  // bytes before and after dynamic shared memory
constexpr unsigned char GUARD_BYTE = 0xA5;

// All thread-local data of the library that holds the kernels, for this worker: the static shared memory of them all.
// The context is among it and was written before; else this thread's copy might not exist yet.
Range find_static_shared() {
  Range found;
  dl_iterate_phdr(
      [](dl_phdr_info* module, std::size_t, void* result) {
        for (int i = 0; i < module->dlpi_phnum; i++) {
          const auto& header = module->dlpi_phdr[i];
          if (header.p_type != PT_TLS || !module->dlpi_tls_data) continue;
          const Range range{static_cast<unsigned char*>(module->dlpi_tls_data), header.p_memsz};
          if (range.holds(&context, sizeof context)) *static_cast<Range*>(result) = range;
        }
        return 0;
      },
      &found);
  if (!found.begin) stop("the static shared memory of the kernels' library is not found");
  return found;
}

// Shared memory starts with whatever was there.
void poison_shared(Worker& block) {
  const Context kept = context;
  std::memset(block.static_shared.begin, block.poison, block.static_shared.bytes);
  context = kept;
  if (block.dynamic_bytes) std::memset(block.dynamic_shared, block.poison, block.dynamic_bytes);
}

void check_guards(const Block& block) {
#if !EMULATOR_SANITIZED
  const unsigned char *before = block.dynamic_shared - GUARD, *after = block.dynamic_shared + block.dynamic_bytes;
  for (std::size_t i = 0; i < GUARD; i++) {
    if (after[i] != GUARD_BYTE)
      stop("a thread wrote %zu bytes past the end of the %zu bytes of dynamic shared memory", i, block.dynamic_bytes);
    if (before[i] != GUARD_BYTE)
      stop("a thread wrote %zu bytes before the start of dynamic shared memory", GUARD - i);
  }
#else
  (void)block;
#endif
}

// Stacks with a page of no access below each, and dynamic shared memory between guards.
struct Memory {
  char* stacks;
  std::size_t stack_bytes;
  unsigned char* shared;

  Memory(std::size_t threads, std::size_t shared_bytes) : stack_bytes(threads * (STACK + PAGE)) {
    stacks = static_cast<char*>(
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) stop("no memory for the stacks of %zu threads", threads);
    for (std::size_t i = 0; i < threads; i++) mprotect(stacks + i * (STACK + PAGE), PAGE, PROT_NONE);
    void* allocated;
    if (posix_memalign(&allocated, 128, shared_bytes + 2 * GUARD)) stop("no memory for %zu shared bytes", shared_bytes);
    std::memset(allocated, GUARD_BYTE, shared_bytes + 2 * GUARD);
    shared = static_cast<unsigned char*>(allocated) + GUARD;
#if EMULATOR_SANITIZED
    __asan_poison_memory_region(shared - GUARD, GUARD);
    __asan_poison_memory_region(shared + shared_bytes, GUARD);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    munmap(stacks, stack_bytes);
    std::free(shared - GUARD);
  }
};

}  // namespace
}  // namespace emulator
