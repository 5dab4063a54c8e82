// The timeline of calls on fibers, with each engine: every piece of work once, in the order that the protocol promises,
// and nothing else changed by it.
#include <map>
#include <set>

#include "engine/sm80.h"
#include "engine/sm90.h"
#include "simt_programs.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

using Exact = ExactEngine<kSimtWarps>;
using Ampere = Sm80Engine<DType::kBFloat16, 64, 4>;
using Hopper = Sm90Engine<DType::kBFloat16, 64, 4, 2>;
using HopperNarrow = Sm90Engine<DType::kBFloat16, 64, 13, 1>;

template <class E, class P = CudaPlatform>
SimtOutcome run_on(const Program& program, const SimtOptions& options, uint64_t seed) {
  return SimtTeam<P, E, gpu::Crew<E::kCrewWarps>>(program, options).run(seed);
}

bool is_tile(const TraceEvent& e) { return e.kind == uint32_t(TraceKind::kUpTile) || e.kind == uint32_t(TraceKind::kDownTile); }

using Piece = std::tuple<uint32_t, uint32_t, int>;  // kind; row block, destination or combine task; part
Piece piece_of(const TraceEvent& e) {
  return {e.kind, is_tile(e) ? e.sequence : e.kind == uint32_t(TraceKind::kPlan) ? 0 : uint32_t(e.index), e.part};
}

// What the routing alone says of a rank's call.
struct Expected {
  std::map<int, uint32_t> rows;   // of each local expert that has any
  uint32_t blocks = 0;
  std::vector<int> chunks;        // of rows, to each rank
};

Expected expected_of(const CallOfAll& call, int rank) {
  const ExpertMap& owner = *call.map;
  Expected expected;
  expected.chunks.resize(call.tokens.size());
  const int first = int(std::find(owner.begin(), owner.end(), rank) - owner.begin());
  for (const Tokens& tokens : call.tokens)
    for (int64_t id : tokens.ids)
      if (id >= 0 && id < call.layer->num_experts && owner[id] == rank) ++expected.rows[int(id) - first];
  for (const auto& [expert, rows] : expected.rows) expected.blocks += (rows + kBlockM - 1) / kBlockM;
  const Tokens& mine = call.tokens[rank];
  for (int d = 0; d < int(call.tokens.size()); ++d) {
    int rows = 0;
    for (int t = 0; t < mine.num_tokens; ++t) {
      const auto ids = mine.ids.begin() + t * call.layer->top_k;
      rows += std::any_of(ids, ids + call.layer->top_k, [&](int64_t id) { return id >= 0 && id < call.layer->num_experts && owner[id] == d; });
    }
    expected.chunks[d] = (rows + kChunkRows - 1) / kChunkRows;
  }
  return expected;
}

// What is wrong with one rank's notes taken alone, or nothing.
template <class E>
std::string trouble_of_rank(const SimtTrace& trace, const CallOfAll& call, int rank, int blocks) {
  const Layer& layer = *call.layer;
  const Expected expected = expected_of(call, rank);
  std::map<Piece, int> times;
  std::map<uint32_t, uint64_t> ups_ended, runnable;       // by row block
  std::map<uint32_t, std::pair<int, uint32_t>> rows;      // likewise: of which expert, and how many
  for (const TraceEvent& e : trace.lists[blocks + 1])
    for (uint32_t b = 0; b < e.sequence; ++b) runnable.try_emplace(b, e.begin_ns);
  for (int block = 0; block < blocks; ++block) {
    uint64_t last = 0;
    for (const TraceEvent& e : trace.lists[block]) {
      ++times[piece_of(e)];
      if (e.begin_ns < last || e.end_ns < e.begin_ns || e.loads_ns > e.end_ns) return "times of a block out of order";
      if (e.loads_ns != e.begin_ns && !(is_tile(e) && E::kLoaderWarps > 0)) return "loads of one that has no loaders";
      last = e.end_ns;
      if (!is_tile(e)) continue;
      if (rows.try_emplace(e.sequence, e.expert, e.rows).first->second != std::pair{int(e.expert), e.rows}) return "a row block's tiles differ";
      if (e.kind == uint32_t(TraceKind::kUpTile)) ups_ended[e.sequence] = std::max(ups_ended[e.sequence], e.end_ns);
    }
  }
  std::map<Piece, int> once{{{uint32_t(TraceKind::kPlan), 0, 0}, 1}};
  const uint32_t up_tiles = ceil_div(layer.intermediate_size, E::up_cols(layer.gated)), down_tiles = ceil_div(layer.hidden_size, E::down_cols(layer.gated));
  for (uint32_t b = 0; b < expected.blocks; ++b) {
    for (uint32_t t = 0; t < up_tiles; ++t) once[{uint32_t(TraceKind::kUpTile), b, t}] = 1;
    for (uint32_t t = 0; t < down_tiles; ++t) once[{uint32_t(TraceKind::kDownTile), b, t}] = 1;
  }
  for (int c = 0; c < ceil_div(call.tokens[rank].num_tokens, kCombineTokens); ++c) once[{uint32_t(TraceKind::kCombine), c, 0}] = 1;
  const int tickets = *std::max_element(expected.chunks.begin(), expected.chunks.end());
  for (int d = 0; d < int(call.tokens.size()); ++d)
    for (int c = 0; c < tickets && d != rank; ++c) once[{uint32_t(TraceKind::kSendChunk), d, c}] = 1;
  if (times != once) return "not every piece of work is there once";

  std::map<int, uint32_t> of_expert;
  for (const auto& [b, noted] : rows) of_expert[noted.first] += noted.second;
  if (of_expert != expected.rows) return "rows of an expert";
  for (int block = 0; block < blocks; ++block)
    for (const TraceEvent& e : trace.lists[block]) {
      if (e.kind == uint32_t(TraceKind::kDownTile) && e.begin_ns < ups_ended[e.sequence]) return "a down tile before its up tiles had ended";
      if (is_tile(e) && (!runnable.count(e.sequence) || e.begin_ns < runnable[e.sequence])) return "a tile before its row block was published";
    }
  return {};
}

