// SPDX-License-Identifier: Apache-2.0
// Blocks and launches.
#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <sstream>

#include "ptx/warp.h"

namespace ptx {

void (*on_access)(const char*, size_t, bool) = nullptr;

void finish_reduction(Warp& w, const Barrier& b);  // control.cpp

namespace {

// --- options

uint64_t number_after(const std::string& value, char mark) {
  const size_t at = value.find(mark);
  return at == std::string::npos ? 0 : strtoull(value.c_str() + at + 1, nullptr, 0);
}

void set_option(Options& o, const std::string& name, const std::string& value) {
  const std::string kind = value.substr(0, value.find(':'));
  const bool random = kind == "random";
  if (random) o.seed = number_after(value, ':');
  if (name == "check" || name == "profile") {
    (name == "check" ? o.check : o.profile) = value != "0";
  } else if (name == "order" && (random || kind == "forward" || kind == "reverse")) {
    o.order = random ? Order::random : kind == "reverse" ? Order::reverse : Order::forward;
  } else if (name == "async" && (random || kind == "late" || kind == "early")) {
    o.async = random ? Async::random : kind == "early" ? Async::early : Async::late;
  } else if (name == "sms") {
    o.sms = std::max(1u, unsigned(strtoul(value.c_str(), nullptr, 0)));
  } else {
    throw Error("unknown option " + name + "=" + value);
  }
}

Options read_environment() {
  std::string settings;
  for (const char* name : {"CHECK", "ORDER", "ASYNC", "SMS", "PROFILE"}) {
    const char* value = getenv((std::string("SOFTGPU_") + name).c_str());
    if (!value || !*value) continue;
    std::string lower = name;
    for (char& c : lower) c = char(tolower(c));
    settings += lower + "=" + (lower == "profile" ? "1" : value) + " ";
  }
  return Options::parse(settings);
}

// --- faults of this thread become Errors

[[noreturn]] void at_fault(int, siginfo_t* info, void*) {
  std::ostringstream s;
  s << "invalid address " << info->si_addr;
  throw Error(s.str());
}

struct Faults {
  struct sigaction old[2];
  Faults() {
    struct sigaction a{};
    a.sa_sigaction = at_fault;
    a.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &a, &old[0]);
    sigaction(SIGBUS, &a, &old[1]);
  }
  ~Faults() {
    sigaction(SIGSEGV, &old[0], nullptr);
    sigaction(SIGBUS, &old[1], nullptr);
  }
};

// --- the order of blocks and warps

std::vector<unsigned> ordered(unsigned count, Order order, std::mt19937_64& random) {
  std::vector<unsigned> all(count);
  std::iota(all.begin(), all.end(), 0u);
  if (order == Order::reverse) std::reverse(all.begin(), all.end());
  if (order == Order::random) {
    for (unsigned n = count; n > 1; --n) std::swap(all[n - 1], all[random() % n]);
  }
  return all;
}

// Instructions that a warp may run before others have a turn: enough to run to the next barrier,
// unless warps wait for each other by memory.
uint64_t turn_of(Block& b) {
  return b.options->order == Order::random ? 1 + b.random() % 64 : uint64_t(1) << 20;
}

// --- barriers

void release(std::vector<Warp>& warps, int number) {
  Block& b = *warps[0].block;
  Barrier& barrier = b.barriers[size_t(number)];
  if (b.checker) b.checker->complete(number);
  for (Warp& w : warps) {
    if (!w.live || w.barrier != number) continue;
    w.barrier = -1;
    if (w.reduction) finish_reduction(w, barrier);
    if (b.checker) b.checker->depart(w.number, number);
  }
  barrier = {};
}

[[noreturn]] void stuck(const std::vector<Warp>& warps) {
  std::string who;
  for (const Warp& w : warps) {
    who += "; warp " + std::to_string(w.number);
    if (w.live) {
      const Instruction& i = w.kernel->code[size_t(std::max(0, w.pc - 1))];
      who += " at PTX line " + std::to_string(i.line);
    } else {
      who += " has returned";
    }
  }
  throw Error("barrier that not all threads reach" + who);
}

void run_block(std::vector<Warp>& warps, const Warp*& running) {
  Block& b = *warps[0].block;
  for (;;) {
    bool all_ended = true, progress = false;
    for (const unsigned n : ordered(unsigned(warps.size()), b.options->order, b.random)) {
      Warp& w = warps[n];
      if (w.live && w.barrier < 0) {
        running = &w;
        w.run(turn_of(b));
        progress = true;
      }
      all_ended &= !w.live;
    }
    running = nullptr;
    for (int number = 0; number < int(b.barriers.size()); ++number) {
      const Barrier& barrier = b.barriers[size_t(number)];
      if (!barrier.arrived || barrier.arrived != barrier.expected) continue;
      release(warps, number);
      progress = true;
    }
    if (all_ended) return;
    if (!progress) stuck(warps);
  }
}

// --- a launch

uint32_t lanes_before(unsigned l) { return (1u << l) - 1; }

uint64_t special_value(Special s, const Block& b, const Warp& w, unsigned l, Dim grid, Dim block,
                       const Kernel& k) {
  const unsigned thread = unsigned(w.number) * kLanes + l, n = b.number;
  switch (s) {
    case Special::tid_x:
      return thread % block.x;
    case Special::tid_y:
      return thread / block.x % block.y;
    case Special::tid_z:
      return thread / block.x / block.y;
    case Special::ntid_x:
      return block.x;
    case Special::ntid_y:
      return block.y;
    case Special::ntid_z:
      return block.z;
    case Special::ctaid_x:
      return n % grid.x;
    case Special::ctaid_y:
      return n / grid.x % grid.y;
    case Special::ctaid_z:
      return n / grid.x / grid.y;
    case Special::nctaid_x:
      return grid.x;
    case Special::nctaid_y:
      return grid.y;
    case Special::nctaid_z:
      return grid.z;
    case Special::laneid:
      return l;
    case Special::warpid:
      return unsigned(w.number);
    case Special::nwarpid:
      return b.warps;
    case Special::smid:
      return n % b.options->sms;
    case Special::nsmid:
      return b.options->sms;
    case Special::gridid:
      return k.launches;
    case Special::lanemask_eq:
      return 1u << l;
    case Special::lanemask_lt:
      return lanes_before(l);
    case Special::lanemask_le:
      return lanes_before(l) | 1u << l;
    case Special::lanemask_gt:
      return ~(lanes_before(l) | 1u << l);
    case Special::lanemask_ge:
      return ~lanes_before(l);
    case Special::dynamic_smem_size:
      return b.shared_size - k.static_shared;
    case Special::total_smem_size:
      return b.shared_size;
    case Special::one:
      return 1;
    default:
      return 0;
  }
}

void set_specials(Warp& w, Dim grid, Dim block) {
  for (const auto& [s, o] : w.kernel->specials) {
    for (unsigned l = 0; l < kLanes; ++l) {
      const uint64_t value = special_value(s, *w.block, w, l, grid, block, *w.kernel);
      memcpy(w.file + o.at + o.size * l, &value, o.size);
    }
  }
}

template <class T>
T* aligned(T* p, uintptr_t unit) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + unit - 1) & ~(unit - 1));
}

