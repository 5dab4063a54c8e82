// NVSHMEM's life in a process, against a fake of the functions that are called: every transition, every failure.
#include "fake_nvshmem.h"
#include "runtime/nvshmem_world.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

constexpr NvshmemVersion kBuiltWith{3, 4, 5};
constexpr size_t kBytes = 10000;

// W processes: the fake's, and a world in each.
struct Job {
  explicit Job(int size) : fake(size) {
    for (int pe = 0; pe < size; ++pe) {
      pes.push_back(std::make_unique<FakePe>(fake, pe));
      worlds.push_back(std::make_shared<NvshmemWorld>(pes[pe]->table(), kBuiltWith, std::nullopt));
    }
    id.fill(std::byte(7));
  }

  void on_all(const std::function<void(int)>& f) {
    on_threads(fake.size(), [&](int pe) {
      try {
        f(pe);
      } catch (const std::exception& e) {
        check(false, "PE " + std::to_string(pe) + " raised: " + e.what());
      }
    });
  }
  void initialize(std::vector<void*> modules = {}) {
    on_all([&](int pe) { worlds[pe]->initialize(id, pe, fake.size(), 0, modules); });
  }
  std::vector<std::shared_ptr<NvshmemArena>> allocate(size_t bytes = kBytes) {
    std::vector<std::shared_ptr<NvshmemArena>> arenas(fake.size());
    on_all([&](int pe) { arenas[pe] = worlds[pe]->allocate(bytes); });
    return arenas;
  }
  int calls() const {
    int sum = 0;
    for (const auto& pe : pes) sum += pe->calls;
    return sum;
  }

  FakeJob fake;
  std::vector<std::unique_ptr<FakePe>> pes;
  std::vector<std::shared_ptr<NvshmemWorld>> worlds;
  NvshmemId id;
};

template <class Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "nothing was raised";
}

template <class Call>
void check_raises(const std::string& part, Call call) {
  const std::string error = error_of(call);
  check(contains(error, part), "an error with '" + part + "', got: " + error);
}

void test_a_life() {
  Job job(3);
  const NvshmemId id = job.worlds[0]->unique_id();
  check(id == job.id && job.worlds[0]->state() == "not initialised", "an id initialises nothing");
  int module = 0;
  job.initialize({&module});
  for (int pe = 0; pe < 3; ++pe) {
    check(job.worlds[pe]->ready() && !job.worlds[pe]->foreign(), "initialised by us");
    check(job.worlds[pe]->state() == "initialised", "and says so");
    check(job.worlds[pe]->pe() == pe && job.worlds[pe]->size() == 3, "PEs are the ranks");
    check(job.pes[pe]->modules == std::vector<void*>{&module}, "the GPU code was told");
  }
  job.pes[0]->unmapped = {2};
  auto arenas = job.allocate();
  for (int pe = 0; pe < 3; ++pe) {
    const NvshmemArena& arena = *arenas[pe];
    check(arena.number() == 1 && arena.bytes() == kBytes && arena.mapped()[pe] == arena.data(), "its own as it is");
    check(std::all_of(arena.data(), arena.data() + kBytes, [](std::byte b) { return b == std::byte(0); }), "zeroed");
    check(uintptr_t(arena.data()) % 4096 == 0, "on a page");
    check(job.pes[pe]->gpu_idle, "and that is done when others hear of it");
    job.pes[pe]->gpu_idle = false;  // a call is made
    check(job.worlds[pe]->idle().empty(), "held");
  }
  check(arenas[0]->mapped()[1] == arenas[0]->data() + 2000 && !arenas[0]->mapped()[2], "mapped as the library says");
  job.on_all([&](int pe) { check(job.worlds[pe]->finalize(), "finalised"); });
  job.on_all([&](int pe) { check(!job.worlds[pe]->finalize(), "once"); });
  arenas.clear();  // after the library: nothing is called
  for (int pe = 0; pe < 3; ++pe) {
    check(job.worlds[pe]->state() == "finalised" && job.pes[pe]->modules.empty(), "finalised");
    check_raises("was finalised in this process", [&] { job.worlds[pe]->allocate(kBytes); });
    check_raises("was finalised in this process", [&] { job.worlds[pe]->initialize(job.id, pe, 3, 0, {}); });
  }
  check(job.fake.meetings() == 3, "initialize, allocate, finalize");
}

void test_generations_of_arenas() {
  Job job(2);
  job.initialize();
  auto first = job.allocate(), second = job.allocate(2 * kBytes);
  check(second[0]->number() == 2, "counted alike");
  void* data = first[0]->data();
  first[0].reset();
  check(job.worlds[0]->idle() == std::vector<uint64_t>{1} && job.worlds[1]->idle().empty(), "idle on one PE alone");
  check_raises("not idle here", [&] { job.worlds[1]->free(1); });
  first[1].reset();
  job.pes[0]->gpu_idle = false;
  job.on_all([&](int pe) { job.worlds[pe]->free(1); });
  check(job.pes[0]->freed.count(data) == 1 && job.worlds[0]->idle().empty(), "freed, by all");
  check_raises("not idle here", [&] { job.worlds[0]->free(1); });
  second[0]->leak(), second[1]->leak();
  second.clear();
  check(job.worlds[0]->idle().empty(), "what a peer may still write to is never idle");
  job.on_all([&](int pe) { check(job.worlds[pe]->finalize(), "a leak hinders nobody"); });
}

