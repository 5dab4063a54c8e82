// Whether a peer process is still there, asked of a descriptor, so that a recycled pid cannot fool us.
#pragma once

#include <errno.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

namespace flashmoe {

class PeerProcess {
 public:
  // pid 0: not a process of its own (a rank that is a thread); it is always there.
  explicit PeerProcess(int pid) {
    if (pid <= 0) return;
    fd_ = int(syscall(SYS_pidfd_open, pid, 0));
    gone_ = fd_ < 0 && errno == ESRCH;
  }
  PeerProcess(PeerProcess&& o) noexcept : fd_(std::exchange(o.fd_, -1)), gone_(o.gone_) {}
  PeerProcess& operator=(PeerProcess&&) = delete;
  ~PeerProcess() {
    if (fd_ >= 0) close(fd_);
  }

  // Without a descriptor (an old kernel) a dead peer is found by the deadline alone.
  bool alive() const {
    if (fd_ < 0) return !gone_;
    pollfd p{fd_, POLLIN, 0};
    return poll(&p, 1, 0) != 1;
  }

 private:
  int fd_ = -1;
  bool gone_ = false;
};

}  // namespace flashmoe
