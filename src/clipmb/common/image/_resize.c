/* Resamples 8-bit pictures with exactly Pillow's bits, but computes only the window that a crop keeps.

   A pass makes each output value from neighbouring input values, by weights in fixed point with 22 fractional bits,
   and rounds to 8 bits; one pass is horizontal, the other vertical. Both exist in plain C and in a wide form: for AVX2,
   where a weight is split into its low 12 bits and the rest, so that 16-bit multiplications give the exact 32-bit sum,
   and for NEON, which multiplies 32 bits as fast.

   Source: the arithmetic is that of Pillow's src/libImaging/Resample.c, the filters are named as there. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_AVX2
#define HAVE_WIDE
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(__ARM_BIG_ENDIAN)
#define HAVE_WIDE
#include <arm_neon.h>
#endif

#define BITS 22
#define HALF (1u << (BITS - 1))
#define MOST_PIXELS (1 << 24) /* of a side: every whole number up to it is a float, and no int overflows */
#define PI 3.14159265358979323846

enum { NEAREST, LANCZOS, BILINEAR, BICUBIC, BOX, HAMMING, FILTERS };
static const double SUPPORT[FILTERS] = {0.0, 3.0, 1.0, 2.0, 0.5, 1.0};

/* The outputs [first, first + count) of one axis: output i is made from inputs [start[i], start[i] + taps[i]). */
typedef struct {
    int count, room; /* room: weights for each output, at least its taps */
    int *start, *taps;
    int32_t *weights;
} Axis;

/* The same weights for the wide passes, in groups of four taps. */
typedef struct {
    int room; /* groups for each output */
    int *start, *groups;
    int16_t *weights; /* of each group eight halves: with AVX2 four low and four high ones, with NEON four whole weights */
} Groups;

typedef struct {
    const uint8_t *source; /* rows of width * pixel bytes */
    int width, height, pixel, channels;
    int target_width, target_height, filter;
    float box[4];                        /* left, top, right, bottom of the part of the source that is resized */
    int left, top, out_width, out_height; /* the window of the target that is computed */
    int vertical_first, wide;            /* wide: AVX2 or NEON may be used */
    const float *table;                  /* [channels][256], or NULL for 8-bit output */
    int planar;                          /* with a table: [channels][height][width], else [height][width][channels] */
    void *out;
} Job;

static void *array(size_t count, size_t size) { return calloc(count ? count : 1, size); /* which checks the product */ }

/* ---- weights ---------------------------------------------------------------------------------------------------- */

static double sinc(double x) { return x == 0.0 ? 1.0 : sin(x * PI) / (x * PI); }

static double weight(int filter, double x) {
    double size = fabs(x);
    switch (filter) {
        case BOX: return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
        case BILINEAR: return size < 1.0 ? 1.0 - size : 0.0;
        case HAMMING: /* the sum of the two floats is not 1 */
            if (size == 0.0) return 1.0;
            return size < 1.0 ? sinc(size) * (0.54f + 0.46f * cos(size * PI)) : 0.0;
        case LANCZOS: return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
        default: /* bicubic with a = -0.5 */
            if (size < 1.0) return (1.5 * size - 2.5) * size * size + 1;
            return size < 2.0 ? (((size - 5) * size + 8) * size - 4) * -0.5 : 0.0;
    }
}

static void axis_free(Axis *axis) {
    free(axis->start);
    free(axis->taps);
    free(axis->weights);
}

