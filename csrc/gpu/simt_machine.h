// The machine under the simt verbs: fibers for threads, one step at a time, in the order of a seed.
//
// Every verb may hand over to another thread; what runs between two verbs is never interrupted. Copies and matrix
// products are things in flight, which the machine moves whenever it likes and at the latest when someone waits for
// them. Seeds differ in how often threads hand over, how eagerly things land, and which warps are slow.
#pragma once

#include <exception>
#include <functional>

#include "gpu/simt_state.h"

namespace flashmoe::gpu::simt {

class Machine {
 public:
  Machine(int blocks, int block_threads, size_t shared_bytes, uint64_t seed, uint64_t max_switches,
          const std::function<void()>& kernel);
  void run();

  Random random;
  Thread* current = nullptr;
  int num_blocks() const { return int(blocks_.size()); }
  uint64_t now() const { return now_; }

  // At the head of each verb: perhaps someone else first.
  void step() {
    if (++current->verbs_since_poll > kWorking) idle_ = 0;
    if (random.one_in(pace_)) yield();
  }
  // A verb that asks whether something has happened yet.
  void poll() {
    current->verbs_since_poll = 0;
    ++idle_;
    yield();
  }
  // Something happened that others may wait for.
  void progress() { idle_ = 0; }
  void yield() {
    current->fiber->leave();
    if (cancelled_) throw Cancelled();
  }

  template <class Predicate>
  void wait_until(WaitList& list, const char* verb, int64_t on, Predicate ready) {
    while (!ready()) {
      list.push_back(current);
      current->waits_in = verb, current->waits_on = on;
      park(*current);
      yield();
      current->waits_in = nullptr;
    }
  }
  void wake(WaitList& list) {
    for (Thread* thread : list) make_runnable(*thread);
    list.clear();
  }

  void launch(std::shared_ptr<InFlight> flight) {
    // What a wait made land is still listed.
    if (in_flight_.size() % 1024 == 0) std::erase_if(in_flight_, [](const auto& f) { return f->landed; });
    in_flight_.push_back(std::move(flight));
    progress();
  }

 private:
  struct Cancelled {};
  // A thread that does so much between two questions is at work, and time need not fly.
  static constexpr int kWorking = 32;

