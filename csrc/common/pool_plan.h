// How the windows of a pooling, or the pixels of its input, are cut into blocks of threads on a GPU: host code that
// knows nothing of CUDA or torch.
//
// Positions form one plane per image. A block has `threads_x` vectors of channels side by side (one channel where the
// layout is contiguous, or channels are no multiple of a vector) and takes a chunk of patches of that plane, each
// `rows` x `columns` positions: `threads_w` threads along a row, and `threads_h` rows at a time.
#pragma once

#include "launch_plan.h"

namespace fusedres {

struct Patches {
  int height, width;  // positions of an image
  int rows, columns;  // of a patch
  int threads_w, threads_h;
  int across;         // patches side by side in an image
  int64_t per_image;  // patches
  int64_t count;      // of all images
};

struct PoolPlan {
  Tiles tiles;  // of channels: what BlockPlace, BlockColumns, fold_rows and write_partials go by
  Pass pass;    // `chunk` patches each
  Patches patches;
};

struct PoolProblem {
  bool channels_last;
  int64_t batch, channels;
  int64_t height, width;  // positions
  int vector;             // channels per thread
  int64_t numel;          // of x
};

namespace plan {

constexpr int kPoolThreads = 128;
constexpr int kPoolBlocks = 8;       // that every SM should have
constexpr int kMaxPatchSteps = 8;    // rows that one thread takes of a patch
constexpr int kMaxPooledTerms = 64;  // of a sum in the compute type

}  // namespace plan

// `most_chunks_per_sm`: chunks get longer than one patch so that there are not many more of them than that.
inline PoolPlan plan_pool(const PoolProblem& p, int sms, int most_chunks_per_sm) {
  using namespace plan;
  PoolPlan plan{};
  Tiles& t = plan.tiles;
  t.vector = p.vector;
  t.channels = t.columns = t.row_length = p.channels;
  t.numel = p.numel;
  t.row_vectors = p.channels / p.vector;
  t.threads_x = p.channels_last ? choose_threads_x(t.row_vectors, 1) : 1;
  t.tiles = ceil_div(t.row_vectors, t.threads_x);
  const int64_t threads = std::clamp<int64_t>(power_of_two_from(t.threads_x * p.height * p.width), 32, kPoolThreads);
  t.threads_y = static_cast<int>(threads) / t.threads_x;

  Patches& s = plan.patches;
  s.height = static_cast<int>(p.height);
  s.width = static_cast<int>(p.width);
  s.threads_w = static_cast<int>(std::min<int64_t>(t.threads_y, power_of_two_from(p.width)));
  s.threads_h = t.threads_y / s.threads_w;
  s.across = static_cast<int>(ceil_div(p.width, s.threads_w));
  s.columns = static_cast<int>(ceil_div(p.width, s.across));
  // As many rows as leave every SM some blocks.
  const auto down = [&](int steps) { return ceil_div(p.height, s.threads_h * steps); };
  int steps = kMaxPatchSteps;
  while (steps > 1 && t.tiles * p.batch * s.across * down(steps) < kPoolBlocks * sms) steps /= 2;
  s.rows = static_cast<int>(ceil_div(ceil_div(p.height, down(steps)), s.threads_h)) * s.threads_h;
  s.per_image = s.across * ceil_div(p.height, s.rows);
  s.count = p.batch * s.per_image;

  const int64_t wanted = s.count * t.tiles / (int64_t{most_chunks_per_sm} * sms);
  plan.pass.chunk = std::clamp<int64_t>(wanted, 1, std::max(1, kMaxPooledTerms / steps));
  plan.pass.chunks = ceil_div(s.count, plan.pass.chunk);
  return plan;
}

}  // namespace fusedres