/* Returns 0 when memory is short. */
static int axis_make(Axis *axis, int filter, int size, float from, float to, int target, int first, int count) {
    double scale = (double)(to - from) / target, stretch = scale < 1.0 ? 1.0 : scale;
    double support = SUPPORT[filter] * stretch, inverse = 1.0 / stretch;
    int room = (int)ceil(support) * 2 + 1;
    double *exact = array(room, sizeof(double));
    axis->count = count;
    axis->room = room;
    axis->start = array(count, sizeof(int));
    axis->taps = array(count, sizeof(int));
    axis->weights = (size_t)room > SIZE_MAX / sizeof(int32_t) ? NULL : array(count, room * sizeof(int32_t));
    if (!exact || !axis->start || !axis->taps || !axis->weights) {
        free(exact);
        return 0;
    }
    for (int i = 0; i < count; i++) {
        double center = from + (first + i + 0.5) * scale, sum = 0.0;
        int start = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
        if (start < 0) start = 0;
        if (end > size) end = size;
        int taps = end - start;
        for (int j = 0; j < taps; j++) {
            exact[j] = weight(filter, (j + start - center + 0.5) * inverse);
            sum += exact[j];
        }
        int32_t *fixed = axis->weights + (size_t)i * room;
        int leading = 0, kept = 0; /* zeros at both ends are left out: where nothing changes, one tap remains */
        for (int j = 0; j < taps; j++) {
            double share = sum != 0.0 ? exact[j] / sum : exact[j];
            int32_t value = (int32_t)((share < 0 ? -0.5 : 0.5) + share * (1 << BITS));
            if (!kept && !value && j + 1 < taps) {
                leading++;
                continue;
            }
            fixed[j - leading] = value;
            if (value || !kept) kept = j - leading + 1;
        }
        axis->start[i] = start + leading;
        axis->taps[i] = kept;
    }
    free(exact);
    return 1;
}

/* ---- passes ----------------------------------------------------------------------------------------------------- */

static inline uint8_t rounded(uint32_t sum) {
    int32_t value = (int32_t)sum >> BITS;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

/* One row of the horizontal pass; the first input pixel of `row` has the number `offset`. */
static void horizontal(const Axis *axis, const uint8_t *row, int offset, int pixel, int channels, uint8_t *out) {
    for (int x = 0; x < axis->count; x++) {
        const int32_t *weights = axis->weights + (size_t)x * axis->room;
        const uint8_t *in = row + (size_t)(axis->start[x] - offset) * pixel;
        for (int channel = 0; channel < channels; channel++) {
            uint32_t sum = HALF;
            for (int j = 0; j < axis->taps[x]; j++) sum += (uint32_t)in[(size_t)j * pixel + channel] * weights[j];
            *out++ = rounded(sum);
        }
    }
}

/* Bytes [from, size) of one row of the vertical pass, from rows that are `stride` bytes apart. */
static void vertical(
    const int32_t *weights, int taps, const uint8_t *rows, size_t stride, size_t from, size_t size, uint8_t *out
) {
    enum { PART = 256 };
    uint32_t sums[PART];
    for (; from < size; from += PART) {
        size_t count = size - from < PART ? size - from : PART;
        for (size_t i = 0; i < count; i++) sums[i] = HALF;
        for (int j = 0; j < taps; j++) {
            const uint8_t *row = rows + j * stride + from;
            uint32_t factor = (uint32_t)weights[j];
            for (size_t i = 0; i < count; i++) sums[i] += row[i] * factor;
        }
        for (size_t i = 0; i < count; i++) out[from + i] = rounded(sums[i]);
    }
}

#ifdef HAVE_WIDE

static void groups_free(Groups *groups) {
    free(groups->start);
    free(groups->groups);
    free(groups->weights);
}

/* Groups the weights so that no group reaches beyond `width` input pixels from `offset`; width >= 4 * room. */
static int groups_make(Groups *groups, const Axis *axis, int offset, int width) {
    int room = (axis->room + 3) / 4;
    groups->room = room;
    groups->start = array(axis->count, sizeof(int));
    groups->groups = array(axis->count, sizeof(int));
    groups->weights = array(axis->count, (size_t)room * 8 * sizeof(int16_t));
    if (!groups->start || !groups->groups || !groups->weights) return 0;
    for (int x = 0; x < axis->count; x++) {
        int start = axis->start[x] - offset, taps = axis->taps[x], count = (taps + 3) / 4;
        int shift = start + 4 * count > width ? start + 4 * count - width : 0;
        int16_t *out = groups->weights + (size_t)x * room * 8;
        for (int j = 0; j < taps; j++) {
            int32_t value = axis->weights[(size_t)x * axis->room + j];
#ifdef HAVE_AVX2
            int place = (j + shift) / 4 * 8 + (j + shift) % 4;
            out[place] = value & 0xFFF;
            out[place + 4] = value >> 12;
#else
            memcpy(out + (j + shift) * 2, &value, sizeof value);
#endif
        }
        groups->start[x] = start - shift;
        groups->groups[x] = count;
    }
    return 1;
}

#endif

#ifdef HAVE_AVX2

/* Adds the products of four pixels in channels of a row to the sums of low and high halves. */
#define ADD(row, low, high)                                                                        \
    do {                                                                                           \
        __m128i bytes = _mm_loadu_si128((const __m128i *)((row) + place));                         \
        __m256i values = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), spread);          \
        low = _mm256_add_epi32(low, _mm256_madd_epi16(values, lows));                              \
        high = _mm256_add_epi32(high, _mm256_madd_epi16(values, highs));                           \
    } while (0)

