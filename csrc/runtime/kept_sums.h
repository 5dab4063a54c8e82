// The memory in which a forward call on the host keeps what its backward call would else make again.
#pragma once

#include "protocol/workspace.h"
#include "runtime/buffer.h"

namespace flashmoe {

// Of one forward call. Whoever differentiates it owns this; a backward call of other shapes passes over it.
class Kept {
 public:
  // For the forward call with these arguments, which may then be given `call.kept`.
  KeptSums begin(const Call& call, const HeapLayout& layout) {
    tag_ = call.tag, ep_rank_ = call.ep_rank, complete_ = false;
    const size_t blocks = most_row_blocks(call, layout), block_bytes = sizeof(float) * kBlockM * call.up_rows();
    blocks_of_expert_ = uint32_t(blocks);
    try {
      // Blocks are taken from the front, and most others never; nor are most rows of a block where rows are few.
      sums_.at_least(blocks * block_bytes, true);
      places_.at_least(blocks * std::max(call.num_local_experts(), 1) * sizeof(uint32_t), true);
    } catch (const std::bad_alloc&) {
      return {};  // then it is made again
    }
    return all();
  }
  // Once that call has ended well.
  void complete() { complete_ = places_.data(); }

  // For a backward call; without sums if this is not of its forward call.
  KeptSums of(const Call& call, const HeapLayout& layout) const {
    CallTag forward = call.tag;
    forward.kind &= ~2;
    const bool mine = forward == tag_ && call.ep_rank == ep_rank_ && most_row_blocks(call, layout) == blocks_of_expert_;
    return complete_ && mine ? all() : KeptSums{};
  }

 private:
  KeptSums all() const {
    return {reinterpret_cast<float*>(sums_.data()), reinterpret_cast<uint32_t*>(places_.data()), blocks_of_expert_};
  }

  Buffer sums_, places_;
  CallTag tag_{};
  int ep_rank_ = 0;
  uint32_t blocks_of_expert_ = 0;
  bool complete_ = false;
};

}  // namespace flashmoe
