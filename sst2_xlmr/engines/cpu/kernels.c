/* What a training step computes besides matrix products with weights, each in one pass over memory.
 *
 * torch 2.3 makes a pass over memory for every elementwise step and keeps every intermediate result. Here a row is
 * loaded into the first-level cache as fp32, all that belongs together is computed, and the result is stored.
 *
 * Rows are packed: the tokens of all texts one after another, text b at [starts[b], starts[b + 1]); nothing is padded.
 * Matrices are row-major. `real` is bf16 or fp32; sums and everything in between are fp32. Work is cut among the
 * threads in a fixed way and partial sums are added in a fixed order, so that equal input gives equal bits.
 *
 * Dropout masks are not stored but computed again in the backward pass: whether a unit is kept is a hash (murmur3's
 * finalizer, https://github.com/aappleby/smhasher) of the token's key, the site (which dropout of the network it is)
 * and the unit. A key belongs to a row of the data, not to its place in a batch, so masks are the same however a batch
 * is cut into micro-batches and processes.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "real.h"

/* ---- dropout ---- */

typedef struct {
    const uint32_t *keys; /* [tokens] */
    uint32_t site, threshold; /* a unit is dropped if its hash is below the threshold: probability * 2^32 */
    float scale; /* 1 / (1 - probability) */
} Dropout;

static inline uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

/* Multiply n values by the mask of units first, first + 1, ... */
static void drop(float *restrict values, int n, const Dropout *dropout, int64_t token, uint32_t first) {
    uint32_t key = mix(dropout->keys[token] + dropout->site * 0x9e3779b9u) + first * 0x9e3779b9u;
    uint32_t threshold = dropout->threshold;
    float scale = dropout->scale;
    if (!threshold) return;
    for (int i = 0; i < n; i++) values[i] *= mix(key + (uint32_t)i * 0x9e3779b9u) >= threshold ? scale : 0.0f;
}

/* values *= mask; [rows, n] */
void dropout(real *values, int64_t rows, int n, const Dropout *dropout, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        float row[n];
        load(row, values + t * n, n);
        drop(row, n, dropout, t, 0);
        store(values + t * n, row, n);
    }
}

/* ---- sums over rows ---- */

/* Add the threads' partial sums [threads, n], free them, and store the result. */
static void finish_sums(float *sums, int n, int threads, int count, real **to) {
    for (int s = 0; s < count; s++) {
        float *total = sums + (size_t)s * n;
        for (int thread = 1; thread < threads; thread++)
            for (int i = 0; i < n; i++) total[i] += sums[((size_t)thread * count + s) * n + i];
        if (to[s]) store(to[s], total, n);
    }
    free(sums);
}

/* sums[i] = sum over rows of x[row, i]; the gradient of a bias */
void column_sums(const real *x, int64_t rows, int n, real *result, int threads) {
    float *sums = calloc((size_t)threads * n, sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float *mine = sums + (size_t)omp_get_thread_num() * n;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; t++)
            for (int i = 0; i < n; i++) mine[i] += widen(x[t * n + i]);
    }
    finish_sums(sums, n, threads, 1, (real *[]){result});
}

/* ---- layer normalization ---- */

/* hidden = x + dropout(y + bias); normed = LayerNorm(hidden). Without y: hidden = x. All [rows, n]; hidden may be normed. */
void add_norm(const real *x, const real *y, const real *bias, const real *gamma, const real *beta, float epsilon,
              real *hidden, real *normed, int64_t rows, int n, const Dropout *dropout, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < rows; t++) {
        float row[n], added[n], mean, scale;
        load(row, x + t * n, n);
        if (y) {
            for (int i = 0; i < n; i++) added[i] = widen(y[t * n + i]) + widen(bias[i]);
            drop(added, n, dropout, t, 0);
            for (int i = 0; i < n; i++) row[i] += added[i];
        }
        store(hidden + t * n, row, n);
        load(row, hidden + t * n, n); /* the backward pass starts from the rounded values, so the forward pass does */
        moments(row, n, epsilon, &mean, &scale);
        for (int i = 0; i < n; i++)
            normed[t * n + i] = narrow((row[i] - mean) * scale * widen(gamma[i]) + widen(beta[i]));
    }
}

