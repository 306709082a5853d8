/* Attention within documents by the bfloat16 products of a CPU (AVX512-BF16). Scores are never stored whole.
 *
 * native.py compiles this file together with rows.c; where the machine has no such products, it holds nothing. streamed.py calls it and
 * holds the plain reference. Queries lie in the lanes of vectors, so that the softmax over the keys needs no sum across a vector:
 * scores are computed transposed, [keys, queries]. The running softmax is that of FlashAttention (Dao et al. 2022), whose way back
 * computes the weights again from two numbers kept for each query.
 *
 * Each head of a document is computed by one thread in one order, so results do not depend on the number of threads.
 */
#if defined(BFLOAT16) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
static inline long thread(void) { return omp_get_thread_num(); }
#else
static inline long thread(void) { return 0; }
#endif

#define QUERIES 64 /* computed together: every head of a group at some positions, a lane each */
#define VECTORS (QUERIES / 16)
#define KEYS 128 /* whose scores exist at a time */
#define CHUNK 512 /* keys whose gradients stay in the cache while the queries pass, on the way back */
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef uint32_t pair; /* two bfloat16 that lie next to each other along the dimension that is summed over */

/* What is attended to. q, out [tokens, heads, width]; k, v [tokens, groups, width]; more_k, more_v [groups, prefix, width] stand in front
 * of everything, the first `shared` tokens in front of every document. documents [.., 2]: (first token, tokens). */
typedef struct {
    const bf16 *q, *k, *v, *more_k, *more_v;
    const int64_t *documents, *seed;
    long count, heads, groups, width, prefix, shared, causal;
    float scaling, drop;
} Task;

/* One document and one key-value head: `extra` of its `keys` precede its own. */
typedef struct {
    long start, length, extra, keys, rows, group, head;
} Part;

/* Up to QUERIES queries of a part, from position `first` to `last`. */
typedef struct {
    long first, last, seen, open; /* keys that any of them sees, and keys that all of them see */
    __m512i limit[VECTORS];       /* the last key that each sees */
    __m512i mixed[VECTORS];       /* each one's share of the hash that dropout draws by */
} Block;

INLINE __m512 product(__m512 sum, __m512i left, __m512i right) { return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right); }

/* c [rows, 16 * vectors] = the pairs a [rows, steps] times the pairs b [steps, 16 * vectors], or with `onto` added to it. rows is a
 * multiple of 4; a_row, a_step, b_step and c_row are how far apart rows and steps lie. */
INLINE void tiles(const pair *a, long a_row, long a_step, const pair *b, long b_step, float *c, long c_row, long rows, long steps,
                  const int vectors, const int onto) {
    for (long row = 0; row < rows; row += 4) {
        __m512 sums[4][VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) sums[i][j] = onto ? _mm512_loadu_ps(c + (row + i) * c_row + 16 * j) : _mm512_setzero_ps();
        const pair *left = a + row * a_row, *right = b;
        for (long step = 0; step < steps; step++, left += a_step, right += b_step) {
            __m512i parts[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) parts[j] = _mm512_loadu_si512(right + 16 * j);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m512i each = _mm512_set1_epi32((int)left[i * a_row]);
#pragma GCC unroll 4
                for (int j = 0; j < vectors; j++) sums[i][j] = product(sums[i][j], each, parts[j]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) _mm512_storeu_ps(c + (row + i) * c_row + 16 * j, sums[i][j]);
    }
}

/* [keys, queries] from rows of `width` numbers: scores of keys and queries, or of values and the output's gradient. */
static void scores(const bf16 *rows, const pair *lanes, float *out, long keys, long width) {
    tiles((const pair *)rows, width / 2, 1, lanes, QUERIES, out, QUERIES, keys, width / 2, VECTORS, 0);
}

/* [width, queries] += pairs of rows [keys / 2, width] times pairs of weights [keys / 2, queries]. */
static void mixed(const pair *rows, const pair *weights, float *onto, long keys, long width) {
    tiles(rows, 1, width, weights, QUERIES, onto, QUERIES, width, keys / 2, VECTORS, 1);
}

/* [keys, width] += weights [keys, queries] times pairs of rows [queries / 2, width]. */
static void spread(const bf16 *weights, const pair *rows, float *onto, long keys, long width) {
    long column = 0;
    for (; column + 64 <= width; column += 64)
        tiles((const pair *)weights, QUERIES / 2, 1, rows + column, width, onto + column, width, keys, QUERIES / 2, 4, 1);
    for (; column < width; column += 32)
        tiles((const pair *)weights, QUERIES / 2, 1, rows + column, width, onto + column, width, keys, QUERIES / 2, 2, 1);
}

/* 16 vectors of 16 numbers the other way round. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

/* Rows [queries] of `width` numbers as pairs [width / 2, queries]. */
static void pack(const bf16 *const *rows, pair *out, long width) {
    for (long lane = 0; lane < QUERIES; lane += 16)
        for (long column = 0; column < width; column += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[lane + i] + column);
            transpose(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (column / 2 + i) * QUERIES + lane, r[i]);
        }
}

