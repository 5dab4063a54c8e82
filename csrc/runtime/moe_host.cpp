// The host runtime: one rank's group as threads over mapped heaps.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>

#include "engine/cpu.h"
#include "platform/host.h"
#include "platform/rehearsal_network.h"
#include "protocol/backward_crew.h"
#include "protocol/moe_kernel.h"
#include "runtime/buffer.h"
#include "runtime/call_of.h"
#include "runtime/check.h"
#include "runtime/failure_report.h"
#include "runtime/kept_sums.h"
#include "runtime/worker_pool.h"

namespace flashmoe {
namespace {

static_assert(TileEngine<CpuEngine>);
using ForwardKernel = MoeKernel<HostPlatform, CpuEngine>;
using BackwardKernel = MoeKernel<HostPlatform, CpuEngine, BackwardCrewOfOne<HostPlatform, CpuEngine>>;

// Thirty years are no different from for ever, and still fit the word.
uint64_t nanoseconds(double seconds) { return uint64_t(std::min(seconds, 1e9) * 1e9); }

// Below this much work a second worker costs more than it brings.
constexpr double kWorkOfOneWorker = 2e6;  // multiply-adds

}  // namespace

class Group::Impl {
 public:
  explicit Impl(GroupOptions options)
      : options_(std::move(options)), num_workers_(options_.num_workers), layout_(options_.limits), epoch_(options_.last_epoch) {
    if (!options_.heaps.empty()) connect();
  }

  // After a failure peers may still write to this heap, and the network still read what was to be sent: neither is
  // ever given back.
  ~Impl() {
    if (!failure_) return;
    new std::vector(options_.keep);
    if (options_.network) new Buffer(std::move(workspace_));
  }

  bool made_here() const { return getpid() == process_; }

  // In a forked child, which has neither the threads nor the mapped memory: destructors would wait for the former.
  // Only the descriptors go, so that the child keeps nobody's memory alive.
  void forget() { options_.keep.clear(); }

  // `grad`: of a backward call, else null. `kept`: what a forward call keeps and a backward call uses, or null.
  void call(const ForwardArgs& args, const Gradients* grad, Kept* kept) {
    if (!made_here())
      throw std::runtime_error("flashmoe group '" + options_.name + "' was made by process " + std::to_string(process_) +
                               ": a forked child has neither its threads nor its memory, and makes a group of its own");
    std::lock_guard lock(mutex_);
    if (failure_) throw PeerError(*failure_);
    const bool alone = options_.limits.ep_size == 1;
    const bool grows = alone && options_.keep.empty();
    check_shapes(args, options_.limits, grows);
    if (grad && !grows && !options_.limits.backward) bad_argument("flashmoe group '", options_.name, "' has no memory for backward calls");
    Call call = make_call(args, grad);
    if (grows) grow(call);
    if (kept) call.kept = grad ? kept->of(call, layout_) : kept->begin(call, layout_);

    const Machine machine{.staged = platform_->staged(), .num_workers = uint32_t(num_workers_)};
    // What a backward call keeps of its rows is as much as the worst skew could bring.
    const size_t bytes = Workspace(call, layout_, machine, nullptr).bytes;
    Workspace ws(call, layout_, machine, workspace_.at_least(bytes, grad != nullptr));
    ws.reset(Alone{}, call, HostPlatform::now_ns());
    platform_->reset_sent();
    run(call, ws);
    if (ws.status->failure) fail(call, ws);
    if (kept && !grad) kept->complete();
    take_stats(call, ws);
  }

  // These wait for no call: who asks may hold what a peer, and so the call, is waiting for.
  GroupStats stats() const {
    std::lock_guard lock(outcome_mutex_);
    return stats_;
  }
  std::optional<std::string> failed() const {
    std::lock_guard lock(outcome_mutex_);
    return failure_;
  }
  void set_trace(uint32_t max_events) {
    std::lock_guard lock(mutex_);
    max_events_ = max_events;
  }
  std::vector<std::vector<TraceEvent>> trace(uint64_t& lost) {
    std::lock_guard lock(mutex_);
    lost = 0;
    std::vector<std::vector<TraceEvent>> workers;
    for (const TraceBuffer& t : traced_) {
      const uint32_t kept = std::min(t.count, t.capacity);
      workers.emplace_back(t.events, t.events + kept);
      lost += t.count - kept;
    }
    return workers;
  }
  const GroupOptions& options() const { return options_; }
  int num_workers() const { return num_workers_; }
  void set_num_workers(int n) { num_workers_ = std::max(1, n); }

