// SPDX-License-Identifier: Apache-2.0
// The body of a kernel -> instructions. Functions are put in where they are called.
#include <algorithm>
#include <cstring>

#include "ptx/source.h"
#include "ptx/warp.h"

namespace ptx {
namespace {

using std::string;
using std::vector;

bool is_word(char c) { return isalnum(static_cast<unsigned char>(c)) || strchr("_$%.", c); }
bool is_digit(char c) { return isdigit(static_cast<unsigned char>(c)); }

bool is_label(const string& s) {
  return !s.empty() && (s[0] == '$' || isalpha(static_cast<unsigned char>(s[0])) || s[0] == '_') &&
         std::all_of(s.begin(), s.end(), is_word);
}

struct Named {
  Special special;
  uint8_t size;
};
const std::map<string, Named>& special_registers() {
  using enum Special;
  static const std::map<string, Named> all = {
      {"%tid.x", {tid_x, 4}},
      {"%tid.y", {tid_y, 4}},
      {"%tid.z", {tid_z, 4}},
      {"%ntid.x", {ntid_x, 4}},
      {"%ntid.y", {ntid_y, 4}},
      {"%ntid.z", {ntid_z, 4}},
      {"%ctaid.x", {ctaid_x, 4}},
      {"%ctaid.y", {ctaid_y, 4}},
      {"%ctaid.z", {ctaid_z, 4}},
      {"%nctaid.x", {nctaid_x, 4}},
      {"%nctaid.y", {nctaid_y, 4}},
      {"%nctaid.z", {nctaid_z, 4}},
      {"%laneid", {laneid, 4}},
      {"%warpid", {warpid, 4}},
      {"%nwarpid", {nwarpid, 4}},
      {"%smid", {smid, 4}},
      {"%nsmid", {nsmid, 4}},
      {"%gridid", {gridid, 8}},
      {"%lanemask_eq", {lanemask_eq, 4}},
      {"%lanemask_lt", {lanemask_lt, 4}},
      {"%lanemask_le", {lanemask_le, 4}},
      {"%lanemask_gt", {lanemask_gt, 4}},
      {"%lanemask_ge", {lanemask_ge, 4}},
      {"%dynamic_smem_size", {dynamic_smem_size, 4}},
      {"%total_smem_size", {total_smem_size, 4}},
      {"%clock", {Special::clock, 4}},
      {"%clock_hi", {clock_hi, 4}},
      {"%clock64", {clock64, 8}},
      {"%globaltimer", {clock64, 8}},
      {"%globaltimer_lo", {Special::clock, 4}},
      {"%globaltimer_hi", {clock_hi, 4}},
      // Without clusters a block is a cluster of its own.
      {"%clusterid.x", {ctaid_x, 4}},
      {"%clusterid.y", {ctaid_y, 4}},
      {"%clusterid.z", {ctaid_z, 4}},
      {"%nclusterid.x", {nctaid_x, 4}},
      {"%nclusterid.y", {nctaid_y, 4}},
      {"%nclusterid.z", {nctaid_z, 4}},
      {"%cluster_ctaid.x", {zero, 4}},
      {"%cluster_ctaid.y", {zero, 4}},
      {"%cluster_ctaid.z", {zero, 4}},
      {"%cluster_nctaid.x", {one, 4}},
      {"%cluster_nctaid.y", {one, 4}},
      {"%cluster_nctaid.z", {one, 4}},
      {"%cluster_ctarank", {zero, 4}},
      {"%cluster_nctarank", {one, 4}},
  };
  return all;
}

// Bytes of an immediate that is operand `t` of an opcode: of the opcode's last type, but for
// amounts of shifts, positions, lanes, masks and barriers (32 bits), and predicates.
uint8_t immediate_bytes(const string& opcode, size_t t) {
  const string name = opcode.substr(0, opcode.find('.'));
  const auto named = [&](std::initializer_list<const char*> names) {
    return std::any_of(names.begin(), names.end(), [&](const char* n) { return name == n; });
  };
  const string type = opcode.substr(opcode.rfind('.') + 1);
  const bool typed = opcode.find('.') != string::npos &&
                     (type == "pred" || (type.size() > 1 && strchr("busfe", type[0]) &&
                                         type.find_first_of("0123456789") != string::npos &&
                                         type.find_first_of("_:") == string::npos));
  if (named({"selp", "setp", "set"}) && t == 3) return 0;
  if (name == "vote") return t == 1 ? 0 : 4;
  if (named({"bar", "barrier", "cp", "elect"})) return 4;
  if (named({"shl", "shr", "shf", "match"}) && t > 1) return name == "shf" || t > 1 ? 4 : 8;
  if ((name == "bfe" && t > 1) || (name == "bfi" && t > 2)) return 4;
  if (name == "lop3" && t > 4) return 0;
  if (name == "slct" && t < 3) {
    const string first = opcode.substr(0, opcode.rfind('.'));
    return uint8_t(type_bytes(first.substr(first.rfind('.') + 1)));
  }
  const size_t bytes = typed ? type_bytes(type) : 4;
  const bool wide = opcode.find(".wide.") != string::npos;
  return uint8_t(wide && name == "mad" && t == 3 ? 2 * bytes : bytes);
}

class Parser {
 public:
  Parser(Kernel& kernel, const Module::Source& module) : k(kernel), module_(module) {}

