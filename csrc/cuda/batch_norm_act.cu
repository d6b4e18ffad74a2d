// Batch normalisation with residual addition and ReLU; see fusedres/ops/batch_norm_act.py for the mathematics.
//
// Training takes three launches per direction: partial sums per block (csrc/cuda/reduce.h), what follows from them per
// channel, and the element-wise pass, which walks the tensor in reverse because what the sums read last is still in L2.
// Where the slab of a few channels fits the shared memory of one block, one launch does all of it and reads x (and dy)
// once. Evaluation is the element-wise pass alone.
//
// Bytes per element of size s: forward reads 2s (s in one pass or evaluation), s more with a residual or second norm,
// writes s, and 1/8 for a mask; backward reads 4s and 1/4 for a mask, writes s per gradient that is wanted.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "cuda/batch_norm.h"

namespace fusedres {
namespace {

constexpr unsigned kWarp = 32;

// ---- forward ----

enum class Addend { none, residual, normalised };

template <typename T>
struct ForwardArguments {
  Tiles tiles;
  Pass pass;
  bool reverse, aligned, relu;
  bool from_running;  // no norm trains: statistics are those of the running ones, and are saved here
  int slab_vectors;
  NormPointers<T> norm[2];
  const T* residual;
  T* out;
  uint8_t* mask;  // or null
  int64_t mask_bytes;
};

// Body for for_each_vector: out and mask, from x, or from the slab that the statistics left.
template <typename T, bool kChannelsLast, Addend kAddend, bool kFromSlab>
struct Forward {
  using A = Compute<T>;
  static constexpr int V = kVector<T>, K = kLanes<T, kChannelsLast>;
  static constexpr bool kPair = kAddend == Addend::normalised;

  const ForwardArguments<T>& a;
  Slab<T> slab, slab2;
  A threshold;
  Affine<A, K> bn, bn2;

  template <bool kFast, int kUnroll>
  __device__ void run(const Place (&places)[kUnroll], int k) {
    Vector<T, V> x[kUnroll], other[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if constexpr (kFromSlab) {
        slab.get(k + u, x[u]);
        if constexpr (kPair) slab2.get(k + u, other[u]);
      } else {
        load_at<kFast>(x[u], a.norm[0].x, places[u], a.aligned);
        if constexpr (kPair) load_at<kFast>(other[u], a.norm[1].x, places[u], a.aligned);
      }
      if constexpr (kAddend == Addend::residual) load_at<kFast>(other[u], a.residual, places[u], a.aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int c = K == V ? i : 0;
        A y = normalise(static_cast<A>(x[u].at[i]) - bn.mean[c], bn.scale[c], bn.shift[c]);
        if constexpr (kAddend == Addend::residual) y += static_cast<A>(other[u].at[i]);
        if constexpr (kPair) y += normalise(static_cast<A>(other[u].at[i]) - bn2.mean[c], bn2.scale[c], bn2.shift[c]);
        const bool cut = y <= threshold;
        x[u].at[i] = static_cast<T>(cut ? A(0) : y);
        if (kAddend == Addend::residual && !cut && i < places[u].valid) bits |= 1u << i;
      }
      store_at<kFast>(x[u], a.out, places[u], a.aligned);
      if constexpr (kAddend == Addend::residual) {
        if (a.mask != nullptr) store_bits(bits, places[u].bit);
      }
    }
  }

