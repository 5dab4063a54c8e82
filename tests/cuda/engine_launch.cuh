// An engine alone as a kernel, its launch, and a GPU's memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "engine_alone.h"

namespace flashmoe::test {

inline void must(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

template <class T>
class OnGpu {
 public:
  explicit OnGpu(size_t size) : size_(size) {
    must(cudaMalloc(&data_, size * sizeof(T)), "memory");
    must(cudaMemset(data_, 0xff, size * sizeof(T)), "cudaMemset");  // a float that nobody stores is NaN
  }
  // The values again and again.
  OnGpu(const std::vector<T>& values, size_t size) : OnGpu(size) {
    for (size_t at = 0; at < size; at += values.size())
      must(cudaMemcpy(data_ + at, values.data(), std::min(values.size(), size - at) * sizeof(T),
                      cudaMemcpyHostToDevice), "copy to the GPU");
  }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;
  ~OnGpu() { cudaFree(data_); }

  T* data() const { return data_; }
  const std::byte* bytes() const { return reinterpret_cast<const std::byte*>(data_); }
  std::vector<T> values() const {
    std::vector<T> values(size_);
    must(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "copy from the GPU");
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

template <class Alone>
__global__ void __launch_bounds__(Alone::kThreads, 1) engine_alone(const __grid_constant__ Tiles tiles) {
  Alone::run(tiles, gpu::shared_memory());
}

// Asynchronous. Makes the map, so x and the weights must lie where the tiles say.
template <class Alone>
void launch(Tiles tiles, int num_blocks) {
  if (const std::string error = Alone::make_map(&tiles); !error.empty()) throw std::runtime_error(error);
  constexpr int kSharedBytes = sizeof(typename Alone::Shared);
  must(cudaFuncSetAttribute(engine_alone<Alone>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
       "shared memory");
  engine_alone<Alone><<<num_blocks, Alone::kThreads, kSharedBytes>>>(tiles);
  must(cudaGetLastError(), "launch");
}

}  // namespace flashmoe::test
