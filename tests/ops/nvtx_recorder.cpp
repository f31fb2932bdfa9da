// SPDX-License-Identifier: Apache-2.0
// An NVTX injection library: appends "push <domain> <name>" and "pop <domain>" lines to the file
// that NVTX_RECORD names. Loaded by NVTX itself through NVTX_INJECTION64_PATH, as Nsight is.
#include <nvtx3/nvToolsExt.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

namespace {

std::mutex mutex;

void record(const std::string& line) {
  static std::FILE* file = std::fopen(std::getenv("NVTX_RECORD"), "w");
  const std::lock_guard<std::mutex> lock(mutex);
  std::fputs((line + "\n").c_str(), file);
  std::fflush(file);
}

const char* domain_name(nvtxDomainHandle_t domain) { return reinterpret_cast<const char*>(domain); }

nvtxDomainHandle_t NVTX_API create_domain(const char* name) {
  return reinterpret_cast<nvtxDomainHandle_t>((new std::string(name))->data());
}

nvtxStringHandle_t NVTX_API register_string(nvtxDomainHandle_t, const char* text) {
  return reinterpret_cast<nvtxStringHandle_t>((new std::string(text))->data());
}

int NVTX_API push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* event) {
  const char* name = event->messageType == NVTX_MESSAGE_TYPE_REGISTERED
                         ? reinterpret_cast<const char*>(event->message.registered)
                         : event->message.ascii;
  record(std::string("push ") + domain_name(domain) + " " + name);
  return 0;
}

int NVTX_API pop(nvtxDomainHandle_t domain) {
  record(std::string("pop ") + domain_name(domain));
  return 0;
}

template <class F>
NvtxFunctionPointer erase(F function) {
  return reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(
    NvtxGetExportTableFunc_t get_table) {
  const auto* callbacks =
      static_cast<const NvtxExportTableCallbacks*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned int size = 0;
  if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = erase(create_domain);
  *table[NVTX_CBID_CORE2_DomainRegisterStringA] = erase(register_string);
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = erase(push);
  *table[NVTX_CBID_CORE2_DomainRangePop] = erase(pop);
  return 1;
}
