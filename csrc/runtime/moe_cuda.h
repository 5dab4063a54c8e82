// The operator on one GPU: one rank alone, one rank of a group of several processes, or several virtual ranks that
// share the GPU as one grid. Raw device pointers in; the work is queued on the caller's stream, after all calls of this
// GPU that were queued before, and nothing here waits for it, except where a call needs more memory than any before it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/moe.h"

namespace flashmoe {

// This process is one rank of a group of several. All addresses are the device's; the heaps lie zeroed before any of
// the group's ranks makes a call.
struct CudaPeers {
  std::string name;  // of the group, for messages
  int ep_rank = 0;
  std::vector<int> global_ranks;      // [ep_size] what messages call the ranks
  std::vector<std::byte*> mapped;     // [ep_size] where each rank's heap of this group is mapped here; null: it is not
  std::vector<std::byte*> symmetric;  // [ep_size] the address of my own by which the transport names that heap; of ranks
                                      // that are not mapped
  std::vector<int> pes;               // [ep_size] the transport's number of each rank
  std::byte* stage = nullptr;         // what the transport can send from; null if all peers are mapped
  size_t stage_bytes = 0;
};

struct CudaOptions {
  int device = 0;
  std::optional<Limits> limits;  // ep_size ranks, and the most that a call may ask for; none: one rank, without limits
  double timeout_s = 60, entry_timeout_s = 600;
  int sm_margin = 0;      // multiprocessors left to others
  bool exact = false;     // products in fp32 also where the tensor cores could make them in 16 bits
  int missing_ranks = 0;  // so many of the last ranks never come, to show what becomes of the others
  size_t backward_bytes = 0;  // what backward calls of several ranks may keep of their rows; 0: a quarter of the GPU's
  std::optional<CudaPeers> peers;           // none: every rank of `limits` is a virtual one, here
  std::vector<std::shared_ptr<void>> keep;  // whatever holds the peers' memory
};

// What one writer noted of a traced call.
struct CudaTraceList {
  std::vector<TraceEvent> events;
  uint32_t count;  // also of those for which there was no room
  uint32_t multiprocessor;
};

class CudaTeam {
 public:
  // std::runtime_error: there is no such GPU, or not enough memory on it.
  explicit CudaTeam(const CudaOptions& options);
  ~CudaTeam();

  // Of the memory from which a rank of such a group sends to peers that are not mapped.
  static size_t stage_bytes(const Limits& limits);

  // One call of every rank that is here; ranks[r].expert_map is host memory, all else lies on the device. With tf32, products of
  // float32 may be rounded to it. Raises what check() raises, and then, as for std::invalid_argument and
  // std::runtime_error, nothing has been queued. A call that is captured must find all its memory: make one call with
  // the same layer, shapes and dtype before.
  void forward(const std::vector<ForwardArgs>& ranks, void* stream, bool tf32);
  // The gradients of such a call, as Group::backward makes them: addresses on the device. Products of float32 are not
  // rounded. What the rows of a rank's experts become stays in memory until the call ends. Of a lone rank it is known
  // how many they are; to one of several, of which check() then raises PeerError, may come more than CudaOptions has
  // memory for.
  void backward(const std::vector<ForwardArgs>& ranks, const std::vector<Gradients>& grads, void* stream);

  // What an earlier call has left, as far as the GPU has come: its y is NaN, and its gradients are.
  // std::invalid_argument: a lone rank got an id that is no expert's; said once, the team goes on.
  // PeerError: anything else; every later call fails likewise.
  void check();

  // Of the last finished call of that layer, replays included; `rank` counts the ranks that are here. Waits for the GPU.
  // None if the layer has not been called.
  std::optional<GroupStats> stats(int layer, int rank);

  // From the next call on each rank's blocks note what they do: at most so many events of each list. 0: no longer. A call
  // that is captured cannot be traced; a graph captured before replays without notes.
  void set_trace(uint32_t max_events);
  // Of the last call since, for which this waits: by rank that is here the lists of kernel/block_trace.h. None
  // while nothing is traced.
  std::vector<std::vector<CudaTraceList>> trace();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// GPUs that a driver shows; 0 if there is no driver.
int num_cuda_devices();

// The modules (CUmodule) of this extension, on the current device, whose kernels call the transport: each must be told
// of the transport's state once that is initialised, and again before it ends. None in a build without such kernels.
std::vector<void*> nvshmem_modules();
// Whether this build has them: without, all peers of a group must be mapped.
bool has_nvshmem_kernels();

}  // namespace flashmoe
