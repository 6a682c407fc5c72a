// Attention over texts of different lengths laid end to end, without padding: softmax(q k^T * scale) v per text and
// head, in the online form (scores never leave the registers), on tensor cores with fp32 sums.
//
// One block takes 64 queries of one text and one head; the host lists the (text, tile) pairs, so no block is wasted
// on short texts beside long ones. Each of its 4 warps has 16 queries. Keys and values come in tiles of 64 through two
// stages of shared memory, so the next tile is under way while this one is worked on.

#define QUERY_TILE 64
#define KEY_TILE 64
#define NO_TILE 0xffffffffu
#define TILE_BITS 12
#define QKV_STRIDE (3 * HIDDEN)
// 8 more than a row: eight rows then lie in different banks, for ldmatrix.
#define SHARED_STRIDE (HEAD_DIM + 8)
#define DIM_CHUNKS (HEAD_DIM / 16)

RB_DEVICE void begin_tile(u16 *keys, u16 *values, const u16 *k, const u16 *v, u32 first, u32 length) {
    for (u32 i = threadIdx.x; i < KEY_TILE * (HEAD_DIM / 8); i += 128) {
        u32 row = i / (HEAD_DIM / 8), part = (i % (HEAD_DIM / 8)) * 8;
        // Rows behind the end become zeros: what lies there in memory might be NaN, and 0 * NaN is NaN.
        bool valid = first + row < length;
        size_t from = valid ? (size_t)(first + row) * QKV_STRIDE + part : 0;
        copy_async_16(keys + row * SHARED_STRIDE + part, k + from, valid);
        copy_async_16(values + row * SHARED_STRIDE + part, v + from, valid);
    }
    copy_async_commit();
}

