// relu(x + residual) on a CPU. Compiled once per instruction set for the kernels (FUSEDRES_ISA) and once, without it,
// for the driver and its registration with torch.
#include "add_act_kernels.h"

#if defined(FUSEDRES_ISA)

#include "traverse.h"

namespace fusedres::cpu {
namespace {

template <class T, bool kRelu, bool kMask, bool kFull>
FUSEDRES_INLINE auto add_vector(const AddArgs<T>& a, int64_t i, uint16_t* word, int n) {
  auto y = get<kFull>(a.x + i, n) + get<kFull>(a.residual + i, n);
  if constexpr (kRelu) {
    const auto m = positive<T>(y);
    y = keep(m, y);
    if constexpr (kMask) *word = kFull ? bits(m) : bits(m) & ((1u << n) - 1);
  }
  return y;
}

template <class T, bool kRelu, bool kMask, bool kStream>
void add_range(AddArgs<T> a, int64_t begin, int64_t end) {
  uint16_t* word = a.mask + begin / kLanes;
  int64_t i = begin;
  if constexpr (kStoredInPairs<T>) {
    for (; i + 2 * kLanes <= end; i += 2 * kLanes, word += 2) {
      const auto low = add_vector<T, kRelu, kMask, true>(a, i, word, kLanes);
      const auto high = add_vector<T, kRelu, kMask, true>(a, i + kLanes, word + 1, kLanes);
      store_pair<kStream>(a.out + i, low, high);
    }
  }
  for (; i + kLanes <= end; i += kLanes, ++word) {
    put<true, kStream>(a.out + i, add_vector<T, kRelu, kMask, true>(a, i, word, kLanes), kLanes);
  }
  if (i < end) {
    const int n = static_cast<int>(end - i);
    store_n(a.out + i, add_vector<T, kRelu, kMask, false>(a, i, word, n), n);
  }
  finish_streams(kStream);
}

template <class T>
void add(const AddArgs<T>& a, int64_t begin, int64_t end) {
  if (!a.relu) {
    a.stream ? add_range<T, false, false, true>(a, begin, end) : add_range<T, false, false, false>(a, begin, end);
  } else if (a.mask) {
    a.stream ? add_range<T, true, true, true>(a, begin, end) : add_range<T, true, true, false>(a, begin, end);
  } else {
    a.stream ? add_range<T, true, false, true>(a, begin, end) : add_range<T, true, false, false>(a, begin, end);
  }
}

template <class T, bool kStream>
void mask_range(MaskArgs<T> a, int64_t begin, int64_t end) {
  const uint16_t* word = a.mask + begin / kLanes;
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes, word += 2) copy_kept<kStream>(a.dx + i, a.dy + i, word);
  for (; i < end; i += kLanes, ++word) {
    const int n = static_cast<int>(end - i < kLanes ? end - i : kLanes);
    const auto dy = load_n(a.dy + i, n);
    store_n(a.dx + i, keep(mask_from_bits(*word, dy), dy), n);
  }
  finish_streams(kStream);
}

template <class T>
void mask_gradient(const MaskArgs<T>& a, int64_t begin, int64_t end) {
  a.stream ? mask_range<T, true>(a, begin, end) : mask_range<T, false>(a, begin, end);
}

}  // namespace

namespace FUSEDRES_ISA {

template <class T>
const AddActKernels<T>& add_act_kernels() {
  static constexpr AddActKernels<T> kernels{add<T>, mask_gradient<T>};
  return kernels;
}

template const AddActKernels<float>& add_act_kernels<float>();
template const AddActKernels<double>& add_act_kernels<double>();
template const AddActKernels<bf16>& add_act_kernels<bf16>();
template const AddActKernels<half>& add_act_kernels<half>();

}  // namespace FUSEDRES_ISA
}  // namespace fusedres::cpu

#else  // driver and registration

#include "add_act.h"

namespace fusedres::cpu {
namespace {

constexpr int64_t kPiece = 32 * 1024;  // elements of a task; a multiple of the mask's words

int64_t mask_bytes(int64_t numel) { return 2 * ceil_div(numel, kLanes); }

// Elements in memory order are all that the kernels see: true if the tensor has no gaps and no overlaps.
bool is_dense(const Tensor& x) {
  int64_t strides[64], sizes[64], dims = 0;
  for (int64_t d = 0; d < x.dim() && dims < 64; ++d) {
    if (x.size(d) == 1) continue;
    int64_t at = dims++;
    for (; at > 0 && strides[at - 1] > x.stride(d); --at) {
      strides[at] = strides[at - 1];
      sizes[at] = sizes[at - 1];
    }
    strides[at] = x.stride(d);
    sizes[at] = x.size(d);
  }
  int64_t expected = 1;
  for (int64_t d = 0; d < dims; expected *= sizes[d++]) {
    if (strides[d] != expected) return false;
  }
  return true;
}

template <class F>
void for_each_piece(int64_t numel, const F& f) {
  for_each_task(
      ceil_div(numel, kPiece), numel, [&](int64_t task) { f(task * kPiece, std::min((task + 1) * kPiece, numel)); });
}

std::tuple<Tensor, Tensor> add_act_cpu(Tensor x, Tensor residual, bool relu, bool save_mask) {
  check_same_layout("residual", residual, x);
  STD_TORCH_CHECK(is_dense(x), "x must be dense");
  STD_TORCH_CHECK(!save_mask || relu, "save_mask is for a ReLU");
  const int64_t numel = x.numel();
  Tensor out = uninitialized_like(x);
  Tensor mask = empty_vector(save_mask ? mask_bytes(numel) : 0, ScalarType::Byte, x);
  dispatch(x.scalar_type(), [&]<class T>(T*) {
    const AddArgs<T> args{
        data<T>(x),
        data<T>(residual),
        data<T>(out),
        save_mask ? data<uint16_t>(mask) : nullptr,
        relu,
        streams<T>(numel)};
    for_each_piece(numel, [&](int64_t begin, int64_t end) { add_act_kernels<T>().add(args, begin, end); });
  });
  return {out, mask};
}

Tensor add_act_backward_cpu(Tensor dy, Tensor mask) {
  const int64_t numel = dy.numel();
  STD_TORCH_CHECK(is_dense(dy), "dy must be dense");
  check_mask(mask, dy, mask_bytes(numel));
  Tensor dx = uninitialized_like(dy);
  dispatch(dy.scalar_type(), [&]<class T>(T*) {
    const MaskArgs<T> args{data<T>(dy), data<uint16_t>(mask), data<T>(dx), streams<T>(numel)};
    for_each_piece(numel, [&](int64_t begin, int64_t end) { add_act_kernels<T>().mask_gradient(args, begin, end); });
  });
  return dx;
}

}  // namespace
}  // namespace fusedres::cpu

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("add_act", TORCH_BOX(&fusedres::cpu::add_act_cpu));
  m.impl("add_act_backward", TORCH_BOX(&fusedres::cpu::add_act_backward_cpu));
}

#endif
