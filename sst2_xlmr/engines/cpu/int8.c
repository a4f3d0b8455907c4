/* Matrix products of 8-bit integers for prediction, with what follows them.
 *
 * A weight matrix has one scale per output channel, and activations have their own range in every row (token): with one
 * for a whole tensor of activations, XLM-R and MiniLM lose points of accuracy. AVX512-VNNI multiplies unsigned by signed
 * bytes and adds four products to a 32-bit sum, exactly; so does AMX, 16 rows at once. So an activation is scale * byte - shift, a weight scale * byte,
 * and a product of rows is scale * scale * (sum of the bytes' products) - shift * (sum of the weights).
 *
 * A thread computes some rows with all channels before the next ones, so that what follows the product finds whole rows
 * in its cache. Equal input gives equal bits for every number of threads.
 */
#ifdef __AVX512VNNI__
#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "real.h"

#define PANEL 64 /* channels whose weights lie together: 4 vectors of 16 */
#define VECTORS 4
#define HEIGHT 6 /* rows at once: with 4 vectors, 24 sums, 4 weights and an activation fit into 32 registers */
#define TILE 16  /* rows at once with AMX, whose registers, tiles, hold 16 rows of 64 bytes */
#define BLOCK 48 /* rows that a thread computes before what follows the product */
#define INLINE static inline __attribute__((always_inline)) /* or sums go through memory: 4 % slower */

/* The range of a row of activations. */
typedef struct {
    float scale, shift; /* value = scale * byte - shift */
} Range;

/* A linear layer. */
typedef struct {
    const int8_t *weights; /* [n / PANEL, k / 4, PANEL, 4], n and k rounded up; zeros behind the last */
    const float *scales;   /* [n] of the weights */
    const float *sums;     /* [n] of the channel's weights */
    const float *bias;     /* [n] */
    int32_t n, k;
} Linear;

/* What follows the product: nothing but the bias; GELU; or the residual connection and LayerNorm. */
typedef struct {
    int32_t gelu;
    const real *residual; /* [rows, n], or NULL for no LayerNorm */
    const float *gamma, *beta; /* [n] */
    float epsilon;
} After;

static int rounded_up(int n, int to) { return (n + to - 1) / to * to; }

/* bytes [rounded_up(n, 4)]: the least value, or 0, becomes 0, and the largest, or 0, 255 */
static inline Range quantize_row(const float *row, int n, uint8_t *bytes) {
    float least = 0, largest = 0, wrong = 0;
#pragma omp simd reduction(min : least) reduction(max : largest) reduction(+ : wrong)
    for (int i = 0; i < n; i++) {
        least = row[i] < least ? row[i] : least;
        largest = row[i] > largest ? row[i] : largest;
        wrong += row[i] * 0.0f; /* not a number as soon as one value is none, or infinite */
    }
    if (wrong != 0) {
        memset(bytes, 0, rounded_up(n, 4));
        return (Range){wrong, wrong}; /* so that the result is none either */
    }
    float scale = (largest - least) / 255, factor = scale > 0 ? 1 / scale : 0;
    for (int i = 0; i < n; i++) bytes[i] = (uint8_t)(int32_t)((row[i] - least) * factor + 0.5f);
    for (int i = n; i < rounded_up(n, 4); i++) bytes[i] = 0;
    return (Range){scale, -least};
}

void quantize(const real *x, int64_t rows, int n, uint8_t *bytes, Range *ranges, int threads) {
    int stride = rounded_up(n, 4);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        float row[n];
        load(row, x + t * n, n);
        ranges[t] = quantize_row(row, n, bytes + t * stride);
    }
}

/* sums [rows, PANEL] = activations [rows, 4 * steps] x one panel of weights; rows is HEIGHT or 1, a constant. All
 * loops but the one over steps are unrolled, or GCC may keep the sums in memory. */
INLINE void multiply(int rows, const uint8_t *a, int stride, const int8_t *panel, int steps, __m512i *sums) {
    __m512i sum[HEIGHT][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_setzero_si512();
    for (int s = 0; s < steps; s++) {
        __m512i weights[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) weights[v] = _mm512_loadu_si512(panel + (s * VECTORS + v) * 64);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, a + r * stride + 4 * s, 4);
            __m512i activation = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], activation, weights[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r * VECTORS + v] = sum[r][v];
}

#ifdef __AMX_INT8__
/* Whether this process may use AMX, for which Linux has to be asked (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
static int may_use_tiles(void) {
    static int answer = 0; /* -1: no, 1: yes */
    if (!answer) answer = syscall(SYS_arch_prctl, 0x1023, 18) ? -1 : 1;
    return answer > 0;
}

/* All tiles are whole. GCC does not know that the instruction reads all of this, so it is no local variable. */
static const struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } TILES = {
    .palette = 1, .bytes = {[0 ... 7] = 64}, .rows = {[0 ... 7] = TILE}};

/* As `multiply`, for TILE rows and k = stride, a multiple of 64: tiles 0 to 3 are sums, 4 activations, 5 and 6 weights. */
INLINE void multiply_tile(const uint8_t *a, int stride, const int8_t *panel, __m512i *sums) {
#define FOR_EACH_VECTOR(do) do(0, 5) do(1, 6) do(2, 5) do(3, 6) /* and the tile for its weights */
#define ZERO(v, w) _tile_zero(v);
#define ADD(v, w) _tile_loadd(w, panel + 64 * v, 64 * VECTORS); _tile_dpbusd(v, 4, w);
#define STORE(v, w) _tile_stored(v, sums + v, 64 * VECTORS);
    FOR_EACH_VECTOR(ZERO)
    for (int s = 0; s < stride; s += 64, panel += 64 * PANEL) {
        _tile_loadd(4, a + s, stride);
        FOR_EACH_VECTOR(ADD)
    }
    FOR_EACH_VECTOR(STORE)
}
#else
#define may_use_tiles() 0
#define multiply_tile(...)
#define _tile_loadconfig(tiles)
#define _tile_release()
#endif

