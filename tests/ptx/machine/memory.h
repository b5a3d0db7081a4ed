// Shared and global memory: bounds, races, and what other blocks do not see yet.
#pragma once

#include <cstring>
#include <functional>
#include <random>
#include <unordered_map>

#include "clocks.h"

namespace ptx {

// Who accesses memory.
struct Access {
  const WarpClocks* clocks;
  int64_t block;
  uint32_t epoch;
  int warp;
  int lane;
  int32_t pc;
  bool strong;

  Stamp stamp() const { return {block, warp, lane, epoch, clocks->rows[lane][lane], pc, strong}; }
  bool knows(const Stamp& stamp) const { return clocks->knows(stamp, block, epoch, warp, lane); }
};

inline std::string describe(const Stamp& stamp) {
  return instruction(stamp.pc) + " by thread " + std::to_string(stamp.warp * kLanes + stamp.lane) + " of block " +
         std::to_string(stamp.block);
}
inline std::string describe(const Access& access) { return describe(access.stamp()); }

// Reads of a cell by lanes of a warp at the same clock.
struct Reads {
  Stamp first;
  uint32_t lanes;
};

// The last write of some bytes, and the reads since then.
struct Cell {
  Stamp write;
  std::vector<Reads> reads;

  bool written() const { return write.pc >= 0; }

  void read(const Access& access, bool checked, const char* space, uint64_t address) {
    if (!checked) return;
    if (written() && !access.knows(write) && !(access.strong && write.strong)) race(write, access, space, address);
    const Stamp stamp = access.stamp();
    // What the block did before its last barrier can no longer be part of a race with it.
    const auto is_over = [&](const Reads& entry) {
      return entry.first.block == access.block && entry.first.epoch < access.epoch;
    };
    if (!reads.empty() && is_over(reads.front()))
      reads.erase(std::remove_if(reads.begin(), reads.end(), is_over), reads.end());
    for (Reads& entry : reads) {
      const Stamp& first = entry.first;
      if (first.block != stamp.block || first.warp != stamp.warp || first.epoch != stamp.epoch ||
          first.clock != stamp.clock || first.strong != stamp.strong)
        continue;
      entry.lanes |= 1u << access.lane;
      return;
    }
    reads.push_back({stamp, 1u << access.lane});
  }

  void store(const Access& access, bool checked, const char* space, uint64_t address) {
    if (checked) {
      if (written() && !access.knows(write) && !(access.strong && write.strong)) race(write, access, space, address);
      for (const Reads& entry : reads) {
        for (int lane = 0; lane < kLanes; ++lane) {
          if (!(entry.lanes >> lane & 1)) continue;
          Stamp stamp = entry.first;
          stamp.lane = lane;
          if (!access.knows(stamp) && !(access.strong && stamp.strong)) race(stamp, access, space, address);
        }
      }
    }
    reads.clear();
    write = access.stamp();
  }

  [[noreturn]] static void race(const Stamp& one, const Access& other, const char* space, uint64_t address) {
    throw Fault("race in " + std::string(space) + " memory at " + std::to_string(address) + ": " + describe(one) +
                " and " + describe(other));
  }
};

// A block's shared memory. It starts as NaN, so that a result that depends on what nothing has written shows. Its
// addresses do not begin with 0, so that a null pointer shows.
class SharedMemory {
 public:
  static constexpr uint64_t kBase = 1024;
  static constexpr uint64_t kCellBytes = 4;

  SharedMemory(size_t bytes, bool checks_races)
      : bytes_(bytes, 0xff), cells_(bytes / kCellBytes), checked_(checks_races) {}

  void load(const Access& access, uint64_t address, int bytes, void* value) {
    const uint64_t at = check(access, address, bytes);
    for (uint64_t cell = at / kCellBytes; cell * kCellBytes < at + bytes; ++cell)
      cells_[cell].read(access, checked_, "shared", cell * kCellBytes);
    std::memcpy(value, &bytes_[at], bytes);
  }
  void store(const Access& access, uint64_t address, int bytes, const void* value) {
    const uint64_t at = check(access, address, bytes);
    for (uint64_t cell = at / kCellBytes; cell * kCellBytes < at + bytes; ++cell)
      cells_[cell].store(access, checked_, "shared", cell * kCellBytes);
    std::memcpy(&bytes_[at], value, bytes);
  }

 private:
  uint64_t check(const Access& access, uint64_t address, int bytes) const {
    if (address < kBase || address - kBase + bytes > bytes_.size())
      throw Fault("an access beyond the block's " + std::to_string(bytes_.size()) +
                  " bytes of shared memory, at byte " + std::to_string(int64_t(address - kBase)) + ": " +
                  describe(access));
    if (bytes % kCellBytes)
      throw Fault("races are told apart by 4 bytes of shared memory, and this accesses fewer: " + describe(access));
    return address - kBase;
  }

  std::vector<uint8_t> bytes_;
  std::vector<Cell> cells_;
  bool checked_;
};

// Finds the tensor with an address. Returns the bytes from there to its end, or 0.
using Extent = uint64_t (*)(uint64_t address);

// A block's writes to global memory that others may not see yet.
struct BlockView {
  struct Write {
    uint16_t value;
    Stamp stamp;
  };
  std::unordered_map<uint64_t, Write> pending;
};

// Global memory, at the addresses of the process. Weak writes reach the other blocks at random, some time after the
// block's end, or by a release that they happened before. A weak read may give the value before the last write, unless
// that happened before the read.
class GlobalMemory {
 public:
  static constexpr uint64_t kCellBytes = 2;
  static constexpr uint64_t kPageCells = 1024;

