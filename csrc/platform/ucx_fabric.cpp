#include "platform/ucx_fabric.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>

namespace flashmoe {
namespace {

using Clock = std::chrono::steady_clock;
constexpr unsigned kMessageId = 0;
constexpr auto kLook = std::chrono::milliseconds(1);

uint64_t random_key() {
  std::random_device random;
  return uint64_t(random()) << 32 | random();
}

}  // namespace

UcxFabric::UcxFabric(const std::string& library, std::shared_ptr<void> keep, std::byte* memory, size_t bytes, int rank,
                     int world_size)
    : process_(getpid()), ucx_(library), keep_(std::move(keep)), memory_(memory), bytes_(bytes), rank_(rank),
      address_{"", random_key()}, links_(world_size) {
  try {
    start();
  } catch (...) {
    disconnect();
    throw;
  }
}

void UcxFabric::start() {
  ucp_config_t* config;
  ucx_.check(ucx_.config_read(nullptr, nullptr, &config), "cannot read its configuration");
  // Ranks that could share memory do so without UCX, and two network namespaces of a machine are two hosts to us. And
  // a host that does not answer must not hold up this one. Both only where the user does not say otherwise.
  if (!std::getenv("UCX_TLS")) ucx_.config_modify(config, "TLS", "^sm");
  if (!std::getenv("UCX_TCP_CONN_NB")) ucx_.config_modify(config, "TCP_CONN_NB", "y");
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  const ucs_status_t status = ucx_.init_version(1, 12, &params, config, &context_);  // the least that has all we use
  ucx_.config_release(config);
  if (status != UCS_OK) context_ = nullptr;
  ucx_.check(status, "cannot start");

  ucp_worker_params_t worker{};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  ucx_.check(ucx_.worker_create(context_, &worker, &worker_), "cannot make a worker");
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS | UCP_AM_HANDLER_PARAM_FIELD_CB |
                       UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kMessageId, handler.flags = UCP_AM_FLAG_WHOLE_MSG, handler.cb = &on_message, handler.arg = this;
  ucx_.check(ucx_.worker_set_am_recv_handler(worker_, &handler), "cannot take messages");
  ucp_address_t* address;
  size_t length;
  ucx_.check(ucx_.worker_get_address(worker_, &address, &length), "has no address");
  address_.worker.assign(reinterpret_cast<const char*>(address), length);
  ucx_.worker_release_address(worker_, address);
  ucx_.check(ucx_.worker_get_efd(worker_, &events_), "cannot be waited for");
  wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_ < 0) throw std::runtime_error("UCX: no eventfd: " + std::string(std::strerror(errno)));
  thread_ = std::thread([this] { run(); });
}

UcxFabric::~UcxFabric() {
  if (getpid() == process_) {
    close();
  } else {  // a forked child has neither the thread nor a right to the connections
    new std::thread(std::move(thread_));
  }
}

std::optional<int> UcxFabric::connect(const std::vector<std::optional<Address>>& ranks, double timeout_s) {
  const auto give_up = Clock::now() + std::chrono::duration<double>(std::min(timeout_s, 1e9));
  {
    std::lock_guard lock(mutex_);
    for (size_t r = 0; r < links_.size() && !closed_; ++r) {
      if (!ranks.at(r) || int(r) == rank_) continue;
      Link& link = links_[r];
      link.key = ranks[r]->key;
      ucp_ep_params_t params{};
      params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
      params.address = reinterpret_cast<const ucp_address_t*>(ranks[r]->worker.data());
      params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
      params.err_handler = {&on_error, &link};
      const ucs_status_t status = ucx_.ep_create(worker_, &params, &link.ep);
      if (status != UCS_OK) link.ep = nullptr;
      ucx_.check(status, ("no way to rank " + std::to_string(r)).c_str());
      send(int(r), {.kind = UcxMessage::kHello}, nullptr, 0);
    }
  }
  wake();
  while (true) {
    std::optional<int> missing;
    {
      std::lock_guard lock(mutex_);
      for (size_t r = 0; r < links_.size() && !missing; ++r)
        if (ranks[r] && int(r) != rank_ && !(links_[r].greeted && links_[r].state != State::kLost)) missing = int(r);
    }
    if (!missing || failed(*missing) || Clock::now() > give_up) return missing;
    std::this_thread::sleep_for(kLook);
  }
}

