// Grad tiles of backward calls on Ampere's tensor cores: a part of the gradient of one of an expert's two matrices, and
// of its bias. K counts the expert's rows, block after block in their order, without a stop between blocks.
#pragma once

#include "engine/exact_element.h"
#include "engine/sm80_backward_parts.h"

namespace flashmoe {

// The rows of an expert's row blocks, one block at a time: where both factors lie, and by how much a bias' gradient
// scales the left one. Two blocks are in shared memory: while one is copied, the next is looked up.
template <class Parts, class P>
class Sm80GradRows {
 public:
  FLASHMOE_DEVICE Sm80GradRows(const Context<P>& c, uint32_t expert, bool down)
      : c_(c), down_(down), left_(ceil_div<uint32_t>(rows_of_expert(c, expert), kBlockM)),
        ring_slot_(left_ > 0 ? c.backward_tables().first_block[expert] : 0) {}

  // The next block of the list, which is the expert's number `block`. Rows that it lacks are its last once more, without
  // a weight: they are copied as zeros.
  template <class Group>
  FLASHMOE_DEVICE void gather_next(const Group& group, int block, typename Parts::Shared& shared) {
    if (left_ == 0) return;
    const int at = block % 2 * kBlockM, num_rows = int(c_.ws.ring[ring_slot_].num_rows);
    const typename Parts::Rows made = backward_rows<uint16_t>(c_, ring_slot_);
    for (int r = group.rank(); r < kBlockM; r += group.size()) {
      const int row = r < num_rows ? r : num_rows - 1;
      for_each_gradient_row(c_, ring_slot_, uint32_t(row), 1,
                            [&](uint32_t, const std::byte* x, const std::byte* dy, float weight) {
                              shared.left[at + r] = down_ ? dy : Parts::row_at(made, made.gate_up_grad, row);
                              shared.right[at + r] = down_ ? Parts::row_at(made, made.hidden, row) : x;
                              shared.weight[at + r] = r >= num_rows ? 0.0f : down_ ? weight : 1.0f;
                            });
    }
    if (--left_ > 0) ring_slot_ = c_.backward_tables().following[ring_slot_];
  }

 private:
  const Context<P>& c_;
  const bool down_;
  uint32_t left_, ring_slot_;
};

template <class Parts>
class Sm80GradTile {
  using Shared = typename Parts::Shared;
  using Stage = typename Parts::Stage;

 public:
  static constexpr int kRows = kBlockM, kCols = Stage::kTileN;

  // Once all row blocks of the expert have gone through their up tiles.
  template <class Group, class P>
  FLASHMOE_DEVICE static void compute(const Group& group, const Context<P>& c, const Work& work, Shared& shared) {
    const Call& call = c.call;
    const GradTiles tiles(call, kRows, kCols);
    if (tiles.count() == 0) return;
    const GradTile t = tiles.at(uint32_t(work.part));
    const int num_rows = t.row_end - t.row_begin, cols = t.col_end - t.col_begin;
    std::byte* biases = t.down ? call.grad.down_bias : call.grad.gate_up_bias;
    if (t.col_begin != 0) biases = nullptr;
    const int K = int(rows_of_expert(c, uint32_t(work.index)));
    Sm80GradRows<Parts, P> rows(c, uint32_t(work.index), t.down);
    rows.gather_next(group, 0, shared);
    group.sync();

    // A block is kStepsOfBlock steps long, and its first is copied no more than as many steps ahead.
    constexpr int kStepsOfBlock = kBlockM / Parts::kStepDepth;
    static_assert(Parts::Pipeline::kAhead <= kStepsOfBlock);
    typename Parts::WarpSums sums;
    float bias[2] = {};
    Parts::template multiply<AcrossK, AcrossK>(
        group, shared,
        ScatteredCopies<Stage, Parts::kThreads, true>(group.rank(), shared.left, 2 * size_t(t.row_begin), K, num_rows),
        ScatteredCopies<Stage, Parts::kThreads, false>(group.rank(), shared.right, 2 * size_t(t.col_begin), K, cols),
        num_rows, K, sums, [&](int step, const Stage& stage) {
          if (step % kStepsOfBlock == 0) rows.gather_next(group, step / kStepsOfBlock + 1, shared);
          if (biases) add_to_bias(group, stage, shared.weight, step, bias);
        });

    const size_t rows_of_matrix = t.down ? call.hidden_size : call.up_rows();
    const size_t first_row = work.index * rows_of_matrix + t.row_begin;
    const size_t width = 2 * size_t(t.down ? call.intermediate_size : call.hidden_size);
    std::byte* first = (t.down ? call.grad.down_proj : call.grad.gate_up_proj) + first_row * width + 2 * t.col_begin;
    Parts::store(group, sums, num_rows, cols, [&](int m) { return first + m * width; });
    if (biases) store_bias(group, bias, num_rows, shared, biases + 2 * first_row);
  }

 private:
  // A bias' gradient is the sum of the left factor's rows, scaled. A thread has two of its columns, and one of so many
  // rows.
  static constexpr int kRowsApart = Parts::kThreads / (kRows / 2);

  template <class Group>
  FLASHMOE_DEVICE static void add_to_bias(const Group& group, const Stage& stage, const float* weights, int step,
                                          float (&bias)[2]) {
    const int pair = group.rank() % (kRows / 2);
    FLASHMOE_UNROLL
    for (int i = 0; i < Parts::kStepDepth; i += kRowsApart) {
      const int k = group.rank() / (kRows / 2) + i;
      const std::byte* at = stage.rows + AcrossPanel<Stage, true>::place(uint32_t(k), uint32_t(4 * pair));
      const gpu::FloatPair value = gpu::unpack_pair<Parts::dtype>(*reinterpret_cast<const uint32_t*>(at));
      const float weight = weights[(step * Parts::kStepDepth + k) % (2 * kBlockM)];
      bias[0] = fmaf(weight, value.first, bias[0]), bias[1] = fmaf(weight, value.second, bias[1]);
    }
  }

  template <class Group>
  FLASHMOE_DEVICE static void store_bias(const Group& group, const float (&bias)[2], int num_rows, Shared& shared,
                                         std::byte* to) {
    group.sync();  // all are done with the stages
    float* parts = reinterpret_cast<float*>(shared.stage);
    const int pair = group.rank() % (kRows / 2), part = group.rank() / (kRows / 2);
    for (int i = 0; i < 2; ++i) parts[part * kRows + 2 * pair + i] = bias[i];
    group.sync();
    for (int m = group.rank(); m < num_rows; m += group.size()) {
      float sum = 0;
      for (int i = 0; i < kRowsApart; ++i) sum += parts[i * kRows + m];
      store_element<Parts::dtype>(to, m, sum);
    }
  }
};

}  // namespace flashmoe
