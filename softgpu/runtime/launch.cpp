// SPDX-License-Identifier: Apache-2.0
// A launch: what CUDA would refuse, then the interpreter.
#include <cstring>
#include <thread>

#include "ptx/ptx.h"
#include "runtime/kernels.h"
#include "runtime/memory.h"
#include "runtime/streams.h"

namespace softgpu {
namespace {

// The arguments as the device has them; `args` points to each.
std::vector<char> argument_bytes(const ptx::Module& module, const std::string& name, void** args) {
  std::vector<char> bytes;
  int i = 0;
  for (const auto& [offset, size] : module.params(name)) {
    bytes.resize(offset + size);
    memcpy(bytes.data() + offset, args[i++], size);
  }
  return bytes;
}

// Every aligned word of the arguments. (Padding, and numbers, may look like an address.)
template <class F>
void each_word(const std::vector<char>& bytes, F f) {
  for (size_t i = 0; i + sizeof(void*) <= bytes.size(); i += sizeof(void*)) {
    void* p;
    memcpy(&p, bytes.data() + i, sizeof p);
    f(p, i / sizeof p);
  }
}

cudaError_t check_arguments(const Kernel& k, const std::vector<char>& bytes) {
  const char* name = k.demangled.c_str();
  const int expected = k.facts().parameter_bytes;
  if (expected && expected != int(bytes.size())) {
    return refuse(cudaErrorInvalidValue, "%s: %zu bytes of parameters in PTX, %d in the cubin",
                  name, bytes.size(), expected);
  }
  if (bytes.size() > size_t(kParameterBytes)) {
    return refuse(cudaErrorInvalidValue, "%s: %zu bytes of parameters, at most %d are possible",
                  name, bytes.size(), kParameterBytes);
  }
  cudaError_t error = cudaSuccess;
  each_word(bytes, [&](void* p, size_t i) {
    const Allocation* a = allocation_at(p);
    if (error || !a || a->device == me.device) return;
    error = refuse(cudaErrorIllegalAddress,
                   "%s on device %d gets memory of device %d (word %zu of its arguments: %p)", name,
                   me.device, a->device, i, p);
  });
  return error;
}

// The interpreter's message, and where the address in it lies.
std::string explained(const std::string& message) {
  const std::string before = "invalid address ";
  const size_t at = message.find(before);
  if (at == std::string::npos) return message;
  const char* digits = message.c_str() + at + before.size();
  char* end;
  const auto address = strtoull(digits, &end, 16);
  std::string text = message;
  return text.insert(size_t(end - message.c_str()),
                     place_of(reinterpret_cast<const void*>(address)));
}

// Tells the order of streams of every access of the interpreter while it lives.
struct Watch {
  Watch() {
    if (!checks_streams()) return;
    ptx::on_access = [](const char* p, size_t bytes, bool writes) { touch(p, bytes, writes); };
  }
  ~Watch() { ptx::on_access = nullptr; }
};

cudaError_t execute(const Kernel& k, ptx::Kernel& code, const std::vector<char>& arguments,
                    dim3 grid, dim3 block, size_t smem) {
  const char* name = k.demangled.c_str();
  try {
    const Watch watch;
    ptx::Options options = ptx::Options::current();
    options.sms = unsigned(settings().multiprocessors);
    ptx::launch(code, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, smem, arguments,
                options);
  } catch (const ptx::Error& e) {
    return refuse(cudaErrorLaunchFailure, "%s: %s", name, explained(e.what()).c_str());
  }
  bool wrote_outside = false;
  each_word(arguments, [&](void* p, size_t) {
    if (const Allocation* a = allocation_at(p)) wrote_outside |= damaged(*a, name);
  });
  return wrote_outside ? done(cudaErrorLaunchFailure) : cudaSuccess;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args, size_t smem,
                   cudaStream_t handle) {
  Lock lock(mutex);
  const Kernel* k = kernel_of(function, "launch");
  if (!k) return me.last;
  const char* name = k->demangled.c_str();
  CUstream_st* s = stream_of(handle, name);
  if (!s) return me.last;
  note(
      "launch device=%d stream=%d thread=%lu captured=%d grid=%u,%u,%u block=%u smem=%zu kernel=%s",
      me.device, s->number, std::hash<std::thread::id>{}(std::this_thread::get_id()) % 100000,
      s->capture != nullptr, grid.x, grid.y, grid.z, block.x * block.y * block.z, smem, name);
  if (s->device != me.device) {
    return refuse(cudaErrorInvalidResourceHandle, "%s: device %d is current, the stream is of %d",
                  name, me.device, s->device);
  }
  ptx::Module* module = k->image->module();
  if (!module) {
    return refuse(cudaErrorNoKernelImageForDevice, "%s: %s", name,
                  k->image->what_is_missing().c_str());
  }
  if (cudaError_t error = check_launch(*k, grid, block, smem)) return error;
  std::vector<char> arguments;
  try {
    arguments = argument_bytes(*module, k->name, args);
  } catch (const std::exception&) {
    return refuse(cudaErrorInvalidDeviceFunction, "%s: not in the library's PTX", name);
  }
  ptx::Kernel* code;
  try {
    code = &module->kernel(k->name);
  } catch (const ptx::Error& e) {
    return refuse(cudaErrorInvalidPtx, "%s: %s", name, e.what());
  }
  if (cudaError_t error = check_arguments(*k, arguments)) return error;
  return submit(*s, name, [=, arguments = std::move(arguments)] {
    return execute(*k, *code, arguments, grid, block, smem);
  });
}

}  // namespace
}  // namespace softgpu

