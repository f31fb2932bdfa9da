// SPDX-License-Identifier: Apache-2.0
// torch's own operations on the software GPUs. Device memory is host memory, so an operation on
// cuda tensors is run by its CPU kernel on CPU tensors that share their memory: one function,
// registered for every operation that has a CUDA kernel. Allocation, views, and copies between host
// and device stay torch's CUDA code.
//
// What is kept of CUDA's semantics: an operation runs on the device of its tensors, which must be
// one; where its result's size depends on values it waits for the stream; results are new tensors
// of torch's CUDA allocator; random numbers follow the seed and the offset of the device's
// generator, so that a run repeats; in a captured stream it is run again by every replay. What is
// not: the CPU's arithmetic is not cuBLAS's or a CUDA kernel's, and temporaries are the host's.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <set>

// Tells the runtime, which checks the order of streams, what an operation reads and writes
// (runtime/launch.cpp).
struct softgpu_access {
  const void* address;
  size_t bytes;
  bool writes;
};
extern "C" void softgpu_operation(cudaStream_t, const char* name, const softgpu_access*, size_t);

namespace {

using Stack = torch::jit::Stack;
using c10::IValue;

// ---- a cuda tensor's memory as a CPU tensor

at::Tensor host(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  const auto options = t.options().device(at::kCPU);
  at::Tensor h = t.numel() == 0
                     ? at::empty_strided(t.sizes(), t.strides(), options)  // may be resized
                     : at::from_blob(t.data_ptr(), t.sizes(), t.strides(), options);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) {
    h.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  if (t.is_conj()) h._set_conj(true);
  if (t.is_neg()) h._set_neg(true);
  return h;
}

bool captured() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Numbers by the seed and the offset of the device's generator, which moves on.
at::Generator host_generator(at::Generator g) {
  const std::lock_guard<std::mutex> lock(g.mutex());
  auto* impl = g.unsafeGetGeneratorImpl();
  uint64_t seed = impl->current_seed();
  if (!captured()) {
    seed = seed * 0x9E3779B97F4A7C15u + impl->get_offset();
    impl->set_offset(impl->get_offset() + 4);
  }
  return at::make_generator<at::CPUGeneratorImpl>(seed);
}

IValue host(const IValue& value) {
  if (value.isTensor()) return host(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(host(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) {
      list.push_back(t ? std::optional<at::Tensor>(host(*t)) : std::nullopt);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(at::kCPU);
  if (value.isGenerator()) return host_generator(value.toGenerator());
  return value;
}

std::vector<at::Tensor> tensors_of(const IValue& value) {
  if (value.isTensor()) return {value.toTensor()};
  if (value.isTensorList()) return value.toTensorVector();
  std::vector<at::Tensor> result;
  if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) {
      if (t) result.push_back(*t);
    }
  }
  return result;
}

// ---- an operation

// Operations whose result's size depends on values, or is a value: the device is waited for.
const std::set<std::string> kWaiting = {"nonzero",
                                        "masked_select",
                                        "_unique2",
                                        "unique_dim",
                                        "unique_consecutive",
                                        "unique_dim_consecutive",
                                        "equal",
                                        "repeat_interleave.Tensor",
                                        "bincount",
                                        "histc",
                                        "unique_dim",
                                        "is_all_true",
                                        "_assert_async"};
// Operations that take indices on the CPU too.
const std::set<std::string> kMixing = {"index.Tensor", "_index_put_impl_",    "index.Tensor_out",
                                       "index_put_",   "masked_fill_.Tensor", "copy_"};

std::string name_of(const c10::OperatorHandle& op) {
  const auto& n = op.operator_name();
  return n.name.substr(6) + (n.overload_name.empty() ? "" : "." + n.overload_name);
}

// The device of the cuda tensors among the arguments, which must be the same for all.
int common_device(const std::string& name, at::ArrayRef<IValue> args) {
  int device = -1;
  bool other = false;
  for (const IValue& arg : args) {
    for (const at::Tensor& t : tensors_of(arg)) {
      if (!t.defined()) continue;
      other |= t.is_cpu() && t.dim() > 0;
      if (!t.is_cuda()) continue;
      TORCH_CHECK(device < 0 || device == t.get_device(), "softgpu: ", name,
                  ": tensors on cuda:", device, " and ", t.device());
      device = t.get_device();
    }
    if (arg.isDevice() && arg.toDevice().is_cuda()) {
      device = arg.toDevice().has_index() ? arg.toDevice().index() : c10::cuda::current_device();
    }
  }
  TORCH_CHECK(device < 0 || !other || kMixing.count(name), "softgpu: ", name,
              ": tensors on cuda and on cpu");
  return device < 0 ? c10::cuda::current_device() : device;
}

// The gradients of an rms_norm, for which the CPU has no kernel of one step.
Stack rms_norm_backward(const Stack& args) {
  const at::Tensor grad = args[0].toTensor(), x = args[1].toTensor(), rstd = args[3].toTensor();
  const auto gain = args[4].isNone() ? at::Tensor() : args[4].toTensor();
  const auto inner = static_cast<int64_t>(args[2].toIntVector().size()), outer = x.dim() - inner;
  std::vector<int64_t> rows, columns;
  for (int64_t d = 0; d < outer; ++d) rows.push_back(d);
  for (int64_t d = outer; d < x.dim(); ++d) columns.push_back(d);
  const at::Tensor g = grad.to(rstd.scalar_type()), normed = x.to(rstd.scalar_type()) * rstd;
  const at::Tensor scaled = gain.defined() ? g * gain.to(rstd.scalar_type()) : g;
  const at::Tensor along = (scaled * normed).mean(columns, true);
  const at::Tensor grad_x = (rstd * (scaled - normed * along)).to(x.scalar_type());
  if (!gain.defined()) return {grad_x, at::Tensor()};
  const at::Tensor terms = g * normed;
  return {grad_x, (rows.empty() ? terms : terms.sum(rows)).to(gain.scalar_type())};
}

// Runs the CPU kernel; arguments in, results out.
void call(const c10::OperatorHandle& op, const std::string& name, Stack& stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard plain(c10::autocast_dispatch_keyset);
  if (name == "mm.dtype" || name == "mm.dtype_out") {  // which the CPU has not
    const auto type = stack[2].toScalarType();
    const auto a = stack[0].toTensor().to(type), b = stack[1].toTensor().to(type);
    auto out = name == "mm.dtype" ? at::mm(a, b) : stack[3].toTensor();
    if (name == "mm.dtype_out") at::mm_out(out, a, b);
    stack = {out};
    return;
  }
  if (name == "_fused_rms_norm_backward") {  // nor this
    stack = rms_norm_backward(stack);
    return;
  }
  const bool counts = name == "histc" && !stack[0].toTensor().is_floating_point();
  const auto type = counts ? stack[0].toTensor().scalar_type() : at::kFloat;
  if (counts) stack[0] = stack[0].toTensor().to(at::kFloat);  // nor this of integers
  op.callBoxed(stack);
  if (counts) stack[0] = stack[0].toTensor().to(type);
}

// A result as a cuda tensor: an argument itself, or a copy of a new CPU tensor.
at::Tensor device_result(const at::Tensor& result, const Stack& args, const Stack& hosts,
                         int device) {
  if (!result.defined() || !result.is_cpu()) return result;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto here = tensors_of(hosts[i]), there = tensors_of(args[i]);
    for (size_t j = 0; j < here.size(); ++j) {
      if (here[j].is_same(result)) return there[j];
    }
  }
  auto out = at::empty_strided(result.sizes(), result.strides(),
                               result.options().device(at::kCUDA, static_cast<int8_t>(device)));
  host(out).copy_(result);
  if (result.unsafeGetTensorImpl()->is_wrapped_number()) {
    out.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return out;
}

bool writes(const c10::FunctionSchema& schema) {
  return std::any_of(schema.arguments().begin(), schema.arguments().end(),
                     [](const auto& a) { return a.alias_info() && a.alias_info()->isWrite(); });
}

size_t extent_bytes(const at::Tensor& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return static_cast<size_t>(last + 1) * t.itemsize();
}

// Arguments and results of an operation; either side's tensors have the same addresses.
void observe(const std::string& name, const c10::FunctionSchema& schema, const Stack& args,
             const std::vector<at::Tensor>& results) {
  std::vector<softgpu_access> accesses;
  const auto add = [&](const at::Tensor& t, bool writes) {
    if (t.defined() && t.has_storage()) {
      accesses.push_back({t.const_data_ptr(), extent_bytes(t), writes});
    }
  };
  for (size_t i = 0; i < args.size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    for (const at::Tensor& t : tensors_of(args[i])) add(t, alias && alias->isWrite());
  }
  for (const at::Tensor& t : results) add(t, true);
  softgpu_operation(c10::cuda::getCurrentCUDAStream(), name.c_str(), accesses.data(),
                    accesses.size());
}

// Keeps `again` for the graph that the current stream captures.
void record(std::function<void()> again) {
  auto* kept = new std::function<void()>(std::move(again));  // for as long as the process runs
  C10_CUDA_CHECK(cudaLaunchHostFunc(
      c10::cuda::getCurrentCUDAStream(),
      [](void* f) { (*static_cast<std::function<void()>*>(f))(); }, kept));
}

// A call of an op on tensors of the device, and what the CPU gets in their place.
struct HostCall {
  c10::OperatorHandle op;
  std::string name;
  Stack args, hosts;
  int device;

  HostCall(const c10::OperatorHandle& handle, const Stack& stack)
      : op(handle),
        name(name_of(handle)),
        args(stack.end() - static_cast<ptrdiff_t>(schema().arguments().size()), stack.end()),
        device(common_device(name, args)) {
    for (size_t i = 0; i < args.size(); ++i) {
      hosts.push_back(host(args[i]));
      const bool generator = schema().arguments()[i].type()->str().find("Generator") == 0;
      if (generator && args[i].isNone()) {
        hosts.back() = host_generator(at::globalContext().defaultGenerator(
            c10::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device))));
      }
    }
  }

