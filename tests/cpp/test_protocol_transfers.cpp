// Unordered puts, the ring of row blocks and memory that is used again, in simulated time.
#include "sim_team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

const Layer& tiny_layer() {
  static const Layer layer({.hidden_size = 8, .intermediate_size = 12, .num_experts = 6, .top_k = 3}, 2);
  return layer;
}

Program program_of(int ep_size, std::vector<int> num_tokens, Skew skew, uint64_t seed) {
  Program program;
  for (int n : num_tokens) {
    program.push_back({&tiny_layer(), {}, equal_blocks(6, ep_size)});
    for (int r = 0; r < ep_size; ++r) program.back().tokens.push_back(draw_tokens(tiny_layer(), n, seed++, skew));
  }
  return program;
}

// Header, chunks and results are separate puts; any of them may land first, and each lands in pieces.
void reordered_puts() {
  for (int ep_size : {2, 3, 4}) {
    const Program program = program_of(ep_size, {150, 70, 1}, Skew::kZipf, 5);
    for (int workers : {1, 3}) {
      const SimOptions options{.ep_size = ep_size, .num_workers = workers};
      check_simulated(program, options, 60, "reordered puts, " + std::to_string(ep_size) + " ranks");
    }
    check_fault_caught(program, {.ep_size = ep_size}, Fault::kSignalBeforePayload, 20, "a signal before its payload");
    check_fault_caught(program, {.ep_size = ep_size}, Fault::kLostSignal, 20, "a signal that never lands");
  }
}

// Far more row blocks than ring slots, so that each slot, each queue entry and each staged row is used many times.
void ticket_and_ring_reuse() {
  const Program program = program_of(2, {500, 300}, Skew::kOneExpert, 9);
  for (uint32_t ring_blocks : {1u, 2u, 3u, 5u})
    for (bool remote_only : {false, true})
      check_simulated(program, {.num_workers = 3, .remote_only = remote_only, .ring_blocks = ring_blocks}, 10,
                      "ring of " + std::to_string(ring_blocks));
  check_fault_caught(program, {.num_workers = 3, .ring_blocks = 2}, Fault::kEarlyRelease, 10, "a ring slot released before its rows landed");
  // The ring as it is, and more blocks than it holds.
  const Program full = program_of(2, {1700}, Skew::kOneExpert, 11);
  check_simulated(full, {.num_workers = 2}, 2, "the whole ring");
  check_fault_caught(full, {.num_workers = 2}, Fault::kEarlyRelease, 10, "the whole ring, a slot released before its rows landed");
}

// A source that goes on before its packet was consumed would write into what is still being read.
void reuse_before_consumption() {
  for (int straggler : {0, 1, 2}) {
    const Program program = program_of(3, {130, 20, 0, 90, 129, 64, 7, 130}, Skew::kUniform, 40 + straggler);
    for (bool remote_only : {false, true}) {
      const SimOptions options{.ep_size = 3, .num_workers = 2, .remote_only = remote_only, .straggler = straggler};
      check_simulated(program, options, 20, "a rank that lags");
      check_fault_caught(program, options, Fault::kStaleReplies, 10, "a source that does not wait for this epoch's replies");
    }
  }
}

// An engine whose bits depend on a row's place in its tile, as matrix libraries' often do.
struct PlaceDependentEngine : TinyEngine {
  void up_tile(const Problem& p, const void* const* rows, int num_rows, const void* gate_up, const void* bias, int begin,
               int end, float* hidden, ptrdiff_t stride, void* scratch) const {
    TinyEngine::up_tile(p, rows, num_rows, gate_up, bias, begin, end, hidden, stride, scratch);
    for (int r = 1; r < num_rows; r += 2)
      for (int c = begin; c < end; ++c) hidden[r * stride + c] = std::nextafter(hidden[r * stride + c], 1e9f);
  }
};

// The order of arrival, the number of ranks and of workers, and the platform leave no trace in y.
void bits() {
  for (int ep_size : {1, 2, 3, 4})
    for (int workers : {1, 2, 4})
      for (bool remote_only : {false, true})
        for (int ahead : {0, 3})
          check_simulated(program_of(ep_size, {100, 33}, Skew::kZipf, 77),
                          {.ep_size = ep_size, .num_workers = workers, .remote_only = remote_only, .ahead = ahead}, 5,
                          std::to_string(ep_size) + " ranks of " + std::to_string(workers) + " workers");
  check_caught(!simulate<PlaceDependentEngine>(program_of(2, {100}, Skew::kZipf, 77), {}, 1).trouble.empty(),
               "an engine whose bits depend on a row's place in its tile");
}

}  // namespace

int main() {
  run_test("ReorderedPuts", reordered_puts);
  run_test("TicketAndRingReuse", ticket_and_ring_reuse);
  run_test("ReuseBeforeConsumption", reuse_before_consumption);
  run_test("BitsDoNotDependOnOrder", bits);
  return finish();
}