/* Four rows of the horizontal pass, of 3 or 4 bytes a pixel; may read 4 bytes beyond each row. Writes 4 bytes a pixel. */
__attribute__((target("avx2"))) static void horizontal_wide(
    const Groups *groups, int count, const uint8_t *const rows[4], int pixel, uint8_t *const outs[4]
) {
    /* in the first half pixels 0 and 1, in the second half 2 and 3: values of one channel side by side, 16 bits each */
    const __m256i spread =
        pixel == 3 ? _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, 6, -1, 9, -1, 7, -1, 10,
                                      -1, 8, -1, 11, -1, -1, -1, -1, -1)
                   : _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1, 8, -1, 12, -1, 9, -1, 13,
                                      -1, 10, -1, 14, -1, 11, -1, 15, -1);
    const __m256i pick_low = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m256i pick_high = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    for (int x = 0; x < count; x++) {
        const int16_t *weights = groups->weights + (size_t)x * groups->room * 8;
        size_t place = (size_t)groups->start[x] * pixel;
        __m256i zero = _mm256_setzero_si256();
        __m256i low[4] = {zero, zero, zero, zero}, high[4] = {zero, zero, zero, zero};
        for (int group = 0; group < groups->groups[x]; group++, weights += 8, place += 4 * (size_t)pixel) {
            __m256i pair = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)weights));
            __m256i lows = _mm256_permutevar8x32_epi32(pair, pick_low);
            __m256i highs = _mm256_permutevar8x32_epi32(pair, pick_high);
            ADD(rows[0], low[0], high[0]);
            ADD(rows[1], low[1], high[1]);
            ADD(rows[2], low[2], high[2]);
            ADD(rows[3], low[3], high[3]);
        }
        for (int i = 0; i < 4; i++) {
            __m256i both = _mm256_add_epi32(low[i], _mm256_slli_epi32(high[i], 12));
            __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
            sum = _mm_srai_epi32(_mm_add_epi32(sum, _mm_set1_epi32(HALF)), BITS);
            sum = _mm_packs_epi32(sum, sum);
            int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(sum, sum));
            memcpy(outs[i] + (size_t)x * 4, &bytes, 4);
        }
    }
}

/* As `vertical`, for the largest multiple of 16 bytes in `size`, which is returned. */
__attribute__((target("avx2"))) static size_t vertical_wide(
    const int32_t *weights, int taps, const uint8_t *rows, size_t stride, size_t size, uint8_t *out
) {
    size_t at = 0;
    for (; at + 16 <= size; at += 16) {
        __m256i low[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, high[2] = {low[0], low[0]};
        const uint8_t *row = rows + at;
        for (int j = 0; j < taps; j += 2, row += 2 * stride) {
            int two = j + 1 < taps;
            int32_t first = weights[j], second = two ? weights[j + 1] : 0;
            __m128i upper = _mm_loadu_si128((const __m128i *)row);
            __m128i lower = two ? _mm_loadu_si128((const __m128i *)(row + stride)) : _mm_setzero_si128();
            __m256i values[2] = {
                _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(upper, lower)),
                _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(upper, lower)),
            };
            __m256i lows = _mm256_set1_epi32((first & 0xFFF) | (second & 0xFFF) << 16);
            __m256i highs = _mm256_set1_epi32((int32_t)((uint32_t)(first >> 12 & 0xFFFF) | (uint32_t)(second >> 12) << 16));
            for (int i = 0; i < 2; i++) {
                low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(values[i], lows));
                high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(values[i], highs));
            }
        }
        __m256i sums[2];
        for (int i = 0; i < 2; i++) {
            __m256i sum = _mm256_add_epi32(low[i], _mm256_slli_epi32(high[i], 12));
            sums[i] = _mm256_srai_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(HALF)), BITS);
        }
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(sums[0], sums[1]), 0xD8);
        __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(out + at), bytes);
    }
    return at;
}