  GlobalMemory(Extent extent, bool checks_races, bool delays, std::mt19937& random)
      : extent_(extent), checked_(checks_races), delays_(delays), random_(random) {}

  int64_t changes = 0;  // of what all blocks see

  void load(const Access& access, Order order, BlockView& view, WarpClocks& clocks, uint64_t address, int bytes,
            void* value) {
    check(access, address, bytes);
    for (uint64_t at = address; at < address + bytes; at += kCellBytes) {
      Cell& accessed = cell(at);
      accessed.read(access, checked_, "global", at);
      uint16_t part;
      if (order == Order::kWeak && delays_) {
        part = weak(view, at, accessed.written() && !access.knows(accessed.write));
      } else {
        publish_one(view, at);
        std::memcpy(&part, reinterpret_cast<const void*>(at), kCellBytes);
      }
      std::memcpy(static_cast<char*>(value) + (at - address), &part, kCellBytes);
    }
    if (order != Order::kSynchronizing) return;
    const auto released = released_.find(address);
    if (released != released_.end()) clocks.others[access.lane] = join(clocks.others[access.lane], released->second);
  }

  void store(const Access& access, Order order, BlockView& view, WarpClocks& clocks, uint64_t address, int bytes,
             const void* value) {
    check(access, address, bytes);
    for (uint64_t at = address; at < address + bytes; at += kCellBytes) cell(at).store(access, checked_, "global", at);
    if (order == Order::kWeak) {
      if (!released_.empty()) released_.erase(address);
      for (uint64_t at = address; at < address + bytes; at += kCellBytes) {
        BlockView::Write write{0, access.stamp()};
        std::memcpy(&write.value, static_cast<const char*>(value) + (at - address), kCellBytes);
        view.pending[at] = write;
      }
      if (!delays_ || random_() % 4 == 0)
        for (uint64_t at = address; at < address + bytes; at += kCellBytes) publish_one(view, at);
      return;
    }
    for (uint64_t at = address; at < address + bytes; at += kCellBytes) view.pending.erase(at);
    if (order == Order::kSynchronizing) {
      publish(view, [&](const Stamp& stamp) { return access.knows(stamp); });
      released_[address] = clocks.release(access.block, access.epoch, access.warp, access.lane);
    } else {
      released_.erase(address);
    }
    std::memcpy(reinterpret_cast<void*>(address), value, bytes);
    ++changes;
  }

  // Relaxed, so that what was released at the address stays released.
  uint64_t add(const Access& access, BlockView& view, uint64_t address, int bytes, uint64_t value) {
    check(access, address, bytes);
    for (uint64_t at = address; at < address + bytes; at += kCellBytes) {
      cell(at).store(access, checked_, "global", at);
      publish_one(view, at);
    }
    uint64_t before = 0;
    std::memcpy(&before, reinterpret_cast<const void*>(address), bytes);
    const uint64_t after = before + value;
    std::memcpy(reinterpret_cast<void*>(address), &after, bytes);
    ++changes;
    return before;
  }

  void publish(BlockView& view, const std::function<bool(const Stamp&)>& which) {
    for (auto write = view.pending.begin(); write != view.pending.end();) {
      if (!which(write->second.stamp)) {
        ++write;
        continue;
      }
      set(write->first, write->second.value);
      write = view.pending.erase(write);
    }
  }

 private:
  void check(const Access& access, uint64_t address, int bytes) {
    if (address >= known_first_ && address + bytes <= known_end_) return;
    const uint64_t left = extent_(address);
    if (left < uint64_t(bytes))
      throw Fault("an access outside of the tensors, " + std::to_string(bytes) + " bytes at " +
                  std::to_string(address) + ": " + describe(access));
    known_first_ = address;
    known_end_ = address + left;
  }
  Cell& cell(uint64_t address) {
    std::vector<Cell>& page = cells_[address / kCellBytes / kPageCells];
    if (page.empty()) page.resize(kPageCells);
    return page[address / kCellBytes % kPageCells];
  }
  void publish_one(BlockView& view, uint64_t address) {
    const auto write = view.pending.find(address);
    if (write == view.pending.end()) return;
    set(address, write->second.value);
    view.pending.erase(write);
  }
  void set(uint64_t address, uint16_t value) {
    void* const target = reinterpret_cast<void*>(address);
    std::memcpy(&previous_[address], target, kCellBytes);
    std::memcpy(target, &value, kCellBytes);
    ++changes;
  }
  uint16_t weak(const BlockView& view, uint64_t address, bool may_be_old) {
    const auto write = view.pending.find(address);
    if (write != view.pending.end()) return write->second.value;
    const auto previous = may_be_old ? previous_.find(address) : previous_.end();
    if (previous != previous_.end() && random_() % 2) return previous->second;
    uint16_t value;
    std::memcpy(&value, reinterpret_cast<const void*>(address), kCellBytes);
    return value;
  }

  Extent extent_;
  bool checked_;
  bool delays_;
  std::mt19937& random_;
  uint64_t known_first_ = 1;
  uint64_t known_end_ = 0;
  std::unordered_map<uint64_t, std::vector<Cell>> cells_;
  std::unordered_map<uint64_t, KnowledgePointer> released_;
  std::unordered_map<uint64_t, uint16_t> previous_;  // before the last write
};

}  // namespace ptx
