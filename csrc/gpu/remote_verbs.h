// The verbs by which a kernel reaches peers whose memory is not mapped: one-sided, on memory that the transport knows.
// Defined twice, as those of verbs.h are: by NVSHMEM, and on fibers by a network that keeps no more than is promised
// here. Only kernels for such peers include this.
//
// A symmetric address is one in my own part of the transport's memory; with a PE's number it names the same place in
// that PE's part. All that this PE has put is meant, whichever of its threads did.
#pragma once

#include "gpu/verbs.h"

namespace flashmoe::gpu {

// By one thread, and over at once. `bytes` from `source`, memory that the transport knows and that must lie still until
// this has landed, to `to` at `pe`, and then `word` to `signal` there: who sees the word by remote_test may read the
// bytes. What the thread wrote, or saw by an acquire, is sent. Two puts are not ordered with each other. bytes may be 0.
FLASHMOE_DEVICE void remote_put_signal(int my_pe, int pe, std::byte* to, const std::byte* source, size_t bytes,
                                       uint64_t* signal, uint64_t word);

// Whether `signal`, a word of my own heap, is `word`; if so, what was put before it may be read.
FLASHMOE_DEVICE bool remote_test(uint64_t* signal, uint64_t word);

// Asks the transport to land all puts of this PE that were made, or seen by an acquire to be made, before; and whether
// it has. Neither waits.
FLASHMOE_DEVICE uint64_t remote_quiet_begin(int my_pe);
FLASHMOE_DEVICE bool remote_quiet_done(int my_pe, uint64_t ticket);

}  // namespace flashmoe::gpu

#if defined(__CUDACC__)
#include "gpu/nvshmem_verbs.cuh"
#else
#include "gpu/simt_remote.h"
#endif