void UcxFabric::put(int rank, const UcxMessage& place, const std::byte* from, size_t bytes, std::atomic<uint64_t>& last) {
  waiting_.fetch_add(1, std::memory_order_relaxed);
  std::lock_guard lock(mutex_);
  waiting_.fetch_sub(1, std::memory_order_relaxed);
  Link& link = links_[rank];
  UcxMessage message = place;
  message.kind = UcxMessage::kPut, message.number = link.sent++;
  last.store(link.sent, std::memory_order_relaxed);
  send(rank, message, from, bytes);
}

// Under the mutex, as all below.
void UcxFabric::send(int rank, UcxMessage message, const std::byte* payload, size_t bytes) {
  Link& link = links_[rank];
  if (!link.ep || link.state != State::kUp) return;
  message.key = link.key, message.source = uint32_t(rank_);
  Sending& sending = sendings_.emplace_front(this, &link, message);
  sending.self = sendings_.begin();
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.cb.send = &on_sent, param.user_data = &sending;
  ++link.under_way;
  const ucs_status_ptr_t request =
      ucx_.am_send_nbx(link.ep, kMessageId, &sending.message, sizeof sending.message, payload, bytes, &param);
  if (UCS_PTR_IS_PTR(request)) return wake();
  --link.under_way;
  sendings_.erase(sending.self);
  if (UCS_PTR_IS_ERR(request)) on_error(&link, link.ep, UCS_PTR_STATUS(request)), wake();
}

void UcxFabric::hear(const UcxMessage& message, const void* payload, size_t bytes) {
  // Whoever reaches this port may send anything; a rank of ours knows the key.
  if (message.key != address_.key || message.source >= links_.size() || int(message.source) == rank_) return;
  Link& link = links_[message.source];
  switch (message.kind) {
    case UcxMessage::kHello: link.greeted = true; break;
    case UcxMessage::kPut: land(message, payload, bytes); break;
    case UcxMessage::kLanded: set_landed(link, message.number); break;
    case UcxMessage::kBye: lose(link, State::kLeft); break;
  }
}

void UcxFabric::land(const UcxMessage& message, const void* payload, size_t bytes) {
  const bool fits = bytes <= bytes_ && message.offset <= bytes_ - bytes && bytes_ >= sizeof(uint64_t) &&
                    message.signal <= bytes_ - sizeof(uint64_t) && message.signal % sizeof(uint64_t) == 0;
  if (!fits) return;
  if (bytes) std::memcpy(memory_ + message.offset, payload, bytes);
  // Pairs with the acquire of the reader's test_signal.
  std::atomic_ref(*reinterpret_cast<uint64_t*>(memory_ + message.signal)).store(message.word, std::memory_order_release);
  links_[message.source].arrived.add(message.number);
}

void UcxFabric::set_landed(Link& link, uint64_t number) {
  if (number <= link.landed.load(std::memory_order_relaxed)) return;
  link.landed.store(number, std::memory_order_release);
  for (Listener* listener : listeners_) listener->landed();
}

void UcxFabric::lose(Link& link, State state) {
  State up = State::kUp;
  link.state.compare_exchange_strong(up, state, std::memory_order_release);
}

ucs_status_t UcxFabric::on_message(void* fabric, const void* header, size_t header_bytes, void* data, size_t bytes,
                                   const ucp_am_recv_param_t* param) {
  UcxMessage message;
  const bool is_here = !(param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV);
  if (header_bytes == sizeof message && is_here) {
    std::memcpy(&message, header, sizeof message);
    static_cast<UcxFabric*>(fabric)->hear(message, data, bytes);
  }
  return UCS_OK;  // it is done with
}

void UcxFabric::on_sent(void* request, ucs_status_t status, void* sending) {
  Sending& s = *static_cast<Sending*>(sending);
  --s.link->under_way;
  if (status != UCS_OK) lose(*s.link, State::kLost);
  s.fabric->ucx_.request_free(request);
  s.fabric->sendings_.erase(s.self);
}

void UcxFabric::on_error(void* link, ucp_ep_h, ucs_status_t) { lose(*static_cast<Link*>(link), State::kLost); }

}  // namespace flashmoe
