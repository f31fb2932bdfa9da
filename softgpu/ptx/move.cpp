// SPDX-License-Identifier: Apache-2.0
// mov: between registers, and between a register and the parts of a vector.
#include "ptx/lanes.h"
#include "ptx/opcode.h"

namespace ptx {
namespace {

PTX_UNARY(Move, a);

void move_predicate(Warp& w, const Instruction& i) { w.set_predicate(i.o[0], w.predicate(i.o[1])); }

void pack(Warp& w, const Instruction& i) {
  const int n = int(i.o.size()) - 1, bytes = i.o[0].size / n;
  each(w.mask, [&](int l) {
    unsigned char* to = w.file + i.o[0].at + l * i.o[0].size;
    for (int p = 0; p < n; ++p) {
      const u64 part = w.lane_value(i.o[1 + p], l);
      memcpy(to + p * bytes, &part, size_t(bytes));
    }
  });
}
void unpack(Warp& w, const Instruction& i) {
  const int n = int(i.o.size()) - 1, bytes = i.o[n].size / n;
  each(w.mask, [&](int l) {
    unsigned char whole[16];  // a part may be the register itself
    memcpy(whole, w.file + i.o[n].at + l * i.o[n].size, i.o[n].size);
    for (int p = 0; p < n; ++p) {
      u64 part = 0;
      memcpy(&part, whole + p * bytes, size_t(bytes));
      put(w, i.o[p], l, part);
    }
  });
}

// The clock of a block counts its instructions.
void read_clock(Warp& w, const Instruction& i) {
  const u64 now = w.block->clock + w.steps;
  each(w.mask, [&](int l) { put(w, i.o[0], l, i.mode ? now >> 32 : now); });
}

}  // namespace

Handler move(const Opcode& op, Instruction& i) {
  const std::string_view t = op.type();
  if (t == "pred") return &move_predicate;
  if (i.count == 0) return &read_clock;  // the parser found a clock; mode: its upper half
  if (i.o.size() > 2) {
    const bool packs = i.mode;  // the parser saw where the vector is
    const Operand& whole = packs ? i.o.front() : i.o.back();
    if (whole.size % (i.o.size() - 1)) return nullptr;
    i.outputs = packs ? 1 : uint8_t(i.o.size() - 1);
    return packs ? &pack : &unpack;
  }
  if (i.o[0].size != i.o[1].size) throw Error("a move between sizes");
  if (t == "b128") return &unary<Move, u128, u128>;
  return PTX_FOR(PTX_TYPES(PTX_BITS, PTX_FLOATS, s16, s32, s64), t, &unary<Move, T, T>);
}

}  // namespace ptx
