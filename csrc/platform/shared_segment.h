// Memory that several processes of one host map: a rank's part of the symmetric heap.
//
// It has no name anywhere. A peer gets at it only by the file descriptor that its owner hands over, so no other
// user can open it, and when the last process that maps it is gone, by whatever end, the kernel takes it back.
//
// Every process unmaps its own mapping only. A peer that still writes does so through a mapping of its own, so
// dropping a segment is safe as soon as no thread of *this* process uses it.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <memory>

namespace flashmoe {

class SharedSegment {
 public:
  // New memory, zeroed and resident: a shortage is a std::runtime_error that says what was asked and what there
  // is, here and now, never a SIGBUS at some later store.
  static std::shared_ptr<SharedSegment> create(size_t bytes);

  // Memory that a peer created. `fd` stays the caller's, and may be closed afterwards.
  static std::shared_ptr<SharedSegment> attach(int fd, size_t bytes);

  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_; }  // to hand over; -1 if this segment was attached

  // Keep the mapping until the process ends: for owners whose threads may still write when the segment is dropped.
  void leak() { leaked_ = true; }

 private:
  SharedSegment(int fd, std::byte* data, size_t bytes) : fd_(fd), data_(data), bytes_(bytes) {}

  const pid_t process_ = getpid();
  int fd_;
  std::byte* data_;
  size_t bytes_;
  bool leaked_ = false;
};

// What this process may still allocate before it would be killed for it: the least of what the machine can give
// and of what the memory limits of its control groups leave.
size_t available_memory_bytes();

}  // namespace flashmoe
