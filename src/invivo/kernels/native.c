/* The small operations of a decode step on a CPU, float32.
 *
 * A step of a few rows is made of hundreds of operations of some microseconds each; torch spends
 * more on calling them than on doing them, and its attention wants the keys of every sequence
 * copied out of their pages first. These read and write where things lie.
 *
 * Built by native.py without a library of threads of its own: the symbols of
 * OpenMP are those that torch has loaded, so that both use one pool of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS_AT_ONCE 16 /* keys whose scores are held at once */

/* exp(x) for x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2]; relative error below 3e-7,
 * 0 below -87. */
static inline float exp_below(float given) {
    float x = given < -87.0f ? -87.0f : given;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power;
    power.i = ((int32_t)n + 127) << 23;
    return given < -87.0f ? 0.0f : p * power.f;
}

static inline float dot(const float *restrict a, const float *restrict b, int n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* One piece of one sequence: keys [first, stop) against its query, all heads.
 * Leaves for each head the largest score, the sum of exponentials and the weighted values. */
static inline __attribute__((always_inline)) void attend_keys(
    const float *restrict q, const float *restrict k, const float *restrict v,
    const int32_t *restrict table, int block_size, int first, int stop, int n_heads, int n_groups,
    int width, float scale, float softcap, float *restrict largest, float *restrict sums,
    float *restrict mixed) {
    const int repeat = n_heads / n_groups;
    const int64_t row = (int64_t)n_groups * width;
    float scores[ROWS_AT_ONCE];
    for (int h = 0; h < n_heads; h++) {
        largest[h] = -INFINITY;
        sums[h] = 0.0f;
    }
    memset(mixed, 0, sizeof(float) * n_heads * width);
    for (int at = first; at < stop;) {
        int in_block = at % block_size;
        int n = block_size - in_block;
        n = n < stop - at ? n : stop - at;
        n = n < ROWS_AT_ONCE ? n : ROWS_AT_ONCE;
        const int64_t place = ((int64_t)table[at / block_size] * block_size + in_block) * row;
        /* The next keys lie anywhere: they are fetched, a share with each head, meanwhile. */
        const int next = at + n, coming = stop - next < ROWS_AT_ONCE ? stop - next : ROWS_AT_ONCE;
        int64_t there = 0;
        if (coming > 0)
            there = ((int64_t)table[next / block_size] * block_size + next % block_size) * row;
        const int64_t ahead = coming > 0 ? coming * row : 0;
        const int64_t share = (ahead / n_heads + 16) / 16 * 16;
        for (int h = 0; h < n_heads; h++) {
            for (int64_t i = h * share; i < (h + 1) * share && i < ahead; i += 16) {
                __builtin_prefetch(k + there + i, 0, 2);
                __builtin_prefetch(v + there + i, 0, 2);
            }
            const float *keys = k + place + (int64_t)(h / repeat) * width;
            const float *values = v + place + (int64_t)(h / repeat) * width;
            float top = largest[h];
            for (int i = 0; i < n; i++) {
                float s = dot(q + (int64_t)h * width, keys + i * row, width) * scale;
                if (softcap > 0.0f) s = softcap * tanhf(s / softcap);
                scores[i] = s;
            }
            for (int i = 0; i < n; i++) top = scores[i] > top ? scores[i] : top;
            if (top == -INFINITY) top = 0.0f; /* scores of -inf only: nothing to mix */
            float *restrict out = mixed + (int64_t)h * width;
            if (top > largest[h]) {
                float shrink = exp_below(largest[h] - top);
                if (largest[h] == -INFINITY) shrink = 0.0f;
                sums[h] *= shrink;
#pragma omp simd
                for (int d = 0; d < width; d++) out[d] *= shrink;
                largest[h] = top;
            }
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < n; i++) {
                scores[i] = exp_below(scores[i] - top);
                sum += scores[i];
            }
            sums[h] += sum;
            for (int i = 0; i < n; i++) {
                const float p = scores[i];
                const float *restrict value = values + i * row;
#pragma omp simd
                for (int d = 0; d < width; d++) out[d] += p * value[d];
            }
        }
        at += n;
    }
}

/* The usual widths as constants: their loops are unrolled and stay in registers. */
static void attend_piece(const float *q, const float *k, const float *v, const int32_t *table,
                         int block_size, int first, int stop, int n_heads, int n_groups, int width,
                         float scale, float softcap, float *largest, float *sums, float *mixed) {
#define WITH(w)                                                                               \
    attend_keys(q, k, v, table, block_size, first, stop, n_heads, n_groups, w, scale, softcap, \
                largest, sums, mixed)
    switch (width) {
        case 64: WITH(64); break;
        case 128: WITH(128); break;
        case 256: WITH(256); break;
        default: WITH(width);
    }
#undef WITH
}

/* Attention of n spans of one row each over paged keys and values.
 *
 * q, out: rows of n_heads * width, q_stride and out_stride floats apart; k, v: pages
 * [blocks, block_size, n_groups, width]; table [n, table_stride]; lengths [n].
 * window, softcap: 0 for none. Returns 0, or 1 if there is no memory. */
