/// @file
/// The plain form of linear_relu2 and linear_compress: the product, then the separate steps that the kernels fuse.
#include "sparse24/linear.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/buffer.h"
#include "reference/activate.h"
#include "reference/groups.h"
#include "reference/kept.h"
#include "reference/numeric.h"
#include "reference/product.h"
#include "sparse24/compress.h"
#include "sparse24/quantize.h"

namespace sparse24::cpu {
namespace {

/// h [tokens, out] as it is stored: scales and bias in fp32, one rounding to hidden_dtype.
struct PreActivation {
  explicit PreActivation(const LinearArgs& args)
      : bytes(make_buffer<unsigned char>(args.tokens * args.out * size_of(args.hidden_dtype))) {}

  template <class H>
  typename H::Storage* codes() {
    return reinterpret_cast<typename H::Storage*>(bytes.data());
  }

  std::vector<unsigned char> bytes;
};

template <class In, class H>
void multiply_as(const LinearArgs& args, typename H::Storage* h, const uint8_t* kept) {
  const std::vector<float> b = widen<In>(args.w, args.in, args.out, Major::kColumn, args.in);
  for_each_sum(args.tokens, args.out, args.in, dense_products<In>(args.x, args.in, b, args.out, kept),
               [&](int64_t t, int64_t f_begin, int64_t f_end, const float* sums) {
                 const float scale_x = scale_at(args.scale_x, args.scale_x_per_row, t);
                 for (int64_t f = f_begin; f < f_end; ++f) {
                   float sum = scale_x * scale_at(args.scale_w, args.scale_w_per_row, f) * sums[f - f_begin];
                   if (args.bias != nullptr) sum += bias_at(args.bias, args.hidden_dtype, f);
                   h[t * args.out + f] = H::round(sum);
                 }
               });
}

PreActivation multiply(const LinearArgs& args, const uint8_t* kept = nullptr) {
  PreActivation pre_activation(args);
  visit_dtype(args.dtype, [&](auto in) {
    visit_dtype(args.hidden_dtype, [&](auto type) {
      using H = decltype(type);
      multiply_as<decltype(in), H>(args, pre_activation.codes<H>(), kept);
    });
  });
  return pre_activation;
}

/// 1 / scale of a token.
float inverse_scale(const LinearArgs& args, int64_t t) {
  return 1.0f / usable_scale(scale_at(args.scale_y, args.scale_y_per_row, t));
}

bool saturates(float y, float inverse) { return std::fabs(y * inverse) > kLargestE4M3; }

/// The largest y of all, dropped or not, before it is scaled.
template <class H>
void raise_amax(const LinearArgs& args, const typename H::Storage* h) {
  if (args.amax == nullptr) return;
  for (float largest : row_amax<H>(h, args.tokens, args.out, args.activation)) {
    *args.amax = std::max(*args.amax, largest);
  }
}

/// Adds `count(t)`, what saturates in one row of y.
template <class Count>
void add_saturated(const LinearArgs& args, const Count& count) {
  if (args.saturated == nullptr || args.y_dtype != DType::kFloat8E4M3) return;
  auto of_row = make_buffer<int32_t>(args.tokens);
  parallel_for(args.tokens, args.out, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) of_row[static_cast<size_t>(t)] = count(t, inverse_scale(args, t));
  });
  *args.saturated = std::accumulate(of_row.begin(), of_row.end(), *args.saturated);
}

template <class H>
void store_dense(const LinearRelu2Args& args, const typename H::Storage* h) {
  const LinearArgs& linear = args.linear;
  parallel_for(linear.tokens, linear.out, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float inverse = inverse_scale(linear, t);
      for (int64_t at = t * linear.out; at < (t + 1) * linear.out; ++at) {
        const float y = linear.activation.value(H::load(h[at]));
        if (linear.y_dtype == DType::kFloat8E4M3) {
          static_cast<uint8_t*>(args.y)[at] = float_to_e4m3(y * inverse);
        } else {
          static_cast<typename H::Storage*>(args.y)[at] = H::round(y);
        }
      }
    }
  });
}

/// values and meta by cpu::compress; its metadata, which follows the type of the values, in the order of meta_dtype.
void store_compressed(const LinearCompressArgs& args, const void* h) {
  const LinearArgs& linear = args.linear;
  CompressArgs separate{h,
                        linear.hidden_dtype,
                        linear.tokens,
                        linear.out,
                        Dim::kFeatures,
                        linear.activation,
                        linear.y_dtype,
                        args.values,
                        args.meta};
  separate.scaling = linear.scale_y_per_row ? Scaling::kRow : Scaling::kTensor;
  separate.given_scale = linear.scale_y;
  if (args.meta_dtype == linear.y_dtype) {
    compress(separate);
    return;
  }
  const Operand from = Operand::of(linear.tokens, linear.out, linear.y_dtype, Dim::kFeatures);
  const Operand to = Operand::of(linear.tokens, linear.out, args.meta_dtype, Dim::kFeatures);
  auto meta = make_buffer<uint8_t>(from.meta_bytes());
  separate.meta = meta.data();
  compress(separate);
  convert_meta(meta.data(), from, args.meta, to);
}

}  // namespace

void linear_relu2(const LinearRelu2Args& args) {
  const LinearArgs& linear = args.linear;
  PreActivation pre_activation = multiply(linear);
  visit_dtype(linear.hidden_dtype, [&](auto type) {
    using H = decltype(type);
    const auto* h = pre_activation.codes<H>();
    store_dense<H>(args, h);
    raise_amax<H>(linear, h);
    add_saturated(linear, [&](int64_t t, float inverse) {
      const auto* row = h + t * linear.out;
      return static_cast<int32_t>(std::count_if(row, row + linear.out, [&](auto code) {
        return saturates(linear.activation.value(H::load(code)), inverse);
      }));
    });
  });
}

void linear_compress(const LinearCompressArgs& args) { linear_compress(args, nullptr); }

void linear_compress(const LinearCompressArgs& args, const uint8_t* kept) {
  const LinearArgs& linear = args.linear;
  PreActivation pre_activation = multiply(linear, kept);
  store_compressed(args, pre_activation.bytes.data());
  const Operand a = Operand::of(linear.tokens, linear.out, args.meta_dtype, Dim::kFeatures);
  visit_dtype(linear.hidden_dtype, [&](auto type) {
    using H = decltype(type);
    const auto* h = pre_activation.codes<H>();
    raise_amax<H>(linear, h);
    add_saturated(linear, [&](int64_t t, float inverse) {
      int32_t count = 0;
      for (int64_t g = 0; g < linear.out / 4; ++g) {
        const Pair pair = read_pair(args.meta, a, t, g);
        const auto* group = h + t * linear.out + 4 * g;
        count += saturates(linear.activation.value(H::load(group[pair.first])), inverse);
        count += saturates(linear.activation.value(H::load(group[pair.second])), inverse);
      }
      return count;
    });
  });
}

}  // namespace sparse24::cpu
