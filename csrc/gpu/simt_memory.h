// Memory order and time on fibers. One thread runs at a time, so words are always consistent here: weak memory is not
// simulated. What is: who else runs before a load, and, for the checks of simt_shared.h, what an acquire has seen.
#pragma once

#include "gpu/simt_machine.h"

namespace flashmoe::gpu {

namespace simt {

// Without handing over, so that two of them are one atomic access.
template <class T>
T read_acquire(const T* word) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const auto published = my_block().words.find(word);
  if (published != my_block().words.end()) acquire(published->second);
  return *static_cast<const volatile T*>(word);
}
template <class T>
void write_release(T* word, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  release(my_block().words[word]);
  if (*word != value) machine->progress();
  *static_cast<volatile T*>(word) = value;
}

}  // namespace simt

template <class T>
FLASHMOE_DEVICE T load_relaxed(const T* word) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  simt::machine->poll();
  return *static_cast<const volatile T*>(word);
}
template <class T>
FLASHMOE_DEVICE T load_acquire(const T* word) {
  simt::machine->poll();
  return simt::read_acquire(word);
}
template <class T>
FLASHMOE_DEVICE void store_release(T* word, T value) {
  simt::machine->step();
  simt::write_release(word, value);
}
template <class T>
FLASHMOE_DEVICE T load_acquire_system(const T* word) {
  return load_acquire(word);
}
template <class T>
FLASHMOE_DEVICE void store_release_system(T* word, T value) {
  store_release(word, value);
}
template <class T>
FLASHMOE_DEVICE T fetch_add_relaxed(T* word, T value) {
  simt::machine->poll();
  const T before = *static_cast<const volatile T*>(word);
  if (value != 0) simt::machine->progress();
  *static_cast<volatile T*>(word) = before + value;
  return before;
}
template <class T>
FLASHMOE_DEVICE T fetch_add(T* word, T value) {
  simt::machine->poll();
  const T before = simt::read_acquire(word);
  simt::write_release(word, T(before + value));
  return before;
}
template <class T>
FLASHMOE_DEVICE T fetch_sub(T* word, T value) {
  return fetch_add(word, T(0 - value));
}
template <class T>
FLASHMOE_DEVICE bool compare_exchange(T* word, T expected, T desired) {
  simt::machine->poll();
  if (simt::read_acquire(word) != expected) return false;
  simt::write_release(word, desired);
  return true;
}
template <class T>
FLASHMOE_DEVICE T load_coherent(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  simt::machine->step();
  return *from;
}

FLASHMOE_DEVICE uint64_t now_ns() {
  simt::machine->poll();
  return simt::machine->now();
}
FLASHMOE_DEVICE void sleep_ns(uint32_t duration) {
  const uint64_t end = simt::machine->now() + duration;
  do simt::machine->poll();
  while (simt::machine->now() < end);
}

}  // namespace flashmoe::gpu
