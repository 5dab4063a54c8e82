// What one worker decides to do next. A role's next() decides, alone and without waiting; perform() does it, with as
// many threads as the machine gives. Whoever performs a piece of work never waits for another.
#pragma once

#include "protocol/config.h"

namespace flashmoe {

enum class WorkKind : uint32_t {
  kNone,
  kPlan,       // the plan, and all headers
  kSendChunk,  // chunk `part` to rank `index`
  kUpTile,     // tile `part` of the row block in ring slot `index`
  kDownTile,   // the same
  kCombine,    // tokens of combine task `index`
  kGradTile,   // tile `part` of the weight gradients of local expert `index`
  kStop,       // there will be no more
};

// Else it is the processor's.
FLASHMOE_HD constexpr bool is_of_dispatcher(WorkKind kind) {
  return kind == WorkKind::kPlan || kind == WorkKind::kSendChunk;
}

struct Work {
  WorkKind kind = WorkKind::kNone;
  int32_t index = 0;
  int32_t part = 0;
};

// Columns of the tiles that an engine computes, and how many of them a row block is worth.
struct TileShape {
  int up_cols, down_cols;
  uint32_t up_tiles, down_tiles;
  uint32_t grad_tiles = 1;  // of one expert's weight gradients, in a backward call; one, of nothing, if none are asked for

  FLASHMOE_HD TileShape(int intermediate_size, int hidden_size, int up, int down)
      : up_cols(up),
        down_cols(down),
        up_tiles(ceil_div(intermediate_size, up)),
        down_tiles(ceil_div(hidden_size, down)) {}
};

}  // namespace flashmoe