  // Threads that hold the parts of one byte are neighbours; the first of them writes it.
  __device__ void store_bits(unsigned bits, int64_t bit) const {
    constexpr int kParts = V < 8 ? 8 / V : 1;
    const int lane = static_cast<int>(threadIdx.x % kWarp), part = lane % kParts;
    if constexpr (kParts > 1) {
      bits <<= part * V;
      const unsigned group = ((1u << kParts) - 1) << (lane - part);
#pragma unroll
      for (int d = 1; d < kParts; d *= 2) bits |= __shfl_xor_sync(group, bits, d);
    }
    if (part == 0 && bit / 8 < a.mask_bytes) a.mask[bit / 8] = static_cast<uint8_t>(bits);
  }
};

template <Addend kAddend>
constexpr int kForwardUnroll = kAddend == Addend::none ? plan::kForwardUnroll : plan::kForwardUnroll / 2;
template <Addend kAddend>
constexpr int kForwardBlocks = kAddend == Addend::normalised ? plan::kPairBlocks : plan::kForwardBlocks;

template <typename T, bool kChannelsLast, Addend kAddend>
__global__ void __launch_bounds__(plan::kThreads, kForwardBlocks<kAddend>)
    forward_kernel(const __grid_constant__ ForwardArguments<T> a) {
  constexpr bool kPair = kAddend == Addend::normalised;
  const BlockPlace block(a.tiles, a.pass, blockIdx.x, a.reverse);
  const BlockColumns<T, kChannelsLast> columns(a.tiles, block);
  auto* parameters = dynamic_shared_memory<Compute<T>>();
  auto* parameters2 = parameters + kAffineParameters * columns.count;
  const bool save = a.from_running && block.chunk == 0;
  fill_parameters(parameters, columns, a.norm[0], a.from_running, save);
  if constexpr (kPair) fill_parameters(parameters2, columns, a.norm[1], a.from_running, save);
  __syncthreads();
  Forward<T, kChannelsLast, kAddend, false> body{a, {}, {}, relu_threshold<T>(a.relu), {}, {}};
  get_affine(body.bn, parameters, columns.count, a.tiles);
  if constexpr (kPair) get_affine(body.bn2, parameters2, columns.count, a.tiles);
  for_each_vector<kForwardUnroll<kAddend>>(Walk<T, kChannelsLast>(a.tiles, block, a.pass.chunk, a.aligned), body);
}

// All norms train. A block sums up its channels, keeping x in shared memory, and goes on with what it kept.
template <typename T, bool kChannelsLast, Addend kAddend>
__global__ void __launch_bounds__(plan::kOnePassThreads, 1)
    forward_one_pass_kernel(const __grid_constant__ ForwardArguments<T> a) {
  using A = Compute<T>;
  constexpr int K = kLanes<T, kChannelsLast>;
  constexpr int kNorms = kAddend == Addend::normalised ? 2 : 1;
  const Tiles& t = a.tiles;
  const BlockPlace block(t, a.pass, blockIdx.x, false);
  const BlockColumns<T, kChannelsLast> columns(t, block);
  const Walk<T, kChannelsLast> walk(t, block, a.pass.chunk, a.aligned);
  auto* slab_memory = dynamic_shared_memory<Vector<T, kVector<T>>>();
  const int slab_size = a.slab_vectors * static_cast<int>(blockDim.x);
  const Slab<T> slabs[2] = {{slab_memory}, {slab_memory + slab_size}};
  auto* row = reinterpret_cast<double*>(slab_memory + kNorms * slab_size);
  auto* scratch = row + 3 * columns.count;
  auto* parameters = reinterpret_cast<A*>(scratch + fold_size<2, K>());

#pragma unroll
  for (int n = 0; n < kNorms; ++n) {
    const NormPointers<T>& norm = a.norm[n];
    if (blockIdx.x == 0 && threadIdx.x == 0 && norm.counter != nullptr) ++*norm.counter;
    Deviations<T, kChannelsLast, true> deviations(norm.x, a.aligned, slabs[n]);
    for_each_vector<plan::kForwardUnroll>(walk, deviations);
    double totals[3][K];
    deviations.fold(totals, scratch, row, t);
    write_totals(row, totals, columns.count, t);
    __syncthreads();
    auto* own = parameters + n * kAffineParameters * columns.count;
    columns.for_each([&](int i) {
      const int64_t c = columns.channel(i);
      const double count = static_cast<double>(t.numel / t.channels);
      const double from = row[i], delta = row[columns.count + i] / count;
      const double var = row[2 * columns.count + i] / count - delta * delta;
      put_affine(own, columns.count, i, norm, c, finish_channel(norm, t, c, from + delta, var < 0 ? 0 : var));
    });
    __syncthreads();
  }

  Forward<T, kChannelsLast, kAddend, true> body{a, slabs[0], slabs[1], relu_threshold<T>(a.relu), {}, {}};
  get_affine(body.bn, parameters, columns.count, t);
  if constexpr (kNorms == 2) get_affine(body.bn2, parameters + kAffineParameters * columns.count, columns.count, t);
  for_each_vector<kForwardUnroll<kAddend>>(walk, body);
}

template <typename T, bool kChannelsLast>
auto* choose_forward(bool one_pass, Addend addend) {
  switch (addend) {
    case Addend::none:
      return one_pass ? forward_one_pass_kernel<T, kChannelsLast, Addend::none>
                      : forward_kernel<T, kChannelsLast, Addend::none>;
    case Addend::residual:
      return one_pass ? forward_one_pass_kernel<T, kChannelsLast, Addend::residual>
                      : forward_kernel<T, kChannelsLast, Addend::residual>;
    default:
      return one_pass ? forward_one_pass_kernel<T, kChannelsLast, Addend::normalised>
                      : forward_kernel<T, kChannelsLast, Addend::normalised>;
  }
}

struct ForwardTensors {
  OptionalTensor residual;
  Tensor out;
  OptionalTensor mask;
};

// The forward of one norm, with or without residual, or of the sum of two.
template <typename T, int kNorms>
void run_forward(
    const Layout4d& layout,
    const Tensor& x,
    const NormPointers<T> (&norms)[kNorms],
    bool may_one_pass,
    bool relu,
    const ForwardTensors& tensors,
    const DeviceScope& device) {
  int training = 0;
  for (const auto& norm : norms) training += norm.training;
  const PlanProblem problem = plan_problem(layout, x, kNorms, training, false);
  const LaunchPlan plan = plan_launches(problem, plan_device(x), may_one_pass && training == kNorms);
  const Tensor workspace = empty_vector(training > 0 ? plan.workspace_bytes : 0, ScalarType::Byte, x);

  ForwardArguments<T> a{};
  a.tiles = plan.tiles;
  a.pass = plan.apply;
  a.reverse = plan.reverse && training > 0;
  a.relu = relu;
  a.from_running = training == 0 && norms[0].running_mean.data != nullptr;  // else they are saved already
  a.slab_vectors = plan.slab_vectors;
  for (int i = 0; i < kNorms; ++i) a.norm[i] = norms[i];
  a.residual = tensors.residual ? static_cast<const T*>(tensors.residual->const_data_ptr()) : nullptr;
  a.out = data<T>(tensors.out);
  a.mask = tensors.mask ? data<uint8_t>(*tensors.mask) : nullptr;
  a.mask_bytes = mask_bytes(layout);
  a.aligned = has_aligned_vectors(plan.tiles, layout.channels_last, {norms[0].x, a.norm[1].x, a.residual, a.out});

  if (training > 0 && !plan.one_pass) {
    launch_statistics(norms, kNorms, plan, layout.channels_last, workspace, device.stream());
  }
  const Addend addend = kNorms == 2 ? Addend::normalised : a.residual ? Addend::residual : Addend::none;
  auto* kernel = layout.channels_last ? choose_forward<T, true>(plan.one_pass, addend)
                                      : choose_forward<T, false>(plan.one_pass, addend);
  const int64_t blocks = plan.tiles.tiles * plan.apply.chunks;
  launch_with_shared(kernel, blocks, plan.tiles.threads(), plan.apply.shared_bytes, device.stream(), a);
}

// ---- backward ----

// How the gradient that reaches the sum of the addends is found: dy where the ReLU was open.
enum class Relu { recomputed, stored, recomputed_of_pair };

template <typename T>
struct BackwardArguments {
  Tiles tiles;
  Pass pass;
  bool reverse, aligned;
  bool relu;             // recomputed: whether there is one
  bool uses_x, uses_x2;  // whether x is read at all
  int slab_vectors;
  const T* dy;
  const uint8_t* mask;
  NormPointers<T> norm[2];
  GradientPointers<T> to[2];
  Compute<T>* partials;  // (1 + norms, chunks, columns)
  T* dx[2];              // or null
  T* dresidual;          // or null
};

// What both passes read of one vector, and the gradient and centred values that follow.
template <typename T, bool kChannelsLast, Relu kRelu>
struct Inputs {
  using A = Compute<T>;
  static constexpr int V = kVector<T>, K = kLanes<T, kChannelsLast>;
  static constexpr bool kPair = kRelu == Relu::recomputed_of_pair;

