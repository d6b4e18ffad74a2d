// The parts of batch normalisation between which processes exchange their sums; see fusedres/ops/batch_norm_sync.py.
//
// Included at the end of batch_norm_act.cu, for it launches that file's kernels: two launches for the statistics, two
// for the forward, two for the sums of the backward, two for dx. Of its own it has what happens per channel in between.
#pragma once

#include "common/batch_norm_sync.h"

namespace fusedres {
namespace {

constexpr int kMergeThreads = 256;

template <typename T>
struct MergePartsArguments {
  const double* partials;  // (parts, 2C + 1)
  int64_t parts, channels;
  NormPointers<T> norm;
};

// Merges the parts in their order, one channel per thread; writes statistics and running statistics, the latter unless
// there is too little to estimate a variance. One block where the counter is read as well as written.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads) merge_parts_kernel(const MergePartsArguments<T> a) {
  const NormPointers<T>& norm = a.norm;
  const int64_t width = 2 * a.channels + 1;
  const double* const counts = a.partials + 2 * a.channels;
  double count = 0;
  for (int64_t part = 0; part < a.parts; ++part) count += counts[part * width];
  const bool moves = norm.running_mean.data != nullptr && count > 1;
  double factor = norm.momentum;
  if (moves && factor != factor) factor = 1.0 / static_cast<double>(*norm.counter + 1);
  for (int64_t c = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x; c < a.channels;
       c += int64_t{gridDim.x} * kMergeThreads) {
    // Sums about the first part's mean, whose own distance from the mean is small beside double's precision.
    double origin = 0, of_means = 0, m2 = 0;
    bool first = true;
    for (int64_t part = 0; part < a.parts; ++part) {
      const double* const row = a.partials + part * width;
      const double own = counts[part * width];
      if (own == 0) continue;
      if (first && is_finite(row[c])) origin = row[c];
      first = false;
      const double delta = row[c] - origin;
      of_means += own * delta;
      m2 += row[a.channels + c] + own * delta * delta;
    }
    const double per_count = count > 0 ? 1.0 / count : 0;
    const double mean = origin + of_means * per_count;
    m2 -= of_means * of_means * per_count;
    if (m2 < 0) m2 = 0;
    const double var = m2 * per_count;
    ChannelStatistics<Compute<T>>::from(mean, var, norm.eps).store(norm.stats, a.channels, c);
    if (moves) {
      norm.running_mean.set(c, (1 - factor) * norm.running_mean.get(c, 0) + factor * mean);
      norm.running_var.set(c, (1 - factor) * norm.running_var.get(c, 0) + factor * (m2 / (count - 1)));
    }
  }
  __syncthreads();
  if (norm.counter != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*norm.counter;
}

template <typename T>
struct SummedGradientsArguments {
  const double* sums;  // (2C + 1)
  int64_t channels;
  NormPointers<T> norm;
  Compute<T>* coefficients;  // (2, C)
};

template <typename T>
__global__ void __launch_bounds__(kMergeThreads) summed_gradients_kernel(const SummedGradientsArguments<T> a) {
  const int64_t c = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (c >= a.channels) return;
  const double count = a.sums[2 * a.channels];
  const auto found = gradient_coefficients(a.norm, a.channels, c, count, a.sums[c], a.sums[a.channels + c]);
  a.coefficients[c] = found.of_x;
  a.coefficients[a.channels + c] = found.constant;
}

Tensor zeros(int64_t size, ScalarType dtype, const Tensor& on_device_of, const DeviceScope& device) {
  Tensor t = empty_vector(size, dtype, on_device_of);
  if (size > 0) check_cuda(cudaMemsetAsync(t.data_ptr(), 0, size * t.element_size(), device.stream()));
  return t;
}

Tensor batch_norm_statistics_cuda(const Tensor& x) {
  const Layout4d layout = layout_of_part(x);
  const DeviceScope device(x);
  const int64_t numbers = exchanged_numbers(layout.channels);
  if (x.numel() == 0) return zeros(numbers, ScalarType::Double, x, device);
  Tensor partial = empty_vector(numbers, ScalarType::Double, x);
  const LaunchPlan plan = plan_launches(plan_problem(layout, x, 1, 1, false), plan_device(x), false);
  const Tensor workspace = empty_vector(plan.workspace_bytes, ScalarType::Byte, x);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    NormPointers<T> norm{};
    norm.x = static_cast<const T*>(x.const_data_ptr());
    norm.training = true;
    norm.exchanged = data<double>(partial);
    launch_statistics(&norm, 1, plan, layout.channels_last, workspace, device.stream());
  });
  return partial;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_apply_cuda(
    const Tensor& x,
    const OptionalTensor& residual,
    const Tensor& partials,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    std::optional<double> momentum,
    double eps,
    bool relu,
    bool save_mask) {
  const Layout4d layout = layout_of_part(x);
  const NormArguments arguments{weight, bias, running_mean, running_var, num_batches_tracked, true, momentum, eps};
  check_sync_forward(arguments, x, residual, partials, relu, save_mask);
  const DeviceScope device(x);
  Tensor out = uninitialized_like(x);
  Tensor stats = empty_statistics(layout, x);
  Tensor mask = empty_vector(save_mask ? mask_bytes(layout) : 0, ScalarType::Byte, x);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    NormPointers<T> norm = norm_pointers<T>(arguments, x, stats);
    const int64_t blocks =
        waits_for_counter(arguments) ? 1 : std::max<int64_t>(1, ceil_div(layout.channels, kMergeThreads));
    const MergePartsArguments<T> merge{data<double>(partials), partials.size(0), layout.channels, norm};
    launch(merge_parts_kernel<T>, blocks, kMergeThreads, device.stream(), merge);
    if (x.numel() == 0) return;
    norm.training = false;
    norm.running_mean = norm.running_var = {};
    const ForwardTensors tensors{residual, out, save_mask ? OptionalTensor(mask) : OptionalTensor()};
    const NormPointers<T> norms[] = {norm};
    run_forward(layout, x, norms, false, relu, tensors, device);
  });
  return {out, stats, mask};
}

