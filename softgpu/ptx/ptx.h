// SPDX-License-Identifier: Apache-2.0
// Executes PTX on the CPU, 32 lanes at a time.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
using Mask = uint32_t;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&);

enum class Space : uint8_t { generic, global, shared, local, param };

// A register: where its lanes are in the warp's file, and the bytes of one lane (0: a predicate,
// which is a mask of all lanes). An immediate is a register that nobody writes.
struct Operand {
  uint32_t at = 0;
  uint8_t size = 0;
  bool negated = false;  // !%p
};

struct Instruction {
  Handler run = nullptr;
  bool guarded = false;
  Operand guard;
  int members = -1;     // operand with the lanes that must arrive together; -2: all that are left
  uint8_t outputs = 1;  // of `o`, the leading operands that are written
  bool nc = false;      // a load by the read-only path
  Space space = Space::generic;
  int count = 1;       // elements of a vector
  int target = -1;     // of a branch
  int64_t offset = 0;  // of an address
  std::vector<Operand> o;
  int line = 0;     // in the PTX
  int source = -1;  // the .loc before it
  mutable bool ran = false;
};

struct Kernel {
  std::string name, architecture;    // "sm_90a"
  std::vector<Instruction> code;     // the last one ends a body that does not end by itself
  std::vector<std::string> texts;    // of the instructions as they stand in the PTX
  std::vector<std::string> sources;  // "file.cu:12"
  std::vector<std::pair<size_t, size_t>> params;  // offset, size
  std::vector<char> param_bytes;                  // of the launch; where ld.param looks
  std::vector<unsigned char> file;                // registers as a warp starts
  std::map<std::string, uint32_t> specials;       // "%tid.x": its place in the file
  size_t static_shared = 0, dynamic_align = 16, local = 0;
  unsigned max_threads = 0;
  std::vector<Operand> dynamic_shared;  // constants: where dynamic shared memory starts
  struct {
    uint64_t launches = 0, steps = 0, lane_steps = 0;  // instructions of warps, and of lanes
    double seconds = 0;
  } work;
};

// The kernels of a PTX text. A kernel with something unknown throws when it is asked for.
class Module {
 public:
  explicit Module(std::string text);
  std::vector<std::string> names() const;
  Kernel& kernel(const std::string& name);
  const Kernel* parsed(const std::string& name) const { return entries_.at(name).kernel.get(); }
  // Offsets and sizes of the parameters, without reading the body.
  std::vector<std::pair<size_t, size_t>> params(const std::string& name) const;

 private:
  struct Entry {
    size_t begin, end;
    int line;
    std::shared_ptr<Kernel> kernel;
  };
  std::string text_, architecture_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> files_;
};

// The instruction of an opcode such as "add.s32"; sets run and what it needs. Throws Error.
void select(const std::string& opcode, Instruction& i);

struct Options {
  bool check = false;    // SOFTGPU_CHECK: races, unwritten shared memory, .nc of written memory
  bool reverse = false;  // SOFTGPU_ORDER=reverse: blocks, and warps between barriers, backwards
  bool early = false;    // SOFTGPU_ASYNC=early: cp.async lands when issued, not when waited for
};
extern Options options;

// With SOFTGPU_COVERAGE=FILE the process appends, at its end, a line per kernel that was launched:
// softgpu/python/softgpu/coverage.py describes it.
void keep_for_coverage(const std::shared_ptr<const Kernel>& kernel);
std::string coverage_line(const Kernel& kernel);

// Runs all blocks, one after another. Throws Error, with kernel, block, lanes and line.
void launch(Kernel& kernel, Dim grid, Dim block, size_t dynamic_shared);

// --- a warp at work

struct Copy {  // cp.async, not landed
  uint32_t to;
  const char* from;
  uint32_t bytes, read;
};

struct Warp;
enum class Access { read, nc, write, atomic };

// Of one launch. Throws Error.
class Checker {
 public:
  Checker();
  ~Checker();
  void new_block(const char* shared, size_t size);
  void access(const Warp& w, int lane, const char* p, size_t bytes, Access kind);

 private:
  struct State;
  std::unique_ptr<State> state;
};

struct Block {
  unsigned number = 0, epoch = 0;  // barriers so far
  Checker* checker = nullptr;
  std::vector<char> shared;  // static, then dynamic
  char* shared_base = nullptr;
  size_t shared_size = 0;
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
  unsigned epoch = 0;  // bar.warp.sync so far
  int pc = 0;
  bool jumped = false;
  Mask group = 0;  // lanes at pc
  Mask mask = 0;   // those whose guard holds: what a handler works on
  Mask live = 0;   // not exited
  int limit = 0;   // the next pc at which another group is, or must run
  std::vector<Group> others;
  int barrier = -1;  // it waits at
  unsigned expected = 0;
  std::vector<std::vector<Copy>> copies{kLanes};
  std::vector<std::vector<size_t>> groups{kLanes};  // ends of the committed groups in copies
  uint64_t steps = 0, lane_steps = 0;

  void start(Mask lanes);
  void run();  // until a barrier, or the end
  void branch(int to, Mask taken);
  void leave(Mask lanes);
  void look_around();
  void reschedule(bool park);

  template <class T>
  T* at(const Operand& o) {
    return reinterpret_cast<T*>(file + o.at);
  }
  Mask predicate(const Operand& o) {
    const Mask m = *at<Mask>(o);
    return o.negated ? ~m : m;
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
  [[noreturn]] void outside(uint32_t offset, size_t bytes) const;
  void touch(int lane, const char* p, size_t bytes, Access kind) {
    if (block->checker) block->checker->access(*this, lane, p, bytes, kind);
  }
};

}  // namespace ptx
