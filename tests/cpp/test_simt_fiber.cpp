// Fibers on the stacks of ucontext: the way that machines take for which no switch of our own is written.
#define FLASHMOE_FIBER_UCONTEXT 1
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;
using gpu::simt::Fiber;

void fibers_take_turns() {
  std::string order;
  std::vector<std::unique_ptr<Fiber>> fibers(3);
  for (size_t f = 0; f < 3; ++f)
    fibers[f] = std::make_unique<Fiber>([&order, &fibers, f] {
      volatile char pad[5000];  // an exception and its handler live on this stack
      pad[0] = char('a' + f);
      pad[4999] = char('a' + f);
      try {
        order += pad[0];
        fibers[f]->leave();
        throw std::runtime_error(std::string(1, pad[4999]));
      } catch (const std::exception& e) {
        order += e.what();
      }
      fibers[f]->leave();
      order += '.';
    });
  for (int round = 0; round < 3; ++round)
    for (auto& fiber : fibers) fiber->enter();
  check(order == "abcabc..." && fibers[0]->done() && fibers[2]->done(), "order " + order);
}

void kernels_run() {
  on_seeds(3, 2, 64, 64 * 4, [] {
    volatile int* board = reinterpret_cast<int*>(gpu::shared_memory());
    const int t = gpu::thread_in_block();
    board[t] = gpu::shuffle_xor(t, 1);
    gpu::sync_block();
    expect(board[63 - t] == ((63 - t) ^ 1));
  });
  check_misuse("a thread misses sync_block", "in sync_block", 1, 64, 0, [] {
    if (gpu::thread_in_block() != 5) gpu::sync_block();
  });
}

}  // namespace

int main() {
  run_test("FibersTakeTurns", fibers_take_turns);
  run_test("KernelsRun", kernels_run);
  return finish();
}