  void run(const Function& f) {
    k.params = parse_params(f.params);
    size_t end = 0, n = 0;
    for (const string& p : split(f.params)) {
      const auto& [offset, size] = k.params[n++];
      symbols_[parse_variable(p).name] = {Symbol::param, offset};
      end = offset + size;
    }
    k.param_bytes.assign(end + 16, 0);
    calls_.push_back(f.name);
    body(f);
    Instruction last;
    last.line = line_;
    select("ret", last);
    k.code.push_back(last);
    resolve();
    k.file = std::move(file_);
  }

 private:
  struct Symbol {
    enum Kind { param, shared, dynamic, local } kind;
    size_t offset;
  };
  using Scope = std::map<string, Operand>;

  // --- text -> statements

  void body(const Function& f) {
    scopes_.emplace_back();
    string statement;
    int brackets = 0, line = f.line;
    const string& text = f.body;
    for (size_t i = 0; i < text.size(); ++i) {
      const char c = text[i];
      const bool empty = statement.empty();
      if (c == '\n') {
        ++line;
        if (statement.starts_with(".loc")) {
          location(words(statement));
          statement.clear();
        } else if (!empty) {
          statement += ' ';
        }
      } else if (empty && isspace(static_cast<unsigned char>(c))) {
        continue;
      } else if (empty && c == '{') {
        scopes_.emplace_back();
      } else if (empty && c == '}') {
        scopes_.pop_back();
      } else if (c == ';' && brackets == 0) {
        parse(trim(statement));
        statement.clear();
      } else if (c == ':' && brackets == 0 && is_label(trim(statement)) && text[i + 1] != ':' &&
                 text[i - 1] != ':') {
        label_ = prefix_ + trim(statement);
        labels_[label_] = int(k.code.size());
        statement.clear();
      } else {
        brackets += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
        if (empty) line_ = line;
        statement += c;
      }
    }
    scopes_.pop_back();
  }

  void location(const vector<string>& w) {
    const auto file = module_.files.find(w.at(1));
    k.sources.push_back((file == module_.files.end() ? "?" : file->second) + ":" + w.at(2));
  }

  void parse(const string& s) {
    if (s.empty()) return;
    try {
      if (s[0] == '.')
        directive(s);
      else
        instruction(s);
    } catch (const std::exception& e) {
      if (nested_) throw;  // the line of the call says less than that within the function
      nested_ = true;
      throw Error("line " + std::to_string(line_) + ": " + s + ": " + e.what());
    }
  }

  void directive(const string& s) {
    const string first = s.substr(0, s.find_first_of(" \t"));
    if (first == ".reg") declare(s);
    if (first == ".shared") place_shared(parse_variable(s));
    if (first == ".local" || first == ".param") place_local(parse_variable(s));
    if (first == ".branchtargets") targets_[label_] = split(s.substr(first.size()));
  }

