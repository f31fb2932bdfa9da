// SPDX-License-Identifier: Apache-2.0
// Instructions, and a warp at work on them.
#pragma once
#include <array>
#include <random>

#include "ptx/ptx.h"

namespace ptx {

constexpr int kLanes = 32;
using Mask = uint32_t;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&);

enum class Space : uint8_t { generic, global, shared, local, param };

// What the profile counts an instruction as.
enum class Class : uint8_t {
  integer,
  float32,
  float64,
  half,
  tensor,
  special,
  conversion,
  compare,
  move,
  load_global,
  load_shared,
  load_local,
  load_param,
  store_global,
  store_shared,
  store_local,
  atomic,
  copy_async,
  exchange,
  barrier,
  branch,
  other,
  count
};

// A register: where its lanes are in the warp's file, and the bytes of one lane (0: a predicate,
// which is a mask of all lanes). An immediate is a register that nobody writes.
struct Operand {
  uint32_t at = 0;
  uint8_t size = 0;
  bool negated = false;  // !%p
};

enum Members : int { kNobody = -1, kAllLive = -2 };

struct Instruction {
  Handler run = nullptr;
  bool guarded = false;
  Operand guard;
  int members = kNobody;  // operand with the mask of lanes that must arrive together
  uint8_t outputs = 1;    // of `o`, the leading operands that are written
  Space space = Space::generic;
  bool nc = false;      // a load by the read-only path
  bool strong = false;  // a load or store that may race: volatile, relaxed, acquire, release
  int count = 1;        // elements of a vector; otherwise the handler's own
  int target = -1;      // of a branch
  int64_t offset = 0;   // of an address
  int64_t offset2 = 0;  // of a second one
  std::vector<Operand> o;
  Handler inner = nullptr;  // what with_modes() runs
  uint32_t mode = 0;        // of rounding, as the handler knows it
  bool flush = false, saturate = false;
  int line = 0;     // in the PTX
  int source = -1;  // the .loc before it
  Class kind = Class::other;
  uint32_t flops = 0;  // of a tensor core, per warp
  mutable bool ran = false;
};

// Special registers: constant while a block runs, or (clock) read by the instruction.
enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  smid,
  nsmid,
  gridid,
  lanemask_eq,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
  dynamic_smem_size,
  total_smem_size,
  zero,
  one,
  clock,
  clock_hi,
  clock64,
};

struct Counts {
  uint64_t requests = 0, parts = 0, ideal = 0, bytes = 0;  // parts: sectors or wavefronts
};

// What SOFTGPU_PROFILE counts of a kernel.
struct Profile {
  uint64_t launches = 0, blocks = 0, warps = 0, issued = 0, lanes = 0, flops = 0;
  std::array<uint64_t, size_t(Class::count)> classes{};
  Counts global_load, global_store, global_atomic, shared_load, shared_store, shared_atomic;
};

struct Kernel {
  std::string name, architecture;    // "sm_90a"
  std::vector<Instruction> code;     // the last one ends a body that does not end by itself
  std::vector<std::string> texts;    // of the instructions as they stand in the PTX
  std::vector<std::string> sources;  // "file.cu:12"
  std::vector<std::pair<size_t, size_t>> params;  // offset, size
  std::vector<char> param_bytes;                  // of the launch; where ld.param looks
  std::vector<unsigned char> file;                // registers as a warp starts
  std::vector<std::pair<Special, Operand>> specials;
  size_t static_shared = 0, dynamic_align = 16, local = 0;
  unsigned max_threads = 0;
  std::vector<Operand> dynamic_shared;  // constants: where dynamic shared memory starts
  uint64_t launches = 0;
  Profile profile;
};

// Finds the handler of an opcode such as "add.s32" and what it needs. Throws Error.
void select(const std::string& opcode, Instruction& i);

// --- a warp at work

struct Copy {  // cp.async, not landed
  uint32_t to;
  const char* from;
  uint32_t bytes, read;
};

struct Access {
  bool writes = false, reads = false, strong = false, nc = false;
};
constexpr Access kRead{.reads = true}, kWrite{.writes = true},
    kAtomic{.writes = true, .reads = true, .strong = true};