/* Numbers [width, queries] times `by` [queries] as rows of bfloat16. */
static void unpack(const float *from, const float *by, bf16 *const *rows, long count, long width) {
    for (long lane = 0; lane < count; lane += 16)
        for (long column = 0; column < width; column += 16) {
            __m512 factor = _mm512_loadu_ps(by + lane);
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(from + (column + i) * QUERIES + lane), factor));
            transpose(r);
            long real = count - lane < 16 ? count - lane : 16;
            for (long i = 0; i < real; i++)
                _mm256_storeu_si256((__m256i *)(rows[lane + i] + column), (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(r[i])));
        }
}

/* Two rows of `width` numbers as one of pairs. */
INLINE void interleave(const bf16 *even, const bf16 *odd, pair *out, long width) {
    for (long i = 0; i < width; i += 16) {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(even + i)));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(odd + i)));
        _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

/* Two vectors of weights, of one key and of the next, as pairs. */
INLINE __m512i paired(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even)), high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* e^x for x up to 88, to 2 units in the last place; NaN stays NaN. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-120.0f), x);
    __m512 count = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_fnmadd_ps(count, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(count, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 power = _mm512_set1_ps(1.9875691500e-4f);
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.3981999507e-3f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(8.3334519073e-3f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(4.1665795894e-2f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.6666665459e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(5.0000001201e-1f));
    power = _mm512_fmadd_ps(_mm512_mul_ps(power, rest), rest, _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(power, count);
}

/* lowbias32 (C. Wellons, Prospecting for Hash Functions). */
INLINE __m512i scrambled(__m512i x) {
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7feb352d));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32((int)0x846ca68bu));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

/* What the weights of one key are multiplied with: 0 where they drop out, else 1 / (1 - drop). */
INLINE __m512 kept(const Task *task, __m512i mixed, long key) {
    uint32_t least = (uint32_t)((double)task->drop * 4294967296.0);
    __m512i hash = scrambled(_mm512_xor_si512(mixed, _mm512_set1_epi32((int)((uint32_t)key * 0x9e3779b9u))));
    __mmask16 stays = _mm512_cmpge_epu32_mask(hash, _mm512_set1_epi32((int)least));
    return _mm512_maskz_mov_ps(stays, _mm512_set1_ps(1.0f / (1.0f - task->drop)));
}

static Part part_of(const Task *task, long document, long head) {
    Part part = {.start = task->documents[2 * document], .length = task->documents[2 * document + 1], .head = head};
    part.extra = task->prefix + (part.start < task->shared ? 0 : task->shared);
    part.keys = part.extra + part.length;
    part.rows = (part.keys + 3) / 4 * 4;
    part.group = task->heads / task->groups;
    return part;
}

static Block block_of(const Task *task, const Part *part, long first) {
    long positions = QUERIES / part->group, last = first + positions < part->length ? first + positions : part->length;
    Block block = {.first = first, .last = last, .seen = task->causal ? part->extra + last : part->keys};
    block.open = task->causal ? part->extra + first + 1 : part->keys;
    int32_t limit[QUERIES], row[QUERIES];
    for (long lane = 0; lane < QUERIES; lane++) {
        long position = first + lane / part->group < last ? first + lane / part->group : last - 1;
        limit[lane] = (int32_t)(task->causal ? part->extra + position : part->keys - 1);
        row[lane] = (int32_t)((part->start + position) * task->heads + part->head * part->group + lane % part->group);
    }
    for (int j = 0; j < VECTORS; j++) {
        block.limit[j] = _mm512_loadu_si512(limit + 16 * j);
        if (task->seed) {
            __m512i low = _mm512_set1_epi32((int)*task->seed), high = _mm512_set1_epi32((int)(*task->seed >> 32));
            block.mixed[j] = _mm512_xor_si512(scrambled(_mm512_add_epi32(_mm512_loadu_si512(row + 16 * j), low)), high);
        }
    }
    return block;
}

/* Where the rows of a block's queries lie in a tensor [tokens, heads, width]; what no query uses points to `nothing`. */
static void lanes_of(const Task *task, const Part *part, const Block *block, const bf16 *tensor, const bf16 *nothing, const bf16 **rows) {
    long count = (block->last - block->first) * part->group;
    for (long lane = 0; lane < QUERIES; lane++) {
        long token = part->start + block->first + lane / part->group, head = part->head * part->group + lane % part->group;
        rows[lane] = lane < count ? tensor + (token * task->heads + head) * task->width : nothing;
    }
}

/* The rows [rows, width] that a part sees of keys or values, zeros behind them. */
static void collect(const Task *task, const Part *part, const bf16 *own, const bf16 *more, bf16 *rows) {
    long width = task->width, bytes = width * (long)sizeof(bf16);
    if (task->prefix) memcpy(rows, more + part->head * task->prefix * width, task->prefix * bytes);
    for (long row = task->prefix; row < part->keys; row++) {
        long token = row < part->extra ? row - task->prefix : part->start + row - part->extra;
        memcpy(rows + row * width, own + (token * task->groups + part->head) * width, bytes);
    }
    memset(rows + part->keys * width, 0, (part->rows - part->keys) * bytes);
}

static void pairs_of(const bf16 *rows, pair *out, long count, long width) {
    for (long row = 0; row < count; row += 2) interleave(rows + row * width, rows + (row + 1) * width, out + row / 2 * width, width);
}

/* The next `bytes` of a thread's memory. */
static void *taken(char **place, long bytes) {
    void *here = *place;
    *place += (bytes + 63) / 64 * 64;
    return here;
}

/* Bytes that a thread needs for a document of so many queries and keys. */
long attention_scratch(long queries, long keys, long width, long group) {
    long rows = (keys + 3) / 4 * 4, positions = QUERIES / group, blocks = (queries + positions - 1) / positions;
    return 64 * 32 + rows * width * (4 * 2 + 2 * 4) + blocks * QUERIES * (width * 4 + 4) + width * QUERIES * (4 * 2 + 4) +
           KEYS * QUERIES * (2 * 4 + 3 * 2) + 2 * width;
}

static void part_forward(const Task *task, Part part, bf16 *out, float *tops, float *shares, char *place) {
    long width = task->width, positions = QUERIES / part.group;
    bf16 *keys = taken(&place, part.rows * width * 2), *values = taken(&place, part.rows * width * 2), *nothing = taken(&place, width * 2);
    pair *value_pairs = taken(&place, part.rows * width * 2), *query = taken(&place, width / 2 * QUERIES * 4);
    pair *weights = taken(&place, KEYS / 2 * QUERIES * 4);
    float *score = taken(&place, KEYS * QUERIES * 4), *sums = taken(&place, width * QUERIES * 4);
    const bf16 *rows[QUERIES];
    const __m512 scaling = _mm512_set1_ps(task->scaling), nowhere = _mm512_set1_ps(-INFINITY);
    memset(nothing, 0, width * 2);
    collect(task, &part, task->k, task->more_k, keys);
    collect(task, &part, task->v, task->more_v, values);
    pairs_of(values, value_pairs, part.rows, width);
    for (long first = 0; first < part.length; first += positions) {
        Block block = block_of(task, &part, first);
        lanes_of(task, &part, &block, task->q, nothing, rows);
        pack(rows, query, width);
        memset(sums, 0, width * QUERIES * 4);
        __m512 top[VECTORS], total[VECTORS];
        for (int j = 0; j < VECTORS; j++) top[j] = nowhere, total[j] = _mm512_setzero_ps();
        for (long from = 0; from < block.seen; from += KEYS) {
            long end = from + KEYS < block.seen ? from + KEYS : (block.seen + 3) / 4 * 4;
            scores(keys + from * width, query, score, end - from, width);
            for (int j = 0; j < VECTORS; j++) {
                __m512 before = top[j], now = before;
                for (long key = from; key < end; key++) {
                    float *here = score + (key - from) * QUERIES + 16 * j;
                    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(here), scaling);
                    if (key >= block.open)
                        x = _mm512_mask_mov_ps(nowhere, _mm512_cmple_epi32_mask(_mm512_set1_epi32((int)key), block.limit[j]), x);
                    _mm512_storeu_ps(here, x);
                    now = _mm512_max_ps(now, x);
                }
                __m512 sum = _mm512_setzero_ps();
                for (long key = from; key < end; key += 2) {
                    __m512 each[2];
                    for (int i = 0; i < 2; i++) {
                        __m512 x = _mm512_loadu_ps(score + (key + i - from) * QUERIES + 16 * j);
                        /* What is not seen weighs exactly nothing. */
                        each[i] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, nowhere, _CMP_NEQ_UQ), exponential(_mm512_sub_ps(x, now)));
                        sum = _mm512_add_ps(sum, each[i]);
                        if (task->seed) each[i] = _mm512_mul_ps(each[i], kept(task, block.mixed[j], key + i));
                    }
                    _mm512_storeu_si512(weights + (key - from) / 2 * QUERIES + 16 * j, paired(each[0], each[1]));
                }
                __m512 factor = exponential(_mm512_sub_ps(before, now));
                if (from && _mm512_cmp_ps_mask(before, now, _CMP_NEQ_UQ))
                    for (long i = 0; i < width; i++) {
                        float *here = sums + i * QUERIES + 16 * j;
                        _mm512_storeu_ps(here, _mm512_mul_ps(_mm512_loadu_ps(here), factor));
                    }
                total[j] = from ? _mm512_fmadd_ps(total[j], factor, sum) : sum;
                top[j] = now;
            }
            mixed(value_pairs + from / 2 * width, weights, sums, end - from, width);
        }
        float share[QUERIES], highest[QUERIES];
        for (int j = 0; j < VECTORS; j++) {
            _mm512_storeu_ps(share + 16 * j, _mm512_div_ps(_mm512_set1_ps(1.0f), total[j]));
            _mm512_storeu_ps(highest + 16 * j, top[j]);
        }
        long count = (block.last - block.first) * part.group;
        lanes_of(task, &part, &block, out, nothing, rows);
        unpack(sums, share, (bf16 *const *)rows, count, width);
        for (long lane = 0; lane < count; lane++) {
            long row = (rows[lane] - out) / width;
            tops[row] = highest[lane], shares[row] = share[lane];
        }
    }
}