  void declare(const string& s) {  // ".reg .b32 %r<99>" or ".reg .pred p, q"
    const auto all = words(s);
    const auto size = uint8_t(type_bytes(all[1].substr(1)));
    for (string name : split(s.substr(s.find(all[1]) + all[1].size()))) {
      const size_t open = name.find('<');
      if (open == string::npos) {
        scopes_.back()[name] = {reserve(size), size, false};
        continue;
      }
      const int n = stoi(name.substr(open + 1));
      name.resize(open);
      for (int i = 0; i < n; ++i)
        scopes_.back()[name + std::to_string(i)] = {reserve(size), size, false};
    }
  }

  void place_shared(const Variable& v) {
    if (v.open) {
      symbols_[v.name] = {Symbol::dynamic, v.align};
      return;
    }
    k.static_shared = round_up(k.static_shared, v.align);
    symbols_[v.name] = {Symbol::shared, k.static_shared};
    k.static_shared += v.size;
  }
  void place_local(const Variable& v) {
    k.local = round_up(k.local, std::max<size_t>(v.align, 16));
    symbols_[v.name] = {Symbol::local, k.local};
    k.local += v.size;
  }

  // --- operands

  uint32_t reserve(size_t size) {
    const auto at = uint32_t(round_up(file_.size(), 64));
    // What nobody wrote is recognisable: a large number, a NaN, all lanes true.
    file_.resize(at + std::max<size_t>(size * kLanes, 4), 0xff);
    return at;
  }

  Operand constant(uint64_t bits, uint8_t size) {
    const auto key = std::make_pair(bits, size);
    auto found = constants_.find(key);
    if (found == constants_.end()) {
      const uint32_t at = reserve(size);
      if (size == 0) {
        const Mask m = bits ? ~0u : 0;
        memcpy(&file_[at], &m, 4);
      }
      const size_t bytes = std::min<size_t>(size, 8);
      for (size_t l = 0; size && l < kLanes; ++l) {
        memset(&file_[at + l * size], 0, size);
        memcpy(&file_[at + l * size], &bits, bytes);
      }
      found = constants_.emplace(key, at).first;
    }
    return {found->second, size, false};
  }

  Operand special(const string& name) {
    const auto found = special_registers().find(name);
    if (found == special_registers().end()) throw Error("unknown operand " + name);
    const auto [which, size] = found->second;
    if (which == Special::clock || which == Special::clock_hi || which == Special::clock64) {
      clock_ = which;
      return constant(0, size);
    }
    for (const auto& [s, o] : k.specials)
      if (s == which) return o;
    const Operand o{reserve(size), size, false};
    k.specials.push_back({which, o});
    return o;
  }

  Operand symbol(const Symbol& y, uint8_t size) {
    if (y.kind == Symbol::param)
      return constant(reinterpret_cast<uint64_t>(k.param_bytes.data() + y.offset), 8);
    in_local_ |= y.kind == Symbol::local;
    if (y.kind != Symbol::dynamic) return constant(y.offset, size);
    const Operand o{reserve(size), size, false};
    k.dynamic_shared.push_back(o);
    k.dynamic_align = std::max(k.dynamic_align, y.offset);
    return o;
  }

  // A register, number or symbol; `size` is what an immediate or a sink gets.
  Operand operand(string s, uint8_t size) {
    if (s[0] == '!') {
      Operand o = operand(trim(s.substr(1)), 0);
      o.negated = !o.negated;
      return o;
    }
    if (s == "_") return {reserve(std::max<uint8_t>(size, 8)), size, false};
    if (is_digit(s[0]) || s[0] == '-') return constant(parse_number(s), size);
    if (s == "WARP_SZ") return constant(kLanes, size);
    for (size_t i = scopes_.size(); i-- > 0;)
      if (const auto found = scopes_[i].find(s); found != scopes_[i].end()) return found->second;
    if (const auto v = module_.shared.find(s); v != module_.shared.end() && !symbols_.count(s))
      place_shared(v->second);
    if (const auto y = symbols_.find(s); y != symbols_.end()) return symbol(y->second, size);
    if (const auto g = module_.globals.find(s); g != module_.globals.end()) {
      if (!g->second.error.empty()) throw Error(g->second.error);
      return constant(reinterpret_cast<uint64_t>(g->second.storage.data), 8);
    }
    return special(s);
  }

