// Stacks that one OS thread switches between. AddressSanitizer is told of every switch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host_cuda {

#if defined(__x86_64__)
// What a function must preserve lies on the stack it was called on, so a context is a stack pointer. swapcontext would
// do as well, with a system call per switch.
using Context = void*;

__attribute__((naked, noinline)) inline void switch_context(Context*, const Context*) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov (%rsi), %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

inline void make_context(Context* context, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16);
  top[-1] = 0;  // nowhere to return to
  top[-2] = reinterpret_cast<uintptr_t>(entry);
  *context = top - 8;  // six registers below it, whose values do not matter
}
#else
using Context = ucontext_t;

inline void switch_context(Context* from, const Context* to) { swapcontext(from, to); }

inline void make_context(Context* context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  makecontext(context, entry, 0);
}
#endif

class Fiber {
 public:
  // Makes the next enter() call `body` from its beginning.
  void start(const std::function<void()>& body) {
    body_ = &body;
    ended_ = false;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_.get(), kStackBytes);  // of a body that was left for good
#endif
    make_context(&context_, stack_.get(), kStackBytes, &Fiber::run);
  }

  // Runs the body until it leaves or ends.
  void enter() {
    entered_ = this;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&outside_fake_stack_, stack_.get(), kStackBytes);
#endif
    switch_context(&outside_, &context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(outside_fake_stack_, nullptr, nullptr);
#endif
  }

  // From inside the body: back to who entered it.
  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ended_ ? nullptr : &fake_stack_, outside_stack_, outside_stack_bytes_);
#endif
    switch_context(&context_, &outside_);
    arrived(fake_stack_);
  }

  bool ended() const { return ended_; }

 private:
  static constexpr size_t kStackBytes = 128 * 1024;

  static void run() {
    Fiber& fiber = *entered_;
    arrived(nullptr);
    (*fiber.body_)();
    fiber.ended_ = true;
    fiber.leave();
    std::abort();  // it is never entered again
  }

  static void arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &outside_stack_, &outside_stack_bytes_);
#endif
  }

  std::unique_ptr<char[]> stack_{new char[kStackBytes]};
  Context context_;
  const std::function<void()>* body_ = nullptr;
  bool ended_ = false;
  void* fake_stack_ = nullptr;

  static inline Fiber* entered_ = nullptr;
  static inline Context outside_;
  static inline void* outside_fake_stack_ = nullptr;
  static inline const void* outside_stack_ = nullptr;
  static inline size_t outside_stack_bytes_ = 0;
};

}  // namespace host_cuda
