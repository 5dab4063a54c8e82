// Memory of the host runtime.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <new>
#include <utility>

#include "protocol/config.h"

namespace flashmoe {

// Memory that is written for the first time costs a fault for each of its pages, 4 KiB if nobody asks for more: of large
// gradients that is as much time as the products. Where the system has no large pages nothing happens.
inline void ask_for_large_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLarge = 2 << 20;
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(memory), kLarge);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kLarge * kLarge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Zeroed memory that starts on a page; grows, never shrinks. It is asked of the system itself, which gives a page when
// it is first written. `sparse`: most of it never will be, so it may be more than the machine has, and costs addresses
// alone. Else what the machine does not have is refused, while the call can still be.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& o) noexcept : data_(std::exchange(o.data_, nullptr)), bytes_(std::exchange(o.bytes_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_), std::swap(bytes_, o.bytes_);
    return *this;
  }
  ~Buffer() { release(); }

  std::byte* at_least(size_t bytes, bool sparse = false) {
    if (bytes > bytes_) {
      const size_t larger = round_up(std::max(bytes, bytes_ + bytes_ / 2), 4096);
      release();
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (sparse ? MAP_NORESERVE : 0);
      void* data = mmap(nullptr, larger, PROT_READ | PROT_WRITE, flags, -1, 0);
      if (data == MAP_FAILED) throw std::bad_alloc();
      data_ = static_cast<std::byte*>(data), bytes_ = larger;
      if (!sparse) ask_for_large_pages(data_, bytes_);
    }
    return data_;
  }
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void release() {
    if (data_) munmap(data_, bytes_);
    data_ = nullptr, bytes_ = 0;
  }

  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace flashmoe
