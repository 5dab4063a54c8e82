// The whole kernel with the Hopper engine: what nvcc, ptxas and the SASS say of it is the test.
//   nvcc -std=c++20 -O3 -DNDEBUG -I csrc -Xptxas -v -gencode arch=compute_90a,code=sm_90a -c tests/cuda/sm90_compile.cu
// There may be no spill, no message C7504, C7509 or C7510 (registers that stay where they are, products that wait for
// each other), and in the SASS no CALL.
#include "engine/sm90.h"
#include "kernel/worker.h"
#include "platform/cuda.h"

namespace flashmoe::gpu {

template <class E>
using Sm90Worker = Worker<CudaPlatform, E>;

template <class E>
__global__ void __launch_bounds__(Sm90Worker<E>::kThreads, 1)
    moe(RankState* ranks, const __grid_constant__ typename E::Operands operands) {
  Sm90Worker<E>::run(ranks, 1, shared_memory(), &operands);
}

template <class E>
std::string launch(RankState* ranks, const Call& call, int blocks) {
  constexpr size_t kSharedBytes = sizeof(typename Sm90Worker<E>::Shared);
  static_assert(kSharedBytes <= 227 << 10, "more shared memory than a block may have");
  typename E::Operands operands;
  const std::string error = E::make_operands(&operands, call);
  if (!error.empty()) return error;
  cudaFuncSetAttribute(moe<E>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kSharedBytes));
  moe<E><<<blocks, Sm90Worker<E>::kThreads, kSharedBytes>>>(ranks, operands);
  return {};
}

template std::string launch<Sm90Engine<DType::kBFloat16>>(RankState*, const Call&, int);
#if !defined(FLASHMOE_ONE_KERNEL)
template std::string launch<Sm90Engine<DType::kFloat16>>(RankState*, const Call&, int);
template std::string launch<Sm90Engine<DType::kBFloat16, 128, 6>>(RankState*, const Call&, int);
#endif

}  // namespace flashmoe::gpu
