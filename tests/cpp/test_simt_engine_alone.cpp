// The engines' loaders and products without the protocol, on fibers: the cases that tests/cuda/engine_alone.cu asks a
// GPU for, but for the deep ones, which whole kernels have (test_simt_hopper); and that the comparison sees what is
// wrong.
#include <cstring>

#include "backward_cases.h"
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Rows of 16-byte multiples that begin at such an address.
struct Rows {
  explicit Rows(const std::vector<uint32_t>& words) : store((words.size() + 3) / 4) {
    memcpy(store.data(), words.data(), words.size() * 4);
  }
  const std::byte* data() const { return reinterpret_cast<const std::byte*>(store.data()); }
  std::vector<gpu::Words4> store;
};

template <class Alone>
std::string run(const Integers& integers, Tiles tiles, uint64_t seed) {
  const Rows x(encoded<Alone::kDType>(integers.x_for<Alone>()));
  const Rows weights(encoded<Alone::kDType>(integers.weights_for<Alone>()));
  std::vector<float> sums(size_t(tiles.num_tiles) * tiles.num_rows * Alone::kTileN, NAN);
  tiles.x = x.data(), tiles.weights = weights.data(), tiles.sums = sums.data();
  if (std::string error = Alone::make_map(&tiles); !error.empty()) return error;
  const std::string error = failure(seed, 1, Alone::kThreads, sizeof(typename Alone::Shared),
                                    [&] { Alone::run(tiles, gpu::shared_memory()); });
  return error.empty() ? wrong_sums<Alone>(integers, tiles, sums) : error;
}

void every_engine() {
  for (int depth : kDepths) {
    if (depth > 200) break;
    const Integers integers(depth);
    for_each_engine(90, [&]<class Alone>(const std::string& name, Alone) {
      for (int num_rows : kNumRows) {
        // Enough shallow tiles, of one step each, to come to the first stages again.
        const Tiles tiles = integers.tiles<Alone>(num_rows, depth == 8 ? Alone::Engine::Pipeline::kStages + 2 : 2);
        const std::string wrong = run<Alone>(integers, tiles, uint64_t(num_rows));
        check(wrong.empty(),
              name + ", " + std::to_string(num_rows) + " rows of " + std::to_string(depth) + ": " + wrong);
      }
    });
  }
}

void every_backward_product() {
  for (int depth : kBackwardDepths) {
    if (depth > 333) break;  // three blocks of rows: all places in shared memory, and one of them again
    const Integers integers(depth);
    for_each_backward_product([&]<class Alone>(const std::string& name, Alone) {
      if (!has_depth<Alone>(depth)) return;
      for (int num_rows : kNumRows) {
        const Tiles tiles = backward_tiles<Alone>(integers, num_rows, 2);
        const std::string wrong = run<Alone>(integers, tiles, uint64_t(num_rows));
        check(wrong.empty(),
              name + ", " + std::to_string(num_rows) + " rows of " + std::to_string(depth) + ": " + wrong);
      }
    });
  }
}

// Loads of operands that lie across, as they could go wrong on a GPU: not transposed; and two of the four matrices in
// each other's registers.
template <class Stage, bool kLeft>
struct NotTransposed : AcrossK<Stage, kLeft> {
  using AcrossK<Stage, kLeft>::AcrossK;
  void load(uint32_t (&words)[4], const std::byte* panel, int columns, int part) const {
    const uint32_t k = gpu::lane() % 16, column = columns + gpu::lane() / 16 * 8;
    gpu::ldmatrix_x4(words, panel + AcrossPanel<Stage, kLeft>::place(16 * part + k, 2 * column));
  }
};
template <class Stage, bool kLeft>
struct Exchanged : AcrossK<Stage, kLeft> {
  using AcrossK<Stage, kLeft>::AcrossK;
  void load(uint32_t (&words)[4], const std::byte* panel, int columns, int part) const {
    AcrossK<Stage, kLeft>::load(words, panel, columns, part);
    std::swap(words[1], words[2]);
  }
};

template <template <class, bool> class Across>
void check_wrong_loads(const std::string& plant) {
  const Integers even(64), ragged(33);
  const auto check_product = [&]<class Alone>(const Integers& of, Alone) {
    const std::string said = run<Alone>(of, backward_tiles<Alone>(of, 64, 1), 1);
    check_caught(contains(said, "sums are wrong"), plant + ", said: " + said);
  };
  check_product(even, GradOfHidden<DType::kBFloat16, Across>{});
  check_product(even, GradOfX<DType::kBFloat16, Across>{});
  check_product(ragged, GradOfWeights<DType::kBFloat16, Across>{});
}

void wrong_transpositions_give_wrong_sums() {
  check_wrong_loads<NotTransposed>("not transposed");
  check_wrong_loads<Exchanged>("exchanged");
}

// Right ones, of which two are spoilt then.
void wrong_sums_are_named() {
  using Alone = Sm90Alone<Sm90Wide, DType::kBFloat16>;
  const Integers integers(64);
  const Tiles tiles = integers.tiles<Alone>(65, 2);
  std::vector<float> sums(2 * 65 * Alone::kTileN);
  for (int tile = 0; tile < 2; ++tile)
    for (int row = 0; row < 65; ++row)
      for (int column = 0; column < Alone::kTileN; ++column) {
        const int weight = tiles.weight_row(tile, column / 128) + column % 128;
        const int x = tiles.x_row(tile, row);
        const int sum = weight < tiles.num_weights ? integers.sums[x * tiles.num_weights + weight] : 0;
        sums[(tile * 65 + row) * Alone::kTileN + column] = float(sum);
      }
  check(wrong_sums<Alone>(integers, tiles, sums).empty(), "right sums");
  sums[(65 + 64) * Alone::kTileN + 200] += 1;
  sums[(65 + 3) * Alone::kTileN + 255] = NAN;
  const std::string said = wrong_sums<Alone>(integers, tiles, sums);
  for (const char* words : {"2 of 33280 sums are wrong, 1 of these", "in tiles 1-1 rows 3-64 columns 200-255",
                            "tile 1 row 3 column 255 is nan, not 0"})
    check_caught(contains(said, words), std::string(words) + ", said: " + said);
}

}  // namespace

int main() {
  run_test("EveryEngine", every_engine);
  run_test("EveryBackwardProduct", every_backward_product);
  run_test("WrongTranspositionsGiveWrongSums", wrong_transpositions_give_wrong_sums);
  run_test("WrongSumsAreNamed", wrong_sums_are_named);
  return finish();
}
