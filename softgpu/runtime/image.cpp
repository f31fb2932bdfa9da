// SPDX-License-Identifier: Apache-2.0
#include "runtime/image.h"

#include <elf.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <sstream>
#include <vector>

namespace softgpu {
namespace {

template <class T>
T read(const char* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

// The system's part of a block's shared memory. From sm_90 on it is counted in a kernel's section;
// ptxas then says so by a section of its own. What is left is static shared memory.
constexpr int kReservedShared = 1024;
constexpr const char* kReservedSection = ".nv.shared.reserved.0";
enum Attribute : uint8_t { kMaxThreads = 0x05, kParamBytes = 0x19, kRegisters = 0x2f };

// An attribute section: format, name, and a 16-bit value or the size of what follows.
template <class F>
void each_attribute(const char* p, size_t size, F f) {
  for (const char* end = p + size; p + 4 <= end;) {
    const bool sized = p[0] == 4;
    const auto value = read<uint16_t>(p + 2);
    f(uint8_t(p[1]), value, p + 4);
    p += 4 + (sized ? value : 0);
  }
}

void read_cubin(const char* elf, std::map<std::string, KernelFacts>& all) {
  const auto header = read<Elf64_Ehdr>(elf);
  std::vector<Elf64_Shdr> sections;
  for (int i = 0; i < header.e_shnum; ++i) {
    sections.push_back(read<Elf64_Shdr>(elf + header.e_shoff + size_t(i) * sizeof(Elf64_Shdr)));
  }
  const char* names = elf + sections[header.e_shstrndx].sh_offset;
  const auto suffix = [](const std::string& name, const char* prefix) {
    const size_t n = strlen(prefix);
    return name.compare(0, n, prefix) == 0 ? name.substr(n) : std::string();
  };
  const bool counts_reserved = std::any_of(sections.begin(), sections.end(), [&](const auto& s) {
    return strcmp(names + s.sh_name, kReservedSection) == 0;
  });
  const int reserved = counts_reserved ? kReservedShared : 0;
  for (const Elf64_Shdr& s : sections) {
    const std::string name = names + s.sh_name;
    if (const auto kernel = suffix(name, ".nv.shared."); !kernel.empty()) {
      all[kernel].static_shared = std::max(0, int(s.sh_size) - reserved);
    }
    if (const auto kernel = suffix(name, ".nv.info."); !kernel.empty()) {
      each_attribute(elf + s.sh_offset, s.sh_size, [&](int attribute, int value, const char* more) {
        if (attribute == kMaxThreads) {
          all[kernel].max_threads =
              int(read<uint32_t>(more) * read<uint32_t>(more + 4) * read<uint32_t>(more + 8));
        }
        if (attribute == kParamBytes) all[kernel].parameter_bytes = value;
      });
    }
    if (name == ".nv.info") {
      const Elf64_Shdr& symbols = sections[s.sh_link];
      const char* strings = elf + sections[symbols.sh_link].sh_offset;
      each_attribute(elf + s.sh_offset, s.sh_size, [&](int attribute, int, const char* more) {
        if (attribute != kRegisters) return;
        const size_t at = read<uint32_t>(more) * sizeof(Elf64_Sym);
        const auto symbol = read<Elf64_Sym>(elf + symbols.sh_offset + at);
        all[strings + symbol.st_name].registers = int(read<uint32_t>(more + 4));
      });
    }
  }
}

// A shared variable is declared in the kernel that uses it or, where several do, before them.
void read_ptx(const std::string& ptx, std::map<std::string, KernelFacts>& all) {
  std::map<std::string, int> common;
  std::set<std::string> used;  // of `common`: kernel and variable
  std::istringstream lines(ptx);
  std::string kernel;
  bool body = false;
  for (std::string line; std::getline(lines, line);) {
    const auto after = [&](const char* word) {
      const size_t at = line.find(word);
      return at == std::string::npos ? std::string() : line.substr(at + strlen(word));
    };
    if (const auto name = after(".entry "); !name.empty()) kernel = name.substr(0, name.find('('));
    if (line == "{") body = true;
    if (line == "}") body = false;
    if (const auto threads = after(".maxntid "); !threads.empty()) {
      all[kernel].max_threads = atoi(threads.c_str());
    }
    if (const auto variable = after(".shared .align "); !variable.empty()) {
      const size_t from = variable.find(" .b8 ") + 5, bracket = variable.find('[');
      if (bracket == std::string::npos) continue;
      const int bytes = atoi(variable.c_str() + bracket + 1);  // 0: dynamic
      if (body) {
        all[kernel].static_shared += bytes;
      } else if (bytes) {
        common[variable.substr(from, bracket - from)] = bytes;
      }
    } else if (body) {
      for (const auto& [name, bytes] : common) {
        if (line.find(name) != std::string::npos && used.insert(kernel + name).second) {
          all[kernel].static_shared += bytes;
        }
      }
    }
  }
}

// "sm_90a" of a PTX text
std::string target_of(const std::string& ptx) {
  const size_t at = ptx.find(".target ");
  if (at == std::string::npos) return "";
  const size_t from = at + 8;
  return ptx.substr(from, ptx.find_first_of(", \r\n", from) - from);
}

// One architecture of a fat binary.
struct Code {
  std::string target;           // "sm_90a"; of the PTX
  std::string ptx;              // may be empty
  const char* cubin = nullptr;  // may be null

  // Code of an architecture with a letter runs on that one only.
  bool specific() const { return !target.empty() && isalpha(uint8_t(target.back())); }
};

struct FatBinary {
  std::map<int, Code> codes;  // by the number of the architecture
  bool compressed = false;
};

// Wrapper: magic, version, data. Data: magic, version, header size, size; then parts with kind,
// header size at 4, size at 8, architecture at 28, and their size if compressed at 16.
FatBinary read_fat_binary(const void* wrapper) {
  enum Kind : uint16_t { kPtx = 1, kCubin = 2 };
  FatBinary all;
  const char* data = read<const char*>(static_cast<const char*>(wrapper) + 8);
  const char* end = data + read<uint16_t>(data + 6) + read<uint64_t>(data + 8);
  for (const char* part = data + read<uint16_t>(data + 6); part < end;) {
    const auto kind = read<uint16_t>(part);
    const char* content = part + read<uint32_t>(part + 4);
    const auto size = read<uint64_t>(part + 8);
    const int architecture = int(read<uint32_t>(part + 28));
    if (read<uint32_t>(part + 16)) {
      all.compressed = true;
    } else if (kind == kPtx) {
      Code& code = all.codes[architecture];
      code.ptx.assign(content, strnlen(content, size));
      code.target = target_of(code.ptx);
    } else if (kind == kCubin) {
      all.codes[architecture].cubin = content;
    }
    part = content + size;
  }
  return all;
}

// The architecture whose code the device would run, or 0.
int chosen(const FatBinary& all, int capability) {
  int binary = 0, text = 0;
  for (const auto& [number, code] : all.codes) {  // in rising order
    if (code.specific() ? number != capability : number > capability) continue;
    if (code.cubin && number / 10 == capability / 10) binary = number;
    if (!code.ptx.empty()) text = number;
  }
  return binary ? binary : text;
}

}  // namespace

void Image::parse() const {
  if (parsed_) return;
  parsed_ = true;
  const FatBinary all = read_fat_binary(wrapper_);
  architecture_ = chosen(all, capability_);
  if (!architecture_) {
    std::string there;
    for (const auto& [number, code] : all.codes) {
      there += (there.empty() ? "" : ", ") +
               (code.target.empty() ? "sm_" + std::to_string(number) : code.target);
    }
    missing_ = all.compressed
                   ? "its device code is compressed: build with nvcc --compress-mode=none"
                   : "no code for sm_" + std::to_string(capability_) + ", only for " +
                         (there.empty() ? "none" : there);
    return;
  }
  const Code& code = all.codes.at(architecture_);
  const bool is_binary = code.cubin && architecture_ / 10 == capability_ / 10;
  binary_version_ = is_binary ? architecture_ : capability_;
  if (code.ptx.empty()) {
    missing_ = "a GPU would run the cubin of sm_" + std::to_string(architecture_) +
               ", whose PTX is not there: build with code=[compute_NN,sm_NN]";
    return;
  }
  if (code.cubin) {
    read_cubin(code.cubin, facts_);
  } else {
    read_ptx(code.ptx, facts_);
  }
  module_ = std::make_unique<ptx::Module>(code.ptx);
}

const KernelFacts& Image::facts(const std::string& kernel) const {
  parse();
  return facts_[kernel];
}

ptx::Module* Image::module() const {
  parse();
  return module_.get();
}

std::string Image::what_is_missing() const {
  parse();
  return missing_;
}

}  // namespace softgpu
