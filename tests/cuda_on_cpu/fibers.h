// A stack for each CUDA thread, and the switch between them. A part of scheduler.cpp.
#pragma once

#include <pthread.h>

#include "emulator.h"

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_SANITIZED 1
#else
#define EMULATOR_SANITIZED 0
#endif

// Pushes what the calling convention has a function keep, swaps stacks, and pops the other side's.
extern "C" void emulator_switch_stack(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
.section .note.GNU-stack, "", @progbits
.text
)");

namespace emulator {
namespace {

constexpr std::size_t STACK = (EMULATOR_SANITIZED ? 512 : 128) * 1024;

// The sanitizer is told of each change of stacks. The scheduler's own stack is the worker's.
struct SchedulerStack {
  const void* bottom;
  std::size_t size;
};

SchedulerStack worker_stack() {
  SchedulerStack stack{nullptr, 0};
  if (!EMULATOR_SANITIZED) return stack;
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes)) return stack;
  void* bottom;
  pthread_attr_getstack(&attributes, &bottom, &stack.size);
  stack.bottom = bottom;
  pthread_attr_destroy(&attributes);
  return stack;
}

struct Range {
  unsigned char* begin = nullptr;
  std::size_t bytes = 0;
  bool holds(const void* pointer, std::size_t count) const {
    const auto at = reinterpret_cast<std::uintptr_t>(pointer), from = reinterpret_cast<std::uintptr_t>(begin);
    return at >= from && at - from <= bytes && count <= bytes - (at - from);
  }
};

struct Worker : Block {  // a block and what the thread that runs it needs
  SchedulerStack stack;
  Range static_shared;
};

void leave_fiber(Thread& thread, bool forever) {
  Worker& worker = static_cast<Worker&>(*context.block);
#if EMULATOR_SANITIZED
  __sanitizer_start_switch_fiber(forever ? nullptr : &thread.sanitizer_frames, worker.stack.bottom, worker.stack.size);
#endif
  emulator_switch_stack(&thread.stack_pointer, worker.scheduler_stack_pointer);
#if EMULATOR_SANITIZED
  __sanitizer_finish_switch_fiber(thread.sanitizer_frames, nullptr, nullptr);
#endif
  (void)forever;
}

void enter_fiber(Block& block, Thread& thread) {
  context.thread = &thread;
#if EMULATOR_SANITIZED
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, thread.stack, STACK);
#endif
  emulator_switch_stack(&block.scheduler_stack_pointer, thread.stack_pointer);
#if EMULATOR_SANITIZED
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
  context.thread = nullptr;
}

void finish_copies(Thread& thread, std::size_t count) {
  for (std::size_t i = 0; i < count; i++) {
    const AsyncCopy& copy = thread.copies[i];
    if (copy.valid) std::memcpy(copy.shared, copy.global, copy.bytes);
    else std::memset(copy.shared, 0, copy.bytes);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(count));
}

void fiber_main() {
#if EMULATOR_SANITIZED
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  (*context.block->body)();
  Thread& thread = *context.thread;
  finish_copies(thread, thread.copies.size());  // nobody may look, but a bad source address is to be found
  thread.groups.clear();
  thread.state = State::returned;
  context.block->live--;
  leave_fiber(thread, true);
  std::abort();  // a returned thread is never entered again
}

void prepare_fiber(Thread& thread) {
  void** top = reinterpret_cast<void**>(thread.stack + STACK);
  *--top = nullptr;  // fiber_main's return address: none, and it keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the saved registers
  *--top = nullptr;
  asm volatile("stmxcsr (%0)\n fnstcw 4(%0)" ::"r"(top) : "memory");
  thread.stack_pointer = top;
}

}  // namespace
}  // namespace emulator
