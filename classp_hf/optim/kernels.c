/* On CPU tensors: CLASSP's step (Algorithm 1 of arXiv 2405.09637), the thresholds of its `density`, the pull towards an anchor,
 * and the squares that EWC's Fisher adds up. The step and the pull read and write each weight once.
 *
 * The step: the same operations in the same order as `classp_` in classp.py, none contracted: the same results to the bit where
 * power is 1, to the last place elsewhere (torch's square root and power are of another library). Work goes in blocks of
 * BLOCK weights, those of the uint8 accumulator; a block in which no gradient passes costs reading its gradients.
 * Low-bit accumulators: see state.py. No Python in here: kernels.py calls it through ctypes.
 */
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 256
#define U8_SHIFT 19
#define BF16_SHIFT 16
#define MAX_JOBS 256
#define MAX_SAMPLE 8192
#define VERSION 4 /* of the structs below; kernels.py has the same */

enum { F32 = 0, BF16 = 1, U8 = 2 };

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

typedef struct {
    int64_t n;
    void *w;
    const void *g;
    void *s;
    int16_t *base;     /* of uint8 accumulators, one a block */
    float threshold;   /* on g^2; 0: every g that is not 0 passes */
    int32_t w_dtype, g_dtype, s_dtype;
} classp_tensor;

typedef struct {
    float step;        /* -lr, or lr to maximize */
    float decay;       /* 1 - lr * weight_decay */
    float power, eps;
    int32_t apply_decay;
} classp_hyper;

int classp_version(void) { return VERSION; }

static inline float from_bits(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }

