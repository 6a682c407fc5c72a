// erf by Abramowitz and Stegun 7.1.26: absolute error 1.5e-7, a thousandth of what fp16 can tell apart near 1. Two
// special-function instructions and eight others; erff would cost more than the memory that the kernel moves.
RB_DEVICE float erf_fast(float x) {
    float a = fabsf(x);
    float t = reciprocal_fast(fmaf(0.3275911f, a, 1.0f));
    float sum = fmaf(1.061405429f, t, -1.453152027f);
    sum = fmaf(sum, t, 1.421413741f);
    sum = fmaf(sum, t, -0.284496736f);
    sum = fmaf(sum, t, 0.254829592f);
    float tail = sum * t * exp2_fast(a * a * -1.44269504f);
    return copysignf(1.0f - tail, x);
}

// The form with erf, which BERT was trained with; the form with tanh differs by up to 5e-4.
RB_DEVICE float activate(float x) { return 0.5f * x * (1.0f + erf_fast(x * 0.70710678f)); }

// x = activate(x + bias), in place; x has rows of INTERMEDIATE values, taken as 8 per thread.
RB_KERNEL void __launch_bounds__(256) bias_gelu(u16 *x, const float *bias, u32 rows) {
    size_t pack = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (pack >= (size_t)rows * (INTERMEDIATE / 8)) return;
    const float4 *shift = (const float4 *)(bias + (pack % (INTERMEDIATE / 8)) * 8);
    float4 low = shift[0], high = shift[1];
    const float b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    uint4 *place = (uint4 *)x + pack;
    uint4 packed = *place;
    float v[8];
    unpack2(packed.x, v[0], v[1]);
    unpack2(packed.y, v[2], v[3]);
    unpack2(packed.z, v[4], v[5]);
    unpack2(packed.w, v[6], v[7]);
#pragma unroll
    for (u32 i = 0; i < 8; i++) v[i] = activate(v[i] + b[i]);
    packed.x = pack2(v[0], v[1]);
    packed.y = pack2(v[2], v[3]);
    packed.z = pack2(v[4], v[5]);
    packed.w = pack2(v[6], v[7]);
    *place = packed;
}