  const c10::FunctionSchema& schema() const { return op.schema(); }
  bool writes_argument(size_t i) const {
    const auto* alias = schema().arguments()[i].alias_info();
    return alias && alias->isWrite();
  }

  // Sizes that depend on values: the host waits for these.
  bool waits() const {
    if (kWaiting.count(name) != 0) return true;
    if (name.find("index") != 0 && name.find("_index_put") != 0) return false;
    for (const at::Tensor& t : tensors_of(args[1])) {
      if (t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte)) {
        return true;
      }
    }
    return false;
  }

  // Results that are arguments, for which only the replays of a capture do the work.
  Stack record_writes() const {
    record([again = *this] {
      Stack stack = again.hosts;
      call(again.op, again.name, stack);
      observe(again.name, again.schema(), again.hosts, {});
    });
    Stack results;
    for (size_t i = 0; i < args.size(); ++i) {
      if (writes_argument(i) && results.size() < schema().returns().size()) {
        results.push_back(hosts[i]);
      }
    }
    return results;
  }

  // Each replay writes `made` anew.
  void record_results(const std::vector<at::Tensor>& made) const {
    std::vector<at::Tensor> outs;
    for (const at::Tensor& t : made) outs.push_back(host(t));
    record([again = *this, outs] {
      Stack stack = again.hosts;
      call(again.op, again.name, stack);
      size_t i = 0;
      for (const IValue& result : stack) {
        for (const at::Tensor& t : tensors_of(result)) {
          if (t.defined()) outs[i].copy_(t);
          ++i;
        }
      }
      observe(again.name, again.schema(), again.hosts, outs);
    });
  }

  // What was resized: to an argument's new size.
  void follow_sizes() const {
    for (size_t i = 0; i < args.size(); ++i) {
      if (!writes_argument(i)) continue;
      const auto here = tensors_of(hosts[i]), there = tensors_of(args[i]);
      for (size_t j = 0; j < here.size(); ++j) {
        if (!there[j].is_cuda() || here[j].sizes() == there[j].sizes()) continue;
        there[j].resize_(here[j].sizes());
        host(there[j]).copy_(here[j]);
      }
    }
  }

  // Puts the results on the device and onto the stack; returns their tensors.
  std::vector<at::Tensor> push(const Stack& results, Stack* stack) const {
    std::vector<at::Tensor> made;
    const auto to_device = [&](const at::Tensor& t) {
      made.push_back(device_result(t, args, hosts, device));
      return made.back();
    };
    for (const IValue& result : results) {
      if (result.isTensor()) {
        stack->push_back(to_device(result.toTensor()));
      } else if (result.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& t : result.toTensorVector()) list.push_back(to_device(t));
        stack->push_back(list);
      } else {
        stack->push_back(result);
      }
    }
    return made;
  }
};

