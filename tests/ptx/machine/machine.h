// Runs a kernel: lanes with program counters of their own, warps and blocks in random order.
#pragma once

#include <algorithm>
#include <memory>
#include <set>
#include <tuple>

#include "instructions.h"
#include "memory.h"

namespace ptx {

enum class State : uint8_t { kReady, kAtBarrier, kAtWarp, kEnded };

struct Settings {
  uint32_t seed;
  int32_t residents;     // blocks that run at the same time
  int32_t checks_races;  // whether a race is an error
  int32_t delays;        // whether other blocks see writes late
};

struct Warp {
  std::vector<uint64_t> registers;  // [slot][lane]
  std::array<int32_t, kLanes> pc{};
  std::array<State, kLanes> state{};
  // Sleeps of a lane since anything changed, by which it polls for what does not come.
  std::array<int64_t, kLanes> sleeps{};
  std::array<int64_t, kLanes> slept_at{};
  uint32_t present = 0;   // lanes that the block has
  bool scatters = false;  // whether diverged lanes go on in random order, or those behind first
  WarpClocks clocks;

  uint32_t lanes_in(State wanted) const {
    uint32_t lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) lanes |= uint32_t(state[lane] == wanted) << lane;
    return lanes & present;
  }
  uint64_t& value(int32_t slot, int lane) { return registers[size_t(slot) * kLanes + lane]; }
};

struct Block {
  int64_t index;
  uint32_t epoch = 0;
  std::vector<Warp> warps;
  SharedMemory shared;
  BlockView view;

  Block(int64_t index, size_t warps, size_t shared_bytes, bool checks_races)
      : index(index), warps(warps), shared(shared_bytes, checks_races) {}
};

class Launch {
 public:
  static constexpr uint64_t kParameters = 4096;  // address of the arguments
  static constexpr int kPolls = 3;               // sleeps without a change after which a lane counts as stalled
  static constexpr int64_t kMaxSteps = int64_t(1) << 28;

  Launch(const Program& program, const std::vector<Function>& functions, const Settings& settings, Extent extent,
         int64_t blocks, int32_t threads, size_t shared, const uint8_t* arguments, size_t argument_bytes)
      : program_(program),
        functions_(functions),
        settings_(settings),
        blocks_(blocks),
        threads_(threads),
        shared_(shared),
        arguments_(arguments),
        argument_bytes_(argument_bytes),
        random_(settings.seed),
        global_(extent, settings.checks_races, settings.delays, random_) {}

