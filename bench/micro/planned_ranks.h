// The ranks of one call, as threads' heaps, up to where their rows lie in each other's inboxes: the roles' steps one by
// one, on rank 0, without an engine.
#pragma once

#include <cstring>
#include <optional>

#include "protocol/dispatcher.h"
#include "protocol/scheduler.h"
#include "protocol/subscriber.h"
#include "protocol/tile.h"
#include "stretch.h"

namespace flashmoe::micro {

class PlannedRanks {
 public:
  // x [copies, ep_size, num_tokens, hidden_size] float32, of which rank 0's rows take turns when they are sent;
  // ids [ep_size, num_tokens, top_k]. Both must outlive this. Experts lie in equal contiguous blocks.
  PlannedRanks(int ep_size, int num_tokens, int hidden_size, int num_experts, int top_k, const std::byte* x, int copies,
               const int32_t* ids)
      : layout_(Limits{ep_size, num_tokens, hidden_size * 4, top_k, num_experts}), x_(x), copies_(copies),
        tiles_(kIntermediate, hidden_size, kIntermediate, hidden_size) {
    for (int e = 0; e < num_experts; ++e) position_.push_back(e);
    for (int d = 0; d <= ep_size; ++d) rank_begin_.push_back(num_experts / ep_size * d);
    std::vector<std::byte*> heaps;
    for (int r = 0; r < ep_size; ++r) heaps.push_back(memory(layout_.bytes));
    for (int r = 0; r < ep_size; ++r) {
      Rank& rank = *ranks_.emplace_back(std::make_unique<Rank>());
      Call& call = rank.call;
      call.ep_size = ep_size, call.ep_rank = r, call.epoch = 1;
      call.num_tokens = num_tokens, call.top_k = top_k, call.num_experts = num_experts;
      call.hidden_size = hidden_size, call.intermediate_size = kIntermediate, call.dtype = DType::kFloat32;
      call.expert_position = position_.data(), call.rank_begin = rank_begin_.data();
      call.x = x + r * rows_bytes(), call.topk_ids = ids + size_t(r) * num_tokens * top_k;
      // A ring for all row blocks at once: nothing here computes any, so no slot would come free.
      const Machine machine{.max_ring_blocks = 1u << 20};
      rank.ws.emplace(call, layout_, machine, memory(Workspace(call, layout_, machine, nullptr).bytes));
      rank.platform.emplace(r, heaps, std::vector<int>(ep_size, 0), nullptr);
      rank.ws->reset(Alone{}, call, 0);
    }
    for (int r = 0; r < ep_size; ++r) {
      Dispatcher<P> dispatcher(context(r));
      perform(dispatcher, {WorkKind::kPlan, 0, 0});
      send_all(r, dispatcher);
    }
    build_lists(1);
  }

  // Seconds of each of `n` plans: from the routing to each row's place in the inboxes and among the results.
  double plan(int n) {
    Rank& me = *ranks_[0];
    return seconds_each(n, [&](int) {
      plan_segments(Alone{}, me.call, *me.ws);
      plan_slots(Alone{}, me.call, *me.ws);
    });
  }

  // Seconds of each of `n` dispatches of all rows that go to other ranks, after the plan, each chunk with its signal.
  double send(int n) {
    Dispatcher<P> dispatcher(context(0));
    for_each_chunk(0, [&](int d, int chunk) { std::memset(signal_of(d, chunk), 0, sizeof(uint64_t)); });
    const double seconds = seconds_each(n, [&](int i) {
      ranks_[0]->call.x = x_ + i % copies_ * ranks_.size() * rows_bytes();
      send_all(0, dispatcher);
    });
    for_each_chunk(0, [&](int d, int chunk) {
      if (*signal_of(d, chunk) != make_signal(ranks_[0]->call.epoch, 0))
        throw std::logic_error("a chunk was sent without its signal");
    });
    return seconds;
  }

  // Seconds of each of `n` times that the headers become the experts' lists, and these become row blocks.
  double build_lists(int n) {
    Workspace& ws = *ranks_[0]->ws;
    Subscriber<P> subscriber(context(0));
    Scheduler<P> scheduler(context(0), tiles_);
    return seconds_each(n, [&](int) {
      ws.reset(Alone{}, ranks_[0]->call, 0);
      P::store_release(&ws.counters->plan_ready, 1);
      await([&] { return subscriber.step(Alone{}), subscriber.done(); });
      await([&] { return scheduler.step(Alone{}), ws.counters->scheduler_done != 0; });
    });
  }

