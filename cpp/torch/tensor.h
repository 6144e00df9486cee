/// @file
/// What stands between torch's stable tensors and the pointers of the waist: dtypes, checks (tensor.cpp), memory
/// (memory.cpp), and the current stream.
///
/// Only the stable ABI is used, so one binary serves every torch from TORCH_TARGET_VERSION on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <type_traits>

#include "sparse24/sparse24.h"

namespace sparse24::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// A string argument of an op. torch's own conversion to std::string (2.10 to 2.13 at least) never frees its result.
struct Word {
  std::string text;
};

/// What every sentence of a check begins with, the op's name: "sparse24.mm".
using OpName = const char*;

/// Fails with `op: expected <parts>`; the parts read "<argument> <rule>, got <value>". Nothing is printed before.
template <class... Parts>
void expect(bool ok, OpName op, const Parts&... parts) {
  if (!ok) fail(op, ": expected ", parts...);
}

/// These are printed as torch prints them: "float32", "cuda:0", "(2, 3)", "(1, 2)".
const char* dtype_text(ScalarType t);
struct Device {
  const Tensor& tensor;
};
struct Shape {
  const Tensor& tensor;
};
struct Strides {
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& out, const Device& device);
std::ostream& operator<<(std::ostream& out, const Shape& shape);
std::ostream& operator<<(std::ostream& out, const Strides& strides);

// ---- options ------------------------------------------------------------------------------------------------------
ActivationArgs parse_activation(OpName op, const Word& word);
Scaling parse_scaling(OpName op, const Word& word);
Dim parse_dim(OpName op, int64_t dim);

// ---- checks -------------------------------------------------------------------------------------------------------
ScalarType to_torch(DType t);
/// Checks and returns the dtype of `t`, one of `allowed`. float32 has no kernels and is refused on CUDA devices.
DType check_dtype(OpName op, const char* argument, const Tensor& t, std::initializer_list<DType> allowed);
/// Checks that `t` is there: None for a tensor arrives as an undefined one.
void check_defined(OpName op, const char* argument, const Tensor& t);
/// Checks the rank, and that no size exceeds 2^31 - 1, because the kernels' coordinates hold no more. Products of sizes
/// are 64-bit everywhere.
void check_sizes(OpName op, const char* argument, const Tensor& t, int64_t rank);
/// Checks that `t` is on the device of `reference`.
void check_device(OpName op, const char* argument, const Tensor& t, const char* reference_name,
                  const Tensor& reference);
/// Checks the number of columns of X, given the stored type of its values.
void check_columns(OpName op, const char* argument, int64_t cols, DType values, Dim dim);
/// Checks dtype, rank and size of the metadata of `a`.
void check_meta(OpName op, const Tensor& meta, const Operand& a, const char* argument = "meta");
/// Checks values and metadata of dim=-1, whose layout is that of float8 with `fp8_meta`, and describes them in `args`.
template <class Args>
void check_kept(OpName op, const Tensor& values, const Tensor& meta, bool fp8_meta, Args& args) {
  check_sizes(op, "values", values, 2);
  const DType dtype =
      check_dtype(op, "values", values, {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3, DType::kFloat32});
  args.meta_dtype = fp8_meta ? DType::kFloat8E4M3 : dtype;
  const int64_t multiple = feature_alignment(args.meta_dtype, Dim::kFeatures) / 2;
  expect(values.size(1) % multiple == 0, op, "values to have a multiple of ", multiple, " columns (",
         fp8_meta ? "fp8_meta=True" : name_of(dtype), "), got ", values.size(1));
  args.a = Operand::of(values.size(0), 2 * values.size(1), dtype, Dim::kFeatures);
  check_device(op, "meta", meta, "values", values);
  check_meta(op, meta, args.pattern());
}
/// Checks a float32 scale of `elements` elements, or of one if `one_allowed`; `meaning` says what the elements are.
void check_scale(OpName op, const char* argument, const Tensor& scale, int64_t elements, bool one_allowed,
                 const char* meaning);
/// Checks the scale argument of the fp8 conversions, whose elements follow from `scaling`.
void check_given_scale(OpName op, const std::optional<Tensor>& scale, Scaling scaling, int64_t rows,
                       const char* meaning, const Tensor& x);