#elif defined(HAVE_WIDE)

/* Four sums, shifted and clamped to 16 bits. */
static inline int16x4_t rounded_wide(uint32x4_t sum) { return vqmovn_s32(vshrq_n_s32(vreinterpretq_s32_u32(sum), BITS)); }

/* Four rows of the horizontal pass, of 3 or 4 bytes a pixel; may read 4 bytes beyond each row. Writes 4 bytes a pixel. */
static void horizontal_wide(
    const Groups *groups, int count, const uint8_t *const rows[4], int pixel, uint8_t *const outs[4]
) {
    /* for each of four pixels, which byte goes to which: its channels, widened to 32 bits; 255 gives a zero */
    uint8x16_t spread[4];
    for (int i = 0; i < 4; i++) {
        uint8_t places[16];
        memset(places, 255, sizeof places);
        for (int channel = 0; channel < pixel; channel++) places[channel * 4] = (uint8_t)(i * pixel + channel);
        spread[i] = vld1q_u8(places);
    }
    for (int x = 0; x < count; x++) {
        const int16_t *weights = groups->weights + (size_t)x * groups->room * 8;
        size_t place = (size_t)groups->start[x] * pixel;
        uint32x4_t half = vdupq_n_u32(HALF), sums[4] = {half, half, half, half};
        for (int group = 0; group < groups->groups[x]; group++, weights += 8, place += 4 * (size_t)pixel) {
            uint32x4_t four = vreinterpretq_u32_s16(vld1q_s16(weights));
            for (int i = 0; i < 4; i++) {
                uint8x16_t bytes = vld1q_u8(rows[i] + place);
                sums[i] = vmlaq_laneq_u32(sums[i], vreinterpretq_u32_u8(vqtbl1q_u8(bytes, spread[0])), four, 0);
                sums[i] = vmlaq_laneq_u32(sums[i], vreinterpretq_u32_u8(vqtbl1q_u8(bytes, spread[1])), four, 1);
                sums[i] = vmlaq_laneq_u32(sums[i], vreinterpretq_u32_u8(vqtbl1q_u8(bytes, spread[2])), four, 2);
                sums[i] = vmlaq_laneq_u32(sums[i], vreinterpretq_u32_u8(vqtbl1q_u8(bytes, spread[3])), four, 3);
            }
        }
        for (int i = 0; i < 4; i++) {
            int16x4_t words = rounded_wide(sums[i]);
            uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vqmovun_s16(vcombine_s16(words, words))), 0);
            memcpy(outs[i] + (size_t)x * 4, &bytes, 4);
        }
    }
}

/* As `vertical`, for the largest multiple of 16 bytes in `size`, which is returned. */
static size_t vertical_wide(
    const int32_t *weights, int taps, const uint8_t *rows, size_t stride, size_t size, uint8_t *out
) {
    size_t at = 0;
    for (; at + 16 <= size; at += 16) {
        uint32x4_t half = vdupq_n_u32(HALF), sums[4] = {half, half, half, half};
        const uint8_t *row = rows + at;
        for (int j = 0; j < taps; j++, row += stride) {
            uint32_t factor = (uint32_t)weights[j];
            uint8x16_t bytes = vld1q_u8(row);
            uint16x8_t lower = vmovl_u8(vget_low_u8(bytes)), upper = vmovl_high_u8(bytes);
            sums[0] = vmlaq_n_u32(sums[0], vmovl_u16(vget_low_u16(lower)), factor);
            sums[1] = vmlaq_n_u32(sums[1], vmovl_high_u16(lower), factor);
            sums[2] = vmlaq_n_u32(sums[2], vmovl_u16(vget_low_u16(upper)), factor);
            sums[3] = vmlaq_n_u32(sums[3], vmovl_high_u16(upper), factor);
        }
        int16x8_t first = vcombine_s16(rounded_wide(sums[0]), rounded_wide(sums[1]));
        int16x8_t second = vcombine_s16(rounded_wide(sums[2]), rounded_wide(sums[3]));
        vst1q_u8(out + at, vcombine_u8(vqmovun_s16(first), vqmovun_s16(second)));
    }
    return at;
}

