#include "platform/ucx_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace flashmoe {
namespace {

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("UCX: the library found has no function ") + name);
}

// What UCX reads from the environment when it is loaded, and does to the whole process. Where the user does not say
// otherwise: no hooks in everybody's mmap, which only a cache of RDMA registrations needs, and no word on stdout.
class LoadTimeSettings {
 public:
  LoadTimeSettings() {
    for (Setting& setting : settings_) {
      setting.ours = !std::getenv(setting.name);
      if (setting.ours) setenv(setting.name, setting.value, 0);
    }
  }
  ~LoadTimeSettings() {  // another UCX, loaded later, is none of our business
    for (const Setting& setting : settings_)
      if (setting.ours) unsetenv(setting.name);
  }

 private:
  struct Setting {
    const char *name, *value;
    bool ours = false;
  };
  Setting settings_[2] = {{"UCX_MEM_EVENTS", "n"}, {"UCX_LOG_FILE", "stderr"}};
};

}  // namespace

UcxLibrary::UcxLibrary(const std::string& path) {
  const LoadTimeSettings settings;
  // RTLD_LOCAL: another UCX of this process, an MPI's, keeps its own symbols. RTLD_NODELETE: its threads and its
  // handlers at exit must not lose their code.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (!library) throw std::runtime_error("UCX cannot be loaded: " + std::string(dlerror()));
  find(library, "ucp_get_version_string", get_version_string);
  find(library, "ucp_config_read", config_read);
  find(library, "ucp_config_modify", config_modify);
  find(library, "ucp_config_release", config_release);
  find(library, "ucp_init_version", init_version);
  find(library, "ucp_cleanup", cleanup);
  find(library, "ucp_worker_create", worker_create);
  find(library, "ucp_worker_destroy", worker_destroy);
  find(library, "ucp_worker_get_address", worker_get_address);
  find(library, "ucp_worker_release_address", worker_release_address);
  find(library, "ucp_worker_get_efd", worker_get_efd);
  find(library, "ucp_worker_arm", worker_arm);
  find(library, "ucp_worker_progress", worker_progress);
  find(library, "ucp_worker_set_am_recv_handler", worker_set_am_recv_handler);
  find(library, "ucp_ep_create", ep_create);
  find(library, "ucp_ep_close_nbx", ep_close_nbx);
  find(library, "ucp_am_send_nbx", am_send_nbx);
  find(library, "ucp_request_free", request_free);
  find(library, "ucs_status_string", status_string);
}

void UcxLibrary::check(ucs_status_t status, const char* what) const {
  if (status != UCS_OK) throw std::runtime_error(std::string("UCX: ") + what + ": " + status_string(status));
}

}  // namespace flashmoe