/* out [tokens, heads, width]; tops and shares [tokens, heads] are kept for the way back: the largest score, and 1 / the sum of the
 * others' powers. */
void attention(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *more_k, const bf16 *more_v, const int64_t *documents,
               const int64_t *seed, bf16 *out, float *tops, float *shares, char *scratch, long bytes, long count, long heads, long groups,
               long width, long prefix, long shared, long causal, float scaling, float drop, int threads) {
    Task task = {q, k, v, more_k, more_v, documents, seed, count, heads, groups, width, prefix, shared, causal, scaling, drop};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long each = 0; each < count * groups; each++)
        part_forward(&task, part_of(&task, each / groups, each % groups), out, tops, shares, scratch + thread() * bytes);
}

/* Weights and the gradients of the scores, 16 queries of one key: from scores, and from the gradients of the weights after dropout. */
INLINE void weigh(const Task *task, const Block *block, long key, int j, const float *score, const float *wanted, const float *tops,
                  const float *shares, const float *deltas, __m512 *weight, __m512 *grad) {
    __m512 scaling = _mm512_set1_ps(task->scaling), g = _mm512_loadu_ps(wanted + 16 * j);
    __m512 x = _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(score + 16 * j), scaling), _mm512_loadu_ps(tops + 16 * j));
    __m512 w = _mm512_mul_ps(exponential(x), _mm512_loadu_ps(shares + 16 * j));
    if (key >= block->open) w = _mm512_maskz_mov_ps(_mm512_cmple_epi32_mask(_mm512_set1_epi32((int)key), block->limit[j]), w);
    __m512 stays = task->seed ? kept(task, block->mixed[j], key) : _mm512_set1_ps(1.0f);
    *weight = _mm512_mul_ps(w, stays);
    *grad = _mm512_mul_ps(_mm512_mul_ps(w, scaling), _mm512_fmsub_ps(g, stays, _mm512_loadu_ps(deltas + 16 * j)));
}

