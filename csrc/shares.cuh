// Softmax of scores: what estimate.cu and refine.cu share.
#pragma once

#include "common.cuh"

namespace hf_quest {

constexpr float kLargestLogit = 1e30f;
constexpr float kNoLogit = -3e38f;  // lower than all, and finite, so that differences are numbers

// A score as a logit to base 2, and a finite one, so that a page's alone does not make all shares meaningless. Rounded,
// so that it is the same number wherever it is made: as part of a fused multiply-add it would differ from a maximum.
__device__ inline float logit_of(float score) {
    return __fmul_rn(fmaxf(fminf(score, kLargestLogit), -kLargestLogit), kLog2E);
}

// The sum of 2^logit over some pages: `sum` times 2^maximum.
struct LogitSum {
    float maximum = kNoLogit, sum = 0.0f;

    __device__ void add(LogitSum other) {
        const float new_maximum = fmaxf(maximum, other.maximum);
        sum = sum * power_of_two(maximum - new_maximum) + other.sum * power_of_two(other.maximum - new_maximum);
        maximum = new_maximum;
    }

    __device__ void add_lanes(int distance) {
        add({__shfl_xor_sync(kWholeWarp, maximum, distance), __shfl_xor_sync(kWholeWarp, sum, distance)});
    }
};

}  // namespace hf_quest