  Vector<T, V> dy, x, x2;
  unsigned bits;

  template <bool kFast>
  __device__ void load(const BackwardArguments<T>& a, const Place& p) {
    load_at<kFast>(dy, a.dy, p, a.aligned);
    load_if<kFast>(a.uses_x, x, a.norm[0].x, p, a.aligned);
    if constexpr (kPair) load_if<kFast>(a.uses_x2, x2, a.norm[1].x, p, a.aligned);
    load_bits(a, p);
  }
  template <bool kFast>
  __device__ static void load_if(bool wanted, Vector<T, V>& to, const T* from, const Place& p, bool aligned) {
    if (wanted) {
      load_at<kFast>(to, from, p, aligned);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) to.at[i] = T(0.0f);
    }
  }
  __device__ void load_bits(const BackwardArguments<T>& a, const Place& p) {
    if constexpr (kRelu == Relu::stored) bits = p.valid > 0 ? a.mask[p.bit / 8] >> (p.bit % 8) : 0;
  }

  // Element i: g and the centred values.
  template <bool kFast>
  __device__ void element(
      int i, int valid, A threshold, const Affine<A, K>& bn, const Affine<A, K>& bn2, A& g, A& centred, A& centred2)
      const {
    const int c = K == V ? i : 0;
    g = static_cast<A>(dy.at[i]);
    centred = static_cast<A>(x.at[i]) - bn.mean[c];
    centred2 = kPair ? static_cast<A>(x2.at[i]) - bn2.mean[c] : A(0);
    if constexpr (kRelu == Relu::stored) {
      if (!(bits >> i & 1)) g = 0;
    } else {
      A y = normalise(centred, bn.scale[c], bn.shift[c]);
      if constexpr (kPair) y += normalise(centred2, bn2.scale[c], bn2.shift[c]);
      if (y <= threshold) g = 0;
    }
    if (!kFast && i >= valid) g = centred = centred2 = 0;
  }
};

// Body for for_each_vector: sums of g and of g * (x - mean).
template <typename T, bool kChannelsLast, Relu kRelu, bool kKeep>
struct GradientSums {
  using A = Compute<T>;
  using In = Inputs<T, kChannelsLast, kRelu>;
  static constexpr int V = kVector<T>, K = kLanes<T, kChannelsLast>, Q = In::kPair ? 3 : 2;

