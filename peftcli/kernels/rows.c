/* Row-wise arithmetic of a transformer layer on a CPU, one pass over memory each.
 *
 * native.py compiles this file on the machine where it runs, once for each dtype; elementwise.py calls it and holds the plain
 * references. Every row is computed by one thread in one order, so results do not depend on the number of threads.
 * Intermediate results are rounded where PyTorch's own operators would round them.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t value;
static inline float load(value v) {
    uint32_t bits = (uint32_t)v << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
static inline value store(float wide) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &wide, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (value)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
static inline float rounded(float wide) { return load(store(wide)); }
#else
typedef float value;
static inline float load(value v) { return v; }
static inline value store(float wide) { return wide; }
static inline float rounded(float wide) { return wide; }
#endif

#ifdef _OPENMP
#include <omp.h>
static inline long thread(void) { return omp_get_thread_num(); }
#else
static inline long thread(void) { return 0; }
#endif

#define LANES 16 /* numbers in a vector */
#define ROWS _Pragma("omp parallel for schedule(static) num_threads(threads)")

/* e^x to 2 units in the last place, for x from -87 to 88; beyond, what it is there (1e-38, 1e38). */
static inline float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float count = rintf(bounded * 1.44269504f);
    float rest = bounded - count * 0.693359375f + count * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)count + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return power * scale;
}

/* y = weight * x / sqrt(mean(x^2) + eps); inverse [rows] is kept for the way back. */
void rms_norm(const value *x, const value *weight, value *y, float *inverse, long rows, long width, float eps, int threads) {
    ROWS
    for (long row = 0; row < rows; row++) {
        const value *in = x + row * width;
        value *out = y + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += load(in[i]) * load(in[i]);
        float scale = 1.0f / sqrtf(sum / width + eps);
        inverse[row] = scale;
#pragma omp simd
        for (long i = 0; i < width; i++) out[i] = store(load(weight[i]) * rounded(load(in[i]) * scale));
    }
}

void rms_norm_backward(const value *grad, const value *x, const value *weight, const float *inverse, value *for_x, long rows, long width,
                       int threads) {
    ROWS
    for (long row = 0; row < rows; row++) {
        const value *from = grad + row * width, *in = x + row * width;
        value *out = for_x + row * width;
        float scale = inverse[row], sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += load(from[i]) * load(weight[i]) * load(in[i]);
        float shared = sum / width * scale * scale;
#pragma omp simd
        for (long i = 0; i < width; i++) out[i] = store(scale * (load(from[i]) * load(weight[i]) - load(in[i]) * shared));
    }
}

/* out = gate / (1 + e^-gate) * up */
void swiglu(const value *gate, const value *up, value *out, long rows, long width, int threads) {
    ROWS
    for (long row = 0; row < rows; row++) {
        const value *a = gate + row * width, *b = up + row * width;
        value *to = out + row * width;
#pragma omp simd
        for (long i = 0; i < width; i++) {
            float x = load(a[i]);
            to[i] = store(x / (1.0f + exponential(-x)) * load(b[i]));
        }
    }
}

void swiglu_backward(const value *grad, const value *gate, const value *up, value *for_gate, value *for_up, long rows, long width,
                     int threads) {
    ROWS
    for (long row = 0; row < rows; row++) {
        const value *from = grad + row * width, *a = gate + row * width, *b = up + row * width;
        value *to_gate = for_gate + row * width, *to_up = for_up + row * width;
#pragma omp simd
        for (long i = 0; i < width; i++) {
            float x = load(a[i]), part = 1.0f / (1.0f + exponential(-x)), g = load(from[i]);
            to_up[i] = store(g * x * part);
            to_gate[i] = store(g * load(b[i]) * part * (1.0f + x * (1.0f - part)));
        }
    }
}

/* One number of cosine or sine, which are float32 where `wide`. */
static inline float angle(const void *table, long i, const int wide) {
    return wide ? ((const float *)table)[i] : load(((const value *)table)[i]);
}

