// Host side of linear_relu2 and linear_compress: finds the kernel of linear_instances.def and launches it.
#include "linear_launchers.h"
#include "sparse24/error.h"

namespace sparse24::cuda {
namespace {

struct Relu2Instance {
  DType dtype, hidden, y;
  void (*launch)(const LinearRelu2Args&, cudaStream_t);
};
struct CompressInstance {
  DType dtype, hidden, y, meta;
  void (*launch)(const LinearCompressArgs&, cudaStream_t);
};

constexpr Relu2Instance kRelu2Instances[] = {
#define SPARSE24_LINEAR_COMPRESS(dtype, hidden, y, meta)
#define SPARSE24_LINEAR_RELU2(dtype, hidden, y) \
  {DType::dtype, DType::hidden, DType::y, launch_linear_relu2_sm90<DType::dtype, DType::hidden, DType::y>},
#include "linear_instances.def"
#undef SPARSE24_LINEAR_RELU2
#undef SPARSE24_LINEAR_COMPRESS
};

constexpr CompressInstance kCompressInstances[] = {
#define SPARSE24_LINEAR_RELU2(dtype, hidden, y)
#define SPARSE24_LINEAR_COMPRESS(dtype, hidden, y, meta) \
  {DType::dtype, DType::hidden, DType::y, DType::meta,   \
   launch_linear_compress_sm90<DType::dtype, DType::hidden, DType::y, DType::meta>},
#include "linear_instances.def"
#undef SPARSE24_LINEAR_RELU2
#undef SPARSE24_LINEAR_COMPRESS
};

bool matches(const LinearArgs& args, DType dtype, DType hidden, DType y) {
  return args.dtype == dtype && args.hidden_dtype == hidden && args.y_dtype == y;
}

[[noreturn]] void refuse(const char* op, const LinearArgs& args) {
  fail(op, ": expected a compiled kernel for x ", name_of(args.dtype), ", h ", name_of(args.hidden_dtype), ", y ",
       name_of(args.y_dtype), ", got none");
}

}  // namespace

void linear_relu2(const LinearRelu2Args& args, cudaStream_t stream) {
  const LinearArgs& linear = args.linear;
  if (linear.tokens == 0 || linear.out == 0) return;
  for (const Relu2Instance& i : kRelu2Instances) {
    if (matches(linear, i.dtype, i.hidden, i.y)) return i.launch(args, stream);
  }
  refuse("sparse24.linear_relu2", linear);
}

void linear_compress(const LinearCompressArgs& args, cudaStream_t stream) {
  const LinearArgs& linear = args.linear;
  if (linear.tokens == 0 || linear.out == 0) return;
  for (const CompressInstance& i : kCompressInstances) {
    if (matches(linear, i.dtype, i.hidden, i.y) && meta_atom_k(i.meta) == meta_atom_k(args.meta_dtype)) {
      return i.launch(args, stream);
    }
  }
  refuse("sparse24.linear_compress", linear);
}

}  // namespace sparse24::cuda