  void body(Thread& thread, const std::function<void()>& kernel);
  void enter(Thread& thread);
  void finish(Thread& thread);
  void move_something();
  Thread& pick();
  std::string standstill() const;
  void make_runnable(Thread& thread) {
    thread.place = runnable_.size();
    runnable_.push_back(&thread);
  }
  void park(Thread& thread) {
    runnable_.back()->place = thread.place;
    std::swap(runnable_[thread.place], runnable_.back());
    runnable_.pop_back();
  }

  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Thread*> runnable_;
  std::vector<std::shared_ptr<InFlight>> in_flight_;
  uint64_t max_switches_, switches_ = 0, idle_ = 0, now_ = 1000;
  size_t pace_, eagerness_;
  bool cancelled_ = false;
  std::exception_ptr error_;
};

inline Machine* machine = nullptr;  // the one that runs

inline Machine::Machine(int blocks, int block_threads, size_t shared_bytes, uint64_t seed, uint64_t max_switches,
                        const std::function<void()>& kernel)
    : random(seed), max_switches_(max_switches) {
  if (blocks < 1 || block_threads < 32 || block_threads > 1024 || block_threads % 32)
    throw Misuse("a launch of " + std::to_string(blocks) + " blocks of " + std::to_string(block_threads) + " threads");
  pace_ = std::array{1, 4, 32}[random.below(3)];
  eagerness_ = std::array{2, 32, 1024}[random.below(3)];
  const bool some_slow = random.one_in(2);
  for (int b = 0; b < blocks; ++b) {
    Block& block = *blocks_.emplace_back(std::make_unique<Block>(b, block_threads, shared_bytes));
    bool slow = false;
    for (int t = 0; t < block_threads; ++t) {
      if (t % 32 == 0) slow = some_slow && random.one_in(4);
      Thread& thread = *block.threads.emplace_back(std::make_unique<Thread>());
      thread.block = &block, thread.index = t, thread.slow = slow;
      thread.clock.resize(size_t(block_threads) + 1);
      thread.count() = 1;
      thread.fiber = std::make_unique<Fiber>([this, &thread, &kernel] { body(thread, kernel); });
      make_runnable(thread);
    }
  }
}

inline void Machine::body(Thread& thread, const std::function<void()>& kernel) {
  const auto place = [&thread] {
    return "block " + std::to_string(thread.block->index) + " thread " + std::to_string(thread.index) + ": ";
  };
  try {
    kernel();
  } catch (const Cancelled&) {
  } catch (const Misuse& misuse) {
    error_ = std::make_exception_ptr(Misuse(place() + misuse.what()));
  } catch (...) {
    error_ = std::current_exception();
  }
}

inline void Machine::enter(Thread& thread) {
  current = &thread;
  thread.started = true;
  thread.fiber->enter();
  current = nullptr;
}

inline void Machine::run() {
  while (!runnable_.empty() || !in_flight_.empty()) {
    const bool idle = runnable_.empty() || idle_ > 2 * runnable_.size();
    if (!in_flight_.empty() && (idle || random.one_in(eagerness_))) move_something();
    if (error_) break;
    if (runnable_.empty()) {
      if (in_flight_.empty()) break;
      continue;
    }
    // Where all only ask and nothing moves, time flies: deadlines come, and if they do not help either, it is over.
    const uint64_t rounds = idle_ / (16 * runnable_.size() + 256);
    now_ += uint64_t{20} << std::min<uint64_t>(rounds, 26);
    if (rounds > 80 || ++switches_ > max_switches_) break;
    Thread& thread = pick();
    enter(thread);
    if (thread.fiber->done()) finish(thread);
    if (error_) break;
  }
  bool live = false;
  for (auto& block : blocks_) live |= block->live > 0;
  if (live && !error_) error_ = std::make_exception_ptr(Misuse(standstill()));

  // What threads still hold on their stacks is given back.
  cancelled_ = true;
  for (auto& block : blocks_)
    for (auto& thread : block->threads)
      if (thread->started && !thread->fiber->done()) enter(*thread);
  if (error_) std::rethrow_exception(error_);
  for (auto& block : blocks_) block->shared.check_edge();
}

inline Thread& Machine::pick() {
  Thread* thread = runnable_[random.below(runnable_.size())];
  if (thread->slow && !random.one_in(16)) thread = runnable_[random.below(runnable_.size())];
  return *thread;
}

inline void Machine::finish(Thread& thread) {
  park(thread);
  progress();
  Block& block = *thread.block;
  if (--block.live > 0 || error_) return;
  for (const auto& flight : in_flight_)
    if (flight->block == &block && !flight->landed && !flight->outlives_threads())
      error_ = std::make_exception_ptr(Misuse("block " + std::to_string(block.index) +
                                              " ended while a TMA load into its shared memory was in flight"));
}

inline void Machine::move_something() {
  const size_t first = random.below(in_flight_.size());
  for (size_t i = 0; i < in_flight_.size(); ++i) {
    const size_t at = (first + i) % in_flight_.size();
    const std::shared_ptr<InFlight> flight = in_flight_[at];
    if (!flight->landed && !flight->ready()) continue;
    if (!flight->landed) {
      try {
        flight->land(random);
      } catch (...) {
        error_ = std::current_exception();
      }
    }
    if (flight->landed) {
      std::swap(in_flight_[at], in_flight_.back());
      in_flight_.pop_back();
    }
    return;
  }
}

inline std::string Machine::standstill() const {
  std::string text = switches_ > max_switches_ ? "too many steps; " : "nothing can go on; ";
  std::map<std::string, std::string> groups;
  for (const auto& block : blocks_)
    for (const auto& thread : block->threads) {
      if (thread->fiber->done()) continue;
      std::string where = "running or polling";
      if (thread->waits_in) where = std::string(thread->waits_in) + " of " + std::to_string(thread->waits_on);
      std::string& who = groups[where];
      if (who.size() > 200) continue;
      who += (who.empty() ? "" : ", ") + std::to_string(block->index) + ":" + std::to_string(thread->index);
    }
  for (const auto& [where, who] : groups) text += "in " + where + " block:thread " + who + "; ";
  return text;
}

}  // namespace flashmoe::gpu::simt