/* values [rows, ld] = the product with one panel in fp32, with bias; its channels begin at c */
INLINE void panel_product(const Linear *l, int c, const uint8_t *a, const Range *ranges, int rows, float *values, int ld) {
    int stride = rounded_up(l->k, 4), width = l->n - c < PANEL ? l->n - c : PANEL;
    const int8_t *panel = l->weights + (int64_t)c * stride;
    int has_tiles = rows >= TILE && l->k % 64 == 0 && may_use_tiles();
    if (has_tiles) _tile_loadconfig(&TILES);
    for (int r = 0, count; r < rows; r += count) {
        __m512i sums[TILE * VECTORS];
        const uint8_t *first = a + (int64_t)r * stride;
        if (has_tiles && rows - r >= TILE) {
            multiply_tile(first, stride, panel, sums);
            count = TILE;
        } else if (rows - r >= HEIGHT) {
            multiply(HEIGHT, first, stride, panel, stride / 4, sums);
            count = HEIGHT;
        } else { /* one of the last few rows */
            multiply(1, first, stride, panel, stride / 4, sums);
            count = 1;
        }
        for (int i = 0; i < count; i++) {
            const int32_t *sum = (const int32_t *)(sums + i * VECTORS);
            float *to = values + (r + i) * ld;
            Range range = ranges[r + i];
            for (int j = 0; j < width; j++)
                to[j] = sum[j] * (range.scale * l->scales[c + j]) - range.shift * l->sums[c + j] + l->bias[c + j];
        }
    }
    if (has_tiles) _tile_release(); /* or every switch of threads would save them */
}

static void gelu(float *row, int n) {
    for (int i = 0; i < n; i++) {
        float v = row[i];
        row[i] = v * normal_below(v, exp_of(-0.5f * v * v));
    }
}

static void add_norm_row(float *row, const real *residual, const After *after, int n) {
    float mean, scale;
    for (int i = 0; i < n; i++) row[i] += widen(residual[i]);
    moments(row, n, after->epsilon, &mean, &scale);
    for (int i = 0; i < n; i++) row[i] = (row[i] - mean) * scale * after->gamma[i] + after->beta[i];
}

/* The layer and what follows it, on [rows, k]: to `out` [rows, n] in real and to `bytes` with `ranges_out`, quantized;
 * either may be NULL. */
void int8_linear(const Linear *l, const uint8_t *a, const Range *ranges, int64_t rows, const After *after, real *out,
                 uint8_t *bytes, Range *ranges_out, int threads) {
    if (rows == 0) return; /* no block, by which OpenMP would divide */
    int n = l->n, ld = rounded_up(n, PANEL), stride = rounded_up(l->k, 4), stride_out = rounded_up(n, 4);
    int64_t share = (rows + threads - 1) / threads, blocks = (share + BLOCK - 1) / BLOCK; /* of a thread */
    int block = rounded_up((share + blocks - 1) / blocks, may_use_tiles() ? TILE : HEIGHT);
#pragma omp parallel num_threads(threads)
    {
        float *values = malloc(sizeof(float) * block * ld);
#pragma omp for schedule(static)
        for (int64_t start = 0; start < rows; start += block) {
            int count = rows - start < block ? rows - start : block;
            for (int c = 0; c < n; c += PANEL)
                panel_product(l, c, a + start * stride, ranges + start, count, values + c, ld);
            for (int r = 0; r < count; r++) {
                float *row = values + r * ld;
                int64_t t = start + r;
                if (after->gelu) gelu(row, n);
                if (after->residual) add_norm_row(row, after->residual + t * n, after, n);
                if (out) store(out + t * n, row, n);
                if (bytes) ranges_out[t] = quantize_row(row, n, bytes + t * stride_out);
            }
        }
        free(values);
    }
}

/* The layer in 16 bits, for few rows: out [rows, n] = x [rows, k] with weights high + low. What 8 bits round away from x
 * is quantized, too; its product with `low` is too small to matter. */
void int16_linear(const Linear *high, const Linear *low, const float *x, int64_t rows, float *out, int threads) {
    int n = high->n, k = high->k, stride = rounded_up(k, 4);
    uint8_t *bytes = malloc(2 * rows * stride); /* x, then the rest of x */
    Range *ranges = malloc(sizeof(Range) * 2 * rows);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; t++) {
            float rest[k];
            uint8_t *of_row = bytes + t * stride;
            Range range = ranges[t] = quantize_row(x + t * k, k, of_row);
            for (int i = 0; i < k; i++) rest[i] = x[t * k + i] - (range.scale * of_row[i] - range.shift);
            ranges[rows + t] = quantize_row(rest, k, of_row + rows * stride);
        }
        float *values = malloc(sizeof(float) * 3 * rows * PANEL), *last = values + 2 * rows * PANEL;
#pragma omp for schedule(static)
        for (int c = 0; c < n; c += PANEL) {
            panel_product(high, c, bytes, ranges, 2 * rows, values, PANEL);
            panel_product(low, c, bytes, ranges, rows, last, PANEL);
            for (int64_t t = 0; t < rows; t++)
                for (int j = 0; j < PANEL && c + j < n; j++) {
                    float of_rest = values[(rows + t) * PANEL + j] - high->bias[c + j]; /* which the first has */
                    out[t * n + c + j] = values[t * PANEL + j] + of_rest + last[t * PANEL + j];
                }
        }
        free(values);
    }
    free(bytes);
    free(ranges);
}
#endif
