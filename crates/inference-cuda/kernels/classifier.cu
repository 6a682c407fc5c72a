// Logits of each text from its first row: classifier(tanh(dense(row))). One block of 8 warps per text; a text without
// rows (padding of a graph) gives zeros.
RB_DEVICE float dot_with_row(const u16 *weights, const float *x, u32 lane) {
    float row[LANE_VALUES];
    load_row(row, weights, lane);
    float sum = 0.0f;
#pragma unroll
    for (u32 pack = 0; pack < PACKS; pack++) {
#pragma unroll
        for (u32 i = 0; i < PACK; i++) sum = fmaf(row[pack * PACK + i], x[column_of(pack, lane) + i], sum);
    }
    return warp_sum(sum);
}

RB_KERNEL void __launch_bounds__(256)
classify(float *out, const u16 *hidden, const u32 *starts, const u16 *dense, const float *dense_bias,
         const u16 *classifier, const float *classifier_bias, u32 labels) {
    __shared__ float first[HIDDEN];
    __shared__ float inner[HIDDEN];
    u32 begin = starts[blockIdx.x];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bool empty = begin == starts[blockIdx.x + 1];
    for (u32 column = threadIdx.x; column < HIDDEN; column += 256)
        first[column] = empty ? 0.0f : to_float(hidden[(size_t)begin * HIDDEN + column]);
    __syncthreads();
    for (u32 row = warp; row < HIDDEN; row += 8) {
        float sum = dot_with_row(dense + (size_t)row * HIDDEN, first, lane);
        if (lane == 0) inner[row] = tanhf(sum + dense_bias[row]);
    }
    __syncthreads();
    for (u32 label = warp; label < labels; label += 8) {
        float sum = dot_with_row(classifier + (size_t)label * HIDDEN, inner, lane);
        if (lane == 0) out[(size_t)blockIdx.x * labels + label] = empty ? 0.0f : sum + classifier_bias[label];
    }
}
