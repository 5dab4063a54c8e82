// The two ends of a transport between two ranks of this host.
//
//   threads     the other's heap is memory of this process
//   processes   it is shared memory, and the other rank a forked process
//   rehearsal   puts are delayed and reordered (platform/rehearsal_network.h), and carried by a thread of their own
//   ucx         what UCX takes between ranks of one host that map nothing of each other, if it is built in
//
// What is measured uses the platform's verbs alone: another transport needs its two ends made in make_ends(), and its
// name in kTransports.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <optional>
#include <string>

#include "platform/rehearsal_network.h"
#include "platform/shared_segment.h"
#include "stretch.h"
#ifdef FLASHMOE_WITH_UCX
#include "platform/ucx_network.h"
#endif

namespace flashmoe::micro {

inline constexpr const char* kTransports[] = {
    "threads", "processes", "rehearsal",
#ifdef FLASHMOE_WITH_UCX
    "ucx",
#endif
};

class Ends {
 public:
  Ends(const std::string& transport, const std::string& ucx_library)
      : forked_(transport == "processes"), source_(kDataBytes), stage_(kDataBytes) {
    bool known = false;
    for (const char* name : kTransports) known = known || transport == name;
    if (!known) throw std::invalid_argument("there is no transport " + transport);
    for (int rank = 0; rank < 2; ++rank) heaps_.push_back(allocate());
    make_ends(transport, ucx_library);
    uint32_t number = 1;
    for (size_t i = 0; i < kDataBytes; i += sizeof number) {
      std::memcpy(&source_[i], &number, sizeof number);
      number *= 2654435761u;
    }
  }

  // Seconds of each of `n` puts of `bytes` from rank 0 to rank 1, the last of which has landed. Cold: from and to
  // memory that was not used for kDataBytes; warm: always the same.
  double put(size_t bytes, bool cold, int n) {
    HostPlatform& mine = *ends_[0];
    const size_t places = places_of(bytes, cold);
    const uint64_t word = ++word_;
    return seconds_each(n, [&](int i) {
      const size_t place = i % places, offset = kData + place * stride(bytes);
      // What is staged lies still until it has landed.
      if (mine.staged() && i && place % std::min<size_t>(places, kUnderWay) == 0) await([&] { return mine.quiet(); });
      std::byte* to = mine.window(1, offset, &stage_[place * stride(bytes)]);
      HostPlatform::copy(Alone{}, to, &source_[place * stride(bytes)], bytes);
      mine.commit(1, offset, to, bytes, kSignals + place % kSignalWords * sizeof word, word, Traffic::kRows);
      if (i == n - 1) await([&] { return mine.quiet(); });
    });
  }
  // What put(bytes, cold, n) put is there, all of it with its signal.
  bool landed(size_t bytes, bool cold, int n) const {
    const size_t places = places_of(bytes, cold);
    for (size_t place = 0; place < std::min<size_t>(places, n); ++place) {
      if (std::memcmp(heaps_[1] + kData + place * stride(bytes), &source_[place * stride(bytes)], bytes)) return false;
      if (ends_[1]->test_signal(kSignals + place % kSignalWords * sizeof word_) != word_) return false;
    }
    return true;
  }

  // Half the time of there and back: a payload of `bytes` with its signal, then one that answers it.
  double ping_pong(size_t bytes, int n) {
    const uint64_t first = word_ + 1;
    word_ += n;
    const auto there_and_back = [&] {
      return seconds_each(n, [&](int i) { send(0, bytes, first + i), receive(0, bytes, first + i); });
    };
    return 0.5 * beside(there_and_back, [&] {
      for (int i = 0; i < n; ++i) receive(1, bytes, first + i), send(1, bytes, first + i);
    });
  }

 private:
  static constexpr size_t kDataBytes = 64 << 20, kSignalWords = 512, kSignals = 0, kData = kSignalWords * 8;
  static constexpr size_t kHeapBytes = kData + kDataBytes;
  static constexpr size_t kUnderWay = 16;  // puts between two waits for what is staged

  static size_t stride(size_t bytes) { return round_up(std::max<size_t>(bytes, 1), 128); }
  static size_t places_of(size_t bytes, bool cold) { return cold ? kDataBytes / stride(bytes) : 1; }

