// SPDX-License-Identifier: Apache-2.0
// PTX text -> functions and variables.
#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "ptx/source.h"

namespace ptx {

using std::string;

string trim(const string& s) {
  const size_t a = s.find_first_not_of(" \t\r\n");
  if (a == string::npos) return "";
  return s.substr(a, s.find_last_not_of(" \t\r\n") - a + 1);
}

std::vector<string> words(const string& s) {
  std::vector<string> all;
  string word;
  for (const char c : s + " ") {
    if (!isspace(static_cast<unsigned char>(c))) {
      word += c;
    } else if (!word.empty()) {
      all.push_back(word);
      word.clear();
    }
  }
  return all;
}

std::vector<string> split(const string& s) {
  std::vector<string> parts;
  int depth = 0;
  string part;
  for (const char c : s) {
    depth += (c == '[' || c == '{' || c == '(') - (c == ']' || c == '}' || c == ')');
    if (c == ',' && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

size_t type_bytes(const string& t) {
  if (t == "pred") return 0;
  if (t.starts_with("e4m3") || t.starts_with("e5m2")) return t.ends_with("x2") ? 2 : 1;
  const size_t digit = t.find_first_of("0123456789");
  if (digit == string::npos) throw Error("unknown type ." + t);
  return stoul(t.substr(digit)) / 8 * (t.ends_with("x2") ? 2 : 1);
}

uint64_t parse_number(const string& s) {
  if (s.size() > 2 && s[0] == '0' && strchr("fFdD", s[1]))  // the bits of a float or double
    return stoull(s.substr(2), nullptr, 16);
  string digits = s;
  if (digits.ends_with('U')) digits.pop_back();
  // The prefix of a binary number is not one of stoull's.
  const bool negative = digits[0] == '-';
  if (negative) digits = trim(digits.substr(1));
  const bool binary = digits.starts_with("0b") || digits.starts_with("0B");
  const uint64_t n = binary ? stoull(digits.substr(2), nullptr, 2) : stoull(digits, nullptr, 0);
  return negative ? ~n + 1 : n;
}

Variable parse_variable(const string& text) {
  Variable v;
  const size_t equals = text.find('=');
  if (equals != string::npos) v.initial = trim(text.substr(equals + 1));
  const auto all = words(text.substr(0, equals));
  size_t align = 0, vector = 1;
  for (size_t i = 0; i + 1 < all.size(); ++i) {
    const string& w = all[i];
    if (w == ".align") {
      align = stoul(all[++i]);
    } else if (w == ".v2" || w == ".v4") {
      vector = size_t(w[2] - '0');
    } else if (w.size() > 2 && strchr("bsuf", w[1]) && isdigit(static_cast<unsigned char>(w[2]))) {
      v.element = type_bytes(w.substr(1));
    }
  }
  v.name = all.back();
  v.size = v.element * vector;
  v.align = align ? align : std::max<size_t>(v.size, 1);
  const size_t bracket = v.name.find('[');
  for (size_t at = bracket; at != string::npos; at = v.name.find('[', at + 1)) {
    const string n = v.name.substr(at + 1, v.name.find(']', at) - at - 1);
    v.open |= n.empty();
    v.size *= n.empty() ? 0 : stoul(n);
  }
  v.name.resize(std::min(bracket, v.name.size()));
  return v;
}

namespace {

// Text without its comments, all else in its place.
string without_comments(const string& text) {
  string s = text;
  for (size_t at = 0; (at = s.find('/', at)) != string::npos; ++at) {
    const bool line = s.compare(at, 2, "//") == 0, block = s.compare(at, 2, "/*") == 0;
    if (!line && !block) continue;
    size_t end = line ? s.find('\n', at) : s.find("*/", at + 2);
    end = end == string::npos ? s.size() : end + (block ? 2 : 0);
    for (; at < end; ++at)
      if (s[at] != '\n') s[at] = ' ';
    --at;
  }
  return s;
}

size_t closing(const string& s, size_t open, char left, char right) {
  int depth = 0;
  for (size_t at = open; at < s.size(); ++at) {
    depth += (s[at] == left) - (s[at] == right);
    if (depth == 0) return at;
  }
  throw Error(string("no closing ") + right);
}

// ".visible .entry name(params) .maxntid 128" or ".func (returns) name (params)"
Function parse_head(const string& s) {
  Function f;
  f.entry = s.find(".entry") != string::npos;
  size_t at = s.find(f.entry ? ".entry" : ".func") + (f.entry ? 6 : 5);
  at = s.find_first_not_of(" \t\r\n", at);
  if (s[at] == '(') {
    const size_t end = closing(s, at, '(', ')');
    f.returns = s.substr(at + 1, end - at - 1);
    at = end + 1;
  }
  const size_t open = s.find('(', at);
  f.name = words(s.substr(at, open == string::npos ? open : open - at)).at(0);
  if (open == string::npos) return f;
  const size_t end = closing(s, open, '(', ')');
  f.params = s.substr(open + 1, end - open - 1);
  f.head = s.substr(end + 1);
  return f;
}

bool is_function(const string& s) {
  for (const string& w : words(s))
    if (w == ".entry" || w == ".func" || w.starts_with(".func(")) return true;
  return false;
}

}  // namespace

Module::Source::Source(const string& with_comments) {
  const string text = without_comments(with_comments);
  int line = 1;
  size_t counted = 0;
  for (size_t at = 0;;) {
    at = text.find_first_not_of(" \t\r\n;", at);
    if (at == string::npos) break;
    const size_t end_of_line = std::min(text.find('\n', at), text.size());
    const string first = text.substr(at, text.find_first_of(" \t\r\n", at) - at);
    if (first == ".version" || first == ".target" || first == ".address_size" || first == ".file" ||
        first == ".loc") {
      line_directive(text.substr(at, end_of_line - at));
      at = end_of_line;
      continue;
    }
    if (first == ".section") {
      at = closing(text, text.find('{', at), '{', '}') + 1;
      continue;
    }
    const size_t stop = text.find_first_of(";{", at);
    if (stop == string::npos) break;
    string statement = trim(text.substr(at, stop - at));
    if (text[stop] == '{' && is_function(statement)) {
      Function f = parse_head(statement);
      const size_t end = closing(text, stop, '{', '}');
      f.body = text.substr(stop + 1, end - stop - 1);
      f.defined = true;
      line += int(std::count(text.begin() + long(counted), text.begin() + long(stop), '\n'));
      counted = stop;
      f.line = line;
      functions[f.name] = std::move(f);
      at = end + 1;
      continue;
    }
    const size_t end = std::min(text.find(';', stop), text.size());
    declare(trim(text.substr(at, end - at)));
    at = end + 1;
  }
  place_globals();
}

void Module::Source::line_directive(const string& line) {
  const auto w = words(line);
  if (w[0] == ".target" && w.size() > 1) architecture = w[1].substr(0, w[1].find(','));
  if (w[0] != ".file" || w.size() < 3) return;
  string path = w[2].substr(0, w[2].find(','));
  path.erase(std::remove(path.begin(), path.end(), '"'), path.end());
  files[w[1]] = path.substr(path.rfind('/') + 1);
}

// A function that is only declared, or a variable.
void Module::Source::declare(const string& s) {
  if (is_function(s)) {
    const Function f = parse_head(s);
    functions.emplace(f.name, f);  // unless it is defined
    return;
  }
  const auto all = words(s.substr(0, s.find('=')));
  const auto has = [&](const char* w) { return std::find(all.begin(), all.end(), w) != all.end(); };
  if (has(".shared")) {
    const Variable v = parse_variable(s);
    shared[v.name] = v;
  } else if (has(".global") || has(".const")) {
    Global g{parse_variable(s), {}, {}};
    if (has(".extern")) g.error = "variable " + g.variable.name + " of another module";
    globals.emplace(g.variable.name, std::move(g));
  }
}

void Module::Source::Free::operator()(char* p) const { free(p); }

void Module::Source::place_globals() {
  constexpr size_t kUnit = 256;
  size_t size = kUnit;
  for (auto& [name, g] : globals) size = round_up(size, kUnit) + g.variable.size;
  if (globals.empty()) return;
  size = round_up(size, kUnit);
  memory_.reset(static_cast<char*>(aligned_alloc(kUnit, size)));
  memset(memory_.get(), 0, size);
  size_t at = 0;
  for (auto& [name, g] : globals) {
    g.storage = {memory_.get() + at, g.variable.size};
    at = round_up(at + g.variable.size, kUnit);
  }
  for (auto& [name, g] : globals) initialise(g);
}

void Module::Source::initialise(Global& g) {
  string text = g.variable.initial;
  if (text.empty() || !g.error.empty()) return;
  std::erase(text, '{');
  std::erase(text, '}');
  const size_t bytes = g.variable.element;
  size_t at = 0;
  try {
    for (const string& value : split(text)) {
      uint64_t bits = 0;
      string name = value;
      if (name.starts_with("generic(")) name = name.substr(8, name.find(')') - 8);
      const size_t plus = name.find('+');
      const auto other = globals.find(trim(name.substr(0, plus)));
      if (other != globals.end()) {
        bits = reinterpret_cast<uint64_t>(other->second.storage.data);
        if (plus != string::npos) bits += parse_number(trim(name.substr(plus + 1)));
      } else {
        bits = parse_number(value);
      }
      if (at + bytes > g.storage.size) throw Error("too many initial values");
      memcpy(g.storage.data + at, &bits, bytes);
      at += bytes;
    }
  } catch (const std::exception& e) {
    g.error = "initial value of " + g.variable.name + ": " + e.what();
  }
}

std::vector<std::pair<size_t, size_t>> parse_params(const string& list) {
  std::vector<std::pair<size_t, size_t>> all;
  size_t offset = 0;
  for (const string& p : split(list)) {
    const Variable v = parse_variable(p);
    offset = round_up(offset, v.align);
    all.push_back({offset, v.size});
    offset += v.size;
  }
  return all;
}

Module::Module(string text) : source_(std::make_unique<Source>(text)) {}
Module::~Module() = default;

std::vector<string> Module::names() const {
  std::vector<string> all;
  for (const auto& [name, f] : source_->functions)
    if (f.entry) all.push_back(name);
  return all;
}

const Storage* Module::variable(const string& name) const {
  const auto g = source_->globals.find(name);
  return g == source_->globals.end() ? nullptr : &g->second.storage;
}

static const Function& entry(const Module::Source& source, const string& name) {
  const auto f = source.functions.find(name);
  if (f == source.functions.end() || !f->second.entry) throw Error("no kernel " + name);
  return f->second;
}

std::vector<std::pair<size_t, size_t>> Module::params(const string& name) const {
  return parse_params(entry(*source_, name).params);
}

namespace {

string demangled(const string& name) {
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
  string result = text ? text : name;
  free(text);
  return result;
}

struct Override {
  std::unique_ptr<Module> module;
  std::map<string, string> names;  // demangled: mangled
} override_;

}  // namespace

void set_override(std::unique_ptr<Module> module) {
  override_ = {std::move(module), {}};
  if (!override_.module) return;
  for (const string& name : override_.module->names()) override_.names[demangled(name)] = name;
}

Kernel& Module::kernel(const string& name) {
  const bool overrides = override_.module.get() == this;
  if (override_.module && !overrides) {
    const auto other = override_.names.find(demangled(name));
    if (other != override_.names.end()) return override_.module->kernel(other->second);
  }
  std::shared_ptr<Kernel>& k = kernels_[name];
  if (!k) {
    k = std::make_shared<Kernel>(parse_kernel(entry(*source_, name), *source_));
    if (!overrides) keep_for_reports(k);
  }
  return *k;
}

}  // namespace ptx
