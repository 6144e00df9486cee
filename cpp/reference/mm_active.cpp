/// @file
/// The reference of mm_active: the same sums in the same order as the kernel's.
#include "sparse24/mm_active.h"

#include <algorithm>

#include "reference/numeric.h"
#include "reference/product.h"

namespace sparse24::cpu {
namespace {

/// The sums of one token in columns [n_begin, n_end). A product of 16-bit numbers is exact in float32, so that adding
/// it rounds as the kernel's multiply-add does; float32, which is for the CPU alone, rounds twice.
template <class Y, class W>
void sum_row(const MmActiveArgs& args, int64_t t, int64_t n_begin, int64_t n_end, float* total) {
  const auto* y = static_cast<const typename Y::Storage*>(args.y) + t * args.features;
  const auto* w = static_cast<const typename W::Storage*>(args.w);
  const int64_t columns = n_end - n_begin;
  for (int64_t part = 0; part < kActiveSlices; part += kActivePart) {
    float of_part[kColumnBlock] = {};
    for (int64_t slice = part; slice < part + kActivePart; ++slice) {
      const int64_t begin = active_slice(args.features, slice), end = active_slice(args.features, slice + 1);
      float chain[kColumnBlock] = {};
      for (int64_t f = begin; f < end; ++f) {
        const float factor = Y::load(y[f]);
        if (factor == 0.0f) continue;
        const auto* row = w + f * args.out_features + n_begin;
        for (int64_t n = 0; n < columns; ++n) chain[n] += factor * W::load(row[n]);
      }
      for (int64_t n = 0; n < columns; ++n) of_part[n] += chain[n];
    }
    for (int64_t n = 0; n < columns; ++n) total[n] += of_part[n];
  }
}

void store(const MmActiveArgs& args, int64_t t, int64_t n_begin, int64_t n_end, const float* total) {
  visit_dtype(args.out_dtype, [&](auto type) {
    using Out = decltype(type);
    auto* out = static_cast<typename Out::Storage*>(args.out) + t * args.out_features;
    for (int64_t n = n_begin; n < n_end; ++n) {
      float v = total[n - n_begin];
      if (args.scale_w != nullptr) v *= scale_at(args.scale_w, args.scale_w_per_column, n);
      if (args.bias != nullptr) v += bias_at(args.bias, args.bias_dtype, n);
      out[n] = Out::round(v);
    }
  });
}

}  // namespace

void mm_active(const MmActiveArgs& args) {
  const int64_t blocks = ceil_div(args.out_features, kColumnBlock);
  visit_dtype(args.dtype, [&](auto of_y) {
    visit_dtype(args.w_dtype, [&](auto of_w) {
      parallel_for(args.tokens * blocks, args.features * kColumnBlock, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t t = i / blocks, n_begin = i % blocks * kColumnBlock;
          const int64_t n_end = std::min(n_begin + kColumnBlock, args.out_features);
          float total[kColumnBlock] = {};
          sum_row<decltype(of_y), decltype(of_w)>(args, t, n_begin, n_end, total);
          store(args, t, n_begin, n_end, total);
        }
      });
    });
  });
}

}  // namespace sparse24::cpu