/* Sums of the products of rows [width]: what each query's weights and their gradients have in common. */
static float both(const bf16 *a, const bf16 *b, long width) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) {
        __m512i x = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(a + i))), 16);
        __m512i y = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(b + i))), 16);
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

/* Rows of gradients, rounded to bfloat16. */
static void give(const float *from, bf16 *to, long width) {
    for (long i = 0; i < width; i += 16) _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}

static void part_backward(const Task *task, Part part, const bf16 *out, const bf16 *grad, const float *tops, const float *shares,
                          bf16 *for_q, bf16 *for_k, bf16 *for_v, float *front_k, float *front_v, char *place) {
    long width = task->width, positions = QUERIES / part.group, blocks = (part.length + positions - 1) / positions;
    bf16 *keys = taken(&place, part.rows * width * 2), *values = taken(&place, part.rows * width * 2), *nothing = taken(&place, width * 2);
    pair *key_pairs = taken(&place, part.rows * width * 2);
    pair *query = taken(&place, width / 2 * QUERIES * 4), *wanted = taken(&place, width / 2 * QUERIES * 4);
    pair *query_pairs = taken(&place, QUERIES / 2 * width * 4), *wanted_pairs = taken(&place, QUERIES / 2 * width * 4);
    float *to_keys = taken(&place, part.rows * width * 4), *to_values = taken(&place, part.rows * width * 4);
    float *to_queries = taken(&place, blocks * QUERIES * width * 4), *deltas = taken(&place, blocks * QUERIES * 4);
    float *score = taken(&place, KEYS * QUERIES * 4), *weight_grad = taken(&place, KEYS * QUERIES * 4);
    bf16 *weights = taken(&place, KEYS * QUERIES * 2), *score_grads = taken(&place, KEYS * QUERIES * 2);
    pair *score_pairs = taken(&place, KEYS / 2 * QUERIES * 4);
    const bf16 *rows[QUERIES], *grads[QUERIES], *outs[QUERIES];
    memset(nothing, 0, width * 2);
    memset(to_keys, 0, part.rows * width * 4);
    memset(to_values, 0, part.rows * width * 4);
    memset(to_queries, 0, blocks * QUERIES * width * 4);
    collect(task, &part, task->k, task->more_k, keys);
    collect(task, &part, task->v, task->more_v, values);
    pairs_of(keys, key_pairs, part.rows, width);
    for (long chunk = 0; chunk < part.keys; chunk += CHUNK)
        for (long number = 0; number < blocks; number++) {
            Block block = block_of(task, &part, number * positions);
            if (chunk >= block.seen) continue;
            long count = (block.last - block.first) * part.group, until = chunk + CHUNK < block.seen ? chunk + CHUNK : block.seen;
            float *delta = deltas + number * QUERIES, *to_query = to_queries + number * QUERIES * width, top[QUERIES], share[QUERIES];
            lanes_of(task, &part, &block, task->q, nothing, rows);
            lanes_of(task, &part, &block, grad, nothing, grads);
            for (long lane = 0; lane < QUERIES; lane++) {
                long row = lane < count ? (rows[lane] - task->q) / width : 0;
                top[lane] = lane < count ? tops[row] : 0.0f, share[lane] = lane < count ? shares[row] : 0.0f;
            }
            if (!chunk) { /* every query sees the first key */
                lanes_of(task, &part, &block, out, nothing, outs);
                for (long lane = 0; lane < QUERIES; lane++) delta[lane] = lane < count ? both(outs[lane], grads[lane], width) : 0.0f;
            }
            pack(rows, query, width);
            pack(grads, wanted, width);
            for (long lane = 0; lane < QUERIES; lane += 2) {
                interleave(rows[lane], rows[lane + 1], query_pairs + lane / 2 * width, width);
                interleave(grads[lane], grads[lane + 1], wanted_pairs + lane / 2 * width, width);
            }
            for (long from = chunk; from < until; from += KEYS) {
                long end = from + KEYS < until ? from + KEYS : (until + 3) / 4 * 4;
                scores(keys + from * width, query, score, end - from, width);
                scores(values + from * width, wanted, weight_grad, end - from, width);
                for (long key = from; key < end; key += 2) {
                    long here = (key - from) * QUERIES;
                    for (int j = 0; j < VECTORS; j++) {
                        __m512 weight[2], change[2];
                        for (int i = 0; i < 2; i++) {
                            long row = here + i * QUERIES;
                            weigh(task, &block, key + i, j, score + row, weight_grad + row, top, share, delta, weight + i, change + i);
                            _mm256_storeu_si256((__m256i *)(weights + row + 16 * j), (__m256i)_mm512_cvtneps_pbh(weight[i]));
                            _mm256_storeu_si256((__m256i *)(score_grads + row + 16 * j), (__m256i)_mm512_cvtneps_pbh(change[i]));
                        }
                        _mm512_storeu_si512(score_pairs + here / 2 + 16 * j, paired(change[0], change[1]));
                    }
                }
                spread(weights, wanted_pairs, to_values + from * width, end - from, width);
                spread(score_grads, query_pairs, to_keys + from * width, end - from, width);
                mixed(key_pairs + from / 2 * width, score_pairs, to_query, end - from, width);
            }
        }
    float ones[QUERIES];
    for (long lane = 0; lane < QUERIES; lane++) ones[lane] = 1.0f;
    for (long number = 0; number < blocks; number++) {
        Block block = block_of(task, &part, number * positions);
        lanes_of(task, &part, &block, for_q, nothing, rows);
        unpack(to_queries + number * QUERIES * width, ones, (bf16 *const *)rows, (block.last - block.first) * part.group, width);
    }
    /* What stands in front of documents gets a share from each of them: the shared beginning is in front of itself here. */
    long front = task->prefix + task->shared, own = part.start < task->shared ? front : part.extra;
    for (long i = 0; i < front * width; i++) front_k[i] += to_keys[i], front_v[i] += to_values[i];
    for (long row = own; row < part.keys; row++) {
        long token = part.start + row - part.extra;
        give(to_keys + row * width, for_k + (token * task->groups + part.head) * width, width);
        give(to_values + row * width, for_v + (token * task->groups + part.head) * width, width);
    }
}

/* The gradients of q, k and v, as they are; those of what stands in front of documents, front_k and front_v [slices, groups, prefix +
 * shared, width], zeros before, are to be added up over the slices, each of which is a thread's share of the documents. */
void attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *more_k, const bf16 *more_v, const int64_t *documents,
                        const int64_t *seed, const bf16 *out, const bf16 *grad, const float *tops, const float *shares, bf16 *for_q,
                        bf16 *for_k, bf16 *for_v, float *front_k, float *front_v, char *scratch, long bytes, long slices, long count,
                        long heads, long groups, long width, long prefix, long shared, long causal, float scaling, float drop, int threads) {
    Task task = {q, k, v, more_k, more_v, documents, seed, count, heads, groups, width, prefix, shared, causal, scaling, drop};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long each = 0; each < slices * groups; each++) {
        long slice = each / groups, head = each % groups, front = each * (prefix + shared) * width;
        for (long document = slice * count / slices; document < (slice + 1) * count / slices; document++)
            part_backward(&task, part_of(&task, document, head), out, grad, tops, shares, for_q, for_k, for_v, front_k + front,
                          front_v + front, scratch + thread() * bytes);
    }
}
#endif