// ---- memory -------------------------------------------------------------------------------------------------------
/// Remembers which op asks for memory, because the sentence of a failed allocation begins with its name.
void enter_op(OpName op, const Tensor& t);
/// Fails with `op: out of memory: N bytes asked for on <device>`. In Python that is torch.OutOfMemoryError, a
/// RuntimeError.
[[noreturn]] void fail_out_of_memory(uint64_t bytes);
Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);
/// Makes a tensor [..., columns] of the dtype of t [..., any], which has a dimension or more.
Tensor new_rows(const Tensor& t, int64_t columns);
Tensor new_zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);
/// Whether a kernel may use 16-byte accesses from the first element on; always true of CPU tensors.
bool is_aligned(const Tensor& t);
/// Returns `t`, or a copy of it that is contiguous.
Tensor as_contiguous(const Tensor& t);
/// Returns `t`, or a copy of it that is contiguous and aligned.
Tensor contiguous_aligned(const Tensor& t);
/// Returns t [rows, columns] contiguous and aligned; for the GPU it has `padded` columns, with zeros behind the last
/// one.
Tensor pad_columns(const Tensor& t, int64_t padded);
/// Copies rows `first` (a multiple of four) and following of t [rows, columns] to the first rows of `target`. With
/// `interleaved` they are counted in the order of `interleaved_token`.
void copy_rows(Tensor target, Tensor t, bool interleaved, int64_t first = 0);

// ---- running ------------------------------------------------------------------------------------------------------
/// The kernels of both devices for an op of the waist. A build without CUDA has none there, and needs no stubs:
/// `DeviceScope` refuses CUDA tensors before.
#if SPARSE24_WITH_CUDA
#define SPARSE24_KERNELS(name) cpu::name, cuda::name
#else
#define SPARSE24_KERNELS(name) cpu::name, nullptr
#endif

/// Makes the device of a tensor current for its lifetime. On a device without kernels for it, construction throws:
/// after the checks of arguments, before anything is allocated or launched.
class DeviceScope {
 public:
  DeviceScope(OpName op, const Tensor& t);

  /// The first two arguments are `SPARSE24_KERNELS` of an op.
  template <class Args>
  void run(void (*on_cpu)(const Args&), void (*on_cuda)(const Args&, cudaStream_t), const Args& args) const {
    run<Args, void (*)(const Args&, cudaStream_t)>(on_cpu, on_cuda, args);
  }
  /// The same with anything for `on_cuda` that is called so, or nullptr.
  template <class Args, class OnCuda>
  void run(void (*on_cpu)(const Args&), OnCuda on_cuda, const Args& args) const {
    if constexpr (!std::is_null_pointer_v<OnCuda>) {
      if (guard_) {
        on_cuda(args, stream_);
        return;
      }
    }
    cpu::set_max_threads(torch::stable::get_num_threads());
    try {
      on_cpu(args);
    } catch (const OutOfMemory& error) {
      fail_out_of_memory(error.bytes());
    }
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

/// Makes the scale tensor that an fp8 conversion returns: what is used of the given one, or room for the computed one.
Tensor new_scale(const DeviceScope& scope, const Tensor& x, const std::optional<Tensor>& given, Scaling scaling,
                 int64_t rows);

}  // namespace sparse24::torch_ops

/// Takes over the string of an argument and, unlike torch's conversion to std::string, frees what it took.
template <>
struct torch::stable::detail::ToImpl<sparse24::torch_ops::Word> {
  static sparse24::torch_ops::Word call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    sparse24::torch_ops::Word word{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return word;
  }
};

/// A new op: its adapter is a file here, which ends with this macro; what it has in Python, and the tests that know it,
/// are listed in python/sparse24/ops/registration.py. A new kernel beneath it: a header with its Args beside the others
/// of cpp/include/sparse24, the reference of that name in cpp/reference, and the kernel in cuda/.
///
/// Registers a function as the op of its name, at the end of the file that defines it: the schema stands beside the
/// checks that belong to it. One function serves both devices.
#define SPARSE24_OP(name, schema)                                                              \
  STABLE_TORCH_LIBRARY_FRAGMENT(sparse24, library) { library.def(schema); }                    \
  STABLE_TORCH_LIBRARY_IMPL(sparse24, CPU, library) { library.impl(#name, TORCH_BOX(&name)); } \
  STABLE_TORCH_LIBRARY_IMPL(sparse24, CUDA, library) { library.impl(#name, TORCH_BOX(&name)); }
