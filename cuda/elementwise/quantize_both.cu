// quantize_fp8_both: X is read once, and its e4m3 codes are written as they lie and transposed. transpose_fp8: codes
// that are there are written transposed.
//
// A CTA owns 128 rows in the order of the transpose (32 groups of four) and 128 columns. A thread owns one group and 16
// columns, c .. c + 7 and c + 64 .. c + 71: it transposes 4 x 4 codes in registers, so that shared memory turns words,
// four rows each, and lines of 128 bytes leave it.
#include <type_traits>

#include "common/activation.cuh"
#include "common/dispatch.cuh"
#include "common/float8.cuh"
#include "common/launch.cuh"
#include "common/packed.cuh"
#include "common/warp.cuh"
#include "elementwise/amax.cuh"
#include "elementwise/prune_pack24.cuh"
#include "sparse24/quantize_both.h"
#include "sparsity/select24.cuh"

namespace sparse24::cuda {
namespace {

constexpr int kThreads = 256, kRows = 128, kColumns = 128;
constexpr int kGroups = kRows / 4, kWarps = kThreads / 32;

template <class T>
using Raw = ElementwiseActivation<T, Activation::kNone>;

// Byte i of word j becomes byte j of word i.
__device__ __forceinline__ void transpose_bytes(uint32_t (&w)[4]) {
  const uint32_t a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
  const uint32_t c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
  w[0] = __byte_perm(a, b, 0x5410);
  w[1] = __byte_perm(a, b, 0x7632);
  w[2] = __byte_perm(c, d, 0x5410);
  w[3] = __byte_perm(c, d, 0x7632);
}

template <class T>
__device__ __forceinline__ uint32_t four_to_e4m3(const Vec8& v, int first, float inverse) {
  const auto scaled = [&](int i) { return __fmul_rn(to_float(T{}, v[first + i]), inverse); };
  return pack16(to_e4m3x2(scaled(0), scaled(1)), to_e4m3x2(scaled(2), scaled(3)));
}

// The codes of two groups of four columns: pruned, and what stays of them with its byte of the metadata.
struct PrunedCodes {
  uint32_t dense[2], packed, meta;
};
template <class T>
__device__ __forceinline__ PrunedCodes prune_columns(const Vec8& v, float inverse) {
  uint32_t pairs[2], nibbles[2], dense[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t low = v.w[2 * i], high = v.w[2 * i + 1];
    const Kept kept = keep_two(Raw<T>::magnitudes(low), Raw<T>::magnitudes(high), low, high);
    const auto scaled = [&](int j) { return __fmul_rn(to_float(T{}, uint16_t(kept.pair >> 16 * j)), inverse); };
    pairs[i] = to_e4m3x2(scaled(0), scaled(1));
    nibbles[i] = 15 - kept.complement;
    // Byte 4 is a zero; the places of the two codes select bytes 0 and 1.
    dense[i] = permute_bytes(pairs[i], 0, 0x4444u ^ 4u << (nibbles[i] << 2 & 12) ^ 5u << (nibbles[i] & 12));
  }
  return {{dense[0], dense[1]}, pairs[0] | pairs[1] << 16, nibbles[0] | nibbles[1] << 4};
}

// Prunes groups of four rows, in all columns. `nibbles` has the places of what stays, by half and column.
template <class T>
__device__ __forceinline__ void prune_rows(Vec8 (&v)[4][2], uint32_t (&nibbles)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t bits[2][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bits[0][j] = v[j][half][2 * i];
        bits[1][j] = v[j][half][2 * i + 1];
      }
      const KeptOfFour a = keep_of_four<T, T>(bits[0]), b = keep_of_four<T, T>(bits[1]);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j][half].w[i] = pack16(a.out[j], b.out[j]);
      nibbles[half] |= (a.nibble() | b.nibble() << 4) << 8 * i;
    }
  }
}