using namespace softgpu;

SOFTGPU_API cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t smem,
                             cudaStream_t stream) {
  return launch(function, grid, block, args, smem, stream);
}
SOFTGPU_API cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void** args) {
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    const auto id = c->attrs[i].id;
    if (id != cudaLaunchAttributeIgnore && id != cudaLaunchAttributePriority) {
      return softgpu_not_provided("this attribute of cudaLaunchKernelExC");
    }
  }
  return launch(function, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, c->stream);
}
SOFTGPU_API __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t smem,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, args, smem, stream);
}

// The two halves of <<<>>>.
extern "C" unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t smem,
                                                CUstream_st* stream) {
  me.calls.push_back({grid, block, smem, stream});
  return 0;
}
SOFTGPU_API __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* smem, void* stream) {
  const Thread::Call call = me.calls.back();
  me.calls.pop_back();
  *grid = call.grid;
  *block = call.block;
  *smem = call.smem;
  *static_cast<cudaStream_t*>(stream) = call.stream;
  return cudaSuccess;
}

// ---- for torch's operations (torch/aten.cpp), which run outside of any launch

// Bytes that an operation reads or writes.
struct softgpu_access {
  const void* address;
  size_t bytes;
  bool writes;
};

// Within work that runs (a graph's replay), the accesses are that work's; else they are those of
// new work in the stream. What is captured does not run now.
extern "C" void softgpu_operation(cudaStream_t handle, const char* name,
                                  const softgpu_access* accesses, size_t count) {
  Lock lock(mutex);
  if (!runs_work()) {
    if (const CUstream_st* s = stream_of(handle, name)) {
      note("operation device=%d stream=%d kernel=%s", s->device, s->number, name);
    }
  }
  if (!checks_streams()) return;
  const auto touch_all = [=] {
    for (size_t i = 0; i < count; ++i)
      touch(accesses[i].address, accesses[i].bytes, accesses[i].writes);
    return cudaSuccess;
  };
  if (runs_work()) {
    touch_all();
  } else if (CUstream_st* s = stream_of(handle, name); s && !s->capture) {
    submit(*s, name, touch_all);
  }
}
