// One row of HIDDEN values in the registers of one warp: each lane holds HIDDEN / 32 of them, in packs that are
// neighbours in memory.

#if HIDDEN % 128 == 0
#define PACK 4
#else
#define PACK 2
#endif
#define LANE_VALUES (HIDDEN / 32)
#define PACKS (LANE_VALUES / PACK)

// First column of a lane's pack.
RB_DEVICE u32 column_of(u32 pack, u32 lane) { return (pack * 32 + lane) * PACK; }

RB_DEVICE void unpack2(u32 packed, float &low, float &high) {
    low = to_float((u16)(packed & 0xffff));
    high = to_float((u16)(packed >> 16));
}

RB_DEVICE void load_row(float (&values)[LANE_VALUES], const u16 *row, u32 lane) {
#pragma unroll
    for (u32 pack = 0; pack < PACKS; pack++) {
#if PACK == 4
        uint2 packed = *(const uint2 *)(row + column_of(pack, lane));
        unpack2(packed.x, values[pack * 4], values[pack * 4 + 1]);
        unpack2(packed.y, values[pack * 4 + 2], values[pack * 4 + 3]);
#else
        u32 packed = *(const u32 *)(row + column_of(pack, lane));
        unpack2(packed, values[pack * 2], values[pack * 2 + 1]);
#endif
    }
}

RB_DEVICE void add_row(float (&values)[LANE_VALUES], const u16 *row, u32 lane) {
    float more[LANE_VALUES];
    load_row(more, row, lane);
#pragma unroll
    for (u32 i = 0; i < LANE_VALUES; i++) values[i] += more[i];
}

RB_DEVICE void store_row(u16 *row, const float (&values)[LANE_VALUES], u32 lane) {
#pragma unroll
    for (u32 pack = 0; pack < PACKS; pack++) {
#if PACK == 4
        uint2 packed;
        packed.x = pack2(values[pack * 4], values[pack * 4 + 1]);
        packed.y = pack2(values[pack * 4 + 2], values[pack * 4 + 3]);
        *(uint2 *)(row + column_of(pack, lane)) = packed;
#else
        *(u32 *)(row + column_of(pack, lane)) = pack2(values[pack * 2], values[pack * 2 + 1]);
#endif
    }
}

// The fp32 parameters of a pack's columns.
RB_DEVICE void load_columns(float (&values)[PACK], const float *parameters, u32 pack, u32 lane) {
#if PACK == 4
    float4 four = *(const float4 *)(parameters + column_of(pack, lane));
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
#else
    float2 two = *(const float2 *)(parameters + column_of(pack, lane));
    values[0] = two.x;
    values[1] = two.y;
#endif
}

RB_DEVICE float warp_sum(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
    return value;
}

// values = (values - mean) / sqrt(variance + eps) * gamma + beta. Mean first, then variance: no cancellation.
RB_DEVICE void layer_norm(float (&values)[LANE_VALUES], const float *gamma, const float *beta, float eps, u32 lane) {
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < LANE_VALUES; i++) sum += values[i];
    float mean = warp_sum(sum) * (1.0f / HIDDEN);
    float squares = 0.0f;
#pragma unroll
    for (u32 i = 0; i < LANE_VALUES; i++) squares += (values[i] - mean) * (values[i] - mean);
    float inverse = rsqrtf(warp_sum(squares) * (1.0f / HIDDEN) + eps);
#pragma unroll
    for (u32 pack = 0; pack < PACKS; pack++) {
        float scale[PACK], shift[PACK];
        load_columns(scale, gamma, pack, lane);
        load_columns(shift, beta, pack, lane);
#pragma unroll
        for (u32 i = 0; i < PACK; i++) {
            float &value = values[pack * PACK + i];
            value = (value - mean) * inverse * scale[i] + shift[i];
        }
    }
}

// Rows are given to warps; blocks have 256 threads.
#define ROWS_PER_BLOCK 8
