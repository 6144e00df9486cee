/// @file
/// The plain form of the sparse matrix product: for every row of A, a sum of rows of B in fp32.
#include <algorithm>
#include <vector>

#include "numeric.h"
#include "parallel.h"
#include "sparse24/mm.h"

namespace sparse24::cpu {
namespace {

/// Columns of B that are multiplied together: the fp32 sums of one row stay in the first-level cache.
constexpr int64_t kColumnBlock = 512;
/// Groups of A whose products are summed before they are added to the total.
constexpr int64_t kGroupBlock = 32;

/// B as fp32, row-major and contiguous, whatever its type and majorness.
template <class In>
std::vector<float> widen_b(const MmArgs& args) {
  const auto* b = static_cast<const typename In::Storage*>(args.b);
  const int64_t k_size = args.a.k, n_size = args.n;
  std::vector<float> wide(static_cast<size_t>(k_size * n_size));
  parallel_for(k_size, n_size, [&](int64_t begin, int64_t end) {
    if (args.b_major == Major::kRow) {
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t n = 0; n < n_size; ++n) wide[static_cast<size_t>(k * n_size + n)] = In::load(b[k * args.ldb + n]);
      }
    } else {
      for (int64_t n = 0; n < n_size; ++n) {
        for (int64_t k = begin; k < end; ++k) wide[static_cast<size_t>(k * n_size + n)] = In::load(b[n * args.ldb + k]);
      }
    }
  });
  return wide;
}

/// sums[n] += sum_k A[m, k] B[k, n] for n in [n_begin, n_end) and the groups in [g_begin, g_end).
template <class In>
void add_products(const MmArgs& args, const float* b, int64_t m, int64_t g_begin, int64_t g_end, int64_t n_begin,
                  int64_t n_end, float* sums) {
  const Operand& a = args.a;
  const auto* values = static_cast<const typename In::Storage*>(args.values);
  for (int64_t g = g_begin; g < g_end; ++g) {
    const int nibble = args.meta[a.meta_byte(m, g)] >> Operand::meta_shift(g);
    for (int slot = 0; slot < 2; ++slot) {
      const int64_t k = 4 * g + (slot == 0 ? nibble & 3 : nibble >> 2 & 3);
      if (k >= a.k) continue;  // a token of the padding
      const float value = In::load(values[a.value_index(m, 2 * g + slot)]);
      const float* row = b + k * args.n + n_begin;
      for (int64_t n = 0; n < n_end - n_begin; ++n) sums[n] += value * row[n];
    }
  }
}

/// sums[n] = sum_k A[m, k] B[k, n], block by block of K: a product goes through few roundings even if K is large.
template <class In>
void accumulate_row(const MmArgs& args, const float* b, int64_t m, int64_t n_begin, int64_t n_end, float* sums) {
  const int64_t groups = ceil_div(args.a.k, 4), columns = n_end - n_begin;
  std::fill(sums, sums + columns, 0.0f);
  for (int64_t g = 0; g < groups; g += kGroupBlock) {
    float block[kColumnBlock] = {};
    add_products<In>(args, b, m, g, std::min(g + kGroupBlock, groups), n_begin, n_end, block);
    for (int64_t n = 0; n < columns; ++n) sums[n] += block[n];
  }
}

/// Scales, bias, one rounding.
template <class Out>
void store_row(const MmArgs& args, int64_t m, int64_t n_begin, int64_t n_end, const float* sums) {
  auto* d = static_cast<typename Out::Storage*>(args.d);
  const float scale_a = args.scale_a == nullptr ? 1.0f : args.scale_a[args.scale_a_per_row ? m : 0];
  for (int64_t n = n_begin; n < n_end; ++n) {
    const float scale_b = args.scale_b == nullptr ? 1.0f : args.scale_b[args.scale_b_per_column ? n : 0];
    float y = scale_a * scale_b * sums[n - n_begin];
    if (args.bias != nullptr) {
      y += visit_dtype(args.bias_dtype, [&](auto type) {
        using Bias = decltype(type);
        return Bias::load(static_cast<const typename Bias::Storage*>(args.bias)[n]);
      });
    }
    d[args.d_major == Major::kRow ? m * args.n + n : n * args.a.m + m] = Out::round(y);
  }
}

template <class In>
void mm_as(const MmArgs& args) {
  const std::vector<float> b = widen_b<In>(args);
  parallel_for(args.a.m, args.a.k / 2 * args.n, [&](int64_t begin, int64_t end) {
    float sums[kColumnBlock];
    for (int64_t n = 0; n < args.n; n += kColumnBlock) {
      const int64_t n_end = std::min(n + kColumnBlock, args.n);
      for (int64_t m = begin; m < end; ++m) {
        accumulate_row<In>(args, b.data(), m, n, n_end, sums);
        visit_dtype(args.d_dtype, [&](auto out) { store_row<decltype(out)>(args, m, n, n_end, sums); });
      }
    }
  });
}

}  // namespace

void mm(const MmArgs& args) {
  visit_dtype(args.a.dtype, [&](auto in) { mm_as<decltype(in)>(args); });
}

}  // namespace sparse24::cpu
