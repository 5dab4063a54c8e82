// Speed of the CPU engine on cold weights: every measurement walks through more experts than any cache holds.
//
//   cpu_engine_bench [--gemm GFLOPS1 GFLOPS2] [--rows M] [--shape N] [--dtype N] [--threads N] [--repeats N] [--mib N] [--cpu-time]
//
// Each thread computes whole experts, up tiles then down tiles. `read` is a pure read of the same bytes by the
// same threads, measured next to it. --gemm gives the fp32 GEMM rate of a BLAS with one and with two threads
// (for torch: torch.mm of 2048^3, measured beside this); then `floor` is the share of the speed of
// max(FLOPs / GEMM rate, bytes / read bandwidth) that is reached.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine/cpu_kernels.h"

namespace {

using namespace flashmoe;

struct Shape {
  const char* name;
  int hidden_size, intermediate_size;
};
constexpr Shape kShapes[] = {{"Mixtral/4", 1024, 3584}, {"Qwen3-30B", 2048, 768}, {"paper", 2048, 2048}};
constexpr int kRows[] = {1, 2, 4, 8, 16, 24, 32, 64, 128};
constexpr const char* kDTypeNames[] = {"fp32", "bf16", "fp16"};
constexpr int kTokens = 1024;

// Wall clock, or with --cpu-time the calling thread's own time, for comparisons on a busy machine.
bool cpu_time = false;
double now() {
  timespec t;
  clock_gettime(cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

struct Buffer {
  std::byte* bytes;
  explicit Buffer(size_t n) : bytes(static_cast<std::byte*>(std::aligned_alloc(4096, round_up(n, 4096)))) {}
  ~Buffer() { std::free(bytes); }
  Buffer(const Buffer&) = delete;
};

// Seconds that the slowest thread takes for its share, from a common start.
template <class F>
double timed(int num_threads, F work) {
  std::atomic<int> ready{0};
  std::vector<double> seconds(num_threads);
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t)
    threads.emplace_back([&, t] {
      ready.fetch_add(1);
      while (ready.load() < num_threads) std::this_thread::yield();
      const double start = now();
      work(t);
      seconds[t] = now() - start;
    });
  for (std::thread& thread : threads) thread.join();
  return *std::max_element(seconds.begin(), seconds.end());
}

// One word of each cache line is enough to bring all of it.
uint64_t read(const std::byte* from, size_t bytes) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + 512 <= bytes; i += 512)
    for (int line = 0; line < 8; ++line) {
      uint64_t word;
      std::memcpy(&word, from + i + line * 64, 8);
      sums[line] += word;
    }
  return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
}

struct Weights {
  CpuProblem problem;
  size_t gate_up_bytes, expert_bytes;
  int num_experts;
  const std::byte* memory;
  const std::byte* gate_up(int expert) const { return memory + expert * expert_bytes; }
  const std::byte* down(int expert) const { return gate_up(expert) + gate_up_bytes; }
};

struct Worker {
  Buffer scratch, h, out;
  explicit Worker(const CpuProblem& p)
      : scratch(CpuEngine::scratch_bytes(p)), h(size_t(CpuEngine::kBlockM) * p.intermediate_size * 4),
        out(size_t(CpuEngine::kBlockM) * p.hidden_size * 4) {}

  void expert(const CpuEngine& engine, const Weights& w, int e, const std::vector<const void*>& rows) {
    const CpuProblem& p = w.problem;
    const int up_cols = CpuEngine::up_tile_cols(p), down_cols = CpuEngine::down_tile_cols(p);
    float* hs = reinterpret_cast<float*>(h.bytes);
    for (size_t first = 0; first < rows.size(); first += CpuEngine::kBlockM) {
      const int num_rows = int(std::min<size_t>(CpuEngine::kBlockM, rows.size() - first));
      std::vector<void*> out_rows;
      for (int i = 0; i < num_rows; ++i)
        out_rows.push_back(out.bytes + size_t(i) * p.hidden_size * dtype_bytes(p.dtype));
      for (int c = 0; c < p.intermediate_size; c += up_cols)
        engine.up_tile(p, rows.data() + first, num_rows, w.gate_up(e), nullptr, c,
                       std::min(c + up_cols, p.intermediate_size), hs, p.intermediate_size, scratch.bytes);
      for (int c = 0; c < p.hidden_size; c += down_cols)
        engine.down_tile(p, hs, p.intermediate_size, num_rows, w.down(e), nullptr, c,
                         std::min(c + down_cols, p.hidden_size), out_rows.data(), scratch.bytes);
    }
  }
};

struct Options {
  double gemm[3] = {};
  int rows = -1, shape = -1, dtype = -1, threads = -1;
  int repeats = 15;
  size_t mib = 384;
};

