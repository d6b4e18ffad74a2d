// Runs a kernel block by block: every CUDA thread is a fiber, which runs until it meets a warp-wide operation, a
// barrier or its end. Then another one does: threads take turns in an order that the environment sets, so that a result
// which depends on it (a barrier is missing) differs from order to order.
#pragma once

#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" __attribute__((visibility("hidden"))) char __start_host_cuda_shared[], __stop_host_cuda_shared[];

namespace host_cuda {

constexpr unsigned kWarpSize = 32;

// Uninitialised memory: NaN in every floating type.
constexpr unsigned char kPoison = 0xff;

// The order in which things take turns: HOST_CUDA_ORDER=forward, reverse, or a number that seeds arbitrary rotations.
class Order {
 public:
  Order() {
    const char* order = std::getenv("HOST_CUDA_ORDER");
    if (order == nullptr) order = "1";
    arbitrary_ = std::strcmp(order, "forward") != 0 && std::strcmp(order, "reverse") != 0;
    backwards_ = std::strcmp(order, "reverse") == 0;
    random_ = arbitrary_ ? std::strtoul(order, nullptr, 10) : 0;
  }

  // Calls f with every number below n, once.
  template <typename F>
  void visit(unsigned n, const F& f) {
    unsigned first = 0;
    bool backwards = backwards_;
    if (arbitrary_) {
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      first = static_cast<unsigned>(random_ >> 34) % n;
      backwards = random_ >> 33 & 1;
    }
    for (unsigned i = 0; i < n; ++i) {
      const unsigned next = first + i < n ? first + i : first + i - n;
      f(backwards ? n - 1 - next : next);
    }
  }

 private:
  bool arbitrary_, backwards_;
  uint64_t random_;
};

// Dynamic shared memory of exactly the size that a launch asks for, between zones that no kernel may touch.
class DynamicMemory {
 public:
  explicit DynamicMemory(size_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, bytes + kZone) != 0) throw std::bad_alloc();
    memory_.reset(static_cast<unsigned char*>(memory));
    std::memset(memory_.get() + bytes, kZoneValue, kZone);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory_.get() + bytes, kZone);
#endif
  }
  DynamicMemory(const DynamicMemory&) = delete;
  ~DynamicMemory() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_.get() + bytes_, kZone);
#endif
  }

  void* get() const { return memory_.get(); }
  void poison() { std::memset(memory_.get(), kPoison, bytes_); }
  void check() const {
#if !defined(__SANITIZE_ADDRESS__)
    for (size_t i = 0; i < kZone; ++i) {
      if (memory_.get()[bytes_ + i] != kZoneValue) throw std::runtime_error("write beyond dynamic shared memory");
    }
#endif
  }

 private:
  static constexpr size_t kAlignment = 128, kZone = 256;
  static constexpr unsigned char kZoneValue = 0xa5;
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  size_t bytes_;
  std::unique_ptr<unsigned char, Free> memory_;
};

// A place in the source where threads wait for each other.
struct Place {
  const char* operation;
  unsigned line;
  bool operator==(const Place& other) const {
    return line == other.line && std::strcmp(operation, other.operation) == 0;
  }
  std::string text() const { return std::string(operation) + " in line " + std::to_string(line); }
};

struct Thread {
  enum State { kReady, kInWarp, kAtBarrier, kEnded };
  Fiber fiber;
  State state;
  Place place;      // where it waits
  unsigned mask;    // of the lanes that a warp-wide operation names
  int source;       // the lane whose value it wants, or kBallot
  uint64_t offer;   // its own value
  uint64_t result;  // what it got
};

