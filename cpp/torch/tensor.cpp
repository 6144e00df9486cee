/// @file
/// The checks and adapters that tensor.h declares.
#include "tensor.h"

#include <algorithm>
#include <limits>
#include <sstream>

// libtorch_cuda alone exports this. It is weak, so that this library also loads under a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace sparse24::torch_ops {
namespace {

/// Prints "(1, 2)".
std::ostream& print_list(std::ostream& out, const Tensor& t, int64_t (Tensor::*entry)(int64_t) const) {
  out << '(';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i > 0 ? ", " : "") << (t.*entry)(i);
  return out << ')';
}

}  // namespace

const char* dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    default: return torch::headeronly::toString(t);
  }
}

std::ostream& operator<<(std::ostream& out, const Device& device) {
  if (device.tensor.is_cpu()) return out << "cpu";
  if (device.tensor.is_cuda()) return out << "cuda:" << device.tensor.get_device_index();
  return out << "another device";
}

std::ostream& operator<<(std::ostream& out, const Shape& shape) { return print_list(out, shape.tensor, &Tensor::size); }

std::ostream& operator<<(std::ostream& out, const Strides& strides) {
  return print_list(out, strides.tensor, &Tensor::stride);
}

ActivationArgs parse_activation(OpName op, const Word& word) {
  if (word.text == "none") return Activation::kNone;
  if (word.text == "relu") return Activation::kRelu;
  expect(word.text == "relu2", op, R"(activation to be "none", "relu" or "relu2", got ")", word.text, '"');
  return Activation::kRelu2;
}

Scaling parse_scaling(OpName op, const Word& word) {
  if (word.text == "row") return Scaling::kRow;
  expect(word.text == "tensor", op, R"(scaling to be "row" or "tensor", got ")", word.text, '"');
  return Scaling::kTensor;
}

Dim parse_dim(OpName op, int64_t dim) {
  expect(dim == -1 || dim == -2, op, "dim to be -1 or -2, got ", dim);
  return dim == -1 ? Dim::kFeatures : Dim::kTokens;
}

ScalarType to_torch(DType t) {
  switch (t) {
    case DType::kFloat32: return ScalarType::Float;
    case DType::kFloat16: return ScalarType::Half;
    case DType::kBFloat16: return ScalarType::BFloat16;
    case DType::kFloat8E4M3: break;
  }
  return ScalarType::Float8_e4m3fn;
}

DType check_dtype(OpName op, const char* argument, const Tensor& t, std::initializer_list<DType> allowed) {
  const ScalarType actual = t.scalar_type();
  const bool on_gpu = t.is_cuda();
  const auto usable = [&](DType candidate) { return !on_gpu || candidate != DType::kFloat32; };
  for (DType candidate : allowed) {
    if (usable(candidate) && actual == to_torch(candidate)) return candidate;
  }
  std::ostringstream names;  // "a, b or c"
  const auto count = std::count_if(allowed.begin(), allowed.end(), usable);
  int64_t printed = 0;
  for (DType candidate : allowed) {
    if (!usable(candidate)) continue;
    names << (printed == 0 ? "" : printed + 1 == count ? " or " : ", ") << name_of(candidate);
    ++printed;
  }
  fail(op, ": expected ", argument, " to be ", names.str(), on_gpu ? " on a CUDA device" : "", ", got ",
       dtype_text(actual));
}

void check_defined(OpName op, const char* argument, const Tensor& t) {
  expect(t.defined(), op, argument, " to be a Tensor, got None");
}

void check_sizes(OpName op, const char* argument, const Tensor& t, int64_t rank) {
  check_defined(op, argument, t);
  expect(t.dim() == rank, op, argument, " to have ", rank, rank == 1 ? " dimension" : " dimensions", ", got ", t.dim(),
         " with shape ", Shape{t});
  for (int64_t i = 0; i < rank; ++i) {
    expect(t.size(i) <= std::numeric_limits<int32_t>::max(), op, argument, " to have sizes below 2^31, got ", Shape{t});
  }
}

void check_device(OpName op, const char* argument, const Tensor& t, const char* reference_name,
                  const Tensor& reference) {
  check_defined(op, argument, t);
  const bool same = t.is_cuda() == reference.is_cuda() && t.is_cpu() == reference.is_cpu() &&
                    (t.is_cpu() || t.get_device_index() == reference.get_device_index());
  expect(same, op, argument, " to be on ", Device{reference}, " (the device of ", reference_name, "), got ", Device{t});
}

void check_columns(OpName op, const char* argument, int64_t cols, DType values, Dim dim) {
  const int64_t multiple = feature_alignment(values, dim);
  expect(cols % multiple == 0, op, argument, " to have a multiple of ", multiple, " columns (", name_of(values),
         " values, dim=", dim == Dim::kFeatures ? -1 : -2, "), got ", cols);
}

void check_meta(OpName op, const Tensor& meta, const Operand& a, const char* argument) {
  expect(meta.scalar_type() == ScalarType::Byte, op, argument, " to be uint8, got ", dtype_text(meta.scalar_type()));
  expect(meta.dim() == 1, op, argument, " to have 1 dimension, got ", meta.dim(), " with shape ", Shape{meta});
  expect(meta.numel() == a.meta_bytes(), op, argument, " to have ", a.meta_bytes(), " elements (a sparse operand of ",
         a.m, " x ", a.k, " in ", name_of(a.dtype), "), got ", meta.numel());
}

void check_scale(OpName op, const char* argument, const Tensor& scale, int64_t elements, bool one_allowed,
                 const char* meaning) {
  const ScalarType dtype = scale.scalar_type();
  expect(dtype == ScalarType::Float, op, argument, " to be float32, got ", dtype_text(dtype));
  const int64_t actual = scale.numel();
  expect(actual == elements || (one_allowed && actual == 1), op, argument, " to have ",
         one_allowed && elements != 1 ? "1 or " : "", elements, elements == 1 ? " element (" : " elements (", meaning,
         "), got ", actual);
}

void check_given_scale(OpName op, const std::optional<Tensor>& scale, Scaling scaling, int64_t rows,
                       const char* meaning, const Tensor& x) {
  if (!scale) return;
  check_device(op, "scale", *scale, "x", x);
  if (scaling == Scaling::kRow) {
    check_scale(op, "scale", *scale, rows, false, meaning);
  } else {
    check_scale(op, "scale", *scale, 1, false, R"(scaling="tensor")");
  }
}

DeviceScope::DeviceScope(OpName op, const Tensor& t) {
  enter_op(op, t);
  if (!t.is_cuda()) return;
  const int32_t device = t.get_device_index();
  guard_.emplace(device);
  // Once for each device in each thread, which has its context then.
  thread_local uint64_t checked = 0;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((checked & bit) == 0) cuda::check_architecture(op);
  checked |= bit;
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream != nullptr &&
            aoti_torch_get_current_cuda_stream(device, &stream) == TORCH_SUCCESS,
        op, ": torch has no current CUDA stream on ", Device{t});
  stream_ = static_cast<cudaStream_t>(stream);
}

}  // namespace sparse24::torch_ops
