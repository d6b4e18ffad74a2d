// The parts of batch normalisation between which processes exchange their sums, on a CPU. They are the passes of
// batch_norm_act.cpp, whose kernels they run; this file has no kernels of its own.
#if !defined(FUSEDRES_ISA)

#include "common/batch_norm_sync.h"
#include "batch_norm.h"

namespace fusedres::cpu {
namespace {

double pixels(const Layout4d& layout) { return static_cast<double>(layout.pixels()); }

Tensor zeros(int64_t size, ScalarType dtype, const Tensor& on_device_of) {
  Tensor t = empty_vector(size, dtype, on_device_of);
  if (size > 0) std::memset(t.data_ptr(), 0, size * t.element_size());
  return t;
}

}  // namespace

Tensor batch_norm_statistics_cpu(Tensor x) {
  const Layout4d layout = layout_of_part(x);
  const int64_t channels = layout.channels;
  Tensor partial = zeros(exchanged_numbers(channels), ScalarType::Double, x);
  double* const to = data<double>(partial);
  if (x.numel() == 0) return partial;
  to[2 * channels] = pixels(layout);
  const Tiling tiling(layout);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    const auto& kernels = batch_norm_kernels<T>();
    const int64_t size = tiling.columns * tiling.blocks;
    Scratch& scratch = Scratch::with(2 * sizeof(double) * size);
    double* const mean = scratch.take<double>(size);
    double* const m2 = scratch.take<double>(size);
    for_each_block(tiling, [&](int64_t block, int64_t c0, int64_t c1) {
      const Range range = tiling.block_range(block, c0, c1);
      const int64_t at = block * tiling.columns;
      if (tiling.layout.channels_last) {
        kernels.statistics_rows(data<T>(x), tiling.rows, range, tiling.sums_in_double, mean + at, m2 + at);
      } else {
        kernels.statistics_planes(data<T>(x), tiling.planes, range, tiling.sums_in_double, mean + at, m2 + at);
      }
    });
    for (int64_t c = 0; c < channels; ++c) {
      const Moments merged = merge_blocks(tiling, mean, m2, c);
      to[c] = merged.mean();
      to[channels + c] = merged.m2();
    }
  });
  return partial;
}