/* A product in float32, rounded where PyTorch would. */
static inline float part(float product, const int wide) { return wide ? product : rounded(product); }

static inline __attribute__((always_inline)) void turn(const value *x, long step, const void *cosine, const void *sine, value *out, long row,
                                                        long heads, long width, const int back, const int wide) {
    long half = width / 2, size = wide ? sizeof(float) : sizeof(value);
    const char *c = (const char *)cosine + row * width * size, *s = (const char *)sine + row * width * size;
    for (long head = 0; head < heads; head++) {
        const value *in = x + row * step + head * width;
        value *to = out + (row * heads + head) * width;
#pragma omp simd
        for (long i = 0; i < half; i++) {
            float low = load(in[i]), high = load(in[i + half]);
            if (back) {
                to[i] = store(part(low * angle(c, i, wide), wide) + part(high * angle(s, i + half, wide), wide));
                to[i + half] = store(part(high * angle(c, i + half, wide), wide) - part(low * angle(s, i, wide), wide));
            } else {
                to[i] = store(part(low * angle(c, i, wide), wide) - part(high * angle(s, i, wide), wide));
                to[i + half] = store(part(high * angle(c, i + half, wide), wide) + part(low * angle(s, i + half, wide), wide));
            }
        }
    }
}

/* Rotary positions: x [rows, heads, width], its rows `step` apart; cosine and sine [rows, width]. With `back` the gradient's way. */
void rotate(const value *x, long step, const value *cosine, const value *sine, value *out, long rows, long heads, long width, long back,
            int threads) {
    ROWS
    for (long row = 0; row < rows; row++) {
        if (back)
            turn(x, step, cosine, sine, out, row, heads, width, 1, 0);
        else
            turn(x, step, cosine, sine, out, row, heads, width, 0, 0);
    }
}

/* The same with cosine and sine in float32. */
void rotate_wide(const value *x, long step, const float *cosine, const float *sine, value *out, long rows, long heads, long width, long back,
                 int threads) {
    ROWS
    for (long row = 0; row < rows; row++) {
        if (back)
            turn(x, step, cosine, sine, out, row, heads, width, 1, 1);
        else
            turn(x, step, cosine, sine, out, row, heads, width, 0, 1);
    }
}

/* Cross-entropy of each row of logits [rows, width] in nats. With `gradient` the logits become e^(x - top) - [target] * sum, and
 * inverse [rows] 1 / sum: their product is the gradient. A tie with the largest logit counts as correct. */
void cross_entropy(value *logits, const int64_t *target, float *loss, float *inverse, int64_t *correct, long rows, long width, long gradient,
                   int threads) {
    ROWS
    for (long row = 0; row < rows; row++) {
        value *x = logits + row * width;
        float top = -INFINITY, sum = 0, picked = load(x[target[row]]);
        int broken = 0;
#pragma omp simd reduction(max : top) reduction(| : broken)
        for (long i = 0; i < width; i++) {
            float v = load(x[i]);
            top = v > top ? v : top;
            broken |= v != v;
        }
        if (broken) top = NAN;
        if (gradient) {
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < width; i++) {
                float power = exponential(load(x[i]) - top);
                sum += power;
                x[i] = store(power);
            }
            x[target[row]] = store(exponential(picked - top) - sum);
        } else {
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < width; i++) sum += exponential(load(x[i]) - top);
        }
        loss[row] = logf(sum) + top - picked;
        inverse[row] = 1.0f / sum;
        correct[row] = picked == top;
    }
}

/* Scores [batches, queries * group, keys] become the softmax of scaling times them, over the keys that a query sees. The queries begin with
 * number `first`; a causal one sees the keys up to its own, which `extra` others precede; another those of its row, which has lengths[batch
 * / heads] of its own, or all. */