/* Gradients of add_norm: of hidden (and x), of y, and the sums for gamma, beta and bias [n]. dy, dbias may be NULL. */
void add_norm_backward(const real *dnormed, const real *hidden, const real *gamma, float epsilon, real *dhidden,
                       real *dy, real *dgamma, real *dbeta, real *dbias, int64_t rows, int n, const Dropout *dropout,
                       int threads) {
    float *sums = calloc((size_t)threads * 3 * n, sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float *restrict gamma_sum = sums + (size_t)omp_get_thread_num() * 3 * n;
        float *restrict beta_sum = gamma_sum + n, *restrict bias_sum = beta_sum + n;
        float unit[n], grad[n], factor[n];
        load(factor, gamma, n);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; t++) {
            float mean, scale, sum = 0, product = 0;
            load(unit, hidden + t * n, n);
            moments(unit, n, epsilon, &mean, &scale);
            load(grad, dnormed + t * n, n);
#pragma omp simd reduction(+ : sum, product)
            for (int i = 0; i < n; i++) {
                float u = (unit[i] - mean) * scale, g = grad[i] * factor[i];
                gamma_sum[i] += grad[i] * u;
                beta_sum[i] += grad[i];
                sum += g;
                product += g * u;
                unit[i] = u;
                grad[i] = g;
            }
            sum /= n;
            product /= n;
            for (int i = 0; i < n; i++) grad[i] = scale * (grad[i] - sum - unit[i] * product);
            store(dhidden + t * n, grad, n);
            if (dy) {
                drop(grad, n, dropout, t, 0);
                store(dy + t * n, grad, n);
                for (int i = 0; i < n; i++) bias_sum[i] += grad[i];
            }
        }
    }
    finish_sums(sums, n, threads, 3, (real *[]){dgamma, dbeta, dbias});
}

/* ---- GELU ---- */

/* y = gelu(x + bias) with the error function; x becomes the derivative there, for the backward pass. If y is NULL, there is
 * none, and x becomes gelu(x + bias). [rows, n] */
void bias_gelu(real *restrict x, const real *restrict bias, real *restrict y, int64_t rows, int n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < rows; t++)
        for (int i = 0; i < n; i++) {
            float v = widen(x[t * n + i]) + widen(bias[i]);
            float e = exp_of(-0.5f * v * v), below = normal_below(v, e);
            if (y) y[t * n + i] = narrow(v * below);
            x[t * n + i] = narrow(y ? below + v * e * 0.39894228f : v * below);
        }
}

/* grad *= derivative, and the sum over rows for the bias */
void bias_gelu_backward(real *grad, const real *derivative, real *dbias, int64_t rows, int n, int threads) {
    float *sums = calloc((size_t)threads * n, sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float *mine = sums + (size_t)omp_get_thread_num() * n;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; t++)
            for (int i = 0; i < n; i++) {
                float g = widen(grad[t * n + i]) * widen(derivative[t * n + i]);
                grad[t * n + i] = narrow(g);
                mine[i] += g;
            }
    }
    finish_sums(sums, n, threads, 1, (real *[]){dbias});
}

/* ---- attention ---- */

/* Columns at once: one register's. GCC would spell out shuffles of wider vectors element by element. */
#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8
#endif
#define HEIGHT 6 /* rows at once */
typedef float Lanes __attribute__((vector_size(4 * WIDTH), aligned(4)));