  void address(string token, Instruction& i, int64_t& offset) {
    token = trim(token.substr(1, token.size() - 2));
    const size_t plus = token.find('+');
    if (plus != string::npos) {
      offset = int64_t(parse_number(trim(token.substr(plus + 1))));
      token = trim(token.substr(0, plus));
    }
    i.o.push_back(operand(token, 8));
  }

  void operands(const string& opcode, const vector<string>& tokens, Instruction& i) {
    const bool moves = opcode.starts_with("mov");
    bool second = false;
    for (size_t t = 0; t < tokens.size(); ++t) {
      const string& token = tokens[t];
      const uint8_t size = immediate_bytes(opcode, t);
      if (token[0] == '[') {
        address(token, i, second ? i.offset2 : i.offset);
        second = true;
      } else if (token[0] == '{') {
        const auto parts = split(token.substr(1, token.size() - 2));
        // The type of a move is that of the whole.
        const auto each = moves ? uint8_t(size / parts.size()) : size;
        for (const string& part : parts) i.o.push_back(operand(part, each));
        if (moves) i.mode = t == 1;
      } else if (const size_t bar = token.find('|'); bar != string::npos) {
        // setp and its like have two predicates; shfl, match, elect and lop3 a value and one.
        i.o.push_back(operand(trim(token.substr(0, bar)), opcode.starts_with("setp") ? 0 : 4));
        i.o.push_back(operand(trim(token.substr(bar + 1)), 0));
      } else {
        i.o.push_back(operand(token, size));
      }
    }
  }

  // --- instructions

  void instruction(const string& statement) {
    Instruction i;
    i.line = line_;
    i.source = int(k.sources.size()) - 1;
    string s = statement;
    if (s[0] == '@') {
      const size_t end = s.find_first_of(" \t");
      i.guarded = true;
      i.guard = operand(s.substr(1, end - 1), 0);
      s = trim(s.substr(end));
    }
    const size_t end = s.find_first_of(" \t");
    const string opcode = s.substr(0, end);
    const auto tokens = split(end == string::npos ? "" : s.substr(end));
    const string name = opcode.substr(0, opcode.find('.'));
    if (name == "call") return call(tokens, i, statement);
    if (name == "bra") {
      branches_.push_back({k.code.size(), prefix_ + tokens.at(0)});
      i.target = 0;
    } else if (name == "ret" && calls_.size() > 1) {
      branches_.push_back({k.code.size(), prefix_ + "return"});
      i.target = 0;
      return add("bra", i, statement);
    } else if (name == "brx") {
      i.o.push_back(operand(tokens.at(0), 4));
      tables_.push_back({k.code.size(), prefix_ + tokens.at(1)});
    } else {
      clock_ = Special::zero;
      in_local_ = false;
      operands(opcode, tokens, i);
      if (in_local_) i.space = Space::local;
      if (clock_ != Special::zero) {
        if (name != "mov") throw Error("a clock that is not moved");
        i.count = 0;
        i.mode = clock_ == Special::clock_hi;
      }
    }
    add(opcode, i, statement);
  }

  void add(const string& opcode, Instruction& i, const string& statement) {
    select(opcode, i);
    k.code.push_back(std::move(i));
    k.texts.push_back(statement);
  }

  // A function's body stands where it is called; its parameters are the caller's variables.
  void call(const vector<string>& tokens, const Instruction& at, const string& statement) {
    size_t n = 0;
    const auto list = [&]() {
      if (n >= tokens.size() || tokens[n][0] != '(') return vector<string>();
      const string& t = tokens[n++];
      return split(t.substr(1, t.size() - 2));
    };
    const auto returns = list();
    const string name = n < tokens.size() ? tokens[n++] : "";
    const auto arguments = list();
    const auto found = module_.functions.find(name);
    if (found == module_.functions.end()) throw Error("unknown opcode call of a function pointer");
    const Function& f = found->second;
    if (std::find(calls_.begin(), calls_.end(), name) != calls_.end())
      throw Error("unknown opcode call: " + name + " calls itself");
    const string outer = prefix_;
    prefix_ = "call" + std::to_string(++instances_) + ":";
    if (at.guarded) {
      Instruction skip = at;
      skip.guard.negated = !skip.guard.negated;
      skip.target = 0;
      branches_.push_back({k.code.size(), prefix_ + "return"});
      add("bra", skip, statement);
    }
    if (f.defined)
      enter(f, returns, arguments);
    else if (name == "__assertfail")
      assertion(arguments, at, statement);
    else
      throw Error("unknown opcode call of " + name);
    labels_[prefix_ + "return"] = int(k.code.size());
    prefix_ = outer;
  }