void softmax(value *scores, float *scratch, const int64_t *lengths, long batches, long heads, long height, long group, long keys, long extra,
             long first, long causal, float scaling, int threads) {
    long wide = (keys + LANES - 1) / LANES * LANES;
    ROWS
    for (long row = 0; row < batches * height; row++) {
        value *x = scores + row * keys;
        float *power = scratch + thread() * wide;
        long batch = row / height, query = row % height / group;
        long seen = causal ? extra + first + query + 1 : lengths ? extra + lengths[batch / heads] : keys;
        long pieces = (seen + LANES - 1) / LANES;
        float tops[LANES], sums[LANES], top = -INFINITY, sum = 0;
        int broken = 0;
#pragma omp simd reduction(| : broken)
        for (long i = 0; i < seen; i++) {
            power[i] = load(x[i]) * scaling;
            broken |= power[i] != power[i];
        }
        /* Whole vectors from here on: what lies behind the last key is nothing. */
        for (long i = seen; i < pieces * LANES; i++) power[i] = -INFINITY;
        for (long k = 0; k < LANES; k++) tops[k] = -INFINITY, sums[k] = 0;
        for (long piece = 0; piece < pieces; piece++)
            for (long k = 0; k < LANES; k++) tops[k] = power[piece * LANES + k] > tops[k] ? power[piece * LANES + k] : tops[k];
        for (long k = 0; k < LANES; k++) top = tops[k] > top ? tops[k] : top;
        if (broken) top = NAN;
        for (long piece = 0; piece < pieces; piece++)
            for (long k = 0; k < LANES; k++) {
                float each = exponential(power[piece * LANES + k] - top);
                power[piece * LANES + k] = each;
                sums[k] += each;
            }
        for (long k = 0; k < LANES; k++) sum += sums[k];
        float share = 1.0f / sum;
#pragma omp simd
        for (long i = 0; i < seen; i++) x[i] = store(power[i] * share);
        for (long i = seen; i < keys; i++) x[i] = store(0.0f);
    }
}

/* grad = scaling * weights * (grad - sum(grad * weights)) of each row */
void softmax_backward(const value *weights, value *grad, long rows, long keys, float scaling, int threads) {
    long whole = keys / LANES * LANES, rest = keys - whole;
    ROWS
    for (long row = 0; row < rows; row++) {
        const value *w = weights + row * keys;
        value *g = grad + row * keys;
        /* The end of a row as a whole vector, so that nothing goes number by number. */
        value last_w[LANES] = {0}, last_g[LANES] = {0};
        memcpy(last_w, w + whole, rest * sizeof(value));
        memcpy(last_g, g + whole, rest * sizeof(value));
        float sums[LANES], sum = 0;
        for (long k = 0; k < LANES; k++) sums[k] = load(last_w[k]) * load(last_g[k]);
        for (long i = 0; i < whole; i += LANES)
            for (long k = 0; k < LANES; k++) sums[k] += load(w[i + k]) * load(g[i + k]);
        for (long k = 0; k < LANES; k++) sum += sums[k];
        for (long i = 0; i < whole; i += LANES)
            for (long k = 0; k < LANES; k++) g[i + k] = store(scaling * load(w[i + k]) * (load(g[i + k]) - sum));
        for (long k = 0; k < LANES; k++) last_g[k] = store(scaling * load(last_w[k]) * (load(last_g[k]) - sum));
        memcpy(g + whole, last_g, rest * sizeof(value));
    }
}

