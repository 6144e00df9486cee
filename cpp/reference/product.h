/// @file
/// What the references of the GEMMs share: the dense operand in fp32, sums block by block, scales and bias.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/buffer.h"
#include "core/parallel.h"
#include "reference/numeric.h"

namespace sparse24 {

/// So many columns are multiplied together that the fp32 sums of one row stay in the first-level cache.
inline constexpr int64_t kColumnBlock = 512;
/// So many products along K are summed before they are added to the total, so that a product goes through few roundings
/// even if K is large. It is a multiple of four, so that blocks hold whole groups.
inline constexpr int64_t kReductionBlock = 128;

/// Returns the dense operand B [k, n] as fp32, row-major and contiguous, whatever its type and majorness.
template <class In>
std::vector<float> widen(const void* stored, int64_t k_size, int64_t n_size, Major major, int64_t ld) {
  const auto* b = static_cast<const typename In::Storage*>(stored);
  auto wide = make_buffer<float>(k_size * n_size);
  parallel_for(k_size, n_size, [&](int64_t begin, int64_t end) {
    if (major == Major::kRow) {
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t n = 0; n < n_size; ++n) wide[static_cast<size_t>(k * n_size + n)] = In::load(b[k * ld + n]);
      }
    } else {
      for (int64_t n = 0; n < n_size; ++n) {
        for (int64_t k = begin; k < end; ++k) wide[static_cast<size_t>(k * n_size + n)] = In::load(b[n * ld + k]);
      }
    }
  });
  return wide;
}

/// Computes the sums of a product [m, n] over k, row by row in blocks of columns.
///
/// `add(m, k_begin, k_end, n_begin, n_end, sums)` adds the products of one block of K to `sums`, which begins at
/// column n_begin; `store(m, n_begin, n_end, sums)` takes the totals. Threads share no row.
template <class Add, class Store>
void for_each_sum(int64_t m_size, int64_t n_size, int64_t k_size, const Add& add, const Store& store) {
  parallel_for(m_size, k_size * n_size, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < n_size; n += kColumnBlock) {
      const int64_t n_end = std::min(n + kColumnBlock, n_size), columns = n_end - n;
      for (int64_t m = begin; m < end; ++m) {
        float total[kColumnBlock] = {};
        for (int64_t k = 0; k < k_size; k += kReductionBlock) {
          float block[kColumnBlock] = {};
          add(m, k, std::min(k + kReductionBlock, k_size), n, n_end, block);
          for (int64_t i = 0; i < columns; ++i) total[i] += block[i];
        }
        store(m, n, n_end, total);
      }
    }
  });
}

/// The `add` of a dense A with rows `lda` apart and the widened B of `n_size` columns. `kept`: which entries B has
/// [k, n_size], where it was 2:4. The others are zero, and multiply nothing: neither NaN nor an infinity.
template <class In>
auto dense_products(const void* stored_a, int64_t lda, const std::vector<float>& b, int64_t n_size,
                    const uint8_t* kept = nullptr) {
  const auto* a = static_cast<const typename In::Storage*>(stored_a);
  return [=, &b](int64_t m, int64_t k_begin, int64_t k_end, int64_t n_begin, int64_t n_end, float* sums) {
    for (int64_t k = k_begin; k < k_end; ++k) {
      const float factor = In::load(a[m * lda + k]);
      const float* row = b.data() + k * n_size + n_begin;
      if (kept != nullptr && !std::isfinite(factor)) {
        for (int64_t n = 0; n < n_end - n_begin; ++n) {
          if (kept[k * n_size + n_begin + n]) sums[n] += factor * row[n];
        }
        continue;
      }
      for (int64_t n = 0; n < n_end - n_begin; ++n) sums[n] += factor * row[n];
    }
  };
}

/// Returns one scale for all, one for each, or 1 where there is none.
inline float scale_at(const float* scale, bool one_for_each, int64_t i) {
  return scale == nullptr ? 1.0f : scale[one_for_each ? i : 0];
}

/// Returns element i of a bias of any type.
inline float bias_at(const void* bias, DType dtype, int64_t i) {
  return visit_dtype(dtype, [&](auto type) {
    using Bias = decltype(type);
    return Bias::load(static_cast<const typename Bias::Storage*>(bias)[i]);
  });
}

}  // namespace sparse24
