// The heap's table, the runs in which a segment comes back, and the source's plan, against brute force.
#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "harness.h"
#include "protocol/plan.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

struct Region {
  size_t begin, end;
  const char* name;
};

bool disjoint(std::vector<Region> regions, size_t bytes) {
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < regions.size(); ++i)
    if (regions[i].begin > regions[i].end || regions[i].end > (i + 1 < regions.size() ? regions[i + 1].begin : bytes)) return false;
  return true;
}

// Every piece that a peer may write, by the accessors that the roles use, in a forward or a backward call.
std::vector<Region> pieces(const HeapLayout& h, int owner, bool backward) {
  const Limits& l = h.limits;
  const size_t row = l.max_wire_bytes, slot = backward ? 2 * row : row, result = backward ? backward_result_bytes(row) : row;
  std::vector<Region> r;
  for (int pe = 0; pe < l.ep_size; ++pe) {
    r.push_back({h.abort_at(pe), h.abort_at(pe) + 8, "abort"});
    r.push_back({h.header_signal_at(pe), h.header_signal_at(pe) + 8, "header signal"});
    for (int c = 0; c < int(h.max_chunks); ++c) r.push_back({h.chunk_signal_at(pe, c), h.chunk_signal_at(pe, c) + 8, "chunk signal"});
    if (pe == owner) continue;
    const size_t header = h.header_at(owner, pe);
    r.push_back({header, header + header_bytes(l.max_experts, h.max_result_rows, backward), "header"});
    r.push_back({h.inbox_at(owner, pe, 0, slot), h.inbox_at(owner, pe, l.max_tokens, slot), "inbox"});
  }
  for (uint32_t i = 0; i < h.max_result_signals; ++i) r.push_back({h.result_signal_at(i), h.result_signal_at(i) + 8, "result signal"});
  for (int e = 0; backward && e < l.max_experts; ++e) r.push_back({h.release_signal_at(e), h.release_signal_at(e) + 8, "release signal"});
  r.push_back({h.result_at(0, result), h.result_at(h.max_result_rows, result), "results"});
  return r;
}

void heap_layout() {
  for (Limits l : {Limits{1, 1, 4, 1, 1}, Limits{2, 0, 4, 1, 1}, Limits{2, 65, 12, 3, 5}, Limits{3, 64, 20, 2, 7}, Limits{5, 130, 36, 4, 2}, Limits{2, 64, 2, 1, 3}})
    for (bool backward : {false, true})
      for (int owner = 0; owner < l.ep_size; ++owner) {
        l.backward = backward;
        const std::string what = "regions of " + std::to_string(l.ep_size) + " ranks overlap" + (backward ? ", with backward calls" : "");
        for (bool call : {false, true})
          if (!call || backward) check(disjoint(pieces(HeapLayout(l), owner, call), HeapLayout(l).bytes), what);
      }
  // What calls of narrower rows put there fits, too.
  const HeapLayout with(Limits{3, 70, 100, 3, 7, true});
  for (size_t row = 2; row <= 100; row += 2)
    check(with.inbox_at(1, 0, 70, 2 * row) <= with.inbox_at(1, 2, 0, 2 * row) && with.inbox_at(1, 2, 70, 2 * row) <= with.results &&
              with.result_at(with.max_result_rows, backward_result_bytes(row)) <= with.bytes,
          "a backward call's rows of " + std::to_string(row) + " bytes");
  const HeapLayout h(Limits{3, 64, 20, 2, 7});
  check_caught(!disjoint(pieces(h, 0, true), h.bytes), "a backward call in a heap that was not made for it");
  std::vector<Region> overlapping = pieces(h, 0, false);
  overlapping.push_back({h.inbox_at(0, 2, 0, 20) - 1, h.inbox_at(0, 2, 0, 20), "one byte too far"});
  overlapping.push_back(overlapping.back());
  check_caught(!disjoint(overlapping, h.bytes), "two regions that share a byte");

  // Rows are moved by vector loads and stores: regions of rows keep their alignment.
  check(h.header_at(1, 0) % HeapLayout::kAlign == 0 && h.inbox_at(1, 2, 0, 20) % HeapLayout::kAlign == 0 &&
            h.result_at(0, 20) % HeapLayout::kAlign == 0,
        "alignment of headers, inboxes and results");
  for (size_t row : {2, 4, 36, 4096})
    check(backward_result_bytes(row) % 16 == 0 && backward_result_bytes(row) >= round_up(row, 16) + sizeof(float),
          "a backward call's results keep theirs, with the gradient of a weight behind each");
}