void prepare(Block& b, Kernel& k, size_t dynamic_shared) {
  const size_t a = k.dynamic_align, dynamic_at = (k.static_shared + a - 1) / a * a;
  for (const Operand& o : k.dynamic_shared)
    for (int l = 0; l < kLanes; ++l)
      memcpy(&k.file[o.at + size_t(l * o.size)], &dynamic_at, o.size);
  b.shared_size = dynamic_at + dynamic_shared;
  b.shared.resize(b.shared_size + 1024);
  b.shared_base = aligned(b.shared.data(), 1024);
  b.random.seed(b.options->seed);
}

std::vector<Warp> warps_of(Block& b, Kernel& k) {
  std::vector<Warp> warps(b.warps);
  for (unsigned n = 0; n < b.warps; ++n) {
    Warp& w = warps[n];
    w.kernel = &k;
    w.block = &b;
    w.number = int(n);
    w.storage.resize(k.file.size() + 64);
    w.file = aligned(w.storage.data(), 64);
    w.local.resize(k.local * kLanes);
  }
  return warps;
}

void start_block(std::vector<Warp>& warps, Dim grid, Dim block) {
  Block& b = *warps[0].block;
  const unsigned threads = block.count();
  if (b.checker) b.checker->new_block(b.shared_base, b.shared_size, b.warps);
  memset(b.shared.data(), 0xff, b.shared.size());
  b.barriers.fill({});
  for (Warp& w : warps) {
    const Kernel& k = *w.kernel;
    memcpy(w.file, k.file.data(), k.file.size());
    std::fill(w.local.begin(), w.local.end(), 0xff);
    set_specials(w, grid, block);
    const unsigned lanes = std::min<unsigned>(kLanes, threads - unsigned(w.number) * kLanes);
    w.start(lanes == kLanes ? ~0u : lanes_before(lanes));
  }
}

