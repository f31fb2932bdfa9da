// SPDX-License-Identifier: Apache-2.0
#include "runtime/streams.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <set>

#include "runtime/settings.h"

namespace softgpu {
namespace {

// Destroyed ones stay for a while, or for good, so that no new one gets their address and their use
// is noticed.
std::vector<std::unique_ptr<CUstream_st>> streams;
std::set<CUevent_st*> events;
std::deque<std::unique_ptr<CUevent_st>> destroyed_events;
constexpr size_t kDestroyedEvents = 10000;
CUstream_st default_streams[kMaxDevices];

bool is_default(const CUstream_st& s) { return s.line < kMaxDevices; }

CUevent_st* event_of(cudaEvent_t event, const char* call) {
  if (events.count(event)) return event;
  refuse(cudaErrorInvalidResourceHandle, "%s with %s", call,
         event ? "an event that was destroyed" : "no event");
  return nullptr;
}

// What comes before the stream's next work, of a capture's work where it is captured.
Clock& clock_of(CUstream_st& s) { return s.capture ? s.capture->clocks[s.line] : s.clock; }

// The default stream waits for the blocking streams of its device, and they for it.
void join_default(CUstream_st& s) {
  if (is_default(s)) {
    for (const auto& other : streams) {
      if (other->blocking && other->device == s.device) join(s.clock, other->clock);
    }
  } else if (s.blocking) {
    join(s.clock, default_streams[s.device].clock);
  }
}

cudaError_t invalidate(CUgraph_st& capture, cudaError_t error, const char* call, const char* why) {
  capture.valid = false;
  return refuse(error, "%s %s", call, why);
}

// The capture that work in this stream, if it is a default one, would bypass. CUDA allows that for
// streams that do not block; but what runs there is missing in the graph, which nobody wants.
CUgraph_st* bypassed(const CUstream_st& s) {
  if (!is_default(s) || me.capture_mode == cudaStreamCaptureModeRelaxed) return nullptr;
  for (const auto& other : streams) {
    CUgraph_st* capture = other->capture;
    if (!capture || other->device != s.device) continue;
    const bool mine = capture->thread == std::this_thread::get_id();
    if (capture->mode == cudaStreamCaptureModeGlobal ||
        (mine && capture->mode == cudaStreamCaptureModeThreadLocal)) {
      return capture;
    }
  }
  return nullptr;
}
constexpr const char* kBypass = "in the default stream while another stream is captured";

cudaError_t wait_for(CUgraph_st* capture, cudaError_t error, const char* call) {
  if (!capture) return cudaSuccess;
  return invalidate(*capture, error, call, "while the stream is captured");
}

// Work of a captured graph that the origin does not come after.
bool joined(const CUgraph_st& graph) {
  const auto origin = graph.clocks.find(graph.origin->line);
  return std::all_of(graph.nodes.begin(), graph.nodes.end(), [&](const Node& n) {
    if (origin == graph.clocks.end()) return false;
    const auto known = origin->second.find(n.line);
    return known != origin->second.end() && known->second >= n.clock.at(n.line);
  });
}

cudaError_t replay(const CUgraphExec_st& exec, CUstream_st& s) {
  if (!exec.branches) {
    for (const Node& n : exec.nodes) {
      if (cudaError_t error = submit(s, n.name, n.work)) return error;
    }
    return cudaSuccess;
  }
  ++s.clock[s.line];
  const Clock start = s.clock;
  std::map<int, int> lines;  // of the capture: that of this replay
  const auto line_of = [&](int captured) {
    auto [found, fresh] = lines.emplace(captured, 0);
    if (fresh) found->second = new_line();
    return found->second;
  };
  for (const Node& n : exec.nodes) {
    Clock clock = start;
    for (const auto& [line, count] : n.clock) clock[line_of(line)] = count;
    {
      const Running running(line_of(n.line), clock, n.name + " (a branch of a graph)");
      if (cudaError_t error = n.work()) return error;
    }
    join(s.clock, clock);
  }
  return cudaSuccess;
}

}  // namespace

CUstream_st* stream_of(cudaStream_t handle, const char* call) {
  if (uintptr_t(handle) <= 2) {
    CUstream_st& s = default_streams[me.device];
    s.device = s.line = me.device;
    return &s;
  }
  if (!handle->destroyed) return handle;
  refuse(cudaErrorInvalidResourceHandle, "%s with stream %d, which was destroyed", call,
         handle->number);
  return nullptr;
}

cudaError_t submit(CUstream_st& s, const std::string& name, Work work) {
  if (CUgraph_st* capture = bypassed(s)) {
    return invalidate(*capture, cudaErrorStreamCaptureImplicit, name.c_str(), kBypass);
  }
  if (s.capture) {
    Clock& clock = s.capture->clocks[s.line];
    ++clock[s.line];
    s.capture->nodes.push_back({name, s.line, clock, std::move(work)});
    return cudaSuccess;
  }
  join(s.clock, host_clock());
  join_default(s);
  ++s.clock[s.line];
  std::string where;
  if (checks_streams()) {
    where = name + " (device " + std::to_string(s.device) + ", stream " + std::to_string(s.number) +
            ")";
  }
  const Running running(s.line, s.clock, where);
  return work();
}

cudaError_t unsafe_in_capture(const char* call) {
  if (me.capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (const auto& s : streams) {
    CUgraph_st* capture = s->capture;
    if (!capture || capture->mode == cudaStreamCaptureModeRelaxed) continue;
    const bool mine = capture->thread == std::this_thread::get_id();
    const bool global = capture->mode == cudaStreamCaptureModeGlobal &&
                        me.capture_mode == cudaStreamCaptureModeGlobal;
    if (mine || global) {
      return invalidate(*capture, cudaErrorStreamCaptureUnsupported, call,
                        "while a stream is captured");
    }
  }
  return cudaSuccess;
}

void host_waits_for_device(int device) {
  host_waits_for(default_streams[device].clock);
  for (const auto& s : streams) {
    if (s->device == device) host_waits_for(s->clock);
  }
}

}  // namespace softgpu

using namespace softgpu;

// What softgpu.calls() names a stream; -1 if it was destroyed.
extern "C" int softgpu_number(cudaStream_t handle) {
  Lock lock(mutex);
  const CUstream_st* s = stream_of(handle, "softgpu_number");
  return s ? s->number : -1;
}

// ---- streams

SOFTGPU_API cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
  Lock lock(mutex);
  auto s = std::make_unique<CUstream_st>();
  s->device = me.device;
  s->number = int(streams.size()) + 1;
  s->priority = priority;
  s->line = new_line();
  s->blocking = !(flags & cudaStreamNonBlocking);
  *handle = s.get();
  streams.push_back(std::move(s));
  return cudaSuccess;
}
SOFTGPU_API cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
SOFTGPU_API cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
  return cudaStreamCreateWithPriority(s, flags, 0);
}
SOFTGPU_API cudaStreamDestroy(cudaStream_t handle) {
  Lock lock(mutex);
  CUstream_st* s = stream_of(handle, "cudaStreamDestroy");
  if (!s) return me.last;
  if (is_default(*s)) return refuse(cudaErrorInvalidResourceHandle, "the default stream stays");
  s->destroyed = true;
  return cudaSuccess;
}
SOFTGPU_API cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  Lock lock(mutex);
  const CUstream_st* s = stream_of(handle, "cudaStreamGetPriority");
  if (!s) return me.last;
  *priority = s->priority;
  return cudaSuccess;
}
SOFTGPU_API cudaStreamQuery(cudaStream_t handle) {
  Lock lock(mutex);
  CUstream_st* s = stream_of(handle, "cudaStreamQuery");
  if (!s) return me.last;
  if (cudaError_t error =
          wait_for(s->capture, cudaErrorStreamCaptureUnsupported, "cudaStreamQuery")) {
    return error;
  }
  host_waits_for(s->clock);
  return cudaSuccess;
}
SOFTGPU_API cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock(mutex);
  CUstream_st* s = stream_of(handle, "cudaStreamSynchronize");
  if (!s) return me.last;
  note("stream_synchronize device=%d stream=%d", s->device, s->number);
  if (cudaError_t error =
          wait_for(s->capture, cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize")) {
    return error;
  }
  join_default(*s);
  host_waits_for(s->clock);
  return cudaSuccess;
}
SOFTGPU_API cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Lock lock(mutex);
  constexpr const char* kCall = "cudaStreamWaitEvent";
  CUstream_st* s = stream_of(handle, kCall);
  const CUevent_st* e = s ? event_of(event, kCall) : nullptr;
  if (!e) return me.last;
  note("stream_wait_event device=%d stream=%d event=%p", s->device, s->number,
       static_cast<const void*>(e));
  if (!e->recorded) return cudaSuccess;
  if (e->capture && is_default(*s)) {
    return invalidate(*e->capture, cudaErrorStreamCaptureImplicit, kCall,
                      "in the default stream for an event of a capture");
  }
  if (s->capture && e->capture != s->capture) {
    return invalidate(*s->capture, cudaErrorStreamCaptureIsolation, kCall,
                      "in a capture for an event from outside of it");
  }
  s->capture = e->capture;
  join(clock_of(*s), e->clock);
  return cudaSuccess;
}
SOFTGPU_API cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  Lock lock(mutex);
  CUstream_st* s = stream_of(handle, "cudaLaunchHostFunc");
  if (!s) return me.last;
  return submit(*s, "cudaLaunchHostFunc", [=] {
    function(data);
    return cudaSuccess;
  });
}
SOFTGPU_API cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t function, void* data,
                                  unsigned) {
  Lock lock(mutex);
  CUstream_st* s = stream_of(handle, "cudaStreamAddCallback");
  if (!s) return me.last;
  return submit(*s, "cudaStreamAddCallback", [=] {
    function(handle, cudaSuccess, data);
    return cudaSuccess;
  });
}
SOFTGPU_API cudaDeviceSynchronize() {
  Lock lock(mutex);
  note("device_synchronize device=%d", me.device);
  if (cudaError_t error = unsafe_in_capture("cudaDeviceSynchronize")) return error;
  host_waits_for_device(me.device);
  return cudaSuccess;
}