void on_host(const c10::OperatorHandle& op, Stack* stack) {
  const HostCall call_here(op, *stack);
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(call_here.device));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (call_here.waits()) c10::cuda::stream_synchronize(stream);
  const bool capture = captured(), in_place = writes(op.schema());

  Stack results = call_here.hosts;
  if (capture && in_place) {
    results = call_here.record_writes();
  } else {
    call(op, call_here.name, results);
  }
  call_here.follow_sizes();
  stack->erase(stack->end() - static_cast<ptrdiff_t>(call_here.args.size()), stack->end());
  const std::vector<at::Tensor> made = call_here.push(results, stack);
  if (!capture) {
    observe(call_here.name, op.schema(), call_here.args, made);
  } else if (!in_place) {
    call_here.record_results(made);
  }
}

// On one device by the CPU, unless it is a plain copy of bytes; across devices, and from and to the
// host, by torch's CUDA code, which comes back here with a copy on the device where it needs one.
at::Tensor& copy(const c10::OperatorHandle& op, at::Tensor& self, const at::Tensor& src,
                 bool non_blocking) {
  const bool bytes = self.scalar_type() == src.scalar_type() && self.sizes() == src.sizes() &&
                     self.strides() == src.strides() && self.is_non_overlapping_and_dense() &&
                     self.is_conj() == src.is_conj() && self.is_neg() == src.is_neg();
  if (self.device() != src.device() || bytes) return at::native::copy_(self, src, non_blocking);
  Stack stack{self, src, non_blocking};
  on_host(op, &stack);
  return self;
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  if (name_of(op) != "copy_") return on_host(op, stack);
  auto self = stack->end()[-3].toTensor();
  copy(op, self, stack->end()[-2].toTensor(), stack->end()[-1].toBool());
  stack->resize(stack->size() - 3);
  stack->push_back(self);
}

