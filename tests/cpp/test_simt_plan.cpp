// The plan as a crew makes it, on fibers: word for word that of one thread, whose plan test_protocol_layout holds
// against its definition.
#include <random>

#include "kernel/thread_groups.h"
#include "protocol/plan.h"
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

class Planned {
 public:
  Planned(const Call& call, int warps) : layout_(Limits{call.ep_size, call.num_tokens, 16, call.top_k, call.num_experts}) {
    const Machine machine{.plan_warps = warps};
    // Not zeroed: nothing may be read that this plan has not written.
    memory_.assign(Workspace(call, layout_, machine, nullptr).bytes / sizeof(Line) + 1, Line{{3, 1, 4, 1, 5, 9, 2, 6}});
    ws = Workspace(call, layout_, machine, reinterpret_cast<std::byte*>(memory_.data()));
  }
  Workspace ws{none(), HeapLayout(Limits{}), Machine{}, nullptr};

 private:
  struct alignas(64) Line {
    uint32_t words[16];
  };
  static Call none() {
    static constexpr int32_t kNothing[2] = {};
    Call call{};
    call.ep_size = 1, call.rank_begin = kNothing;
    return call;
  }
  HeapLayout layout_;
  std::vector<Line> memory_;
};

template <class T>
bool equal(const T* a, const T* b, size_t count) {
  return std::equal(a, a + count, b);
}

template <int kWarps>
void crew_plans(uint64_t seed, int num_tokens, int top_k, int num_experts, int ep_size) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> ids, position(num_experts), rank_begin(ep_size + 1);
  // One expert in three is everybody's favourite; a token may name an expert twice, or none.
  for (int i = 0; i < num_tokens * top_k; ++i) ids.push_back(random() % 7 ? int32_t(random() % (random() % 3 ? num_experts : 1)) : -1);
  for (int e = 0; e < num_experts; ++e) position[e] = (e * 5 + 2) % num_experts;
  for (int d = 0; d <= ep_size; ++d) rank_begin[d] = num_experts * d / ep_size;
  Call call{};
  call.ep_size = ep_size, call.ep_rank = int(random() % ep_size), call.num_tokens = num_tokens, call.top_k = top_k;
  call.num_experts = num_experts, call.hidden_size = 4, call.intermediate_size = 4, call.topk_ids = ids.data();
  call.expert_position = position.data(), call.rank_begin = rank_begin.data();

  Planned one(call, 1), crew(call, kWarps);
  plan_segments(Alone{}, call, one.ws), plan_slots(Alone{}, call, one.ws);
  const std::string wrong = failure(seed, 1, 32 * kWarps, 0, [&] {
    plan_segments(gpu::Crew<kWarps>{}, call, crew.ws), plan_slots(gpu::Crew<kWarps>{}, call, crew.ws);
  });
  const std::string what = std::to_string(num_tokens) + " tokens, " + std::to_string(ep_size) + " ranks, " + std::to_string(kWarps) + " warps";
  check(wrong.empty(), what + ": " + wrong);
  const uint32_t rows = one.ws.segment_row[num_experts];
  check(equal(one.ws.segment_row, crew.ws.segment_row, num_experts + 1) && equal(one.ws.segment_signal, crew.ws.segment_signal, num_experts + 1), what + ": segments");
  check(equal(one.ws.result_row, crew.ws.result_row, ids.size()) && equal(one.ws.row_token, crew.ws.row_token, rows), what + ": rows");
  check(equal(one.ws.row_slot, crew.ws.row_slot, rows) && equal(one.ws.num_slots, crew.ws.num_slots, ep_size), what + ": slots of rows");
  for (int d = 0; d < ep_size; ++d)
    check(equal(one.ws.slot_token + one.ws.slot_begin[d], crew.ws.slot_token + crew.ws.slot_begin[d], one.ws.num_slots[d]), what + ": tokens of slots");
}

// From less than a step of one warp to several rounds of all of them.
template <int kWarps>
void sizes() {
  uint64_t seed = 1;
  for (int ep_size : {1, 2, 5})
    for (int num_tokens : {0, 1, 8, 33, 200, 700}) crew_plans<kWarps>(seed++, num_tokens, 1 + num_tokens % 4, 11, ep_size);
  crew_plans<kWarps>(seed, 300, 8, 70, 4);
}

}  // namespace

int main() {
  run_test("OneWarp", sizes<1>);
  run_test("ThreeWarps", sizes<3>);
  run_test("EightWarps", sizes<8>);
  return finish();
}
