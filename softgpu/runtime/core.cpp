// SPDX-License-Identifier: Apache-2.0
#include "runtime/core.h"

#include <cstdarg>
#include <cstdio>
#include <string>
#include <utility>

namespace softgpu {

std::recursive_mutex mutex;
thread_local Thread me;

namespace {

bool logging = false;
std::string log_text;

std::string formatted(const char* format, va_list arguments) {
  char text[4096];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

}  // namespace

cudaError_t done(cudaError_t error) {
  if (error != cudaSuccess) me.last = error;
  return error;
}

cudaError_t refuse(cudaError_t error, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string why = formatted(format, arguments);
  va_end(arguments);
  fprintf(stderr, "softgpu: %s: %s\n", cudaGetErrorName(error), why.c_str());
  return done(error);
}

void note(const char* format, ...) {
  Lock lock(mutex);
  if (!logging) return;
  va_list arguments;
  va_start(arguments, format);
  log_text += formatted(format, arguments) + '\n';
  va_end(arguments);
}

}  // namespace softgpu

using namespace softgpu;

// A function of the runtime that is not written: build.py makes each of them call this.
SOFTGPU_API softgpu_not_provided(const char* name) {
  return refuse(cudaErrorNotSupported, "the software GPU does not provide %s", name);
}

// ---- the log, for Python

extern "C" void softgpu_log(int on) {
  Lock lock(mutex);
  logging = on;
  log_text.clear();
}
// Valid until this thread asks again.
extern "C" const char* softgpu_log_text() {
  static thread_local std::string copy;
  Lock lock(mutex);
  copy = log_text;
  return copy.c_str();
}

// ---- errors

SOFTGPU_API cudaGetLastError() { return std::exchange(me.last, cudaSuccess); }
SOFTGPU_API cudaPeekAtLastError() { return me.last; }

extern "C" const char* cudaGetErrorName(cudaError_t error) {
  switch (int(error)) {
#define NAME(name) \
  case name:       \
    return #name;
#include "errors.inc"  // NAME(...) of every error of driver_types.h; build.py writes it
#undef NAME
  }
  return "unrecognized error code";
}

extern "C" const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidPtx:
      return "a PTX JIT compilation failed";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnmatched:
      return "capture was not initiated in this stream";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorCapturedEvent:
      return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorStreamCaptureWrongThread:
      return "attempt to terminate a thread-local capture sequence from another thread";
    default:
      return cudaGetErrorName(error);  // which this runtime does not return
  }
}