/* 32 bits that look random, from the gradient, the weight and its index: the same run rounds the same way */
static inline uint32_t hash(uint32_t g, uint32_t w, uint32_t index) {
    uint32_t x = g ^ (w << 16 | w >> 16) ^ index * 0x9E3779B1u;
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

/* The arithmetic of one weight. `kind` is a constant once inlined: the power if it is 1 or 2, 0 for any other. */
static inline __attribute__((always_inline)) float moved(int kind, const classp_hyper h, float w, float g, float s) {
    const float root = !h.apply_decay ? 1.0f : kind == 2 ? sqrtf(s + h.eps) : kind == 1 ? s + h.eps : powf(s + h.eps, 1 / h.power);
    return w * h.decay + h.step * g / root;
}
static inline __attribute__((always_inline)) float grown(int kind, const classp_hyper h, float s, float g) {
    return s + (kind == 2 ? g * g : kind == 1 ? fabsf(g) : g == 0 ? 0 : powf(fabsf(g), h.power));
}

static inline __attribute__((always_inline)) void block(
    int kind, const classp_hyper h, int n, float threshold, float *restrict w, const float *restrict g, float *restrict s
) {
    for (int i = 0; i < n; i++) {
        const float x = (fabsf(g[i]) <= FLT_MAX) & ((threshold == 0) | (g[i] * g[i] > threshold)) ? g[i] : 0.0f;
        s[i] = grown(kind, h, s[i], x);
        w[i] = moved(kind, h, w[i], x, s[i]);
    }
}

/* Returns the number of gradients that are not finite, which are passed over. */
CLONES static int64_t update(const classp_tensor *t, const classp_hyper *hyper, int64_t begin, int64_t end) {
    const classp_hyper h = *hyper;
    const float threshold = t->threshold;
    const int w_dtype = t->w_dtype, g_dtype = t->g_dtype, s_dtype = t->s_dtype;
    float g_copy[BLOCK], w_copy[BLOCK], s_copy[BLOCK];
    uint32_t random[BLOCK];
    int32_t code[BLOCK];
    int64_t bad = 0;
    for (int64_t at = begin; at < end; at += BLOCK) {
        const int n = (int)(end - at < BLOCK ? end - at : BLOCK);
        const float *g = (const float *)t->g + at;
        if (g_dtype == BF16) {
            const uint16_t *in = (const uint16_t *)t->g + at;
            for (int i = 0; i < n; i++) g_copy[i] = from_bits((uint32_t)in[i] << 16);
            g = g_copy;
        }
        uint32_t largest = 0;  /* of |g|; bits of floats >= 0 are ordered as they are */
        for (int i = 0; i < n; i++) {
            const uint32_t bits = to_bits(g[i]) & 0x7FFFFFFFu;
            largest = bits > largest ? bits : largest;
        }
        if (largest >= 0x7F800000u)
            for (int i = 0; i < n; i++) bad += !(fabsf(g[i]) <= FLT_MAX);
        const int passed = threshold == 0 ? largest != 0 : !(from_bits(largest) * from_bits(largest) <= threshold);
        if (!passed && h.decay == 1.0f) continue;

        float *w = (float *)t->w + at, *s = (float *)t->s + at;
        uint16_t *w16 = (uint16_t *)t->w + at, *s16 = (uint16_t *)t->s + at;
        uint8_t *s8 = (uint8_t *)t->s + at;
        if (w_dtype == BF16) {
            w = w_copy;
            for (int i = 0; i < n; i++) w[i] = from_bits((uint32_t)w16[i] << 16);
        }
        if (s_dtype != F32) {
            s = s_copy;
            const int32_t offset = s_dtype == U8 ? t->base[at / BLOCK] : 0;
            if (s_dtype == BF16)
                for (int i = 0; i < n; i++) s[i] = from_bits((uint32_t)s16[i] << BF16_SHIFT);
            else
                for (int i = 0; i < n; i++) {
                    const uint32_t bits = (uint32_t)(s8[i] + offset) << U8_SHIFT;
                    s[i] = from_bits(s8[i] ? bits : 0);
                }
            for (int i = 0; i < n; i++) random[i] = hash(to_bits(g[i]), to_bits(w[i]), (uint32_t)(at + i));
        }

        if (h.power == 2) block(2, h, n, threshold, w, g, s);
        else if (h.power == 1) block(1, h, n, threshold, w, g, s);
        else block(0, h, n, threshold, w, g, s);

        if (w_dtype == BF16)
            for (int i = 0; i < n; i++) {  /* to the nearest, ties to even */
                const uint32_t b = to_bits(w[i]);
                w16[i] = w[i] != w[i] ? 0x7FC0 : (uint16_t)((b + 0x7FFF + (b >> 16 & 1)) >> 16);
            }
        if (s_dtype == BF16) {
            for (int i = 0; i < n; i++)
                s16[i] = (uint16_t)((to_bits(s[i]) + (random[i] >> (32 - BF16_SHIFT))) >> BF16_SHIFT);
        } else if (s_dtype == U8) {
            int32_t top = 0;
            for (int i = 0; i < n; i++) {
                code[i] = (int32_t)((to_bits(s[i]) + (random[i] >> (32 - U8_SHIFT))) >> U8_SHIFT);
                code[i] = s[i] == 0 ? 0 : code[i];
                top = code[i] > top ? code[i] : top;
            }
            const int32_t b = top > 255 ? top - 255 : 0;
            uint32_t below = 0;
            for (int i = 0; i < n; i++) {
                below |= (code[i] <= b) & (s[i] > 0);
                s8[i] = (uint8_t)(code[i] > b ? code[i] - b : 0);
            }
            if (below) {  /* the lowest code or none, right on average */
                const float lowest = from_bits((uint32_t)(b + 1) << U8_SHIFT);
                for (int i = 0; i < n; i++) {
                    const float u = (float)(random[i] * 0x9E3779B1u >> 8) * 0x1p-24f;
                    s8[i] = code[i] <= b ? u * lowest < s[i] : s8[i];
                }
            }
            t->base[at / BLOCK] = (int16_t)b;
        }
    }
    return bad;
}

typedef struct {
    int64_t n;
    float *target;        /* gradients; or, if `implicit`, the weights themselves */
    const float *w;
    const float *a;       /* the anchor in float32, or NULL: then it is values[i] * scale[i / columns] */
    const int16_t *values;
    const float *scale;
    int64_t columns;
    const float *f;       /* importance, >= 0, or NULL: 1 everywhere */
} pull_tensor;

typedef struct {
    float strength, eps, power;
    int32_t implicit;     /* a step that is stable at any strength, under CLASSP: f is its accumulator */
} pull_hyper;

CLONES static int64_t pull(const pull_tensor *t, const pull_hyper *hyper, int64_t begin, int64_t end) {
    const pull_hyper h = *hyper;
    float moved[BLOCK];
    for (int64_t at = begin; at < end; at += BLOCK) {
        const int n = (int)(end - at < BLOCK ? end - at : BLOCK);
        const float *w = t->w + at, *f = t->f + at;
        float *target = t->target + at;
        if (t->f) {
            uint32_t matters = 0;
            for (int i = 0; i < n; i++) matters |= f[i] != 0;
            if (!matters) continue;
        }
        if (t->a) {
            const float *a = t->a + at;
            for (int i = 0; i < n; i++) moved[i] = w[i] - a[i];
        } else {
            for (int i = 0; i < n;) {
                const int64_t row = (at + i) / t->columns, left = (row + 1) * t->columns - at;
                const float scale = t->scale[row];
                const int16_t *values = t->values + at;
                const int stop = (int)(left < n ? left : n);
                for (int k = i; k < stop; k++) moved[k] = w[k] - (float)values[k] * scale;
                i = stop;
            }
        }
        if (t->f)
            for (int i = 0; i < n; i++) moved[i] *= f[i];
        if (!h.implicit) {
            for (int i = 0; i < n; i++) target[i] += h.strength * moved[i];
        } else if (h.power == 2) {
            for (int i = 0; i < n; i++) target[i] -= h.strength * moved[i] / (sqrtf(f[i] + h.eps) + h.strength * f[i]);
        } else {
            for (int i = 0; i < n; i++) {
                const float root = h.power == 1 ? f[i] + h.eps : powf(f[i] + h.eps, 1 / h.power);
                target[i] -= h.strength * moved[i] / (root + h.strength * f[i]);
            }
        }
    }
    return 0;
}

typedef struct {
    int64_t one;          /* a tensor is worked on as a whole */
    int64_t count;        /* of the sample, g[0], g[stride], ...; at most MAX_SAMPLE */
    const void *g;
    int64_t stride;
    double density;
    float threshold;      /* the result: the (1 - density) quantile of the positive g^2, 0 if there are none */
    int32_t g_dtype;
} density_tensor;

/* As `_selected_quantile` in classp.py, to the bit. Bits of floats >= 0 are ordered as they are: the rank's digits, of 11 bits,
 * are found one after the other by counting. */
static int64_t quantile(density_tensor *t) {
    uint32_t sample[MAX_SAMPLE], counts[2048], found = 0;
    int64_t n = 0;
    for (int64_t i = 0; i < t->count; i++) {
        const int64_t at = i * t->stride;
        const float g = t->g_dtype == BF16 ? from_bits((uint32_t)((const uint16_t *)t->g)[at] << 16) : ((const float *)t->g)[at];
        sample[n] = to_bits(g * g);
        n += g * g > 0;
    }
    int64_t rank = (int64_t)ceil((1 - t->density) * (double)n - 1e-6);
    t->threshold = 0;
    if (rank <= 0) return 0;
    for (int shift = 22; shift >= 0; shift -= 11) {
        memset(counts, 0, sizeof counts);
        for (int64_t i = 0; i < n; i++) counts[sample[i] >> shift & 2047]++;
        uint32_t digit = 0;
        while (rank > counts[digit]) rank -= counts[digit++];
        found |= digit << shift;
        int64_t left = 0;
        for (int64_t i = 0; i < n; i++) {
            sample[left] = sample[i];
            left += (sample[i] >> shift & 2047) == digit;
        }
        n = left;
    }
    t->threshold = from_bits(found);
    return 0;
}

#define TILE_ROWS 4
#define TILE_COLUMNS 32
#define UNIT_ROWS 32 /* of `total`, which a thread works on as a whole, so that it stays in its first-level cache */
#define UNIT_COLUMNS 128

typedef struct {
    int64_t n;            /* BLOCK times the number of units */
    int64_t examples, tokens, rows, columns;
    const float *left;    /* (examples, tokens, rows) */
    const float *right;   /* (examples, tokens, columns) */
    float *total;         /* (rows, columns), to which the sum over examples of the squares of left^T right is added */
} product_tensor;

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
typedef float sixteen __attribute__((vector_size(64), aligned(4), may_alias));

/* One tile of one example: `tile` is total's, of which `columns` make a row. */
static inline __attribute__((always_inline)) void square_tile(
    const product_tensor *t, const float *left, const float *right, float *tile
) {
    sixteen sum[TILE_ROWS][2] = {0};
    for (int64_t k = 0; k < t->tokens; k++, left += t->rows, right += t->columns) {
        const sixteen low = *(const sixteen *)right, high = *(const sixteen *)(right + 16);
        for (int i = 0; i < TILE_ROWS; i++) {
            sum[i][0] += left[i] * low;
            sum[i][1] += left[i] * high;
        }
    }
    for (int i = 0; i < TILE_ROWS; i++, tile += t->columns) {
        *(sixteen *)tile += sum[i][0] * sum[i][0];
        *(sixteen *)(tile + 16) += sum[i][1] * sum[i][1];
    }
}

static void square_edge(const product_tensor *t, const float *left, const float *right, float *tile, int rows, int columns) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            float sum = 0;
            for (int64_t k = 0; k < t->tokens; k++) sum += left[k * t->rows + i] * right[k * t->columns + j];
            tile[i * t->columns + j] += sum * sum;
        }
}

