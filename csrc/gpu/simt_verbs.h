// The verbs on fibers: who am I. The rest by theme in the files below; a test launches kernels by simt.h.
#pragma once

#include "gpu/simt_barrier.h"
#include "gpu/simt_copy.h"
#include "gpu/simt_element.h"
#include "gpu/simt_memory.h"
#include "gpu/simt_mma.h"
#include "gpu/simt_warp.h"
#include "gpu/simt_wgmma.h"

namespace flashmoe::gpu {

FLASHMOE_DEVICE int thread_in_block() { return simt::self().index; }
FLASHMOE_DEVICE int block_threads() { return int(simt::my_block().threads.size()); }
FLASHMOE_DEVICE int lane() { return simt::my_lane(); }
FLASHMOE_DEVICE int warp_in_block() {
  ++simt::self().asked_for_warp;
  return simt::self().index / 32;
}
FLASHMOE_DEVICE int block() { return simt::my_block().index; }
FLASHMOE_DEVICE int num_blocks() { return simt::machine->num_blocks(); }
FLASHMOE_DEVICE int multiprocessor() { return 100 + block(); }  // not the block, lest they be taken for each other
FLASHMOE_DEVICE std::byte* shared_memory() { return simt::my_block().shared.data(); }

}  // namespace flashmoe::gpu