// What is done to x: nothing, or its groups along columns or rows are pruned, and packed.
enum class Groups { kNone, kColumns, kRows, kPackedColumns, kPackedRows };
template <Groups kHow>
using Pruning = std::integral_constant<Groups, kHow>;

// CTAs of a multiprocessor, which hold their numbers in registers until all of them are there.
template <Groups kHow>
constexpr int kCtas = kHow == Groups::kNone || kHow == Groups::kColumns ? 4 : 3;

// kGiven: the scale is, and max |x| is found on the way; else that is known, and gives the scale.
template <class T, bool kGiven, Groups kHow>
__global__ void __launch_bounds__(kThreads, kCtas<kHow>)
    quantize_both(const QuantizeBothArgs all, int64_t ld_qt, int column_tiles) {
  const QuantizeBothArgs args = all.matrix(blockIdx.y, sizeof(T));
  // Of each column 32 groups, all codes or the kept pair, group g at g ^ 4 * (column / 8 % 8) against bank conflicts.
  __shared__ alignas(16) std::conditional_t<kHow == Groups::kPackedRows, uint16_t, uint32_t> tile[kColumns][kGroups];
  __shared__ float largest[kWarps];
  constexpr bool kPacksColumns = kHow == Groups::kPackedColumns, kPacksRows = kHow == Groups::kPackedRows;
  constexpr bool kPrunesRows = kHow == Groups::kRows || kPacksRows;
  __shared__ alignas(16) uint8_t metas[kPacksColumns || kPacksRows ? 128 : 1][16];  // of rows of the operand
  const int64_t row0 = int64_t(blockIdx.x / column_tiles) * kRows;
  const int64_t column0 = int64_t(blockIdx.x % column_tiles) * kColumns;
  const int chunk = threadIdx.x % 8, group = threadIdx.x / 8;
  const auto* x = static_cast<const T*>(args.x);
  auto* q = static_cast<uint8_t*>(args.q);
  auto* as_they_lie = static_cast<uint8_t*>(kPacksRows ? args.qt : args.q);

  Vec8 v[4][2] = {};
  int64_t row[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t place = row0 + 4 * group + i;
    row[i] = interleaved_token(place, args.quarter());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = column0 + 64 * half + 8 * chunk;
      if (place < args.rows && column < args.cols) v[i][half] = load16(x + row[i] * args.cols + column);
    }
  }
  const float scale = kGiven ? usable_scale(*args.given_scale) : scale_of(*args.amax);
  const float inverse = __frcp_rn(scale);
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.scale = scale;
  if constexpr (kGiven) {
    typename Pair<T>::type m{};
#pragma unroll
    for (int i = 0; i < 4; ++i) m = Raw<T>::max(Raw<T>::max(m, v[i][0]), v[i][1]);
    const float of_warp = warp_max(Raw<T>::activated_max(m));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = of_warp;
  }
  uint32_t nibbles[2] = {};
  if constexpr (kPrunesRows) prune_rows<T>(v, nibbles);
  if constexpr (kPacksRows) {
    // Lanes 8 apart have groups beside each other, and share the bytes of their columns.
    const bool odd = group & 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t got = __shfl_xor_sync(0xffffffffu, nibbles[half], 8);
      const uint32_t first = (odd ? got : nibbles[half]) >> 16 * odd, second = (odd ? nibbles[half] : got) >> 16 * odd;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        metas[64 * half + 8 * chunk + 4 * odd + c][group / 2] =
            uint8_t((first >> 4 * c & 0xf) | (second >> 4 * c & 0xf) << 4);
      }
    }
  }
  // The bytes of rows that exist. Behind them there are zeros, which not every scale leaves what they are.
  const auto rows = uint32_t(min(max(args.rows - row0 - 4 * group, int64_t{0}), int64_t{4}));
  const uint32_t existing = uint32_t((uint64_t{1} << 8 * rows) - 1);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t column = column0 + 64 * half + 8 * chunk;
    uint32_t codes[2][4];  // of four columns, by row
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool inside = row0 + 4 * group + i < args.rows && column < args.cols;
      if constexpr (kHow == Groups::kColumns || kPacksColumns) {
        const PrunedCodes pruned = prune_columns<T>(v[i][half], inverse);
        codes[0][i] = pruned.dense[0];
        codes[1][i] = pruned.dense[1];
        if constexpr (kPacksColumns) {
          metas[packed_row(4 * group + i)][8 * half + chunk] = uint8_t(pruned.meta);
          if (inside) *reinterpret_cast<uint32_t*>(q + (packed_row(row[i]) * args.cols + column) / 2) = pruned.packed;
        }
      } else {
        codes[0][i] = four_to_e4m3<T>(v[i][half], 0, inverse);
        codes[1][i] = four_to_e4m3<T>(v[i][half], 4, inverse);
      }
      if (!kPacksColumns && inside)
        *reinterpret_cast<uint2*>(as_they_lie + row[i] * args.cols + column) = make_uint2(codes[0][i], codes[1][i]);
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      transpose_bytes(codes[part]);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        uint32_t of_column = codes[part][c] & existing;
        if constexpr (kPacksRows) {
          const uint32_t nibble = nibbles[half] >> 4 * (4 * part + c);
          of_column = permute_bytes(of_column, 0, (nibble & 3) | (nibble << 2 & 0x30));
        }
        tile[64 * half + 8 * chunk + 4 * part + c][group ^ 4 * chunk] = of_column;
      }
    }
  }
  __syncthreads();
  if constexpr (kGiven) {
    if (threadIdx.x < 32) {
      const float of_block = warp_max(largest[threadIdx.x % kWarps]);
      if (threadIdx.x == 0) atomic_max(args.amax, of_block);
    }
  }
  if constexpr (kPacksColumns || kPacksRows) {
    if (threadIdx.x < 128) {
      const int64_t m = (kPacksRows ? column0 : row0) + threadIdx.x, k = kPacksRows ? row0 : column0;
      *reinterpret_cast<uint4*>(args.meta + (k / 128 * args.packed().m_meta + m) * 16) =
          *reinterpret_cast<const uint4*>(metas[threadIdx.x]);
    }
  }
  if constexpr (kPacksRows) {
    for (int i = threadIdx.x; i < kColumns * kGroups / 8; i += kThreads) {  // 16 bytes are eight groups
      const int column = i / (kGroups / 8), eight = 8 * (i % (kGroups / 8)), moved = 4 * (column / 8 % 8);
      if (column0 + column >= args.cols || row0 + 4 * eight >= args.rows) continue;
      const uint2 low = *reinterpret_cast<const uint2*>(&tile[column][eight ^ moved]);
      const uint2 high = *reinterpret_cast<const uint2*>(&tile[column][(eight + 4) ^ moved]);
      store16(q + ((column0 + column) * args.rows + row0) / 2 + 2 * eight, low.x, low.y, high.x, high.y);
    }
    return;
  }
  auto* qt = static_cast<uint8_t*>(args.qt);
  for (int i = threadIdx.x; i < kColumns * kGroups / 4; i += kThreads) {  // 16 bytes are four groups
    const int column = i / (kGroups / 4), four = 4 * (i % (kGroups / 4));
    const int64_t byte = row0 + 4 * four;
    if (column0 + column < args.cols && byte < ld_qt) {
      *reinterpret_cast<uint4*>(qt + (column0 + column) * ld_qt + byte) =
          *reinterpret_cast<const uint4*>(&tile[column][four ^ 4 * (column / 8 % 8)]);
    }
  }
}

