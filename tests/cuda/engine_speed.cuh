// How fast the engines' loaders and products are alone: what the whole kernel can at most reach.
#pragma once

#include <cstdio>

#include "backward_cases.h"
#include "engine_launch.cuh"

namespace flashmoe::test {

// What the fence costs between the gathered rows and the products: the same without it, of which only the time counts.
template <int kStages, int kGatherWarps, int kMathWarps>
struct WithoutFence : Sm90Pipeline<kStages, kGatherWarps, kMathWarps> {
  FLASHMOE_DEVICE void rows_are_here(const Sm90Turn<kStages>& turn) {
    gpu::sync_warp();
    if (gpu::lane() == 0) this->full_[turn.stage].arrive();
  }
};
template <DType dtype>
using WideWithoutFence = Sm90Engine<dtype, 256, 4, 2, WithoutFence>;

// In bf16, of x and of weights that no cache holds, and of which the first lie in any L2.
class EngineSpeed {
 public:
  EngineSpeed() : x_(normals(), size_t(kX) * kDepth / 2), weights_(normals(), size_t(kStreamed) * kDepth / 2) {
    must(cudaDeviceGetAttribute(&num_blocks_, cudaDevAttrMultiProcessorCount, 0), "multiprocessors");
    must(cudaEventCreate(&begin_), "event"), must(cudaEventCreate(&end_), "event");
  }

  void ampere() {
    using Ampere = Sm80Alone<DType::kBFloat16>;
    time<Ampere>("Ampere, weights in L2", 128, kInL2, num_blocks_);
    time<Ampere>("Ampere, weights streamed", 128, kStreamed, num_blocks_);
    time<Ampere>("Ampere, weights streamed", 1, kStreamed, num_blocks_);
  }
  // One block has the L2 for itself: what is slow there is latency, and not the L2's rate.
  void hopper() {
    using Wide = Sm90Alone<Sm90Wide, DType::kBFloat16>;
    using Unfenced = Sm90Alone<WideWithoutFence, DType::kBFloat16>;
    time<Wide>("wide, one block, L2", 128, kInL2, 1);
    time<Unfenced>("  the same without the fence", 128, kInL2, 1);
    time<Wide>("wide, weights in L2", 128, kInL2, num_blocks_);
    time<Unfenced>("  the same without the fence", 128, kInL2, num_blocks_);
    time<Wide>("wide, weights streamed", 128, kStreamed, num_blocks_);
    for (int num_rows : {1, 8, 32, 64})
      time<Sm90Alone<Sm90Narrow, DType::kBFloat16>>("narrow, weights streamed", num_rows, kStreamed, num_blocks_);
  }

  // What counts as weights is matrices of kDepth rows and kWidth columns, or fewer, where it lies across.
  void backward() {
    constexpr DType kDType = DType::kBFloat16;
    time<GradOfHidden<kDType>>("grad of h, weights in L2", 128, kInL2, num_blocks_);
    time<UngatedUp<kDType>>("ungated up, weights in L2", 128, kInL2, num_blocks_);
    time<GradOfX<kDType>>("grad of x, weights in L2", 128, kInL2, num_blocks_);
    time<GradOfX<kDType>>("grad of x, weights streamed", 128, kStreamed, num_blocks_);
    time<GradOfWeights<kDType>>("grad of w, rows in L2", 128, kInL2, num_blocks_);
    time<GradOfWeights<kDType>>("grad of w, rows streamed", 128, kStreamed, num_blocks_);
  }

 private:
  static constexpr int kDepth = 4096, kX = 512, kInL2 = 1024, kStreamed = 96 * 1024;  // 4, 8, 768 MiB
  static constexpr int kWidth = 4096;
  static constexpr int kTiles = 64, kRuns = 15, kWarmUps = 3;

  // Not zeros: what is multiplied decides what a GPU draws, and so its clock.
  static std::vector<uint32_t> normals() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> values(size_t{1} << 21);
    for (float& value : values) value = normal(random);
    return encoded<DType::kBFloat16>(values);
  }

  template <class Alone>
  void time(const char* name, int num_rows, int num_weights, int num_blocks) {
    constexpr int kTileN = Alone::kTileN, kRowBytes = kDepth * dtype_bytes(DType::kBFloat16);
    const Tiles tiles{{}, x_.bytes(), weights_.bytes(), kX, num_weights, kDepth, num_rows, kTiles,
                      {0, kTileN / 2}, kTileN, num_weights, std::min(num_weights, kWidth), nullptr};
    std::vector<double> seconds;
    for (int run = -kWarmUps; run < kRuns; ++run) {
      float milliseconds = 0;
      must(cudaEventRecord(begin_), name);
      launch<Alone>(tiles, num_blocks);
      must(cudaEventRecord(end_), name);
      must(cudaEventSynchronize(end_), name);
      must(cudaEventElapsedTime(&milliseconds, begin_, end_), name);
      if (run >= 0) seconds.push_back(milliseconds * 1e-3);
    }
    std::sort(seconds.begin(), seconds.end());
    const int passes = ceil_div(num_rows, Alone::kRows), steps = kTiles * passes * (kRowBytes / Alone::kStepBytes);
    const double median = seconds[kRuns / 2], tiles_done = double(num_blocks) * kTiles;
    std::printf("%-29s %3d rows %3d blocks: %7.1f ns a step (%.1f - %.1f), %6.1f TFLOP/s, weights %6.3f TB/s\n", name,
                num_rows, num_blocks, median / steps * 1e9, seconds[kRuns / 4] / steps * 1e9,
                seconds[kRuns * 3 / 4] / steps * 1e9, tiles_done * 2 * num_rows * kTileN * kDepth / median * 1e-12,
                tiles_done * passes * kTileN * kRowBytes / median * 1e-12);
  }

  OnGpu<uint32_t> x_, weights_;
  int num_blocks_ = 0;
  cudaEvent_t begin_, end_;
};

}  // namespace flashmoe::test
