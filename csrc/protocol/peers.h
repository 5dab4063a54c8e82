// Where the heaps of a group's ranks are, as a rank on a GPU sees them.
#pragma once

#include <cstddef>

namespace flashmoe {

struct Peers {
  std::byte* const* heaps;      // [ep_size] where each rank's heap is mapped here; null: it is not
  std::byte* const* symmetric;  // [ep_size] the address of my own by which the transport names that heap, if it is not
  const int* pes;               // [ep_size] the transport's number of each rank
};

}  // namespace flashmoe