static int padded(int n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

/* c [m, n] = a [m, k] b [k, n] in fp32, where a(i, j) = a[i * ai + j * aj]; ldb and ldc are multiples of WIDTH */
static void multiply(int m, int n, int k, const float *a, int ai, int aj, const float *b, int ldb, float *c, int ldc) {
    for (int i = 0; i < m; i += HEIGHT) {
        int rows = m - i < HEIGHT ? m - i : HEIGHT, row[HEIGHT];
        for (int r = 0; r < HEIGHT; r++) row[r] = (i + (r < rows ? r : 0)) * ai; /* rows behind the last are not stored */
        for (int j = 0; j < n; j += WIDTH) {
            Lanes sum[HEIGHT] = {{0}};
            for (int l = 0; l < k; l++) {
                Lanes other = *(const Lanes *)(b + l * ldb + j);
                for (int r = 0; r < HEIGHT; r++) sum[r] += a[row[r] + l * aj] * other;
            }
            for (int r = 0; r < rows; r++) *(Lanes *)(c + (i + r) * ldc + j) = sum[r];
        }
    }
}

/* to [padded(rows), ld] = the head's columns of a token-major matrix, times scale; zeros around them */
static void load_head(float *to, int ld, const real *from, int64_t stride, int rows, int size, float scale) {
    for (int t = 0; t < rows; t++) {
        __builtin_prefetch(from + t * stride + size); /* the next head */
        for (int i = 0; i < size; i++) to[t * ld + i] = widen(from[t * stride + i]) * scale;
        for (int i = size; i < ld; i++) to[t * ld + i] = 0;
    }
    memset(to + rows * ld, 0, sizeof(float) * (padded(rows) - rows) * ld);
}

/* to [columns, ldt] = from [rows, ldf] turned; `from` has room for a multiple of WIDTH rows, as `to` has. */
static void transpose(float *to, int ldt, const float *from, int ldf, int rows, int columns) {
    typedef int Indices __attribute__((vector_size(4 * WIDTH)));
    for (int t = 0; t < rows; t += WIDTH)
        for (int c = 0; c < columns; c += WIDTH) {
            Lanes block[WIDTH];
            for (int r = 0; r < WIDTH; r++) block[r] = *(const Lanes *)(from + (t + r) * ldf + c);
#pragma GCC unroll 4
            for (int step = WIDTH / 2; step; step /= 2) { /* swap the off-diagonal quarters of ever smaller squares */
                Indices low, high;
                for (int l = 0; l < WIDTH; l++) {
                    low[l] = l & step ? WIDTH + l - step : l;
                    high[l] = l & step ? WIDTH + l : l + step;
                }
#pragma GCC unroll 16
                for (int r = 0; r < WIDTH; r++)
                    if (!(r & step)) {
                        Lanes upper = block[r], lower = block[r + step];
                        block[r] = __builtin_shuffle(upper, lower, low);
                        block[r + step] = __builtin_shuffle(upper, lower, high);
                    }
            }
            for (int r = 0; r < WIDTH && c + r < columns; r++) *(Lanes *)(to + (c + r) * ldt + t) = block[r];
        }
}

static void store_head(real *to, int64_t stride, const float *from, int ld, int rows, int size, float scale) {
    for (int t = 0; t < rows; t++) {
        __builtin_prefetch(to + t * stride + size, 1);
        for (int i = 0; i < size; i++) to[t * stride + i] = narrow(from[t * ld + i] * scale);
    }
}

/* weights [n, ld] = softmax of every column. A column is a query, a lane of the vectors: nothing is summed across lanes. */
static void softmax(float *weights, int ld, int n) {
    for (int c = 0; c < ld; c += WIDTH) {
        float largest[WIDTH], sum[WIDTH] = {0};
        memcpy(largest, weights + c, sizeof largest);
        for (int j = 1; j < n; j++)
            for (int w = 0; w < WIDTH; w++) {
                float v = weights[j * ld + c + w];
                largest[w] = v > largest[w] ? v : largest[w];
            }
        for (int j = 0; j < n; j++)
            for (int w = 0; w < WIDTH; w++) {
                float e = exp_of(weights[j * ld + c + w] - largest[w]);
                weights[j * ld + c + w] = e;
                sum[w] += e;
            }
        for (int w = 0; w < WIDTH; w++) sum[w] = 1 / sum[w];
        for (int j = 0; j < n; j++)
            for (int w = 0; w < WIDTH; w++) weights[j * ld + c + w] *= sum[w];
    }
}

/* weights [n, ld] *= mask; the mask of query c and key j is unit j of the query's token at this head */
static void drop_weights(float *weights, int ld, int n, const Dropout *dropout, int64_t token, int queries, int head) {
    uint32_t threshold = dropout->threshold, keys[WIDTH] = {0};
    float scale = dropout->scale;
    if (!threshold) return;
    for (int c = 0; c < ld; c += WIDTH) {
        for (int w = 0; w < WIDTH && c + w < queries; w++)
            keys[w] = mix(dropout->keys[token + c + w] + dropout->site * 0x9e3779b9u) + (uint32_t)head * 0x85ebca6bu;
        for (int j = 0; j < n; j++)
            for (int w = 0; w < WIDTH; w++)
                weights[j * ld + c + w] *= mix(keys[w] + (uint32_t)j * 0x9e3779b9u) >= threshold ? scale : 0.0f;
    }
}

/* Attention of a batch. Tokens of q, k and v lie q_stride and kv_stride values apart, heads `size` values.
 * With first_only, q and out have one row per text, the query of its first token; otherwise one per token.
 */
typedef struct {
    const real *q, *k, *v;
    const int32_t *starts; /* [texts + 1] */
    int64_t q_stride, kv_stride;
    int32_t texts, heads, size, longest, first_only;
} Attention;

/* out [queries, heads * size] = dropout(softmax(q k' / sqrt(size))) v. Weights are kept turned: [keys, queries]. */
void attention(const Attention *a, real *out, const Dropout *dropout, int threads) {
    int ld = padded(a->size), width = padded(a->longest), most = a->first_only ? WIDTH : width;
    float scale = 1 / sqrtf(a->size);
#pragma omp parallel num_threads(threads)
    {
        float *q = malloc(sizeof(float) * ((size_t)(3 * most + width) * ld + (size_t)width * most));
        float *turned = q + most * ld, *result = turned + most * ld, *kv = result + most * ld, *weights = kv + width * ld;
#pragma omp for collapse(2) schedule(static)
        for (int b = 0; b < a->texts; b++)
            for (int h = 0; h < a->heads; h++) {
                int64_t start = a->starts[b], first = a->first_only ? b : start;
                int length = a->starts[b + 1] - start, queries = a->first_only ? 1 : length, column = h * a->size;
                int wide = padded(queries);
                load_head(q, ld, a->q + first * a->q_stride + column, a->q_stride, queries, a->size, scale);
                transpose(turned, wide, q, ld, queries, a->size);
                load_head(kv, ld, a->k + start * a->kv_stride + column, a->kv_stride, length, a->size, 1);
                multiply(length, wide, a->size, kv, ld, 1, turned, wide, weights, wide);
                softmax(weights, wide, length);
                drop_weights(weights, wide, length, dropout, start, queries, h);
                load_head(kv, ld, a->v + start * a->kv_stride + column, a->kv_stride, length, a->size, 1);
                multiply(queries, ld, length, weights, 1, wide, kv, ld, result, ld);
                store_head(out + (first * a->heads + h) * a->size, (int64_t)a->heads * a->size, result, ld, queries, a->size, 1);
            }
        free(q);
    }
}

/* Gradients of q, k and v, laid out as these are; the weights are computed again. */
void attention_backward(const Attention *a, const real *dout, real *dq, real *dk, real *dv, const Dropout *dropout,
                        int threads) {
    int ld = padded(a->size), width = padded(a->longest), most = a->first_only ? WIDTH : width;
    float scale = 1 / sqrtf(a->size);
#pragma omp parallel num_threads(threads)
    {
        float *q = malloc(sizeof(float) * ((size_t)(3 * most + 3 * width) * ld + (size_t)3 * width * most));
        float *grad = q + most * ld, *turned = grad + most * ld, *k = turned + most * ld, *v = k + width * ld;
        float *result = v + width * ld, *weights = result + width * ld, *kept = weights + width * most;
        float *dweights = kept + width * most;
#pragma omp for collapse(2) schedule(static)
        for (int b = 0; b < a->texts; b++)
            for (int h = 0; h < a->heads; h++) {
                int64_t start = a->starts[b], first = a->first_only ? b : start;
                int length = a->starts[b + 1] - start, queries = a->first_only ? 1 : length, column = h * a->size;
                int wide = padded(queries);
                int64_t q_at = first * a->q_stride + column, kv_at = start * a->kv_stride + column;
                load_head(q, ld, a->q + q_at, a->q_stride, queries, a->size, scale);
                load_head(k, ld, a->k + kv_at, a->kv_stride, length, a->size, 1);
                load_head(v, ld, a->v + kv_at, a->kv_stride, length, a->size, 1);
                load_head(grad, ld, dout + (first * a->heads + h) * a->size, (int64_t)a->heads * a->size, queries, a->size, 1);
                transpose(turned, wide, q, ld, queries, a->size);
                multiply(length, wide, a->size, k, ld, 1, turned, wide, weights, wide);
                softmax(weights, wide, length);
                transpose(turned, wide, grad, ld, queries, a->size);
                multiply(length, wide, a->size, v, ld, 1, turned, wide, dweights, wide);
                memcpy(kept, weights, sizeof(float) * length * wide);
                drop_weights(kept, wide, length, dropout, start, queries, h);
                drop_weights(dweights, wide, length, dropout, start, queries, h);
                for (int c = 0; c < wide; c += WIDTH) { /* softmax backwards */
                    float sum[WIDTH] = {0};
                    for (int j = 0; j < length; j++)
                        for (int w = 0; w < WIDTH; w++) sum[w] += weights[j * wide + c + w] * dweights[j * wide + c + w];
                    for (int j = 0; j < length; j++)
                        for (int w = 0; w < WIDTH; w++) {
                            int at = j * wide + c + w;
                            dweights[at] = weights[at] * (dweights[at] - sum[w]);
                        }
                }
                multiply(length, ld, queries, kept, wide, 1, grad, ld, result, ld);
                store_head(dv + kv_at, a->kv_stride, result, ld, length, a->size, 1);
                multiply(length, ld, queries, dweights, wide, 1, q, ld, result, ld);
                store_head(dk + kv_at, a->kv_stride, result, ld, length, a->size, 1);
                multiply(queries, ld, length, dweights, 1, wide, k, ld, result, ld);
                store_head(dq + q_at, a->q_stride, result, ld, queries, a->size, scale);
            }
        free(q);
    }
}

/* ---- AdamW ---- */

/* One parameter. With bf16 weights, `low` has what rounding took from the fp32 master weights: bits of the master =
 * (bits of the weight << 16) + low. Together they have the master's 4 bytes, and it need not be read beside them
 * (https://arxiv.org/abs/2010.06192).
 */
typedef struct {
    const void *grad; /* of the first process; see Gradients */
    real *weights;
    int16_t *low;
    float *mean, *square; /* moments */
    int64_t n;
    float rate, decay; /* lr / bias correction of the mean; lr * weight decay */
} Parameter;

/* Where the gradients are: those of several processes that share memory lie `stride` bytes apart, and their mean counts. */
typedef struct {
    int64_t stride;
    int32_t processes, is_fp32; /* fp32, else of the weights' type */
} Gradients;

/* to [n] = a parameter's gradient from `start` on */
static inline void load_gradient(float *restrict to, const Parameter *p, const Gradients *gradients, int64_t start, int n) {
    int processes = gradients->processes, is_fp32 = gradients->is_fp32;
    for (int process = 0; process < processes; process++) {
        const void *grad = (const char *)p->grad + process * gradients->stride;
        for (int i = 0; i < n; i++) {
            float g = is_fp32 ? ((const float *)grad)[start + i] : widen(((const real *)grad)[start + i]);
            to[i] = process ? to[i] + g : g;
        }
    }
    for (int i = 0; i < n && processes > 1; i++) to[i] /= processes;
}

/* Values of this thread: [*from, *to) of n, cut at whole cache lines. */
static void my_part(int64_t n, int64_t *from, int64_t *to) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), lines = (n + 63) / 64;
    *from = lines * thread / threads * 64;
    *to = lines * (thread + 1) / threads * 64;
    if (*to > n) *to = n;
}