  void enter(const Function& f, const vector<string>& returns, const vector<string>& arguments) {
    auto symbols = symbols_;
    const auto bind = [&](const string& declared, const vector<string>& given) {
      const auto all = split(declared);
      if (all.size() != given.size()) throw Error("call: another number of parameters");
      for (size_t n = 0; n < all.size(); ++n) {
        const auto variable = symbols_.find(given[n]);
        if (variable == symbols_.end()) throw Error("call: " + given[n] + " is not in .param");
        symbols[parse_variable(all[n]).name] = variable->second;
      }
    };
    bind(f.params, arguments);
    bind(f.returns, returns);
    std::swap(symbols, symbols_);
    vector<Scope> scopes;
    std::swap(scopes, scopes_);
    const int line = line_;
    calls_.push_back(f.name);
    body(f);
    calls_.pop_back();
    line_ = line;
    std::swap(scopes, scopes_);
    std::swap(symbols, symbols_);
  }

  void assertion(const vector<string>& arguments, const Instruction& at, const string& statement) {
    static const uint8_t sizes[] = {8, 8, 4, 8};
    Instruction fail;
    fail.line = at.line;
    fail.source = at.source;
    for (size_t n = 0; n < 4; ++n) {
      Instruction load;
      load.line = at.line;
      load.source = at.source;
      load.o = {{reserve(sizes[n]), sizes[n], false}, operand(arguments.at(n), 8)};
      load.space = Space::local;
      fail.o.push_back(load.o[0]);
      add(sizes[n] == 8 ? "ld.param.b64" : "ld.param.b32", load, statement);
    }
    add("call.assertion", fail, statement);
  }

  // --- when all labels are known

  int place(const string& label) const {
    const auto found = labels_.find(label);
    if (found == labels_.end()) throw Error("no label " + label);
    return found->second;
  }
  void resolve() {
    for (const auto& [at, label] : branches_) k.code[at].target = place(label);
    for (const auto& [at, label] : tables_) {
      const string prefix = label.substr(0, label.rfind(':') + 1);
      Instruction& i = k.code[at];
      for (const string& target : targets_[label])
        i.o.push_back(constant(uint64_t(place(prefix + target)), 4));
      i.count = int(i.o.size()) - 1;
      if (i.count == 0) throw Error("brx.idx without .branchtargets");
    }
  }

  Kernel& k;
  const Module::Source& module_;
  std::map<string, Symbol> symbols_;
  vector<Scope> scopes_;
  std::map<std::pair<uint64_t, uint8_t>, uint32_t> constants_;
  string prefix_, label_;  // of labels within a called function; the last label
  std::map<string, int> labels_;
  std::map<string, vector<string>> targets_;  // .branchtargets by label
  vector<std::pair<size_t, string>> branches_, tables_;
  vector<string> calls_;
  int instances_ = 0;
  vector<unsigned char> file_;
  Special clock_ = Special::zero;  // that the instruction reads
  bool in_local_ = false, nested_ = false;
  int line_ = 0;
};

}  // namespace

Kernel parse_kernel(const Function& f, const Module::Source& module) {
  Kernel k;
  k.name = f.name;
  k.architecture = module.architecture;
  const size_t at = f.head.find(".maxntid");
  if (at != string::npos) {
    k.max_threads = 1;
    for (const string& n : split(f.head.substr(at + 8, f.head.find('.', at + 1) - at - 8)))
      k.max_threads *= unsigned(stoul(n));
  }
  Parser(k, module).run(f);
  return k;
}

}  // namespace ptx