std::string where(const Warp& w) {
  const Instruction& i = w.kernel->code[size_t(w.pc)];
  std::ostringstream s;
  s << " [warp " << w.number << ", lanes " << std::hex << w.mask << std::dec << ", PTX line "
    << i.line;
  if (i.source >= 0) s << ", " << w.kernel->sources[size_t(i.source)];
  s << "]";
  return s.str();
}

}  // namespace

Options Options::parse(const std::string& settings) {
  Options o;
  std::istringstream in(settings);
  for (std::string word; in >> word;) {
    const size_t equals = word.find('=');
    if (equals == std::string::npos) throw Error("unknown option " + word);
    set_option(o, word.substr(0, equals), word.substr(equals + 1));
  }
  return o;
}

const Options& Options::of_environment() {
  static const Options o = read_environment();
  return o;
}

Options& Options::current() {
  static Options o = of_environment();
  return o;
}

std::string last_error;

void launch(Kernel& k, Dim grid, Dim block, size_t dynamic_shared, const std::vector<char>& params,
            const Options& options) {
  const Faults faults;
  const unsigned threads = block.count();
  if (k.max_threads && threads > k.max_threads) throw Error(k.name + ": too many threads");
  if (params.size() > k.param_bytes.size()) throw Error(k.name + ": too many bytes of parameters");
  std::copy(params.begin(), params.end(), k.param_bytes.begin());
  Block b;
  b.options = &options;
  b.warps = (threads + kLanes - 1) / kLanes;
  Checker checker;
  if (options.check) b.checker = &checker;
  if (options.profile) b.profile = &k.profile;
  prepare(b, k, dynamic_shared);
  std::vector<Warp> warps = warps_of(b, k);
  ++k.launches;
  k.profile.launches += options.profile;
  for (const unsigned n : ordered(grid.count(), options.order, b.random)) {
    b.number = n;
    start_block(warps, grid, block);
    if (options.profile) ++k.profile.blocks, k.profile.warps += b.warps;
    const Warp* running = nullptr;
    try {
      run_block(warps, running);
    } catch (const Error& e) {
      std::ostringstream s;
      s << k.name << ": block " << n % grid.x << "," << n / grid.x % grid.y;
      if (grid.z > 1) s << "," << n / grid.x / grid.y;
      s << ": " << e.what() << (running ? where(*running) : "");
      last_error = s.str();
      throw Error(last_error);
    }
    for (const Warp& w : warps) b.clock += w.steps;
  }
}

}  // namespace ptx