constexpr int kBallot = -1;

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  void launch(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& kernel) {
    gridDim = grid;
    blockDim = block;
    count_ = block.x * block.y * block.z;
    while (threads_.size() < count_) threads_.push_back(std::make_unique<Thread>());
    order_ = Order();
    DynamicMemory memory(dynamic_bytes);
    dynamic_ = memory.get();
    const auto run_block = [&](unsigned x, unsigned y, unsigned z) {
      blockIdx = dim3(x, y, z);
      poison_static_memory();
      memory.poison();
      run(kernel);
      memory.check();
    };
    order_.visit(grid.z, [&](unsigned z) {
      order_.visit(grid.y, [&](unsigned y) { order_.visit(grid.x, [&](unsigned x) { run_block(x, y, z); }); });
    });
  }

  void* dynamic_memory() const { return dynamic_; }
  unsigned lane() const { return running_ % kWarpSize; }

  // Offers a value to the lanes in the mask and takes that of lane `source`, or with kBallot one bit per lane.
  uint64_t in_warp(Place place, unsigned mask, uint64_t offer, int source) {
    Thread& thread = *threads_[running_];
    thread.mask = mask;
    thread.source = source;
    return wait(Thread::kInWarp, place, offer);
  }

  // Returns how many threads of the block came with a value other than zero.
  unsigned at_barrier(Place place, bool value) { return static_cast<unsigned>(wait(Thread::kAtBarrier, place, value)); }

 private:
  uint64_t wait(Thread::State state, Place place, uint64_t offer) {
    Thread& thread = *threads_[running_];
    thread.place = place;
    thread.offer = offer;
    thread.state = state;
    thread.fiber.leave();
    return thread.result;
  }

  void run(const std::function<void()>& kernel) {
    for (unsigned t = 0; t < count_; ++t) {
      threads_[t]->fiber.start(kernel);
      threads_[t]->state = Thread::kReady;
    }
    const unsigned warps = (count_ + kWarpSize - 1) / kWarpSize;
    do {
      order_.visit(warps, [&](unsigned warp) { run_warp(warp * kWarpSize); });
    } while (pass_barrier());
  }

  // Until all threads of the warp have ended or wait at the block's barrier.
  void run_warp(unsigned begin) {
    const unsigned lanes = std::min(count_ - begin, kWarpSize);
    do {
      order_.visit(lanes, [&](unsigned lane) { resume(begin + lane); });
    } while (exchange(begin, lanes));
  }

  void resume(unsigned t) {
    Thread& thread = *threads_[t];
    if (thread.state != Thread::kReady) return;
    running_ = t;
    threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    thread.fiber.enter();
    if (thread.fiber.ended()) thread.state = Thread::kEnded;
  }

  // Completes the operations of a warp for which all lanes have come. False if none of its threads wait for one.
  bool exchange(unsigned begin, unsigned lanes) {
    unsigned waiting = 0, ended = ~0u << (lanes - 1) << 1;  // lanes that the block does not have count as ended
    for (unsigned lane = 0; lane < lanes; ++lane) {
      waiting |= unsigned{threads_[begin + lane]->state == Thread::kInWarp} << lane;
      ended |= unsigned{threads_[begin + lane]->state == Thread::kEnded} << lane;
    }
    unsigned left = waiting;
    while (left != 0) {
      const unsigned first = __builtin_ctz(left);
      const Thread& leader = *threads_[begin + first];
      const unsigned group = leader.mask & ~ended;
      if (!(group >> first & 1)) fail(leader, "its mask lacks the lane that calls it");
      const bool complete = (group & ~waiting) == 0 && is_same(begin, group, leader);
      if (complete) complete_exchange(begin, group);
      left &= complete ? ~group : ~(1u << first);
      if (complete) waiting &= ~group;
    }
    // Those that still wait may do so for lanes that now go on, but not if there are none.
    bool any_ready = false;
    for (unsigned lane = 0; lane < lanes; ++lane) any_ready |= threads_[begin + lane]->state == Thread::kReady;
    if (waiting != 0 && !any_ready) {
      fail(*threads_[begin + __builtin_ctz(waiting)], "lanes that its mask names do not take part");
    }
    return any_ready;
  }

  bool is_same(unsigned begin, unsigned group, const Thread& leader) const {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!(group >> lane & 1)) continue;
      const Thread& thread = *threads_[begin + lane];
      if (thread.mask != leader.mask || !(thread.place == leader.place)) return false;
    }
    return true;
  }

  void complete_exchange(unsigned begin, unsigned group) {
    uint64_t ballot = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (group >> lane & 1) ballot |= uint64_t{threads_[begin + lane]->offer != 0} << lane;
    }
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!(group >> lane & 1)) continue;
      Thread& thread = *threads_[begin + lane];
      if (thread.source != kBallot && !(group >> thread.source & 1)) {
        fail(thread, "it reads a lane that does not take part");
      }
      thread.result = thread.source == kBallot ? ballot : threads_[begin + thread.source]->offer;
      thread.state = Thread::kReady;
    }
  }

  // Lets all threads go on from the barrier at which they are. False if all have ended.
  bool pass_barrier() {
    unsigned ended = 0, votes = 0;
    const Thread* waiting = nullptr;
    for (unsigned t = 0; t < count_; ++t) {
      const Thread& thread = *threads_[t];
      if (thread.state == Thread::kEnded) {
        ++ended;
        continue;
      }
      if (waiting != nullptr && !(thread.place == waiting->place)) {
        fail(thread, "other threads of the block are at " + waiting->place.text());
      }
      waiting = &thread;
      votes += thread.offer != 0;
    }
    if (waiting == nullptr) return false;
    if (ended > 0) fail(*waiting, std::to_string(ended) + " threads of the block have ended");
    for (unsigned t = 0; t < count_; ++t) {
      threads_[t]->result = votes;
      threads_[t]->state = Thread::kReady;
    }
    return true;
  }

  [[noreturn]] void fail(const Thread& thread, const std::string& why) const {
    unsigned t = 0;
    while (threads_[t].get() != &thread) ++t;
    throw std::runtime_error("thread " + std::to_string(t) + " at " + thread.place.text() + ": " + why);
  }

  // Between the variables AddressSanitizer has zones that memset would not enter.
  __attribute__((no_sanitize_address, optimize("no-tree-loop-distribute-patterns"))) static void
  poison_static_memory() {
#if defined(__SANITIZE_ADDRESS__)
    for (char* byte = __start_host_cuda_shared; byte < __stop_host_cuda_shared; ++byte) *byte = kPoison;
#else
    std::memset(__start_host_cuda_shared, kPoison, __stop_host_cuda_shared - __start_host_cuda_shared);
#endif
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  unsigned count_ = 0;    // threads of the block
  unsigned running_ = 0;  // the one that does
  Order order_;
  void* dynamic_ = nullptr;
};

}  // namespace host_cuda