  // Returns the number of warps' instructions.
  int64_t run() {
    std::vector<int64_t> order(blocks_);
    for (int64_t i = 0; i < blocks_; ++i) order[i] = i;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_() % i]);
    // Long turns, short ones, or both.
    pace_ = random_() % 3;
    while (started_ < blocks_ || !resident_.empty()) {
      while (started_ < blocks_ && resident_.size() < size_t(settings_.residents)) start(order[started_++]);
      Block* block = nullptr;
      Warp* warp = nullptr;
      if (!pick(block, warp)) throw Fault("the threads wait for each other: " + waiting());
      take_turn(*block, *warp);
      finish(*block);
      publish_some();
    }
    publish_everything();
    return steps_;
  }

 private:
  void start(int64_t index) {
    auto block = std::make_unique<Block>(index, (threads_ + kLanes - 1) / kLanes, shared_, settings_.checks_races);
    for (size_t w = 0; w < block->warps.size(); ++w) {
      Warp& warp = block->warps[w];
      // What an instruction reads before anything has set it.
      warp.registers.assign(size_t(program_.slots) * kLanes, 0xdeadbeefdeadbeefull);
      warp.scatters = random_() % 4 == 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int32_t thread = int32_t(w) * kLanes + lane;
        warp.present |= uint32_t(thread < threads_) << lane;
        for (const Constant& constant : program_.constants) warp.value(constant.slot, lane) = constant.value;
        const uint64_t specials[kSpecials] = {uint64_t(thread), uint64_t(threads_), uint64_t(index), uint64_t(blocks_),
                                              uint64_t(lane)};
        for (int i = 0; i < kSpecials; ++i)
          if (program_.specials[i] >= 0) warp.value(program_.specials[i], lane) = specials[i];
      }
    }
    resident_.push_back(std::move(block));
    ++global_.changes;
  }

  bool pick(Block*& block, Warp*& warp) {
    std::vector<std::pair<Block*, Warp*>> ready;
    for (const auto& candidate : resident_)
      for (Warp& w : candidate->warps)
        if (w.lanes_in(State::kReady)) ready.emplace_back(candidate.get(), &w);
    if (ready.empty()) return false;
    std::tie(block, warp) = ready[random_() % ready.size()];
    return true;
  }

  void take_turn(Block& block, Warp& warp) {
    const uint32_t ready = warp.lanes_in(State::kReady);
    int32_t pc = std::numeric_limits<int32_t>::max();
    // Those ahead must have their turns, too: those behind may wait for them.
    if (warp.scatters || random_() % 8 == 0) {
      int skip = int(random_() % __builtin_popcount(ready));
      for (int lane = 0; lane < kLanes; ++lane)
        if (ready >> lane & 1 && skip-- == 0) pc = warp.pc[lane];
    } else {
      for (int lane = 0; lane < kLanes; ++lane)
        if (ready >> lane & 1) pc = std::min(pc, warp.pc[lane]);
    }
    uint32_t lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) lanes |= uint32_t(ready >> lane & 1 && warp.pc[lane] == pc) << lane;
    // Nothing keeps lanes together that are at the same instruction.
    if (warp.scatters && random_() % 2) {
      const uint32_t some = lanes & uint32_t(random_());
      if (some) lanes = some;
    }
    const bool diverged = lanes != ready;
    static constexpr int kTurns[3][4] = {{10000, 10000, 1000, 1000}, {1, 8, 64, 10000}, {1, 2, 4, 1000}};
    bool moved = false;
    for (int turn = kTurns[pace_][random_() % 4]; turn > 0; --turn, moved = true) {
      if (diverged && moved && program_.code[pc].joins) break;  // others may be waiting here to be joined
      if (!step(block, warp, lanes, pc)) return;
    }
    for (int lane = 0; lane < kLanes; ++lane)
      if (lanes >> lane & 1) warp.pc[lane] = pc;
  }

  static int first(uint32_t lanes) { return __builtin_ctz(lanes); }

  // Executes one instruction for lanes that are at it, and moves pc on. Returns false if the lanes have parted or wait:
  // then their own program counters are set.
  bool step(Block& block, Warp& warp, uint32_t lanes, int32_t& pc) {
    if (++steps_ > kMaxSteps) throw Fault("the kernel does not end: " + instruction(pc));
    const Instruction& i = program_.code[pc];
    uint32_t taking = lanes;
    if (i.guard >= 0) {
      for (int lane = 0; lane < kLanes; ++lane)
        if (lanes >> lane & 1 && bool(warp.value(i.guard, lane)) == bool(i.negated)) taking &= ~(1u << lane);
    }
    switch (i.kind) {
      case Kind::kArithmetic: functions_[i.function](warp.registers.data(), i.operands, taking); break;
      case Kind::kLoad:
      case Kind::kStore:
      case Kind::kAtomicAdd:
        for (int lane = 0; lane < kLanes; ++lane)
          if (taking >> lane & 1) access(block, warp, lane, pc);
        break;
      case Kind::kBranch:
        if (taking == lanes) {
          pc = i.target;
          return true;
        }
        if (taking == 0) break;
        set_state(warp, taking, State::kReady, i.target);
        set_state(warp, lanes & ~taking, State::kReady, pc + 1);
        return false;
      case Kind::kReturn:
        set_state(warp, taking, State::kEnded, pc);
        set_state(warp, lanes & ~taking, State::kReady, pc + 1);
        if (taking) {
          ++global_.changes;
          meet(block, warp);
          arrive(block);
        }
        return false;
      case Kind::kBarrier:
        if (taking != lanes)
          throw Fault("a barrier of the block with a predicate is not supported: " + instruction(pc));
        set_state(warp, lanes, State::kAtBarrier, pc);
        arrive(block);
        return false;
      case Kind::kWarpBarrier:
      case Kind::kShuffle:
        set_state(warp, taking, State::kAtWarp, pc);
        set_state(warp, lanes & ~taking, State::kReady, pc + 1);
        meet(block, warp);
        return false;
      case Kind::kSleep:
        set_state(warp, lanes, State::kReady, pc + 1);
        for (int lane = 0; lane < kLanes; ++lane) {
          if (!(taking >> lane & 1)) continue;
          warp.sleeps[lane] = warp.slept_at[lane] == global_.changes ? warp.sleeps[lane] + 1 : 0;
          warp.slept_at[lane] = global_.changes;
        }
        check_progress();
        return false;
    }
    ++pc;
    return true;
  }

  static void set_state(Warp& warp, uint32_t lanes, State state, int32_t pc) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      warp.state[lane] = state;
      warp.pc[lane] = pc;
    }
  }

  void access(Block& block, Warp& warp, int lane, int32_t pc) {
    const Instruction& i = program_.code[pc];
    const Access by{&warp.clocks,
                    block.index,
                    block.epoch,
                    int(&warp - block.warps.data()),
                    lane,
                    pc,
                    i.order != Order::kWeak || i.kind == Kind::kAtomicAdd};
    uint64_t address = warp.value(i.address, lane) + i.offset;
    if (i.space == Space::kShared) address = uint32_t(address);
    const int bytes = i.bytes * i.count;
    if (address % bytes)
      throw Fault("an address that is not a multiple of " + std::to_string(bytes) + ": " + describe(by));
    uint8_t buffer[16];
    if (i.kind == Kind::kAtomicAdd) {
      warp.value(i.operands[0], lane) = global_.add(by, block.view, address, bytes, warp.value(i.operands[1], lane));
    } else if (i.kind == Kind::kStore) {
      for (int e = 0; e < i.count; ++e) std::memcpy(buffer + e * i.bytes, &warp.value(i.operands[e], lane), i.bytes);
      if (i.space == Space::kShared) {
        block.shared.store(by, address, bytes, buffer);
      } else {
        global_.store(by, i.order, block.view, warp.clocks, address, bytes, buffer);
      }
    } else {
      if (i.space == Space::kShared) {
        block.shared.load(by, address, bytes, buffer);
      } else if (i.space == Space::kGlobal) {
        global_.load(by, i.order, block.view, warp.clocks, address, bytes, buffer);
      } else {
        if (address < kParameters || address - kParameters + bytes > argument_bytes_)
          throw Fault("a read beyond the kernel's arguments: " + describe(by));
        std::memcpy(buffer, arguments_ + (address - kParameters), bytes);
      }
      for (int e = 0; e < i.count; ++e) {
        uint64_t value = 0;
        std::memcpy(&value, buffer + e * i.bytes, i.bytes);
        const int unused = 64 - 8 * i.bytes;
        if (i.is_signed && unused) value = uint64_t(int64_t(value << unused) >> unused);
        warp.value(i.operands[e], lane) = value;
      }
    }
  }

  // Lets lanes go on that have all come to an operation of their warp.
  void meet(Block& block, Warp& warp) {
    const uint32_t waiting = warp.lanes_in(State::kAtWarp);
    const uint32_t ended = warp.lanes_in(State::kEnded) | ~warp.present;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(waiting >> lane & 1)) continue;
      const int32_t pc = warp.pc[lane];
      const Instruction& i = program_.code[pc];
      const uint32_t mask = mask_of(warp, lane);
      if (!(mask >> lane & 1)) throw Fault("a lane that is not in the mask: " + where(block, warp, lane));
      if (mask & ended) throw Fault("lanes have ended that others of their warp wait for: " + where(block, warp, lane));
      bool all = true;
      for (int other = 0; other < kLanes && all; ++other) {
        if (!(mask >> other & 1)) continue;
        if (!(waiting >> other & 1)) {
          all = false;
          continue;
        }
        const Instruction& theirs = program_.code[warp.pc[other]];
        if (theirs.kind != i.kind || theirs.function != i.function || mask_of(warp, other) != mask)
          throw Fault("lanes of a warp meet in different operations: " + where(block, warp, lane) + " and " +
                      where(block, warp, other));
      }
      if (!all) continue;
      if (i.kind == Kind::kShuffle) {
        shuffle(block, warp, mask);
      } else {
        warp.clocks.synchronize(mask);
      }
      for (int other = 0; other < kLanes; ++other)
        if (mask >> other & 1) set_state(warp, 1u << other, State::kReady, warp.pc[other] + 1);
      return;
    }
  }

  uint32_t mask_of(Warp& warp, int lane) const {
    const Instruction& i = program_.code[warp.pc[lane]];
    return uint32_t(warp.value(i.kind == Kind::kShuffle ? i.operands[4] : i.operands[0], lane));
  }

  void shuffle(const Block& block, Warp& warp, uint32_t mask) {
    std::array<uint32_t, kLanes> values{};
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const Instruction& i = program_.code[warp.pc[lane]];
      const uint32_t b = uint32_t(warp.value(i.operands[2], lane));
      const uint32_t c = uint32_t(warp.value(i.operands[3], lane));
      if (c != 31) throw Fault("a shuffle within a part of the warp is not supported: " + where(block, warp, lane));
      const int source = int((i.function ? uint32_t(lane) ^ b : b) & 31);
      if (!(mask >> source & 1))
        throw Fault("a shuffle from a lane that is not in the mask: " + where(block, warp, lane));
      values[lane] = uint32_t(warp.value(program_.code[warp.pc[source]].operands[1], source));
    }
    for (int lane = 0; lane < kLanes; ++lane)
      if (mask >> lane & 1) warp.value(program_.code[warp.pc[lane]].operands[0], lane) = values[lane];
  }

  // Lets the block's threads go on once all that have not ended are at a barrier.
  void arrive(Block& block) {
    bool any = false;
    for (const Warp& warp : block.warps) {
      const uint32_t waiting = warp.lanes_in(State::kAtBarrier);
      if ((waiting | warp.lanes_in(State::kEnded)) != warp.present) return;
      any |= waiting != 0;
    }
    if (!any) return;
    KnowledgePointer others;
    for (Warp& warp : block.warps) {
      int32_t pc = -1;
      for (int lane = 0; lane < kLanes; ++lane) {
        others = join(others, warp.clocks.others[lane]);
        if (warp.state[lane] != State::kAtBarrier) continue;
        // `bar.sync` is aligned: a warp must come to it together.
        if (pc >= 0 && warp.pc[lane] != pc)
          throw Fault("lanes of a warp meet in different barriers: " + where(block, warp, lane) + " and " +
                      instruction(pc));
        pc = warp.pc[lane];
      }
    }
    ++block.epoch;
    ++global_.changes;
    for (Warp& warp : block.warps) {
      const uint32_t waiting = warp.lanes_in(State::kAtBarrier);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (!(waiting >> lane & 1)) continue;
        warp.clocks.others[lane] = others;
        warp.clocks.advance(lane);
        set_state(warp, 1u << lane, State::kReady, warp.pc[lane] + 1);
      }
    }
  }

  void finish(Block& block) {
    for (const Warp& warp : block.warps)
      if (warp.lanes_in(State::kEnded) != warp.present) return;
    late_.push_back(std::move(block.view));
    ++global_.changes;
    resident_.erase(std::find_if(resident_.begin(), resident_.end(),
                                 [&](const auto& candidate) { return candidate.get() == &block; }));
  }

  // Throws if every thread that runs waits, or polls for what none of them will do.
  void check_progress() {
    for (const auto& block : resident_)
      for (const Warp& warp : block->warps)
        for (int lane = 0; lane < kLanes; ++lane)
          if (warp.present >> lane & 1 && warp.state[lane] == State::kReady &&
              (warp.sleeps[lane] < kPolls || warp.slept_at[lane] != global_.changes))
            return;
    // Writes come through in the end.
    publish_everything();
    if (std::any_of(resident_.begin(), resident_.end(), [&](const auto& block) {
          return std::any_of(block->warps.begin(), block->warps.end(), [&](const Warp& warp) {
            const uint32_t ready = warp.lanes_in(State::kReady);
            return ready && warp.slept_at[first(ready)] != global_.changes;
          });
        }))
      return;
    throw Fault("deadlock, with " + std::to_string(blocks_ - started_) + " blocks that have not started: " + waiting());
  }

  void publish_everything() {
    const auto any = [](const Stamp&) { return true; };
    for (const auto& block : resident_) global_.publish(block->view, any);
    for (BlockView& view : late_) global_.publish(view, any);
    late_.clear();
  }

  // Writes of blocks that have ended come through one by one.
  void publish_some() {
    if (late_.empty() || random_() % 8) return;
    const size_t which = random_() % late_.size();
    global_.publish(late_[which], [this](const Stamp&) { return random_() % 2 == 0; });
    if (late_[which].pending.empty()) late_.erase(late_.begin() + which);
  }

  std::string where(const Block& block, const Warp& warp, int lane) const {
    return instruction(warp.pc[lane]) + " by thread " + std::to_string((&warp - block.warps.data()) * kLanes + lane) +
           " of block " + std::to_string(block.index);
  }
  std::string waiting() const {
    std::string text;
    std::set<std::pair<int64_t, int32_t>> told;
    for (const auto& block : resident_)
      for (const Warp& warp : block->warps)
        for (int lane = 0; lane < kLanes; ++lane)
          if (warp.present >> lane & 1 && told.size() < 8 && told.emplace(block->index, warp.pc[lane]).second)
            text += (text.empty() ? "" : "; ") + (warp.state[lane] == State::kEnded
                                                      ? "ended at " + where(*block, warp, lane)
                                                      : where(*block, warp, lane));
    return text;
  }

  const Program& program_;
  const std::vector<Function>& functions_;
  const Settings settings_;
  const int64_t blocks_;
  const int32_t threads_;
  const size_t shared_;
  const uint8_t* const arguments_;
  const size_t argument_bytes_;
  std::mt19937 random_;
  GlobalMemory global_;
  std::vector<std::unique_ptr<Block>> resident_;
  std::vector<BlockView> late_;  // of blocks that have ended
  int64_t started_ = 0;
  int64_t steps_ = 0;
  int pace_ = 0;
};

}  // namespace ptx
