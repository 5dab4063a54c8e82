// What a call must satisfy before anything of it is sent. Every message names the argument, what was expected
// and what came.
#pragma once

#include <sstream>
#include <stdexcept>

#include "runtime/moe.h"

namespace flashmoe {

template <class... Parts>
[[noreturn]] void bad_argument(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Rows, columns and bytes of a row are counted in 32 bits, and rounded up to tiles on the way.
inline void check_counted(const char* name, long long count) {
  constexpr long long kMost = 1 << 30;
  if (count > kMost) bad_argument(name, " must be at most ", kMost, ", got ", count);
}

inline void check_limit(const char* name, long long came, long long limit, const char* grown_by) {
  if (came > limit) bad_argument(name, " must be at most ", limit, " in this group (", grown_by, "), got ", came);
}

inline void check_shapes(const ForwardArgs& a, const Limits& limits, bool grows) {
  if (a.num_tokens < 0 || a.hidden_size < 1 || a.intermediate_size < 1 || a.num_experts < 1)
    bad_argument("hidden_size, intermediate_size and num_experts must be positive, got ", a.hidden_size, ", ",
                 a.intermediate_size, ", ", a.num_experts);
  if (a.top_k < 1 || a.top_k > kMaxTopK) bad_argument("top_k must be between 1 and ", kMaxTopK, ", got ", a.top_k);
  if (a.topk_ids_bytes != 4 && a.topk_ids_bytes != 8)
    bad_argument("topk_ids must be int32 or int64, got elements of ", a.topk_ids_bytes, " bytes");
  check_counted("number of tokens times top_k", (long long)a.num_tokens * a.top_k);
  check_counted("bytes of one row of x", (long long)a.hidden_size * dtype_bytes(a.dtype));
  check_counted("rows of one expert's gate_up_proj", (a.gated ? 2LL : 1LL) * a.intermediate_size);
  if (grows) return;
  constexpr const char* kArena = "flashmoe.distributed.init or reserve sets it";
  check_limit("number of tokens of x", a.num_tokens, limits.max_tokens, kArena);
  check_limit("bytes of one row of x", (long long)a.hidden_size * dtype_bytes(a.dtype), limits.max_wire_bytes, kArena);
  check_limit("top_k", a.top_k, limits.max_top_k, kArena);
  check_limit("num_experts", a.num_experts, limits.max_experts, kArena);
}

// Copies the ids as int32, with -1 for every dropped pair.
template <class Id>
void take_ids(const Id* ids, const ForwardArgs& a, int32_t* out) {
  const long long pairs = (long long)a.num_tokens * a.top_k;
  for (long long i = 0; i < pairs; ++i) {
    const long long id = ids[i];
    if (id < -1 || id > a.num_experts)
      bad_argument("topk_ids must lie in [0, ", a.num_experts, ") (", a.num_experts, " or -1: dropped), got ", id,
                   " for token ", i / a.top_k, ", choice ", i % a.top_k);
    out[i] = id == a.num_experts ? -1 : int32_t(id);
  }
}

// Fills position[expert] and rank_begin[rank]; experts of a rank in ascending order.
inline void take_placement(const ForwardArgs& a, int ep_size, int ep_rank, int32_t* position, int32_t* rank_begin) {
  for (int d = 0; d <= ep_size; ++d) rank_begin[d] = 0;
  if (!a.expert_map && a.num_experts % ep_size != 0)
    bad_argument("expert_map must be given when num_experts (", a.num_experts, ") is no multiple of the group's size (",
                 ep_size, ")");
  const int each = a.num_experts / ep_size;
  for (int e = 0; e < a.num_experts; ++e) {
    const int owner = a.expert_map ? a.expert_map[e] : e / each;
    if (owner < 0 || owner >= ep_size)
      bad_argument("expert_map must hold ranks in [0, ", ep_size, "), got ", owner, " for expert ", e);
    position[e] = rank_begin[owner + 1]++;  // among the experts of its owner, for now
  }
  for (int d = 0; d < ep_size; ++d) rank_begin[d + 1] += rank_begin[d];
  for (int e = 0; e < a.num_experts; ++e) position[e] += rank_begin[a.expert_map ? a.expert_map[e] : e / each];
  const int local = rank_begin[ep_rank + 1] - rank_begin[ep_rank];
  if (local != a.num_local_experts)
    bad_argument("gate_up_proj and down_proj must hold the ", local, " experts that expert_map gives to rank ", ep_rank,
                 ", got ", a.num_local_experts);
}

inline uint32_t placement_digest(const int32_t* position, const int32_t* rank_begin, int num_experts, int ep_size) {
  uint32_t h = 2166136261u;
  for (int e = 0; e < num_experts; ++e) h = (h ^ uint32_t(position[e])) * 16777619u;
  for (int d = 0; d <= ep_size; ++d) h = (h ^ uint32_t(rank_begin[d])) * 16777619u;
  return h;
}

}  // namespace flashmoe
