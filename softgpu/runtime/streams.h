// SPDX-License-Identifier: Apache-2.0
// Streams, events and captured graphs.
#pragma once
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "runtime/core.h"
#include "runtime/order.h"

namespace softgpu {

using Work = std::function<cudaError_t()>;

struct Node {
  std::string name;
  int line;     // the captured stream's
  Clock clock;  // within the capture
  Work work;
};

}  // namespace softgpu

struct CUgraph_st {
  std::vector<softgpu::Node> nodes;
  std::map<int, softgpu::Clock> clocks;  // of the streams that are captured into it, by their line
  CUstream_st* origin = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  unsigned long long id = 0;
  bool valid = true;
};

struct CUgraphExec_st {
  std::vector<softgpu::Node> nodes;
  bool branches = false;  // more than one stream was captured
};

struct CUstream_st {
  int device = 0, number = 0, priority = 0, line = 0;
  bool blocking = false;  // ordered with the default stream, as that with it
  bool destroyed = false;
  CUgraph_st* capture = nullptr;
  softgpu::Clock clock;
};

struct CUevent_st {
  int device = 0;
  bool timing = true, recorded = false;
  CUgraph_st* capture = nullptr;
  softgpu::Clock clock;
  std::chrono::steady_clock::time_point time;
};

namespace softgpu {

// The stream of a handle; 0, 1 and 2 stand for the current device's default stream. Null, and the
// reason on stderr, where there is none.
CUstream_st* stream_of(cudaStream_t handle, const char* call);

// Runs work, or keeps it for the graph that the stream is captured into.
cudaError_t submit(CUstream_st& stream, const std::string& name, Work work);

// For calls that wait for all streams, or might: a capture does not allow them.
cudaError_t unsafe_in_capture(const char* call);

// What the host knows after it waited for a device.
void host_waits_for_device(int device);

}  // namespace softgpu
