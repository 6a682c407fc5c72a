// One vector per text: the mean of its rows, or its first row, divided by its length if asked. One block of 8 warps
// per text; a text without rows (padding of a graph) gives zeros.
#define POOL_FIRST 1u
#define POOL_NORMALISE 2u

RB_KERNEL void __launch_bounds__(256) pool(float *out, const u16 *hidden, const u32 *starts, u32 flags) {
    __shared__ float partial[8][HIDDEN];
    __shared__ float squares[8];
    u32 begin = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (flags & POOL_FIRST) end = begin < end ? begin + 1 : end;
    float values[LANE_VALUES], sum[LANE_VALUES];
#pragma unroll
    for (u32 i = 0; i < LANE_VALUES; i++) sum[i] = 0.0f;
    for (u32 row = begin + warp; row < end; row += 8) {
        load_row(values, hidden + (size_t)row * HIDDEN, lane);
#pragma unroll
        for (u32 i = 0; i < LANE_VALUES; i++) sum[i] += values[i];
    }
#pragma unroll
    for (u32 pack = 0; pack < PACKS; pack++) {
#pragma unroll
        for (u32 i = 0; i < PACK; i++) partial[warp][column_of(pack, lane) + i] = sum[pack * PACK + i];
    }
    __syncthreads();
    float share = begin < end ? 1.0f / (float)(end - begin) : 0.0f;
    float square = 0.0f;
    for (u32 column = threadIdx.x; column < HIDDEN; column += 256) {
        float total = 0.0f;
#pragma unroll
        for (u32 w = 0; w < 8; w++) total += partial[w][column];
        total *= share;
        square += total * total;
        partial[0][column] = total;
    }
    square = warp_sum(square);
    if (lane == 0) squares[warp] = square;
    __syncthreads();
    float factor = 1.0f;
    if (flags & POOL_NORMALISE) {
        float all = 0.0f;
#pragma unroll
        for (u32 w = 0; w < 8; w++) all += squares[w];
        // As torch's normalize: a vector of zeros stays one.
        factor = 1.0f / fmaxf(sqrtf(all), 1e-12f);
    }
    for (u32 column = threadIdx.x; column < HIDDEN; column += 256)
        out[(size_t)blockIdx.x * HIDDEN + column] = partial[0][column] * factor;
}
