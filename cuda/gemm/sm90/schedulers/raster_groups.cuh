// The rasterisation of a GEMM's tiles: groups of neighbouring clusters across one side of the result, each walked along
// the other side, every second one backwards. What a group needs of one operand stays in L2 while the other comes by,
// and the turns find in L2 what came last. Along M, 7 columns of clusters in groups of at most 4 (the swizzle width):
//
//      0  1  2  3 | .. .. ..
//      4  5  6  7 | .. .. ..
//          ...    | 35 36 37
//     28 29 30 31 | 32 33 34
//
// Groups are as equal as they can be, so that no tiles pad the order: CUTLASS's, whose groups are powers of two, has
// some that lie beyond the result.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/fast_math.h>

#include <cstdint>

namespace sparse24::cuda {

class RasterGroups {
 public:
  struct Cluster {
    int m, n;
  };

  // width: the most clusters across a group; along_m: groups are walked along M.
  RasterGroups(int clusters_m, int clusters_n, int width, bool along_m)
      : along_m_(along_m), length_(along_m ? clusters_m : clusters_n), side_(along_m ? clusters_n : clusters_m) {
    const int groups = cutlass::ceil_div(side_, width), narrow = side_ / groups;
    wide_groups_ = side_ % groups;
    wide_ = Group(length_, narrow + 1);
    narrow_ = Group(length_, narrow);
  }

  CUTLASS_HOST_DEVICE int clusters() const { return length_ * side_; }

  CUTLASS_HOST_DEVICE Cluster cluster(int number) const {
    const int in_wide = wide_groups_ * wide_.clusters.divisor;
    const bool is_wide = number < in_wide;
    const int before = is_wide ? 0 : wide_groups_;  // groups of the other width
    const Group& of = is_wide ? wide_ : narrow_;
    int group, within, along, across;
    of.clusters(group, within, is_wide ? number : number - in_wide);
    of.width(along, across, within);
    across += group * of.width.divisor + before * wide_.width.divisor;
    if ((before + group) % 2 == 1) along = length_ - 1 - along;
    return along_m_ ? Cluster{along, across} : Cluster{across, along};
  }

 private:
  struct Group {
    cutlass::FastDivmod clusters, width;
    Group() = default;
    Group(int length, int width) : clusters(length * width), width(width) {}
  };
  bool along_m_;
  int length_, side_, wide_groups_;  // in clusters; wide groups come first, and are one cluster wider
  Group wide_, narrow_;
};

}  // namespace sparse24::cuda
