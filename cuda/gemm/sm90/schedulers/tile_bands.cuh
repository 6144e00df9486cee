// The order of a GEMM's tiles: bands of neighbouring clusters across one side of the result, each walked along the
// other side, every second one backwards. What a band needs of one operand stays in L2 while the other comes by, and
// the turns find in L2 what came last. Along M, 7 columns of clusters in bands of at most 4:
//
//      0  1  2  3 | .. .. ..
//      4  5  6  7 | .. .. ..
//          ...    | 35 36 37
//     28 29 30 31 | 32 33 34
//
// Bands are as equal as they can be, so that no tiles pad the order: CUTLASS's, whose bands are powers of two, has some
// that lie beyond the result.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/fast_math.h>

#include <cstdint>

namespace sparse24::cuda {

class TileBands {
 public:
  struct Place {
    int m, n;  // of a cluster
  };

  // width: the most clusters across a band; along_m: bands are walked along M.
  TileBands(int clusters_m, int clusters_n, int width, bool along_m)
      : along_m_(along_m), length_(along_m ? clusters_m : clusters_n), side_(along_m ? clusters_n : clusters_m) {
    const int bands = cutlass::ceil_div(side_, width), narrow = side_ / bands;
    wide_bands_ = side_ % bands;
    wide_ = Band(length_, narrow + 1);
    narrow_ = Band(length_, narrow);
  }

  CUTLASS_HOST_DEVICE int clusters() const { return length_ * side_; }

  CUTLASS_HOST_DEVICE Place place(int number) const {
    const int in_wide = wide_bands_ * wide_.clusters.divisor;
    const bool is_wide = number < in_wide;
    const int before = is_wide ? 0 : wide_bands_;  // bands of the other width
    const Band& of = is_wide ? wide_ : narrow_;
    int band, within, along, across;
    of.clusters(band, within, is_wide ? number : number - in_wide);
    of.width(along, across, within);
    across += band * of.width.divisor + before * wide_.width.divisor;
    if ((before + band) % 2 == 1) along = length_ - 1 - along;
    return along_m_ ? Place{along, across} : Place{across, along};
  }

 private:
  struct Band {
    cutlass::FastDivmod clusters, width;
    Band() = default;
    Band(int length, int width) : clusters(length * width), width(width) {}
  };
  bool along_m_;
  int length_, side_, wide_bands_;  // in clusters; wide bands come first, and are one cluster wider
  Band wide_, narrow_;
};

}  // namespace sparse24::cuda
