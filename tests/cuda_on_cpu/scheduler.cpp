// Runs grids: worker threads, the order of warps and lanes, and the checks at barriers and warp operations.
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <random>
#include <thread>

#include "emulator.h"
#include "fibers.h"
#include "shared_memory.h"

namespace emulator {
namespace {

constexpr unsigned MAX_THREADS = 1024;
constexpr std::size_t MAX_DYNAMIC_SHARED = 227 * 1024;

std::atomic<int> chosen_schedule{0};
std::atomic<unsigned> chosen_workers{1};

class Scheduler {
 public:
  Scheduler(Block& block, int schedule, std::uint64_t number)
      : block_(block), schedule_(schedule), random_(static_cast<unsigned>(schedule) * 1000003u + number) {
    for (unsigned i = 0; i < WARP; i++) lanes_[i] = i;
    priority_.resize((block.threads.size() + WARP - 1) / WARP);
    for (unsigned i = 0; i < priority_.size(); i++) priority_[i] = i;
    if (schedule == 1) {
      std::reverse(lanes_, lanes_ + WARP);
      std::reverse(priority_.begin(), priority_.end());
    } else if (schedule >= 2) {
      std::shuffle(priority_.begin(), priority_.end(), random_);
    }
  }

  void run() {
    while (block_.live) {
      const int warp = next_warp();
      if (warp >= 0) run_warp(static_cast<unsigned>(warp));
      else release_barrier();
    }
  }

 private:
  Block& block_;
  const int schedule_;
  std::minstd_rand random_;
  unsigned lanes_[WARP];
  std::vector<unsigned> priority_;

  Thread* lane(unsigned warp, unsigned lane) {
    const std::size_t i = warp * WARP + lane;
    return i < block_.threads.size() ? &block_.threads[i] : nullptr;
  }

  bool can_run(unsigned warp) {
    for (unsigned i = 0; i < WARP; i++) {
      const Thread* thread = lane(warp, i);
      if (thread && thread->state == State::ready) return true;
    }
    return false;
  }

  // One warp runs as far ahead of the others as it can, which shows missing barriers best. Seeded schedules let another
  // one step in now and then.
  int next_warp() {
    if (schedule_ >= 2 && random_() % 4 == 0) {
      const unsigned warp = random_() % priority_.size();
      if (can_run(warp)) return static_cast<int>(warp);
    }
    for (unsigned warp : priority_)
      if (can_run(warp)) return static_cast<int>(warp);
    return -1;
  }

  void run_warp(unsigned warp) {
    if (schedule_ >= 2) std::shuffle(lanes_, lanes_ + WARP, random_);
    for (unsigned i : lanes_) {
      Thread* thread = lane(warp, i);
      if (thread && thread->state == State::ready) enter_fiber(block_, *thread);
    }
    for (unsigned i = 0; i < WARP; i++) {
      Thread* thread = lane(warp, i);
      if (thread && thread->state == State::at_warp_operation) try_release(*thread);
    }
  }

  // Ends the warp operation at which `first` waits if every lane it names is there or has returned.
  void try_release(const Thread& first) {
    void* operands[WARP] = {};
    for (unsigned i = 0; i < WARP; i++) {
      if (!(first.mask >> i & 1)) continue;
      const Thread* other = lane(first.warp, i);
      if (!other || other->state == State::returned) continue;
      if (other->state != State::at_warp_operation) return;
      if (other->mask != first.mask) return;  // it may end that operation and then come
      check_same(first, *other);
      operands[i] = other->operand;
    }
    const Complete complete = first.complete;
    const uint32_t mask = first.mask;
    const unsigned warp = first.warp;
    complete(operands);
    for (unsigned i = 0; i < WARP; i++)
      if (mask >> i & 1)
        if (Thread* thread = lane(warp, i); thread && thread->state == State::at_warp_operation)
          thread->state = State::ready;
  }

