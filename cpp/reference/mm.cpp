/// @file
/// The plain form of the sparse matrix product: for every row of A, a sum of rows of B in fp32.
#include "sparse24/mm.h"

#include <vector>

#include "reference/groups.h"
#include "reference/numeric.h"
#include "reference/product.h"

namespace sparse24::cpu {
namespace {

/// Adds sum_k A[m, k] B[k, n] to sums[n - n_begin] for n in [n_begin, n_end) and the groups in [k_begin, k_end).
template <class In>
void add_products(const MmArgs& args, const float* b, int64_t m, int64_t k_begin, int64_t k_end, int64_t n_begin,
                  int64_t n_end, float* sums) {
  const Operand& a = args.a;
  const auto* values = static_cast<const typename In::Storage*>(args.values);
  const int64_t quarter = args.b_interleaved ? a.k / 4 : 0;
  for (int64_t g = k_begin / 4; g < ceil_div(k_end, 4); ++g) {
    const Pair pair = read_pair(args.meta, a, m, g);
    for (int slot = 0; slot < 2; ++slot) {
      const int64_t k = 4 * g + (slot == 0 ? pair.first : pair.second);
      if (2 * g + slot >= a.kept()) continue;  // of a token of the padding
      const float value = In::load(values[a.value_index(m, 2 * g + slot)]);
      if (k >= a.k) {  // beyond the last token b is zero; compress keeps nothing there, but any metadata may
        for (int64_t n = 0; n < n_end - n_begin; ++n) sums[n] += value * 0.0f;
        continue;
      }
      const float* row = b + interleaved_token(k, quarter) * args.n + n_begin;
      for (int64_t n = 0; n < n_end - n_begin; ++n) sums[n] += value * row[n];
    }
  }
}

/// Applies scales and bias, and rounds once.
template <class Out>
void store_row(const MmArgs& args, int64_t m, int64_t n_begin, int64_t n_end, const float* sums) {
  auto* d = static_cast<typename Out::Storage*>(args.d);
  const float scale_a = scale_at(args.scale_a, args.scale_a_per_row, m);
  for (int64_t n = n_begin; n < n_end; ++n) {
    float y = scale_a * scale_at(args.scale_b, args.scale_b_per_column, n) * sums[n - n_begin];
    if (args.bias != nullptr) y += bias_at(args.bias, args.bias_dtype, n);
    d[args.d_major == Major::kRow ? m * args.n + n : n * args.a.m + m] = Out::round(y);
  }
}

template <class In>
void mm_as(const MmArgs& args) {
  const std::vector<float> b = widen<In>(args.b, args.a.k, args.n, args.b_major, args.ldb);
  for_each_sum(
      args.a.m, args.n, args.a.k,
      [&](int64_t m, int64_t k_begin, int64_t k_end, int64_t n_begin, int64_t n_end, float* sums) {
        add_products<In>(args, b.data(), m, k_begin, k_end, n_begin, n_end, sums);
      },
      [&](int64_t m, int64_t n_begin, int64_t n_end, const float* sums) {
        visit_dtype(args.d_dtype, [&](auto out) { store_row<decltype(out)>(args, m, n_begin, n_end, sums); });
      });
}

}  // namespace

void mm(const MmArgs& args) {
  visit_dtype(args.a.dtype, [&](auto in) { mm_as<decltype(in)>(args); });
}

}  // namespace sparse24::cpu
