// Where a scheduler's places take long to find, the warp that fetches hands them to those that multiply.
#pragma once

#include <type_traits>

namespace sparse24::cuda {

// In shared memory: the place of a tile, and the rows that the next one has, for so many tiles.
template <class Place, int kCount>
struct PlacesAndNext {
  Place at[kCount];
  int next_rows[kCount];
};
struct NoPlaces {};

template <class Scheduler, bool kHands>
struct PlaceOf {
  using type = void;
};
template <class Scheduler>
struct PlaceOf<Scheduler, true> {
  using type = typename Scheduler::PlaceOfTile;
};
template <class Scheduler, int kCount>
using HandedPlaces =
    std::conditional_t<Scheduler::kReadsMemory,
                       PlacesAndNext<typename PlaceOf<Scheduler, Scheduler::kReadsMemory>::type, kCount>, NoPlaces>;

}  // namespace sparse24::cuda