/* lowbias32 (C. Wellons, Prospecting for Hash Functions): every bit of x moves every bit of the result with a chance near 1/2. */
static inline uint32_t scrambled(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* out = x / (1 - share), or 0 where the hash of the seed and the number's place, `first` for the first, is below `share`. */
void dropout(const value *x, const int64_t *seed, value *out, long count, long first, float share, int threads) {
    const long piece = 4096;
    uint32_t low = (uint32_t)*seed, high = (uint32_t)((uint64_t)*seed >> 32), least = (uint32_t)((double)share * 4294967296.0);
    float factor = 1.0f / (1.0f - share);
    ROWS
    for (long start = 0; start < count; start += piece) {
        long end = start + piece < count ? start + piece : count;
#pragma omp simd
        for (long i = start; i < end; i++) {
            uint64_t place = (uint64_t)(first + i);
            uint32_t hash = scrambled(scrambled((uint32_t)place + low) ^ high ^ (uint32_t)(place >> 32));
            out[i] = store(hash < least ? 0.0f : load(x[i]) * factor);
        }
    }
}

/* out = x * scale, scale [width]. */
void scale_columns(const value *x, const float *scale, value *out, long rows, long width, int threads) {
    ROWS
    for (long row = 0; row < rows; row++) {
        const value *in = x + row * width;
        value *to = out + row * width;
#pragma omp simd
        for (long i = 0; i < width; i++) to[i] = store(load(in[i]) * scale[i]);
    }
}

/* for_x = grad * scale, and sums [pieces, width] of grad * x over `piece` rows each: how they are added up does not depend on the threads. */
void scale_columns_backward(const value *grad, const value *x, const float *scale, value *for_x, float *sums, long rows, long width,
                            long piece, int threads) {
    ROWS
    for (long first = 0; first < rows; first += piece) {
        float *sum = sums + first / piece * width;
        long end = first + piece < rows ? first + piece : rows;
        for (long row = first; row < end; row++) {
            const value *from = grad + row * width, *in = x + row * width;
            value *to = for_x + row * width;
#pragma omp simd
            for (long i = 0; i < width; i++) {
                float g = load(from[i]);
                sum[i] += g * load(in[i]);
                to[i] = store(g * scale[i]);
            }
        }
    }
}

/* Each row as 8-bit numbers times a factor: out = round(x * by / factor), factor [rows] = max |x * by| / 127; by [width] or none. */
void quantize(const value *x, const float *by, int8_t *out, float *factor, long rows, long width, int threads) {
    ROWS
    for (long row = 0; row < rows; row++) {
        const value *in = x + row * width;
        int8_t *to = out + row * width;
        float top = 0;
        int broken = 0;
        if (by) {
#pragma omp simd reduction(max : top) reduction(| : broken)
            for (long i = 0; i < width; i++) {
                float v = fabsf(load(in[i]) * by[i]);
                top = v > top ? v : top;
                broken |= !(v < INFINITY);
            }
        } else {
#pragma omp simd reduction(max : top) reduction(| : broken)
            for (long i = 0; i < width; i++) {
                float v = fabsf(load(in[i]));
                top = v > top ? v : top;
                broken |= !(v < INFINITY);
            }
        }
        float scale = broken || top == 0 ? 0.0f : 127.0f / top;
        factor[row] = broken ? NAN : top / 127.0f;
        if (by) {
#pragma omp simd
            for (long i = 0; i < width; i++) to[i] = (int8_t)(int32_t)rintf(load(in[i]) * by[i] * scale);
        } else {
#pragma omp simd
            for (long i = 0; i < width; i++) to[i] = (int8_t)(int32_t)rintf(load(in[i]) * scale);
        }
    }
}

/* out = sums * factor[row] * by[column], by [width] or none; without it and with `onto` added to what is there. */
void dequantize(const int32_t *sums, const float *factor, const float *by, value *out, long rows, long width, long onto, int threads) {
    ROWS
    for (long row = 0; row < rows; row++) {
        const int32_t *in = sums + row * width;
        value *to = out + row * width;
        float scale = factor[row];
        if (by) {
#pragma omp simd
            for (long i = 0; i < width; i++) to[i] = store((float)in[i] * scale * by[i]);
        } else if (onto) {
#pragma omp simd
            for (long i = 0; i < width; i++) to[i] = store(load(to[i]) + (float)in[i] * scale);
        } else {
#pragma omp simd
            for (long i = 0; i < width; i++) to[i] = store((float)in[i] * scale);
        }
    }
}
