/// @file
/// The plain form of linear_gradient for experts: the product of each, then its entries one by one; and of products
/// over the rows of each.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "reference/experts.h"
#include "reference/groups.h"
#include "reference/product.h"

namespace sparse24::cpu {
namespace {

template <class H>
typename H::Storage* row_of(void* matrix, int64_t row, int64_t columns) {
  return matrix == nullptr ? nullptr : static_cast<typename H::Storage*>(matrix) + row * columns;
}

/// Finishes one row from its dy [features]; y is of In, and everything else of H.
template <class In, class H>
void finish_row(const ExpertsLinearGradientArgs& args, const Operand& a, int64_t row, int64_t padded_row,
                const typename H::Storage* dy) {
  const auto* y = static_cast<const typename In::Storage*>(args.values) + padded_row * args.features / 2;
  auto* dh = row_of<H>(args.dh, padded_row, args.features / 2);
  auto *dh_dense = row_of<H>(args.dh_dense, row, args.features), *y_dense = row_of<H>(args.y_dense, row, args.features);
  const float factor = scale_at(args.row_scale, true, row), scale_y = scale_at(args.scale_y, true, padded_row);
  float sum = 0.0f;
  for (int64_t g = 0; g < args.features / 4; ++g) {
    const Pair pair = read_pair(args.meta, a, padded_row, g);
    const int at[] = {pair.first, pair.second};
    for (int i = 1; i >= 0; --i) {  // the first counts where both are the same
      const int64_t j = 2 * g + i, f = 4 * g + at[i];
      const float value = H::load(H::round(In::load(y[j]) * scale_y)), of_dy = H::load(dy[f]);
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

/// Computes dy [rows, features] of one expert.
template <class In, class H>
std::vector<typename H::Storage> gradient_of(const ExpertsLinearGradientArgs& args, const ExpertGroup& group) {
  const int64_t bytes = size_of(args.dtype), features = args.features;
  const bool k_major = args.dtype == DType::kFloat8E4M3;
  const std::vector<float> w = widen<In>(at(args.w, group.expert * args.in * features * bytes), args.in, features,
                                         k_major ? Major::kColumn : Major::kRow, k_major ? args.in : features);
  const float* scale_w =
      args.scale_w == nullptr ? nullptr : args.scale_w + group.expert * (args.scale_w_per_row ? features : 1);
  auto dy = make_buffer<typename H::Storage>(group.rows * features);
  for_each_sum(group.rows, features, args.in,
               dense_products<In>(at(args.grad, group.begin * args.in * bytes), args.in, w, features),
               [&](int64_t r, int64_t f_begin, int64_t f_end, const float* sums) {
                 const float of_row = scale_at(args.scale_grad, args.scale_grad_per_row, group.begin + r);
                 for (int64_t f = f_begin; f < f_end; ++f) {
                   dy[static_cast<size_t>(r * features + f)] =
                       H::round(sums[f - f_begin] * of_row * scale_at(scale_w, args.scale_w_per_row, f));
                 }
               });
  return dy;
}

template <class In, class H>
void gradient_as(const ExpertsLinearGradientArgs& args) {
  const Operand a = Operand::of(args.experts.padded_rows(), args.features, args.dtype, Dim::kFeatures);
  for (void* dense : {args.dh_dense, args.y_dense}) {
    if (dense != nullptr)
      std::memset(dense, 0, static_cast<size_t>(args.experts.rows * args.features * size_of(args.result())));
  }
  const int64_t end = for_each_expert(args.experts, [&](const ExpertGroup& group) {
    const auto dy = gradient_of<In, H>(args, group);
    for (int64_t r = 0; r < group.rows; ++r)
      finish_row<In, H>(args, a, group.begin + r, group.padded_row + r, dy.data() + r * args.features);
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
  visit_dtype(args.dtype, [&](auto in) {
    visit_dtype(args.result(), [&](auto result) { gradient_as<decltype(in), decltype(result)>(args); });
  });
}

}  // namespace sparse24::cpu
