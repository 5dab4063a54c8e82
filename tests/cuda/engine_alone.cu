// The engines alone on a GPU: what to run there first. Checks their sums, says which are wrong and of what, then tells
// how fast they are. A case that hangs is the last one named.
//   nvcc -std=c++20 -O3 -DNDEBUG -I csrc -gencode arch=compute_90a,code=sm_90a tests/cuda/engine_alone.cu
#include "engine_speed.cuh"

namespace flashmoe::test {
namespace {

constexpr int kBlocks = 8;
// Enough that shallow tiles go through all stages more than twice: by barriers of either parity. The backward engine's
// begin with the same stage; there are enough for all of its columns.
constexpr int kTilesOfBlock = 40, kBackwardTilesOfBlock = 4;

template <class Alone>
bool check(const char* name, const Integers& integers, Tiles tiles) {
  std::printf("%-18s %3d rows of %4d: ", name, tiles.num_rows, integers.depth);
  const auto x = encoded<Alone::kDType>(integers.x_for<Alone>());
  const auto weights = encoded<Alone::kDType>(integers.weights_for<Alone>());
  const OnGpu<uint32_t> x_there(x, x.size()), weights_there(weights, weights.size());
  const OnGpu<float> sums(size_t{kBlocks} * tiles.num_tiles * tiles.num_rows * Alone::kTileN);
  tiles.x = x_there.bytes(), tiles.weights = weights_there.bytes(), tiles.sums = sums.data();
  launch<Alone>(tiles, kBlocks);
  must(cudaDeviceSynchronize(), "kernel");
  const std::string wrong = wrong_sums<Alone>(integers, tiles, sums.values());
  std::printf("%s\n", wrong.empty() ? "ok" : wrong.c_str());
  return wrong.empty();
}

int check_engines(int capability) {
  int num_wrong = 0;
  for (int depth : kDepths) {
    const Integers integers(depth);
    for_each_engine(capability, [&]<class Alone>(const char* name, Alone) {
      for (int num_rows : kNumRows)
        num_wrong += !check<Alone>(name, integers, integers.tiles<Alone>(num_rows, kTilesOfBlock));
    });
  }
  return num_wrong;
}

int check_backward_products() {
  int num_wrong = 0;
  for (int depth : kBackwardDepths) {
    const Integers integers(depth);
    for_each_backward_product([&]<class Alone>(const char* name, Alone) {
      if (!has_depth<Alone>(depth)) return;
      for (int num_rows : kNumRows)
        num_wrong += !check<Alone>(name, integers, backward_tiles<Alone>(integers, num_rows, kBackwardTilesOfBlock));
    });
  }
  return num_wrong;
}

int run() {
  cudaDeviceProp gpu;
  must(cudaGetDeviceProperties(&gpu, 0), "GPU 0");
  const int capability = gpu.major * 10 + gpu.minor;
  std::printf("%s, compute capability %d.%d\n", gpu.name, gpu.major, gpu.minor);
  int num_wrong = check_engines(capability);
  EngineSpeed speed;
  speed.ampere();
  if (capability == 90) speed.hopper();
  num_wrong += check_backward_products();
  speed.backward();
  std::printf("%d cases are wrong\n", num_wrong);
  return num_wrong != 0;
}

}  // namespace
}  // namespace flashmoe::test

int main() {
  std::setvbuf(stdout, nullptr, _IONBF, 0);
  try {
    return flashmoe::test::run();
  } catch (const std::exception& error) {
    std::printf("\n%s\n", error.what());
    return 1;
  }
}