// ---- which operations

const std::set<std::string> kNative = {"empty.memory_format",
                                       "empty_strided",
                                       "resize_",
                                       "_local_scalar_dense",
                                       "record_stream",
                                       "is_pinned",
                                       "_pin_memory",
                                       "is_set_to",
                                       "set_.source_Storage",
                                       "set_.source_Storage_storage_offset",
                                       "set_.source_Tensor",
                                       "set_",
                                       "_fused_sdp_choice",
                                       "_has_same_storage_numel"};

bool is_view(const c10::FunctionSchema& schema) {
  return std::any_of(schema.arguments().begin(), schema.arguments().end(),
                     [](const auto& a) { return a.alias_info() && !a.alias_info()->isWrite(); });
}

struct Quiet : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

struct Register {
  std::vector<c10::RegistrationHandleRAII> handles;
  Register() {
    Quiet quiet;  // torch warns of kernels that are replaced
    const c10::WarningUtils::WarningHandlerGuard guard(&quiet);
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const auto& name : dispatcher.getAllOpNames()) {
      if (name.name.rfind("aten::", 0) != 0) continue;
      const auto op = dispatcher.findOp(name);
      if (!op || !op->hasSchema()) continue;
      const bool copy = name_of(*op) == "copy_";
      if (!copy && !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
      if (kNative.count(name_of(*op)) || is_view(op->schema())) continue;
      handles.push_back(dispatcher.registerImpl(
          name, c10::DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&fallback>(),
          std::nullopt, nullptr, "softgpu"));
    }
  }
};
Register* const registered = new Register;

}  // namespace
