// What every use of the CUDA runtime needs: errors as exceptions, and guards that leave the calling thread as it was.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace flashmoe {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next to ask takes it for its own
  throw std::runtime_error(std::string("flashmoe: ") + what + ": " + cudaGetErrorString(error));
}

// Makes the device the current one; the caller's comes back afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0, device_;
};

// What happens meanwhile is no part of a graph that any thread captures, and does not disturb its capture.
class OutsideCaptures {
 public:
  OutsideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace flashmoe