#endif

/* One row of the vertical pass, in its wide form as far as that goes. */
static void vertical_row(
    const Axis *axis, int y, int wide, const uint8_t *rows, size_t stride, size_t size, uint8_t *out
) {
    const int32_t *weights = axis->weights + (size_t)y * axis->room;
    size_t ready = 0;
#ifdef HAVE_WIDE
    if (wide) ready = vertical_wide(weights, axis->taps[y], rows, stride, size, out);
#else
    (void)wide;
#endif
    vertical(weights, axis->taps[y], rows, stride, ready, size, out);
}

/* ---- the picture ------------------------------------------------------------------------------------------------ */

static void premultiply(uint8_t *pixels, size_t count, int channels) {
    for (; count--; pixels += channels) {
        for (int i = 0; i < channels - 1; i++) {
            unsigned product = pixels[i] * pixels[channels - 1] + 128u;
            pixels[i] = ((product >> 8) + product) >> 8;
        }
    }
}

static void unpremultiply(uint8_t *pixels, size_t count, int channels) {
    for (; count--; pixels += channels) {
        unsigned alpha = pixels[channels - 1];
        for (int i = 0; i < channels - 1 && alpha && alpha < 255; i++) {
            unsigned value = 255u * pixels[i] / alpha;
            pixels[i] = value > 255 ? 255 : value;
        }
    }
}

/* Writes row y of the window from a line with `step` bytes a pixel. */
static void emit(const Job *job, int y, const uint8_t *line, int step) {
    size_t width = job->out_width, channels = job->channels;
    if (!job->table) {
        uint8_t *out = (uint8_t *)job->out + y * width * channels;
        for (size_t x = 0; x < width; x++) {
            for (size_t channel = 0; channel < channels; channel++) *out++ = line[x * step + channel];
        }
    } else if (job->planar) {
        for (size_t channel = 0; channel < channels; channel++) {
            float *out = (float *)job->out + (channel * job->out_height + y) * width;
            const float *table = job->table + channel * 256;
            for (size_t x = 0; x < width; x++) out[x] = table[line[x * step + channel]];
        }
    } else {
        float *out = (float *)job->out + y * width * channels;
        for (size_t x = 0; x < width; x++) {
            for (size_t channel = 0; channel < channels; channel++) *out++ = job->table[channel * 256 + line[x * step + channel]];
        }
    }
}

/* Takes the pixels as they are, where no size changes. */
static void copied(const Job *job) {
    for (int y = 0; y < job->out_height; y++) {
        size_t first = (size_t)(job->top + y) * job->width + job->left;
        emit(job, y, job->source + first * job->pixel, job->pixel);
    }
}

/* Takes the pixel at each place, without weights; Pillow adds the steps up. */
static int nearest(const Job *job) {
    double step_x = (double)(job->box[2] - job->box[0]) / job->target_width, at_x = job->box[0] + step_x * 0.5;
    double step_y = (double)(job->box[3] - job->box[1]) / job->target_height, at_y = job->box[1] + step_y * 0.5;
    int *columns = array(job->out_width, sizeof(int));
    uint8_t *line = array(job->out_width, job->channels);
    int enough = columns && line;
    if (enough) {
        for (int x = 0; x < job->left + job->out_width; x++, at_x += step_x) {
            int column = at_x < job->width ? (int)at_x : job->width - 1;
            if (x >= job->left) columns[x - job->left] = column;
        }
        for (int y = 0; y < job->top + job->out_height; y++, at_y += step_y) {
            if (y < job->top) continue;
            int row = at_y < job->height ? (int)at_y : job->height - 1;
            const uint8_t *in = job->source + (size_t)row * job->width * job->pixel;
            for (int x = 0; x < job->out_width; x++) {
                memcpy(line + (size_t)x * job->channels, in + (size_t)columns[x] * job->pixel, job->channels);
            }
            emit(job, y - job->top, line, job->channels);
        }
    }
    free(columns);
    free(line);
    return enough;
}

