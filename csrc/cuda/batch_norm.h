// The host's side of a batch normalisation: arguments to device pointers, and the launches of its statistics.
#pragma once

#include <cmath>

#include "common/batch_norm.h"
#include "cuda/launch.h"
#include "cuda/reduce.h"

namespace fusedres {

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
ChannelVector<T> channel_vector(const OptionalTensor& t) {
  if (!t || t->numel() == 0) return {nullptr, 0, true};
  const bool is_wide = t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::Double;
  return {t->data_ptr(), t->stride(0), is_wide};
}

template <typename T>
NormPointers<T> norm_pointers(const NormArguments& a, const Tensor& x, const Tensor& stats) {
  NormPointers<T> norm{};
  norm.x = static_cast<const T*>(x.const_data_ptr());
  norm.weight = channel_vector<T>(a.weight);
  norm.bias = channel_vector<T>(a.bias);
  norm.running_mean = channel_vector<T>(a.running_mean);
  norm.running_var = channel_vector<T>(a.running_var);
  norm.counter = a.training && a.num_batches_tracked ? data<int64_t>(*a.num_batches_tracked) : nullptr;
  norm.stats = data<Compute<T>>(stats);
  norm.training = a.training;
  norm.momentum = a.momentum ? *a.momentum : NAN;
  norm.eps = a.eps;
  return norm;
}

inline PlanProblem plan_problem(const Layout4d& layout, const Tensor& x, int norms, int training, bool backward) {
  const int bytes = static_cast<int>(x.element_size());
  return {layout.channels_last, layout.batch, layout.channels, layout.area(), bytes, norms, training, backward};
}

// Whether a launch must see the counter that an earlier one has incremented.
inline bool waits_for_counter(const NormArguments& a) { return a.training && a.running_mean && !a.momentum; }

// Whether every vector of every row lies at a multiple of 16 bytes.
inline bool has_aligned_vectors(const Tiles& t, bool channels_last, std::initializer_list<const void*> pointers) {
  return (channels_last || t.area % t.vector == 0) && is_aligned(kVectorBytes, pointers);
}

// Two launches: statistics of the norms that train, in `workspace` of plan.partial_bytes, and what follows from them,
// saved and running. At least one norm trains.
template <typename T>
void launch_statistics(
    const NormPointers<T>* norms,
    int count,
    const LaunchPlan& plan,
    bool channels_last,
    const Tensor& workspace,
    cudaStream_t stream) {
  StatisticsArguments<T> a{};
  a.tiles = plan.tiles;
  a.pass = plan.reduce;
  a.norms = count;
  a.aligned = true;
  // The launch covers norms that train; one that does not takes no place in the grid.
  int64_t training = 0;
  auto* partials = data<Compute<T>>(workspace);
  for (int i = 0; i < count; ++i) {
    a.norm[i] = norms[i];
    if (!norms[i].training) continue;
    a.aligned &= has_aligned_vectors(plan.tiles, channels_last, {norms[i].x});
    a.partials[i] = partials + training * 3 * plan.reduce.chunks * plan.tiles.columns;
    ++training;
  }
  a.first = norms[0].training ? 0 : 1;
  auto* kernel = channels_last ? statistics_kernel<T, true> : statistics_kernel<T, false>;
  const int64_t blocks = plan.tiles.tiles * plan.reduce.chunks * training;
  launch_with_shared(kernel, blocks, plan.tiles.threads(), plan.reduce.shared_bytes, stream, a);
  const int64_t scratch = 2 * plan.finish_threads / 2 * sizeof(double);
  const int64_t finish = finish_blocks(plan.tiles.channels);
  launch_with_shared(
      finish_statistics_kernel<T>,
      finish,
      plan.finish_threads,
      scratch,
      stream,
      FinishStatisticsArguments<T>{a, channels_last});
}

template <typename T>
void launch_finish_gradients(const FinishGradientsArguments<T>& a, int threads, cudaStream_t stream) {
  const int64_t scratch = 3 * threads / 2 * sizeof(double);
  const int64_t blocks = finish_blocks(a.tiles.channels);
  launch_with_shared(finish_gradients_kernel<T>, blocks, threads, scratch, stream, a);
}

}  // namespace fusedres