  const BackwardArguments<T>& a;
  Slab<T> slabs[3];  // dy, x, x2
  A threshold;
  Affine<A, K> bn, bn2;
  A sums[Q][K];

  // On the threads of row 0: the sums of the block.
  __device__ void fold(double (&totals)[Q][K], double* scratch, const Tiles& t) const {
#pragma unroll
    for (int q = 0; q < Q; ++q) {
#pragma unroll
      for (int i = 0; i < K; ++i) totals[q][i] = sums[q][i];
    }
    fold_rows(totals, scratch, t.threads_x, t.threads_y);
  }

  template <bool kFast, int kUnroll>
  __device__ void run(const Place (&places)[kUnroll], int k) {
    In in[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) in[u].template load<kFast>(a, places[u]);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if constexpr (kKeep) {
        slabs[0].put(k + u, in[u].dy);
        slabs[1].put(k + u, in[u].x);
        if constexpr (In::kPair) slabs[2].put(k + u, in[u].x2);
      }
      if (kFast && places[u].valid == 0) continue;
      A g[V], centred[V], centred2[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        in[u].template element<kFast>(i, places[u].valid, threshold, bn, bn2, g[i], centred[i], centred2[i]);
      }
      add_vector(sums[0], g);
      add_products(sums[1], g, centred);
      if constexpr (In::kPair) add_products(sums[2], g, centred2);
    }
  }
};

// Body for for_each_vector: dx, dx2 and dresidual.
template <typename T, bool kChannelsLast, Relu kRelu, bool kFromSlab>
struct Backward {
  using A = Compute<T>;
  using In = Inputs<T, kChannelsLast, kRelu>;
  static constexpr int V = kVector<T>, K = kLanes<T, kChannelsLast>;

  const BackwardArguments<T>& a;
  Slab<T> slabs[3];
  A threshold;
  Affine<A, K> bn, bn2;
  A of_x[K], constant[K], of_x2[K], constant2[K];