  void make_ends(const std::string& transport, [[maybe_unused]] const std::string& ucx_library) {
    std::shared_ptr<HostNetwork> networks[2];
    std::vector<std::byte*> mapped[2] = {heaps_, heaps_};
    if (transport == "rehearsal")
      for (int rank = 0; rank < 2; ++rank) networks[rank] = std::make_shared<RehearsalNetwork>(7 + rank, heaps_);
#ifdef FLASHMOE_WITH_UCX
    if (transport == "ucx") {
      std::shared_ptr<UcxFabric> fabrics[2];
      for (int rank = 0; rank < 2; ++rank)
        fabrics[rank] = std::make_shared<UcxFabric>(ucx_library, nullptr, heaps_[rank], kHeapBytes, rank, 2);
      together(2, [&](int rank) {
        std::vector<std::optional<UcxFabric::Address>> far(2);
        far[1 - rank] = fabrics[1 - rank]->address();
        if (fabrics[rank]->connect(far, 20)) throw std::runtime_error("the ends do not reach each other by UCX");
        return 0.0;
      });
      for (int rank = 0; rank < 2; ++rank) {
        mapped[rank][1 - rank] = nullptr;
        networks[rank] = std::make_shared<UcxNetwork>(fabrics[rank], std::vector<UcxNetwork::Place>{{0, 0}, {1, 0}});
      }
    }
#endif
    for (int rank = 0; rank < 2; ++rank)
      ends_[rank].emplace(rank, mapped[rank], std::vector<int>{0, 0}, std::move(networks[rank]));
  }

  std::byte* allocate() {
    if (forked_) {
      segments_.push_back(SharedSegment::create(kHeapBytes));
      return segments_.back()->data();
    }
    memory_.push_back(std::make_unique<Line[]>(kHeapBytes / sizeof(Line)));
    return reinterpret_cast<std::byte*>(memory_.back().get());
  }

  // A forked process has none of its parent's shared mappings.
  void map_again() {
    for (int rank = 0; rank < 2; ++rank) {
      segments_[rank] = SharedSegment::attach(segments_[rank]->fd(), segments_[rank]->bytes());
      heaps_[rank] = segments_[rank]->data();
    }
    make_ends("processes", "");
  }

  // The payload ends in its own number, so that one which came after its signal is noticed.
  void send(int rank, size_t bytes, uint64_t word) {
    HostPlatform& mine = *ends_[rank];
    std::byte* stage = &stage_[rank * kDataBytes / 2];
    std::byte* to = mine.window(1 - rank, kData, stage);
    if (bytes) {
      HostPlatform::copy(Alone{}, to, &source_[rank * kDataBytes / 2], bytes - sizeof word);
      HostPlatform::copy(Alone{}, to + bytes - sizeof word, &word, sizeof word);
    }
    mine.commit(1 - rank, kData, to, bytes, kSignals, word, Traffic::kRows);
  }
  void receive(int rank, size_t bytes, uint64_t word) {
    await([&] { return ends_[rank]->test_signal(kSignals) == word; });
    uint64_t number = word;
    if (bytes) std::memcpy(&number, heaps_[rank] + kData + bytes - sizeof number, sizeof number);
    if (number != word) throw std::logic_error("a signal came before its payload");
  }

  template <class Mine, class Theirs>
  double beside(Mine&& mine, Theirs&& theirs) {
    if (!forked_) return together(2, [&](int thread) { return thread == 0 ? mine() : (theirs(), 0.0); });
    const pid_t child = fork();
    if (child == 0) {
      int status = 0;
      try {
        map_again();
        theirs();
      } catch (...) {
        status = 1;
      }
      _exit(status);  // nothing of the parent's is torn down here
    }
    if (child < 0) throw std::runtime_error("no process could be forked");
    const double seconds = mine();
    int status;
    if (waitpid(child, &status, 0) != child || status != 0) throw std::runtime_error("the other rank failed");
    return seconds;
  }

  struct alignas(128) Line {
    std::byte bytes[128];
  };
  bool forked_;
  uint64_t word_ = 0;
  std::vector<std::byte> source_, stage_;
  std::vector<std::shared_ptr<SharedSegment>> segments_;
  std::vector<std::unique_ptr<Line[]>> memory_;
  std::vector<std::byte*> heaps_;
  std::optional<HostPlatform> ends_[2];  // last: what is under way in them reads the rest
};

}  // namespace flashmoe::micro
