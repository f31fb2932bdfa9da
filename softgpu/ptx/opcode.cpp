// SPDX-License-Identifier: Apache-2.0
// The table of opcodes.
#include "ptx/opcode.h"

#include <algorithm>
#include <sstream>

namespace ptx {

Opcode::Opcode(const std::string& text) {
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, '.');) parts_.push_back(part);
  asked_.assign(parts_.size(), false);
  asked_[0] = true;
}

bool Opcode::has(std::string_view part) const {
  bool found = false;
  for (size_t i = 1; i < parts_.size(); ++i)
    if (parts_[i] == part) found = asked_[i] = true;
  return found;
}

std::string_view Opcode::one_of(std::initializer_list<std::string_view> parts) const {
  std::string_view found;
  for (const std::string_view p : parts)
    if (has(p)) found = p;
  return found;
}

std::string_view Opcode::type(size_t from_end) const {
  if (from_end + 1 >= parts_.size()) return "";
  const size_t i = parts_.size() - 1 - from_end;
  asked_[i] = true;
  return parts_[i];
}

std::string Opcode::unknown() const {
  const auto i = std::find(asked_.begin(), asked_.end(), false);
  return i == asked_.end() ? "" : parts_[size_t(i - asked_.begin())];
}

const std::vector<Entry>& table() {
  using enum Class;
  static const std::vector<Entry> all = {
      {"abs", arithmetic, integer},
      {"activemask", collective, exchange},
      {"add", arithmetic, integer},
      {"addc", carry_arithmetic, integer},
      {"and", bits, integer},
      {"atom", atomics, atomic},
      {"bar", barriers, Class::barrier},
      {"barrier", barriers, Class::barrier},
      {"bfe", bits, integer},
      {"bfi", bits, integer},
      {"bfind", bits, integer},
      {"bmsk", bits, integer},
      {"bra", control, branch},
      {"brev", bits, integer},
      {"brkpt", control, other},
      {"brx", control, branch},
      {"call", control, branch},
      {"clz", bits, integer},
      {"cnot", bits, integer},
      {"copysign", arithmetic, float32},
      {"cos", special_function, special},
      {"cp", async_copy, copy_async},
      {"createpolicy", address, other},
      {"cvt", ptx::conversion, Class::conversion},
      {"cvta", address, integer},
      {"div", arithmetic, integer},
      {"dp2a", integer_arithmetic, integer},
      {"dp4a", integer_arithmetic, integer},
      {"elect", collective, exchange},
      {"ex2", special_function, special},
      {"exit", control, branch},
      {"fence", barriers, Class::barrier},
      {"fma", arithmetic, float32},
      {"fns", bits, integer},
      {"griddepcontrol", control, other},
      {"isspacep", address, integer},
      {"ld", memory, load_global},
      {"ldmatrix", tensor_core, load_shared},
      {"ldu", memory, load_global},
      {"lg2", special_function, special},
      {"lop3", bits, integer},
      {"mad", arithmetic, integer},
      {"mad24", integer_arithmetic, integer},
      {"madc", carry_arithmetic, integer},
      {"match", collective, exchange},
      {"max", arithmetic, integer},
      {"membar", barriers, Class::barrier},
      {"min", arithmetic, integer},
      {"mma", tensor_core, tensor},
      {"mov", ptx::move, Class::move},
      {"movmatrix", tensor_core, exchange},
      {"mul", arithmetic, integer},
      {"mul24", integer_arithmetic, integer},
      {"nanosleep", control, other},
      {"neg", arithmetic, integer},
      {"not", bits, integer},
      {"or", bits, integer},
      {"pmevent", control, other},
      {"popc", bits, integer},
      {"prefetch", address, other},
      {"prefetchu", address, other},
      {"prmt", bits, integer},
      {"rcp", special_function, special},
      {"red", atomics, atomic},
      {"redux", collective, exchange},
      {"rem", integer_arithmetic, integer},
      {"ret", control, branch},
      {"rsqrt", special_function, special},
      {"sad", integer_arithmetic, integer},
      {"selp", comparison, compare},
      {"set", comparison, compare},
      {"setp", comparison, compare},
      {"shf", bits, integer},
      {"shfl", collective, exchange},
      {"shl", bits, integer},
      {"shr", bits, integer},
      {"sin", special_function, special},
      {"slct", comparison, compare},
      {"sqrt", special_function, special},
      {"st", memory, store_global},
      {"stmatrix", tensor_core, store_shared},
      {"sub", arithmetic, integer},
      {"subc", carry_arithmetic, integer},
      {"szext", bits, integer},
      {"tanh", special_function, special},
      {"testp", comparison, compare},
      {"trap", control, other},
      {"vote", collective, exchange},
      {"xor", bits, integer},
  };
  return all;
}

namespace {

// The class by the type where a name alone does not say it.
Class class_of(Class kind, const std::string& opcode, const Instruction& i) {
  const std::string type = opcode.substr(opcode.rfind('.') + 1);
  if (kind == Class::integer || kind == Class::float32) {
    if (type == "f32") return Class::float32;
    if (type == "f64") return Class::float64;
    if (type.starts_with("f16") || type.starts_with("bf16")) return Class::half;
  }
  if (kind == Class::load_global) {
    if (i.space == Space::shared) return Class::load_shared;
    if (i.space == Space::local) return Class::load_local;
    if (i.space == Space::param) return Class::load_param;
  }
  if (kind == Class::store_global) {
    if (i.space == Space::shared) return Class::store_shared;
    if (i.space == Space::local) return Class::store_local;
  }
  return kind;
}

}  // namespace

void select(const std::string& text, Instruction& i) {
  const Opcode opcode(text);
  const auto entry = std::find_if(table().begin(), table().end(),
                                  [&](const Entry& e) { return e.name == opcode.name(); });
  if (entry != table().end()) i.run = entry->family(opcode, i);
  if (!i.run) throw Error("unknown opcode " + text);
  if (const std::string part = opcode.unknown(); !part.empty())
    throw Error("unknown opcode " + text + " (." + part + ")");
  i.kind = class_of(entry->kind, text, i);
}

}  // namespace ptx