int paged_decode(const float *q, int64_t q_stride, const float *k, const float *v, float *out,
                 int64_t out_stride, const int32_t *table, int64_t table_stride,
                 const int32_t *lengths, int n, int block_size, int n_heads, int n_groups,
                 int width, float scale, float softcap, int window, int piece, int threads) {
    int *starts = malloc(sizeof(int) * (n + 1));
    if (!starts) return 1;
    starts[0] = 0;
    for (int s = 0; s < n; s++) {
        int seen = window > 0 && window < lengths[s] ? window : lengths[s];
        starts[s + 1] = starts[s] + (seen + piece - 1) / piece;
    }
    const int n_pieces = starts[n];
    const int64_t per_piece = (int64_t)n_heads * (width + 2);
    float *scratch = malloc(sizeof(float) * per_piece * n_pieces);
    int *span_of = malloc(sizeof(int) * n_pieces);
    if (!scratch || !span_of) {
        free(starts), free(scratch), free(span_of);
        return 1;
    }
    for (int s = 0; s < n; s++)
        for (int p = starts[s]; p < starts[s + 1]; p++) span_of[p] = s;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (n_pieces > 1)
    for (int p = 0; p < n_pieces; p++) {
        const int s = span_of[p], length = lengths[s];
        const int begin = window > 0 && window < length ? length - window : 0;
        const int first = begin + (p - starts[s]) * piece;
        const int stop = first + piece < length ? first + piece : length;
        float *mixed = scratch + per_piece * p;
        float *largest = mixed + (int64_t)n_heads * width;
        attend_piece(q + s * q_stride, k, v, table + s * table_stride, block_size, first, stop,
                     n_heads, n_groups, width, scale, softcap, largest, largest + n_heads, mixed);
    }
    for (int s = 0; s < n; s++) {
        for (int h = 0; h < n_heads; h++) {
            float *restrict to = out + s * out_stride + (int64_t)h * width;
            float top = -INFINITY, sum = 0.0f;
            for (int p = starts[s]; p < starts[s + 1]; p++) {
                const float m = scratch[per_piece * p + (int64_t)n_heads * width + h];
                top = m > top ? m : top;
            }
            memset(to, 0, sizeof(float) * width);
            for (int p = starts[s]; p < starts[s + 1]; p++) {
                const float *from = scratch + per_piece * p;
                const float *largest = from + (int64_t)n_heads * width;
                const float w = exp_below(largest[h] - top);
                sum += w * largest[n_heads + h];
                const float *restrict mixed = from + (int64_t)h * width;
#pragma omp simd
                for (int d = 0; d < width; d++) to[d] += w * mixed[d];
            }
            const float share = 1.0f / sum;
#pragma omp simd
            for (int d = 0; d < width; d++) to[d] *= share;
        }
    }
    free(starts), free(scratch), free(span_of);
    return 0;
}

/* total = x + residual (residual NULL: x, and total is not written), out = total / rms * weight. */
void add_rms_norm(const float *x, const float *residual, const float *weight, float *total,
                  float *out, int64_t n_rows, int64_t width, float eps, float offset, int threads) {
#pragma omp parallel for num_threads(threads) if (n_rows * width > 65536)
    for (int64_t r = 0; r < n_rows; r++) {
        const float *restrict from = x + r * width;
        const float *restrict old = residual ? residual + r * width : 0;
        float *restrict sum = residual ? total + r * width : 0;
        float *restrict to = out + r * width;
        float square = 0.0f;
        if (old) {
#pragma omp simd reduction(+ : square)
            for (int64_t i = 0; i < width; i++) {
                const float value = from[i] + old[i];
                sum[i] = value;
                square += value * value;
            }
            from = sum;
        } else {
#pragma omp simd reduction(+ : square)
            for (int64_t i = 0; i < width; i++) square += from[i] * from[i];
        }
        const float share = 1.0f / sqrtf(square / width + eps);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) to[i] = from[i] * share * (weight[i] + offset);
    }
}

/* Turn q and k in place by the angles of their rows, and write k and v to their slots.
 *
 * q, k, v: rows `stride` floats apart with n_heads, n_groups, n_groups heads of `width`;
 * cos, sin [n_rows, half]; caches: slots of n_groups * width floats. */
void rotate_and_store(float *q, float *k, const float *v, int64_t stride, const float *cosines,
                      const float *sines, const int64_t *slots, float *k_cache, float *v_cache,
                      int64_t n_rows, int n_heads, int n_groups, int width, int half, int threads) {
    const int64_t row = (int64_t)n_groups * width;
#pragma omp parallel for num_threads(threads) if (n_rows * stride > 65536)
    for (int64_t r = 0; r < n_rows; r++) {
        const float *restrict c = cosines + r * half, *restrict s = sines + r * half;
        for (int h = 0; h < n_heads + n_groups; h++) {
            float *x = h < n_heads ? q + r * stride + (int64_t)h * width
                                   : k + r * stride + (int64_t)(h - n_heads) * width;
            float *restrict one = x, *restrict two = x + half;
#pragma omp simd
            for (int i = 0; i < half; i++) {
                const float a = one[i], b = two[i];
                one[i] = a * c[i] - b * s[i];
                two[i] = b * c[i] + a * s[i];
            }
        }
        memcpy(k_cache + slots[r] * row, k + r * stride, sizeof(float) * row);
        memcpy(v_cache + slots[r] * row, v + r * stride, sizeof(float) * row);
    }
}

/* out = silu(gate) * up for rows of (gate, up) side by side. */
void silu_mul(const float *gate_up, float *out, int64_t n_rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (n_rows * width > 16384)
    for (int64_t r = 0; r < n_rows; r++) {
        const float *restrict gate = gate_up + 2 * r * width, *restrict up = gate + width;
        float *restrict to = out + r * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const float x = gate[i];
            const float e = exp_below(x < 0.0f ? x : -x);
            const float share = (x < 0.0f ? e : 1.0f) / (1.0f + e);
            to[i] = x * share * up[i];
        }
    }
}
