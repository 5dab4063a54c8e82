// Memory order in PTX. Generic addresses; ordering sits on the access itself, never on a free fence.
#pragma once

#include "gpu/verbs.h"

namespace flashmoe::gpu {

// A load or a store of one word of 4 or 8 bytes; `kind` is the instruction's middle, such as "acquire.gpu".
#define FLASHMOE_PTX_LOAD(kind, word)                                                                       \
  static_assert(sizeof(*word) == 4 || sizeof(*word) == 8);                                                  \
  if constexpr (sizeof(*word) == 4) {                                                                       \
    uint32_t value;                                                                                         \
    asm volatile("ld." kind ".u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");                         \
    return value;                                                                                           \
  } else {                                                                                                  \
    uint64_t value;                                                                                         \
    asm volatile("ld." kind ".u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");                         \
    return value;                                                                                           \
  }
#define FLASHMOE_PTX_STORE(kind, word, value)                                                               \
  static_assert(sizeof(*word) == 4 || sizeof(*word) == 8);                                                  \
  if constexpr (sizeof(*word) == 4)                                                                         \
    asm volatile("st." kind ".u32 [%0], %1;" ::"l"(word), "r"(uint32_t(value)) : "memory");                 \
  else                                                                                                      \
    asm volatile("st." kind ".u64 [%0], %1;" ::"l"(word), "l"(uint64_t(value)) : "memory");

template <class T>
FLASHMOE_DEVICE T load_relaxed(const T* word) {
  FLASHMOE_PTX_LOAD("relaxed.gpu", word)
}
template <class T>
FLASHMOE_DEVICE T load_acquire(const T* word) {
  FLASHMOE_PTX_LOAD("acquire.gpu", word)
}
template <class T>
FLASHMOE_DEVICE T load_acquire_system(const T* word) {
  FLASHMOE_PTX_LOAD("acquire.sys", word)
}
template <class T>
FLASHMOE_DEVICE void store_release(T* word, T value) {
  FLASHMOE_PTX_STORE("release.gpu", word, value)
}
template <class T>
FLASHMOE_DEVICE void store_release_system(T* word, T value) {
  FLASHMOE_PTX_STORE("release.sys", word, value)
}
#undef FLASHMOE_PTX_LOAD
#undef FLASHMOE_PTX_STORE

// The word before; `kind` as above.
#define FLASHMOE_PTX_ADD(kind, word, value)                                                                             \
  static_assert(sizeof(*word) == 4 || sizeof(*word) == 8);                                                              \
  T before;                                                                                                             \
  if constexpr (sizeof(*word) == 4)                                                                                     \
    asm volatile("atom.add." kind ".u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");              \
  else                                                                                                                  \
    asm volatile("atom.add." kind ".u64 %0, [%1], %2;" : "=l"(before) : "l"(word), "l"(value) : "memory");              \
  return before;

template <class T>
FLASHMOE_DEVICE T fetch_add_relaxed(T* word, T value) {
  FLASHMOE_PTX_ADD("relaxed.gpu", word, value)
}
template <class T>
FLASHMOE_DEVICE T fetch_add(T* word, T value) {
  FLASHMOE_PTX_ADD("acq_rel.gpu", word, value)
}
#undef FLASHMOE_PTX_ADD

template <class T>
FLASHMOE_DEVICE T fetch_sub(T* word, T value) {
  return fetch_add(word, T(0 - value));
}

template <class T>
FLASHMOE_DEVICE bool compare_exchange(T* word, T expected, T desired) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T before;
  if constexpr (sizeof(T) == 4)
    asm volatile("atom.cas.acq_rel.gpu.b32 %0, [%1], %2, %3;"
                 : "=r"(before)
                 : "l"(word), "r"(expected), "r"(desired)
                 : "memory");
  else
    asm volatile("atom.cas.acq_rel.gpu.b64 %0, [%1], %2, %3;"
                 : "=l"(before)
                 : "l"(word), "l"(expected), "l"(desired)
                 : "memory");
  return before == expected;
}

template <class T>
FLASHMOE_DEVICE T load_coherent(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  union {
    uint32_t word[sizeof(T) / 4];
    T value;
  } loaded;
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(loaded.word[0]) : "l"(from) : "memory");
  else if constexpr (sizeof(T) == 8)
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(loaded.word[0]), "=r"(loaded.word[1])
                 : "l"(from)
                 : "memory");
  else
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(loaded.word[0]), "=r"(loaded.word[1]), "=r"(loaded.word[2]), "=r"(loaded.word[3])
                 : "l"(from)
                 : "memory");
  return loaded.value;
}

}  // namespace flashmoe::gpu