 private:
  void connect() {
    std::shared_ptr<HostNetwork> network = options_.network;
    std::vector<std::byte*> mapped = options_.heaps;
    if (options_.remote_only_seed) {
      network = std::make_shared<RehearsalNetwork>(*options_.remote_only_seed, options_.heaps);
      for (std::byte*& heap : mapped)
        if (heap != options_.heaps[options_.ep_rank]) heap = nullptr;
    }
    platform_.emplace(options_.ep_rank, std::move(mapped), options_.pids, std::move(network));
  }

  // W = 1 needs no arena: the heap of a lone rank follows its calls. Of its table only the signals depend on the
  // limits, by the number of results and of experts; results come last, so that their bytes move nothing. A heap for
  // many rows and for wide ones need not hold many wide ones.
  void grow(const Call& call) {
    Limits& l = options_.limits;
    const int results = call.num_tokens * call.top_k;
    const Limits grown{1, std::max(l.max_tokens, results), 0, 1, std::max(l.max_experts, call.num_experts), true};
    const HeapLayout layout(grown);
    const size_t bytes = layout.results + size_t(results) * call.result_bytes();
    if (platform_ && grown.max_tokens == l.max_tokens && grown.max_experts == l.max_experts && bytes <= heap_.bytes())
      return;
    // The new table gives old words new meanings, so no old signal may survive: a fresh heap. Nothing is changed
    // before there is memory for it.
    Buffer heap;
    heap.at_least(bytes);
    l = grown, layout_ = layout;
    std::swap(heap_, heap);
    options_.heaps = {heap_.data()};
    options_.pids = {0};
    connect();
  }

  Call make_call(const ForwardArgs& a, const Gradients* grad) {
    const int ep_size = options_.limits.ep_size;
    ids_.resize(size_t(a.num_tokens) * a.top_k);
    position_.resize(a.num_experts);
    rank_begin_.resize(ep_size + 1);
    take_placement(a, ep_size, options_.ep_rank, position_.data(), rank_begin_.data());
    if (a.topk_ids_bytes == 8)
      take_ids(static_cast<const int64_t*>(a.topk_ids), a, ids_.data());
    else
      take_ids(static_cast<const int32_t*>(a.topk_ids), a, ids_.data());

    const uint32_t placement = placement_digest(position_.data(), rank_begin_.data(), a.num_experts, ep_size);
    Call c = call_of(a, grad, ep_size, options_.ep_rank, placement);
    c.epoch = next_epoch(epoch_);
    c.expert_position = position_.data(), c.rank_begin = rank_begin_.data(), c.topk_ids = ids_.data();
    return c;
  }

  static void prepare_gradients(const Call& call) {
    const size_t matrix = size_t(call.intermediate_size) * call.row_bytes() * call.num_local_experts();
    if (call.grad.gate_up_proj) ask_for_large_pages(call.grad.gate_up_proj, (call.gated ? 2 : 1) * matrix);
    if (call.grad.down_proj) ask_for_large_pages(call.grad.down_proj, matrix);
  }

  void run(const Call& call, Workspace& ws) {
    const CpuEngine::Problem problem{call.dtype, call.activation, call.gated, call.hidden_size, call.intermediate_size};
    const bool backward = call.tag.backward();
    if (backward) prepare_gradients(call);
    const double work = double(call.num_tokens) * call.top_k * call.hidden_size * (double(call.up_rows()) + call.intermediate_size);
    const int workers = work < kWorkOfOneWorker ? 1 : num_workers_.load();
    const size_t scratch_bytes =
        round_up(backward ? CpuEngine::backward_scratch_bytes(problem) : CpuEngine::scratch_bytes(problem), 4096);
    std::byte* scratch = scratch_.at_least(scratch_bytes * workers);
    const Deadlines deadlines{nanoseconds(options_.timeout_s), nanoseconds(options_.entry_timeout_s)};
    const Context<HostPlatform> context{call, layout_, ws, *platform_};
    workers_.reserve(workers);
    traced_.clear();
    if (max_events_) {
      TraceEvent* events = reinterpret_cast<TraceEvent*>(events_.at_least(sizeof(TraceEvent) * max_events_ * workers));
      for (int w = 0; w < workers; ++w) traced_.push_back({events + size_t(w) * max_events_, max_events_, 0});
    }
    const std::function<void(int)> part = [&](int worker) {
      TraceBuffer* trace = traced_.empty() ? nullptr : &traced_[worker];
      std::byte* mine = scratch + worker * scratch_bytes;
      if (backward)
        BackwardKernel(context, engine_, problem, deadlines, mine, trace).run();
      else
        ForwardKernel(context, engine_, problem, deadlines, mine, trace).run();
    };
    epoch_ = call.epoch;  // from here on nothing throws before the ranks have met in this epoch
    workers_.run(workers, part);
  }