namespace {

// Merges the parts in their order; moves the running statistics, unless there is too little to estimate a variance.
template <class S>
void merge_parts(const Tensor& partials, const NormArguments& a, int64_t channels, S* stats) {
  const int64_t parts = partials.size(0), width = 2 * channels + 1;
  const double* const from = data<double>(partials);
  double count = 0.0;
  for (int64_t part = 0; part < parts; ++part) count += from[part * width + 2 * channels];
  double momentum = a.momentum.value_or(0.0);
  if (a.num_batches_tracked) {
    int64_t& counter = *static_cast<int64_t*>(a.num_batches_tracked->data_ptr());
    ++counter;
    if (!a.momentum) momentum = 1.0 / static_cast<double>(counter);
  }
  const ChannelVector running_mean(a.running_mean), running_var(a.running_var);
  for_each_chunk(0, channels, [&](int64_t c0, int64_t c1) {
    double mean[kChannelChunk], var[kChannelChunk];
    for (int64_t c = c0; c < c1; ++c) {
      Moments merged;
      for (int64_t part = 0; part < parts; ++part) {
        const double* const row = from + part * width;
        merged.add(row[2 * channels], row[c], row[channels + c]);
      }
      mean[c - c0] = count > 0.0 ? merged.mean() : 0.0;
      var[c - c0] = count > 0.0 ? merged.m2() / count : 0.0;
    }
    if (running_mean && count > 1.0) move_running(running_mean, running_var, momentum, count, c0, c1, mean, var);
    save_statistics(stats, channels, a.eps, c0, c1, mean, var);
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_apply_cpu(
    Tensor x,
    OptionalTensor residual,
    Tensor partials,
    OptionalTensor weight,
    OptionalTensor bias,
    OptionalTensor running_mean,
    OptionalTensor running_var,
    OptionalTensor num_batches_tracked,
    std::optional<double> momentum,
    double eps,
    bool relu,
    bool save_mask) {
  const Layout4d layout = layout_of_part(x);
  const int64_t channels = layout.channels;
  const NormArguments arguments{weight, bias, running_mean, running_var, num_batches_tracked, true, momentum, eps};
  check_sync_forward(arguments, x, residual, partials, relu, save_mask);
  Tensor out = uninitialized_like(x);
  Tensor stats = empty_statistics(layout, x);
  Tensor mask = empty_vector(save_mask ? mask_bytes(layout) : 0, ScalarType::Byte, x);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    using S = typename ScalarOf<T>::type;
    merge_parts(partials, arguments, channels, data<S>(stats));
    if (x.numel() == 0) return;
    const Tiling tiling(layout);
    Scratch& scratch = Scratch::with(ParamTable<T>::bytes(tiling, false, Direction::forward));
    ParamTable<T> params(scratch, tiling, false, Direction::forward);
    const ChannelVector weights(weight), biases(bias);
    for_each_chunk(0, channels, [&](int64_t c0, int64_t c1) {
      params.write_affine(Which::first, data<S>(stats), weights, biases, c0, c1);
    });
    ForwardArgs<T> args{};
    args.params = params.data();
    args.x = data<T>(x);
    args.residual = data<T>(residual);
    args.out = data<T>(out);
    args.mask = save_mask ? data<uint16_t>(mask) : nullptr;
    args.relu = relu;
    args.stream = layout.channels_last && streams<T>(layout.numel());
    const auto& kernels = batch_norm_kernels<T>();
    for_each_piece_backwards(tiling, [&](const Range& range) {
      layout.channels_last ? kernels.forward_rows(args, tiling.rows, range)
                           : kernels.forward_planes(args, tiling.planes, range);
    });
  });
  return {out, stats, mask};
}

// What both passes of a backward take.
template <class T>
BackwardArgs<T> backward_args(
    const Tensor& dy, const Tensor& x, const OptionalTensor& mask, bool relu, const ParamTable<T>& params) {
  BackwardArgs<T> args{};
  args.params = params.data();
  args.dy = data<T>(dy);
  args.x = data<T>(x);
  args.mask = data<uint16_t>(mask);
  args.relu = !relu ? ReluMask::none : args.mask ? ReluMask::stored : ReluMask::recomputed;
  return args;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward_reduce_cpu(
    Tensor dy,
    Tensor x,
    OptionalTensor weight,
    OptionalTensor bias,
    Tensor stats,
    OptionalTensor mask,
    bool relu,
    bool need_affine) {
  const Layout4d layout = layout_of_part(x);
  check_sync_backward(dy, x, weight, bias, stats, mask, layout);
  const int64_t channels = layout.channels;
  const ScalarType affine_dtype = weight ? weight->scalar_type() : stats.scalar_type();
  Tensor sums = zeros(exchanged_numbers(channels), ScalarType::Double, x);
  Tensor dweight = zeros(need_affine ? channels : 0, affine_dtype, x);
  Tensor dbias = zeros(need_affine ? channels : 0, affine_dtype, x);
  double* const to = data<double>(sums);
  if (x.numel() == 0) return {sums, dweight, dbias};
  to[2 * channels] = pixels(layout);
  const Tiling tiling(layout);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    const int64_t size = tiling.columns * tiling.blocks;
    Scratch& scratch = Scratch::with(
        ParamTable<T>::bytes(tiling, false, Direction::backward) + NormBackward<T>::scratch_bytes(tiling) +
        sizeof(double) * size);
    ParamTable<T> params(scratch, tiling, false, Direction::backward);
    const auto if_wanted = [&](const Tensor& t) { return need_affine ? OptionalTensor(t) : OptionalTensor(); };
    NormBackward<T> norm(stats, weight, bias, true, tiling, if_wanted(dweight), if_wanted(dbias), params, scratch);
    double* const sum_g = scratch.take<double>(size);
    BackwardArgs<T> args = backward_args<T>(dy, x, mask, relu, params);
    args.in_double = tiling.sums_in_double;
    const auto& kernels = batch_norm_kernels<T>();
    for_each_block(tiling, [&](int64_t block, int64_t c0, int64_t c1) {
      double* const block_sums[] = {sum_g + block * tiling.columns, norm.sum(block)};
      for (double* sum : block_sums) std::fill(sum + c0, sum + c1, 0.0);
      const Range range = tiling.block_range(block, c0, c1);
      layout.channels_last ? kernels.reduce_rows(args, tiling.rows, range, block_sums)
                           : kernels.reduce_planes(args, tiling.planes, range, block_sums);
    });
    for_each_chunk(0, channels, [&](int64_t c0, int64_t c1) {
      norm.totals(sum_g, c0, c1, to + c0, to + channels + c0);
      norm.write_parameter_gradients(c0, c1, to + c0, to + channels + c0);
    });
  });
  return {sums, dweight, dbias};
}

std::tuple<Tensor, Tensor> batch_norm_act_backward_apply_cpu(
    Tensor dy,
    Tensor x,
    OptionalTensor weight,
    OptionalTensor bias,
    Tensor stats,
    OptionalTensor mask,
    Tensor sums,
    bool relu,
    bool need_dx,
    bool need_dresidual) {
  const Layout4d layout = layout_of_part(x);
  check_sync_backward(dy, x, weight, bias, stats, mask, layout);
  if (need_dx) check_exchanged("sums", sums, 1, x);
  const int64_t channels = layout.channels;
  Tensor dx = wanted_like(need_dx, x);
  Tensor dresidual = wanted_like(need_dresidual, x);
  if (x.numel() == 0 || !(need_dx || need_dresidual)) return {dx, dresidual};
  const Tiling tiling(layout);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    using S = typename ScalarOf<T>::type;
    Scratch& scratch = Scratch::with(ParamTable<T>::bytes(tiling, false, Direction::backward));
    ParamTable<T> params(scratch, tiling, false, Direction::backward);
    const ChannelVector weights(weight), biases(bias);
    const S* const saved = data<S>(stats);
    const double none[kChannelChunk] = {};
    const double* const totals = need_dx ? data<double>(sums) : nullptr;
    for_each_chunk(0, channels, [&](int64_t c0, int64_t c1) {
      params.write_affine(Which::first, saved, weights, biases, c0, c1);
      const double* const g = totals ? totals + c0 : none;
      const double* const gx = totals ? totals + channels + c0 : none;
      const double count = totals ? totals[2 * channels] : 1.0;
      write_gradient(params, Which::first, saved, channels, need_dx, count, c0, c1, g, gx);
    });
    BackwardArgs<T> args = backward_args<T>(dy, x, mask, relu, params);
    args.dx = need_dx ? data<T>(dx) : nullptr;
    args.dresidual = need_dresidual ? data<T>(dresidual) : nullptr;
    args.uses_x = need_dx;
    args.stream = layout.channels_last && streams<T>(layout.numel());
    const auto& kernels = batch_norm_kernels<T>();
    for_each_piece_backwards(tiling, [&](const Range& range) {
      layout.channels_last ? kernels.backward_rows(args, tiling.rows, range)
                           : kernels.backward_planes(args, tiling.planes, range);
    });
  });
  return {dx, dresidual};
}

}  // namespace
}  // namespace fusedres::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&fusedres::cpu::batch_norm_statistics_cpu));
  m.impl("batch_norm_act_apply", TORCH_BOX(&fusedres::cpu::batch_norm_act_apply_cpu));
  m.impl("batch_norm_act_backward_reduce", TORCH_BOX(&fusedres::cpu::batch_norm_act_backward_reduce_cpu));
  m.impl("batch_norm_act_backward_apply", TORCH_BOX(&fusedres::cpu::batch_norm_act_backward_apply_cpu));
}

#endif
