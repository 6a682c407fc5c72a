// out[row] = layer_norm(x[row] + bias + residual[row]). `out` may be `x` or `residual`: a warp reads its whole row
// before it writes.
RB_KERNEL void __launch_bounds__(256)
residual_layer_norm(u16 *out, const u16 *x, const u16 *residual, const float *bias, const float *gamma,
                    const float *beta, float eps, u32 rows) {
    u32 row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32;
    if (row >= rows) return;
    float values[LANE_VALUES];
    load_row(values, x + (size_t)row * HIDDEN, lane);
    add_row(values, residual + (size_t)row * HIDDEN, lane);
#pragma unroll
    for (u32 pack = 0; pack < PACKS; pack++) {
        float shift[PACK];
        load_columns(shift, bias, pack, lane);
#pragma unroll
        for (u32 i = 0; i < PACK; i++) values[pack * PACK + i] += shift[i];
    }
    layer_norm(values, gamma, beta, eps, lane);
    store_row(out + (size_t)row * HIDDEN, values, lane);
}
