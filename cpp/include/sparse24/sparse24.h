/// @file
/// Everything of the torch-free core.
#pragma once

#include "sparse24/compress.h"
#include "sparse24/densest_features.h"
#include "sparse24/device.h"
#include "sparse24/error.h"
#include "sparse24/feature_counts.h"
#include "sparse24/format.h"
#include "sparse24/gather_features.h"
#include "sparse24/gemm.h"
#include "sparse24/linear.h"
#include "sparse24/linear_gradient.h"
#include "sparse24/linear_relu2_gradient.h"
#include "sparse24/mm.h"
#include "sparse24/mm_active.h"
#include "sparse24/put_features.h"
#include "sparse24/quantize.h"
#include "sparse24/relu2_mlp_few.h"
#include "sparse24/threads.h"
#include "sparse24/token_order.h"
#include "sparse24/types.h"
