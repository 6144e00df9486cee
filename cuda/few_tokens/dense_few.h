// A dense product of a few dozen tokens with a weight that is read once, as its launchers pass it on.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sparse24::cuda {

// How a weight [rows, K] is walked. It follows from the sizes of the weight alone, and with it the order of sums does.
struct DenseWalk {
  int rows;      // of the weight
  int tiles;     // of consecutive rows, as even as whole eights allow
  int slices;    // of K, whose sums are added in order: the blocks of a cluster
  int chunks;    // of K
  int box_rows;  // of the longest tile

  constexpr static int eights(int64_t rows) { return int((rows + 7) / 8); }

  // A unit is a tile of a slice; those of a tile are beside each other.
  constexpr int units() const { return tiles * slices; }
  constexpr int tile(int unit) const { return unit / slices; }
  constexpr int slice(int unit) const { return unit % slices; }
  constexpr int first_row(int tile) const {
    const int row = int(int64_t{eights(rows)} * tile / tiles) * 8;
    return row < rows ? row : rows;
  }
  constexpr int first_chunk(int slice) const { return int(int64_t{chunks} * slice / slices); }
};

// What is between the two products and the scales around them, as the device sees it.
struct DenseFactors {
  const float* scale_w;  // of float8
  bool scale_w_per_row;
  const void* bias;
  bool bias_is_float;
  const float* scale_y;  // of float8: what the activation's codes are multiplied with
  bool scale_y_per_token;
};

// y = max(h, 0)^2 of h = x @ w.T * scale_x * scale_w + bias.
struct DenseRelu2Params {
  DenseFactors factors;
  const float* scale_x;  // of float8
  bool scale_x_per_token;
  float threshold;
  void* y;  // [tokens, rows]
};

// out = y @ w.T * scale_y * scale_w + bias.
struct DenseSumParams {
  DenseFactors factors;
  void* out;  // [tokens, rows], of 16 bits
  bool out_is_half;
};

template <class Params>
struct DenseLaunch {
  CUtensorMap w, x;  // x: [tokens, K]
  DenseWalk walk;
  int tokens, stages;
  bool dependent;  // weights may be read before the kernel in front is complete
  Params params;
};

}  // namespace sparse24::cuda
