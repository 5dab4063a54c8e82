// A team of ranks in the simulated time of sim_platform.h: the roles of the product, stepped in the order of a seed.
#pragma once

#include <memory>
#include <string>

#include "protocol/dispatcher.h"
#include "protocol/processor.h"
#include "protocol/scheduler.h"
#include "protocol/subscriber.h"
#include "sim_platform.h"
#include "team.h"
#include "tiny_engine.h"

namespace flashmoe::test {

struct SimOptions {
  int ep_size = 2, num_workers = 1;
  bool remote_only = true;
  Fault fault = Fault::kNone;
  uint64_t last_epoch = 0;
  uint32_t ring_blocks = 0;  // 0: as many as the workspace has room for
  int straggler = -1;        // a rank that moves a hundred times less often
};

// One rank: its call under way, and what it is made of.
template <class Engine>
class SimRank {
 public:
  SimRank(const SimOptions& options, int rank, const std::vector<std::byte*>& heaps, const HeapLayout& layout, SimNetwork* network)
      : options_(options), rank_(rank), layout_(layout), platform(rank, heaps, layout, network, options.fault), epoch_(options.last_epoch) {}

  void begin(const CallOfAll& call) {
    args_ = std::make_unique<RankArgs>(call, rank_, options_.ep_size);
    const ForwardArgs& a = args_->args;
    const ExpertMap map = call.map ? *call.map : equal_blocks(a.num_experts, options_.ep_size);
    position_.assign(a.num_experts, 0), rank_begin_.assign(1, 0), ids_.clear();
    int next = 0;
    for (int d = 0; d < options_.ep_size; ++d) {
      for (int e = 0; e < a.num_experts; ++e)
        if (map[e] == d) position_[e] = next++;
      rank_begin_.push_back(next);
    }
    for (int64_t id : call.tokens[rank_].ids) ids_.push_back(id == a.num_experts ? -1 : int32_t(id));

    platform.epoch = epoch_ = next_epoch(epoch_);
    call_ = {};
    call_.ep_size = options_.ep_size, call_.ep_rank = rank_, call_.epoch = epoch_;
    call_.tag = {a.layer, a.hidden_size, a.intermediate_size, a.num_experts, 0, 0, 0, a.gated, uint8_t(call.layer->bias)};
    call_.num_tokens = a.num_tokens, call_.top_k = a.top_k, call_.num_experts = a.num_experts;
    call_.hidden_size = a.hidden_size, call_.intermediate_size = a.intermediate_size, call_.gated = a.gated;
    call_.expert_position = position_.data(), call_.rank_begin = rank_begin_.data();
    call_.x = static_cast<const std::byte*>(a.x), call_.y = static_cast<std::byte*>(a.y);
    call_.topk_ids = ids_.data(), call_.topk_weights = a.topk_weights;
    call_.gate_up_proj = static_cast<const std::byte*>(a.gate_up_proj), call_.gate_up_bias = static_cast<const std::byte*>(a.gate_up_bias);
    call_.down_proj = static_cast<const std::byte*>(a.down_proj), call_.down_bias = static_cast<const std::byte*>(a.down_bias);
    shape_ = *call.layer;

    const Workspace size(call_, layout_, platform.staged(), nullptr);
    memory_.resize(std::max(memory_.size(), size.bytes / sizeof(Line) + 1));
    // What an earlier call left may be read by nobody, save by transfers that should have landed.
    std::memset(static_cast<void*>(memory_.data()), 0xa5, memory_.size() * sizeof(Line));
    ws_ = std::make_unique<Workspace>(call_, layout_, platform.staged(), reinterpret_cast<std::byte*>(memory_.data()));
    if (options_.ring_blocks) ws_->ring_blocks = std::min(ws_->ring_blocks, options_.ring_blocks);
    ws_->reset(call_, 0);
    workers_.clear();
    const Context<SimPlatform> context{call_, layout_, *ws_, platform};
    for (int w = 0; w < options_.num_workers; ++w) workers_.push_back(std::make_unique<Worker>(context, engine_, shape_));
  }
  bool busy() const { return args_ != nullptr; }

  bool step(int worker, int role) {
    Worker& w = *workers_[worker];
    const Step s = role == 0 ? w.dispatcher.step() : role == 1 ? w.subscriber.step() : role == 2 ? w.scheduler.step() : w.processor.step();
    return s == Step::kProgress;
  }
  // As MoeKernel says it.
  bool done() const {
    const Worker& w = *workers_[0];
    return w.dispatcher.done() && w.subscriber.done() && w.scheduler.all_served() && w.processor.all_combined() &&
           const_cast<SimPlatform&>(platform).quiet();
  }
  std::vector<std::byte> end() {
    const auto args = std::move(args_);
    return std::move(args->y);
  }
  Failure failure() const { return Failure(ws_->status->failure); }
  const Status& status() const { return *ws_->status; }
  uint64_t epoch() const { return epoch_; }

