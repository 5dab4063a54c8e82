// A block's shared memory, and who wrote what of it when: enough to say that a read has no barrier before it, or that
// the async proxy reads what was never fenced.
//
// Time is a vector clock per block: one count for each thread and one for the copy engine (TMA). A write remembers its
// writer's count; a reader may see it once its own clock, joined at each barrier, has that count. Only what goes
// through verbs is remembered: cp_async, TMA, store_shared; read by wgmma and ldmatrix.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpu/verbs.h"

namespace flashmoe::gpu::simt {

// What simt throws: a misuse of a verb, or a standstill.
class Misuse : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Clock = std::vector<uint32_t>;

inline void join(Clock& clock, const Clock& other) {
  clock.resize(std::max(clock.size(), other.size()));
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

class SharedMemory {
 public:
  static constexpr size_t kGranule = 16;
  static constexpr uint32_t kUnderWay = ~0u;  // the count of a write that no barrier has published

  explicit SharedMemory(size_t bytes)
      : bytes_(bytes), granules_((bytes + kGranule - 1) / kGranule),
        memory_(static_cast<std::byte*>(::operator new(bytes + kEdge, std::align_val_t{1024}))) {
    std::memset(data(), 0xff, bytes);  // not a number in every float type
    std::memset(data() + bytes, kEdgeByte, kEdge);
  }

  std::byte* data() const { return memory_.get(); }

  // Plain stores beyond the end, which no verb sees.
  void check_edge() const {
    for (size_t i = 0; i < kEdge; ++i)
      if (data()[bytes_ + i] != std::byte{kEdgeByte})
        throw Misuse("shared memory was written " + std::to_string(i) + " bytes beyond its end");
  }

  size_t offset(const void* p, size_t bytes, size_t align, const char* verb) const {
    const std::byte* at = static_cast<const std::byte*>(p);
    if (at < data() || bytes > bytes_ || at > data() + (bytes_ - bytes))
      throw Misuse(std::string(verb) + ": address outside the block's shared memory");
    if (size_t(at - data()) % align)
      throw Misuse(std::string(verb) + ": shared+" + std::to_string(at - data()) + " is not aligned to " +
                   std::to_string(align) + " bytes");
    return size_t(at - data());
  }

  void write(size_t offset, size_t bytes, uint32_t writer, uint32_t count, bool generic) {
    each(offset, bytes, [&](size_t g) {
      granules_[g] = {writer, count, generic};
      if (generic) dirty_.push_back(uint32_t(g));
    });
  }
  // A write that was under way has landed and is the writer's to publish.
  void publish(size_t offset, size_t bytes, uint32_t writer, uint32_t count) {
    each(offset, bytes, [&](size_t g) {
      if (granules_[g].writer == writer && granules_[g].count == kUnderWay) granules_[g].count = count;
    });
  }

  // All that `clock` knows of becomes visible to the async proxy.
  void fence(const Clock& clock) {
    std::erase_if(dirty_, [&](uint32_t g) {
      Granule& granule = granules_[g];
      if (granule.dirty && granule.count > clock[granule.writer]) return false;
      granule.dirty = false;
      return true;
    });
  }

  void check_read(size_t offset, size_t bytes, const Clock& clock, bool async, const char* verb) const {
    each(offset, bytes, [&](size_t g) {
      const Granule& granule = granules_[g];
      if (granule.count > clock[granule.writer])
        throw Misuse(std::string(verb) + ": reads " + place(g) + "; no wait or barrier between");
      if (async && granule.dirty)
        throw Misuse(std::string(verb) + ": reads " + place(g) +
                     " in the generic proxy; no fence_async_shared between");
    });
  }
  void check_async_write(size_t offset, size_t bytes, const char* verb) const {
    each(offset, bytes, [&](size_t g) {
      if (granules_[g].dirty)
        throw Misuse(std::string(verb) + ": overwrites " + place(g) +
                     " in the generic proxy; no fence_async_shared between");
    });
  }

 private:
  struct Granule {
    uint32_t writer = 0, count = 0;
    bool dirty = false;  // written in the generic proxy and not fenced
  };
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{1024}); }
  };
  static constexpr size_t kEdge = 1024;
  static constexpr unsigned char kEdgeByte = 0xa5;

  template <class Visit>
  static void each(size_t offset, size_t bytes, Visit visit) {
    for (size_t g = offset / kGranule; g * kGranule < offset + bytes; ++g) visit(g);
  }
  std::string place(size_t g) const {
    return "shared+" + std::to_string(g * kGranule) + ", written by thread " + std::to_string(granules_[g].writer) +
           " (or TMA, if there is none of that number)";
  }

  size_t bytes_;
  std::vector<Granule> granules_;
  std::vector<uint32_t> dirty_;
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace flashmoe::gpu::simt
