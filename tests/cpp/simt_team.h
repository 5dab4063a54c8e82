// The GPU's kernel on fibers: W virtual ranks as one grid, call after call, in the order of a seed.
#pragma once

#include "engine/exact.h"
#include "expected_bytes.h"
#include "gpu/simt.h"
#include "kernel/begin_call.h"
#include "kernel/worker.h"
#include "platform/cuda.h"
#include "platform/nvshmem.h"
#include "rank_call.h"

namespace flashmoe::test {

struct SimtOptions {
  int ep_size = 2, blocks_per_rank = 1;
  uint32_t ring_blocks = 4;
  uint32_t backward_blocks = Machine{}.max_backward_blocks;
  Deadlines deadlines{300'000'000, 600'000'000};
  uint64_t last_epoch = 0;
  int mapped_together = 0;  // so many ranks at a time have each other's memory mapped; 0: all have
  uint32_t max_events = 0;  // of each list of the last call's trace
};

// A rank's lists, as gpu::TraceLists orders them.
struct SimtTrace {
  std::vector<std::vector<TraceEvent>> lists;  // what was kept
  std::vector<gpu::TraceEnd> ends;
};

struct SimtOutcome {
  std::string misuse;                                // what the machine threw, if it did
  std::vector<std::vector<std::vector<float>>> y;    // [call][rank]
  std::vector<Status> status;                        // by rank, of the call that failed
  std::vector<SimtTrace> traces;                     // by rank, of the last call, if asked for
  std::vector<std::vector<uint64_t>> sent;           // by rank, of the last call: the workspace's
  bool ok() const {
    for (const Status& s : status)
      if (s.failure) return false;
    return misuse.empty();
  }
};

// C: a rank's call, of whose kind all are.
template <class P, class E, class Group, class C = RankCall>
class SimtTeam {
 public:
  using Kernel = gpu::Worker<P, E, Group>;

  SimtTeam(const std::vector<typename C::OfAll>& program, const SimtOptions& options)
      : options_(options), layout_(limits_of_all(program, options.ep_size)) {
    for (int r = 0; r < options.ep_size; ++r)
      arenas_.emplace_back(heap_at(options.ep_size) + layout_.bytes + stage_bytes(layout_, options.ring_blocks));
    std::vector<gpu::simt::Arena> by_pe;
    for (int r = 0; r < options.ep_size; ++r) {
      by_pe.push_back(arenas_[pe_of(r)].memory());
      places_.push_back(places_of(r));
    }
    network_.emplace(by_pe);
    for (const auto& call : program) {
      calls_.emplace_back();
      for (int r = 0; r < options.ep_size; ++r)
        calls_.back().push_back(std::make_unique<C>(call, r, options.ep_size, 0, layout_, machine_of(r)));
      operands_.emplace_back(options.ep_size);
      for (int r = 0; r < options.ep_size; ++r) {
        const std::string error = E::make_operands(&operands_.back()[r], calls_.back()[r]->call);
        if (!error.empty()) throw std::runtime_error(error);
      }
    }
    events_.resize(options.ep_size), ends_.resize(options.ep_size);
    for (int r = 0; r < options.ep_size; ++r)
      ranks_.push_back({{}, layout_, *calls_[0][r]->workspace, places_[r].peers(), options.deadlines, options.last_epoch, {}, nullptr, lists_of(r)});
  }

  // As the product does it: a grid for each call.
  SimtOutcome run(uint64_t seed) {
    return outcome([&] {
      for (size_t c = 0; c < calls_.size(); ++c) {
        gpu::simt::launch(options_.ep_size, 64, 0, seed + c, [&] { begin(gpu::block(), c); });
        gpu::simt::launch(grid(), Kernel::kThreads, sizeof(typename Kernel::Shared), seed + c,
                          [&] { Kernel::run(ranks_.data(), options_.ep_size, gpu::shared_memory(), operands_[c].data()); });
      }
    });
  }