/* The sum of squares of all gradients. */
double square_sum(const Parameter *parameters, int count, const Gradients *gradients, int threads) {
    double *sums = calloc(threads, sizeof(double)), total = 0;
#pragma omp parallel num_threads(threads)
    {
        double mine = 0;
        for (int p = 0; p < count; p++) {
            int64_t from, to;
            my_part(parameters[p].n, &from, &to);
            for (int64_t start = from; start < to; start += 1024) {
                int n = to - start < 1024 ? to - start : 1024;
                float grad[1024], sum = 0;
                load_gradient(grad, &parameters[p], gradients, start, n);
#pragma omp simd reduction(+ : sum)
                for (int i = 0; i < n; i++) sum += grad[i] * grad[i];
                mine += sum;
            }
        }
        sums[omp_get_thread_num()] = mine;
    }
    for (int thread = 0; thread < threads; thread++) total += sums[thread];
    free(sums);
    return total;
}

static inline float master_of(real weight, int16_t low) {
#ifdef BF16
    uint32_t bits = ((uint32_t)weight << 16) + (uint32_t)(int32_t)low;
    float master;
    memcpy(&master, &bits, 4);
    return master;
#else
    return weight + 0 * low;
#endif
}

static void update(const Parameter *p, const float *grad, int64_t from, int64_t n, float beta1, float beta2,
                   float epsilon, float root) {
    float *restrict mean = p->mean + from, *restrict square = p->square + from;
    real *restrict weights = p->weights + from;
    int16_t none[n], *restrict low = p->low ? p->low + from : none;
    float rate = p->rate, decay = p->decay;
    if (!p->low) memset(none, 0, sizeof none);
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i], master = master_of(weights[i], low[i]);
        float m = mean[i] * beta1 + g * (1 - beta1);
        float s = square[i] * beta2 + g * g * (1 - beta2);
        mean[i] = m;
        square[i] = s;
        /* Subtracted, not multiplied by 1 - lr * decay: that factor, in fp32, is often exactly 1. */
        master = master - master * decay - rate * m / (sqrtf(s) * root + epsilon);
#ifdef BF16
        uint32_t bits;
        memcpy(&bits, &master, 4);
        uint32_t high = (bits + 0x8000) >> 16; /* to nearest; ties away from zero, so that `low` fits */
        weights[i] = high;
        low[i] = bits - (high << 16);
#else
        weights[i] = master;
#endif
    }
}

/* One step (https://arxiv.org/abs/1711.05101). scale: of the gradients; root: 1 / sqrt(bias correction of the square). */
void adamw(const Parameter *parameters, int count, const Gradients *gradients, float scale, float beta1, float beta2,
           float epsilon, float root, int threads) {
#pragma omp parallel num_threads(threads)
    for (int p = 0; p < count; p++) {
        int64_t from, to;
        my_part(parameters[p].n, &from, &to);
        for (int64_t start = from; start < to; start += 1024) { /* in pieces that stay in the first-level cache */
            int64_t n = to - start < 1024 ? to - start : 1024;
            float grad[1024];
            load_gradient(grad, &parameters[p], gradients, start, n);
            for (int64_t i = 0; i < n; i++) grad[i] *= scale;
            update(&parameters[p], grad, start, n, beta1, beta2, epsilon, root);
        }
    }
}
