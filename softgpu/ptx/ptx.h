// SPDX-License-Identifier: Apache-2.0
// Executes PTX on the CPU, 32 lanes at a time: what the runtime and Python need of it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Kernel;

// A .global or .const variable of a module.
struct Storage {
  char* data;
  size_t size;
};

// The kernels of a PTX text. A kernel with something unknown throws when it is asked for.
class Module {
 public:
  explicit Module(std::string text);
  ~Module();
  std::vector<std::string> names() const;
  Kernel& kernel(const std::string& name);
  // Offsets and sizes of the parameters, without reading the body.
  std::vector<std::pair<size_t, size_t>> params(const std::string& name) const;
  // Null if there is none of this name.
  const Storage* variable(const std::string& name) const;
  struct Source;

 private:
  std::unique_ptr<Source> source_;
  std::map<std::string, std::shared_ptr<Kernel>> kernels_;
};

// From now on the kernels of this module stand in for those of other modules that have their names,
// as c++filt shows them: those of anonymous namespaces differ from one compilation to the next.
// They are in no report. Null: no longer.
void set_override(std::unique_ptr<Module> module);

enum class Order : uint8_t { forward, reverse, random };
enum class Async : uint8_t { late, early, random };

// How launches run; every order is one that a GPU may choose.
struct Options {
  bool check = false;    // SOFTGPU_CHECK: races, unwritten shared memory, .nc of written memory
  bool profile = false;  // SOFTGPU_PROFILE: count what is executed
  Order order{};         // SOFTGPU_ORDER=reverse|random[:SEED]: of blocks, and of warps
  Async async{};         // SOFTGPU_ASYNC=early|random: when cp.async lands
  uint64_t seed = 0;     // of the random ones
  unsigned sms = 132;    // SOFTGPU_SMS: what %nsmid says
  // With `check`: the global memory that may be touched; all if empty.
  std::vector<std::pair<const char*, size_t>> only;
  // From "check=1 order=random:3 async=early profile=1". Throws Error.
  static Options parse(const std::string& settings);
  static const Options& of_environment();
  // Those of launches that are given none: the environment's, until something else is set.
  static Options& current();
};

// Where set, called for every access of a lane to shared and global memory.
extern void (*on_access)(const char* p, size_t bytes, bool writes);

// Runs all blocks, one after another, with the bytes of the parameters. Throws Error, with kernel,
// block, lanes and line.
void launch(Kernel& kernel, Dim grid, Dim block, size_t dynamic_shared,
            const std::vector<char>& params, const Options& options = Options::current());

// What the last launch that failed said.
extern std::string last_error;

// Lines of JSON: softgpu/python/softgpu/coverage.py and profile.py describe them.
std::string coverage_line(const Kernel& kernel);
std::string profile_line(const Kernel& kernel);
// With SOFTGPU_COVERAGE=FILE or SOFTGPU_PROFILE=FILE the process appends these lines, when it ends,
// for each kernel that was kept.
void keep_for_reports(const std::shared_ptr<const Kernel>& kernel);

}  // namespace ptx
