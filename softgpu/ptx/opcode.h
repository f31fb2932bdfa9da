// SPDX-License-Identifier: Apache-2.0
// An opcode in parts, and the families of opcodes.
#pragma once
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "ptx/warp.h"

namespace ptx {

// "add.rn.f32". A part that no family asked for makes select() refuse the opcode: a modifier that
// is not understood must not be ignored.
class Opcode {
 public:
  explicit Opcode(const std::string& text);
  const std::string& name() const { return parts_[0]; }
  bool has(std::string_view part) const;
  // The part that is there, or "".
  std::string_view one_of(std::initializer_list<std::string_view> parts) const;
  // Accepts modifiers that change nothing here.
  void allow(std::initializer_list<std::string_view> parts) const { one_of(parts); }
  std::string_view type(size_t from_end = 0) const;  // the last part, or one before
  // The first part that nobody asked for, or "".
  std::string unknown() const;

 private:
  std::vector<std::string> parts_;
  mutable std::vector<bool> asked_;
};

// A family: the handler of an opcode, or null.
using Family = Handler (*)(const Opcode&, Instruction&);

// Names of opcodes, each with its family and the class of the profile.
struct Entry {
  const char* name;
  Family family;
  Class kind;
};
const std::vector<Entry>& table();

Handler integer_arithmetic(const Opcode&, Instruction&);  // integer.cpp
Handler carry_arithmetic(const Opcode&, Instruction&);
Handler arithmetic(const Opcode&, Instruction&);  // float.cpp: of any type
Handler special_function(const Opcode&, Instruction&);
Handler half_arithmetic(const Opcode&, Instruction&);  // half.cpp
Handler bits(const Opcode&, Instruction&);             // bits.cpp
Handler move(const Opcode&, Instruction&);             // move.cpp
Handler comparison(const Opcode&, Instruction&);       // compare.cpp
Handler conversion(const Opcode&, Instruction&);       // convert.cpp
Handler memory(const Opcode&, Instruction&);           // memory.cpp
Handler address(const Opcode&, Instruction&);
Handler atomics(const Opcode&, Instruction&);      // atomic.cpp
Handler async_copy(const Opcode&, Instruction&);   // async.cpp
Handler collective(const Opcode&, Instruction&);   // collective.cpp
Handler tensor_core(const Opcode&, Instruction&);  // tensor.cpp
Handler control(const Opcode&, Instruction&);      // control.cpp
Handler barriers(const Opcode&, Instruction&);

// Wraps a float handler with what the opcode says of rounding (rz, rm, rp), .ftz and .sat.
Handler with_modes(const Opcode&, Instruction&, Handler);

}  // namespace ptx
