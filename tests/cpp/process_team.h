// A team whose ranks are processes: forked, over shared segments that each maps anew, as ranks under torchrun do.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "platform/host.h"
#include "platform/shared_segment.h"
#include "team.h"

namespace flashmoe::test {

class ProcessTeam {
 public:
  ProcessTeam(const Limits& limits, double timeout_s) : limits_(limits), timeout_s_(timeout_s) {
    for (int r = 0; r < limits.ep_size; ++r) segments_.push_back(SharedSegment::create(round_up(HeapLayout(limits).bytes, 4096)));
  }

  // f(rank, group) in a process of its own for every rank; its value is the process's exit status. Call from a
  // process with one thread.
  void start(const std::function<int(int, Group&)>& f) {
    int go[2];
    if (pipe(go) != 0) throw std::runtime_error("no pipe");
    for (int r = 0; r < limits_.ep_size; ++r) {
      const int pid = fork();
      if (pid == 0) {
        std::vector<int> pids(limits_.ep_size);
        close(go[1]);
        // A rank must know all pids, and the last of them is born after it.
        if (read_all(go[0], pids.data(), pids.size() * sizeof(int)) && make_and_run(r, pids, f)) _exit(status_);
        _exit(99);
      }
      pids_.push_back(pid);
    }
    for (int r = 0; r < limits_.ep_size; ++r)
      if (write(go[1], pids_.data(), pids_.size() * sizeof(int)) < 0) throw std::runtime_error("no write");
    close(go[0]), close(go[1]);
  }
  int pid(int rank) const { return pids_[rank]; }

  // Exit status by rank; 128 + signal for one that was killed. Kills what is not done in time: 128 + 9.
  std::vector<int> wait(double seconds) {
    std::vector<int> status(pids_.size(), -1);
    const uint64_t give_up = HostPlatform::now_ns() + uint64_t(seconds * 1e9);
    for (size_t left = pids_.size(); left;) {
      for (size_t r = 0; r < pids_.size(); ++r) {
        int s;
        if (status[r] != -1 || waitpid(pids_[r], &s, WNOHANG) != pids_[r]) continue;
        status[r] = WIFEXITED(s) ? WEXITSTATUS(s) : 128 + WTERMSIG(s), --left;
      }
      if (HostPlatform::now_ns() > give_up)
        for (size_t r = 0; r < pids_.size(); ++r)
          if (status[r] == -1) kill(pids_[r], SIGKILL);
      usleep(1000);
    }
    return status;
  }

 private:
  // Writes of this size reach a pipe whole, and so do reads.
  static bool read_all(int fd, void* to, size_t bytes) { return read(fd, to, bytes) == ssize_t(bytes); }

  bool make_and_run(int rank, const std::vector<int>& pids, const std::function<int(int, Group&)>& f) {
    try {
      GroupOptions o;
      o.name = "processes", o.ep_rank = rank, o.limits = limits_, o.pids = pids;
      o.timeout_s = timeout_s_, o.entry_timeout_s = timeout_s_;
      for (const auto& segment : segments_) {
        o.keep.push_back(SharedSegment::attach(segment->fd(), segment->bytes()));
        o.heaps.push_back(std::static_pointer_cast<SharedSegment>(o.keep.back())->data());
      }
      Group group(o);
      status_ = f(rank, group);
      return true;
    } catch (const std::exception& e) {
      std::fprintf(stderr, "  rank %d: %s\n", rank, e.what());
      return false;
    }
  }

  Limits limits_;
  double timeout_s_;
  std::vector<std::shared_ptr<SharedSegment>> segments_;
  std::vector<int> pids_;
  int status_ = 99;
};

}  // namespace flashmoe::test
