// The order of all calls on one GPU, whatever their streams and teams (design D15): a call waits, on the device, for
// the one before it. They share memory, and each wants all its blocks to run at once.
//
// Within one capture calls follow each other like any captured work. A graph that is replayed waits for the calls that
// were queued before it, and those queued after it wait for the graph, through events that are nodes of the graph. Two
// graphs are not ordered by this: they must be replayed on one stream, or ordered by whoever replays them.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "runtime/cuda_device.h"

namespace flashmoe {

class CallOrder {
 public:
  // Never destroyed: at the end of the process the driver may be gone before us.
  static CallOrder& of_device(int device) {
    static std::mutex making;
    static auto& all = *new std::map<int, std::unique_ptr<CallOrder>>;
    const std::lock_guard lock(making);
    std::unique_ptr<CallOrder>& one = all[device];
    const OnDevice here(device);
    if (!one) one.reset(new CallOrder);
    return *one;
  }

  std::mutex mutex;  // one call is queued at a time

  struct Capture {
    bool active = false;
    unsigned long long id = 0;
  };
  static Capture capture_of(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    Capture capture;
    check_cuda(cudaStreamGetCaptureInfo(stream, &status, &capture.id), "cudaStreamGetCaptureInfo");
    capture.active = status != cudaStreamCaptureStatusNone;
    return capture;
  }

  // Around what a call queues on the stream.
  void enter(cudaStream_t stream, const Capture& capture) {
    if (capture.active) {
      const bool first = capture.id != capture_;
      if (first)
        wait(stream, queued_, cudaEventWaitExternal);
      else
        wait(stream, captured_, cudaEventWaitDefault);
      return;
    }
    if (stream_id(stream) != stream_) wait(stream, queued_, cudaEventWaitDefault);
    if (capture_) wait(stream, replayed_, cudaEventWaitDefault);
  }
  void leave(cudaStream_t stream, const Capture& capture) {
    if (capture.active) {
      record(stream, replayed_, cudaEventRecordExternal);
      record(stream, captured_, cudaEventRecordDefault);  // after that node, so that who waits for this joins it too
      capture_ = capture.id;
    } else {
      record(stream, queued_, cudaEventRecordDefault);
      stream_ = stream_id(stream);
    }
  }

  // Until the calls queued so far are done; replays of graphs are not among them.
  void wait_on_host() { check_cuda(cudaEventSynchronize(queued_), "cudaEventSynchronize"); }

 private:
  CallOrder() {
    for (cudaEvent_t* event : {&queued_, &captured_, &replayed_})
      check_cuda(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }

  // Unlike the handle, it never names another stream later.
  static unsigned long long stream_id(cudaStream_t stream) {
    unsigned long long id = 0;
    check_cuda(cudaStreamGetId(stream, &id), "cudaStreamGetId");
    return id;
  }
  static void wait(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    check_cuda(cudaStreamWaitEvent(stream, event, flags), "cudaStreamWaitEvent");
  }
  static void record(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    check_cuda(cudaEventRecordWithFlags(event, stream, flags), "cudaEventRecordWithFlags");
  }

  // Of the last call: queued on a stream, within a capture, in the replay of a graph.
  cudaEvent_t queued_ = nullptr, captured_ = nullptr, replayed_ = nullptr;
  unsigned long long stream_ = 0, capture_ = 0;
};

}  // namespace flashmoe
