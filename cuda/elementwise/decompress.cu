// decompress scatters to a known pattern, and compress_like gathers from one. They move elements of 1 or 2 bytes and
// never look at what these mean.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "sparse24/compress.h"

namespace sparse24::cuda {
namespace {

constexpr int kThreads = 256;

// N neighbouring elements, moved at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T e[N];
};

__device__ __forceinline__ uint32_t nibble_of(const Operand& a, const uint8_t* meta, int64_t row, int64_t g) {
  return meta[a.meta_byte(row, g)] >> Operand::meta_shift(g) & 0xf;
}

// Returns e[i] for an index that is known at run time only; registers have no index, so that this chooses.
template <class T, int N>
__device__ __forceinline__ T pick(const T (&e)[N], uint32_t i) {
  T out = e[0];
#pragma unroll
  for (int j = 1; j < N; ++j) out = i == j ? e[j] : out;
  return out;
}

// Moves groups that lie along features. A thread owns four groups of a row: 16 columns, 8 kept values.
template <class T, bool kGather>
__global__ void __launch_bounds__(kThreads) move_features(Operand a, const uint8_t* meta, const T* in, T* out) {
  const int64_t per_row = a.k / 16;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.m * per_row) return;
  const int64_t row = i / per_row, col = i % per_row * 16;
  constexpr int kDense = 16 / sizeof(T) < 16 ? 16 / sizeof(T) : 16;  // elements per access to X
  Pack<T, 8> kept;
  Pack<T, kDense> dense[16 / kDense] = {};
  const auto* x = reinterpret_cast<const Pack<T, kDense>*>(in + row * a.k + col);
  if constexpr (kGather) {
#pragma unroll
    for (int d = 0; d < 16 / kDense; ++d) dense[d] = x[d];
  } else {
    kept = *reinterpret_cast<const Pack<T, 8>*>(in + (row * a.k + col) / 2);
  }
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const uint32_t nibble = nibble_of(a, meta, row, col / 4 + g), i0 = nibble & 3, i1 = nibble >> 2;
    if constexpr (kGather) {
      T group[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) group[j] = dense[(4 * g + j) / kDense].e[(4 * g + j) % kDense];
      kept.e[2 * g] = pick(group, i0);
      kept.e[2 * g + 1] = pick(group, i1);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        T& e = dense[(4 * g + j) / kDense].e[(4 * g + j) % kDense];
        e = i0 == j ? kept.e[2 * g] : i1 == j ? kept.e[2 * g + 1] : T{0};
      }
    }
  }
  if constexpr (kGather) {
    *reinterpret_cast<Pack<T, 8>*>(out + (row * a.k + col) / 2) = kept;
  } else {
#pragma unroll
    for (int d = 0; d < 16 / kDense; ++d) reinterpret_cast<Pack<T, kDense>*>(out + row * a.k + col)[d] = dense[d];
  }
}

// Moves groups that lie along tokens. A thread owns one group of tokens of kFeatures neighbouring features: 8 where
// values are stored by pairs of tokens (16 bits), 1 where they are stored by feature (fp8).
template <class T, bool kGather, int kFeatures>
__global__ void __launch_bounds__(kThreads) move_tokens(Operand a, const uint8_t* meta, const T* in, T* out) {
  using Row = Pack<T, kFeatures>;
  const int64_t per_group = a.m / kFeatures;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.k_values / 4 * per_group) return;
  const int64_t g = i / per_group, m = i % per_group * kFeatures;
  const auto token = [&](auto* x, int j) { return x + (4 * g + j) * a.m + m; };
  Row dense[4] = {}, kept[2];
  if constexpr (kGather) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (4 * g + j < a.k) dense[j] = *reinterpret_cast<const Row*>(token(in, j));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j) kept[j] = *reinterpret_cast<const Row*>(in + a.value_index(m, 2 * g + j));
  }
#pragma unroll
  for (int f = 0; f < kFeatures; ++f) {
    const uint32_t nibble = nibble_of(a, meta, m + f, g), i0 = nibble & 3, i1 = nibble >> 2;
    if constexpr (kGather) {
      const T group[4] = {dense[0].e[f], dense[1].e[f], dense[2].e[f], dense[3].e[f]};
      kept[0].e[f] = pick(group, i0);
      kept[1].e[f] = pick(group, i1);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) dense[j].e[f] = i0 == j ? kept[0].e[f] : i1 == j ? kept[1].e[f] : T{0};
    }
  }
  if constexpr (kGather) {
#pragma unroll
    for (int j = 0; j < 2; ++j) *reinterpret_cast<Row*>(out + a.value_index(m, 2 * g + j)) = kept[j];
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (4 * g + j < a.k) *reinterpret_cast<Row*>(token(out, j)) = dense[j];
    }
  }
}

template <bool kGather>
void move(const Operand& a, const uint8_t* meta, const void* in, void* out, cudaStream_t stream) {
  if (a.m == 0 || a.k == 0) return;
  const auto blocks = [](int64_t threads) { return unsigned(ceil_div(threads, kThreads)); };
  const auto features = [&](auto element) {
    using T = decltype(element);
    move_features<T, kGather>
        <<<blocks(a.m * (a.k / 16)), kThreads, 0, stream>>>(a, meta, static_cast<const T*>(in), static_cast<T*>(out));
  };
  if (a.dim == Dim::kFeatures) {
    a.dtype == DType::kFloat8E4M3 ? features(uint8_t{}) : features(uint16_t{});
  } else if (a.dtype == DType::kFloat8E4M3) {
    move_tokens<uint8_t, kGather, 1><<<blocks(a.k_values / 4 * a.m), kThreads, 0, stream>>>(
        a, meta, static_cast<const uint8_t*>(in), static_cast<uint8_t*>(out));
  } else {
    move_tokens<uint16_t, kGather, 8><<<blocks(a.k_values / 4 * (a.m / 8)), kThreads, 0, stream>>>(
        a, meta, static_cast<const uint16_t*>(in), static_cast<uint16_t*>(out));
  }
  check_launch(kGather ? "compress_like" : "decompress");
}

}  // namespace

void compress_like(const CompressLikeArgs& args, cudaStream_t stream) {
  move</*kGather=*/true>(Operand::of(args.rows, args.cols, args.dtype, args.dim), args.meta, args.x, args.values,
                         stream);
}

void decompress(const DecompressArgs& args, cudaStream_t stream) {
  move</*kGather=*/false>(Operand::of(args.rows, args.cols, args.dtype, args.dim), args.meta, args.values, args.x,
                          stream);
}

}  // namespace sparse24::cuda
