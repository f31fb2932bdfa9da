// SPDX-License-Identifier: Apache-2.0
// PTX text -> instructions.
#include <algorithm>
#include <cstring>

#include "ptx/ptx.h"

namespace ptx {
namespace {

using std::string;
using std::vector;

bool is_word(char c) { return isalnum(static_cast<unsigned char>(c)) || strchr("_$%.", c); }

string trim(const string& s) {
  const size_t a = s.find_first_not_of(" \t\r\n");
  if (a == string::npos) return "";
  return s.substr(a, s.find_last_not_of(" \t\r\n") - a + 1);
}

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Splits at commas outside of any bracket.
vector<string> split(const string& s) {
  vector<string> parts;
  int depth = 0;
  string part;
  for (char c : s) {
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

size_t type_bytes(const string& t) {
  if (t == "pred") return 0;
  const size_t digit = t.find_first_of("0123456789");
  if (digit == string::npos) throw Error("unknown type ." + t);
  return stoul(t.substr(digit)) / 8;
}

vector<string> words(const string& s) {
  vector<string> all;
  string word;
  for (char c : s + " ") {
    if (isspace(static_cast<unsigned char>(c))) {
      if (!word.empty()) all.push_back(word);
      word.clear();
    } else {
      word += c;
    }
  }
  return all;
}

// ".param .align 8 .b8 name[1544]"
struct Variable {
  string name;
  size_t size = 0, align = 1;
  bool open = false;  // name[]
};
Variable variable(const string& text) {
  Variable v;
  size_t element = 0, align = 0;
  const auto all = words(text);
  for (size_t i = 0; i + 1 < all.size(); ++i) {
    if (all[i] == ".align") {
      align = stoul(all[++i]);
    } else if (strchr("bsuf", all[i][1]) && all[i].size() > 2 && isdigit(all[i][2])) {
      element = type_bytes(all[i].substr(1));
    }
  }
  v.name = all.back();
  v.align = align ? align : element;
  v.size = element;
  if (const size_t bracket = v.name.find('['); bracket != string::npos) {
    const string n = v.name.substr(bracket + 1, v.name.find(']') - bracket - 1);
    v.open = n.empty();
    v.size *= v.open ? 0 : stoul(n);
    v.name.resize(bracket);
  }
  return v;
}

class Parser {
 public:
  Parser(Kernel& kernel, const std::map<string, string>& files) : k(kernel), files_(files) {}

  void params(const string& text) {
    size_t offset = 0;
    for (const string& p : split(text)) {
      const Variable v = variable(p);
      offset = round_up(offset, v.align);
      k.params.push_back({offset, v.size});
      symbols_[v.name] = {Symbol::param, offset};
      offset += v.size;
    }
    k.param_bytes.assign(offset + 16, 0);
  }

  void body(const string& text, int line) {
    scopes_.emplace_back();
    string statement;
    int brackets = 0;
    line_ = line;
    for (size_t i = 0; i < text.size(); ++i) {
      const char c = text[i];
      if (c == '\n') {
        ++now_;
        const string s = trim(statement);
        if (s.rfind(".loc", 0) == 0) {
          const auto w = words(s);
          const auto file = files_.find(w[1]);
          k.sources.push_back((file == files_.end() ? "?" : file->second) + ":" + w[2]);
          statement.clear();
        } else {
          statement += ' ';
        }
        continue;
      }
      if (c == '/' && i + 1 < text.size() && text[i + 1] == '/') {
        while (i + 1 < text.size() && text[i + 1] != '\n') ++i;
        continue;
      }
      const bool empty = trim(statement).empty();
      if (empty && c == '{') {
        scopes_.emplace_back();
      } else if (empty && c == '}') {
        scopes_.pop_back();
      } else if (c == ';' && brackets == 0) {
        parse(trim(statement));
        statement.clear();
      } else if (c == ':' && brackets == 0 && label(trim(statement)) && text[i + 1] != ':' &&
                 text[i - 1] != ':') {
        labels_[trim(statement)] = int(k.code.size());
        statement.clear();
      } else {
        brackets += (c == '{' || c == '[') - (c == '}' || c == ']');
        if (empty && !isspace(static_cast<unsigned char>(c))) line_ = line + now_;
        statement += c;
      }
    }
    for (auto& [at, name] : branches_) {
      if (!labels_.count(name)) throw Error("no label " + name);
      k.code[at].target = labels_[name];
    }
    Instruction end;
    end.line = line_;
    select("ret", end);
    k.code.push_back(end);
    k.file = std::move(file_);
  }

  // A shared array of the module; it takes memory in the kernels that name it.
  void module_shared(const Variable& v) { module_[v.name] = v; }

  void shared(const Variable& v) {
    if (v.open) {
      symbols_[v.name] = {Symbol::dynamic, v.align};
      return;
    }
    k.static_shared = round_up(k.static_shared, v.align);
    symbols_[v.name] = {Symbol::shared, k.static_shared};
    k.static_shared += v.size;
  }

 private:
  struct Symbol {
    enum Kind { param, shared, dynamic, local } kind;
    size_t offset;
  };

  static bool label(const string& s) {
    return !s.empty() &&
           (s[0] == '$' || isalpha(static_cast<unsigned char>(s[0])) || s[0] == '_') &&
           std::all_of(s.begin(), s.end(), is_word);
  }

  uint32_t reserve(size_t size) {
    const uint32_t at = uint32_t(round_up(file_.size(), 64));
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
      for (int l = 0; l < kLanes; ++l) memcpy(&file_[at + l * size], &bits, size);
      found = constants_.emplace(key, at).first;
    }
    return {found->second, size, false};
  }

  uint64_t number(const string& s) {
    if (s.size() > 2 && s[0] == '0' && strchr("fFdD", s[1]))  // the bits of a float or double
      return stoull(s.substr(2), nullptr, 16);
    return s[0] == '-' ? uint64_t(-stoll(s.substr(1), nullptr, 0)) : stoull(s, nullptr, 0);
  }

  // A register, number or symbol; `size` is what an immediate or a sink gets.
  Operand operand(string s, uint8_t size) {
    bool negated = false;
    if (s[0] == '!') {
      negated = true;
      s = trim(s.substr(1));
    }
    if (s == "_") return {reserve(std::max<uint8_t>(size, 8)), size, false};
    if (isdigit(static_cast<unsigned char>(s[0])) || s[0] == '-') return constant(number(s), size);
    if (auto v = module_.find(s); v != module_.end() && !symbols_.count(s)) shared(v->second);
    if (auto symbol = symbols_.find(s); symbol != symbols_.end()) {
      const Symbol& y = symbol->second;
      if (y.kind == Symbol::param)
        return constant(reinterpret_cast<uint64_t>(k.param_bytes.data() + y.offset), 8);
      if (y.kind == Symbol::dynamic) {
        const Operand o{reserve(size), size, false};
        k.dynamic_shared.push_back(o);
        k.dynamic_align = std::max(k.dynamic_align, y.offset);
        return o;
      }
      return constant(y.offset, size);
    }
    for (size_t i = scopes_.size(); i-- > 0;) {
      auto found = scopes_[i].find(s);
      if (found != scopes_[i].end()) {
        Operand o = found->second;
        o.negated = negated;
        return o;
      }
    }
    if (s[0] == '%') {  // %tid.x and its like
      if (!k.specials.count(s)) k.specials[s] = reserve(4);
      return {k.specials[s], 4, false};
    }
    throw Error("unknown operand " + s);
  }

  void declare(const string& s) {  // ".reg .b32 %r<99>" or ".reg .pred p, q"
    const auto all = words(s);
    const auto size = uint8_t(type_bytes(all[1].substr(1)));
    const string rest = s.substr(s.find(all[1]) + all[1].size());
    for (string name : split(rest)) {
      if (const size_t open = name.find('<'); open != string::npos) {
        const int n = stoi(name.substr(open + 1));
        name.resize(open);
        for (int i = 0; i < n; ++i)
          scopes_.back()[name + std::to_string(i)] = {reserve(size), size, false};
      } else {
        scopes_.back()[name] = {reserve(size), size, false};
      }
    }
  }

  void parse(string s) {
    if (s.empty()) return;
    if (s[0] == '.') {
      if (s.rfind(".reg", 0) == 0) declare(s);
      if (s.rfind(".shared", 0) == 0) shared(variable(s));
      if (s.rfind(".local", 0) == 0) {
        const Variable v = variable(s);
        k.local = round_up(k.local, std::max<size_t>(v.align, 16));
        symbols_[v.name] = {Symbol::local, k.local};
        k.local += v.size;
      }
      return;
    }
    const string text = s;
    Instruction i;
    i.line = line_;
    i.source = int(k.sources.size()) - 1;
    if (s[0] == '@') {
      const size_t end = s.find_first_of(" \t");
      i.guarded = true;
      i.guard = operand(s.substr(1, end - 1), 0);
      s = trim(s.substr(end));
    }
    const size_t end = s.find_first_of(" \t");
    const string opcode = s.substr(0, end);
    const auto tokens = split(end == string::npos ? "" : s.substr(end));
    try {
      const bool jump = opcode.rfind("bra", 0) == 0;
      if (jump) branches_.push_back({k.code.size(), tokens[0]});
      // Sizes of immediates: those of the opcode's last type; bytes of addresses and masks below.
      string type = opcode.substr(opcode.rfind('.') + 1);
      uint8_t size = 4;
      const bool typed =
          opcode.find('.') != string::npos &&
          (type == "pred" || (type.size() > 1 && isdigit(type[1]) && !strchr("vxm", type[0])));
      if (typed) size = uint8_t(type_bytes(type));
      if (opcode.rfind("vote", 0) == 0 || opcode.rfind("barrier", 0) == 0 ||
          opcode.rfind("bar", 0) == 0 || opcode.rfind("cp.", 0) == 0)
        size = 4;
      for (size_t t = 0; t < tokens.size() && !jump; ++t) {
        string token = tokens[t];
        uint8_t want = size;
        // Amounts of shifts, positions, lanes and masks are 32 bits whatever the type.
        if ((opcode[0] == 's' && opcode[1] == 'h' && t > 1) ||
            (opcode.rfind("bf", 0) == 0 && t > 2 - (opcode[2] == 'e')))
          want = 4;
        if (opcode.rfind("selp", 0) == 0 && t == 3) want = 0;
        if (opcode.rfind("setp", 0) == 0 && t == 3) want = 0;
        if (opcode.rfind("match", 0) == 0 && t == 2) want = 4;
        if (opcode.rfind("vote", 0) == 0 && t == 1) want = 0;
        if (token[0] == '[') {
          token = trim(token.substr(1, token.size() - 2));
          const size_t plus = token.find('+');
          if (plus != string::npos) {
            i.offset = stoll(trim(token.substr(plus + 1)), nullptr, 0);
            token = trim(token.substr(0, plus));
          }
          i.o.push_back(operand(token, 8));
        } else if (token[0] == '{') {
          const auto parts = split(token.substr(1, token.size() - 2));
          const bool packs = opcode.rfind("mov", 0) == 0;  // its type is that of the whole
          for (const string& part : parts)
            i.o.push_back(operand(part, packs ? uint8_t(size / parts.size()) : size));
        } else if (const size_t bar = token.find('|'); bar != string::npos) {
          i.o.push_back(operand(trim(token.substr(0, bar)), size));
          i.o.push_back(operand(trim(token.substr(bar + 1)), 0));
        } else {
          i.o.push_back(operand(token, want));
        }
      }
      select(opcode, i);
    } catch (const std::exception& e) {
      throw Error("line " + std::to_string(line_) + ": " + s + ": " + e.what());
    }
    k.code.push_back(std::move(i));
    k.texts.push_back(text);
  }

  Kernel& k;
  const std::map<string, string>& files_;
  std::map<string, Symbol> symbols_;
  std::map<string, Variable> module_;
  vector<std::map<string, Operand>> scopes_;
  std::map<std::pair<uint64_t, uint8_t>, uint32_t> constants_;
  std::map<string, int> labels_;
  vector<std::pair<size_t, string>> branches_;
  vector<unsigned char> file_;
  int line_ = 0, now_ = 0;
};

}  // namespace

Module::Module(string text) : text_(std::move(text)) {
  size_t at = text_.find("\n.target ");
  if (at != string::npos)
    architecture_ = text_.substr(at + 9, text_.find_first_of(", \r\n", at + 9) - at - 9);
  at = 0;
  while ((at = text_.find(".entry ", at)) != string::npos) {
    const size_t name = at + 7, open = text_.find('(', name);
    const size_t begin = text_.find('{', open);
    int depth = 0;
    size_t end = begin;
    do {
      depth += (text_[end] == '{') - (text_[end] == '}');
    } while (depth && ++end < text_.size());
    entries_[trim(text_.substr(name, open - name))] = {
        open, end, 1 + int(std::count(text_.begin(), text_.begin() + long(begin), '\n')), nullptr};
    at = end;
  }
  for (at = 0; (at = text_.find(".file", at)) != string::npos; ++at) {
    const auto w = words(text_.substr(at, text_.find('\n', at) - at));
    if (at == 0 || !isspace(static_cast<unsigned char>(text_[at - 1])) || w.size() < 3) continue;
    string path = w[2].substr(0, w[2].find(','));
    path.erase(std::remove(path.begin(), path.end(), '"'), path.end());
    files_[w[1]] = path.substr(path.rfind('/') + 1);
  }
}

vector<string> Module::names() const {
  vector<string> all;
  for (const auto& [name, entry] : entries_) all.push_back(name);
  return all;
}

vector<std::pair<size_t, size_t>> Module::params(const string& name) const {
  Kernel k;
  const Entry& e = entries_.at(name);
  Parser(k, files_).params(text_.substr(e.begin + 1, text_.find(")\n", e.begin) - e.begin - 1));
  return k.params;
}

Kernel& Module::kernel(const string& name) {
  Entry& e = entries_.at(name);
  if (e.kernel) return *e.kernel;
  auto k = std::make_shared<Kernel>();
  k->name = name;
  k->architecture = architecture_;
  Parser parser(*k, files_);
  const size_t close = text_.find(")\n", e.begin), begin = text_.find('{', e.begin);
  parser.params(text_.substr(e.begin + 1, close - e.begin - 1));
  const string head = text_.substr(close, begin - close);
  if (const size_t at = head.find(".maxntid"); at != string::npos)
    k->max_threads = unsigned(stoul(head.substr(at + 8)));
  for (const char* start : {"\n.extern .shared", "\n.shared"})
    for (size_t at = text_.find(start); at != string::npos; at = text_.find(start, at + 1))
      parser.module_shared(variable(text_.substr(at + 1, text_.find(';', at) - at - 1)));
  parser.body(text_.substr(begin + 1, e.end - begin - 1), e.line);
  keep_for_coverage(k);
  e.kernel = std::move(k);
  return *e.kernel;
}

}  // namespace ptx
