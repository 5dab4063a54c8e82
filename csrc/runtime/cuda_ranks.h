// Which ranks of a group are computed here, what messages call them, and what they have reported.
#pragma once

#include <atomic>

#include "runtime/check.h"
#include "runtime/cuda_kernel.h"
#include "runtime/cuda_memory.h"
#include "runtime/failure_report.h"
#include "runtime/moe_cuda.h"

namespace flashmoe {

// All ranks of a team of virtual ranks, or one rank of a group of several processes.
class CudaRanks {
 public:
  CudaRanks(const CudaOptions& options, int ep_size)
      : device_(options.device), ep_size_(ep_size), several_processes_(options.peers.has_value()) {
    group_.name = "cuda:" + std::to_string(device_);
    if (!several_processes_) return;
    const CudaPeers& peers = *options.peers;
    const size_t ranks = size_t(ep_size);
    if (!options.limits) bad_argument("limits must be given for a group of several processes");
    if (options.missing_ranks) bad_argument("missing_ranks are virtual ranks, and this group is of several processes");
    if (peers.ep_rank < 0 || peers.ep_rank >= ep_size)
      bad_argument("ep_rank must lie in [0, ", ep_size, "), got ", peers.ep_rank);
    if (peers.global_ranks.size() != ranks || peers.mapped.size() != ranks)
      bad_argument("global_ranks and mapped must have one entry for each of the ", ep_size, " ranks, got ",
                   peers.global_ranks.size(), " and ", peers.mapped.size());
    group_.name = peers.name, group_.global_ranks = peers.global_ranks;
    first_ = peers.ep_rank;
    for (int rank = 0; rank < ep_size; ++rank) check_heap(peers, rank);
    if (!all_mapped_) check_transport(peers, CudaTeam::stage_bytes(*options.limits));
  }

  int ep_size() const { return ep_size_; }
  int count() const { return several_processes_ ? 1 : ep_size_; }
  // The rank in the group of the i-th that is here.
  int operator[](int i) const { return first_ + i; }
  bool several_processes() const { return several_processes_; }
  bool all_mapped() const { return all_mapped_; }
  const std::string& name() const { return group_.name; }

  // Of the i-th rank's failure.
  [[noreturn]] void raise(int i, const Status& status) const {
    if (ep_size_ == 1 && Failure(status.failure) == Failure::kBadId)
      bad_argument(describe_bad_id(status), ", in an earlier call on cuda:", device_, ", of ", describe_tag(status.tag),
                   "; its results are NaN");
    const char* remedy = "Its results are NaN, and so are those of every later call; a new team can be made";
    if (several_processes_)
      remedy = "Its results are NaN, and so are those of every later call; flashmoe.distributed.init() makes a new group";
    throw PeerError(describe_failure(group_, (*this)[i], status, remedy));
  }

 private:
  void check_heap(const CudaPeers& peers, int rank) {
    const std::byte* heap = peers.mapped[rank];
    if (!heap && rank == peers.ep_rank) bad_argument("the rank's own heap must be mapped");
    if (reinterpret_cast<uintptr_t>(heap) % HeapLayout::kAlign)
      bad_argument("the heap of rank ", rank, " must begin at a multiple of ", HeapLayout::kAlign, " bytes");
    all_mapped_ = all_mapped_ && heap;
    if (!heap && !has_nvshmem_kernels())
      throw std::runtime_error(
          "flashmoe group '" + peers.name + "': the memory of rank " + std::to_string(peers.global_ranks[rank]) +
          " is not mapped on GPU " + std::to_string(device_) + ", and this build has no kernels that reach it otherwise: " +
          "it was built without the headers of NVSHMEM 3.7 or later (FLASHMOE_NVSHMEM_DEVICE_INCLUDE)");
  }
  void check_transport(const CudaPeers& peers, size_t stage_bytes) const {
    const size_t ranks = size_t(ep_size_);
    if (peers.symmetric.size() != ranks || peers.pes.size() != ranks)
      bad_argument("symmetric and pes must have one entry for each of the ", ep_size_, " ranks, got ",
                   peers.symmetric.size(), " and ", peers.pes.size());
    if (!peers.stage || peers.stage_bytes < stage_bytes || reinterpret_cast<uintptr_t>(peers.stage) % HeapLayout::kAlign)
      bad_argument("stage must hold ", stage_bytes, " bytes from a multiple of ", HeapLayout::kAlign, ", got ",
                   peers.stage_bytes, " bytes");
  }

  int device_, ep_size_, first_ = 0;
  bool several_processes_, all_mapped_ = true;
  GroupOptions group_;
};

// What the ranks that are here have reported: host memory that the device writes.
class CudaFailures {
 public:
  CudaFailures(const CudaRanks& ranks, DeviceMemory& memory) : ranks_(ranks) {
    std::tie(host_, device_) = memory.host_mapped<Status>(size_t(ranks.count()));
  }

  Status* on_device(int i) const { return device_ + i; }

  bool any() const {
    for (int i = 0; i < ranks_.count(); ++i)
      if (is_complete(i)) return true;
    return false;
  }

  // The report of an earlier call, if the device has written all of it. Of several ranks' reports the cause is told,
  // not who heard of it.
  void raise_if_any() {
    const Status* cause = nullptr;
    for (int i = 0; i < ranks_.count(); ++i)
      if (is_complete(i) && (!cause || Failure(cause->failure) == Failure::kPeerAborted)) cause = host_ + i;
    if (!cause) return;
    const Status status = *cause;
    // Of a lone rank's bad id the device begins its next call afresh, too.
    if (ranks_.ep_size() == 1 && Failure(status.failure) == Failure::kBadId) std::atomic_ref(host_->claimed).store(0);
    ranks_.raise(int(cause - host_), status);
  }

 private:
  bool is_complete(int i) const { return std::atomic_ref(host_[i].claimed).load(std::memory_order_acquire) == 2; }

  const CudaRanks& ranks_;
  Status *host_ = nullptr, *device_ = nullptr;
};

}  // namespace flashmoe
