/* What the kernels share: the type of weights and activations, and arithmetic on a row of fp32. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BF16
typedef uint16_t real;
static inline float widen(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline real narrow(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded; /* not a number stays so */
}
#else
typedef float real;
static inline float widen(real x) { return x; }
static inline real narrow(float x) { return x; }
#endif

static inline void load(float *restrict to, const real *restrict from, int n) {
    for (int i = 0; i < n; i++) to[i] = widen(from[i]);
}

static inline void store(real *restrict to, const float *restrict from, int n) {
    for (int i = 0; i < n; i++) to[i] = narrow(from[i]);
}

static inline void moments(const float *x, int n, float epsilon, float *mean, float *scale) {
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i];
    *mean = sum / n;
#pragma omp simd reduction(+ : square)
    for (int i = 0; i < n; i++) square += (x[i] - *mean) * (x[i] - *mean);
    *scale = 1 / sqrtf(square / n + epsilon);
}

/* e^x for x <= 0: 2^k * e^r with |r| <= ln(2) / 2, Taylor to the 6th power; relative error below 2e-7 */
static inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    float k = rintf(x * 1.44269504f);
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float y = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    int32_t bits = ((int32_t)k + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

/* The normal distribution up to v, where e is e^(-v * v / 2); for GELU with the error function */
static inline float normal_below(float v, float e) {
    /* 1 - erf(|v| / sqrt 2), Abramowitz and Stegun 7.1.26, error below 1.5e-7 */
    float s = 1 / (1 + 0.3275911f * 0.70710678f * fabsf(v));
    float tail = s * (0.254829592f + s * (-0.284496736f + s * (1.421413741f + s * (-1.453152027f + s * 1.061405429f)))) * e;
    return v < 0 ? 0.5f * tail : 1 - 0.5f * tail;
}
