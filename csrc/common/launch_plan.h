// How a batch normalisation is cut into blocks of threads on a GPU: host code that knows nothing of CUDA or torch, so
// that it is tested without either (tests/ops/test_launch_plan.py).
//
// Both layouts are rows of vectors of 16 bytes. A block covers `threads_x` vectors side by side and walks down a chunk
// of rows, `threads_y` at a time.
//
// channels_last: a row is as many pixels as make whole mask words, so that vectors are aligned whatever the number of
// channels; the last row may be partial. A column of the matrix belongs to one channel.
// contiguous: a row is one plane, padded to whole mask words, and every channel has its own rows. A block takes them as
// one sequence of vectors (threads_x = 1), so that a chunk may begin within a plane.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace fusedres {

constexpr int kVectorBytes = 16;
constexpr int kMaskWord = 16;  // bits

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct PlanProblem {
  bool channels_last;
  int64_t batch, channels, area;
  int element_bytes;
  int norms;     // 1, or 2 for the sum of two normalisations
  int training;  // how many of them use the batch's statistics
  bool backward;
};

struct PlanDevice {
  int sms;
  int64_t l2_bytes;
  int64_t shared_bytes;  // the most that one block may have
};

// The geometry that kernels walk.
struct Tiles {
  int vector;  // elements in 16 bytes
  int64_t channels, area, numel;
  int64_t rows;         // channels_last: of the matrix; contiguous: planes of one channel
  int64_t row_length;   // elements of a row that exist
  int64_t row_vectors;  // vectors of a row, the padding of a plane included
  int64_t columns;      // sums per quantity and chunk: row_length, or the channels
  int64_t tiles;        // blocks side by side; contiguous: the channels
  int threads_x, threads_y;
  int64_t step_rows, step_vectors;  // contiguous: threads_y vectors further on

  int threads() const { return threads_x * threads_y; }
};

// One pass over the tensors: `chunks` chunks of `chunk` rows (contiguous: of `chunk` vectors of a channel).
struct Pass {
  int64_t chunk, chunks;
  int64_t shared_bytes;  // dynamic shared memory of a block
};

struct LaunchPlan {
  Tiles tiles;
  bool one_pass;     // one block per tile keeps its slab in shared memory between the sums and their use
  int slab_vectors;  // one_pass: per thread and tensor
  Pass reduce, apply;
  int finish_threads;       // of a block between the two
  bool reverse;             // the second pass takes the tiles in reverse: what the first one read last is still in L2
  bool fits_l2;             // the second pass finds all that the first one read there
  int64_t partial_bytes;    // of the workspace: partial sums
  int64_t workspace_bytes;  // all of it
};

constexpr int kFinishThreadsX = 8;  // channels of a block that finishes sums
constexpr int kMaxFinishThreads = 1024;
constexpr int64_t finish_blocks(int64_t channels) { return ceil_div(channels, kFinishThreadsX); }

