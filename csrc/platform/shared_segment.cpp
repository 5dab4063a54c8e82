#include "platform/shared_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

namespace flashmoe {
namespace {

constexpr size_t kMiB = size_t(1) << 20;
// Memory is taken in steps, each after a look at what is left, because other ranks take theirs at the same time.
constexpr size_t kStepBytes = 64 * kMiB;
// What must stay free for everything else; a heap that takes the last page makes the next malloc fatal.
constexpr size_t kMarginBytes = 128 * kMiB;

std::string human(size_t bytes) {
  char text[32];
  if (bytes >= 1024 * kMiB) {
    std::snprintf(text, sizeof text, "%.1f GiB", double(bytes) / double(1024 * kMiB));
  } else {
    std::snprintf(text, sizeof text, "%.1f MiB", double(bytes) / double(kMiB));
  }
  return text;
}

std::runtime_error system_error(const std::string& what, int error) {
  return std::runtime_error("symmetric heap: " + what + ": " + std::strerror(error));
}

std::runtime_error too_little(size_t bytes, size_t available) {
  return std::runtime_error("symmetric heap: " + human(bytes) + " per rank asked, " + human(available) +
                            " available (" + human(kMarginBytes) + " must stay free)");
}

struct Descriptor {
  int fd = -1;
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
  int release() { return std::exchange(fd, -1); }
};

// The number after `key` in a file of "key number" lines, or the file's first number if `key` is empty.
// Absent files and words such as "max" are "no limit".
size_t number_in(const std::string& path, const std::string& key = "") {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string word;
    if (!key.empty() && !((words >> word) && word == key)) continue;
    size_t number;
    if (words >> number) return number;
    break;
  }
  return std::numeric_limits<size_t>::max();
}

// A control group's limit less what it uses, counting page cache that the kernel would give back first.
size_t left_in_cgroup(const std::string& folder, const char* limit, const char* usage, const char* cache_key) {
  constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();
  const size_t max = number_in(folder + limit), used = number_in(folder + usage);
  if (max == kUnlimited || used == kUnlimited) return kUnlimited;
  const size_t cache = number_in(folder + "/memory.stat", cache_key);
  const size_t held = used - (cache == kUnlimited ? 0 : std::min(cache, used));
  return max > held ? max - held : 0;
}

std::byte* map(int fd, size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) throw system_error("cannot map " + human(bytes), errno);
  // Only advice: where the system allows huge pages for shared memory, they spare TLB misses.
  madvise(data, bytes, MADV_HUGEPAGE);
  // A forked child must not keep the memory of a group alive in which it is no rank.
  madvise(data, bytes, MADV_DONTFORK);
  return static_cast<std::byte*>(data);
}

}  // namespace

size_t available_memory_bytes() {
  const size_t kib = number_in("/proc/meminfo", "MemAvailable:");
  size_t available = kib > std::numeric_limits<size_t>::max() / 1024 ? kib : kib * 1024;

  // Lines are "id:controllers:path"; version 2 has no controllers. A limit may stand at any level above us.
  // In a container the path may be the host's, which is not visible here: then only the mount's root is.
  std::ifstream cgroups("/proc/self/cgroup");
  std::string line;
  while (std::getline(cgroups, line)) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool version_2 = controllers == ",,";
    if (!version_2 && controllers.find(",memory,") == std::string::npos) continue;
    const std::string root = version_2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    std::string path = line.substr(second + 1);
    while (true) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      const std::string folder = root + path;
      available = std::min(
          available, version_2
                         ? left_in_cgroup(folder, "/memory.max", "/memory.current", "inactive_file")
                         : left_in_cgroup(folder, "/memory.limit_in_bytes", "/memory.usage_in_bytes",
                                          "total_inactive_file"));
      if (path.empty()) break;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  }
  return available;
}

std::shared_ptr<SharedSegment> SharedSegment::create(size_t bytes) {
  if (bytes == 0 || bytes > size_t(std::numeric_limits<off_t>::max())) {
    throw std::runtime_error("symmetric heap: a segment must have between 1 and 2^63 - 1 bytes, got " +
                             std::to_string(bytes));
  }
  const size_t available = available_memory_bytes();
  if (bytes > available || available - bytes < kMarginBytes) throw too_little(bytes, available);

  Descriptor memory;
  memory.fd = memfd_create("flashmoe", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
  if (memory.fd < 0 && errno == EINVAL) {  // kernels before 6.3 do not know the last flag
    memory.fd = memfd_create("flashmoe", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  }
  if (memory.fd < 0) throw system_error("cannot create a segment", errno);
  if (fchmod(memory.fd, 0600) != 0) throw system_error("cannot restrict the segment to its owner", errno);

  for (size_t begin = 0; begin < bytes; begin += kStepBytes) {
    const size_t step = std::min(kStepBytes, bytes - begin);
    const size_t left = available_memory_bytes();
    if (left < step + kMarginBytes) throw too_little(bytes, begin + left);
    int error;
    do {
      error = posix_fallocate(memory.fd, off_t(begin), off_t(step));
    } while (error == EINTR);
    if (error == ENOSPC || error == ENOMEM) throw too_little(bytes, begin + left);
    if (error != 0) throw system_error("cannot allocate " + human(bytes), error);
  }
  // Nobody who holds the descriptor can take pages away under the others, which would be their SIGBUS.
  if (fcntl(memory.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    throw system_error("cannot seal the segment", errno);
  }
  std::byte* data = map(memory.fd, bytes);
  return std::shared_ptr<SharedSegment>(new SharedSegment(memory.release(), data, bytes));
}

std::shared_ptr<SharedSegment> SharedSegment::attach(int fd, size_t bytes) {
  struct stat status;
  if (fstat(fd, &status) != 0) throw system_error("cannot attach descriptor " + std::to_string(fd), errno);
  if (bytes == 0 || uint64_t(status.st_size) != bytes) {
    throw std::runtime_error("symmetric heap: a peer's segment must have " + std::to_string(bytes) +
                             " bytes, got " + std::to_string(status.st_size));
  }
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    throw std::runtime_error("symmetric heap: a peer's segment must be sealed against shrinking");
  }
  return std::shared_ptr<SharedSegment>(new SharedSegment(-1, map(fd, bytes), bytes));
}

SharedSegment::~SharedSegment() {
  if (fd_ >= 0) close(fd_);
  // In a forked child nothing of it is mapped (MADV_DONTFORK), and something else may lie there by now.
  if (!leaked_ && getpid() == process_) munmap(data_, bytes_);
}

}  // namespace flashmoe
