// The CPU kernels of a folded 1x1 convolution, as the driver calls them: matrix products over blocks of rows (pixels),
// one table per storage type and instruction set.
//
// A matrix is multiplied from panels: pieces of kPanelColumns columns, in each of which the rows follow one another, so
// that the innermost loop reads one stream. An element of a panel is what one multiplication takes: a float, a double,
// or two bfloat16 of successive rows.
#pragma once

#include "batch_norm_kernels.h"

namespace fusedres::cpu {

constexpr int64_t kApplyRows = 48;     // rows of a block of an output: with one panel they stay in L1
constexpr int64_t kMomentsRows = 128;  // rows that are summed in the compute type, and then in double
constexpr int64_t kReduceRows = 256;   // of sums whose differences are not taken

// How a kernel's panels are laid out.
struct PanelShape {
  int64_t columns;       // of a panel
  int64_t rows;          // that go into one element: two for pairs of bfloat16
  int64_t element_size;  // bytes
  int64_t steps(int64_t inner) const { return (inner + rows - 1) / rows; }
  int64_t panels(int64_t width) const { return (width + columns - 1) / columns; }
};

// Rows of a matrix, wherever they are, to panels; missing columns and rows become zero.
template <class T>
struct PackArgs {
  using S = typename ScalarOf<T>::type;
  const T* const* rows;
  int64_t count;
  int64_t width;
  void* panels;
  int64_t panel_steps;       // steps that a panel has in all
  int64_t first_step;        // where these rows begin
  const S* shift = nullptr;  // (width) or null: subtracted; never of 16-bit rows, for that would round them
  const S* norm = nullptr;   // or null: what is packed is relu(norm(row)); a table of Slots<false>::forward vectors
  // Or null: only what the mask keeps is packed and, past the caches if `stream`, written to g. The mask and g are
  // those of the first row, rows are adjacent, and width is a multiple of kLanes.
  const uint16_t* mask = nullptr;
  T* g = nullptr;
  bool stream = false;
};

// Rows to rows of elements, padded to whole steps; shift and norm as of PackArgs.
template <class T>
struct WidenArgs {
  using S = typename ScalarOf<T>::type;
  const T* const* rows;
  int64_t count;
  int64_t width;
  void* elements;
  int64_t row_bytes;  // from one row of elements to the next
  const S* shift;
  const S* norm;
};

// out = relu(a1 b1 + a2 b2 + shift + residual) of `count` rows, at most kApplyRows.
template <class T>
struct MultiplyArgs {
  using S = typename ScalarOf<T>::type;
  int64_t count, columns;
  const void* const* a1;  // per row: elements, or T where the kernels read T (see direct)
  int64_t steps1;
  const void* const* a2;
  int64_t steps2;  // or 0
  const void* panels;
  const S* shift;            // padded to whole vectors
  const T* const* residual;  // per row, or null
  // Of the first row, or null; only where columns % kLanes == 0. The residual counts where its bit is set.
  const uint16_t* residual_mask;
  T* const* out;   // per row
  uint16_t* mask;  // like residual_mask
  bool relu;
  bool stream;
  // Or null: the first of adjacent rows as wide as out, which becomes zero where relu(norm(x)) is. Adds to sums, two
  // rows of whole vectors of columns, those of out and of out * (x - mean).
  const T* x = nullptr;
  const S* norm = nullptr;  // as of PackArgs
  double* sums = nullptr;
  // Rows that are read after these, as many and adjacent, to make a1 and a2 of them; or null. Brought near meanwhile.
  const T* next1 = nullptr;
  const T* next2 = nullptr;
  int64_t width1 = 0, width2 = 0;  // of those rows
};

// Adds to products (inner columns of `left`, columns of `right`, a row of padded(right)) the sum over the packed rows.
struct ProductsArgs {
  const void* left;
  int64_t left_width;
  const void* right;
  int64_t right_width;
  int64_t steps;               // of either
  bool symmetric;              // left is right: only products[i][j] with j >= i are wanted
  double* products;            // whole vectors of columns
  double* sums;                // of the columns of `right`, or null
  const void* next = nullptr;  // what is read after these products: brought near meanwhile
  int64_t next_bytes = 0;
};

template <class T>
struct Conv1x1Kernels {
  PanelShape shape;  // of all but moments
  bool direct;       // rows of an even number of T can be read as elements, without packing
  void (*widen)(const WidenArgs<T>&);
  void (*pack)(const PackArgs<T>&);
  void (*multiply)(const MultiplyArgs<T>&);
  void (*products)(const ProductsArgs&);
  PanelShape moments_shape;  // float is squared in double: the variances are differences of these sums
  void (*pack_moments)(const PackArgs<T>&);
  void (*moments)(const ProductsArgs&);
  void (*mask_of)(const T* out, int64_t count, uint16_t* mask);
};

#define FUSEDRES_DECLARE_CONV1X1(isa)         \
  namespace isa {                             \
  template <class T>                          \
  const Conv1x1Kernels<T>& conv1x1_kernels(); \
  }
FUSEDRES_DECLARE_CONV1X1(baseline)
FUSEDRES_DECLARE_CONV1X1(avx2)
FUSEDRES_DECLARE_CONV1X1(avx512)
#undef FUSEDRES_DECLARE_CONV1X1

}  // namespace fusedres::cpu