  // Lanes may meet at two __syncwarp of the source; at any other operation they must be at the same one.
  void check_same(const Thread& a, const Thread& b) {
    const bool same = !std::strcmp(a.operation, b.operation);
    if (!same || (std::strcmp(a.operation, "__syncwarp") && !(a.place == b.place)))
      stop("lanes of warp %u meet at different warp operations: lane %u at %s (%s:%d), lane %u at %s (%s:%d)", a.warp,
           a.lane, a.operation, a.place.file, a.place.line, b.lane, b.operation, b.place.file, b.place.line);
  }

  void release_barrier() {
    const Thread* first = nullptr;
    unsigned votes = 0, voters = 0;
    for (const Thread& thread : block_.threads) {
      if (thread.state == State::returned) continue;
      if (thread.state != State::at_barrier)
        stop("deadlock: a barrier or warp operation is not reached by every thread it names");
      if (!first) first = &thread;
      if (std::strcmp(first->operation, thread.operation) || !(first->place == thread.place))
        stop("divergent barrier: threads of one block wait at different barriers, %s (%s:%d) and %s (%s:%d)",
             first->operation, first->place.file, first->place.line, thread.operation, thread.place.file,
             thread.place.line);
      votes += thread.vote;
      voters++;
    }
    for (Thread& thread : block_.threads) {
      if (thread.state != State::at_barrier) continue;
      thread.votes = votes;
      thread.voters = voters;
      thread.state = State::ready;
    }
  }
};

void run_block(Worker& block, const Memory& memory, int schedule, std::uint64_t number) {
  const dim3 grid = block.grid, shape = block.shape;
  block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
  block.live = static_cast<unsigned>(block.threads.size());
  for (unsigned i = 0; i < block.live; i++) {
    Thread& thread = block.threads[i];
    thread.index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    thread.lane = i % WARP;
    thread.warp = i / WARP;
    thread.state = State::ready;
    thread.operation = "";
    thread.mask = 0;
    thread.stack = memory.stacks + i * (STACK + PAGE) + PAGE;
    thread.sanitizer_frames = nullptr;
    prepare_fiber(thread);
  }
  poison_shared(block);
  Scheduler(block, schedule, number).run();
  check_guards(block);
}

}  // namespace

void commit_copies() {
  Thread& thread = current_thread();
  std::size_t in_groups = 0;
  for (unsigned group : thread.groups) in_groups += group;
  thread.groups.push_back(static_cast<unsigned>(thread.copies.size() - in_groups));
}

void wait_for_copies(std::size_t pending) {
  Thread& thread = current_thread();
  std::size_t ended = 0;
  while (thread.groups.size() > pending) {
    ended += thread.groups.front();
    thread.groups.erase(thread.groups.begin());
  }
  finish_copies(thread, ended);
}

void wait_for_all_copies() {
  Thread& thread = current_thread();
  finish_copies(thread, thread.copies.size());
  thread.groups.clear();
}

void yield_to_scheduler() { leave_fiber(*context.thread, false); }

void stop(const char* format, ...) {
  std::fflush(stdout);
  std::fputs("emulator: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  if (const Block* block = context.block) {
    std::fprintf(stderr, "  block (%u, %u, %u)", block->index.x, block->index.y, block->index.z);
    if (const Thread* thread = context.thread)
      std::fprintf(stderr, ", thread (%u, %u, %u)", thread->index.x, thread->index.y, thread->index.z);
    std::fputc('\n', stderr);
    // runs of threads that do the same, at most 16
    const auto waits = [](const Thread& thread) {
      return thread.state == State::at_warp_operation || thread.state == State::at_barrier;
    };
    std::size_t begin = 0;
    for (int lines = 0; begin < block->threads.size() && lines < 16; lines++) {
      const Thread& first = block->threads[begin];
      std::size_t end = begin + 1;
      for (; end < block->threads.size(); end++) {
        const Thread& next = block->threads[end];
        if (next.state != first.state || next.mask != first.mask) break;
        if (waits(first) && (std::strcmp(next.operation, first.operation) || !(next.place == first.place))) break;
      }
      std::fprintf(stderr, "  threads %zu to %zu: ", begin, end - 1);
      if (waits(first))
        std::fprintf(stderr, "wait at %s (%s:%d)", first.operation, first.place.file, first.place.line);
      else
        std::fputs(first.state == State::returned ? "have returned" : "can run", stderr);
      if (first.state == State::at_warp_operation) std::fprintf(stderr, ", mask 0x%08x", first.mask);
      std::fputc('\n', stderr);
      begin = end;
    }
  }
  std::abort();
}

void check_shared(const void* pointer, std::size_t bytes, std::size_t alignment, const char* operation) {
  const Worker& block = static_cast<Worker&>(current_block());
  const Thread& thread = current_thread();
  if (reinterpret_cast<std::uintptr_t>(pointer) % alignment)
    stop("%s (%s:%d): the shared address %p is not a multiple of %zu", operation, thread.place.file, thread.place.line,
         pointer, alignment);
  if (Range{block.dynamic_shared, block.dynamic_bytes}.holds(pointer, bytes)) return;
  if (!block.static_shared.holds(pointer, bytes))
    stop("%s (%s:%d): %zu bytes at %p are not all in shared memory", operation, thread.place.file, thread.place.line,
         bytes, pointer);
}

void run_grid(dim3 grid, dim3 shape, std::size_t shared_bytes, const std::function<void()>& body) {
  if (context.block) stop("a kernel launches a kernel");
  const std::uint64_t threads = static_cast<std::uint64_t>(shape.x) * shape.y * shape.z;
  const std::uint64_t blocks = static_cast<std::uint64_t>(grid.x) * grid.y * grid.z;
  if (!threads || threads > MAX_THREADS || shape.z > 64)
    stop("a block of %u x %u x %u threads: a GPU takes 1 to %u, at most 64 of them in z", shape.x, shape.y, shape.z,
         MAX_THREADS);
  if (!blocks || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    stop("a grid of %u x %u x %u blocks: a GPU takes 1 to 2^31-1, 65535 and 65535", grid.x, grid.y, grid.z);
  if (shared_bytes > MAX_DYNAMIC_SHARED)
    stop("%zu bytes of dynamic shared memory: a GPU has at most %zu", shared_bytes, MAX_DYNAMIC_SHARED);

  const int schedule = chosen_schedule;
  std::vector<std::uint32_t> order(blocks);
  for (std::size_t i = 0; i < blocks; i++) order[i] = static_cast<std::uint32_t>(i);
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule >= 2) std::shuffle(order.begin(), order.end(), std::minstd_rand(static_cast<unsigned>(schedule)));

  std::atomic<std::uint64_t> next{0};
  const auto work = [&] {
    const Memory memory(threads, shared_bytes);
    Worker block{};
    block.shape = shape;
    block.grid = grid;
    block.threads.resize(threads);
    block.dynamic_shared = memory.shared;
    block.dynamic_bytes = shared_bytes;
    block.poison = schedule % 2 ? 0x7B : 0xFF;  // large finite halves and floats, or NaN
    block.body = &body;
    block.stack = worker_stack();
    context = {&block, nullptr};
    block.static_shared = find_static_shared();
    for (std::uint64_t i; (i = next++) < blocks;) run_block(block, memory, schedule, order[i]);
    context = {nullptr, nullptr};
  };
  const unsigned wanted = chosen_workers ? chosen_workers.load() : std::max(1u, std::thread::hardware_concurrency());
  const std::uint64_t workers = std::min<std::uint64_t>(wanted, blocks);
  if (workers == 1) return work();
  std::vector<std::thread> running;
  for (std::uint64_t i = 0; i < workers; i++) running.emplace_back(work);
  for (std::thread& thread : running) thread.join();
}

}  // namespace emulator

extern "C" void emulator_set_schedule(int schedule) { emulator::chosen_schedule = schedule; }
extern "C" void emulator_set_workers(unsigned workers) { emulator::chosen_workers = workers; }