// A heap is what must travel, plus less than 5 %, at full model widths.
void heap_bytes() {
  struct Model {
    const char* name;
    int hidden_size, num_experts, top_k;
  };
  for (const Model& m : {Model{"mixtral-8x7b", 4096, 8, 2}, Model{"qwen3-30b-a3b", 2048, 128, 8}, Model{"deepseek-v3", 7168, 256, 8},
                         Model{"deepseek-v2-lite", 2048, 64, 6}, Model{"llama4-scout", 5120, 16, 1}, Model{"flashmoe-paper", 2048, 32, 2}})
    for (int ep_size : {2, 4, 8, 64})
      for (int max_tokens : {256, 1024, 8192, 32768})
        for (int item : {2, 4}) {
          const size_t row = size_t(m.hidden_size) * item;
          const HeapLayout h(Limits{ep_size, max_tokens, int(row), m.top_k, m.num_experts});
          const double rows = double(ep_size - 1) * max_tokens * row + double(max_tokens) * m.top_k * row;
          const HeapLayout twice(Limits{ep_size, max_tokens, int(row), m.top_k, m.num_experts, true});
          const double rows_and_gradients = rows + double(ep_size - 1) * max_tokens * row;
          check(twice.bytes >= rows_and_gradients && twice.bytes < 1.05 * rows_and_gradients,
                std::string(m.name) + " with backward calls: " + std::to_string(100 * (twice.bytes / rows_and_gradients - 1)) + " % beside the rows");
          check(h.bytes >= rows && h.bytes < 1.05 * rows,
                std::string(m.name) + " at " + std::to_string(ep_size) + " ranks, " + std::to_string(max_tokens) + " tokens: " +
                    std::to_string(100 * (h.bytes / rows - 1)) + " % beside the rows");
        }
  // Past 4 GiB every index must have been widened before it was multiplied.
  const HeapLayout h(Limits{64, 32768, 28672, 8, 256});
  check(h.inbox_at(0, 63, 32767, 28672) == h.inbox + 62 * h.inbox_stride + size_t(32767) * 28672, "inbox past 4 GiB");
  check(h.result_at(262143, 28672) == h.results + size_t(262143) * 28672, "results past 4 GiB");
  check(h.bytes > size_t(60) << 30, "a heap past 4 GiB");
}

// Runs by walking row by row: a new run begins where the canonical list enters a new row block.
void packet_runs() {
  for (uint32_t offset = 0; offset < 2 * kBlockM + 2; ++offset)
    for (uint32_t rows = 1; rows < 3 * kBlockM + 2; ++rows) {
      std::vector<uint32_t> run_of(rows);
      uint32_t run = 0;
      for (uint32_t r = 1; r < rows; ++r) run_of[r] = run += (offset + r) % kBlockM == 0;
      const uint32_t first = uint32_t(std::count(run_of.begin(), run_of.end(), 0u));
      bool same = first_run_rows(offset, rows) == first && run + 1 <= max_runs(rows);
      for (uint32_t r = 0; r < rows; ++r) same = same && run_of_row(r, first) == run_of[r];
      if (!same || rows == 3 * kBlockM + 1) check(same, "runs of " + std::to_string(rows) + " rows from " + std::to_string(offset));
    }
  check(max_runs(0) == 0, "an empty segment has no signal");
  check(max_runs(kBlockM) == 2 && max_runs(kBlockM + 1) == 3, "no signal to spare");
}

struct Routing {
  int num_tokens, top_k, num_experts, ep_size, ep_rank;
  std::vector<int32_t> ids, owner;
};