// ---- events

SOFTGPU_API cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  Lock lock(mutex);
  auto e = std::make_unique<CUevent_st>();
  e->device = me.device;
  e->timing = !(flags & cudaEventDisableTiming);
  *event = e.release();
  events.insert(*event);
  return cudaSuccess;
}
SOFTGPU_API cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
SOFTGPU_API cudaEventDestroy(cudaEvent_t event) {
  Lock lock(mutex);
  CUevent_st* e = event_of(event, "cudaEventDestroy");
  if (!e) return me.last;
  events.erase(e);
  destroyed_events.emplace_back(e);
  if (destroyed_events.size() > kDestroyedEvents) destroyed_events.pop_front();
  return cudaSuccess;
}
SOFTGPU_API cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  Lock lock(mutex);
  CUstream_st* s = stream_of(handle, "cudaEventRecord");
  CUevent_st* e = s ? event_of(event, "cudaEventRecord") : nullptr;
  if (!e) return me.last;
  note("event_record device=%d stream=%d event=%p", s->device, s->number, static_cast<void*>(e));
  if (e->device != s->device) {
    return refuse(cudaErrorInvalidResourceHandle, "event of device %d recorded in a stream of %d",
                  e->device, s->device);
  }
  if (!s->capture) {
    join(s->clock, host_clock());
    join_default(*s);
  }
  e->clock = clock_of(*s);
  e->capture = s->capture;
  e->time = std::chrono::steady_clock::now();
  e->recorded = true;
  return cudaSuccess;
}
SOFTGPU_API cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  return cudaEventRecordWithFlags(e, s, 0);
}