/* The inputs [first, last) that an axis reads. */
static void ends(const Axis *axis, int *first, int *last) {
    *first = axis->start[0];
    *last = 0;
    for (int i = 0; i < axis->count; i++) {
        if (axis->start[i] < *first) *first = axis->start[i];
        if (axis->start[i] + axis->taps[i] > *last) *last = axis->start[i] + axis->taps[i];
    }
}

/* Returns 0 when memory is short. */
static int resample(Job *job) {
    Axis across = {0}, down = {0};
    int pixel = job->pixel, step = job->channels, enough = 0;
    int opacity = job->channels % 2 == 0; /* the last channel is, and weighs the others */
    int x0, x1, y0, y1; /* the part of the source that is read */
    uint8_t *copy = NULL, *middle = NULL, *line = NULL, *last_row = NULL;
#ifdef HAVE_WIDE
    Groups groups = {0};
#endif
    if (!axis_make(&across, job->filter, job->width, job->box[0], job->box[2], job->target_width, job->left,
                   job->out_width)
        || !axis_make(&down, job->filter, job->height, job->box[1], job->box[3], job->target_height, job->top,
                      job->out_height))
        goto done;
    ends(&across, &x0, &x1);
    ends(&down, &y0, &y1);
    size_t stride = (size_t)job->width * pixel;
    const uint8_t *source = job->source + y0 * stride;
    int rows = y1 - y0;
    if (opacity) {
        if (!(copy = array(rows, stride))) goto done;
        memcpy(copy, source, rows * stride);
        premultiply(copy, (size_t)rows * job->width, job->channels);
        source = copy;
    }
#ifdef HAVE_WIDE
    int wide = job->wide && pixel >= 3 && (across.room + 3) / 4 * 4 <= x1 - x0;
    int offset = job->vertical_first ? x0 : 0, available = job->vertical_first ? x1 - x0 : job->width;
    if (wide) {
        step = 4;
        if (!groups_make(&groups, &across, offset, available)) goto done;
    }
#endif
    size_t row_size = (size_t)job->out_width * step; /* of a row that is as wide as the window */
    if (!(line = array(job->out_width, step))) goto done;

    if (job->vertical_first) {
        size_t size = (size_t)(x1 - x0) * pixel;
        if (size > SIZE_MAX / 8 || !(middle = array(4, size + 16))) goto done;
        uint8_t *results = array(4, row_size);
        if (!results) goto done;
        for (int y = 0; y < job->out_height; y += 4) {
            int count = job->out_height - y < 4 ? job->out_height - y : 4;
            const uint8_t *inputs[4];
            uint8_t *outputs[4];
            for (int i = 0; i < 4; i++) {
                int which = i < count ? i : 0; /* the first row again, which gives the same */
                inputs[i] = middle + which * (size + 16);
                outputs[i] = results + which * row_size;
            }
            for (int i = 0; i < count; i++) {
                const uint8_t *in = source + (down.start[y + i] - y0) * stride + (size_t)x0 * pixel;
                vertical_row(&down, y + i, job->wide, in, stride, size, middle + i * (size + 16));
            }
#ifdef HAVE_WIDE
            if (wide) horizontal_wide(&groups, across.count, inputs, pixel, outputs);
            else
#endif
                for (int i = 0; i < count; i++) horizontal(&across, inputs[i], x0, pixel, job->channels, outputs[i]);
            for (int i = 0; i < count; i++) {
                if (opacity) unpremultiply(outputs[i], job->out_width, job->channels);
                emit(job, y + i, outputs[i], step);
            }
        }
        free(results);
    } else {
        if (!(middle = array(rows, row_size))) goto done;
#ifdef HAVE_WIDE
        if (wide) { /* a load may reach beyond its row: behind the last one there is room in a copy only */
            if (!(last_row = array(1, stride + 16))) goto done;
            memcpy(last_row, source + (rows - 1) * stride, stride);
            for (int y = 0; y < rows; y += 4) {
                const uint8_t *inputs[4];
                uint8_t *outputs[4];
                for (int i = 0; i < 4; i++) {
                    int which = y + i < rows ? y + i : y;
                    inputs[i] = which == rows - 1 ? last_row : source + which * stride;
                    outputs[i] = middle + which * row_size;
                }
                horizontal_wide(&groups, across.count, inputs, pixel, outputs);
            }
        } else
#endif
            for (int y = 0; y < rows; y++)
                horizontal(&across, source + y * stride, 0, pixel, job->channels, middle + y * row_size);
        for (int y = 0; y < job->out_height; y++) {
            vertical_row(&down, y, job->wide, middle + (down.start[y] - y0) * row_size, row_size, row_size, line);
            if (opacity) unpremultiply(line, job->out_width, job->channels);
            emit(job, y, line, step);
        }
    }
    enough = 1;
done:
#ifdef HAVE_WIDE
    groups_free(&groups);
#endif
    axis_free(&across);
    axis_free(&down);
    free(copy);
    free(middle);
    free(line);
    free(last_row);
    return enough;
}

