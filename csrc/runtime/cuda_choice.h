// Which kernel computes a call: decided from facts that do not depend on the routing, so that a layer's calls of one
// shape have the same bits every time (design D6). Plain arithmetic, for a test without a GPU.
#pragma once

#include "runtime/moe.h"

namespace flashmoe {

enum class CudaKernelKind { kExact, kSm80, kSm90Wide, kSm90Narrow, kExactBackward, kSm80Backward };

struct CudaProblem {
  int compute_capability;  // of the device: 80, 90, 100, ...
  DType dtype;
  int hidden_size, intermediate_size;
  bool aligned;               // begin_aligned of every rank's call
  long long num_pairs;        // tokens times top_k, of all ranks of this launch
  int num_experts;            // likewise
  bool tf32;                  // float32 may be rounded to tf32 for the tensor cores
  bool exact;                 // no tensor cores at all
  bool backward;
};

// Expected rows of an expert up to which Hopper takes narrow tiles. These pass over a block 64 rows at a time and load
// their weights for each pass; few experts have more than 64 rows where 32 are expected, half of them where 64 are.
inline constexpr int kNarrowRows = 32;

// Whether x, y, the weights and the biases begin at multiples of 16 bytes: tensor cores' kernels read all of them more
// than an element at a time.
bool begin_aligned(const ForwardArgs& call);
// Likewise the gradients that come in and those that are asked for.
bool begin_aligned(const Gradients& grad);

CudaKernelKind choose_kernel(const CudaProblem& problem);

}  // namespace flashmoe