CLONES static int64_t square_products(const product_tensor *t, int64_t unit) {
    const int64_t across = (t->columns + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
    const int64_t row = unit / across * UNIT_ROWS, column = unit % across * UNIT_COLUMNS;
    const int64_t last_row = row + UNIT_ROWS < t->rows ? row + UNIT_ROWS : t->rows;
    const int64_t last_column = column + UNIT_COLUMNS < t->columns ? column + UNIT_COLUMNS : t->columns;
    for (int64_t e = 0; e < t->examples; e++) {
        const float *left = t->left + e * t->tokens * t->rows, *right = t->right + e * t->tokens * t->columns;
        for (int64_t j = column; j < last_column; j += TILE_COLUMNS)
            for (int64_t i = row; i < last_row; i += TILE_ROWS) {
                float *tile = t->total + i * t->columns + j;
                const int64_t rows = last_row - i, columns = last_column - j;
                if (rows >= TILE_ROWS && columns >= TILE_COLUMNS) square_tile(t, left + i, right + j, tile);
                else square_edge(t, left + i, right + j, tile, rows < TILE_ROWS ? (int)rows : TILE_ROWS, columns < TILE_COLUMNS ? (int)columns : TILE_COLUMNS);
            }
    }
    return 0;
}
#pragma GCC pop_options

typedef struct {
    const char *tensors;  /* structs of `size` bytes that begin with their number of weights */
    size_t size;
    int64_t (*work)(const char *tensor, const void *hyper, int64_t begin, int64_t end);
    const void *hyper;
    int64_t count, begin, end, result;  /* blocks of all tensors, numbered through */
} job;

static int64_t blocks_of(const char *tensor) { return (*(const int64_t *)tensor + BLOCK - 1) / BLOCK; }

static void run(job *j) {
    int64_t first = 0;
    for (int64_t k = 0; k < j->count && first < j->end; k++) {
        const char *t = j->tensors + k * j->size;
        const int64_t blocks = blocks_of(t), n = *(const int64_t *)t;
        const int64_t from = j->begin > first ? j->begin - first : 0;
        const int64_t to = j->end - first < blocks ? j->end - first : blocks;
        if (from < to) j->result += j->work(t, j->hyper, from * BLOCK, to * BLOCK < n ? to * BLOCK : n);
        first += blocks;
    }
}

/* PyTorch's own pool of threads, where its OpenMP is GNU's: beside it, still awake after an operation, new threads would
 * share its cores. */
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));

