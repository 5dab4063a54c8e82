// UCX, found at run time: a build that can use it still runs where it is not installed.
#pragma once

#include <ucp/api/ucp.h>

#include <string>

namespace flashmoe {

class UcxLibrary {
 public:
  // `path` names libucp, by its file or as the system's loader finds it. Stays loaded until the process ends.
  // Throws std::runtime_error: not found, or not what the headers describe.
  explicit UcxLibrary(const std::string& path);

  decltype(&::ucp_get_version_string) get_version_string;
  decltype(&::ucp_config_read) config_read;
  decltype(&::ucp_config_modify) config_modify;
  decltype(&::ucp_config_release) config_release;
  decltype(&::ucp_init_version) init_version;
  decltype(&::ucp_cleanup) cleanup;
  decltype(&::ucp_worker_create) worker_create;
  decltype(&::ucp_worker_destroy) worker_destroy;
  decltype(&::ucp_worker_get_address) worker_get_address;
  decltype(&::ucp_worker_release_address) worker_release_address;
  decltype(&::ucp_worker_get_efd) worker_get_efd;
  decltype(&::ucp_worker_arm) worker_arm;
  decltype(&::ucp_worker_progress) worker_progress;
  decltype(&::ucp_worker_set_am_recv_handler) worker_set_am_recv_handler;
  decltype(&::ucp_ep_create) ep_create;
  decltype(&::ucp_ep_close_nbx) ep_close_nbx;
  decltype(&::ucp_am_send_nbx) am_send_nbx;
  decltype(&::ucp_request_free) request_free;
  decltype(&::ucs_status_string) status_string;

  // std::runtime_error("UCX: <what>: <why>") unless status is UCS_OK.
  void check(ucs_status_t status, const char* what) const;
};

}  // namespace flashmoe