  // All calls in one grid, so that a rank goes on to its next call while others are still in theirs.
  SimtOutcome run_back_to_back(uint64_t seed) {
    arrived_.assign(options_.ep_size, 0);
    return outcome([&] {
      gpu::simt::launch(grid(), Kernel::kThreads, calls_.size() * shared_stride(), seed, [&] {
        const int rank = gpu::block() / options_.blocks_per_rank;
        for (size_t c = 0; c < calls_.size(); ++c) {
          if (gpu::block() % options_.blocks_per_rank == 0) begin(rank, c);
          meet_own_rank(rank, uint32_t(2 * c + 1));
          Kernel::run(ranks_.data(), options_.ep_size, gpu::shared_memory() + c * shared_stride(), operands_[c].data());
          meet_own_rank(rank, uint32_t(2 * c + 2));
        }
      });
    });
  }

  const C& call(size_t call, int rank) const { return *calls_[call][rank]; }

 private:
  static Limits limits_of_all(const std::vector<typename C::OfAll>& program, int ep_size) {
    Limits limits = limits_of(Program(program.begin(), program.end()), ep_size);
    limits.backward = C::kBackward;
    return limits;
  }

  // A rank's part of the transport's memory: its heap, each rank's at another place, and its stage.
  class RankArena {
   public:
    explicit RankArena(size_t bytes) : words_(bytes / 8 + 1) {}
    gpu::simt::Arena memory() { return {reinterpret_cast<std::byte*>(words_.data()), words_.size() * 8}; }

   private:
    std::vector<uint64_t> words_;
  };
  static size_t heap_at(int rank) { return 256 * size_t(rank); }
  std::byte* heap_of(int rank) { return arenas_[rank].memory().base + heap_at(rank); }

  int pe_of(int rank) const { return options_.ep_size - 1 - rank; }  // and back

  // Where one rank finds the others.
  struct Places {
    std::vector<std::byte*> heaps, symmetric;
    std::vector<int> pes;
    Peers peers() const { return {heaps.data(), symmetric.data(), pes.data()}; }
  };
  bool is_mapped(int a, int b) const {
    return options_.mapped_together == 0 || a / options_.mapped_together == b / options_.mapped_together;
  }
  Places places_of(int rank) {
    Places p;
    for (int r = 0; r < options_.ep_size; ++r) {
      p.pes.push_back(pe_of(r));
      p.symmetric.push_back(arenas_[rank].memory().base + heap_at(r));
      p.heaps.push_back(is_mapped(rank, r) ? heap_of(r) : nullptr);
    }
    return p;
  }
  Machine machine_of(int rank) {
    Machine m{.max_ring_blocks = options_.ring_blocks, .max_backward_blocks = options_.backward_blocks, .num_workers = uint32_t(options_.blocks_per_rank), .plan_warps = E::kCrewWarps, .hidden_bytes = E::kHiddenBytes};
    m.staged = options_.mapped_together != 0;
    if (m.staged) m.stage = heap_of(rank) + layout_.bytes;
    return m;
  }

  gpu::TraceLists lists_of(int rank) {
    if (!options_.max_events) return {};
    const int lists = gpu::TraceLists::num_lists(options_.blocks_per_rank);
    events_[rank].resize(size_t(lists) * options_.max_events), ends_[rank].resize(lists);
    return {events_[rank].data(), ends_[rank].data(), options_.max_events};
  }
  SimtTrace trace_of(int rank) const {
    SimtTrace trace{{}, ends_[rank]};
    for (size_t list = 0; list < ends_[rank].size(); ++list) {
      const TraceEvent* events = events_[rank].data() + list * options_.max_events;
      trace.lists.emplace_back(events, events + std::min(ends_[rank][list].count, options_.max_events));
    }
    return trace;
  }

  static size_t shared_stride() { return round_up(sizeof(typename Kernel::Shared), 1024); }
  int grid() const { return options_.ep_size * options_.blocks_per_rank; }

  void begin(int rank, size_t call) {
    const C& c = *calls_[call][rank];
    gpu::begin_call(gpu::WholeBlock{}, ranks_[rank], c.call, *c.workspace,
                    {c.tokens().ids.data(), 8, const_cast<int32_t*>(c.call.topk_ids)});
  }
  // The n-th meeting of a rank's blocks.
  void meet_own_rank(int rank, uint32_t n) {
    gpu::sync_block();
    if (gpu::thread_in_block() == 0) {
      gpu::fetch_add(&arrived_[rank], 1u);
      while (gpu::load_acquire(&arrived_[rank]) < n * options_.blocks_per_rank) gpu::sleep_ns(20);
    }
    gpu::sync_block();
  }

