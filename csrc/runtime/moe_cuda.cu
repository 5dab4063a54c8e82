// The CUDA runtime of one GPU: a call is two launches, on memory that outlives it; failures are reported by the next.
#include "runtime/moe_cuda.h"

#include "runtime/call_of.h"
#include "runtime/cuda_begin.h"
#include "runtime/cuda_choice.h"
#include "runtime/cuda_counts.h"
#include "runtime/cuda_placement.h"
#include "runtime/cuda_ranks.h"
#include "runtime/cuda_trace.h"

namespace flashmoe {
namespace {

// Row blocks between their up and down tiles: work for every block, also where a row block is worth few tiles.
constexpr uint32_t kRingBlocks = 64;
// What the ids as int32 are rounded up to, before the workspace.
constexpr size_t kAlign = 256;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Before anything else touches the driver, which may not be there.
int checked_device(int device) {
  int devices = 0;
  check_cuda(cudaGetDeviceCount(&devices), "looking for GPUs");
  if (device < 0 || device >= devices) bad_argument("device must lie in [0, ", devices, "), got ", device);
  const int capability = attribute(cudaDevAttrComputeCapabilityMajor, device);
  if (capability < 8)
    throw std::runtime_error("flashmoe: GPU " + std::to_string(device) + " has compute capability " +
                             std::to_string(capability) + ".x, 8.0 is the least");
  return device;
}

uint64_t nanoseconds(double seconds) { return uint64_t(std::min(seconds, 1e9) * 1e9); }

}  // namespace

class CudaTeam::Impl {
 public:
  explicit Impl(const CudaOptions& options)
      : options_(options),
        device_(checked_device(options.device)),
        limits_(options.limits.value_or(Limits{1, 0, 0, 1, 0, true})),
        ep_size_(limits_.ep_size),
        ranks_(options, ep_size_),
        layout_(limits_),
        order_(CallOrder::of_device(device_)),
        memory_(device_, order_),
        failures_(ranks_, memory_),
        trace_(memory_),
        counts_(memory_, ep_size_) {
    if (ranks_.count() > kMaxVirtualRanks)
      bad_argument("ep_size must be at most ", kMaxVirtualRanks, " on one GPU, got ", ep_size_);
    if (options.missing_ranks < 0 || options.missing_ranks >= ep_size_)
      bad_argument("missing_ranks must lie in [0, ", ep_size_, "), got ", options.missing_ranks);
    const OnDevice here(device_);
    capability_ = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device_) +
                  attribute(cudaDevAttrComputeCapabilityMinor, device_);
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device_);
    size_t free_bytes, bytes;
    check_cuda(cudaMemGetInfo(&free_bytes, &bytes), "cudaMemGetInfo");
    backward_bytes_ = options.backward_bytes ? options.backward_bytes : bytes / 4 / ranks_.count();
    blocks_per_rank_ = (multiprocessors - options.sm_margin) / ranks_.count();
    if (options.sm_margin < 0 || blocks_per_rank_ < 1)
      bad_argument("sm_margin must leave each of ", ranks_.count(), " ranks one of the ", multiprocessors,
                   " multiprocessors, got ", options.sm_margin);
    workspaces_.resize(ranks_.count());
    if (!options.peers) heaps_.resize(ep_size_);
    if (options.limits) lay_out(limits_, layout_.bytes);
  }

  // What peers may still write to is never given back: after a failure, and where a graph may be replayed.
  ~Impl() {
    if (options_.keep.empty()) return;
    bool may_be_written = memory_.is_replayable();
    try {
      const std::lock_guard lock(order_.mutex);
      order_.wait_on_host();
      may_be_written = may_be_written || failures_.any();
    } catch (const std::exception&) {
      may_be_written = true;  // the context is lost
    }
    if (may_be_written) new std::vector(options_.keep);
  }

  // `grads`: of backward calls, by rank; of forward calls empty.
  void call(const std::vector<ForwardArgs>& args, const std::vector<Gradients>& grads, cudaStream_t stream, bool tf32) {
    const std::lock_guard lock(order_.mutex);
    failures_.raise_if_any();
    const int ranks = ranks_.count() - options_.missing_ranks;
    if (int(args.size()) != ranks) bad_argument("a call needs the arguments of ", ranks, " ranks, got ", args.size());
    for (const ForwardArgs& a : args) check_rank(a, args[0]);
    const bool backward = !grads.empty();
    if (backward && !limits_.backward)
      bad_argument("flashmoe group '", ranks_.name(), "' has no memory for backward calls");
    const OnDevice here(device_);
    const CallOrder::Capture capture = CallOrder::capture_of(stream);
    if (capture.active) trace_.refuse();
    memory_.begin_call(capture.active);
    if (!options_.limits) grow(args[0], backward);

    const CudaKernel kernel = kernel_of(choose(args, grads, tf32), args[0].dtype, ranks_.all_mapped());
    BeginCall begin{};
    begin.machine = {.staged = !ranks_.all_mapped(),
                     .stage = options_.peers ? options_.peers->stage : nullptr,
                     .max_ring_blocks = kRingBlocks,
                     .max_backward_blocks = most_backward_blocks(args[0], kernel.hidden_bytes),
                     .num_workers = uint32_t(blocks_per_rank_),
                     .plan_warps = kernel.crew_warps,
                     .hidden_bytes = kernel.hidden_bytes};
    CudaLaunch launch{states_, {}, blocks_per_rank_, stream, [&] { return launch_begin(states_, ranks, begin, stream); }};
    for (int i = 0; i < ranks; ++i) {
      prepare(args[i], backward ? &grads[i] : nullptr, i, begin.machine, begin.rank[i]);
      launch.calls.push_back(begin.rank[i].call);
      launch.calls[i].rank_begin = placements_.of(args[i], ep_size_, ranks_[i], memory_).rank_begin.data();
    }
    order_.enter(stream, capture);
    const std::string error = kernel.launch(launch);
    if (!error.empty()) cudaGetLastError();
    // Also after an error, since the first launch may be under way; but of a capture the first error is to be told.
    if (error.empty() || !capture.active) order_.leave(stream, capture);
    if (!error.empty()) throw std::runtime_error("flashmoe: " + error);
  }

  void check() {
    const std::lock_guard lock(order_.mutex);
    failures_.raise_if_any();
  }

  std::optional<GroupStats> stats(int layer, int rank) {
    const std::lock_guard lock(order_.mutex);
    const OnDevice here(device_);
    return counts_.stats(layer, rank);
  }

  void set_trace(uint32_t max_events) {
    const std::lock_guard lock(order_.mutex);
    const OnDevice here(device_);
    trace_.set(max_events, ranks_.count(), blocks_per_rank_);
  }

  std::vector<std::vector<CudaTraceList>> trace() {
    const std::lock_guard lock(order_.mutex);
    const OnDevice here(device_);
    order_.wait_on_host();
    return trace_.read();
  }

 private:
  void check_rank(const ForwardArgs& a, const ForwardArgs& first) const {
    check_shapes(a, limits_, !options_.limits);
    if (a.dtype != first.dtype || a.hidden_size != first.hidden_size ||
        a.intermediate_size != first.intermediate_size || a.gated != first.gated)
      bad_argument("virtual ranks must call one layer: dtype, hidden_size, intermediate_size and gated differ");
  }

  CudaKernelKind choose(const std::vector<ForwardArgs>& args, const std::vector<Gradients>& grads, bool tf32) const {
    const ForwardArgs& first = args[0];
    CudaProblem p{capability_, first.dtype, first.hidden_size, first.intermediate_size, true, 0, first.num_experts, tf32,
                  options_.exact, !grads.empty()};
    for (const ForwardArgs& a : args) {
      // Of other processes' tokens none is known here: they are taken for as many as mine.
      p.num_pairs += (long long)a.num_tokens * a.top_k * (ranks_.several_processes() ? ep_size_ : 1);
      p.aligned = p.aligned && begin_aligned(a);
    }
    for (const Gradients& grad : grads) p.aligned = p.aligned && begin_aligned(grad);
    return choose_kernel(p);
  }

  // A lone rank's rows are its own, however many.
  uint32_t most_backward_blocks(const ForwardArgs& a, int hidden_bytes) const {
    const size_t row = backward_hidden_width(call_of(a, nullptr, 1, 0, 0)) * hidden_bytes;
    const size_t most = ep_size_ == 1 ? ~uint32_t(0) : std::max<size_t>(1, backward_bytes_ / (row * kBlockM));
    return uint32_t(std::min<size_t>(most, ~uint32_t(0)));
  }

  // The heap of a lone rank follows its calls, as on the host: of its table only the signals depend on the limits, by
  // the number of results and of experts; results come last, so that their bytes move nothing.
  void grow(const ForwardArgs& a, bool backward) {
    const int results = a.num_tokens * a.top_k;
    Limits wanted = limits_;
    if (results > wanted.max_tokens) wanted.max_tokens = std::max(results, std::min(wanted.max_tokens, 1 << 29) / 2 * 3);
    wanted.max_experts = std::max(wanted.max_experts, a.num_experts);
    const bool fits = wanted.max_tokens == limits_.max_tokens && wanted.max_experts == limits_.max_experts;
    const size_t row = size_t(a.hidden_size) * dtype_bytes(a.dtype);
    const size_t bytes = HeapLayout(wanted).results + results * (backward ? backward_result_bytes(row) : row);
    const size_t now = heaps_[0].bytes;
    if (!states_ || !fits || bytes > now) lay_out(wanted, bytes > now ? std::max(bytes, now + now / 2) : now);
  }

  // Fresh heaps, since a new table gives old words new meanings. Graphs go on with the old ones, and with the ranks
  // and epochs that belong to those. Of several processes' ranks the heaps are made elsewhere, once.
  void lay_out(const Limits& limits, size_t heap_bytes) {
    const HeapLayout layout(limits);
    states_ = nullptr;
    std::vector<std::byte*> heaps;
    if (options_.peers) heaps = options_.peers->mapped;
    for (DeviceBuffer& heap : heaps_) {
      memory_.give_up(heap);
      heap = memory_.zeroed(heap_bytes);
      heaps.push_back(heap.data);
    }
    Call none{};
    const int32_t nothing[2] = {};
    none.ep_size = 1, none.rank_begin = nothing;
    const Workspace no_workspace(none, layout, Machine{}, nullptr);
    const Deadlines deadlines{nanoseconds(options_.timeout_s), nanoseconds(options_.entry_timeout_s)};
    Peers peers{memory_.copy_of(heaps), nullptr, nullptr};
    if (!ranks_.all_mapped()) {
      peers.symmetric = memory_.copy_of(options_.peers->symmetric);
      peers.pes = memory_.copy_of(options_.peers->pes);
    }
    std::vector<gpu::RankState> states;
    for (int i = 0; i < ranks_.count(); ++i)
      states.push_back({{}, layout, no_workspace, peers, deadlines, 0, {}, failures_.on_device(i)});
    states_ = memory_.copy_of(states);
    limits_ = limits, layout_ = layout;
  }

  // What the i-th rank's block of the begin kernel needs, and the memory of its call.
  void prepare(const ForwardArgs& a, const Gradients* grad, int i, const Machine& machine, BeginRank& begin) {
    const int rank = ranks_[i];
    const Placement& placement = placements_.of(a, ep_size_, rank, memory_);
    const int local = placement.rank_begin[rank + 1] - placement.rank_begin[rank];
    if (local != a.num_local_experts)
      bad_argument("gate_up_proj and down_proj of rank ", rank, " must hold ", local, " experts, got ",
                   a.num_local_experts);
    Call& c = begin.call;
    c = call_of(a, grad, ep_size_, rank, placement.digest);
    c.expert_position = placement.device_position;
    c.rank_begin = placement.rank_begin.data();  // for the host, which measures
    const size_t ids_bytes = round_up(size_t(a.num_tokens) * a.top_k * sizeof(int32_t), kAlign);
    memory_.at_least(workspaces_[i], ids_bytes + Workspace(c, layout_, machine, nullptr).bytes);
    const CudaCounts::OfCall counts = counts_.of(a.layer, i, local);

    c.rank_begin = placement.device_rank_begin;
    begin.ids = a.topk_ids, begin.ids_bytes = a.topk_ids_bytes;
    begin.ids_out = reinterpret_cast<int32_t*>(workspaces_[i].data);
    c.topk_ids = begin.ids_out;
    begin.workspace = workspaces_[i].data + ids_bytes;
    begin.row_offset = counts.row_offset, begin.sent = counts.sent;
    begin.trace = trace_.of(i);
  }

  const CudaOptions options_;
  const int device_;
  Limits limits_;
  const int ep_size_;
  const CudaRanks ranks_;
  HeapLayout layout_;
  int blocks_per_rank_ = 0, capability_ = 0;
  size_t backward_bytes_ = 0;
  CallOrder& order_;
  DeviceMemory memory_;
  CudaFailures failures_;
  CudaTrace trace_;
  CudaCounts counts_;
  std::vector<DeviceBuffer> heaps_, workspaces_;  // of the ranks that are here
  gpu::RankState* states_ = nullptr;              // likewise, on the device
  Placements placements_;
};

