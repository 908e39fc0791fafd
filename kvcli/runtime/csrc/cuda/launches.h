// What api.cu launches.
#pragma once

#include "launch.cuh"
// the emulator's or CUDA's runtime comes first
#include "../kvrt.h"

namespace kvrt {

constexpr int64_t MIN_ROPE_POSITIONS = 16;  // rows of the step table that attend takes from the rope table

cudaError_t launch_append(const kv_layer& layer, const kvrt_append_args& args, cudaStream_t stream);
cudaError_t launch_expand(const kv_layer& layer, const kvrt_expand_args& args, cudaStream_t stream);

enum class Cores { AUTOMATIC, SCALAR, TENSOR };  // which attend kernels to take where both can
int64_t attend_workspace(const kv_layer& layer, int num_seqs, int splits);
cudaError_t launch_attend(const kv_layer& layer, const kvrt_attend_args& args, Cores cores, cudaStream_t stream);

}  // namespace kvrt