/* ---- Python ----------------------------------------------------------------------------------------------------- */

/* Arrow's C data interface, in which Pillow lends its pixels. Source: arrow.apache.org/docs/format/CDataInterface.html */
typedef struct ArrowSchema {
    const char *format, *name, *metadata;
    int64_t flags, n_children;
    struct ArrowSchema **children, *dictionary;
    void (*release)(struct ArrowSchema *);
    void *private_data;
} ArrowSchema;

typedef struct ArrowArray {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void **buffers;
    struct ArrowArray **children, *dictionary;
    void (*release)(struct ArrowArray *);
    void *private_data;
} ArrowArray;

/* Returns the pixels of a pair of capsules, or NULL with an exception; `size` is their number of bytes. */
static const uint8_t *arrow_pixels(PyObject *pair, int pixel, Py_ssize_t size) {
    ArrowSchema *schema = PyCapsule_GetPointer(PyTuple_GetItem(pair, 0), "arrow_schema");
    if (!schema) return NULL;
    ArrowArray *pixels = PyCapsule_GetPointer(PyTuple_GetItem(pair, 1), "arrow_array");
    if (!pixels) return NULL;
    if (schema->release && pixels->release && schema->n_children == 1 && pixels->n_children == 1 && pixel == 4
        && strcmp(schema->format, "+w:4") == 0 && pixels->offset == 0 && pixels->length == size / 4) {
        schema = schema->children[0];
        pixels = pixels->children[0];
    } else if (pixel != 1) {
        schema = NULL;
    }
    if (!schema || !schema->release || !pixels->release || strcmp(schema->format, "C") != 0 || pixels->offset != 0
        || pixels->length != size || pixels->n_buffers != 2 || !pixels->buffers[1]) {
        PyErr_SetString(PyExc_ValueError, "source must hold one byte for each channel of each pixel");
        return NULL;
    }
    return pixels->buffers[1];
}

/* Checks the numbers of a job; returns the reason when they make no sense. */
static const char *wrong(const Job *job) {
    const int sides[] = {job->width, job->height, job->target_width, job->target_height};
    for (int i = 0; i < 4; i++) {
        if (sides[i] < 1 || sides[i] > MOST_PIXELS) return "sizes must be from 1 to 2**24";
    }
    if (job->pixel != job->channels && !(job->pixel == 4 && job->channels == 3)) return "pixel must fit channels";
    if (job->channels < 1 || job->channels > 4) return "channels must be from 1 to 4";
    if (job->filter < 0 || job->filter >= FILTERS) return "filter must be from 0 to 5";
    const float *box = job->box;
    if (!(box[0] >= 0 && box[0] < box[2] && box[2] <= job->width && box[1] >= 0 && box[1] < box[3]
          && box[3] <= job->height))
        return "box must lie inside the picture";
    if (job->left < 0 || job->top < 0 || job->out_width < 1 || job->out_height < 1
        || job->left > job->target_width - job->out_width || job->top > job->target_height - job->out_height)
        return "window must lie inside the target";
    return NULL;
}