Routing draw(uint64_t seed) {
  std::mt19937_64 random(seed);
  Routing r{int(random() % 200), 1 + int(random() % 4), 1 + int(random() % 12), 1 + int(random() % 4), 0, {}, {}};
  r.ep_rank = int(random() % r.ep_size);
  for (int e = 0; e < r.num_experts; ++e) r.owner.push_back(int32_t(random() % r.ep_size));
  for (int i = 0; i < r.num_tokens * r.top_k; ++i) r.ids.push_back(random() % 5 ? int32_t(random() % r.num_experts) : -1);
  return r;
}

// The plan against its definition: rows numbered (owner, expert, token)-major, one slot per token and destination.
void plan(uint64_t seed) {
  const Routing r = draw(seed);
  std::vector<int32_t> position(r.num_experts), rank_begin{0}, expert_at;
  for (int d = 0; d < r.ep_size; ++d) {
    for (int e = 0; e < r.num_experts; ++e)
      if (r.owner[e] == d) position[e] = int32_t(expert_at.size()), expert_at.push_back(e);
    rank_begin.push_back(int32_t(expert_at.size()));
  }
  Call call{};
  call.ep_size = r.ep_size, call.ep_rank = r.ep_rank, call.num_tokens = r.num_tokens, call.top_k = r.top_k;
  call.num_experts = r.num_experts, call.hidden_size = 4, call.intermediate_size = 4, call.topk_ids = r.ids.data();
  call.expert_position = position.data(), call.rank_begin = rank_begin.data();
  const HeapLayout layout(Limits{r.ep_size, r.num_tokens, 16, r.top_k, r.num_experts});
  std::vector<std::byte> memory(Workspace(call, layout, Machine{}, nullptr).bytes + 64);
  Workspace ws(call, layout, Machine{}, reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63)));
  plan_segments(Alone{}, call, ws);
  plan_slots(Alone{}, call, ws);

  uint32_t row = 0, signal = 0, slot_end = 0;
  bool ok = true;
  for (int d = 0; d < r.ep_size; ++d) {
    // Destinations do not share places in slot_token.
    ok = ok && ws.slot_begin[d] >= slot_end;
    slot_end = ws.slot_begin[d] + packet_slots(ws, d);
    std::map<int, uint32_t> slot_of;  // token → slot at d
    for (int p = rank_begin[d]; p < rank_begin[d + 1]; ++p) {
      ok = ok && ws.segment_row[p] == row && ws.segment_signal[p] == signal;
      const uint32_t begin = row;
      for (int i = 0; i < r.num_tokens * r.top_k; ++i) {
        if (r.ids[i] != expert_at[p]) continue;
        const int token = i / r.top_k;
        ok = ok && ws.result_row[i] == int32_t(row) && ws.row_token[row] == uint32_t(token);
        if (d == r.ep_rank) {
          ok = ok && ws.row_slot[row] == uint32_t(token);
        } else {
          const bool first = slot_of.emplace(token, uint32_t(slot_of.size())).second;
          if (first) ok = ok && ws.slot_token[ws.slot_begin[d] + slot_of[token]] == uint32_t(token);
          ok = ok && ws.row_slot[row] == slot_of[token];
        }
        ++row;
      }
      signal += max_runs(row - begin);
    }
    ok = ok && packet_slots(ws, d) == slot_of.size();
  }
  for (int i = 0; i < r.num_tokens * r.top_k; ++i) ok = ok && (r.ids[i] >= 0 || ws.result_row[i] == -1);
  ok = ok && ws.segment_row[r.num_experts] == row && slot_end <= uint32_t(r.num_tokens * std::min(r.ep_size, r.top_k));
  check(ok, "plan of seed " + std::to_string(seed));
  check(row <= layout.max_result_rows && signal <= layout.max_result_signals, "the plan fits the heap, seed " + std::to_string(seed));
}

}  // namespace

int main() {
  run_test("HeapLayout", heap_layout);
  run_test("HeapBytes", heap_bytes);
  run_test("PacketRuns", packet_runs);
  run_test("Plan", [] {
    for (uint64_t seed = 0; seed < 400; ++seed) plan(seed);
  });
  return finish();
}