 private:
  using Processor = flashmoe::Processor<SimPlatform, Engine>;
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  struct Worker {
    Dispatcher<SimPlatform> dispatcher;
    Subscriber<SimPlatform> subscriber;
    Scheduler<SimPlatform> scheduler;
    Processor processor;
    Worker(const Context<SimPlatform>& c, const Engine& engine, const LayerShape& shape)
        : dispatcher(c), subscriber(c), scheduler(c, Processor::up_tiles(shape), Processor::down_tiles(shape)),
          processor(c, engine, shape, nullptr) {}
  };

  const SimOptions& options_;
  int rank_;
  const HeapLayout& layout_;

 public:
  SimPlatform platform;

 private:
  uint64_t epoch_;
  Call call_;
  Engine engine_;
  LayerShape shape_;
  std::unique_ptr<RankArgs> args_;
  std::vector<int32_t> position_, rank_begin_, ids_;
  std::vector<Line> memory_;
  std::unique_ptr<Workspace> ws_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

struct SimOutcome {
  std::string trouble;  // empty: every call ended, with the bits that the engine alone computes
  int calls_ahead = 0;  // the most that a rank was ahead of another
};

template <class Engine = TinyEngine>
SimOutcome simulate(const Program& program, const SimOptions& options, uint64_t seed) {
  std::mt19937_64 random(seed);
  SimNetwork network(random, options.fault);
  const HeapLayout layout(limits_of(program, options.ep_size));
  std::vector<std::vector<uint64_t>> heaps(options.ep_size, std::vector<uint64_t>(layout.bytes / 8 + 1));
  std::vector<std::byte*> addresses;
  for (auto& heap : heaps) addresses.push_back(reinterpret_cast<std::byte*>(heap.data()));
  std::vector<std::unique_ptr<SimRank<Engine>>> ranks;
  for (int r = 0; r < options.ep_size; ++r)
    ranks.push_back(std::make_unique<SimRank<Engine>>(options, r, addresses, layout, options.remote_only ? &network : nullptr));

  SimOutcome outcome;
  std::vector<size_t> calls_ended(options.ep_size, 0);
  auto describe = [&](int r, const std::string& what) { return "rank " + std::to_string(r) + ", call " + std::to_string(calls_ended[r]) + ": " + what; };

  // One step of one rank: begins a call, plays a role of a worker, or ends the call.
  auto move_rank = [&](int r, int worker, int role) {
    if (calls_ended[r] == program.size()) return false;
    SimRank<Engine>& rank = *ranks[r];
    const CallOfAll& call = program[calls_ended[r]];
    if (!rank.busy()) {
      rank.begin(call);
      return true;
    }
    const bool progress = rank.step(worker, role);
    if (rank.failure() != Failure::kNone) outcome.trouble = describe(r, "refused");
    if (progress || !rank.done()) return progress;
    if (decode(rank.end(), DType::kFloat32) != TinyEngine::without_protocol(*call.layer, call.tokens[r]))
      outcome.trouble = describe(r, "wrong bits");
    ++calls_ended[r];
    const auto [least, most] = std::minmax_element(calls_ended.begin(), calls_ended.end());
    outcome.calls_ahead = std::max(outcome.calls_ahead, int(*most - *least));
    return true;
  };
  // Nothing at all can move any more.
  auto stands_still = [&] {
    bool moved = network.move_one();
    for (int r = 0; r < options.ep_size; ++r)
      for (int w = 0; w < options.num_workers; ++w)
        for (int role = 0; role < 4; ++role) moved |= move_rank(r, w, role);
    return !moved;
  };
  auto all_ended = [&] { return std::all_of(calls_ended.begin(), calls_ended.end(), [&](size_t n) { return n == program.size(); }); };

  for (int idle = 0; outcome.trouble.empty() && !all_ended();) {
    // Seeds differ in how eager the network is.
    bool moved = false;
    if (random() % 8 < 1 + seed % 7) {
      moved = network.move_one();
    } else {
      const int r = int(random() % options.ep_size);
      if (r == options.straggler && random() % 100) continue;
      moved = move_rank(r, int(random() % options.num_workers), int(random() % 4));
    }
    idle = moved ? 0 : idle + 1;
    if (idle > 1000 && stands_still()) outcome.trouble = describe(0, "standstill");
  }
  return outcome;
}

// Every one of these seeds must end well.
inline void check_simulated(const Program& program, const SimOptions& options, int num_seeds, const std::string& what, int* calls_ahead = nullptr) {
  for (int seed = 0; seed < num_seeds; ++seed) {
    const SimOutcome o = simulate(program, options, seed);
    check(o.trouble.empty(), what + ", seed " + std::to_string(seed) + ": " + o.trouble);
    if (calls_ahead) *calls_ahead = std::max(*calls_ahead, o.calls_ahead);
  }
}

// Of these seeds at least one must end badly: the test can fail.
inline void check_fault_caught(const Program& program, SimOptions options, Fault fault, int num_seeds, const std::string& what) {
  options.fault = fault;
  int caught = 0;
  for (int seed = 0; seed < num_seeds; ++seed) caught += !simulate(program, options, seed).trouble.empty();
  std::printf("  %s: caught by %d of %d seeds\n", what.c_str(), caught, num_seeds);
  check_caught(caught > 0, what);
}

}  // namespace flashmoe::test