void measure(const CpuEngine& engine, const Weights& w, const Shape& shape, int num_rows, int num_threads,
             const std::vector<std::byte>& x, const Options& options) {
  const CpuProblem& p = w.problem;
  std::mt19937 random(num_rows);
  std::vector<const void*> rows;
  for (int i = 0; i < num_rows; ++i)
    rows.push_back(x.data() + random() % kTokens * size_t(p.hidden_size) * dtype_bytes(p.dtype));
  std::deque<Worker> workers;
  for (int t = 0; t < num_threads; ++t) workers.emplace_back(p);

  const double flops_per_expert = 6.0 * num_rows * p.hidden_size * p.intermediate_size;
  // Short stretches, the best of many: others may use the machine as well.
  const double guess = std::max(flops_per_expert / 80e9, w.expert_bytes / 15e9);
  const int num = std::max(1, std::min(w.num_experts / num_threads, int(0.03 / guess))) * num_threads;
  static std::atomic<uint64_t> sink;
  static int next = 0;  // go on where the last stretch stopped: those weights are coldest
  double best = 1e30, best_read = 1e30;
  for (int repeat = 0; repeat < options.repeats; ++repeat) {
    best = std::min(best, timed(num_threads, [&](int t) {
                      for (int i = t; i < num; i += num_threads)
                        workers[t].expert(engine, w, (next + i) % w.num_experts, rows);
                    }));
    next = (next + num) % w.num_experts;
    best_read = std::min(best_read, timed(num_threads, [&](int t) {
                           for (int i = t; i < num; i += num_threads)
                             sink += read(w.gate_up((next + i) % w.num_experts), w.expert_bytes);
                         }));
    next = (next + num) % w.num_experts;
  }
  const double bytes = double(num) * w.expert_bytes, flops = num * flops_per_expert;
  const double read_rate = bytes / best_read;
  std::printf("%-10s %-4s %3d rows %d threads %7.1f GFLOP/s %6.1f GB/s  read %5.1f GB/s", shape.name,
              kDTypeNames[int(p.dtype)], num_rows, num_threads, flops / best / 1e9, bytes / best / 1e9,
              read_rate / 1e9);
  if (const double gemm = options.gemm[num_threads] * 1e9; gemm > 0)
    std::printf("  floor %3.0f %%", 100 * std::max(flops / gemm, bytes / read_rate) / best);
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--cpu-time") {
      cpu_time = true;
      continue;
    }
    const auto next = [&] {
      if (++i < argc) return std::atof(argv[i]);
      std::fprintf(stderr, "%s needs a value\n", flag.c_str());
      std::exit(2);
    };
    if (flag == "--gemm") options.gemm[1] = next(), options.gemm[2] = next();
    else if (flag == "--rows") options.rows = int(next());
    else if (flag == "--shape") options.shape = int(next());
    else if (flag == "--dtype") options.dtype = int(next());
    else if (flag == "--threads") options.threads = int(next());
    else if (flag == "--repeats") options.repeats = int(next());
    else if (flag == "--mib") options.mib = size_t(next());
    else return std::fprintf(stderr, "unknown option %s\n", flag.c_str()), 2;
  }
  std::printf("isa %s, weights %zu MiB\n", cpu_isa(), options.mib);
  const CpuEngine engine;
  std::mt19937 random(1);
  const Buffer memory(options.mib << 20);
  std::vector<std::byte> x(size_t(kTokens) * 2048 * 4);
  for (int d = 0; d < 3; ++d) {
    if (options.dtype >= 0 && d != options.dtype) continue;
    // Small numbers in every format: 0x3c.. as the high byte of each element, so that nothing is subnormal.
    const int element = d == 0 ? 4 : 2;
    for (std::byte& b : x) b = std::byte(random());
    for (size_t i = element - 1; i < x.size(); i += element) x[i] = std::byte(0x3c);
    for (size_t i = 0; i < options.mib << 20; i += x.size())
      std::memcpy(memory.bytes + i, x.data(), std::min(x.size(), (options.mib << 20) - i));
    for (int s = 0; s < 3; ++s) {
      if (options.shape >= 0 && s != options.shape) continue;
      const size_t matrix = size_t(kShapes[s].hidden_size) * kShapes[s].intermediate_size * element;
      const CpuProblem problem{DType(d), Activation::kSilu, true, kShapes[s].hidden_size,
                               kShapes[s].intermediate_size};
      const Weights weights{problem, 2 * matrix, 3 * matrix, int((options.mib << 20) / (3 * matrix)), memory.bytes};
      for (int num_rows : kRows)
        for (int num_threads : {1, 2})
          if ((options.rows < 0 || options.rows == num_rows) &&
              (options.threads < 0 || options.threads == num_threads))
            measure(engine, weights, kShapes[s], num_rows, num_threads, x, options);
    }
  }
}