  // Seconds of each of `n` gathers of all row blocks' rows, from x and the inboxes, into memory of one row block.
  double gather(int n) {
    std::vector<std::byte> block(kBlockM * ranks_[0]->call.row_bytes());
    return seconds_each(n, [&](int) { gather_into([&](uint32_t) { return block.data(); }); });
  }
  // The gathered rows, block after block, and of each block its expert on this rank and its rows.
  std::vector<std::byte> gathered() {
    size_t rows = 0;
    for (const auto& [expert, of_block] : blocks()) rows += of_block;
    std::vector<std::byte> all(rows * ranks_[0]->call.row_bytes());
    std::byte* next = all.data();
    gather_into([&](uint32_t b) {
      std::byte* to = next;
      next += ranks_[0]->ws->ring[b].num_rows * ranks_[0]->call.row_bytes();
      return to;
    });
    return all;
  }
  std::vector<std::pair<int, int>> blocks() const {
    std::vector<std::pair<int, int>> found;
    for (uint32_t b = 0; b < num_blocks(); ++b)
      found.emplace_back(ranks_[0]->ws->ring[b].local_expert, int(ranks_[0]->ws->ring[b].num_rows));
    return found;
  }

  // The plan, as far as a naive one can be compared with it.
  std::vector<int32_t> result_rows() const {
    const Rank& me = *ranks_[0];
    return {me.ws->result_row, me.ws->result_row + size_t(me.call.num_tokens) * me.call.top_k};
  }
  // The tokens that travel to a rank, slot by slot.
  std::vector<uint32_t> slot_tokens(int destination) const {
    const Workspace& ws = *ranks_[0]->ws;
    const uint32_t* first = ws.slot_token + ws.slot_begin[destination];
    return {first, first + ws.num_slots[destination]};
  }
  // What lies in the inbox of `destination` from rank 0.
  std::vector<std::byte> inbox(int destination) const {
    const Rank& there = *ranks_[destination];
    const std::byte* rows = there.platform->heap() + layout_.inbox_at(destination, 0, 0, there.call.row_bytes());
    return {rows, rows + slot_tokens(destination).size() * there.call.row_bytes()};
  }

 private:
  using P = HostPlatform;
  static constexpr int kIntermediate = 16;
  struct Rank {
    Call call{};
    std::optional<Workspace> ws;
    std::optional<P> platform;
  };
  struct alignas(128) Line {
    std::byte bytes[128];
  };

  size_t rows_bytes() const { return layout_.limits.max_tokens * size_t(layout_.limits.max_wire_bytes); }
  Context<P> context(int r) { return {ranks_[r]->call, layout_, *ranks_[r]->ws, *ranks_[r]->platform}; }
  uint32_t num_blocks() const { return ranks_[0]->ws->counters->up.published; }
  std::byte* memory(size_t bytes) {
    memory_.push_back(std::make_unique<Line[]>(bytes / sizeof(Line) + 1));
    return reinterpret_cast<std::byte*>(memory_.back().get());
  }

  // f(destination, chunk) of all that rank r has for others.
  template <class F>
  void for_each_chunk(int r, F&& f) const {
    const Rank& rank = *ranks_[r];
    for (int i = 1; i < rank.call.ep_size; ++i) {
      const int d = rank.call.canonical_source(i);
      for (uint32_t chunk = 0; chunk * kChunkRows < rank.ws->num_slots[d]; ++chunk) f(d, int(chunk));
    }
  }
  void send_all(int r, Dispatcher<P>& dispatcher) {
    for_each_chunk(r, [&](int d, int chunk) { perform(dispatcher, {WorkKind::kSendChunk, d, chunk}); });
  }
  // By which `destination` learns of a chunk of rank 0.
  uint64_t* signal_of(int destination, int chunk) const {
    return reinterpret_cast<uint64_t*>(ranks_[destination]->platform->heap() + layout_.chunk_signal_at(0, chunk));
  }
  static void perform(Dispatcher<P>& dispatcher, const Work& work) {
    dispatcher.perform(Alone{}, work);
    dispatcher.finish(work);
  }

  template <class To>
  void gather_into(To&& to) {
    const Context<P> c = context(0);
    const size_t row_bytes = c.call.row_bytes();
    for (uint32_t b = 0; b < num_blocks(); ++b) {
      std::byte* rows = to(b);
      for_each_token_row(c, b, 0, c.ws.ring[b].num_rows, [&](uint32_t row, const std::byte* from) {
        P::copy(Alone{}, rows + row * row_bytes, from, row_bytes);
      });
    }
  }

  HeapLayout layout_;
  const std::byte* x_;
  int copies_;
  TileShape tiles_;
  std::vector<int32_t> position_, rank_begin_;
  std::vector<std::unique_ptr<Line[]>> memory_;
  std::vector<std::unique_ptr<Rank>> ranks_;
};

}  // namespace flashmoe::micro
