// What one call is: its shapes, its pointers, and every count derived from them.
#pragma once

#include <cstddef>
#include <cstdint>

// FLASHMOE_HD: arithmetic, for host and device alike. FLASHMOE_ROLE: code that meets other threads, and so runs only
// where its platform's verbs do.
#if defined(__CUDACC__)
#define FLASHMOE_HD __host__ __device__
#define FLASHMOE_ROLE __device__
#else
#define FLASHMOE_HD
#define FLASHMOE_ROLE
#endif

namespace flashmoe {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };
enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kRelu };

FLASHMOE_HD constexpr int dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <class T>
FLASHMOE_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
FLASHMOE_HD constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Rows of a row block: the unit in which an expert's canonical list is computed and returned. A constant of
// the library, because the source of a token works out from it where the run boundaries of its results lie.
inline constexpr int kBlockM = 128;
// Slots per chunk: small enough that early experts start while late rows travel.
inline constexpr int kChunkRows = 64;
// Tokens per combine task.
inline constexpr int kCombineTokens = 16;
// Experts per token at most.
inline constexpr int kMaxTopK = 256;

// What a group's symmetric heap must be able to hold. Equal on all its ranks.
struct Limits {
  int ep_size = 1;
  int max_tokens = 0;      // per rank and call
  int max_wire_bytes = 0;  // of one token row on the wire
  int max_top_k = 0;
  int max_experts = 0;
  bool backward = false;  // also backward calls, whose packets carry two rows in a slot
};

// Names the call, so that ranks which call different layers in one epoch find out. Travels in every header;
// the header signal carries a digest of it, for packets that are empty.
struct CallTag {
  int32_t layer;
  int32_t hidden_size;
  int32_t intermediate_size;
  int32_t num_experts;
  uint32_t placement;  // digest of the expert map
  uint8_t dtype;
  uint8_t activation;
  uint8_t kind;  // 1: gated, 2: a backward call
  uint8_t has_bias;

  FLASHMOE_HD bool gated() const { return kind & 1; }
  FLASHMOE_HD bool backward() const { return kind & 2; }
  FLASHMOE_HD bool operator==(const CallTag& o) const {
    return layer == o.layer && hidden_size == o.hidden_size && intermediate_size == o.intermediate_size &&
           num_experts == o.num_experts && placement == o.placement && dtype == o.dtype &&
           activation == o.activation && kind == o.kind && has_bias == o.has_bias;
  }
};

// A result row of a backward call: the gradient of the token's row, then the gradient of its top-k weight, a float.
FLASHMOE_HD constexpr size_t backward_result_bytes(size_t row_bytes) { return round_up(row_bytes, 16) + 16; }

// What a backward call has besides. Gradients of weights are overwritten; null: not asked for. A bias' is made with its
// matrix'.
struct Gradients {
  const std::byte* y;       // [num_tokens, hidden_size] what comes in
  float* topk_weights;      // [num_tokens, top_k]
  std::byte* gate_up_proj;  // each as the weight of its name
  std::byte* gate_up_bias;
  std::byte* down_proj;
  std::byte* down_bias;
};

// Where a call on the host finds or leaves what protocol/kept.h says.
struct KeptSums {
  float* sums;      // [row blocks, kBlockM, up_rows]; null: nothing is kept
  uint32_t* place;  // [num_local_experts, blocks_of_expert] 1 + which of them is the expert's block, or 0
  uint32_t blocks_of_expert;
};

// One call on one rank. Experts are numbered by *position*: sorted by (owning rank, expert id), so that the
// experts of rank d are the positions [rank_begin[d], rank_begin[d + 1]) and a local expert index is a
// position less rank_begin[ep_rank].
struct Call {
  int ep_size, ep_rank;
  uint64_t epoch;
  CallTag tag;

  int num_tokens, top_k, num_experts;
  int hidden_size, intermediate_size;
  DType dtype;
  Activation activation;
  bool gated;

  const int32_t* expert_position;  // [num_experts] expert id → position
  const int32_t* rank_begin;       // [ep_size + 1]

  const std::byte* x;             // [num_tokens, hidden_size]
  const int32_t* topk_ids;        // [num_tokens, top_k] expert id, or -1 for dropped
  const float* topk_weights;      // [num_tokens, top_k]
  const std::byte* gate_up_proj;  // [num_local_experts, (gated ? 2 : 1) · intermediate_size, hidden_size]
  const std::byte* gate_up_bias;  // [num_local_experts, (gated ? 2 : 1) · intermediate_size] or null
  const std::byte* down_proj;     // [num_local_experts, hidden_size, intermediate_size]
  const std::byte* down_bias;     // [num_local_experts, hidden_size] or null
  std::byte* y;                   // [num_tokens, hidden_size]; of a backward call the gradient of x
  Gradients grad;                 // of a backward call
  KeptSums kept;

  FLASHMOE_HD int num_local_experts() const { return rank_begin[ep_rank + 1] - rank_begin[ep_rank]; }
  FLASHMOE_HD size_t row_bytes() const { return size_t(hidden_size) * dtype_bytes(dtype); }
  // Of a slot: a backward call sends x and the gradient of y together.
  FLASHMOE_HD size_t slot_bytes() const { return tag.backward() ? 2 * row_bytes() : row_bytes(); }
  FLASHMOE_HD size_t result_bytes() const { return tag.backward() ? backward_result_bytes(row_bytes()) : row_bytes(); }
  FLASHMOE_HD int up_rows() const { return (gated ? 2 : 1) * intermediate_size; }
  FLASHMOE_HD int num_combine_tasks() const { return ceil_div(num_tokens, kCombineTokens); }
  // The i-th source of every canonical list: this rank itself first, then the others in turn.
  FLASHMOE_HD int canonical_source(int i) const { return (ep_rank + i) % ep_size; }
};

}  // namespace flashmoe
