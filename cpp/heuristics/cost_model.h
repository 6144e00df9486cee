/// @file
/// How long a GEMM takes, in us, and in which order its tiles run.
///
/// The clusters of tiles that run at the same time are a wave. A wave takes the time of one tile: its area times the
/// columns of K, at the rate of its kind. What whole waves leave over is a wave of its own, or one of quarters.
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

/// The model: constants of the device that was measured, and the device whose times are wanted.
struct CostModel {
  DeviceModel device;
  const Costs& costs;

  /// Returns `config` in the order of tiles that reads least, with the last wave split where that pays.
  GemmConfig in_order(const GemmProblem& problem, GemmConfig config) const;
  /// Returns the time of a GEMM, which is infinite for a tile that has not been measured.
  double predicted_us(const GemmProblem& problem, const GemmConfig& config) const;

 private:
  struct Waves {
    int64_t whole, left_over;  ///< clusters that are left over
  };
  Waves waves_of(const GemmProblem& problem, const GemmConfig& config) const;
  double quarter_waves(const Waves& waves, const GemmConfig& config) const;
  double mac_us(const GemmProblem& problem) const;
  /// Returns the us that reading bytes takes, at a rate of the reference device.
  double reading_us(double bytes, double tb_s) const;
  int clusters_in_flight(const GemmConfig& config) const;
};

/// Returns the fastest of `configs` by the model, in its order of tiles; they are in none yet.
GemmConfig fastest(const CostModel& model, const GemmProblem& problem, const std::vector<GemmConfig>& configs);

}  // namespace sparse24