static PyObject *resize(PyObject *self, PyObject *arguments) {
    Job job = {0};
    PyObject *source, *table_source, *out_object;
    Py_buffer input = {0}, table = {0}, out = {0};
    (void)self;
    if (!PyArg_ParseTuple(
            arguments, "O(ii)ii(ii)i(ffff)(iiii)pOOpp:resize", &source, &job.width, &job.height, &job.pixel,
            &job.channels, &job.target_width, &job.target_height, &job.filter, &job.box[0], &job.box[1], &job.box[2],
            &job.box[3], &job.left, &job.top, &job.out_width, &job.out_height, &job.vertical_first, &out_object,
            &table_source, &job.planar, &job.wide))
        return NULL;
    const char *reason = wrong(&job);
    size_t size = 0, written = 0;
    if (!reason) {
        /* below 2**50 and 2**54, since no side is above 2**24 */
        uint64_t read = (uint64_t)job.width * job.height * job.pixel;
        uint64_t made = (uint64_t)job.out_width * job.out_height * job.channels * (table_source == Py_None ? 1 : 4);
        if (read > PY_SSIZE_T_MAX || made > PY_SSIZE_T_MAX) reason = "the picture must fit into memory";
        size = (size_t)read;
        written = (size_t)made;
    }
    if (reason) {
        PyErr_SetString(PyExc_ValueError, reason);
        return NULL;
    }
    PyObject *result = NULL;
    if (PyTuple_Check(source) && PyTuple_Size(source) == 2) {
        if (!(job.source = arrow_pixels(source, job.pixel, (Py_ssize_t)size))) goto done;
    } else {
        if (PyObject_GetBuffer(source, &input, PyBUF_SIMPLE) < 0) goto done;
        if ((size_t)input.len != size) {
            PyErr_SetString(PyExc_ValueError, "source must hold the pixels of the picture");
            goto done;
        }
        job.source = input.buf;
    }
    if (table_source != Py_None) {
        if (PyObject_GetBuffer(table_source, &table, PyBUF_SIMPLE) < 0) goto done;
        if ((size_t)table.len != (size_t)job.channels * 256 * sizeof(float) || (uintptr_t)table.buf % sizeof(float)) {
            PyErr_SetString(PyExc_ValueError, "table must hold 256 floats for each channel");
            goto done;
        }
        job.table = table.buf;
    }
    if (PyObject_GetBuffer(out_object, &out, PyBUF_WRITABLE) < 0) goto done;
    if ((size_t)out.len != written || (job.table && (uintptr_t)out.buf % sizeof(float))) {
        PyErr_SetString(PyExc_ValueError, "out must hold the window");
        goto done;
    }
    job.out = out.buf;
    int changed = job.width != job.target_width || job.height != job.target_height || job.box[0] > 0 || job.box[1] > 0
                  || job.box[2] < job.width || job.box[3] < job.height;
#ifdef HAVE_AVX2
    job.wide = job.wide && __builtin_cpu_supports("avx2");
#endif
    int enough = 1;
    Py_BEGIN_ALLOW_THREADS
    if (changed) {
        enough = job.filter == NEAREST ? nearest(&job) : resample(&job);
    } else {
        copied(&job);
    }
    Py_END_ALLOW_THREADS
    if (enough) {
        result = Py_None;
        Py_INCREF(result);
    } else {
        PyErr_NoMemory();
    }
done:
    if (input.obj) PyBuffer_Release(&input);
    if (table.obj) PyBuffer_Release(&table);
    if (out.obj) PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {
    {"resize", resize, METH_VARARGS,
     "resize(source, (width, height), pixel, channels, (target_width, target_height), filter, (left, top, right, "
     "bottom), (window_left, window_top, window_width, window_height), vertical_first, out, table, planar, wide)\n\n"
     "Resizes the box of a picture and writes a window of the result.\n\n"
     "source is a buffer of height rows of width pixels of so many bytes, or a pair of capsules of Arrow. out is a\n"
     "writable buffer of 8-bit values, or, with a table of 256 float32 values for each channel, of float32 values.\n"
     "With 2 or 4 channels the last one is the opacity. wide allows AVX2 or NEON, where the processor has it."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_resize", "Pillow's resampling of 8-bit pictures.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__resize(void) { return PyModuleDef_Init(&module); }