// As above, but a thread owns 16 columns side by side: c .. c + 15 of four rows are codes already.
__global__ void __launch_bounds__(kThreads) transpose(const TransposeFp8Args args, int64_t ld_qt, int column_tiles) {
  __shared__ alignas(16) uint32_t tile[kColumns][kGroups];  // word g of a column at g ^ 4 * (column / 16)
  const int64_t row0 = int64_t(blockIdx.x / column_tiles) * kRows;
  const int64_t column0 = int64_t(blockIdx.x % column_tiles) * kColumns;
  const int chunk = threadIdx.x % 8, group = threadIdx.x / 8;
  const auto* q = static_cast<const uint8_t*>(args.q);
  uint32_t v[4][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + 4 * group + i, column = column0 + 16 * chunk;
    if (row < args.rows && column < args.cols)
      *reinterpret_cast<uint4*>(v[i]) = *reinterpret_cast<const uint4*>(q + row * args.cols + column);
  }
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    uint32_t codes[4] = {v[0][part], v[1][part], v[2][part], v[3][part]};
    transpose_bytes(codes);
#pragma unroll
    for (int c = 0; c < 4; ++c) tile[16 * chunk + 4 * part + c][group ^ 4 * chunk] = codes[c];
  }
  __syncthreads();
  auto* qt = static_cast<uint8_t*>(args.qt);
  for (int i = threadIdx.x; i < kColumns * kGroups / 4; i += kThreads) {  // 16 bytes are four groups
    const int column = i / (kGroups / 4), four = 4 * (i % (kGroups / 4));
    const int64_t byte = row0 + 4 * four;
    if (column0 + column < args.cols && byte < ld_qt) {
      *reinterpret_cast<uint4*>(qt + (column0 + column) * ld_qt + byte) =
          *reinterpret_cast<const uint4*>(&tile[column][four ^ 4 * (column / 16)]);
    }
  }
}