  SimtOutcome outcome(const std::function<void()>& run) {
    SimtOutcome o;
    gpu::simt::network = &*network_;
    try {
      run();
    } catch (const gpu::simt::Misuse& misuse) {
      o.misuse = misuse.what();
    }
    for (auto& call : calls_) {
      o.y.emplace_back();
      for (auto& rank : call) o.y.back().push_back(rank->y());
    }
    for (const gpu::RankState& rank : ranks_) o.status.push_back(rank.failure);
    for (int r = 0; r < options_.ep_size; ++r) o.traces.push_back(trace_of(r));
    for (const auto& rank : calls_.back())
      o.sent.emplace_back(rank->workspace->sent, rank->workspace->sent + options_.ep_size * kTrafficKinds);
    return o;
  }

  const SimtOptions options_;
  HeapLayout layout_;
  std::vector<RankArena> arenas_;
  std::vector<Places> places_;
  std::optional<gpu::simt::RemoteNetwork> network_;
  std::vector<std::vector<std::unique_ptr<C>>> calls_;  // [call][rank]
  std::vector<std::vector<typename E::Operands>> operands_;         // [call][rank]
  std::vector<std::vector<TraceEvent>> events_;  // by rank
  std::vector<std::vector<gpu::TraceEnd>> ends_;
  std::vector<gpu::RankState> ranks_;
  std::vector<uint32_t> arrived_;
};

inline constexpr int kSimtWarps = 2;  // of a crew here: few, since every one of their threads is a fiber

template <class P = CudaPlatform, class Group = gpu::Crew<kSimtWarps>>
SimtOutcome run_simt(const Program& program, const SimtOptions& options, uint64_t seed, bool back_to_back = false) {
  SimtTeam<P, ExactEngine<kSimtWarps>, Group> team(program, options);
  return back_to_back ? team.run_back_to_back(seed) : team.run(seed);
}

// Which rank failed, or what the machine threw, or nothing.
inline std::string failure_of(const SimtOutcome& o) {
  if (!o.misuse.empty()) return o.misuse;
  for (size_t r = 0; r < o.status.size(); ++r)
    if (o.status[r].failure)
      return "rank " + std::to_string(r) + " failed: failure " + std::to_string(o.status[r].failure) + ", phase " +
             std::to_string(o.status[r].phase) + ", peer " + std::to_string(o.status[r].peer);
  return {};
}

// Of the last call: what it should have sent.
inline std::string miscount_of(const SimtOutcome& o, const CallOfAll& call, bool backward) {
  for (size_t r = 0; r < o.sent.size(); ++r) {
    Bytes got, want = expected(call, int(r), true, backward);
    std::vector<uint64_t>* kinds[kTrafficKinds] = {&got.header, &got.rows, &got.results, &got.signals};
    for (size_t i = 0; i < o.sent[r].size(); ++i) kinds[i % kTrafficKinds]->push_back(o.sent[r][i]);
    want.tokens_per_expert.clear();
    if (!(got == want)) return "rank " + std::to_string(r) + " counted " + text(got) + "and should have sent " + text(want);
  }
  return {};
}

// What is wrong with an outcome, or nothing. `allowed`: of error, in place of the dtype's tolerance.
inline std::string trouble_of(const SimtOutcome& o, const Program& program, std::optional<double> allowed = {}) {
  if (const std::string failure = failure_of(o); !failure.empty()) return failure;
  for (size_t c = 0; c < program.size(); ++c)
    for (size_t r = 0; r < program[c].tokens.size(); ++r) {
      const Layer& l = *program[c].layer;
      const double error = relative_error(o.y[c][r], reference_moe(l, program[c].tokens[r])) / allowed.value_or(tolerance(l.dtype));
      if (!(error <= 1))
        return "call " + std::to_string(c) + ", rank " + std::to_string(r) + ": error is " + std::to_string(error) + " times the tolerance";
    }
  return miscount_of(o, program.back(), false);
}

}  // namespace flashmoe::test