// Of one launch: what no barrier orders. Throws Error.
class Checker {
 public:
  Checker();
  ~Checker();
  void new_block(const char* shared, size_t size, unsigned warps);
  void access(const Warp& w, int lane, const char* p, size_t bytes, Access kind);
  void warp_barrier(const Warp& w, Mask members);
  void arrive(int warp, int barrier);  // at a barrier of the block
  void depart(int warp, int barrier);  // from it, when all have arrived
  void complete(int barrier);

 private:
  struct State;
  std::unique_ptr<State> state;
};

struct Barrier {
  unsigned arrived = 0, expected = 0;  // threads
  bool used = false;
  unsigned count = 0;  // of bar.red: threads, and those whose predicate holds
  unsigned holds = 0;
};

struct Block {
  unsigned number = 0;
  const Options* options = nullptr;
  Checker* checker = nullptr;
  Profile* profile = nullptr;
  std::vector<char> shared;  // static, then dynamic
  char* shared_base = nullptr;
  size_t shared_size = 0;
  unsigned warps = 0;
  std::array<Barrier, 16> barriers{};
  uint64_t clock = 0;
  std::mt19937_64 random;
};

struct Warp {
  struct Group {
    int pc;
    Mask mask;
    bool parked;
  };
  Kernel* kernel;
  Block* block;
  unsigned char* file;  // registers
  std::vector<unsigned char> storage, local;
  int number = 0;
  int pc = 0;
  bool jumped = false;
  Mask group = 0;  // lanes at pc
  Mask mask = 0;   // those whose guard holds: what a handler works on
  Mask live = 0;   // not exited
  Mask whole = 0;  // that the block started with
  Mask carry = 0;  // the condition code
  int limit = 0;   // the next pc at which another group is, or must run
  std::vector<Group> others;
  int barrier = -1;                        // it waits at
  const Instruction* reduction = nullptr;  // a bar.red that waits
  std::vector<std::vector<Copy>> copies{kLanes};
  std::vector<std::vector<size_t>> groups{kLanes};  // ends of the committed groups in copies
  uint64_t steps = 0;
  uint64_t pause = 0;        // the step at which others have a turn
  uint64_t alone_until = 0;  // the step until which the group runs though another is behind

  void start(Mask lanes);
  void run(uint64_t turn);  // until a barrier, the end, or `turn` instructions
  void branch(int to, Mask taken);
  void leave(Mask lanes);

  template <class T>
  T* at(const Operand& o) {
    return reinterpret_cast<T*>(file + o.at);
  }
  Mask predicate(const Operand& o) {
    const Mask m = *at<Mask>(o);
    return o.negated ? ~m : m;
  }
  void set_predicate(const Operand& o, Mask value) {
    Mask* d = at<Mask>(o);
    *d = (*d & ~mask) | (value & mask);
  }
  uint64_t lane_value(const Operand& o, int lane) {
    if (o.size == 4) return at<uint32_t>(o)[lane];
    if (o.size == 8) return at<uint64_t>(o)[lane];
    return o.size == 2 ? at<uint16_t>(o)[lane] : at<uint8_t>(o)[lane];
  }
  char* shared(uint32_t offset, size_t bytes) {
    if (offset + bytes > block->shared_size) outside(offset, bytes);
    return block->shared_base + offset;
  }
  bool is_shared(const char* p) const {
    return p >= block->shared_base && p < block->shared_base + block->shared_size;
  }
  const char* local_of(int lane) const {
    return reinterpret_cast<const char*>(local.data()) + size_t(lane) * kernel->local;
  }
  [[noreturn]] void outside(uint32_t offset, size_t bytes) const;
  void touch(int lane, const char* p, size_t bytes, Access kind) {
    if (block->checker) block->checker->access(*this, lane, p, bytes, kind);
    if (on_access) on_access(p, bytes, kind.writes);
  }

 private:
  template <bool kProfile>
  void work();
  bool gather(const Instruction& i);
  void look_around();
  void reschedule(bool park);
  void give_way();
};

// The addresses of one request of a warp, for the profile.
void count_request(Warp& w, const Instruction& i, Mask lanes, char* const* p, size_t bytes,
                   Access kind);

}  // namespace ptx
