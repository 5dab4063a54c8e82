// The fabric's thread, which sleeps while nothing happens, and the end of the fabric, which waits for nobody.
#include <poll.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <limits>

#include "platform/ucx_fabric.h"

namespace flashmoe {
namespace {

using Clock = std::chrono::steady_clock;
constexpr uint64_t kEverything = std::numeric_limits<uint64_t>::max();
// A farewell is a courtesy, and so is UCX's leave of its endpoints: peers may be unable to answer.
constexpr std::chrono::milliseconds kFarewellAtMost(200), kLeaveAtMost(1000);
// Rounds of progress before senders that wait get their turn.
constexpr int kRounds = 64;

}  // namespace

void UcxFabric::run() {
  pollfd events[] = {{events_, POLLIN, 0}, {wake_, POLLIN, 0}};
  while (true) {
    ucs_status_t armed;
    {
      std::lock_guard lock(mutex_);
      if (stop_) return;
      for (int i = 0; i < kRounds && ucx_.worker_progress(worker_); ++i) {}
      look_after_links();
      armed = ucx_.worker_arm(worker_);
    }
    if (armed == UCS_OK) {
      poll(events, 2, -1);
      uint64_t count;
      if (events[1].revents && read(wake_, &count, sizeof count) < 0) continue;
    } else if (waiting_.load(std::memory_order_relaxed)) {
      sched_yield();
    }
  }
}

void UcxFabric::wake() {
  const uint64_t one = 1;
  if (write(wake_, &one, sizeof one) < 0) return;  // it is to wake up already
}

void UcxFabric::look_after_links() {
  for (size_t r = 0; r < links_.size(); ++r) {
    Link& link = links_[r];
    if (link.state == State::kUp) {
      if (link.arrived.complete() == link.confirmed) continue;
      link.confirmed = link.arrived.complete();
      send(int(r), {.kind = UcxMessage::kLanded, .number = link.confirmed}, nullptr, 0);
    } else if (link.ep) {
      ucp_request_param_t param{};
      param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
      param.flags = UCP_EP_CLOSE_FLAG_FORCE;  // what is under way ends, in errors
      param.cb.send = &on_closed, param.user_data = this;
      if (UCS_PTR_IS_PTR(ucx_.ep_close_nbx(link.ep, &param))) ++closing_;
      link.ep = nullptr;
    }
    if (link.state != State::kUp && link.under_way == 0) set_landed(link, kEverything);
  }
}

void UcxFabric::on_closed(void* request, ucs_status_t, void* fabric) {
  UcxFabric& f = *static_cast<UcxFabric*>(fabric);
  --f.closing_;
  f.ucx_.request_free(request);
}

void UcxFabric::add(Listener* listener) {
  std::lock_guard lock(mutex_);
  listeners_.push_back(listener);
}

void UcxFabric::remove(Listener* listener) {
  std::lock_guard lock(mutex_);
  std::erase(listeners_, listener);
}

void UcxFabric::close() {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
    for (size_t r = 0; r < links_.size(); ++r) send(int(r), {.kind = UcxMessage::kBye}, nullptr, 0);
  }
  const auto farewell = Clock::now() + kFarewellAtMost;
  for (bool busy = true; busy && Clock::now() < farewell;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::lock_guard lock(mutex_);
    busy = false;
    for (const Link& link : links_) busy = busy || (link.under_way && link.state == State::kUp);
  }
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake();
  thread_.join();
  disconnect();
}

void UcxFabric::disconnect() {
  std::lock_guard lock(mutex_);
  closed_ = true;
  for (Link& link : links_) lose(link, State::kLeft);
  if (worker_) {
    look_after_links();
    const auto give_up = Clock::now() + kLeaveAtMost;
    while (closing_ && Clock::now() < give_up) ucx_.worker_progress(worker_);
    ucx_.worker_destroy(worker_);
  }
  if (context_) ucx_.cleanup(context_);
  worker_ = nullptr, context_ = nullptr;
  if (wake_ >= 0) ::close(wake_);
  wake_ = -1;
  sendings_.clear();
  for (Link& link : links_) set_landed(link, kEverything);
}

}  // namespace flashmoe
