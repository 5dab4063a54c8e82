// A router's selection for all tokens of a call.
#pragma once

#include "router/selection.h"

namespace flashmoe {

// On the calling thread.
void select_on_host(const SelectCall& call);
// Queued on the stream, a cudaStream_t of the device. std::invalid_argument: a token's scores do not fit into a block's
// shared memory.
void select_on_gpu(const SelectCall& call, int device, void* stream);

}  // namespace flashmoe