// Chunks come after they were sent, and all of them come.
std::string trouble_of_arrivals(const std::vector<SimtTrace>& traces, const CallOfAll& call, int blocks) {
  for (int from = 0; from < int(traces.size()); ++from)
    for (int to = 0; to < int(traces.size()); ++to) {
      if (from == to) continue;
      int most = 0;
      for (const TraceEvent& arrived : traces[to].lists[blocks]) {
        if (arrived.index != from) continue;
        most = std::max(most, int(arrived.part));
        for (int block = 0; block < blocks; ++block)
          for (const TraceEvent& sent : traces[from].lists[block])
            if (sent.kind == uint32_t(TraceKind::kSendChunk) && sent.index == to && sent.part < arrived.part && sent.end_ns > arrived.begin_ns)
              return "rows here before they were sent";
      }
      if (most != expected_of(call, from).chunks[to]) return "chunks that never came";
    }
  return {};
}

template <class E>
std::string trouble_of_trace(const SimtOutcome& o, const Program& program, int blocks) {
  const CallOfAll& call = program.back();
  for (int rank = 0; rank < int(call.tokens.size()); ++rank) {
    const SimtTrace& trace = o.traces[rank];
    if (trace.lists.size() != size_t(blocks) + 2) return "a list for each block's crew and two agents";
    for (int block = 0; block < blocks; ++block)
      if (trace.ends[block].multiprocessor != uint32_t(100 + rank * blocks + block)) return "the multiprocessor of a block";
    if (const std::string trouble = trouble_of_rank<E>(trace, call, rank, blocks); !trouble.empty()) return "rank " + std::to_string(rank) + ": " + trouble;
  }
  return trouble_of_arrivals(o.traces, call, blocks);
}

const Layer& layer_for(DType dtype) {
  static const Layer exact({.hidden_size = 72, .intermediate_size = 104, .num_experts = 6, .bias = true}, 1);
  static const Layer tensor({.hidden_size = 72, .intermediate_size = 104, .num_experts = 6, .bias = true, .dtype = DType::kBFloat16}, 1);
  return dtype == DType::kFloat32 ? exact : tensor;
}

// Uneven ranks, several chunks and row blocks, and a call before the one that is looked at.
std::vector<Program> programs(const Layer& layer, uint64_t seed) {
  return {program_of(layer, {{21}, {150}}, seed), program_of(layer, {{30, 7}, {150, 33}}, seed + 10, Skew::kOneExpert),
          program_of(layer, {{0, 40}}, seed + 20, Skew::kDropSome)};
}

