// What a call must send, and compute, by its routing alone.
#pragma once

#include <set>

#include "team.h"

namespace flashmoe::test {

struct Bytes {
  std::vector<uint64_t> header, rows, results, signals;  // by destination
  std::vector<uint64_t> tokens_per_expert;
  bool operator==(const Bytes&) const = default;
};

// `dedup` false: as if a row travelled once per expert. A backward call sends x and y's gradient in a slot, a weight
// with each entry, a float behind each result's gradient, each in 16 bytes, and for each expert a release to whoever
// sent it rows.
inline Bytes expected(const CallOfAll& call, int rank, bool dedup = true, bool backward = false) {
  const Layer& l = *call.layer;
  const int ep_size = int(call.tokens.size());
  const ExpertMap owner = call.map ? *call.map : equal_blocks(l.num_experts, ep_size);
  const uint64_t row = uint64_t(l.hidden_size) * dtype_bytes(l.dtype);
  const uint64_t slot = backward ? 2 * row : row, result = backward ? (row + 15) / 16 * 16 + 16 : row;
  // rows[source][expert], in the order of which a source's rows stand in the expert's list
  std::vector<std::vector<uint64_t>> rows(ep_size, std::vector<uint64_t>(l.num_experts, 0));
  for (int s = 0; s < ep_size; ++s)
    for (int64_t id : call.tokens[s].ids)
      if (id >= 0 && id < l.num_experts) ++rows[s][id];

  Bytes b{std::vector<uint64_t>(ep_size), std::vector<uint64_t>(ep_size), std::vector<uint64_t>(ep_size), std::vector<uint64_t>(ep_size), {}};
  for (int e = 0; e < l.num_experts; ++e) {
    if (owner[e] != rank) continue;
    uint64_t all = 0;
    for (int i = 0; i < ep_size; ++i) {
      const int s = (rank + i) % ep_size;
      // A run ends where a row block of 128 does.
      for (uint64_t r = all; s != rank && r < all + rows[s][e]; ++r) b.signals[s] += r == all || r % 128 == 0 ? 8 : 0;
      if (s != rank) b.results[s] += rows[s][e] * result;
      if (backward && s != rank && rows[s][e]) b.signals[s] += 8;  // the release
      all += rows[s][e];
    }
    b.tokens_per_expert.push_back(all);
  }
  for (int d = 0; d < ep_size; ++d) {
    if (d == rank) continue;
    uint64_t entries = 0, local = 0;
    for (int e = 0; e < l.num_experts; ++e)
      if (owner[e] == d) entries += rows[rank][e], ++local;
    std::set<int> tokens;
    const Tokens& t = call.tokens[rank];
    for (size_t pair = 0; pair < t.ids.size(); ++pair)
      if (t.ids[pair] >= 0 && t.ids[pair] < l.num_experts && owner[t.ids[pair]] == d) tokens.insert(int(pair) / l.top_k);
    const uint64_t slots = dedup ? tokens.size() : entries;
    b.header[d] = entries ? 40 + 4 * (local + 1 + (backward ? 2 : 1) * entries) : 0;
    b.rows[d] = slots * slot;
    b.signals[d] += 8 + 8 * ((slots + 63) / 64);
  }
  return b;
}

inline std::string text(const Bytes& b) {
  std::string s;
  for (const auto* v : {&b.header, &b.rows, &b.results, &b.signals, &b.tokens_per_expert}) {
    for (uint64_t n : *v) s += std::to_string(n) + " ";
    s += "| ";
  }
  return s;
}

}  // namespace flashmoe::test