  // Sticky: what peers hold of this group can never be trusted again.
  [[noreturn]] void fail(const Call& call, Workspace& ws) {
    // I wait for my own transfers only because of somebody else.
    if (Phase(ws.status->phase) == Phase::kQuiet) ws.status->peer = platform_->awaited().value_or(ws.status->peer);
    const std::string failure =
        describe_failure(options_, call.ep_rank, *ws.status,
                         "The group cannot be used any more; flashmoe.distributed.init() makes a new one.");
    {
      std::lock_guard lock(outcome_mutex_);
      failure_ = failure;
    }
    abort_peers(Context<HostPlatform>{call, layout_, ws, *platform_});
    const uint64_t give_up = HostPlatform::now_ns() + 1'000'000'000;
    for (uint32_t rounds = 0; !platform_->quiet() && HostPlatform::now_ns() < give_up;) HostPlatform::pause(++rounds);
    throw PeerError(failure);
  }

  void take_stats(const Call& call, const Workspace& ws) {
    const int experts = call.num_local_experts();
    const uint32_t* rows = ws.row_offset + size_t(call.ep_size) * experts;
    std::lock_guard lock(outcome_mutex_);
    stats_.tokens_per_expert.assign(rows, rows + experts);
    std::vector<uint64_t>* kinds[kTrafficKinds] = {&stats_.header, &stats_.rows, &stats_.results, &stats_.signals};
    for (int kind = 0; kind < kTrafficKinds; ++kind) {
      kinds[kind]->resize(call.ep_size);
      for (int pe = 0; pe < call.ep_size; ++pe) (*kinds[kind])[pe] = platform_->sent(pe, Traffic(kind));
    }
  }

  const pid_t process_ = getpid();
  GroupOptions options_;
  std::atomic<int> num_workers_;
  HeapLayout layout_;
  uint64_t epoch_;
  CpuEngine engine_;
  std::mutex mutex_;  // one call at a time
  mutable std::mutex outcome_mutex_;
  std::optional<std::string> failure_;
  GroupStats stats_;
  uint32_t max_events_ = 0;
  std::vector<TraceBuffer> traced_;  // by worker, of the last call
  std::vector<int32_t> ids_, position_, rank_begin_;
  Buffer heap_, workspace_, scratch_, events_;
  std::optional<HostPlatform> platform_;  // after the buffers: what is under way in it reads them
  WorkerPool workers_;
};

Group::Group(GroupOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
Group::~Group() {
  if (impl_->made_here()) return;
  impl_->forget();
  impl_.release();
}
void Group::forward(const ForwardArgs& args, Kept* kept) { impl_->call(args, nullptr, kept); }
void Group::backward(const ForwardArgs& args, const Gradients& grad, Kept* kept) { impl_->call(args, &grad, kept); }
void Group::set_trace(uint32_t max_events) { impl_->set_trace(max_events); }
std::vector<std::vector<TraceEvent>> Group::trace(uint64_t& lost) const { return impl_->trace(lost); }
GroupStats Group::stats() const { return impl_->stats(); }
std::optional<std::string> Group::failed() const { return impl_->failed(); }
const GroupOptions& Group::options() const { return impl_->options(); }
int Group::num_workers() const { return impl_->num_workers(); }
void Group::set_num_workers(int n) { impl_->set_num_workers(n); }

std::shared_ptr<Group> make_local_group(int num_workers) {
  GroupOptions options;
  options.name = "local";
  options.num_workers = num_workers;
  return std::make_shared<Group>(std::move(options));
}

std::vector<std::shared_ptr<Group>> make_local_team(const GroupOptions& options) {
  const HeapLayout layout(options.limits);
  auto heaps = std::make_shared<std::vector<Buffer>>(options.limits.ep_size);
  GroupOptions o = options;
  o.heaps.clear();
  o.pids.assign(options.limits.ep_size, 0);
  for (Buffer& heap : *heaps) o.heaps.push_back(heap.at_least(layout.bytes));
  o.keep = {heaps};
  std::vector<std::shared_ptr<Group>> team;
  for (o.ep_rank = 0; o.ep_rank < options.limits.ep_size; ++o.ep_rank) {
    if (options.remote_only_seed) o.remote_only_seed = *options.remote_only_seed * 1000003 + o.ep_rank;
    team.push_back(std::make_shared<Group>(o));
  }
  return team;
}

}  // namespace flashmoe