CudaTeam::CudaTeam(const CudaOptions& options) : impl_(std::make_unique<Impl>(options)) {}
CudaTeam::~CudaTeam() = default;
size_t CudaTeam::stage_bytes(const Limits& limits) {
  return flashmoe::stage_bytes(HeapLayout(limits), kRingBlocks);
}
void CudaTeam::forward(const std::vector<ForwardArgs>& ranks, void* stream, bool tf32) {
  impl_->call(ranks, {}, static_cast<cudaStream_t>(stream), tf32);
}
void CudaTeam::backward(const std::vector<ForwardArgs>& ranks, const std::vector<Gradients>& grads, void* stream) {
  if (grads.size() != ranks.size() || grads.empty())
    bad_argument("a backward call needs the gradients of every rank that calls, got ", grads.size(), " of ", ranks.size());
  impl_->call(ranks, grads, static_cast<cudaStream_t>(stream), false);
}
void CudaTeam::check() { impl_->check(); }
std::optional<GroupStats> CudaTeam::stats(int layer, int rank) { return impl_->stats(layer, rank); }
void CudaTeam::set_trace(uint32_t max_events) { impl_->set_trace(max_events); }
std::vector<std::vector<CudaTraceList>> CudaTeam::trace() { return impl_->trace(); }

int num_cuda_devices() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return devices;
  cudaGetLastError();
  return 0;
}

}  // namespace flashmoe
