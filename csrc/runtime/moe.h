// The operator as its callers see it: raw pointers in, y out, exceptions on failure. Knows no torch.
#pragma once

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "protocol/heap_layout.h"
#include "protocol/trace.h"

namespace flashmoe {

class HostNetwork;
class Kept;  // runtime/kept_sums.h

// A call that other ranks had a part in cannot be completed: a deadline, a dead peer, an abort, ranks that call
// different layers. The group is unusable from then on.
class PeerError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// One rank's arguments of one call. Shapes beside the pointers; absent biases and an absent map are null.
struct ForwardArgs {
  const void* x;              // [num_tokens, hidden_size]
  const void* topk_ids;       // [num_tokens, top_k] int32 or int64; -1 or num_experts: dropped
  int topk_ids_bytes;         // 4 or 8
  const float* topk_weights;  // [num_tokens, top_k]
  const void* gate_up_proj;   // [num_local_experts, (gated ? 2 : 1) · intermediate_size, hidden_size]
  const void* gate_up_bias;   // [num_local_experts, (gated ? 2 : 1) · intermediate_size]
  const void* down_proj;      // [num_local_experts, hidden_size, intermediate_size]
  const void* down_bias;      // [num_local_experts, hidden_size]
  void* y;                    // [num_tokens, hidden_size]
  const int32_t* expert_map;  // [num_experts] owning rank, or null: equal contiguous blocks
  int num_tokens, top_k, hidden_size, intermediate_size, num_experts, num_local_experts, layer;
  DType dtype;
  Activation activation;
  bool gated;
};

struct GroupOptions {
  std::string name;
  int ep_rank = 0;
  Limits limits;
  std::vector<std::byte*> heaps;                // [ep_size] each rank's heap as mapped here, zeroed before first use;
                                                // null: reached by `network` alone
  std::shared_ptr<HostNetwork> network;         // to the ranks whose heaps are not mapped
  std::vector<std::shared_ptr<void>> keep;      // whatever holds that memory
  std::vector<int> pids;                        // [ep_size] 0 where the rank is a thread, or of another host
  std::vector<int> global_ranks;                // [ep_size] what messages call the ranks; empty: as in the group
  std::optional<uint64_t> remote_only_seed;     // reach peers by delayed, reordered puts alone
  double timeout_s = 60, entry_timeout_s = 600;
  int num_workers = 1;
  uint64_t last_epoch = 0;  // as if so many calls had been made: for tests of the wrap
};

// Traffic of the last call, in bytes handed to the transport, by destination.
struct GroupStats {
  std::vector<uint64_t> tokens_per_expert;  // rows computed by each local expert
  std::vector<uint64_t> header, rows, results, signals;
};

// One rank's membership in a group: its epoch, its heap, its workers. Any number of layers share it.
class Group {
 public:
  explicit Group(GroupOptions options);
  ~Group();

  // Blocks until y is complete. std::invalid_argument: nothing was sent. PeerError: the group has failed.
  // `kept`, if any, then holds what the backward call of this call would else compute again.
  void forward(const ForwardArgs& args, Kept* kept = nullptr);
  // The gradients of the forward call with these arguments, args.y being that of x; all ranks make it, as that one. The
  // bits do not depend on what was kept.
  void backward(const ForwardArgs& args, const Gradients& grad, Kept* kept = nullptr);

  // From the next call on the timeline of each is kept until the following one: at most so many events of a worker.
  void set_trace(uint32_t max_events);
  // Of the last call, by worker; count may exceed what was kept. Not while a call runs.
  std::vector<std::vector<TraceEvent>> trace(uint64_t& lost) const;

  GroupStats stats() const;
  std::optional<std::string> failed() const;
  const GroupOptions& options() const;
  int num_workers() const;
  void set_num_workers(int n);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// One rank that owns every expert: needs no arena, and grows with its calls.
std::shared_ptr<Group> make_local_group(int num_workers);
// ep_size ranks as threads of this process. `options.limits` and the like apply to all.
std::vector<std::shared_ptr<Group>> make_local_team(const GroupOptions& options);

// Reads [memory, memory + bytes) with `workers` threads, an equal share each, and returns the sum of its words.
uint64_t read_memory(const void* memory, size_t bytes, int workers);

}  // namespace flashmoe