void test_nothing_is_called_without_a_driver() {
  Job job(2);
  for (int again = 0; again < 2; ++again) {
    job.pes[0]->devices = 0;
    check_raises("no CUDA driver", [&] { job.worlds[0]->initialize(job.id, 0, 2, 0, {}); });
    job.pes[0]->devices = 2;
    check_raises("cannot use device 2 of 2", [&] { job.worlds[0]->initialize(job.id, 0, 2, 2, {}); });
    check_raises("cannot use device -1", [&] { job.worlds[0]->initialize(job.id, 0, 2, -1, {}); });
    check_raises("ranks in [0, 2), got 2", [&] { job.worlds[0]->initialize(job.id, 2, 2, 0, {}); });
  }
  check(job.calls() == 0, "refused before the library is asked");
  job.initialize();
  check_raises("is initialised already", [&] { job.worlds[0]->initialize(job.id, 0, 2, 0, {}); });
  check(job.worlds[0]->ready(), "and none of that hinders a later attempt, or undoes it");
}

void test_nothing_is_called_before_initialisation() {
  Job job(2);
  NvshmemWorld& world = *job.worlds[0];
  check_raises("is not initialised", [&] { world.allocate(kBytes); });
  check_raises("is not initialised", [&] { world.free(1); });
  check_raises("is not initialised", [&] { world.pe(); });
  check(!world.finalize() && job.calls() == 0, "nor finalised");
}

void test_versions_must_fit() {
  struct Case {
    NvshmemVersion found, built_with;
    std::optional<NvshmemVersion> device_code;
    const char* error;
  };
  for (const Case& c : {Case{{3, 4, 5}, {3, 4, 5}, {}, nullptr}, Case{{3, 8, 0}, {3, 4, 5}, {{3, 7, 2}}, nullptr},
                        Case{{3, 3, 24}, {3, 4, 5}, {}, "is 3.3.24 in this process, and the host code of this build needs 3.4.5"},
                        Case{{3, 4, 5}, {3, 4, 5}, {{3, 7, 2}}, "the GPU code of this build needs 3.7.2"},
                        Case{{4, 0, 0}, {3, 4, 5}, {}, "same major version"}}) {
    Job job(1);
    job.pes[0]->version = c.found;
    job.worlds[0] = std::make_shared<NvshmemWorld>(job.pes[0]->table(), c.built_with, c.device_code);
    if (!c.error) {
      job.initialize();
      continue;
    }
    check_raises(c.error, [&] { job.worlds[0]->unique_id(); });
    check_raises(c.error, [&] { job.worlds[0]->initialize(job.id, 0, 1, 0, {}); });
    check(job.calls() == 0, "a library that does not fit is not called");
  }
}

void test_a_failed_initialisation_is_not_repeated() {
  const auto broken = [](const char* error, auto plant) {
    Job job(1);
    plant(*job.pes[0]);
    for (int again = 0; again < 2; ++again)
      check_raises(error, [&] { job.worlds[0]->initialize(job.id, 0, 1, 0, {&job}); });
    const int calls = job.pes[0]->calls;
    check_raises(error, [&] { job.worlds[0]->allocate(kBytes); });
    check(!job.worlds[0]->finalize() && !job.worlds[0]->ready() && job.pes[0]->calls == calls, "left as it is");
  };
  broken("failed with error 7", [](FakePe& pe) { pe.init_error = 7; });
  broken("stopped before it had a GPU", [](FakePe& pe) { pe.keep_device = true; });
  broken("made rank 0 of 1 its PE 5 of 1", [](FakePe& pe) { pe.other_pe = 5; });
  broken("would not serve this build's GPU code: error 3", [](FakePe& pe) { pe.module_error = 3; });
}

void test_no_unique_id() {
  Job job(1);
  job.pes[0]->unique_id_error = 7;
  check_raises("made no unique id: error 7", [&] { job.worlds[0]->unique_id(); });
  job.pes[0]->unique_id_error = 0;
  check(job.worlds[0]->unique_id() == job.id, "asked again");
}

void test_what_somebody_else_initialised_goes_on() {
  Job job(2);
  int module = 0;
  for (auto& pe : job.pes) pe->status = NvshmemStatus::kInitialized;
  check(job.worlds[0]->state() == "initialised by somebody else", "seen before");
  job.initialize({&module});
  check(job.worlds[0]->ready() && job.worlds[0]->foreign() && job.worlds[1]->pe() == 1, "taken as it is");
  check(job.fake.meetings() == 0, "and nobody waits");
  job.allocate();
  job.on_all([&](int pe) { check(!job.worlds[pe]->finalize(), "not ours to finalise"); });
  for (auto& pe : job.pes) check(pe->status == NvshmemStatus::kInitialized && pe->modules.empty(), "but for our GPU code");
}