namespace plan {

constexpr int kThreads = 128;
constexpr int kOnePassThreads = 512;
constexpr int kMaxThreadsX = 16;
// Vectors per thread that are in flight together; rows per thread come in multiples of it.
constexpr int kForwardUnroll = 4, kBackwardUnroll = 2, kPairUnroll = 1;
// Sums in the compute type are at most this long, so that their error does not grow with the tensor.
constexpr int64_t kMaxReduceRows = 64;
constexpr int64_t kMaxApplyRows = 32;
// Blocks that an SM runs at a time: what the kernels' registers allow, by their launch bounds.
constexpr int kStatisticsBlocks = 5, kBlocks = 6, kPairBlocks = 4;
// With few blocks a slab must be small, or the rest of the GPU waits for them.
constexpr int64_t kSmallSlabBytes = 64 * 1024;
constexpr int kFewBlocks = 5;  // fewer than one block per this many SMs

inline int64_t power_of_two_from(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// The widest block with few idle threads at the right edge, else the one with fewest.
inline int choose_threads_x(int64_t row_vectors, int least) {
  int best = least;
  for (int x = kMaxThreadsX; x >= least; x /= 2) {
    const int64_t padded = ceil_div(row_vectors, x) * x;
    if (padded * 8 <= row_vectors * 9) return x;
    if (padded < ceil_div(row_vectors, best) * best) best = x;
  }
  return best;
}

// Cuts `total` rows, `step` of them at a time and at most `most` times, so that the blocks fill the GPU's `slots` as
// nearly as possible a whole number of times.
inline Pass cut(int64_t total, int64_t step, int64_t tiles, int64_t slots, int64_t most, int64_t unit) {
  const int64_t waves = ceil_div(ceil_div(total, step * most) * tiles, slots);
  const int64_t chunks = std::max<int64_t>(1, waves * slots / tiles);
  const int64_t each = std::min(most, ceil_div(ceil_div(total, step * chunks), unit) * unit);
  return {each * step, ceil_div(total, each * step), 0};
}

inline int64_t quantities(const PlanProblem& p) { return p.backward ? 1 + p.norms : 3; }

// In double: the quantities of the upper half of a block's threads, which are being added to the lower half's, and the
// totals of its columns.
inline int64_t fold_bytes(const PlanProblem& p, int threads, int lanes, int64_t block_columns) {
  const int64_t together = p.backward ? quantities(p) : 2;
  return 8 * (together * (threads / 2) * lanes + quantities(p) * block_columns);
}

// Threads of a block that adds up `entries` partial sums of each of its channels.
inline int finish_threads(int64_t entries) {
  constexpr int64_t kMost = kMaxFinishThreads / kFinishThreadsX;
  return kFinishThreadsX * static_cast<int>(std::clamp<int64_t>(power_of_two_from(ceil_div(entries, 4)), 8, kMost));
}

}  // namespace plan

// The plan for a tensor that is not empty. `may_one_pass`: false where a later launch has to see an earlier one.
inline LaunchPlan plan_launches(const PlanProblem& p, const PlanDevice& device, bool may_one_pass) {
  using namespace plan;
  const int64_t size = p.element_bytes == 8 ? 8 : 4;  // of the compute type
  LaunchPlan plan{};
  const int vector = plan.tiles.vector = kVectorBytes / p.element_bytes;
  const int byte_vectors = std::max(1, 8 / vector);  // neighbouring threads that make one byte of a mask
  Tiles& t = plan.tiles;
  t.channels = p.channels;
  t.area = p.area;
  t.numel = p.batch * p.channels * p.area;
  if (p.channels_last) {
    t.row_length = p.channels * (kMaskWord / std::gcd(p.channels, int64_t{kMaskWord}));
    t.rows = ceil_div(t.numel, t.row_length);
    t.row_vectors = t.row_length / vector;
    t.columns = t.row_length;
  } else {
    t.row_length = p.area;
    t.rows = p.batch;
    t.row_vectors = ceil_div(p.area, kMaskWord) * kMaskWord / vector;
    t.columns = p.channels;
  }
  const int lanes = p.channels_last ? vector : 1;  // channels per thread
  const int64_t height = p.channels_last ? t.rows : t.rows * t.row_vectors;
  const int parameters = p.norms * (p.backward ? 5 : 3);  // per column, in shared memory
  const int slab_tensors = p.norms + (p.backward ? 1 : 0);

  const auto arrange = [&](int threads_x, int threads) {
    t.threads_x = threads_x;
    t.threads_y = threads / threads_x;
    t.tiles = p.channels_last ? ceil_div(t.row_vectors, threads_x) : p.channels;
    t.step_rows = t.threads_y / t.row_vectors;
    t.step_vectors = t.threads_y % t.row_vectors;
    const int64_t block_columns = threads_x * lanes;
    plan.reduce.shared_bytes = fold_bytes(p, threads, lanes, block_columns);
    // The sums of a backward pass need parameters as well.
    if (p.backward) plan.reduce.shared_bytes += size * 3 * p.norms * block_columns;
    plan.apply.shared_bytes = size * parameters * block_columns;
  };
  const auto fits_one_pass = [&](int threads_x, int threads) {
    arrange(threads_x, threads);
    plan.slab_vectors = static_cast<int>(std::min<int64_t>(ceil_div(height, t.threads_y), 1 << 20));
    const int64_t slab = int64_t{plan.slab_vectors} * threads * kVectorBytes * slab_tensors;
    const int64_t shared =
        fold_bytes(p, threads, lanes, threads_x * lanes) + size * parameters * threads_x * lanes + slab;
    plan.reduce = plan.apply = {height, 1, shared};
    return shared <= device.shared_bytes && (t.tiles * kFewBlocks >= device.sms || slab <= kSmallSlabBytes);
  };
  const auto try_one_pass = [&] {
    if (!p.channels_last) {
      const int64_t threads = std::clamp<int64_t>(power_of_two_from(ceil_div(height, 4)), 32, kOnePassThreads);
      return fits_one_pass(1, static_cast<int>(threads));
    }
    if (t.row_length != p.channels) return false;  // a channel has several columns, which may lie in several blocks
    // The widest rows of a slab for which every SM has a block; else the narrowest, 32 bytes.
    const int narrowest = std::max(2, byte_vectors);
    const auto threads = [&](int x) {
      return static_cast<int>(std::clamp<int64_t>(x * power_of_two_from(ceil_div(height, 4)), 64, kOnePassThreads));
    };
    for (int x = 8; x > narrowest; x /= 2) {
      if (fits_one_pass(x, threads(x)) && t.tiles >= device.sms) return true;
    }
    return fits_one_pass(narrowest, threads(narrowest));
  };

  const int64_t read = t.numel * p.element_bytes * slab_tensors;
  plan.fits_l2 = read <= device.l2_bytes;
  plan.one_pass = may_one_pass && try_one_pass();
  if (plan.one_pass) return plan;

  plan.slab_vectors = 0;
  const int64_t threads = p.channels_last
                              ? kThreads
                              : std::clamp<int64_t>(power_of_two_from(ceil_div(height, kForwardUnroll)), 32, kThreads);
  arrange(p.channels_last ? choose_threads_x(t.row_vectors, byte_vectors) : 1, static_cast<int>(threads));
  const int unit = !p.backward ? kForwardUnroll : p.norms == 1 ? kBackwardUnroll : kPairUnroll;
  const int64_t apply_slots = int64_t{device.sms} * (p.norms == 1 ? kBlocks : kPairBlocks);
  const int64_t reduce_slots =
      p.backward ? apply_slots : int64_t{device.sms} * kStatisticsBlocks / std::max(1, p.training);
  const int64_t reduce_shared = plan.reduce.shared_bytes, apply_shared = plan.apply.shared_bytes;
  plan.reduce = cut(height, t.threads_y, t.tiles, reduce_slots, kMaxReduceRows, unit);
  plan.apply = cut(height, t.threads_y, t.tiles, apply_slots, kMaxApplyRows, unit);
  plan.reduce.shared_bytes = reduce_shared;
  plan.apply.shared_bytes = apply_shared;
  const int64_t entries = plan.reduce.chunks * (t.columns / t.channels);  // partial sums of a channel
  plan.finish_threads = finish_threads(entries);
  plan.reverse = true;
  const int64_t sets = p.backward ? 1 : p.training;  // of partial sums
  plan.partial_bytes = size * sets * quantities(p) * plan.reduce.chunks * t.columns;
  const int64_t coefficients = p.backward ? size * p.training * 2 * p.channels : 0;
  plan.workspace_bytes = plan.partial_bytes + coefficients;
  return plan;
}

}  // namespace fusedres