// Both passes of a backward: what of them is known before the plan.
template <typename T>
BackwardArguments<T> sync_backward_arguments(
    const Tensor& dy,
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const Tensor& stats,
    const OptionalTensor& mask,
    bool training,
    bool relu) {
  BackwardArguments<T> a{};
  a.relu = relu;
  a.uses_x = training || (relu && !mask);
  a.dy = static_cast<const T*>(dy.const_data_ptr());
  a.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  a.norm[0] = norm_pointers<T>({weight, bias, {}, {}, {}, training, 0.0, 0.0}, x, stats);
  return a;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward_reduce_cuda(
    const Tensor& dy,
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const Tensor& stats,
    const OptionalTensor& mask,
    bool relu,
    bool need_affine) {
  const Layout4d layout = layout_of_part(x);
  check_sync_backward(dy, x, weight, bias, stats, mask, layout);
  const DeviceScope device(x);
  const int64_t channels = layout.channels, affine = need_affine ? channels : 0;
  if (x.numel() == 0) {
    const ScalarType dtype = weight ? weight->scalar_type() : stats.scalar_type();
    const auto none = [&](int64_t size, ScalarType type) { return zeros(size, type, x, device); };
    return {none(exchanged_numbers(channels), ScalarType::Double), none(affine, dtype), none(affine, dtype)};
  }
  Tensor sums = empty_vector(exchanged_numbers(channels), ScalarType::Double, x);
  Tensor dweight = wanted_parameter_gradient(need_affine, weight, stats);
  Tensor dbias = wanted_parameter_gradient(need_affine, weight, stats);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto a = sync_backward_arguments<T>(dy, x, weight, bias, stats, mask, true, relu);
    a.to[0] = {channel_vector<T>(dweight), channel_vector<T>(dbias), nullptr, data<double>(sums)};
    if (mask) {
      run_backward<T, Relu::stored>(layout, x, a, true, device);
    } else {
      run_backward<T, Relu::recomputed>(layout, x, a, true, device);
    }
  });
  return {sums, dweight, dbias};
}

std::tuple<Tensor, Tensor> batch_norm_act_backward_apply_cuda(
    const Tensor& dy,
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const Tensor& stats,
    const OptionalTensor& mask,
    const Tensor& sums,
    bool relu,
    bool need_dx,
    bool need_dresidual) {
  const Layout4d layout = layout_of_part(x);
  check_sync_backward(dy, x, weight, bias, stats, mask, layout);
  if (need_dx) check_exchanged("sums", sums, 1, x);
  const DeviceScope device(x);
  Tensor dx = wanted_like(need_dx, x);
  Tensor dresidual = wanted_like(need_dresidual, x);
  if (x.numel() == 0 || !(need_dx || need_dresidual)) return {dx, dresidual};
  const int64_t channels = layout.channels;
  const Tensor workspace = empty_vector(need_dx ? 2 * channels : 0, stats.scalar_type(), x);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto a = sync_backward_arguments<T>(dy, x, weight, bias, stats, mask, need_dx, relu);
    a.dx[0] = data_if<T>(need_dx, dx);
    a.dresidual = data_if<T>(need_dresidual, dresidual);
    if (need_dx) {
      a.to[0].coefficients = data<Compute<T>>(workspace);
      const SummedGradientsArguments<T> summed{data<double>(sums), channels, a.norm[0], a.to[0].coefficients};
      launch(summed_gradients_kernel<T>, ceil_div(channels, kMergeThreads), kMergeThreads, device.stream(), summed);
    }
    if (mask) {
      run_backward<T, Relu::stored>(layout, x, a, false, device);
    } else {
      run_backward<T, Relu::recomputed>(layout, x, a, false, device);
    }
  });
  return {dx, dresidual};
}

}  // namespace
}  // namespace fusedres