RB_KERNEL void __launch_bounds__(128)
attention(u16 *out, const u16 *qkv, const u32 *starts, const u32 *tiles, float scale_log2e) {
    __shared__ __align__(16) u16 keys[2][KEY_TILE * SHARED_STRIDE];
    __shared__ __align__(16) u16 values[2][KEY_TILE * SHARED_STRIDE];
    u32 tile = tiles[blockIdx.x];
    if (tile == NO_TILE) return;
    u32 text = tile >> TILE_BITS;
    u32 begin = starts[text];
    u32 length = starts[text + 1] - begin;
    u32 lane = threadIdx.x % 32, group = lane / 4, pair = (lane % 4) * 2;
    const u16 *q = qkv + (size_t)begin * QKV_STRIDE + blockIdx.y * HEAD_DIM;
    const u16 *k = q + HIDDEN;
    const u16 *v = q + 2 * HIDDEN;

    u32 first_query = (tile & ((1u << TILE_BITS) - 1)) * QUERY_TILE + threadIdx.x / 32 * 16;
    u32 upper = first_query + group, lower = upper + 8;
    u32 queries[DIM_CHUNKS][4];
#pragma unroll
    for (u32 c = 0; c < DIM_CHUNKS; c++) {
        const u16 *u = q + (size_t)upper * QKV_STRIDE + c * 16 + pair;
        const u16 *l = q + (size_t)lower * QKV_STRIDE + c * 16 + pair;
        queries[c][0] = upper < length ? *(const u32 *)u : 0;
        queries[c][1] = lower < length ? *(const u32 *)l : 0;
        queries[c][2] = upper < length ? *(const u32 *)(u + 8) : 0;
        queries[c][3] = lower < length ? *(const u32 *)(l + 8) : 0;
    }

    float sums[HEAD_DIM / 8][4];
#pragma unroll
    for (u32 d = 0; d < HEAD_DIM / 8; d++) sums[d][0] = sums[d][1] = sums[d][2] = sums[d][3] = 0.0f;
    float max_upper = MINUS_INFINITY, max_lower = MINUS_INFINITY, weight_upper = 0.0f, weight_lower = 0.0f;

    u32 key_tiles = (length + KEY_TILE - 1) / KEY_TILE;
    begin_tile(keys[0], values[0], k, v, 0, length);
    for (u32 j = 0; j < key_tiles; j++) {
        if (j + 1 < key_tiles) {
            begin_tile(keys[(j + 1) % 2], values[(j + 1) % 2], k, v, (j + 1) * KEY_TILE, length);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        // The same for all lanes of the warp, as the tensor core instructions ask.
        if (first_query < length) {
            u32 left = length - j * KEY_TILE;
            float scores[KEY_TILE / 8][4];
#pragma unroll
            for (u32 n = 0; n < KEY_TILE / 16; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) scores[2 * n][i] = scores[2 * n + 1][i] = 0.0f;
                if (n * 16 < left) {
#pragma unroll
                    for (u32 c = 0; c < DIM_CHUNKS; c++) {
                        u32 row = n * 16 + lane / 16 * 8 + lane % 8, column = c * 16 + lane / 8 % 2 * 8;
                        u32 b[4];
                        load_matrices(b, keys[j % 2] + row * SHARED_STRIDE + column);
                        mma_16x8x16(scores[2 * n], queries[c], b[0], b[1]);
                        mma_16x8x16(scores[2 * n + 1], queries[c], b[2], b[3]);
                    }
                }
            }
            float top_upper = max_upper, top_lower = max_lower;
#pragma unroll
            for (u32 n = 0; n < KEY_TILE / 8; n++) {
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    bool inside = n * 8 + pair + i < left;
                    scores[n][i] = inside ? scores[n][i] * scale_log2e : MINUS_INFINITY;
                    scores[n][i + 2] = inside ? scores[n][i + 2] * scale_log2e : MINUS_INFINITY;
                    top_upper = fmaxf(top_upper, scores[n][i]);
                    top_lower = fmaxf(top_lower, scores[n][i + 2]);
                }
            }
#pragma unroll
            for (int lanes = 1; lanes <= 2; lanes *= 2) {
                top_upper = fmaxf(top_upper, shuffle_xor(top_upper, lanes));
                top_lower = fmaxf(top_lower, shuffle_xor(top_lower, lanes));
            }
            // Each tile has a key inside the text, so the maxima are finite.
            float shrink_upper = exp2_fast(max_upper - top_upper), shrink_lower = exp2_fast(max_lower - top_lower);
            max_upper = top_upper;
            max_lower = top_lower;
            weight_upper *= shrink_upper;
            weight_lower *= shrink_lower;
#pragma unroll
            for (u32 d = 0; d < HEAD_DIM / 8; d++) {
                sums[d][0] *= shrink_upper;
                sums[d][1] *= shrink_upper;
                sums[d][2] *= shrink_lower;
                sums[d][3] *= shrink_lower;
            }
#pragma unroll
            for (u32 n = 0; n < KEY_TILE / 16; n++) {
                if (n * 16 < left) {
#pragma unroll
                    for (u32 half = 0; half < 2; half++) {
                        float(&s)[4] = scores[2 * n + half];
                        s[0] = exp2_fast(s[0] - max_upper);
                        s[1] = exp2_fast(s[1] - max_upper);
                        s[2] = exp2_fast(s[2] - max_lower);
                        s[3] = exp2_fast(s[3] - max_lower);
                        weight_upper += s[0] + s[1];
                        weight_lower += s[2] + s[3];
                    }
                    // The sums of one product are the factor of the next, in the same lanes.
                    u32 a[4] = {pack2(scores[2 * n][0], scores[2 * n][1]), pack2(scores[2 * n][2], scores[2 * n][3]),
                                pack2(scores[2 * n + 1][0], scores[2 * n + 1][1]),
                                pack2(scores[2 * n + 1][2], scores[2 * n + 1][3])};
#pragma unroll
                    for (u32 c = 0; c < DIM_CHUNKS; c++) {
                        u32 row = n * 16 + lane / 8 % 2 * 8 + lane % 8, column = c * 16 + lane / 16 * 8;
                        u32 b[4];
                        load_matrices_transposed(b, values[j % 2] + row * SHARED_STRIDE + column);
                        mma_16x8x16(sums[2 * c], a, b[0], b[1]);
                        mma_16x8x16(sums[2 * c + 1], a, b[2], b[3]);
                    }
                }
            }
        }
        // The next round writes the stage that slower warps still read.
        __syncthreads();
    }

#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
        weight_upper += shuffle_xor(weight_upper, lanes);
        weight_lower += shuffle_xor(weight_lower, lanes);
    }
    float share_upper = 1.0f / weight_upper, share_lower = 1.0f / weight_lower;
    u16 *o = out + (size_t)begin * HIDDEN + blockIdx.y * HEAD_DIM + pair;
#pragma unroll
    for (u32 d = 0; d < HEAD_DIM / 8; d++) {
        if (upper < length)
            *(u32 *)(o + (size_t)upper * HIDDEN + d * 8) = pack2(sums[d][0] * share_upper, sums[d][1] * share_upper);
        if (lower < length)
            *(u32 *)(o + (size_t)lower * HIDDEN + d * 8) = pack2(sums[d][2] * share_lower, sums[d][3] * share_lower);
    }
}