  template <bool kFast, int kUnroll>
  __device__ void run(const Place (&places)[kUnroll], int k) {
    In in[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if constexpr (kFromSlab) {
        slabs[0].get(k + u, in[u].dy);
        slabs[1].get(k + u, in[u].x);
        if constexpr (In::kPair) slabs[2].get(k + u, in[u].x2);
        in[u].load_bits(a, places[u]);
      } else {
        in[u].template load<kFast>(a, places[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      Vector<T, V> dx, dx2, dresidual;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int c = K == V ? i : 0;
        A g, centred, centred2;
        in[u].template element<kFast>(i, places[u].valid, threshold, bn, bn2, g, centred, centred2);
        dx.at[i] = static_cast<T>(gradient(a.norm[0].training, bn.scale[c], g, of_x[c], centred, constant[c]));
        if constexpr (In::kPair) {
          dx2.at[i] = static_cast<T>(gradient(a.norm[1].training, bn2.scale[c], g, of_x2[c], centred2, constant2[c]));
        } else {
          dresidual.at[i] = static_cast<T>(g);
        }
      }
      if (a.dx[0] != nullptr) store_at<kFast>(dx, a.dx[0], places[u], a.aligned);
      if constexpr (In::kPair) {
        if (a.dx[1] != nullptr) store_at<kFast>(dx2, a.dx[1], places[u], a.aligned);
      } else {
        if (a.dresidual != nullptr) store_at<kFast>(dresidual, a.dresidual, places[u], a.aligned);
      }
    }
  }

  static __device__ A gradient(bool training, A scale, A g, A of_x, A centred, A constant) {
    // In evaluation whatever x is.
    return training ? multiply_add(scale, g, multiply_add(of_x, centred, constant)) : scale * g;
  }
};

template <Relu kRelu>
constexpr int kBackwardUnroll = kRelu == Relu::recomputed_of_pair ? plan::kPairUnroll : plan::kBackwardUnroll;
template <Relu kRelu>
constexpr int kBackwardBlocks = kRelu == Relu::recomputed_of_pair ? plan::kPairBlocks : plan::kBlocks;
// ptxas takes more registers for sm_100, and would spill a few.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <Relu kRelu>
constexpr int kApplyBlocks = plan::kPairBlocks;
#else
template <Relu kRelu>
constexpr int kApplyBlocks = kBackwardBlocks<kRelu>;
#endif

template <typename T, bool kChannelsLast, Relu kRelu>
__device__ void fill_saved_parameters(
    Compute<T>* parameters, const BlockColumns<T, kChannelsLast>& columns, const BackwardArguments<T>& a) {
  fill_parameters(parameters, columns, a.norm[0], false, false);
  if constexpr (kRelu == Relu::recomputed_of_pair) {
    fill_parameters(parameters + kAffineParameters * columns.count, columns, a.norm[1], false, false);
  }
}

template <typename T, bool kChannelsLast, Relu kRelu>
__global__ void __launch_bounds__(plan::kThreads, kBackwardBlocks<kRelu>)
    gradient_sums_kernel(const __grid_constant__ BackwardArguments<T> a) {
  using A = Compute<T>;
  using Body = GradientSums<T, kChannelsLast, kRelu, false>;
  constexpr int kNorms = Body::Q - 1;
  const BlockPlace block(a.tiles, a.pass, blockIdx.x, false);
  const BlockColumns<T, kChannelsLast> columns(a.tiles, block);
  auto* scratch = dynamic_shared_memory<double>();
  auto* parameters = reinterpret_cast<A*>(scratch + fold_size<Body::Q, Body::K>());
  fill_saved_parameters<T, kChannelsLast, kRelu>(parameters, columns, a);
  __syncthreads();
  Body body{a, {}, relu_threshold<T>(a.relu), {}, {}, {}};
  get_affine(body.bn, parameters, columns.count, a.tiles);
  if constexpr (kNorms == 2)
    get_affine(body.bn2, parameters + kAffineParameters * columns.count, columns.count, a.tiles);
  for_each_vector<kBackwardUnroll<kRelu>>(Walk<T, kChannelsLast>(a.tiles, block, a.pass.chunk, a.aligned), body);
  double totals[Body::Q][Body::K];
  body.fold(totals, scratch, a.tiles);
  write_partials(a.partials, totals, a.tiles, a.pass, block);
}

template <typename T, bool kChannelsLast, Relu kRelu>
__global__ void __launch_bounds__(plan::kThreads, kApplyBlocks<kRelu>)
    backward_kernel(const __grid_constant__ BackwardArguments<T> a) {
  using A = Compute<T>;
  constexpr int kNorms = kRelu == Relu::recomputed_of_pair ? 2 : 1;
  const BlockPlace block(a.tiles, a.pass, blockIdx.x, a.reverse);
  const BlockColumns<T, kChannelsLast> columns(a.tiles, block);
  auto* parameters = dynamic_shared_memory<A>();
  fill_saved_parameters<T, kChannelsLast, kRelu>(parameters, columns, a);
  auto* coefficients = parameters + kNorms * kAffineParameters * columns.count;
#pragma unroll
  for (int n = 0; n < kNorms; ++n) {
    const A* from = a.to[n].coefficients;
    columns.for_each([&](int i) {
      const int64_t c = columns.channel(i);
      coefficients[(2 * n) * columns.count + i] = from != nullptr ? from[c] : A(0);
      coefficients[(2 * n + 1) * columns.count + i] = from != nullptr ? from[columns.channels + c] : A(0);
    });
  }
  __syncthreads();
  Backward<T, kChannelsLast, kRelu, false> body{a, {}, relu_threshold<T>(a.relu), {}, {}, {}, {}, {}, {}};
  get_affine(body.bn, parameters, columns.count, a.tiles);
  get_columns(body.of_x, coefficients, a.tiles);
  get_columns(body.constant, coefficients + columns.count, a.tiles);
  if constexpr (kNorms == 2) {
    get_affine(body.bn2, parameters + kAffineParameters * columns.count, columns.count, a.tiles);
    get_columns(body.of_x2, coefficients + 2 * columns.count, a.tiles);
    get_columns(body.constant2, coefficients + 3 * columns.count, a.tiles);
  }
  for_each_vector<kBackwardUnroll<kRelu>>(Walk<T, kChannelsLast>(a.tiles, block, a.pass.chunk, a.aligned), body);
}

// Sums and their use in one launch; x and dy are kept in shared memory.
template <typename T, bool kChannelsLast, Relu kRelu>
__global__ void __launch_bounds__(plan::kOnePassThreads, 1)
    backward_one_pass_kernel(const __grid_constant__ BackwardArguments<T> a) {
  using A = Compute<T>;
  constexpr int K = kLanes<T, kChannelsLast>;
  constexpr int kNorms = kRelu == Relu::recomputed_of_pair ? 2 : 1;
  const Tiles& t = a.tiles;
  const BlockPlace block(t, a.pass, blockIdx.x, false);
  const BlockColumns<T, kChannelsLast> columns(t, block);
  const Walk<T, kChannelsLast> walk(t, block, a.pass.chunk, a.aligned);
  auto* slab_memory = dynamic_shared_memory<Vector<T, kVector<T>>>();
  const int slab_size = a.slab_vectors * static_cast<int>(blockDim.x);
  auto* row = reinterpret_cast<double*>(slab_memory + (1 + kNorms) * slab_size);
  auto* scratch = row + (1 + kNorms) * columns.count;
  auto* parameters = reinterpret_cast<A*>(scratch + fold_size<1 + kNorms, K>());
  auto* coefficients = parameters + kNorms * kAffineParameters * columns.count;

  fill_saved_parameters<T, kChannelsLast, kRelu>(parameters, columns, a);
  __syncthreads();
  Backward<T, kChannelsLast, kRelu, true> body{
      a,
      {{slab_memory}, {slab_memory + slab_size}, {slab_memory + 2 * slab_size}},
      relu_threshold<T>(a.relu),
      {},
      {},
      {},
      {},
      {},
      {}};
  get_affine(body.bn, parameters, columns.count, t);
  if constexpr (kNorms == 2) get_affine(body.bn2, parameters + kAffineParameters * columns.count, columns.count, t);
  GradientSums<T, kChannelsLast, kRelu, true> sums{
      a, {body.slabs[0], body.slabs[1], body.slabs[2]}, body.threshold, body.bn, body.bn2, {}};
  for_each_vector<kBackwardUnroll<kRelu>>(walk, sums);
  double totals[1 + kNorms][K];
  sums.fold(totals, scratch, t);
  write_totals(row, totals, columns.count, t);
  __syncthreads();
  columns.for_each([&](int i) {
#pragma unroll
    for (int n = 0; n < kNorms; ++n) {
      const auto found =
          finish_gradients(a.to[n], a.norm[n], t, columns.channel(i), row[i], row[(1 + n) * columns.count + i]);
      coefficients[(2 * n) * columns.count + i] = found.of_x;
      coefficients[(2 * n + 1) * columns.count + i] = found.constant;
    }
  });
  __syncthreads();
  get_columns(body.of_x, coefficients, t);
  get_columns(body.constant, coefficients + columns.count, t);
  if constexpr (kNorms == 2) {
    get_columns(body.of_x2, coefficients + 2 * columns.count, t);
    get_columns(body.constant2, coefficients + 3 * columns.count, t);
  }
  for_each_vector<kBackwardUnroll<kRelu>>(walk, body);
}

template <typename T, Relu kRelu>
struct BackwardKernels {
  using Kernel = void (*)(const BackwardArguments<T>);
  Kernel sums, apply, one_pass;

  explicit BackwardKernels(bool channels_last)
      : sums(channels_last ? gradient_sums_kernel<T, true, kRelu> : gradient_sums_kernel<T, false, kRelu>),
        apply(channels_last ? backward_kernel<T, true, kRelu> : backward_kernel<T, false, kRelu>),
        one_pass(channels_last ? backward_one_pass_kernel<T, true, kRelu> : backward_one_pass_kernel<T, false, kRelu>) {
  }
};

// The backward of one norm or of a pair. `a` has everything but what follows from the plan. `reduce`: the sums are
// needed, be it for parameters or for dx.
template <typename T, Relu kRelu>
void run_backward(
    const Layout4d& layout, const Tensor& x, BackwardArguments<T> a, bool reduce, const DeviceScope& device) {
  constexpr int kNorms = kRelu == Relu::recomputed_of_pair ? 2 : 1;
  int training = 0;
  for (int n = 0; n < kNorms; ++n) training += a.norm[n].training;
  const bool apply = a.dx[0] != nullptr || a.dx[1] != nullptr || a.dresidual != nullptr;
  const bool uses_all = a.uses_x && (kNorms == 1 || a.uses_x2);
  const PlanProblem problem = plan_problem(layout, x, kNorms, training, true);
  const LaunchPlan plan = plan_launches(problem, plan_device(x), reduce && apply && uses_all);
  const Tensor workspace = empty_vector(reduce ? plan.workspace_bytes : 0, ScalarType::Byte, x);
  a.tiles = plan.tiles;
  a.slab_vectors = plan.slab_vectors;
  a.aligned = has_aligned_vectors(
      plan.tiles, layout.channels_last, {a.dy, a.norm[0].x, a.norm[1].x, a.dx[0], a.dx[1], a.dresidual});
  const BackwardKernels<T, kRelu> kernels(layout.channels_last);
  const int threads = plan.tiles.threads();

  if (reduce && !plan.one_pass) {
    a.pass = plan.reduce;
    a.partials = data<Compute<T>>(workspace);
    auto* coefficients = reinterpret_cast<Compute<T>*>(data<char>(workspace) + plan.partial_bytes);
    for (int n = 0; n < kNorms; ++n) {
      if (!a.norm[n].training) continue;
      a.to[n].coefficients = coefficients;
      coefficients += 2 * layout.channels;
    }
    const int64_t blocks = plan.tiles.tiles * plan.reduce.chunks;
    launch_with_shared(kernels.sums, blocks, threads, plan.reduce.shared_bytes, device.stream(), a);
    FinishGradientsArguments<T> finish{plan.tiles, plan.reduce.chunks, kNorms, a.partials, {}, {}};
    for (int n = 0; n < kNorms; ++n) {
      finish.norm[n] = a.norm[n];
      finish.to[n] = a.to[n];
    }
    launch_finish_gradients(finish, plan.finish_threads, device.stream());
  }
  if (!apply) return;
  a.pass = plan.apply;
  a.reverse = plan.reverse && reduce;
  const int64_t blocks = plan.tiles.tiles * plan.apply.chunks;
  auto* kernel = plan.one_pass ? kernels.one_pass : kernels.apply;
  launch_with_shared(kernel, blocks, threads, plan.apply.shared_bytes, device.stream(), a);
}

// ---- the ops ----

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_cuda(
    const Tensor& x,
    const OptionalTensor& residual,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    bool training,
    std::optional<double> momentum,
    double eps,
    bool relu,
    bool save_mask) {
  const Layout4d layout = layout_of(x);
  const NormArguments arguments{weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  check_norm(arguments, x, layout);
  if (residual) check_same_layout("residual", *residual, x);
  STD_TORCH_CHECK(
      !save_mask || (relu && residual), "save_mask is for a residual and a ReLU; otherwise the mask is recomputed");
  const DeviceScope device(x);
  Tensor out = uninitialized_like(x);
  Tensor stats = empty_statistics(layout, x);
  Tensor mask = empty_vector(save_mask ? mask_bytes(layout) : 0, ScalarType::Byte, x);
  const ForwardTensors tensors{residual, out, save_mask ? OptionalTensor(mask) : OptionalTensor()};
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const NormPointers<T> norms[] = {norm_pointers<T>(arguments, x, stats)};
    run_forward(layout, x, norms, !waits_for_counter(arguments), relu, tensors, device);
  });
  return {out, stats, mask};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_add_batch_norm_act_cuda(
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& running_mean,
    const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked,
    bool training,
    std::optional<double> momentum,
    double eps,
    const Tensor& x2,
    const OptionalTensor& weight2,
    const OptionalTensor& bias2,
    const OptionalTensor& running_mean2,
    const OptionalTensor& running_var2,
    const OptionalTensor& num_batches_tracked2,
    bool training2,
    std::optional<double> momentum2,
    double eps2,
    bool relu) {
  const Layout4d layout = layout_of(x);
  const NormArguments first{weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  const NormArguments second{
      weight2, bias2, running_mean2, running_var2, num_batches_tracked2, training2, momentum2, eps2};
  check_norm(first, x, layout);
  check_norm(second, x, layout);
  check_same_layout("x2", x2, x);
  const DeviceScope device(x);
  const ForwardTensors tensors{std::nullopt, uninitialized_like(x), std::nullopt};
  Tensor stats = empty_statistics(layout, x);
  Tensor stats2 = empty_statistics(layout, x);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const NormPointers<T> norms[] = {norm_pointers<T>(first, x, stats), norm_pointers<T>(second, x2, stats2)};
    const bool may_one_pass = !waits_for_counter(first) && !waits_for_counter(second);
    run_forward(layout, x, norms, may_one_pass, relu, tensors, device);
  });
  return {tensors.out, stats, stats2};
}

template <typename T>
T* data_if(bool wanted, const Tensor& t) {
  return wanted ? data<T>(t) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward_cuda(
    const Tensor& dy,
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const Tensor& stats,
    const OptionalTensor& mask,
    bool training,
    bool relu,
    bool need_dx,
    bool need_dresidual,
    bool need_affine) {
  const Layout4d layout = layout_of(x);
  STD_TORCH_CHECK(layout.numel() > 0, "x must not be empty");
  check_same_layout("dy", dy, x);
  check_channel_vectors({&weight, &bias}, x, layout.channels);
  check_statistics(stats, x, layout.channels);
  if (mask) check_mask(*mask, x, mask_bytes(layout));
  const DeviceScope device(x);
  Tensor dx = wanted_like(need_dx, x);
  Tensor dresidual = wanted_like(need_dresidual, x);
  Tensor dweight = wanted_parameter_gradient(need_affine, weight, stats);
  Tensor dbias = wanted_parameter_gradient(need_affine, weight, stats);
  const bool reduce = need_affine || (training && need_dx);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    BackwardArguments<T> a{};
    a.relu = relu;
    a.dy = static_cast<const T*>(dy.const_data_ptr());
    a.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
    a.norm[0] = norm_pointers<T>({weight, bias, {}, {}, {}, training, 0.0, 0.0}, x, stats);
    a.to[0] = {channel_vector<T>(dweight), channel_vector<T>(dbias), nullptr};
    a.dx[0] = data_if<T>(need_dx, dx);
    a.dresidual = data_if<T>(need_dresidual, dresidual);
    a.uses_x = reduce || (relu && !mask);
    if (mask) {
      run_backward<T, Relu::stored>(layout, x, a, reduce, device);
    } else {
      run_backward<T, Relu::recomputed>(layout, x, a, reduce, device);
    }
  });
  return {dx, dresidual, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_add_batch_norm_act_backward_cuda(
    const Tensor& dy,
    const Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const Tensor& stats,
    bool training,
    const Tensor& x2,
    const OptionalTensor& weight2,
    const OptionalTensor& bias2,
    const Tensor& stats2,
    bool training2,
    bool relu,
    bool need_dx,
    bool need_dx2,
    bool need_affine,
    bool need_affine2) {
  const Layout4d layout = layout_of(x);
  STD_TORCH_CHECK(layout.numel() > 0, "x must not be empty");
  check_same_layout("dy", dy, x);
  check_same_layout("x2", x2, x);
  check_channel_vectors({&weight, &bias}, x, layout.channels);
  check_channel_vectors({&weight2, &bias2}, x, layout.channels);
  check_statistics(stats, x, layout.channels);
  check_statistics(stats2, x, layout.channels);
  const DeviceScope device(x);
  Tensor dx = wanted_like(need_dx, x);
  Tensor dx2 = wanted_like(need_dx2, x);
  Tensor dweight = wanted_parameter_gradient(need_affine, weight, stats);
  Tensor dbias = wanted_parameter_gradient(need_affine, weight, stats);
  Tensor dweight2 = wanted_parameter_gradient(need_affine2, weight2, stats2);
  Tensor dbias2 = wanted_parameter_gradient(need_affine2, weight2, stats2);
  const bool sums = need_affine || (training && need_dx), sums2 = need_affine2 || (training2 && need_dx2);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    BackwardArguments<T> a{};
    a.relu = relu;
    a.dy = static_cast<const T*>(dy.const_data_ptr());
    a.norm[0] = norm_pointers<T>({weight, bias, {}, {}, {}, training, 0.0, 0.0}, x, stats);
    a.norm[1] = norm_pointers<T>({weight2, bias2, {}, {}, {}, training2, 0.0, 0.0}, x2, stats2);
    a.to[0] = {channel_vector<T>(dweight), channel_vector<T>(dbias), nullptr};
    a.to[1] = {channel_vector<T>(dweight2), channel_vector<T>(dbias2), nullptr};
    a.dx[0] = data_if<T>(need_dx, dx);
    a.dx[1] = data_if<T>(need_dx2, dx2);
    a.uses_x = relu || sums;
    a.uses_x2 = relu || sums2;
    run_backward<T, Relu::recomputed_of_pair>(layout, x, a, sums || sums2, device);
  });
  return {dx, dweight, dbias, dx2, dweight2, dbias2};
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CUDA, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act_cuda));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward_cuda));
  m.impl("batch_norm_add_batch_norm_act", TORCH_BOX(&batch_norm_add_batch_norm_act_cuda));
  m.impl("batch_norm_add_batch_norm_act_backward", TORCH_BOX(&batch_norm_add_batch_norm_act_backward_cuda));
}

}  // namespace
}  // namespace fusedres

#include "cuda/batch_norm_sync.h"

STABLE_TORCH_LIBRARY_IMPL(fusedres, CUDA, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&fusedres::batch_norm_statistics_cuda));
  m.impl("batch_norm_act_apply", TORCH_BOX(&fusedres::batch_norm_act_apply_cuda));
  m.impl("batch_norm_act_backward_reduce", TORCH_BOX(&fusedres::batch_norm_act_backward_reduce_cuda));
  m.impl("batch_norm_act_backward_apply", TORCH_BOX(&fusedres::batch_norm_act_backward_apply_cuda));
}
