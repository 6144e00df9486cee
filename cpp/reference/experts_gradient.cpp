/// @file
/// The plain form of linear_gradient for experts: the product of each, then its entries one by one; and of products
/// over the rows of each.
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "reference/experts.h"
#include "reference/gradient.h"
#include "reference/groups.h"

namespace sparse24::cpu {
namespace {

template <class H>
typename H::Storage* row_of(void* matrix, int64_t row, int64_t columns) {
  return matrix == nullptr ? nullptr : static_cast<typename H::Storage*>(matrix) + row * columns;
}

/// Finishes one row from its dy [features].
template <class H>
void finish_row(const ExpertsLinearGradientArgs& args, const Operand& a, int64_t row, int64_t padded_row,
                const typename H::Storage* dy) {
  const auto* y = static_cast<const typename H::Storage*>(args.values) + padded_row * args.features / 2;
  auto* dh = row_of<H>(args.dh, padded_row, args.features / 2);
  auto *dh_dense = row_of<H>(args.dh_dense, row, args.features), *y_dense = row_of<H>(args.y_dense, row, args.features);
  const float factor = scale_at(args.row_scale, true, row);
  float sum = 0.0f;
  for (int64_t g = 0; g < args.features / 4; ++g) {
    const Pair pair = read_pair(args.meta, a, padded_row, g);
    const int at[] = {pair.first, pair.second};
    for (int i = 1; i >= 0; --i) {  // the first counts where both are the same
      const int64_t j = 2 * g + i, f = 4 * g + at[i];
      const float value = H::load(y[j]), of_dy = H::load(dy[f]);
      sum += value * of_dy;
      dh[j] = H::round(of_dy * (2.0f * std::sqrt(value)) * factor);
      if (dh_dense != nullptr) {
        dh_dense[f] = dh[j];
        y_dense[f] = H::round(value * factor);
      }
    }
  }
  if (args.products != nullptr) args.products[row] = sum;
}

template <class H>
void gradient_as(const ExpertsLinearGradientArgs& args) {
  using Storage = typename H::Storage;
  const Operand a = Operand::of(args.experts.padded_rows(), args.features, args.dtype, Dim::kFeatures);
  const int64_t row_bytes = args.features * size_of(args.dtype);
  for (void* dense : {args.dh_dense, args.y_dense}) {
    if (dense != nullptr) std::memset(dense, 0, static_cast<size_t>(args.experts.rows * row_bytes));
  }
  const int64_t end = for_each_expert(args.experts, [&](const ExpertGroup& group) {
    struct {
      int64_t tokens, in, features, ld_grad;
      const void *grad, *w;
    } product{group.rows,
              args.in,
              args.features,
              args.in,
              at(args.grad, group.begin * args.in * size_of(args.dtype)),
              at(args.w, group.expert * args.in * row_bytes)};
    auto dy = make_buffer<Storage>(group.rows * args.features);
    for_each_gradient<H>(product, [&](int64_t r, int64_t f_begin, int64_t f_end, const float* sums) {
      for (int64_t f = f_begin; f < f_end; ++f)
        dy[static_cast<size_t>(r * args.features + f)] = H::round(sums[f - f_begin]);
    });
    for (int64_t r = 0; r < group.rows; ++r)
      finish_row<H>(args, a, group.begin + r, group.padded_row + r, dy.data() + r * args.features);
  });
  for (int64_t row = end; args.products != nullptr && row < args.experts.rows; ++row) args.products[row] = 0.0f;
}

/// Adds a_e.T @ b_e of one expert's rows to sums [m, n].
template <class H>
void add_products(const ExpertsWeightGradientArgs& args, const ExpertGroup& group, std::vector<float>& sums) {
  using Storage = const typename H::Storage;
  for (int64_t row = group.begin; row < group.begin + group.rows; ++row) {
    const auto *a = static_cast<Storage*>(args.a) + row * args.m, *b = static_cast<Storage*>(args.b) + row * args.n;
    for (int64_t i = 0; i < args.m; ++i) {
      const float factor = H::load(a[i]);
      for (int64_t j = 0; j < args.n; ++j) sums[static_cast<size_t>(i * args.n + j)] += factor * H::load(b[j]);
    }
  }
}

template <class H>
void weight_gradient_as(const ExpertsWeightGradientArgs& args) {
  const int64_t size = args.m * args.n;
  auto* d = static_cast<typename H::Storage*>(args.d);
  std::memset(d, 0, static_cast<size_t>(args.experts.count * size) * sizeof(*d));
  std::vector<float> sums(static_cast<size_t>(size));
  for_each_expert(args.experts, [&](const ExpertGroup& group) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    add_products<H>(args, group, sums);
    for (int64_t i = 0; i < size; ++i) d[group.expert * size + i] = H::round(sums[static_cast<size_t>(i)]);
  });
}

}  // namespace

void experts_weight_gradient(const ExpertsWeightGradientArgs& args) {
  visit_dtype(args.dtype, [&](auto type) { weight_gradient_as<decltype(type)>(args); });
}

void experts_linear_gradient(const ExpertsLinearGradientArgs& args) {
  visit_dtype(args.dtype, [&](auto type) { gradient_as<decltype(type)>(args); });
}

}  // namespace sparse24::cpu
