// One rank's end of the network between hosts: a UCX worker, a thread that sees to it, and the memory that peers put
// to. All groups of a rank share it (UcxNetwork is a group's view).
//
// A put is an active message: payload, and the header that says where it goes. UCX hands it over when it is whole, by
// whatever transport and in whatever pieces it came; the receiver's thread then copies the payload and stores the
// signal, with release. So payload before signal is the order of one thread, and the signal is one untorn store. With
// UCX's remote puts it would take a flush, a round trip, before each signal: they are ordered neither with each other
// nor across lanes. It also is the receiver who decides where a put may go: UCX itself never writes to this memory, and
// no peer has a key to it (hence no rendezvous either, and two copies where RDMA could do with none).
//
// The receiver confirms what has landed. A peer that is lost, or has left, has nothing under way: what was not confirmed
// counts as landed once UCX has let go of it, since nobody is left there to be overtaken.
#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "platform/ucx_library.h"
#include "platform/ucx_message.h"

namespace flashmoe {

class UcxFabric {
 public:
  // Where a rank is reached, and the key by which it knows its peers. To be handed over by other means.
  struct Address {
    std::string worker;
    uint64_t key;
  };
  // Hears of it, from whatever thread, when more of a rank's puts have landed.
  class Listener {
   public:
    virtual void landed() = 0;

   protected:
    ~Listener() = default;
  };

  // Peers may write to `memory`, as soon as they know the address. `library`: as UcxLibrary takes it.
  UcxFabric(const std::string& library, std::shared_ptr<void> keep, std::byte* memory, size_t bytes, int rank, int world_size);
  ~UcxFabric();
  UcxFabric(const UcxFabric&) = delete;

  const Address& address() const { return address_; }
  int world_size() const { return int(links_.size()); }
  // Waits until every rank that has an address here can be reached and has reached us; who has not, or null.
  // Throws std::runtime_error if UCX refuses.
  std::optional<int> connect(const std::vector<std::optional<Address>>& ranks, double timeout_s);

  // `last` becomes the put's number + 1: what landed(rank) must reach.
  void put(int rank, const UcxMessage& place, const std::byte* from, size_t bytes, std::atomic<uint64_t>& last);
  uint64_t landed(int rank) const { return links_[rank].landed.load(std::memory_order_acquire); }
  bool reachable(int rank) const { return links_[rank].state.load(std::memory_order_acquire) == State::kUp; }
  // As reachable, but a rank that has said goodbye has not failed.
  bool failed(int rank) const { return links_[rank].state.load(std::memory_order_acquire) == State::kLost; }

  void add(Listener* listener);
  void remove(Listener* listener);

  // Ends everything, waits for nobody. What was under way is forgotten, and nothing can be put any more.
  void close();

 private:
  enum class State { kUp, kLeft, kLost };
  struct Link {
    ucp_ep_h ep = nullptr;
    uint64_t key = 0;
    uint64_t sent = 0, under_way = 0;  // puts; messages of any kind that UCX still reads
    Arrivals arrived;
    uint64_t confirmed = 0;
    bool greeted = false;
    std::atomic<State> state{State::kUp};
    std::atomic<uint64_t> landed{0};
  };
  // What UCX has not finished with: its header must lie still, too.
  struct Sending {
    UcxFabric* fabric;
    Link* link;
    UcxMessage message;
    std::list<Sending>::iterator self;
  };

  void start();
  void run();
  void look_after_links();
  void wake();
  void send(int rank, UcxMessage message, const std::byte* payload, size_t bytes);
  void hear(const UcxMessage& message, const void* payload, size_t bytes);
  void land(const UcxMessage& message, const void* payload, size_t bytes);
  void set_landed(Link& link, uint64_t number);
  void disconnect();

  static ucs_status_t on_message(void* fabric, const void* header, size_t header_bytes, void* data, size_t bytes,
                                 const ucp_am_recv_param_t* param);
  static void on_sent(void* request, ucs_status_t status, void* sending);
  static void on_error(void* link, ucp_ep_h ep, ucs_status_t status);
  static void on_closed(void* request, ucs_status_t status, void* fabric);
  static void lose(Link& link, State state);

  const pid_t process_;
  const UcxLibrary ucx_;
  const std::shared_ptr<void> keep_;
  std::byte* const memory_;
  const size_t bytes_;
  const int rank_;
  Address address_;
  std::vector<Link> links_;  // by rank

  // Of UCX one thread at a time: callbacks, too, run under it.
  std::mutex mutex_;
  std::atomic<int> waiting_{0};  // for the mutex: the thread that goes round lets them in
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  std::vector<Listener*> listeners_;
  std::list<Sending> sendings_;
  int closing_ = 0;  // endpoints that UCX has not let go of
  bool stop_ = false, closed_ = false;
  int events_ = -1, wake_ = -1;  // to wait on: UCX's, and an eventfd of ours
  std::thread thread_;
};

}  // namespace flashmoe
