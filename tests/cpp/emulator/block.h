/// @file
/// The threads of a thread block on one host thread, for code that works by the warp or the block.
///
/// Each is a fiber that runs until it meets an instruction of its warp, or a barrier of the block, where others are
/// still missing. Who runs when is
/// fixed by `Order`: results are reproducible. What would hang or be undefined on the device, threads that come to
/// different instructions or not at all, is an exception.
#pragma once

#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

/// Of the running thread; y and z are 0.
inline uint3 threadIdx{};

namespace sparse24::emulate {

/// Which of the threads that can go on does so first.
enum class Order {
  kForward,   ///< those of the first warp, as long as one of them can
  kBackward,  ///< those of the last warp
  kInTurn,    ///< each, up to where it next waits: warps and warpgroups keep abreast
};
inline constexpr Order kOrders[] = {Order::kForward, Order::kBackward, Order::kInTurn};

class Block {
 public:
  using Lanes = std::array<uint32_t, 32>;

  /// Threads `first` .. `first + count - 1` of the block, whole warps.
  Block(int first, int count, Order order) : first_(first), order_(order), fibers_(count), warps_(count / 32) {
    if (first % 32 != 0 || count % 32 != 0) throw std::runtime_error("expected whole warps");
  }

  /// Calls `thread` once for each, until all have returned.
  void run(const std::function<void()>& thread) {
    thread_ = &thread;
    running_block() = this;
    for (Fiber& fiber : fibers_) start(fiber);
    while (std::any_of(fibers_.begin(), fibers_.end(), [](const Fiber& fiber) { return !fiber.done; })) {
      bool moved = false;
      for (size_t warp = 0; warp < warps_.size(); ++warp) {
        const size_t first = 32 * (order_ == Order::kBackward ? warps_.size() - 1 - warp : warp);
        while (run_warp(first)) {
          moved = true;
          if (order_ == Order::kInTurn) break;
        }
      }
      if (!moved) throw std::runtime_error(who_waits());
    }
  }

  /// The block of the running thread.
  static Block& current() { return *running_block(); }

  /// An instruction of the whole warp, the same with the same immediate argument in each lane: all lanes' values.
  const Lanes& exchange(std::string_view instruction, int immediate, uint32_t value) {
    Meeting& warp = warps_[running_ / 32];
    // Two sets: a lane that goes on may come to the next instruction before the others have read this one's values.
    Lanes& lanes = warp.lanes[warp.round % 2];
    lanes[running_ % 32] = value;
    meet(warp, 32, instruction, immediate);
    return lanes;
  }
  /// A barrier of all threads. Unlike the device's it does not do without those that have returned.
  void synchronize() { meet(all_, static_cast<int>(fibers_.size()), "bar.sync", 0); }

 private:
  static constexpr size_t kStackBytes = 256 << 10;

  struct Meeting {
    std::string_view instruction;
    int immediate = 0;
    int arrived = 0;
    uint64_t round = 0;  // how often all have come
    std::array<Lanes, 2> lanes{};
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Meeting* at = nullptr;  // where it waits for the end of `round`
    uint64_t round = 0;
    bool done = false;
  };

  static Block*& running_block() {
    static Block* block = nullptr;
    return block;
  }

  void start(Fiber& fiber) {
    fiber.stack.reset(new char[kStackBytes]);  // not initialised: only what is used becomes resident
    fiber.at = nullptr;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, [] { current().run_thread(); }, 0);
  }
  /// Resumes each of the threads first .. first + 31 that can go on; true if there was one.
  bool run_warp(size_t first) {
    bool moved = false;
    for (size_t lane = 0; lane < 32; ++lane) {
      running_ = first + (order_ == Order::kBackward ? 31 - lane : lane);
      Fiber& fiber = fibers_[running_];
      if (fiber.done || (fiber.at && fiber.at->round == fiber.round)) continue;
      threadIdx.x = static_cast<unsigned>(first_) + static_cast<unsigned>(running_);
      swapcontext(&scheduler_, &fiber.context);
      moved = true;
      if (error_) std::rethrow_exception(error_);
    }
    return moved;
  }
  void run_thread() {
    const size_t self = running_;
    try {
      (*thread_)();
    } catch (...) {
      error_ = std::current_exception();
    }
    fibers_[self].done = true;
  }

  void meet(Meeting& meeting, int expected, std::string_view instruction, int immediate) {
    if (meeting.arrived == 0) {
      meeting.instruction = instruction;
      meeting.immediate = immediate;
    } else if (meeting.instruction != instruction || meeting.immediate != immediate) {
      std::ostringstream text;
      text << "thread " << threadIdx.x << " is at " << instruction << " " << immediate << ", others at "
           << meeting.instruction << " " << meeting.immediate;
      throw std::runtime_error(text.str());
    }
    Fiber& self = fibers_[running_];
    self.at = &meeting;
    self.round = meeting.round;
    if (++meeting.arrived < expected) {
      swapcontext(&self.context, &scheduler_);
    } else {
      meeting.arrived = 0;
      ++meeting.round;
    }
  }

  std::string who_waits() const {
    std::ostringstream text;
    text << "threads wait for others that never come:";
    for (size_t i = 0; i < fibers_.size(); ++i) {
      const Fiber& fiber = fibers_[i];
      if (fiber.done) continue;
      text << " " << first_ + static_cast<int>(i) << " at " << fiber.at->instruction << " " << fiber.at->immediate
           << ",";
    }
    return text.str();
  }

  int first_;
  Order order_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_;
  Meeting all_;
  ucontext_t scheduler_;
  size_t running_ = 0;
  const std::function<void()>* thread_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace sparse24::emulate
