// A tile as the Hopper engine sees it, whose weights come by TMA: a box for each half.
#pragma once

#include <string>

#include "engine/halved_tile.h"
#include "gpu/tensor_map.h"

namespace flashmoe {

// The weights as TMA reads them, as one matrix over all local experts.
struct Sm90Operands {
  gpu::TensorMap gate_up, down;
};

template <int kTileN>
using Sm90Tile = HalvedTile<kTileN, const gpu::TensorMap*>;  // for the loaders; the math has no map

// Empty, or why this engine cannot take the call, for which another must be chosen. TMA wants every row of the
// weights, and a 16-byte copy every row of the tokens, to begin at a multiple of 16 bytes: all pointers must, and so
// must both widths. That is the one demand there is; any width beyond it will do.
template <int kTileN>
std::string make_sm90_operands(Sm90Operands* operands, const Call& call) {
  const uint64_t hidden = call.hidden_size, inner = call.intermediate_size, size = dtype_bytes(call.dtype);
  if (hidden * size % 16 || inner * size % 16)
    return "Hopper's engine needs rows of a multiple of 16 bytes, not of " + std::to_string(hidden * size) + " and " +
           std::to_string(inner * size);
  for (const std::byte* rows : {call.x, static_cast<const std::byte*>(call.y)})
    if (reinterpret_cast<uintptr_t>(rows) % 16) return "Hopper's engine needs x and y aligned to 16 bytes";
  const uint64_t experts = call.num_local_experts();
  if (experts == 0) return {};  // and nobody will read the maps
  const uint32_t step = uint32_t(128 / size), rows = kTileN / 2;
  const auto make = [&](gpu::TensorMap* map, const std::byte* data, uint64_t columns, uint64_t weight_rows) {
    return gpu::make_tensor_map(map, {call.dtype, data, 2, {columns, experts * weight_rows, 1}, {columns * size, 0},
                                      {step, rows, 1}, true});
  };
  const std::string error = make(&operands->gate_up, call.gate_up_proj, hidden, uint64_t(call.up_rows()));
  return error.empty() ? make(&operands->down, call.down_proj, inner, hidden) : error;
}

}  // namespace flashmoe
