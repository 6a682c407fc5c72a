// out[row] = layer_norm(word[ids[row]] + position[low half of places[row]] + type[high half of places[row]]).
// The host has checked that the indices lie inside the tables.
RB_KERNEL void __launch_bounds__(256)
embed_layer_norm(u16 *out, const u32 *ids, const u32 *places, const u16 *word, const u16 *position, const u16 *type,
                 const float *gamma, const float *beta, float eps, u32 rows) {
    u32 row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32;
    if (row >= rows) return;
    u32 place = places[row];
    float values[LANE_VALUES];
    load_row(values, word + (size_t)ids[row] * HIDDEN, lane);
    add_row(values, position + (size_t)(place & 0xffff) * HIDDEN, lane);
    add_row(values, type + (size_t)(place >> 16) * HIDDEN, lane);
    layer_norm(values, gamma, beta, eps, lane);
    store_row(out + (size_t)row * HIDDEN, values, lane);
}
