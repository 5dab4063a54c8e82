// One rank's call as the roles take it: the Call, and a workspace to run it in. Written anew here, so that a test of
// the roles does not lean on the runtime.
#pragma once

#include <memory>

#include "platform/host.h"
#include "protocol/group.h"
#include "protocol/workspace.h"
#include "team.h"

namespace flashmoe::test {

class RankCall {
 public:
  using OfAll = CallOfAll;
  static constexpr bool kBackward = false;

  // `amend`: makes a call of another kind of it.
  RankCall(const CallOfAll& of_all, int rank, int ep_size, uint64_t epoch, const HeapLayout& layout, const Machine& machine,
           const std::function<void(Call&)>& amend = [](Call&) {})
      : shape(*of_all.layer), args_(of_all, rank, ep_size) {
    const ForwardArgs& a = args_.args;
    const ExpertMap owner = of_all.map ? *of_all.map : equal_blocks(a.num_experts, ep_size);
    position_.resize(a.num_experts), rank_begin_.push_back(0);
    int next = 0;
    for (int d = 0; d < ep_size; ++d) {
      for (int e = 0; e < a.num_experts; ++e)
        if (owner[e] == d) position_[e] = next++;
      rank_begin_.push_back(next);
    }
    for (int64_t id : args_.tokens.ids) ids_.push_back(id == a.num_experts ? -1 : int32_t(id));

    call.ep_size = ep_size, call.ep_rank = rank, call.epoch = epoch;
    call.tag = {a.layer, a.hidden_size, a.intermediate_size, a.num_experts, 0, uint8_t(a.dtype), uint8_t(a.activation), a.gated, uint8_t(shape.bias)};
    call.num_tokens = a.num_tokens, call.top_k = a.top_k, call.num_experts = a.num_experts;
    call.hidden_size = a.hidden_size, call.intermediate_size = a.intermediate_size;
    call.dtype = a.dtype, call.activation = a.activation, call.gated = a.gated;
    call.expert_position = position_.data(), call.rank_begin = rank_begin_.data();
    call.x = bytes(a.x), call.y = static_cast<std::byte*>(a.y), call.topk_ids = ids_.data(), call.topk_weights = a.topk_weights;
    call.gate_up_proj = bytes(a.gate_up_proj), call.gate_up_bias = bytes(a.gate_up_bias);
    call.down_proj = bytes(a.down_proj), call.down_bias = bytes(a.down_bias);
    amend(call);

    const Workspace size(call, layout, machine, nullptr);
    // Not zeroed: nothing may be read that this call has not written. Small numbers, as counts and indices are.
    memory_.resize(size.bytes / sizeof(Line) + 1);
    uint32_t garbage = 0;
    for (Line& line : memory_)
      for (uint32_t& word : line.words) word = (garbage += 3) % 1000;
    workspace = std::make_unique<Workspace>(call, layout, machine, reinterpret_cast<std::byte*>(memory_.data()));
    workspace->reset(Alone{}, call, HostPlatform::now_ns());
  }

  std::vector<float> y() const { return decode(args_.y, shape.dtype); }
  const Tokens& tokens() const { return args_.tokens; }

  const LayerShape shape;
  Call call{};
  std::unique_ptr<Workspace> workspace;

 private:
  struct alignas(64) Line {
    uint32_t words[16];
  };
  static const std::byte* bytes(const void* p) { return static_cast<const std::byte*>(p); }

  RankArgs args_;
  std::vector<int32_t> position_, rank_begin_, ids_;
  std::vector<Line> memory_;
};

}  // namespace flashmoe::test
