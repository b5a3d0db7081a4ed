// Happens-before, by vector clocks.
//
// Within a block, every barrier of all threads begins an epoch: whatever was done in an earlier epoch of the block
// happened before. Within an epoch, only lanes of a warp can order what they do, by `bar.warp.sync`: each lane has a
// clock, which advances when others have learned of it, and knows the others' clocks. Knowledge of other blocks is
// passed on by releasing and acquiring the same address.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>

#include "program.h"

namespace ptx {

using Row = std::array<uint32_t, kLanes>;

struct BlockKnowledge {
  uint32_t epoch = 0;        // all of its earlier epochs are known
  std::map<int, Row> warps;  // and of these warps what the lanes did up to these clocks
};
using Knowledge = std::map<int64_t, BlockKnowledge>;  // by block
using KnowledgePointer = std::shared_ptr<const Knowledge>;

// When a thread accessed memory, and by which instruction.
struct Stamp {
  int64_t block = -1;
  int32_t warp = 0;
  int32_t lane = 0;
  uint32_t epoch = 0;
  uint32_t clock = 0;
  int32_t pc = -1;
  bool strong = false;
};

inline KnowledgePointer join(const KnowledgePointer& one, const KnowledgePointer& other) {
  if (!other || one == other) return one;
  if (!one) return other;
  auto joined = std::make_shared<Knowledge>(*one);
  for (const auto& [block, knowledge] : *other) {
    BlockKnowledge& target = (*joined)[block];
    target.epoch = std::max(target.epoch, knowledge.epoch);
    for (const auto& [warp, row] : knowledge.warps) {
      Row& clocks = target.warps[warp];
      for (int lane = 0; lane < kLanes; ++lane) clocks[lane] = std::max(clocks[lane], row[lane]);
    }
  }
  return joined;
}

// The clocks of a warp's lanes.
struct WarpClocks {
  std::array<Row, kLanes> rows{};  // [who knows][whose clock]
  std::array<KnowledgePointer, kLanes> others;

  WarpClocks() {
    for (int lane = 0; lane < kLanes; ++lane) rows[lane][lane] = 1;
  }

  void advance(int lane) { ++rows[lane][lane]; }

  // The lanes of the mask learn what each of them knows.
  void synchronize(uint32_t mask) {
    Row joined{};
    KnowledgePointer other;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int i = 0; i < kLanes; ++i) joined[i] = std::max(joined[i], rows[lane][i]);
      other = join(other, others[lane]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      rows[lane] = joined;
      others[lane] = other;
      advance(lane);
    }
  }

  // Whether a thread of this warp knows of an access. `block` and `epoch` are the warp's own.
  bool knows(const Stamp& stamp, int64_t block, uint32_t epoch, int warp, int lane) const {
    if (stamp.block == block) {
      if (stamp.epoch < epoch) return true;
      return stamp.warp == warp && rows[lane][stamp.lane] >= stamp.clock;
    }
    if (!others[lane]) return false;
    const auto found = others[lane]->find(stamp.block);
    if (found == others[lane]->end()) return false;
    if (stamp.epoch < found->second.epoch) return true;
    const auto row = found->second.warps.find(stamp.warp);
    return row != found->second.warps.end() && row->second[stamp.lane] >= stamp.clock;
  }

  // What a release by the lane passes on.
  KnowledgePointer release(int64_t block, uint32_t epoch, int warp, int lane) {
    auto own = std::make_shared<Knowledge>();
    (*own)[block] = {epoch, {{warp, rows[lane]}}};
    advance(lane);
    return join(own, others[lane]);
  }
};

}  // namespace ptx
