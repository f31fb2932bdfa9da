// SPDX-License-Identifier: Apache-2.0
// A module's text, cut into what it declares.
#pragma once
#include <memory>

#include "ptx/ptx.h"
#include "ptx/warp.h"

namespace ptx {

// ".param .align 8 .b8 name[1544]"
struct Variable {
  std::string name;
  size_t size = 0, align = 1, element = 0;
  bool open = false;    // name[]
  std::string initial;  // what follows '='
};
Variable parse_variable(const std::string& text);

struct Function {
  std::string name, returns, params;  // the lists between brackets
  std::string head;                   // what follows the parameters: .maxntid and its like
  std::string body;                   // without its braces; empty: declared only
  int line = 0;                       // of the body
  bool entry = false, defined = false;
};

// A variable of the module, in the host's memory.
struct Global {
  Variable variable;
  Storage storage{};
  std::string error;  // why it cannot be used
};

struct Module::Source {
  explicit Source(const std::string& text);
  std::string architecture;
  std::map<std::string, Function> functions;
  std::map<std::string, Global> globals;
  std::map<std::string, Variable> shared;  // each takes memory in the kernels that name it
  std::map<std::string, std::string> files;

 private:
  void declare(const std::string& statement);
  void line_directive(const std::string& line);
  void place_globals();
  void initialise(Global& g);
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> memory_;
};

Kernel parse_kernel(const Function& function, const Module::Source& module);
std::vector<std::pair<size_t, size_t>> parse_params(const std::string& list);

// --- pieces of text

std::string trim(const std::string& s);
std::vector<std::string> words(const std::string& s);
std::vector<std::string> split(const std::string& s);  // at commas outside of any bracket
size_t round_up(size_t n, size_t unit);
size_t type_bytes(const std::string& type);  // "f16x2": 4
uint64_t parse_number(const std::string& s);

}  // namespace ptx
