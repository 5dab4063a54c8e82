// The selection of experts by warps, on fibers: bit for bit that of one thread, which tests/test_selection.py holds
// against its definition.
#include <random>

#include "kernel/select_tokens.h"
#include "runtime/select.h"
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

constexpr int kWarps = 2;

// Scores with ties, zeros of both signs, infinities and a NaN.
struct Tokens {
  Tokens(const Selection& s, int num_tokens) : num(num_tokens) {
    std::mt19937_64 random(uint64_t(s.num_experts * 64 + s.top_k));
    const float odd[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN};
    for (int i = 0; i < num_tokens * s.num_experts; ++i)
      scores.push_back(random() % 50 ? float(int(random() % 41) - 20) / 8 : odd[random() % 5]);
    for (int e = 0; e < s.num_experts; ++e) bias.push_back(float(random() % 4));
  }
  int num;
  std::vector<float> scores, bias;
};

struct Selected {
  Selected(const Selection& selection, const Tokens& tokens, bool biased)
      : ids(size_t(tokens.num) * selection.top_k, -7), weights(ids.size(), -7.0f),
        call{selection, tokens.num, tokens.scores.data(), biased ? tokens.bias.data() : nullptr, ids.data(), weights.data()} {}
  Selected(const Selected&) = delete;

  bool operator==(const Selected& o) const {
    return ids == o.ids && !std::memcmp(weights.data(), o.weights.data(), weights.size() * sizeof(float));
  }
  std::vector<int64_t> ids;
  std::vector<float> weights;
  SelectCall call;
};

const Selection kSelections[] = {
    // experts, k, groups, open, best of, in each, softmax, renormalize, epsilon, scale
    {8, 2, 1, 1, 1, false, false, true, 0.0f, 1.0f},
    {70, 8, 1, 1, 1, false, true, false, 0.0f, 1.0f},
    {33, 33, 1, 1, 1, false, false, false, 0.0f, 1.0f},
    {64, 6, 8, 3, 2, false, false, true, 1e-20f, 2.5f},
    {40, 4, 40, 9, 2, false, false, false, 0.0f, 1.0f},
    {64, 8, 4, 4, 1, true, false, false, 0.0f, 1.0f},
};

void selections() {
  for (const Selection& s : kSelections)
    for (int num_tokens : {1, 5})
      for (bool biased : {false, true}) {
        const Tokens tokens(s, num_tokens);
        Selected one(s, tokens, biased);
        select_on_host(one.call);
        check(one.ids.back() >= 0, "one thread selects");
        for (uint64_t seed = 0; seed < 4; ++seed) {
          Selected warps(s, tokens, biased);
          const std::string wrong = failure(seed, (num_tokens + kWarps - 1) / kWarps, 32 * kWarps, kWarps * gpu::selection_bytes(s),
                                            [&] { gpu::select_tokens(warps.call); });
          check(wrong.empty() && warps == one, std::to_string(s.num_experts) + " experts, seed " + std::to_string(seed) + ": " + wrong);
        }
      }
}

// Forgets the lanes that are 16 apart.
struct HalfReduced : gpu::Warp {
  static uint64_t largest(uint64_t value) {
    gpu::sync_warp();
    for (int mask = 8; mask; mask /= 2) value = std::max(value, gpu::shuffle_xor(value, mask));
    return value;
  }
};

template <class Lanes>
bool differs(const Selection& s) {
  const Tokens tokens(s, 1);
  Selected one(s, tokens, false);
  select_on_host(one.call);
  for (uint64_t seed = 0; seed < 20; ++seed) {
    Selected warp(s, tokens, false);
    const std::string wrong = failure(seed, 1, 32, gpu::selection_bytes(s), [&] {
      uint64_t* ranks = reinterpret_cast<uint64_t*>(gpu::shared_memory());
      select_experts(Lanes{}, s, warp.call.scores, nullptr, ranks, warp.call.ids, warp.call.weights);
    });
    if (!wrong.empty() || !(warp == one)) return true;
  }
  return false;
}

void plant() {
  check(!differs<gpu::Warp>(kSelections[3]), "a sound warp selects as one thread does");
  check_caught(differs<HalfReduced>(kSelections[1]), "a reduction that leaves out half of the warp");
}

}  // namespace

int main() {
  run_test("Selections", selections);
  run_test("HalfAReduction", plant);
  return finish();
}
