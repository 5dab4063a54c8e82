// A team of ranks in the simulated time of sim_platform.h: the roles of the product, stepped in the order of a seed.
#pragma once

#include <deque>

#include "protocol/agent.h"
#include "protocol/crew.h"
#include "rank_call.h"
#include "sim_platform.h"
#include "tiny_engine.h"

namespace flashmoe::test {

struct SimOptions {
  int ep_size = 2, num_workers = 1;
  bool remote_only = true;
  Fault fault = Fault::kNone;
  uint64_t last_epoch = 0;
  uint32_t ring_blocks = Machine{}.max_ring_blocks;
  int ahead = 0;             // pieces of work that an agent decides on while its crew has one in hand
  int straggler = -1;        // a rank that moves a hundred times less often
};

// One rank: its call under way, and what it is made of.
template <class Engine>
class SimRank {
 public:
  SimRank(const SimOptions& options, int rank, const std::vector<std::byte*>& heaps, const HeapLayout& layout, SimNetwork* network)
      : options_(options), rank_(rank), layout_(layout), platform(rank, heaps, layout, network, options.fault),
        epoch_(options.last_epoch) {}

  void begin(const CallOfAll& call) {
    platform.epoch = epoch_ = next_epoch(epoch_);
    const Machine machine{.staged = platform.staged(), .max_ring_blocks = options_.ring_blocks, .num_workers = uint32_t(options_.num_workers)};
    rank_call_ = std::make_unique<RankCall>(call, rank_, options_.ep_size, epoch_, layout_, machine);
    workers_.clear();
    const Context<SimPlatform> context{rank_call_->call, layout_, *rank_call_->workspace, platform};
    for (int w = 0; w < options_.num_workers; ++w) workers_.push_back(std::make_unique<Worker>(context, engine_, rank_call_->shape));
  }
  bool busy() const { return rank_call_ != nullptr; }

  // One step of a worker. Its agent may be `ahead` pieces of work ahead of its crew, who perform them in turn.
  bool step(int worker, int role) {
    Worker& w = *workers_[worker];
    const Alone me;
    Work work;
    switch (role) {
      case 0: return int(w.posted.size()) <= options_.ahead && w.agent.dispatcher.next(me, work) && w.post(work);
      case 1: return w.agent.subscriber.step(me);
      case 2: return w.agent.scheduler.step(me);
      case 3: return int(w.posted.size()) <= options_.ahead && w.agent.processor.next(me, work) && w.post(work);
      default: return w.perform();
    }
  }
  bool done() { return workers_[0]->agent.done(Alone{}); }
  // y, and no more of this call than transfers that should have landed may still need.
  std::vector<float> end() {
    last_call_ = std::move(rank_call_);
    return last_call_->y();
  }
  Failure failure() const { return Failure(rank_call_->workspace->status->failure); }

 private:
  struct Worker {
    Agent<SimPlatform> agent;
    CrewOfOne<SimPlatform, Engine> crew;
    std::deque<Work> posted;
    Worker(const Context<SimPlatform>& c, const Engine& engine, const LayerShape& shape)
        : agent(c, tile_shape<Engine>(c.call, shape), {}), crew(c, engine, shape, nullptr) {}

    bool post(const Work& work) {
      posted.push_back(work);
      return true;
    }
    bool perform() {
      if (posted.empty()) return false;
      crew.perform(posted.front());
      crew.finish(posted.front());
      posted.pop_front();
      return true;
    }
  };

  const SimOptions& options_;
  int rank_;
  const HeapLayout& layout_;

 public:
  SimPlatform platform;

 private:
  uint64_t epoch_;
  Engine engine_;
  std::unique_ptr<RankCall> rank_call_, last_call_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

struct SimOutcome {
  std::string trouble;  // empty: every call ended, with the bits that the engine alone computes
  int calls_ahead = 0;  // the most that a rank was ahead of another
};

template <class Engine = TinyEngine>
SimOutcome simulate(const Program& program, const SimOptions& options, uint64_t seed) {
  std::mt19937_64 random(seed);
  SimNetwork network(random, seed % 2, options.fault);
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
    if (rank.end() != TinyEngine::without_protocol(*call.layer, call.tokens[r]))
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
        for (int role = 0; role < 5; ++role) moved |= move_rank(r, w, role);
    return !moved;
  };
  auto all_ended = [&] { return std::all_of(calls_ended.begin(), calls_ended.end(), [&](size_t n) { return n == program.size(); }); };

  for (int idle = 0; outcome.trouble.empty() && !all_ended();) {
    // Seeds differ in how eager the network is: from one move in a hundred to one in two.
    bool moved = false;
    if (random() % 128 < uint64_t(1) << seed / 2 % 7) {
      moved = network.move_one();
    } else {
      const int r = int(random() % options.ep_size);
      if (r == options.straggler && random() % 100) continue;
      moved = move_rank(r, int(random() % options.num_workers), int(random() % 5));
    }
    idle = moved ? 0 : idle + 1;
    if (idle > 1000 && stands_still()) outcome.trouble = describe(0, "standstill");
  }
  return outcome;
}

// Every one of these seeds must end well. One thread needs no ThreadSanitizer, which would take thirty times as long.
inline void check_simulated(const Program& program, const SimOptions& options, int num_seeds, const std::string& what, int* calls_ahead = nullptr) {
  for (int seed = 0; seed < (kThreadSanitizer ? ceil_div(num_seeds, 20) : num_seeds); ++seed) {
    const SimOutcome o = simulate(program, options, seed);
    check(o.trouble.empty(), what + ", seed " + std::to_string(seed) + ": " + o.trouble);
    if (calls_ahead) *calls_ahead = std::max(*calls_ahead, o.calls_ahead);
  }
}

// Of these seeds at least one must end badly: the test can fail.
inline void check_fault_caught(const Program& program, SimOptions options, Fault fault, int num_seeds, const std::string& what) {
  options.fault = fault;
  int seed = 0;
  while (seed < num_seeds && simulate(program, options, seed).trouble.empty()) ++seed;
  check_caught(seed < num_seeds, what);
}

}  // namespace flashmoe::test