void test_somebody_elses_world_is_another() {
  Job job(2);
  job.pes[0]->status = NvshmemStatus::kInitialized;
  check_raises("with 2 PEs, and this world has 3 ranks", [&] { job.worlds[0]->initialize(job.id, 0, 3, 0, {}); });
  job.pes[1]->status = NvshmemStatus::kBootstrapped;
  check_raises("half-way by somebody else", [&] { job.worlds[1]->initialize(job.id, 1, 2, 0, {}); });
  check(job.calls() == 0, "nothing is called");
}

void test_somebody_else_finalises_before_us() {
  Job job(1);
  job.initialize();
  auto arena = job.allocate();
  job.pes[0]->status = NvshmemStatus::kNone;
  const int calls = job.calls();
  check(job.worlds[0]->state() == "finalised by somebody else", "no longer");
  check_raises("finalised in this process by somebody else", [&] { job.worlds[0]->allocate(kBytes); });
  arena.clear();
  check_raises("finalised in this process by somebody else", [&] { job.worlds[0]->free(1); });
  check(!job.worlds[0]->finalize() && job.calls() == calls, "nothing is called");
}

void test_memory_that_one_pe_lacks() {
  Job job(3);
  job.initialize();
  job.pes[1]->exhausted = true;
  std::vector<std::shared_ptr<NvshmemArena>> arenas(3);
  job.on_all([&](int pe) {
    if (pe == 1)
      check_raises("no 10000 bytes of symmetric memory left on PE 1", [&] { job.worlds[pe]->allocate(kBytes); });
    else
      (arenas[pe] = job.worlds[pe]->allocate(kBytes))->leak();  // as those do that hear of it
  });
  arenas.clear();
  job.pes[1]->exhausted = false;
  const auto next = job.allocate();
  check(next[0]->number() == next[1]->number(), "still counted alike");
  check(job.worlds[0]->idle().empty(), "freed by nobody, since one has nothing to free");
  check_raises("at least one byte", [&] { job.worlds[0]->allocate(0); });
  job.on_all([&](int pe) { check(job.worlds[pe]->finalize(), "finalised"); });
}

void test_nothing_collective_after_a_peer_has_gone() {
  Job job(2);
  job.initialize();
  auto arenas = job.allocate();
  const int calls = job.calls();
  job.worlds[0]->abandon("rank 1 has ended");
  job.worlds[0]->abandon("another reason");
  arenas.clear();
  check_raises("since rank 1 has ended", [&] { job.worlds[0]->allocate(kBytes); });
  check_raises("since rank 1 has ended", [&] { job.worlds[0]->free(1); });
  check_raises("since rank 1 has ended", [&] { job.worlds[0]->initialize(job.id, 0, 2, 0, {}); });
  check_raises("since rank 1 has ended", [&] { job.worlds[0]->unique_id(); });
  check(!job.worlds[0]->finalize() && job.worlds[0]->state() == "left as it is, since rank 1 has ended", "also at the end");
  check(job.calls() == calls && job.pes[0]->freed.empty(), "nothing is called, nothing is freed");
}

// A thread waits in the library for a PE that does not come; the others of its process must not wait for that thread.
void test_a_call_that_does_not_come_back_holds_up_nobody() {
  Job job(2);
  job.initialize();
  std::thread stuck([&] { job.worlds[0]->allocate(kBytes); });
  while (job.pes[0]->calls < 2) std::this_thread::yield();
  job.worlds[0]->abandon("rank 1 has ended");
  check_raises("since rank 1 has ended", [&] { job.worlds[0]->free(1); });
  check(!job.worlds[0]->finalize() && job.worlds[0]->idle().empty(), "answered at once");
  job.worlds[1]->allocate(kBytes);
  stuck.join();
}

}  // namespace

int main() {
  run_test("a life", test_a_life);
  run_test("generations of arenas", test_generations_of_arenas);
  run_test("nothing is called without a driver", test_nothing_is_called_without_a_driver);
  run_test("nothing is called before initialisation", test_nothing_is_called_before_initialisation);
  run_test("versions must fit", test_versions_must_fit);
  run_test("a failed initialisation is not repeated", test_a_failed_initialisation_is_not_repeated);
  run_test("no unique id", test_no_unique_id);
  run_test("what somebody else initialised goes on", test_what_somebody_else_initialised_goes_on);
  run_test("somebody else's world is another", test_somebody_elses_world_is_another);
  run_test("somebody else finalises before us", test_somebody_else_finalises_before_us);
  run_test("memory that one PE lacks", test_memory_that_one_pe_lacks);
  run_test("nothing collective after a peer has gone", test_nothing_collective_after_a_peer_has_gone);
  run_test("a call that does not come back holds up nobody", test_a_call_that_does_not_come_back_holds_up_nobody);
  return finish();
}
