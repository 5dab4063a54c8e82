// Memory of one GPU, as a team of ranks holds it: it grows by fresh allocations, and lies still once a captured graph
// may replay into it.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "runtime/cuda_order.h"

namespace flashmoe {

struct DeviceBuffer {
  std::byte* data = nullptr;
  size_t bytes = 0;
};

class DeviceMemory {
 public:
  DeviceMemory(int device, CallOrder& order) : device_(device), order_(order) {
    const OnDevice here(device_);
    // A stream of its own: the caller's may be in a capture, and work on the default stream would wait for others.
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }

  // A graph outlives the team that it was captured with, and what it writes to is then leaked.
  ~DeviceMemory() {
    const OutsideCaptures outside;
    cudaStreamDestroy(stream_);
    if (replayable_) return;
    try {
      order_.wait_on_host();
    } catch (const std::runtime_error&) {
      return;  // the context is lost, and the memory with it
    }
    for (void* data : on_device_) cudaFree(data);
    for (void* data : on_host_) cudaFreeHost(data);
  }

  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // Before a call asks for memory. From the first captured call on nothing is moved or freed any more.
  void begin_call(bool in_capture) {
    in_capture_ = in_capture;
    replayable_ = replayable_ || in_capture;
  }

  // Some graph may be replayed at any time, also after this is gone.
  bool is_replayable() const { return replayable_; }

  DeviceBuffer zeroed(size_t bytes) {
    if (in_capture_)
      throw std::runtime_error(
          "flashmoe: this call needs memory on the GPU that none before it needed, and while a CUDA graph is captured "
          "there is none to be had. Make one call of the same layer, shapes and dtype before the capture");
    return apart(bytes);
  }

  // Memory that no graph knows of: to be had and given back also while one is captured.
  DeviceBuffer apart(size_t bytes) {
    const OutsideCaptures outside;
    void* data = nullptr;
    on_device_.reserve(on_device_.size() + 1);
    const std::string what = "cudaMalloc of " + std::to_string(bytes) + " bytes (what a caching allocator keeps is taken)";
    check_cuda(cudaMalloc(&data, std::max<size_t>(bytes, 16)), what.c_str());
    on_device_.push_back(data);
    check_cuda(cudaMemsetAsync(data, 0, bytes, stream_), "cudaMemsetAsync");
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    return {static_cast<std::byte*>(data), bytes};
  }

  template <class T>
  T* copy_of(const std::vector<T>& values) {
    const DeviceBuffer buffer = zeroed(values.size() * sizeof(T));
    const OutsideCaptures outside;
    check_cuda(cudaMemcpyAsync(buffer.data, values.data(), buffer.bytes, cudaMemcpyHostToDevice, stream_),
               "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    return reinterpret_cast<T*>(buffer.data);
  }

  template <class T>
  std::vector<T> read(const void* data, size_t count) {
    const OutsideCaptures outside;
    std::vector<T> values(count);
    check_cuda(cudaMemcpyAsync(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost, stream_),
               "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    return values;
  }

  // Host memory that the device writes: where it is for the host, and for the device.
  template <class T>
  std::pair<T*, T*> host_mapped(size_t count) {
    const OutsideCaptures outside;
    void *host = nullptr, *device = nullptr;
    on_host_.reserve(on_host_.size() + 1);
    check_cuda(cudaHostAlloc(&host, count * sizeof(T), cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
    on_host_.push_back(host);
    std::fill_n(static_cast<T*>(host), count, T{});
    check_cuda(cudaHostGetDevicePointer(&device, host, 0), "cudaHostGetDevicePointer");
    return {static_cast<T*>(host), static_cast<T*>(device)};
  }

  // Its content is lost when it grows. Growing waits for the calls under way, unless a graph keeps the old memory.
  void at_least(DeviceBuffer& buffer, size_t bytes) {
    if (bytes <= buffer.bytes) return;
    // Half as much again spares the next call that is a little larger; of much memory that is too much to set aside.
    const size_t grown = std::max(bytes, buffer.bytes + std::min(buffer.bytes / 2, kMostAhead));
    give_up(buffer);
    buffer = zeroed(grown);
  }

  void give_up(DeviceBuffer& buffer) {
    if (!buffer.data || in_capture_) return;
    if (replayable_)
      buffer = {};
    else
      give_back(buffer);
  }

  // Of memory that no graph holds. Waits for the calls under way.
  void give_back(DeviceBuffer& buffer) {
    void* data = std::exchange(buffer, {}).data;
    if (!data) return;
    const OutsideCaptures outside;
    order_.wait_on_host();
    std::erase(on_device_, data);
    check_cuda(cudaFree(data), "cudaFree");
  }

 private:
  static constexpr size_t kMostAhead = size_t(256) << 20;

  int device_;
  CallOrder& order_;
  cudaStream_t stream_ = nullptr;
  bool in_capture_ = false, replayable_ = false;
  std::vector<void*> on_device_, on_host_;
};

}  // namespace flashmoe
