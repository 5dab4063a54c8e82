// Grad tiles of backward calls on Ampere's tensor cores: a part of the gradient of one of an expert's two matrices, and
// of its bias. K counts the expert's rows, block after block in their order, without a stop between blocks.
#pragma once

#include "engine/exact_element.h"
#include "engine/sm80_backward_parts.h"

namespace flashmoe {

// The rows of an expert's row blocks, one block at a time: where both factors lie, and by how much a bias' gradient
// scales the left one. Two blocks are in shared memory. Of one more each thread has a row on its way from memory.
template <class Parts, class P>
class Sm80GradRows {
 public:
  FLASHMOE_DEVICE Sm80GradRows(const Context<P>& c, uint32_t expert, bool down)
      : c_(c), down_(down), num_rows_(int(rows_of_expert(c, expert))),
        ring_slot_(num_rows_ > 0 ? c.backward_tables().first_block[expert] : 0) {}

  FLASHMOE_DEVICE int num_rows() const { return num_rows_; }

  // Begins with the expert's block number `block`. Rows that it lacks are its last once more, without a weight: they
  // are copied as zeros.
  template <class Group>
  FLASHMOE_DEVICE void look_up(const Group& group, int block) {
    static_assert(Parts::kThreads >= kBlockM, "a row for each thread");
    const int left = num_rows_ - block * kBlockM;
    if (left <= 0 || group.rank() >= kBlockM) return;
    const typename Parts::Rows made = Parts::rows_of(c_, int(ring_slot_));
    const RowOrigin* origin = Parts::origin_of(c_, made, row_of(group, left));
    other_ = gpu::load_coherent(reinterpret_cast<const uint64_t*>(down_ ? &origin->dy : &origin->x));
    const uint32_t* weight = reinterpret_cast<const uint32_t*>(&origin->weight);
    weight_ = group.rank() >= left ? 0 : down_ ? gpu::load_coherent(weight) : kOne;
  }

  // Puts it into shared memory, and goes on to the one that follows it.
  template <class Group>
  FLASHMOE_DEVICE void put(const Group& group, int block, typename Parts::Shared& shared) {
    const int left = num_rows_ - block * kBlockM;
    if (left <= 0) return;
    if (const int at = block % 2 * kBlockM + group.rank(); group.rank() < kBlockM) {
      const typename Parts::Rows made = Parts::rows_of(c_, int(ring_slot_));
      const std::byte* hidden = Parts::row_at(made, down_ ? made.hidden : made.gate_up_grad, row_of(group, left));
      const std::byte* other = reinterpret_cast<const std::byte*>(other_);
      shared.left[at] = down_ ? other : hidden;
      shared.right[at] = down_ ? hidden : other;
      memcpy(&shared.weight[at], &weight_, 4);
    }
    if (left > kBlockM) ring_slot_ = c_.backward_tables().following[ring_slot_];
  }

 private:
  static constexpr uint32_t kOne = 0x3f800000;  // 1.0f

  template <class Group>
  FLASHMOE_DEVICE static int row_of(const Group& group, int left) {
    return group.rank() < left ? group.rank() : left - 1;
  }

  const Context<P>& c_;
  const bool down_;
  const int num_rows_;
  uint32_t ring_slot_, weight_ = 0;
  uint64_t other_ = 0;
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
    if (GradTiles(c.call, kRows, kCols).count() == 0) return;
    typename Parts::WarpSums sums;
    float bias[2] = {};
    multiply(group, c, work, shared, sums, bias);
    store(group, c, work, shared, sums, bias);
  }

 private:
  static constexpr int kStepsOfBlock = kBlockM / Parts::kStepDepth;
  // Only then is a block in shared memory before its first step is copied.
  static_assert(Parts::Pipeline::kAhead <= kStepsOfBlock);

  FLASHMOE_DEVICE static flashmoe::GradTile tile_of(const Call& call, const Work& work) {
    return GradTiles(call, kRows, kCols).at(uint32_t(work.part));
  }
  // Of the tile's matrix, if it is asked for and the tile is of the first columns.
  FLASHMOE_DEVICE static std::byte* biases_of(const Call& call, const flashmoe::GradTile& t) {
    return t.col_begin != 0 ? nullptr : t.down ? call.grad.down_bias : call.grad.gate_up_bias;
  }

  // The tile is not kept in registers beyond this.
  template <class Group, class P>
  FLASHMOE_DEVICE static void multiply(const Group& group, const Context<P>& c, const Work& work, Shared& shared,
                                       typename Parts::WarpSums& sums, float (&bias)[2]) {
    const flashmoe::GradTile t = tile_of(c.call, work);
    const int num_rows = t.row_end - t.row_begin, cols = t.col_end - t.col_begin;
    const bool sums_bias = biases_of(c.call, t);
    Sm80GradRows<Parts, P> rows(c, uint32_t(work.index), t.down);
    rows.look_up(group, 0);
    rows.put(group, 0, shared);
    rows.look_up(group, 1);
    group.sync();
    const int K = rows.num_rows();
    Parts::template multiply<AcrossK, AcrossK>(
        group, shared,
        ScatteredCopies<Stage, Parts::kThreads, true>(group.rank(), shared.left, 2 * t.row_begin, K, num_rows),
        ScatteredCopies<Stage, Parts::kThreads, false>(group.rank(), shared.right, 2 * t.col_begin, K, cols), num_rows,
        K, sums, [&](int step, const Stage& stage) {
          if (step % kStepsOfBlock == 0) {
            rows.put(group, step / kStepsOfBlock + 1, shared);
            rows.look_up(group, step / kStepsOfBlock + 2);
          }
          if (sums_bias) add_to_bias(group, stage, shared.weight, step, bias);
        });
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void store(const Group& group, const Context<P>& c, const Work& work, Shared& shared,
                                    const typename Parts::WarpSums& sums, const float (&bias)[2]) {
    const Call& call = c.call;
    const flashmoe::GradTile t = tile_of(call, work);
    const int num_rows = t.row_end - t.row_begin;
    const size_t rows_of_matrix = t.down ? call.hidden_size : call.up_rows();
    const size_t first_row = work.index * rows_of_matrix + t.row_begin;
    const size_t width = 2 * size_t(t.down ? call.intermediate_size : call.hidden_size);
    std::byte* first = (t.down ? call.grad.down_proj : call.grad.gate_up_proj) + first_row * width + 2 * t.col_begin;
    Parts::store(group, sums, num_rows, t.col_end - t.col_begin, [&](int m) { return first + m * width; });
    if (std::byte* biases = biases_of(call, t)) store_bias(group, bias, num_rows, shared, biases + 2 * first_row);
  }

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
