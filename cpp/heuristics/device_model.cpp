// The devices: data of those that are known, and an estimate of others.
#include "sparse24/device_model.h"

#include <algorithm>
#include <cctype>
#include <cstring>

namespace sparse24 {
namespace {

struct Known {
  const char* name;
  int sm_count;
  double tflops, memory_tb_s, l2_bytes;
};
constexpr Known kKnown[] = {
#include "heuristics/devices.inc"
};
constexpr double kMostMemoryTbS = 3.35;

// So many multiply-adds in 16 bits does a Hopper multiprocessor make in a cycle.
constexpr double kMacsOfCycle = 2048;

DeviceModel model_of(const Known& row, int sm_count) {
  return {row.name, sm_count, row.tflops / row.sm_count, std::min(row.memory_tb_s, kMostMemoryTbS), row.l2_bytes};
}

// Whether a name begins with a known one, as "NVIDIA H20-3e" begins with "NVIDIA H20", and "NVIDIA H200" does not.
bool begins_with(const char* name, const char* known) {
  const size_t length = std::strlen(known);
  return std::strncmp(name, known, length) == 0 && !std::isalnum(static_cast<unsigned char>(name[length]));
}

}  // namespace

DeviceModel reference_device() { return reference_device(kKnown[0].sm_count); }
DeviceModel reference_device(int sm_count) { return model_of(kKnown[0], sm_count); }

DeviceModel find_device(const DeviceFacts& facts) {
  for (const Known& row : kKnown) {
    if (begins_with(facts.name, row.name)) return model_of(row, facts.sm_count);
  }
  DeviceModel model = reference_device(facts.sm_count);
  model.name = "unknown";
  if (facts.clock_mhz > 0) model.sm_tflops = 2 * kMacsOfCycle * facts.clock_mhz * 1e-6;
  if (facts.memory_tb_s > 0) model.memory_tb_s = std::min(facts.memory_tb_s, kMostMemoryTbS);
  if (facts.l2_bytes > 0) model.l2_bytes = facts.l2_bytes;
  return model;
}

}  // namespace sparse24
