/// @file
/// Memory of the ops, all of which torch allocates. An allocation that fails throws an error with the op, the bytes
/// and the device.
#include <algorithm>
#include <atomic>
#include <exception>
#include <iterator>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

// torch has this since 2.13. The symbol is weak, so that this library also loads under an older torch.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace torch {

/// torch's own base of the exceptions that become a certain Python exception (torch/csrc/Exceptions.h, the same since
/// torch 1.5 at least). A handler finds an exception by the name of its class, and torch's calls nothing but the two
/// virtual functions, what() and this one: so the library needs neither Python nor headers beyond the stable ABI.
struct PyTorchError : std::exception {
  virtual void* python_type() = 0;
};

}  // namespace torch

namespace sparse24::torch_ops {
namespace {

constexpr int64_t kAlignment = 16;

/// The op that this thread is in, and where its tensors are: the index of a GPU, or none.
thread_local struct {
  OpName op = "sparse24";
  std::optional<int32_t> gpu;
} running;

/// This is torch.OutOfMemoryError, where Python has registered it.
std::atomic<void*> out_of_memory_type{nullptr};

class PythonOutOfMemory : public torch::PyTorchError {
 public:
  explicit PythonOutOfMemory(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }
  void* python_type() override { return out_of_memory_type; }

 private:
  std::string text_;
};

/// Returns the bytes of `t` as a tensor of its own. Two sizes below 2^31 and an element of four bytes stay below 2^64.
uint64_t bytes_of(const Tensor& t) {
  return static_cast<uint64_t>(t.numel()) * static_cast<uint64_t>(t.element_size());
}

/// Returns what `allocate` returns, which asks torch for `bytes`.
template <class Allocate>
Tensor allocated(uint64_t bytes, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {  // the stable ABI tells that it failed; why, only since torch 2.13
    fail_out_of_memory(bytes);
  }
}

/// Of the dtypes that ops make tensors of.
uint64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Long: return 8;
    case ScalarType::Int:
    case ScalarType::Float: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 1;
  }
}

template <class Sizes>
uint64_t bytes_of(const Sizes& sizes, ScalarType dtype) {
  uint64_t bytes = element_size(dtype);
  for (int64_t size : sizes) bytes *= static_cast<uint64_t>(size);
  return bytes;
}

/// Makes an empty tensor on the device of `like`.
///
/// `torch::stable::new_empty` finds its operator by name and calls it with boxed arguments, which takes the host four
/// times as long, and more in a model, where little of that is in its caches. An op of few tokens makes two tensors.
/// On the CPU it is taken all the same: there the other function does not fill memory where torch is asked to.
template <class Sizes>
Tensor new_contiguous(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  const uint64_t bytes = bytes_of(sizes, dtype);
  if (!like.is_cuda()) {
    return allocated(bytes, [&] { return torch::stable::new_empty(like, {std::data(sizes), sizes.size()}, dtype); });
  }
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  auto size = sizes.end();
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(*--size, 1)) strides[i] = step;
  return allocated(bytes, [&] {
    const auto type_of_torch = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), std::data(sizes),
                                                    strides.data(), type_of_torch, aoti_torch_device_type_cuda(),
                                                    like.get_device_index(), &made));
    return Tensor(made);
  });
}

}  // namespace

void enter_op(OpName op, const Tensor& t) {
  running.op = op;
  running.gpu = t.is_cuda() ? std::optional<int32_t>(t.get_device_index()) : std::nullopt;
}

void fail_out_of_memory(uint64_t bytes) {
  std::ostringstream text;
  text << running.op << ": out of memory: " << bytes << " bytes asked for on ";
  if (running.gpu) {
    text << "cuda:" << *running.gpu << ", " << cuda::free_memory() << " are free";
  } else {
    text << "cpu";
  }
  if (torch_exception_get_what_without_backtrace != nullptr) {
    const char* reason = torch_exception_get_what_without_backtrace();
    if (reason != nullptr && *reason != 0) text << " (" << reason << ')';
  }
  if (out_of_memory_type != nullptr) throw PythonOutOfMemory(text.str());
  fail(text.str());
}

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_contiguous(like, sizes, dtype);
}

Tensor new_rows(const Tensor& t, int64_t columns) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) sizes.push_back(t.size(i));
  sizes.push_back(columns);
  return new_contiguous(t, sizes, t.scalar_type());
}

Tensor new_zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor made = new_contiguous(like, sizes, dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(made.get()));
  return made;
}

bool is_aligned(const Tensor& t) {
  return !t.is_cuda() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0;
}

Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : allocated(bytes_of(t), [&] { return torch::stable::contiguous(t); });
}

Tensor contiguous_aligned(const Tensor& t) {
  const Tensor out = as_contiguous(t);
  return is_aligned(out) ? out : allocated(bytes_of(out), [&] { return torch::stable::clone(out); });
}

Tensor pad_columns(const Tensor& t, int64_t padded) {
  if (!t.is_cuda() || t.size(1) == padded) return contiguous_aligned(t);
  Tensor buffer = new_zeros(t, {t.size(0), padded}, t.scalar_type());
  Tensor target = torch::stable::narrow(buffer, 1, 0, t.size(1));
  torch::stable::copy_(target, t);
  return buffer;
}

void copy_rows(Tensor target, Tensor t, bool interleaved, int64_t first) {
  const int64_t rows = t.size(0), columns = t.size(1), quarter = interleaved ? rows / 4 : 0;
  const int64_t groups = quarter - first / 4;
  int64_t done = first;
  if (groups > 0) {
    // Row 4 g + i of one is row i quarter + g of the other.
    const int64_t by_group[] = {groups, 4, columns}, by_quarter[] = {4, quarter, columns};
    Tensor ordered = torch::stable::view(torch::stable::narrow(target, 0, 0, 4 * groups), by_group);
    Tensor quarters = torch::stable::view(torch::stable::narrow(t, 0, 0, 4 * quarter), by_quarter);
    torch::stable::copy_(ordered,
                         torch::stable::transpose(torch::stable::narrow(quarters, 1, first / 4, groups), 0, 1));
    done = 4 * quarter;
  }
  if (done == rows) return;
  Tensor rest = torch::stable::narrow(target, 0, done - first, rows - done);
  torch::stable::copy_(rest, torch::stable::narrow(t, 0, done, rows - done));
}

Tensor new_scale(const DeviceScope& scope, const Tensor& x, const std::optional<Tensor>& given, Scaling scaling,
                 int64_t rows) {
  Tensor scale =
      scaling == Scaling::kRow ? new_empty(x, {rows, 1}, ScalarType::Float) : new_empty(x, {1}, ScalarType::Float);
  if (given) {
    const Tensor source = as_contiguous(*given);
    scope.run(SPARSE24_KERNELS(usable_scales),
              UsableScalesArgs{source.const_data_ptr<float>(), scale.numel(), scale.mutable_data_ptr<float>()});
  }
  return scale;
}

}  // namespace sparse24::torch_ops

/// Python calls this once, with the type of the exception that a failed allocation becomes there. C++ programs do not
/// call it, and get `sparse24::Error`.
extern "C" __attribute__((visibility("default"))) void sparse24_set_out_of_memory_type(void* type) {
  sparse24::torch_ops::out_of_memory_type = type;
}
