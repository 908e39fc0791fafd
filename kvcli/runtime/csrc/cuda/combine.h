// What attend.cu launches after its own kernels.
#pragma once

#include "launches.h"

namespace kvrt {

// Merge the splits' partials; turn scores into weights; sum keys by weight: whatever the arguments ask for.
cudaError_t launch_combine(const kv_layer& layer, const kvrt_attend_args& args, cudaStream_t stream);
cudaError_t launch_mass(const kv_layer& layer, const kvrt_attend_args& args, cudaStream_t stream);

}  // namespace kvrt
