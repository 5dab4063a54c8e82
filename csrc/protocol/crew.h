// The host's crew: one thread that performs what an agent decided, with the products of a TileEngine.
#pragma once

#include "engine/backward_engine.h"
#include "protocol/dispatcher.h"
#include "protocol/kept.h"
#include "protocol/processor.h"

namespace flashmoe {

template <TileEngine E>
TileShape tile_shape(const Call& call, const typename E::Problem& problem) {
  return {call.intermediate_size, call.hidden_size, E::up_tile_cols(problem), E::down_tile_cols(problem)};
}

template <Platform P, TileEngine E>
class CrewOfOne {
 public:
  CrewOfOne(const Context<P>& context, const E& engine, const typename E::Problem& problem, void* scratch)
      : CrewOfOne(context, engine, problem, scratch, tile_shape<E>(context.call, problem)) {}

  const TileShape& tiles() const { return tiles_; }

  void perform(const Work& work) {
    switch (work.kind) {
      case WorkKind::kPlan:
      case WorkKind::kSendChunk: return dispatcher_.perform(Alone{}, work);
      case WorkKind::kUpTile: return compute_up(work);
      case WorkKind::kDownTile: return compute_down(work);
      default: combine(work);
    }
  }
  // Tells the others.
  void finish(const Work& work) { is_of_dispatcher(work.kind) ? dispatcher_.finish(work) : processor_.finish(work); }

 protected:
  CrewOfOne(const Context<P>& context, const E& engine, const typename E::Problem& problem, void* scratch,
            const TileShape& tiles)
      : c_(context),
        engine_(engine),
        problem_(problem),
        scratch_(scratch),
        tiles_(tiles),
        dispatcher_(context),
        processor_(context, tiles) {}

  Context<P> c_;
  const E& engine_;
  const typename E::Problem& problem_;
  void* scratch_;
  TileShape tiles_;

 private:
  void compute_up(const Work& work) {
    const UpTile t = up_tile(c_, tiles_, work);
    const void* rows[kBlockM];
    for_each_token_row(c_, uint32_t(work.index), 0, uint32_t(t.num_rows),
                       [&](uint32_t r, const std::byte* row) { rows[r] = row; });
    if constexpr (BackwardEngine<E>) {
      if (float* sums = sums_to_keep(c_, uint32_t(work.index))) {
        if (work.part == 0) note_kept(c_, uint32_t(work.index));
        return engine_.up_tile_keeping(problem_, rows, t.num_rows, t.gate_up, t.bias, t.begin, t.end, t.hidden,
                                       ptrdiff_t(c_.ws.hidden_stride), sums, scratch_);
      }
    }
    engine_.up_tile(problem_, rows, t.num_rows, t.gate_up, t.bias, t.begin, t.end, t.hidden,
                    ptrdiff_t(c_.ws.hidden_stride), scratch_);
  }

  void compute_down(const Work& work) {
    const DownTile t = down_tile(c_, tiles_, work);
    void* rows[kBlockM];
    for_each_result_row(c_, uint32_t(work.index), 0, uint32_t(t.num_rows),
                        [&](uint32_t r, std::byte* row) { rows[r] = row; });
    engine_.down_tile(problem_, t.hidden, ptrdiff_t(c_.ws.hidden_stride), t.num_rows, t.down, t.bias, t.begin, t.end,
                      rows, scratch_);
  }

  // A token's rows are summed in the order of its routing, whatever the order of their arrival.
  void combine(const Work& work) {
    const Call& call = c_.call;
    const TokenRange tokens = combine_tokens(call, work.index);
    for (int token = tokens.begin; token < tokens.end; ++token) {
      const void* rows[kMaxTopK];
      float weights[kMaxTopK];
      int num = 0;
      for (int pair = token * call.top_k; pair < (token + 1) * call.top_k; ++pair) {
        rows[num] = returned_row(c_, pair);
        if (rows[num]) weights[num++] = call.topk_weights[pair];
      }
      engine_.combine(problem_, rows, weights, num, call.y + token * call.row_bytes());
    }
  }

  Dispatcher<P> dispatcher_;
  Processor<P> processor_;
};

}  // namespace flashmoe
