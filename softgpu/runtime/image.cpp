// SPDX-License-Identifier: Apache-2.0
// Registers, static shared memory, thread limit and parameters of kernels, from uncompressed cubins
// (nvcc --compress-mode=none) in a fat binary; without one from its PTX, which knows no registers.
#include <elf.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <sstream>

#include "runtime/runtime.h"

namespace softgpu {
namespace {

template <class T>
T read(const char* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

constexpr int kReservedShared = 1024;  // the system's, at the start of every block's shared memory
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
  for (const Elf64_Shdr& s : sections) {
    const std::string name = names + s.sh_name;
    if (const auto kernel = suffix(name, ".nv.shared."); !kernel.empty()) {
      all[kernel].static_shared = std::max(0, int(s.sh_size) - kReservedShared);
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

// The number of "sm_90a" if a device of this capability runs its code, else 0: PTX runs on newer
// devices too, that of an architecture with a letter on this one only.
int usable(const std::string& target, int capability) {
  if (target.rfind("sm_", 0) != 0) return 0;
  const int number = atoi(target.c_str() + 3);
  const bool specific = isalpha(static_cast<unsigned char>(target.back()));
  return (specific ? number == capability : number <= capability) ? number : 0;
}

}  // namespace

void Image::parse() const {
  if (parsed_) return;
  parsed_ = true;
  // Wrapper: magic, version, data. Data: magic, version, header size, size; then parts with kind,
  // header size at 4, size at 8, size if compressed at 16, architecture at 28.
  const char* data = read<const char*>(static_cast<const char*>(wrapper_) + 8);
  const char* first = data + read<uint16_t>(data + 6);
  const char* end = first + read<uint64_t>(data + 8);
  const auto each_part = [&](auto f) {
    for (const char* part = first; part < end;) {
      const auto header = read<uint32_t>(part + 4);
      const auto size = read<uint64_t>(part + 8);
      if (read<uint32_t>(part + 16)) {
        compressed_ = true;
      } else {
        f(read<uint16_t>(part), int(read<uint32_t>(part + 28)), part + header, size);
      }
      part += header + size;
    }
  };
  int best = 0;
  std::string text;
  each_part([&](int kind, int, const char* p, size_t size) {
    if (kind != 1) return;
    const std::string ptx(p, strnlen(p, size));
    const std::string target = target_of(ptx);
    targets_ += (targets_.empty() ? "" : ", ") + target;
    if (const int number = usable(target, capability_); number > best) best = number, text = ptx;
  });
  each_part([&](int kind, int architecture, const char* p, size_t) {
    if (kind == 2 && architecture == best) read_cubin(p, facts_);
  });
  if (facts_.empty()) read_ptx(text, facts_);
  if (best) module_ = std::make_unique<ptx::Module>(text);
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
  if (compressed_) return "its device code is compressed: build with nvcc --compress-mode=none";
  return "no code for this device, only for " + (targets_.empty() ? "none" : targets_);
}

}  // namespace softgpu