__global__ void scales_of_nothing(const float* given, float* scale) {
  scale[blockIdx.x] = given ? usable_scale(given[blockIdx.x]) : 1.f;
}

template <class T>
void run(const QuantizeBothArgs& args, cudaStream_t stream) {
  if (!args.given_scale) {
    run_amax_tensor(Raw<T>(Activation::kNone), static_cast<const T*>(args.x), args.rows * args.cols / 8, args.amax,
                    stream, args.count);
  }
  const int64_t column_tiles = ceil_div(args.cols, kColumns), ld_qt = args.ld_qt();
  const dim3 blocks(unsigned(ceil_div(args.rows, kRows) * column_tiles), unsigned(args.count));
  const auto launch = [&](auto kernel) { kernel<<<blocks, kThreads, 0, stream>>>(args, ld_qt, int(column_tiles)); };
  const auto launch_of = [&](auto groups) {
    constexpr Groups kHow = decltype(groups)::value;
    args.given_scale ? launch(quantize_both<T, true, kHow>) : launch(quantize_both<T, false, kHow>);
  };
  if (args.meta) {
    args.dim == Dim::kFeatures ? launch_of(Pruning<Groups::kPackedColumns>{})
                               : launch_of(Pruning<Groups::kPackedRows>{});
  } else if (!args.prunes) {
    launch_of(Pruning<Groups::kNone>{});
  } else if (args.dim == Dim::kFeatures) {
    launch_of(Pruning<Groups::kColumns>{});
  } else {
    launch_of(Pruning<Groups::kRows>{});
  }
  check_launch("quantize_both");
}

}  // namespace

void quantize_fp8_both(const QuantizeBothArgs& args, cudaStream_t stream) {
  if (args.count == 0) return;
  if (args.rows == 0 || args.cols == 0) {
    scales_of_nothing<<<unsigned(args.count), 1, 0, stream>>>(args.given_scale, args.scale);
    return check_launch("scales_of_nothing");
  }
  dispatch_16bit(args.x_dtype, [&](auto t) { run<decltype(t)>(args, stream); });
}

void transpose_fp8(const TransposeFp8Args& args, cudaStream_t stream) {
  if (args.rows == 0 || args.cols == 0) return;
  const int64_t column_tiles = ceil_div(args.cols, kColumns);
  const auto blocks = unsigned(ceil_div(args.rows, kRows) * column_tiles);
  transpose<<<blocks, kThreads, 0, stream>>>(args, args.ld_qt(), int(column_tiles));
  check_launch("transpose_fp8");
}

}  // namespace sparse24::cuda
