// What ranks of different hosts tell each other, and in which order it may arrive: in any.
#pragma once

#include <cstdint>
#include <set>

namespace flashmoe {

// Goes before each payload.
struct UcxMessage {
  enum Kind : uint32_t {
    kHello,   // the way here works
    kPut,     // payload, and what is to be stored when it is there
    kLanded,  // `number` of your puts, from the first on, are here
    kBye,     // I leave in peace
  };
  uint64_t key = 0;  // the receiver's: who does not know it is no rank of ours
  Kind kind = kHello;
  uint32_t source = 0;                  // rank
  uint64_t number = 0;                  // of the put, from 0 on
  uint64_t offset = 0, signal = 0;      // in the receiver's memory
  uint64_t word = 0;
};

// The numbers that have arrived, of those that all will.
class Arrivals {
 public:
  void add(uint64_t number) {
    early_.insert(number);
    for (; early_.erase(complete_); ++complete_) {}
  }
  uint64_t complete() const { return complete_; }  // all numbers below it

 private:
  uint64_t complete_ = 0;
  std::set<uint64_t> early_;
};

}  // namespace flashmoe
