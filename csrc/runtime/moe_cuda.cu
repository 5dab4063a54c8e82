// The CUDA runtime of one GPU: memory that outlives calls, two launches per call, and failures reported by the next.
#include "runtime/moe_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "runtime/check.h"
#include "runtime/cuda_kernel.h"
#include "runtime/failure_report.h"

namespace flashmoe {
namespace {

constexpr int kBeginThreads = 512;
// Row blocks between their up and down tiles: work for every block, also where a row block is worth few tiles.
constexpr uint32_t kRingBlocks = 64;

// Ids as the protocol knows them: int32, -1 for dropped.
template <class Id>
__device__ void take_device_ids(const void* ids, int pairs, int num_experts, int32_t* out) {
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    const long long id = static_cast<const Id*>(ids)[i];
    out[i] = id < 0 || id >= num_experts ? -1 : int32_t(id);
  }
}

__global__ void begin_kernel(gpu::RankState* rank, Call call, Workspace workspace, const void* ids, int ids_bytes,
                             int32_t* ids_out) {
  const int pairs = call.num_tokens * call.top_k;
  if (ids_bytes == 8)
    take_device_ids<int64_t>(ids, pairs, call.num_experts, ids_out);
  else
    take_device_ids<int32_t>(ids, pairs, call.num_experts, ids_out);
  gpu::begin_call(gpu::WholeBlock{}, *rank, call, workspace);
}

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

// Device memory, zeroed.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) {
    check_cuda(cudaMalloc(&data_, std::max<size_t>(bytes, 16)), "cudaMalloc");
    check_cuda(cudaMemset(data_, 0, bytes), "cudaMemset");
  }
  DeviceBuffer(DeviceBuffer&& o) noexcept { *this = std::move(o); }
  DeviceBuffer& operator=(DeviceBuffer&& o) noexcept {
    std::swap(data_, o.data_), std::swap(bytes_, o.bytes_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }  // waits for the kernels that use it
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

template <class T>
DeviceBuffer on_device(const std::vector<T>& values) {
  DeviceBuffer buffer(values.size() * sizeof(T));
  check_cuda(cudaMemcpy(buffer.data(), values.data(), buffer.bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  return buffer;
}

struct Placement {
  std::vector<int32_t> position, rank_begin;
  DeviceBuffer device_position, device_rank_begin;
};

}  // namespace

class CudaTeam::Impl {
 public:
  explicit Impl(const CudaOptions& options) : options_(options), layout_(options.limits) {
    const OnDevice here(options.device);
    const int ep_size = options.limits.ep_size;
    int multiprocessors = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, options.device),
               "cudaDeviceGetAttribute");
    if (ep_size > kMaxVirtualRanks)
      bad_argument("ep_size must be at most ", kMaxVirtualRanks, " on one GPU, got ", ep_size);
    check_cuda(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, options.device),
               "cudaDeviceGetAttribute");
    blocks_per_rank_ = std::max(1, multiprocessors - options.sm_margin) / ep_size;
    if (blocks_per_rank_ < 1)
      bad_argument("ep_size must be at most the ", multiprocessors, " multiprocessors of the device, got ", ep_size);

    check_cuda(cudaHostAlloc(&failures_, ep_size * sizeof(Status), cudaHostAllocMapped | cudaHostAllocPortable),
               "cudaHostAlloc");
    std::fill_n(failures_, ep_size, Status{});
    Status* device_failures = nullptr;
    check_cuda(cudaHostGetDevicePointer(&device_failures, failures_, 0), "cudaHostGetDevicePointer");
    std::vector<std::byte*> heaps;
    for (int r = 0; r < ep_size; ++r) heaps_.emplace_back(layout_.bytes), heaps.push_back(heaps_.back().data());
    heap_table_ = on_device(heaps);
    const Deadlines deadlines{uint64_t(options.timeout_s * 1e9), uint64_t(options.entry_timeout_s * 1e9)};
    Call none{};
    const int32_t nothing[2] = {};
    none.ep_size = 1, none.rank_begin = nothing;
    const Workspace no_workspace(none, layout_, Machine{}, nullptr);
    std::vector<gpu::RankState> ranks;
    for (int r = 0; r < ep_size; ++r)
      ranks.push_back({{}, layout_, no_workspace, reinterpret_cast<std::byte* const*>(heap_table_.data()), deadlines, 0,
                       {}, device_failures + r});
    ranks_ = on_device(ranks);
    workspaces_.resize(ep_size), ids_.resize(ep_size), calls_.resize(ep_size);
  }

  ~Impl() { cudaFreeHost(failures_); }

  void forward(const std::vector<ForwardArgs>& args, cudaStream_t stream) {
    std::lock_guard lock(mutex_);
    const int ep_size = options_.limits.ep_size;
    raise_failure();
    if (int(args.size()) != ep_size)
      bad_argument("a call needs the arguments of ", ep_size, " ranks, got ", args.size());
    for (const ForwardArgs& a : args) check_rank(a, args[0]);
    const OnDevice here(options_.device);
    const DType dtype = args[0].dtype;
    const bool hopper = major_ == 9 && dtype != DType::kFloat32 && !options_.exact;
    const CudaKernel kernel = hopper ? sm90_kernel(dtype, Sm90Tiles::kWide) : exact_kernel(dtype);
    const Machine machine{.max_ring_blocks = kRingBlocks, .plan_warps = kernel.crew_warps,
                          .hidden_bytes = kernel.hidden_bytes};
    CudaLaunch launch{ranks(), {}, blocks_per_rank_, stream};
    std::vector<Workspace> workspaces;
    for (int r = 0; r < ep_size; ++r) {
      calls_[r] = make_call(args[r], r);
      launch.calls.push_back(calls_[r]);
      launch.calls[r].rank_begin = placement_of(args[r], r).rank_begin.data();
      const Call& call = launch.calls[r];
      const size_t bytes = Workspace(call, layout_, machine, nullptr).bytes;
      workspaces.emplace_back(call, layout_, machine, at_least(workspaces_[r], bytes));
    }
    for (int r = 0; r < ep_size; ++r)
      begin_kernel<<<1, kBeginThreads, 0, stream>>>(ranks() + r, calls_[r], workspaces[r], args[r].topk_ids,
                                                    args[r].topk_ids_bytes, const_cast<int32_t*>(calls_[r].topk_ids));
    check_cuda(cudaGetLastError(), "launch of begin_kernel");
    if (const std::string error = kernel.launch(launch); !error.empty()) throw std::runtime_error(error);
  }

 private:
  gpu::RankState* ranks() const { return reinterpret_cast<gpu::RankState*>(ranks_.data()); }

  void raise_failure() const {
    for (int r = 0; r < options_.limits.ep_size; ++r) {
      // Its last word: 2 once the device has written all of it.
      if (*const_cast<const volatile uint32_t*>(&failures_[r].claimed) != 2) continue;
      Call call = calls_[r];
      call.epoch = failures_[r].epoch;
      GroupOptions group;
      group.name = "cuda:" + std::to_string(options_.device);
      throw PeerError(describe_failure(group, call, failures_[r]));
    }
  }

  void check_rank(const ForwardArgs& a, const ForwardArgs& first) const {
    check_shapes(a, options_.limits, false);
    const int item = dtype_bytes(a.dtype);
    if (a.hidden_size * item % 16 || a.intermediate_size * item % 16)
      bad_argument("hidden_size and intermediate_size must be multiples of ", 16 / item, " on a GPU, got ",
                   a.hidden_size, " and ", a.intermediate_size);
    for (const void* rows : {a.x, static_cast<const void*>(a.y), a.gate_up_proj, a.down_proj})
      if (reinterpret_cast<uintptr_t>(rows) % 16)
        bad_argument("x, y and the weights must be aligned to 16 bytes on a GPU");
    if (a.dtype != first.dtype || a.hidden_size != first.hidden_size ||
        a.intermediate_size != first.intermediate_size || a.gated != first.gated)
      bad_argument("virtual ranks must call one layer: dtype, hidden_size, intermediate_size and gated differ");
  }

  // Placements are few: each stays on the device once it has been seen.
  const Placement& placement_of(const ForwardArgs& a, int rank) {
    std::vector<int32_t> key{a.num_experts, rank};
    if (a.expert_map) key.insert(key.end(), a.expert_map, a.expert_map + a.num_experts);
    const auto known = placements_.find(key);
    if (known != placements_.end()) return known->second;
    Placement p;
    p.position.resize(a.num_experts), p.rank_begin.resize(options_.limits.ep_size + 1);
    take_placement(a, options_.limits.ep_size, rank, p.position.data(), p.rank_begin.data());
    p.device_position = on_device(p.position), p.device_rank_begin = on_device(p.rank_begin);
    return placements_.emplace(std::move(key), std::move(p)).first->second;
  }

  Call make_call(const ForwardArgs& a, int rank) {
    const Placement& placement = placement_of(a, rank);
    const int ep_size = options_.limits.ep_size;
    const int local = placement.rank_begin[rank + 1] - placement.rank_begin[rank];
    if (local != a.num_local_experts)
      bad_argument("gate_up_proj and down_proj of rank ", rank, " must hold ", local, " experts, got ",
                   a.num_local_experts);
    Call c{};
    c.ep_size = ep_size, c.ep_rank = rank;
    c.tag = {a.layer, a.hidden_size, a.intermediate_size, a.num_experts,
             placement_digest(placement.position.data(), placement.rank_begin.data(), a.num_experts, ep_size),
             uint8_t(a.dtype), uint8_t(a.activation), uint8_t(a.gated),
             uint8_t((a.gate_up_bias ? 1 : 0) | (a.down_bias ? 2 : 0))};
    c.num_tokens = a.num_tokens, c.top_k = a.top_k, c.num_experts = a.num_experts;
    c.hidden_size = a.hidden_size, c.intermediate_size = a.intermediate_size;
    c.dtype = a.dtype, c.activation = a.activation, c.gated = a.gated;
    c.expert_position = reinterpret_cast<const int32_t*>(placement.device_position.data());
    c.rank_begin = reinterpret_cast<const int32_t*>(placement.device_rank_begin.data());
    c.x = static_cast<const std::byte*>(a.x), c.y = static_cast<std::byte*>(a.y), c.topk_weights = a.topk_weights;
    const size_t id_bytes = size_t(a.num_tokens) * a.top_k * sizeof(int32_t);
    c.topk_ids = reinterpret_cast<const int32_t*>(at_least(ids_[rank], id_bytes));
    c.gate_up_proj = static_cast<const std::byte*>(a.gate_up_proj);
    c.gate_up_bias = static_cast<const std::byte*>(a.gate_up_bias);
    c.down_proj = static_cast<const std::byte*>(a.down_proj);
    c.down_bias = static_cast<const std::byte*>(a.down_bias);
    return c;
  }

  // Grows by a fresh allocation; a call that is under way keeps the old one, since cudaFree waits for it.
  static std::byte* at_least(DeviceBuffer& buffer, size_t bytes) {
    if (bytes > buffer.bytes()) buffer = DeviceBuffer(bytes + bytes / 2);
    return buffer.data();
  }

  CudaOptions options_;
  HeapLayout layout_;
  int blocks_per_rank_ = 0, major_ = 0;
  mutable std::mutex mutex_;
  Status* failures_ = nullptr;  // host memory that the device writes
  std::vector<DeviceBuffer> heaps_, workspaces_, ids_;
  DeviceBuffer heap_table_, ranks_;
  std::map<std::vector<int32_t>, Placement> placements_;
  std::vector<Call> calls_;
};

CudaTeam::CudaTeam(const CudaOptions& options) : impl_(std::make_unique<Impl>(options)) {}
CudaTeam::~CudaTeam() = default;
void CudaTeam::forward(const std::vector<ForwardArgs>& ranks, void* stream) {
  impl_->forward(ranks, static_cast<cudaStream_t>(stream));
}

int num_cuda_devices() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess ? devices : 0;
}

}  // namespace flashmoe