template <class E, class P = CudaPlatform>
void engine(const char* name, DType dtype, int mapped_together = 0) {
  bool ahead = false;
  for (const Program& program : programs(layer_for(dtype), 7))
    for (int blocks : {1, 3})
      for (int seed = 0; seed < num_seeds(2); ++seed) {
        SimtOptions options{.ep_size = int(program[0].tokens.size()), .blocks_per_rank = blocks, .mapped_together = mapped_together};
        const std::string what = std::string(name) + ", " + std::to_string(options.ep_size) + " ranks of " + std::to_string(blocks) + " blocks, seed " + std::to_string(seed) + ": ";
        const SimtOutcome silent = run_on<E, P>(program, options, seed);
        options.max_events = 1000;
        const SimtOutcome o = run_on<E, P>(program, options, seed);
        const std::string call = trouble_of(o, program), trace = call.empty() ? trouble_of_trace<E>(o, program, blocks) : "";
        check(call.empty() && trace.empty(), what + call + trace);
        check(o.y == silent.y, what + "other bits than without a trace");
        for (const SimtTrace& rank : o.traces)
          for (const auto& list : rank.lists)
            ahead |= std::any_of(list.begin(), list.end(), [](const TraceEvent& e) { return e.loads_ns < e.begin_ns; });
      }
  check(ahead == (E::kLoaderWarps > 0), std::string(name) + ": whether loads run ahead of the crew");
}

void full_lists_count_on() {
  const Program program = program_of(layer_for(DType::kFloat32), {{60, 20}}, 50);
  SimtOptions options{.ep_size = 2, .blocks_per_rank = 2, .max_events = 1000};
  const SimtOutcome whole = run_on<Exact>(program, options, 3);
  options.max_events = 3;  // the lists lie side by side: one that went on would be seen in the next
  const SimtOutcome few = run_on<Exact>(program, options, 3);
  check(trouble_of(few, program).empty(), "a call whose lists are full");
  for (int rank = 0; rank < 2; ++rank)
    for (size_t list = 0; list < 4; ++list) {
      const auto &all = whole.traces[rank].lists[list], &kept = few.traces[rank].lists[list];
      check(few.traces[rank].ends[list].count == all.size(), "events for which there was no room are counted");
      bool same = kept.size() == std::min<size_t>(3, all.size());
      for (size_t i = 0; same && i < kept.size(); ++i) same = kept[i].end_ns == all[i].end_ns && piece_of(kept[i]) == piece_of(all[i]);
      check(same, "the first events are kept, rank " + std::to_string(rank) + ", list " + std::to_string(list));
    }
  check(whole.traces[0].lists[0].size() > 3, "lists that can be full");
}

// ---- Faults that a timeline must show.
struct MiscountingPlatform : CudaPlatform {
  using CudaPlatform::CudaPlatform;
  static uint32_t fetch_sub(uint32_t* word, uint32_t n) {
    const uint32_t before = CudaPlatform::fetch_sub(word, n);
    return before == 2 ? 1 : before == 1 ? 2 : before;
  }
};
// A clock for each of two halves of the threads, one of which is late.
struct TwoClocksPlatform : CudaPlatform {
  using CudaPlatform::CudaPlatform;
  static uint64_t now_ns() { return CudaPlatform::now_ns() + (gpu::block() == 0 ? 10'000'000 : 0); }
};

template <class P>
void check_seen(const std::string& words, const std::string& plant) {
  const Program program = program_of(layer_for(DType::kFloat32), {{70, 90}}, 60, Skew::kOneExpert);
  int seen = 0;
  for (int seed = 0; seed < 20 && !seen; ++seed)
    seen += contains(trouble_of_trace<Exact>(run_on<Exact, P>(program, {.ep_size = 2, .blocks_per_rank = 3, .max_events = 1000}, seed), program, 3), words);
  check_caught(seen, plant);
}
void faults_are_seen() {
  check_seen<MiscountingPlatform>("before its up tiles had ended", "a row block handed on before its last tile");
  check_seen<TwoClocksPlatform>("before", "blocks whose clocks differ");
}

}  // namespace

int main() {
  run_test("Exact", [] { engine<Exact>("exact", DType::kFloat32); });
  run_test("ExactOverATransport", [] { engine<Exact, NvshmemPlatform>("exact, not mapped", DType::kFloat32, 1); });
  run_test("Ampere", [] { engine<Ampere>("Ampere", DType::kBFloat16); });
  run_test("Hopper", [] { engine<Hopper>("Hopper", DType::kBFloat16); });
  run_test("HopperNarrow", [] { engine<HopperNarrow>("Hopper, narrow", DType::kBFloat16); });
  run_test("FullListsCountOn", full_lists_count_on);
  run_test("FaultsAreSeen", faults_are_seen);
  return finish();
}