namespace {

cudaError_t wait_for_event(cudaEvent_t event, const char* call) {
  CUevent_st* e = event_of(event, call);
  if (!e) return me.last;
  if (cudaError_t error = wait_for(e->capture, cudaErrorCapturedEvent, call)) return error;
  host_waits_for(e->clock);
  return cudaSuccess;
}

}  // namespace

SOFTGPU_API cudaEventQuery(cudaEvent_t e) {
  Lock lock(mutex);
  return wait_for_event(e, "cudaEventQuery");
}
SOFTGPU_API cudaEventSynchronize(cudaEvent_t e) {
  Lock lock(mutex);
  note("event_synchronize");
  return wait_for_event(e, "cudaEventSynchronize");
}
SOFTGPU_API cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  Lock lock(mutex);
  for (const cudaEvent_t event : {from, to}) {
    const CUevent_st* e = event_of(event, "cudaEventElapsedTime");
    if (!e) return me.last;
    if (!e->timing || !e->recorded || e->capture) {
      return refuse(cudaErrorInvalidResourceHandle, "cudaEventElapsedTime of an event %s",
                    !e->timing    ? "without timing"
                    : e->recorded ? "of a capture"
                                  : "that was not recorded");
    }
  }
  *ms = std::chrono::duration<float, std::milli>(to->time - from->time).count();
  return cudaSuccess;
}

