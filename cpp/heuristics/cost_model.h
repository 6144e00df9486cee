/// @file
/// How long a GEMM takes, in us, and in which order its tiles run.
///
/// All clusters of tiles that run at the same time are a wave. A wave takes the time of one tile: its area by the
/// columns of K, at the rate of its kind. What is left over by whole waves is a wave of its own, or one of quarters.
#pragma once

#include "heuristics/costs.h"
#include "sparse24/device_model.h"

namespace sparse24 {

/// A product of A [m, k] and B [k, n].
struct GemmProblem {
  Product product;
  DType dtype;
  int64_t m, n, k;
};

/// Constants of measured devices, and the device that they are for.
struct CostModel {
  DeviceModel device;
  const Costs& costs;

  /// `config` in the order of tiles that reads least, and divided where that pays.
  GemmConfig in_order(const GemmProblem& problem, GemmConfig config) const;
  /// Infinite for a tile that has not been measured.
  double predicted_us(const GemmProblem& problem, const GemmConfig& config) const;

 private:
  struct Waves {
    int64_t whole, left_over;  ///< clusters that are left over
  };
  Waves waves_of(const GemmProblem& problem, const GemmConfig& config) const;
  double quarter_waves(const Waves& waves, const GemmConfig& config) const;
  double mac_us(const GemmProblem& problem) const;
  /// us of reading bytes at a rate of the reference device.
  double reading_us(double bytes, double tb_s) const;
  int clusters_in_flight(const GemmConfig& config) const;
};

/// The fastest of `configs`, which are in no order yet, by the model.
GemmConfig fastest(const CostModel& model, const GemmProblem& problem, const std::vector<GemmConfig>& configs);

}  // namespace sparse24
