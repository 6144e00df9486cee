// What a persistent kernel asks of its scheduler, the template argument that says which tiles a CTA works on and in
// which order. A scheduler numbers the tiles; a CTA's own are first(), first() + stride() and so on, as long as
// has_tile() holds.
//
//     Params                        what the kernel is given, a plain struct
//     params(shape, config, sms)    makes it, on the host, for a device of so many multiprocessors
//     grid(params)                  how many CTAs that is made for: whole clusters
//     kReadsMemory                  whether the device reads what Params points to: all warps of a kernel then wait for
//                                   the kernel before it
//     kVariesK                      whether tiles have numbers of K tiles of their own: k_rows(i) is what those of the
//                                   i-th tile cover
//     Shared                        what it keeps in shared memory of what it read; empty elsewhere
//     Scheduler(params)             on the device, the calling CTA's
//     first(), stride()             numbers
//     has_tile(i), tile(i)          whether there is an i-th tile, and its place, in tiles
//
// A scheduler may split the tiles of the last wave; their parts then come before all whole tiles:
//
//     kParts                        the parts of a split tile, along N; 1: it splits none, and has no more than this
//     has_part(i), part(i)          whether there is an i-th part, and its place, whose n counts parts
//
// Every warp of a CTA walks the tiles by itself, so a place depends on the parameters and on the CTA alone. The CTAs of
// a cluster must get as many tiles each, and ones that share what the cluster's copies are multicast for.
//
// One that reads memory (schedulers/expert_scheduler.cuh) has fill(params, shared), which all threads of a CTA call,
// and is made of both. Its place may have other things than a tile's coordinates: overloads of the functions below hand
// it to the mainloop's copies, and the epilogue takes all of it.
#pragma once

#include <cutlass/cutlass.h>

#include <cstdint>
#include <cute/tensor.hpp>

namespace sparse24::cuda {

struct Place {
  int m, n, batch;
};

// What mainloops and epilogues take for the coordinates of a tile.
CUTLASS_HOST_DEVICE auto coordinates(Place const& at) { return cute::make_coord(at.m, at.n, cute::_, at.batch); }
// The first row of the result that a tile of so many rows has.
CUTLASS_HOST_DEVICE int first_row(Place const& at, int tile_m) { return at.m * tile_m; }

// The result and its tiles. Where batches are experts, their rows end at offsets.
struct ResultShape {
  int m, n, batches;
  int tile_m, tile_n;
  const int32_t* offsets = nullptr;
  int k = 0;
};

}  // namespace sparse24::cuda