// ---- captures and graphs

SOFTGPU_API cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, me.capture_mode), cudaSuccess;
}
SOFTGPU_API cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(mutex);
  static unsigned long long id = 0;
  CUstream_st* s = stream_of(handle, "cudaStreamBeginCapture");
  if (!s) return me.last;
  if (is_default(*s)) {
    return refuse(cudaErrorStreamCaptureUnsupported, "capture of the default stream");
  }
  if (s->capture) return refuse(cudaErrorIllegalState, "the stream is captured already");
  note("begin_capture device=%d stream=%d", s->device, s->number);
  s->capture = new CUgraph_st;
  s->capture->origin = s;
  s->capture->mode = mode;
  s->capture->thread = std::this_thread::get_id();
  s->capture->id = ++id;
  return cudaSuccess;
}
SOFTGPU_API cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Lock lock(mutex);
  *graph = nullptr;
  CUstream_st* s = stream_of(handle, "cudaStreamEndCapture");
  if (!s) return me.last;
  CUgraph_st* capture = s->capture;
  if (!capture || capture->origin != s) {
    return refuse(cudaErrorStreamCaptureUnmatched, "no capture began in this stream");
  }
  for (const auto& other : streams) {
    if (other->capture == capture) other->capture = nullptr;
  }
  for (CUevent_st* e : events) {  // a captured event means nothing once the capture has ended
    if (e->capture == capture) e->capture = nullptr, e->recorded = false;
  }
  std::unique_ptr<CUgraph_st> result(capture);
  if (!result->valid) return done(cudaErrorStreamCaptureInvalidated);
  if (!joined(*result)) {
    return refuse(cudaErrorStreamCaptureUnjoined,
                  "a stream that joined the capture has work that its first stream does not wait "
                  "for");
  }
  *graph = result.release();
  return cudaSuccess;
}
SOFTGPU_API cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock(mutex);
  const CUstream_st* s = stream_of(handle, "cudaStreamIsCapturing");
  if (!s) return me.last;
  if (bypassed(*s)) {
    return refuse(cudaErrorStreamCaptureImplicit, "cudaStreamIsCapturing %s", kBypass);
  }
  *status = !s->capture         ? cudaStreamCaptureStatusNone
            : s->capture->valid ? cudaStreamCaptureStatusActive
                                : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}
SOFTGPU_API cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  Lock lock(mutex);
  if (cudaError_t error = cudaStreamIsCapturing(handle, status)) return error;
  CUgraph_st* capture = stream_of(handle, "cudaStreamGetCaptureInfo")->capture;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
SOFTGPU_API cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes) return softgpu_not_provided("cudaGraphGetNodes, other than to count");
  *count = graph->nodes.size();
  return cudaSuccess;
}
SOFTGPU_API cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                          unsigned long long) {
  Lock lock(mutex);
  *exec = new CUgraphExec_st{graph->nodes, graph->clocks.size() > 1};
  return cudaSuccess;
}
SOFTGPU_API cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
SOFTGPU_API cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  Lock lock(mutex);
  CUstream_st* s = stream_of(handle, "cudaGraphLaunch");
  if (!s) return me.last;
  note("graph_launch nodes=%zu device=%d stream=%d", exec->nodes.size(), s->device, s->number);
  if (s->capture) return softgpu_not_provided("cudaGraphLaunch in a capture");
  join(s->clock, host_clock());
  return replay(*exec, *s);
}
SOFTGPU_API cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
SOFTGPU_API cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }
