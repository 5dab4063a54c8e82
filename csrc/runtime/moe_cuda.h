// The operator on one GPU: one rank, or several virtual ranks that share it as one grid. Raw device pointers in; the
// work is queued on the caller's stream, and nothing here waits for it.
#pragma once

#include <memory>
#include <vector>

#include "runtime/moe.h"

namespace flashmoe {

struct CudaOptions {
  int device = 0;
  Limits limits;  // ep_size ranks on this GPU, and the most that any call may ask for
  double timeout_s = 60, entry_timeout_s = 600;
  int sm_margin = 0;   // multiprocessors left to others
  bool exact = false;  // products in fp32 also where the tensor cores could make them in 16 bits
};

class CudaTeam {
 public:
  explicit CudaTeam(const CudaOptions& options);
  ~CudaTeam();

  // One call of every rank; ranks[r].expert_map is host memory, all else lies on the device. ids
  // outside [0, num_experts) count as dropped. Rows of x, y and the weights must be multiples of 16 bytes.
  // std::invalid_argument: nothing was queued. PeerError: an earlier call failed; its y is NaN, as is every later one.
  // A captured call must have been made once before with the same shapes: memory does not grow in a capture.
  void forward(const std::vector<ForwardArgs>& ranks, void* stream);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// GPUs that a driver shows; 0 if there is no driver.
int num_cuda_devices();

}  // namespace flashmoe
