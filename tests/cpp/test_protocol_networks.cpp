// What a call says when the network to a peer fails it: a network whose puts land at once, as far as it pleases.
#include <cstring>

#include "platform/host.h"
#include "team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

class Moody final : public HostNetwork {
 public:
  explicit Moody(std::vector<std::byte*> heaps) : heaps_(std::move(heaps)) {}
  void put(const Put& put) override {
    if (put.pe == deaf_to) return;
    if (put.bytes) std::memcpy(heaps_[put.pe] + put.offset, put.from, put.bytes);
    HostPlatform::store_release(reinterpret_cast<uint64_t*>(heaps_[put.pe] + put.signal), put.word);
  }
  bool quiet() override { return !awaited(); }
  void release_when_landed(uint32_t* word, uint32_t value) override { HostPlatform::store_release(word, value); }
  bool alive(int pe) override { return pe != lost; }
  std::optional<int> awaited() override { return unconfirmed < 0 ? std::nullopt : std::optional(unconfirmed); }

  int deaf_to = -1, lost = -1, unconfirmed = -1;

 private:
  std::vector<std::byte*> heaps_;
};

// Ranks 0 and 1 share memory, rank 2 is far from both.
struct FarTeam {
  explicit FarTeam(const Limits& limits) {
    const size_t words = HeapLayout(limits).bytes / sizeof(uint64_t);
    std::vector<std::byte*> heaps;
    for (int r = 0; r < limits.ep_size; ++r) {
      memory.push_back(std::make_shared<std::vector<uint64_t>>(words));
      heaps.push_back(reinterpret_cast<std::byte*>(memory[r]->data()));
    }
    for (int r = 0; r < limits.ep_size; ++r) {
      networks.push_back(std::make_shared<Moody>(heaps));
      GroupOptions o;
      o.name = "far", o.ep_rank = r, o.limits = limits, o.heaps = heaps, o.network = networks[r];
      for (int pe = 0; pe < limits.ep_size; ++pe)
        if ((pe == 2) != (r == 2)) o.heaps[pe] = nullptr;
      o.pids.assign(limits.ep_size, 0), o.global_ranks = {10, 11, 12};
      o.timeout_s = o.entry_timeout_s = 0.5;
      team.push_back(std::make_shared<Group>(std::move(o)));
    }
  }
  std::vector<std::shared_ptr<std::vector<uint64_t>>> memory;
  std::vector<std::shared_ptr<Moody>> networks;
  Team team;
};

Program program_of(const Layer& layer, int calls) {
  Program program;
  for (int c = 0; c < calls; ++c) program.push_back({&layer, {draw_tokens(layer, 20, c), draw_tokens(layer, 30, 100 + c), draw_tokens(layer, 5, 200 + c)}, std::nullopt});
  return program;
}

void each_peer_by_its_own_way(const Program& program) {
  FarTeam far(limits_of(program, 3));
  const Results results = run_program(far.team, program);
  for (const std::string& error : results.errors) check(error.empty(), error);
  check(same_bits(results, run_alone(program)), "bits of one rank alone");
  far.networks[0]->lost = 1;  // but its memory is mapped, and no network is needed for it
  check(run_program(far.team, program).ok(), "a mapped peer is alive whatever the network says");
}

void unconfirmed_puts(const Program& program) {
  FarTeam far(limits_of(program, 3));
  far.networks[1]->unconfirmed = 2;
  const Results results = run_program(far.team, {program[0]});
  check(contains(results.errors[1], "rank 11, call 1") && contains(results.errors[1], "waiting for its own transfers to rank 12 to land"),
        results.errors[1]);
  check(results.errors[0].empty() && results.errors[2].empty(), "the others have all they need");
}

void lost_peer(const Program& program) {
  FarTeam far(limits_of(program, 3));
  far.networks[2]->deaf_to = 0, far.networks[0]->lost = 2;
  const Results results = run_program(far.team, program);
  check(contains(results.errors[0], "the network to rank 12 broke, or its process ended, while this rank was waiting for the packet header of rank 12"),
        results.errors[0]);
  check(contains(results.errors[1], "rank 10 aborted because of a peer process that ended (rank 12)"), results.errors[1]);
}

}  // namespace

// What a failed group leaves behind on purpose, because peers and the network may still use it, is no leak.
extern "C" __attribute__((visibility("default"), used)) const char* __lsan_default_suppressions() {
  return "leak:flashmoe::Group::Impl\n";
}

int main() {
  const Layer layer({.hidden_size = 32, .intermediate_size = 32, .num_experts = 12, .top_k = 3}, 2);
  const Program program = program_of(layer, 3);
  run_test("EachPeerByItsOwnWay", [&] { each_peer_by_its_own_way(program); });
  run_test("UnconfirmedPutsNameTheirPeer", [&] { unconfirmed_puts(program); });
  run_test("LostPeerIsNamed", [&] { lost_peer(program); });
  return finish();
}