typedef struct {
    job jobs[MAX_JOBS];
    int count, next;
} pool;

static void *work_off(void *argument) {
    pool *p = argument;
    for (int k; (k = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->count;) run(p->jobs + k);
    return NULL;
}

static void work_off_too(void *argument) { work_off(argument); }

/* `worth`: blocks that a thread has to get for starting it to be worth it */
static int64_t run_on_threads(job whole, int threads, int worth) {
    int64_t blocks = 0, result = 0;
    for (int64_t k = 0; k < whole.count; k++) blocks += blocks_of(whole.tensors + k * whole.size);
    if (threads > blocks / worth) threads = (int)(blocks / worth);
    if (threads > MAX_JOBS) threads = MAX_JOBS;
    if (threads < 1) threads = 1;
    /* more jobs than threads: those over weights without a gradient are done sooner */
    pool p = {.count = threads == 1 ? 1 : threads * 16 < MAX_JOBS ? threads * 16 : MAX_JOBS};
    for (int k = 0; k < p.count; k++) {
        p.jobs[k] = whole;
        p.jobs[k].begin = blocks * k / p.count;
        p.jobs[k].end = blocks * (k + 1) / p.count;
    }
    if (threads > 1 && GOMP_parallel) {
        GOMP_parallel(work_off_too, &p, (unsigned)threads, 0);
    } else {
        pthread_t ids[MAX_JOBS];
        int started = 0;
        while (started + 1 < threads && pthread_create(ids + started, NULL, work_off, &p) == 0) started++;
        work_off(&p);
        for (int k = 0; k < started; k++) pthread_join(ids[k], NULL);
    }
    for (int k = 0; k < p.count; k++) result += p.jobs[k].result;
    return result;
}

static int64_t update_work(const char *tensor, const void *hyper, int64_t begin, int64_t end) {
    return update((const classp_tensor *)tensor, (const classp_hyper *)hyper, begin, end);
}

static int64_t pull_work(const char *tensor, const void *hyper, int64_t begin, int64_t end) {
    return pull((const pull_tensor *)tensor, (const pull_hyper *)hyper, begin, end);
}

static int64_t quantile_work(const char *tensor, const void *hyper, int64_t begin, int64_t end) {
    (void)hyper, (void)begin, (void)end;
    return quantile((density_tensor *)tensor);
}

static int64_t product_work(const char *tensor, const void *hyper, int64_t begin, int64_t end) {
    (void)hyper;
    for (int64_t unit = begin / BLOCK; unit < end / BLOCK; unit++) square_products((const product_tensor *)tensor, unit);
    return 0;
}

int64_t classp_step(const classp_tensor *tensors, int64_t count, const classp_hyper *hyper, int threads) {
    return run_on_threads((job){(const char *)tensors, sizeof *tensors, update_work, hyper, count, 0, 0, 0}, threads, 128);
}

void classp_pull(const pull_tensor *tensors, int64_t count, const pull_hyper *hyper, int threads) {
    run_on_threads((job){(const char *)tensors, sizeof *tensors, pull_work, hyper, count, 0, 0, 0}, threads, 128);
}

void classp_thresholds(density_tensor *tensors, int64_t count, int threads) {
    run_on_threads((job){(const char *)tensors, sizeof *tensors, quantile_work, NULL, count, 0, 0, 0}, threads, 8);
}

void classp_square_products(product_tensor *t, int threads) {
    t->n = BLOCK * ((t->rows + UNIT_ROWS - 1) / UNIT_ROWS) * ((t->columns + UNIT_COLUMNS - 1) / UNIT_COLUMNS);
    run_on_threads((job){(const char *)t, sizeof *t, product_work, NULL, 1, 0, 0, 0}, threads, 4);
}
