// A function on a stack of its own, entered and left at will: what a CUDA thread is here.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Two ways to change stacks: a few instructions where we wrote them down, else ucontext, which also enters the kernel
// of the operating system each time.
#if defined(__x86_64__) && !defined(FLASHMOE_FIBER_UCONTEXT)
#define FLASHMOE_FIBER_ASM 1
extern "C" void flashmoe_switch_stack(void** save, void* to);
// Saves what a function must leave as it found it, changes stacks, and takes it up on the other side.
asm(R"(
  .pushsection .text
  .weak flashmoe_switch_stack
  .hidden flashmoe_switch_stack
  .type flashmoe_switch_stack, @function
flashmoe_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size flashmoe_switch_stack, .-flashmoe_switch_stack
  .popsection
)");
#else
#include <ucontext.h>
#endif

namespace flashmoe::gpu::simt {

class Fiber {
 public:
  // `body` must return, and must not throw.
  explicit Fiber(std::function<void()> body) : body_(std::move(body)) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    mapped_bytes_ = kStackBytes + page;
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapped_, page, PROT_NONE);  // an overflow faults instead of reaching a neighbour
    stack_ = static_cast<std::byte*>(mapped_) + page;
#if defined(FLASHMOE_FIBER_ASM)
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 1;  // entry expects 8 more than a multiple of 16
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&Fiber::entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    inside_ = top;
#else
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_;
    inside_.uc_stack.ss_size = kStackBytes;
    inside_.uc_link = nullptr;
    makecontext(&inside_, &Fiber::entry, 0);
#endif
  }
  ~Fiber() {
    forget_frames();
    munmap(mapped_, mapped_bytes_);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  bool done() const { return done_; }

  // From outside: run until the body leaves or is done.
  void enter() {
    entered_ = this;
    begin_switch(&outside_fake_, stack_, kStackBytes);
    change(outside_, inside_);
    end_switch(outside_fake_);
  }

  // From inside: back to whoever entered.
  void leave() {
    begin_switch(done_ ? nullptr : &inside_fake_, outside_bottom_, outside_bytes_);
    change(inside_, outside_);
    end_switch(inside_fake_);
  }

 private:
  static constexpr size_t kStackBytes = 256 << 10;
  static inline Fiber* entered_ = nullptr;

  static void entry() {
    Fiber* self = entered_;
    self->end_switch(nullptr);
    self->body_();
    self->done_ = true;
    self->leave();
  }

#if defined(FLASHMOE_FIBER_ASM)
  using Context = void*;
  static void change(Context& from, Context& to) { flashmoe_switch_stack(&from, to); }
#else
  using Context = ucontext_t;
  static void change(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

#if defined(__SANITIZE_ADDRESS__)
  static void begin_switch(void** fake, const void* bottom, size_t bytes) {
    __sanitizer_start_switch_fiber(fake, bottom, bytes);
  }
  // Entering a fiber also tells where the stack outside lies.
  void end_switch(void* fake) {
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake, &bottom, &bytes);
    if (bottom != stack_) outside_bottom_ = bottom, outside_bytes_ = bytes;
  }
  // The last frames are left and never returned from: the next stack at this address must not inherit their red zones.
  void forget_frames() { __asan_unpoison_memory_region(stack_, kStackBytes); }
#else
  static void begin_switch(void**, const void*, size_t) {}
  void end_switch(void*) {}
  void forget_frames() {}
#endif

  std::function<void()> body_;
  bool done_ = false;
  void* mapped_;
  size_t mapped_bytes_;
  std::byte* stack_;
  Context inside_{}, outside_{};
  void *inside_fake_ = nullptr, *outside_fake_ = nullptr;
  const void* outside_bottom_ = nullptr;
  size_t outside_bytes_ = 0;
};

}  // namespace flashmoe::gpu::simt
