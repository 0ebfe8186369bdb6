/* Trellis-coded quantization and an entropy coder (rANS) for hidden states, both too sequential for NumPy. The coder
   also takes plain integers (trellis = 0): a table then serves one quantizer, and values are the integers.

   Every function takes arrays through the buffer protocol and checks their sizes; nothing is allocated by what a
   payload claims. isthmus.quant.trellis tells what the functions are for, and their sources. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__GNUC__)
#error "needs the vectors of GCC or Clang"
#endif
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#define WIDE __builtin_cpu_supports("avx512f") /* registers of 64 bytes */
#else
#define VECTORIZED
#define WIDE 0
#endif

typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightBits __attribute__((vector_size(32)));
typedef float Sixteen __attribute__((vector_size(64)));
typedef int32_t SixteenBits __attribute__((vector_size(64)));
typedef int16_t EightShort __attribute__((vector_size(16)));
typedef int16_t SixteenShort __attribute__((vector_size(32)));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(vector, ...) __builtin_shufflevector(vector, vector, __VA_ARGS__)
#else
#define PICK(vector, ...) __builtin_shuffle(vector, (EightBits){__VA_ARGS__})
#endif

#define STATES 8
#define LIMIT 15 /* largest magnitude with a symbol of its own */
#define ESCAPE (2 * LIMIT + 1)
#define SYMBOLS (2 * LIMIT + 2)
#define PRECISION 14 /* frequencies of a table sum to 2 ** PRECISION */
#define LOW (1u << 23) /* the coder's state stays at or above it, once it was */
#define MAX_ESCAPE_BITS 20
#define GAINS 16 /* of rows; a gain adds to the contexts */
#define FINENESSES 8 /* of rows: how fine their steps are */
#define ORIGIN 14 /* context and gain of numbers that deviate by one step */
#define AHEAD 16 /* rows of a matrix that are asked for before their turn */
#define ROWS_AT_ONCE 8 /* of a product: at d_model 576 they and four rows of the matrix fit the first cache */

/* Ungerboeck's 8-state trellis over the subsets D0..D3 of the integers. States of even rank hold the union
   D0 + D2 (even multiples of the step), the others zero and the odd ones; the index's parity picks the branch. */
static const uint8_t NEXT[STATES][2] = {{0, 1}, {3, 2}, {5, 4}, {6, 7}, {1, 0}, {2, 3}, {4, 5}, {7, 6}};
static const uint8_t QUANTIZER[STATES] = {0, 1, 0, 1, 0, 1, 0, 1};

typedef struct {
    const uint8_t *contexts; /* [width], a table's number for each component */
    const uint16_t *cumulative; /* [tables, quantizers, SYMBOLS + 1] */
    Py_ssize_t width, tables;
    int quantizers; /* 2 along the trellis, 1 without: then an index is a plain integer */
    const uint8_t *gains; /* [rows], or NULL without the trellis */
    int gain; /* of the row in hand */
} Model;

static int read_model(Model *model, const Py_buffer *contexts, const Py_buffer *cumulative, int quantizers) {
    const Py_ssize_t table = quantizers * (SYMBOLS + 1) * (Py_ssize_t)sizeof(uint16_t);
    model->contexts = contexts->buf;
    model->cumulative = cumulative->buf;
    model->width = contexts->len;
    model->tables = cumulative->len / table;
    model->quantizers = quantizers;
    model->gains = NULL;
    model->gain = 0;
    if (cumulative->len % table || !model->width) {
        PyErr_SetString(PyExc_ValueError, "malformed tables");
        return -1;
    }
    for (Py_ssize_t i = 0; i < model->width; i++)
        if (model->contexts[i] >= model->tables) {
            PyErr_SetString(PyExc_ValueError, "a context without a table");
            return -1;
        }
    for (Py_ssize_t t = 0; t < quantizers * model->tables; t++) {
        const uint16_t *row = model->cumulative + t * (SYMBOLS + 1);
        int valid = row[0] == 0 && row[SYMBOLS] == 1 << PRECISION;
        for (int s = 0; s < SYMBOLS; s++)
            valid &= row[s] < row[s + 1];
        if (!valid) {
            PyErr_SetString(PyExc_ValueError, "a table's frequencies must be positive and sum to 2 ** 14");
            return -1;
        }
    }
    return 0;
}

static int largest(const uint8_t *numbers, Py_ssize_t count) {
    int result = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        result = numbers[i] > result ? numbers[i] : result;
    return result;
}

/* Have rows use the tables of their gains; with none, that is without the trellis, those of their contexts. */
static int read_gains(Model *model, const Py_buffer *gains, Py_ssize_t rows) {
    if (gains->len != (model->quantizers == 2 ? rows : 0) ||
        largest(model->contexts, model->width) + largest(gains->buf, gains->len) >= model->tables) {
        PyErr_SetString(PyExc_ValueError, "gains that do not fit the rows, or without tables");
        return -1;
    }
    model->gains = model->quantizers == 2 ? gains->buf : NULL;
    return 0;
}

static Model of_row(const Model *model, Py_ssize_t row) {
    Model result = *model;
    result.gain = model->gains ? model->gains[row] : 0;
    return result;
}

/* How far a row's numbers spread: their mean square, each by what its context stands for. A context more, or a gain
   more, is a quarter of an octave. */
static int gain_of(const float *values, const Model *model) {
    double sum = 0;
    for (Py_ssize_t i = 0; i < model->width; i++) {
        const int context = model->contexts[i];
        sum += ldexp((double)values[i] * values[i] * (context & 1 ? 0.70710678118654752 : 1.0), -(context >> 1));
    }
    const double mean = sum / (double)model->width;
    if (!(mean > 1e-9))
        return 0;
    const double gain = rint(2 * log2(mean)) + ORIGIN;
    return gain < 0 ? 0 : gain > GAINS - 1 ? GAINS - 1 : (int)gain;
}

static Py_ssize_t table_number(const Model *model, Py_ssize_t component, int state) {
    const int quantizer = model->quantizers == 2 ? QUANTIZER[state] : 0;
    return model->quantizers * (model->contexts[component] + model->gain) + quantizer;
}

static const uint16_t *table_of(const Model *model, Py_ssize_t component, int state) {
    return model->cumulative + table_number(model, component, state) * (SYMBOLS + 1);
}

/* Points of a quantizer, in steps: even multiples, or zero and the odd ones. */
static float point(int quantizer, int index) {
    return (float)(2 * index - (quantizer ? (index > 0) - (index < 0) : 0));
}

static float reconstruct(const float *points, int quantizer, int index) {
    return index >= -LIMIT && index <= LIMIT ? points[index + LIMIT] : point(quantizer, index);
}

static int bit_length(uint32_t value) { /* of a positive value, less one */
    int bits = 0;
    while (value >> bits > 1)
        bits++;
    return bits;
}

static float rate_of(const float *costs, int index, float bit) {
    if (index >= -LIMIT && index <= LIMIT)
        return costs[index + LIMIT];
    return costs[ESCAPE] + bit * (float)(2 * bit_length((uint32_t)(abs(index) - LIMIT)) + 2);
}

/* A state's two predecessors are to / 2 and 4 + to / 2, which hold the same quantizer. By this parity the former leads
   to it, by the other one the latter. */
static const uint8_t PARITY[STATES] = {0, 1, 1, 0, 1, 0, 0, 1};

/* A component's choices in one quantizer: the index toward zero and the better of its neighbours, whose parity is the
   other one, with their distortion + cost. */
typedef struct {
    int32_t index, neighbour;
    float price, neighbour_price;
} Choice;

static inline __attribute__((always_inline)) Choice choose(float value, int quantizer, const float *points, const float *costs, float bit) {
    const int32_t sign = -(value < 0), lower = (int32_t)((fabsf(value) + (float)quantizer) / 2);
    Choice choice = {.index = (lower ^ sign) - sign};
    float below, above;
    if (lower < LIMIT) { /* the three lie side by side in the tables */
        Four point, cost;
        memcpy(&point, points + choice.index - 1 + LIMIT, sizeof point);
        memcpy(&cost, costs + choice.index - 1 + LIMIT, sizeof cost);
        const Four error = value - point, price = error * error + cost;
        below = price[0], choice.price = price[1], above = price[2];
    } else {
        float price[3];
        for (int side = 0; side < 3; side++) {
            const int32_t index = choice.index + side - 1;
            const float error = value - reconstruct(points, quantizer, index);
            price[side] = error * error + rate_of(costs, index, bit);
        }
        below = price[0], choice.price = price[1], above = price[2];
    }
    /* Which one is as good as random: computed, not branched to. */
    choice.neighbour = choice.index - 1 + 2 * (above < below);
    choice.neighbour_price = above < below ? above : below;
    return choice;
}

/* One row's path of least distortion + cost (Viterbi). Per component: which states come from the latter predecessor,
   a lane each, in paths; and the best index of each parity of both quantizers in picked. */
VECTORIZED static void search_row(const float *values, const Model *model, const float *points, const float *costs,
                                  float bit, int32_t *indices, EightBits *paths, int32_t (*picked)[2][2]) {
    const float never = INFINITY;
    const EightBits parity = {0, -1, -1, 0, -1, 0, 0, -1}; /* PARITY */
    Eight best = {0, never, never, never, never, never, never, never};
    for (Py_ssize_t i = 0; i < model->width; i++) {
        const Py_ssize_t table = 2 * (model->contexts[i] + model->gain) * SYMBOLS;
        const Choice d = choose(values[i], 0, points + table, costs + table, bit),
                     e = choose(values[i], 1, points + table + SYMBOLS, costs + table + SYMBOLS, bit);
        const int32_t d_odd = d.index & 1, e_odd = e.index & 1;
        picked[i][0][d_odd] = d.index, picked[i][0][!d_odd] = d.neighbour;
        picked[i][1][e_odd] = e.index, picked[i][1][!e_odd] = e.neighbour;
        /* By the quantizer of each state's predecessors; the lanes whose parity is the neighbour's are swapped. */
        const Eight index = {d.price, d.price, e.price, e.price, d.price, d.price, e.price, e.price};
        const Eight neighbour = {d.neighbour_price, d.neighbour_price, e.neighbour_price, e.neighbour_price,
                                 d.neighbour_price, d.neighbour_price, e.neighbour_price, e.neighbour_price};
        const EightBits odd = {-d_odd, -d_odd, -e_odd, -e_odd, -d_odd, -d_odd, -e_odd, -e_odd};
        const EightBits swapped = ((EightBits)index ^ (EightBits)neighbour) & (odd ^ parity);
        const Eight former = PICK(best, 0, 0, 1, 1, 2, 2, 3, 3) + (Eight)((EightBits)index ^ swapped);
        const Eight latter = PICK(best, 4, 4, 5, 5, 6, 6, 7, 7) + (Eight)((EightBits)neighbour ^ swapped);
        paths[i] = latter < former;
        best = (Eight)((EightBits)former ^ (((EightBits)former ^ (EightBits)latter) & paths[i]));
    }
    int state = 0;
    for (int s = 1; s < STATES; s++)
        if (best[s] < best[state])
            state = s;
    for (Py_ssize_t i = model->width; i-- > 0;) {
        const int latter = paths[i][state] & 1;
        indices[i] = picked[i][QUANTIZER[state / 2]][PARITY[state] ^ latter];
        state = state / 2 + 4 * latter;
    }
}

/* Needs no interpreter; -1 if memory is short. */
static int search_rows(const float *values, Py_ssize_t rows, const Model *model, const float *points,
                       const float *costs, float bit, int32_t *indices) {
    const size_t width = (size_t)model->width;
    void *room = malloc((width + 1) * sizeof(EightBits)); /* malloc aligns to less */
    EightBits *paths = (EightBits *)(((uintptr_t)room + sizeof *paths - 1) / sizeof *paths * sizeof *paths);
    int32_t(*picked)[2][2] = malloc(width * sizeof *picked);
    const int there = room && picked;
    if (there)
        for (Py_ssize_t row = 0; row < rows; row++) {
            const Model of = of_row(model, row);
            search_row(values + row * model->width, &of, points, costs, bit, indices + row * model->width, paths,
                       picked);
        }
    free(room);
    free(picked);
    return there ? 0 : -1;
}

/* Whether an array of floats is of a model's symbols. */
static int fits(const Model *model, const Py_buffer *array) {
    return array->len == 2 * model->tables * SYMBOLS * (Py_ssize_t)sizeof(float);
}

static PyObject *quantize(PyObject *module, PyObject *args) {
    Py_buffer values, contexts, cumulative, gains, points, costs, indices;
    float bit;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*fw*", &values, &contexts, &cumulative, &gains, &points, &costs, &bit,
                          &indices))
        return NULL;
    PyObject *result = NULL;
    Model model;
    if (read_model(&model, &contexts, &cumulative, 2) == 0) {
        const Py_ssize_t rows = values.len / (Py_ssize_t)sizeof(float) / model.width;
        if (values.len != rows * model.width * (Py_ssize_t)sizeof(float) || indices.len != values.len ||
            !fits(&model, &points) || !fits(&model, &costs))
            PyErr_SetString(PyExc_ValueError, "arrays that do not fit each other");
        else if (read_gains(&model, &gains, rows) < 0)
            ; /* the error is set */
        else if (search_rows(values.buf, rows, &model, points.buf, costs.buf, bit, indices.buf) < 0)
            PyErr_NoMemory();
        else
            result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&contexts);
    PyBuffer_Release(&cumulative);
    PyBuffer_Release(&gains);
    PyBuffer_Release(&points);
    PyBuffer_Release(&costs);
    PyBuffer_Release(&indices);
    return result;
}

/* The coder writes backwards from the end of its buffer, so that the decoder reads forwards. */
typedef struct {
    uint32_t state;
    uint8_t *at, *start;
} Encoder;

static int put(Encoder *encoder, uint32_t first, uint32_t frequency) {
    const uint32_t most = ((LOW >> PRECISION) << 8) * frequency;
    while (encoder->state >= most) {
        if (encoder->at == encoder->start)
            return -1;
        *--encoder->at = (uint8_t)encoder->state;
        encoder->state >>= 8;
    }
    encoder->state = ((encoder->state / frequency) << PRECISION) + encoder->state % frequency + first;
    return 0;
}

static int put_bits(Encoder *encoder, uint32_t value, int bits) {
    int failed = 0;
    for (int bit = 0; bit < bits; bit++) /* the highest is decoded first */
        failed |= put(encoder, (value >> bit & 1) << (PRECISION - 1), 1u << (PRECISION - 1));
    return failed;
}

static int put_index(Encoder *encoder, const uint16_t *table, int32_t index) {
    const uint32_t magnitude = (uint32_t)abs(index);
    int symbol = index + LIMIT, failed = 0;
    if (magnitude > LIMIT) { /* Elias gamma of the excess, behind the sign */
        const uint32_t excess = magnitude - LIMIT;
        const int bits = bit_length(excess);
        if (bits > MAX_ESCAPE_BITS)
            return -1;
        symbol = ESCAPE;
        failed |= put_bits(encoder, excess & ((1u << bits) - 1), bits);
        failed |= put_bits(encoder, 1, 1);
        failed |= put_bits(encoder, 0, bits);
        failed |= put_bits(encoder, index < 0, 1);
    }
    return failed | put(encoder, table[symbol], (uint32_t)(table[symbol + 1] - table[symbol]));
}

/* Codes rows at the end of the output; where they begin in it, -1 if they do not fit, or -2 if memory is short. Needs no
   interpreter. */
static Py_ssize_t put_rows(const int32_t *indices, Py_ssize_t rows, const Model *model, uint32_t seed,
                           const Py_buffer *output) {
    uint8_t *states = malloc((size_t)model->width);
    if (!states)
        return -2;
    Encoder encoder = {seed, (uint8_t *)output->buf + output->len, output->buf};
    int failed = 0;
    for (Py_ssize_t row = rows; row-- > 0 && !failed;) {
        const int32_t *index = indices + row * model->width;
        const Model of = of_row(model, row);
        int state = 0;
        for (Py_ssize_t i = 0; i < model->width; i++) {
            states[i] = (uint8_t)state;
            state = NEXT[state][index[i] & 1];
        }
        for (Py_ssize_t i = model->width; i-- > 0 && !failed;)
            failed = put_index(&encoder, table_of(&of, i, states[i]), index[i]);
    }
    for (; encoder.state && !failed; encoder.state >>= 8) {
        failed = encoder.at == encoder.start;
        if (!failed)
            *--encoder.at = (uint8_t)encoder.state;
    }
    free(states);
    return failed ? -1 : encoder.at - encoder.start;
}

/* What `put_rows` gave, for Python. */
static PyObject *offset_in_output(Py_ssize_t start) {
    if (start >= 0)
        return PyLong_FromSsize_t(start);
    if (start == -1)
        PyErr_SetString(PyExc_OverflowError, "the indices take more room than there is");
    else
        PyErr_NoMemory();
    return NULL;
}

static PyObject *encode(PyObject *module, PyObject *args) {
    Py_buffer indices, contexts, cumulative, gains, output;
    unsigned int seed;
    int trellis;
    if (!PyArg_ParseTuple(args, "y*y*y*y*Iw*p", &indices, &contexts, &cumulative, &gains, &seed, &output, &trellis))
        return NULL;
    PyObject *result = NULL;
    Model model;
    if (read_model(&model, &contexts, &cumulative, trellis ? 2 : 1) == 0) {
        const Py_ssize_t rows = indices.len / (Py_ssize_t)sizeof(int32_t) / model.width;
        if (indices.len != rows * model.width * (Py_ssize_t)sizeof(int32_t) || seed >= LOW) {
            PyErr_SetString(PyExc_ValueError, "arrays that do not fit each other");
        } else if (read_gains(&model, &gains, rows) == 0)
            result = offset_in_output(put_rows(indices.buf, rows, &model, seed, &output));
    }
    PyBuffer_Release(&indices);
    PyBuffer_Release(&contexts);
    PyBuffer_Release(&cumulative);
    PyBuffer_Release(&gains);
    PyBuffer_Release(&output);
    return result;
}

typedef struct {
    uint32_t state;
    const uint8_t *at, *end;
} Decoder;

static void take(Decoder *decoder, uint32_t first, uint32_t frequency) {
    decoder->state = frequency * (decoder->state >> PRECISION) + (decoder->state & ((1u << PRECISION) - 1)) - first;
    while (decoder->state < LOW && decoder->at < decoder->end)
        decoder->state = decoder->state << 8 | *decoder->at++;
}

static uint32_t take_bit(Decoder *decoder) {
    const uint32_t bit = decoder->state >> (PRECISION - 1) & 1;
    take(decoder, bit << (PRECISION - 1), 1u << (PRECISION - 1));
    return bit;
}

/* Returns -1 for an escape that no encoder writes. */
static int take_index(Decoder *decoder, const uint16_t *table, int32_t *index) {
    const uint32_t slot = decoder->state & ((1u << PRECISION) - 1);
    int symbol = 0;
    for (int half = SYMBOLS / 2; half; half /= 2)
        symbol += table[symbol + half] <= slot ? half : 0;
    take(decoder, table[symbol], (uint32_t)(table[symbol + 1] - table[symbol]));
    *index = symbol - LIMIT;
    if (symbol == ESCAPE) {
        const uint32_t negative = take_bit(decoder);
        int bits = 0;
        while (!take_bit(decoder))
            if (++bits > MAX_ESCAPE_BITS)
                return -1;
        int32_t excess = 1;
        for (int bit = 0; bit < bits; bit++)
            excess = excess << 1 | (int32_t)take_bit(decoder);
        *index = negative ? -(excess + LIMIT) : excess + LIMIT;
    }
    return 0;
}

static PyObject *decode(PyObject *module, PyObject *args) {
    Py_buffer payload, contexts, cumulative, gains, points, values;
    int trellis;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*w*p", &payload, &contexts, &cumulative, &gains, &points, &values, &trellis))
        return NULL;
    PyObject *result = NULL;
    Model model;
    if (read_model(&model, &contexts, &cumulative, trellis ? 2 : 1) == 0) {
        float *all = values.buf;
        const Py_ssize_t rows = values.len / (Py_ssize_t)sizeof(float) / model.width;
        if (values.len != rows * model.width * (Py_ssize_t)sizeof(float) ||
            (trellis ? !fits(&model, &points) : points.len != 0)) {
            PyErr_SetString(PyExc_ValueError, "arrays that do not fit each other");
        } else if (read_gains(&model, &gains, rows) == 0) {
            Decoder decoder = {0, payload.buf, (const uint8_t *)payload.buf + payload.len};
            while (decoder.state < LOW && decoder.at < decoder.end)
                decoder.state = decoder.state << 8 | *decoder.at++;
            int failed = 0;
            for (Py_ssize_t row = 0; row < rows && !failed; row++) {
                const Model of = of_row(&model, row);
                int state = 0;
                for (Py_ssize_t i = 0; i < model.width && !failed; i++) {
                    int32_t index = 0;
                    failed = take_index(&decoder, table_of(&of, i, state), &index);
                    const Py_ssize_t table = table_number(&of, i, state);
                    all[row * model.width + i] =
                        trellis ? reconstruct((const float *)points.buf + table * SYMBOLS, QUANTIZER[state], index)
                                : (float)index;
                    state = NEXT[state][index & 1];
                }
            }
            /* -1: not what `encode` writes. Otherwise the seed that it was given, if the payload is whole. */
            result = PyLong_FromLong(failed || decoder.at != decoder.end ? -1 : (long)decoder.state);
        }
    }
    PyBuffer_Release(&payload);
    PyBuffer_Release(&contexts);
    PyBuffer_Release(&cumulative);
    PyBuffer_Release(&gains);
    PyBuffer_Release(&points);
    PyBuffer_Release(&values);
    return result;
}

/* How often each symbol occurs in each table, and the sum of what its values are off its points, for `offsets`. */
static PyObject *count(PyObject *module, PyObject *args) {
    Py_buffer values, indices, contexts, gains, counts, sums;
    if (!PyArg_ParseTuple(args, "y*y*y*y*w*w*", &values, &indices, &contexts, &gains, &counts, &sums))
        return NULL;
    PyObject *result = NULL;
    const Py_ssize_t width = contexts.len, tables = counts.len / (2 * SYMBOLS * (Py_ssize_t)sizeof(int64_t));
    const Py_ssize_t rows = width ? indices.len / (Py_ssize_t)sizeof(int32_t) / width : 0;
    int valid = values.len == indices.len && indices.len == rows * width * (Py_ssize_t)sizeof(int32_t) &&
                counts.len == tables * 2 * SYMBOLS * (Py_ssize_t)sizeof(int64_t) && gains.len == rows &&
                sums.len == tables * 2 * (SYMBOLS - 1) * (Py_ssize_t)sizeof(double);
    if (!valid || largest(contexts.buf, width) + largest(gains.buf, rows) >= tables) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit each other");
    } else {
        for (Py_ssize_t row = 0; row < rows; row++) {
            int state = 0;
            for (Py_ssize_t i = 0; i < width; i++) {
                const int context = ((const uint8_t *)contexts.buf)[i] + ((const uint8_t *)gains.buf)[row];
                const Py_ssize_t table = 2 * context + QUANTIZER[state];
                const int32_t index = ((const int32_t *)indices.buf)[row * width + i];
                const int escaped = index < -LIMIT || index > LIMIT;
                ((int64_t *)counts.buf)[table * SYMBOLS + (escaped ? ESCAPE : index + LIMIT)]++;
                if (!escaped)
                    ((double *)sums.buf)[table * (SYMBOLS - 1) + index + LIMIT] +=
                        ((const float *)values.buf)[row * width + i] - point(QUANTIZER[state], index);
                state = NEXT[state][index & 1];
            }
        }
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&indices);
    PyBuffer_Release(&contexts);
    PyBuffer_Release(&gains);
    PyBuffer_Release(&counts);
    PyBuffer_Release(&sums);
    return result;
}

static PyObject *gains(PyObject *module, PyObject *args) {
    Py_buffer values, contexts, found;
    if (!PyArg_ParseTuple(args, "y*y*w*", &values, &contexts, &found))
        return NULL;
    PyObject *result = NULL;
    const Model model = {.contexts = contexts.buf, .width = contexts.len};
    if (!model.width || values.len != found.len * model.width * (Py_ssize_t)sizeof(float)) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit each other");
    } else {
        for (Py_ssize_t row = 0; row < found.len; row++)
            ((uint8_t *)found.buf)[row] = (uint8_t)gain_of((const float *)values.buf + row * model.width, &model);
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&contexts);
    PyBuffer_Release(&found);
    return result;
}

/* In `weigh`: four rows of the matrix, at columns j and on as many as the type of m holds, into every row of outputs. */
#define ADD_PRODUCTS                                                                                                   \
    for (Py_ssize_t row = 0; row < rows; row++) {                                                                      \
        float *output = outputs + row * width + j;                                                                     \
        __typeof__(m[0]) sum;                                                                                          \
        memcpy(&sum, output, sizeof sum);                                                                              \
        sum += (by[row][0] * m[0] + by[row][1] * m[1]) + (by[row][2] * m[2] + by[row][3] * m[3]);                      \
        memcpy(output, &sum, sizeof sum);                                                                              \
    }

/* outputs += inputs @ matrix for at most ROWS_AT_ONCE rows, so that the matrix passes the caches once for all of them;
   always in the same order, so that a row's bits never depend on its neighbours (BLAS gives no such promise). The
   matrix is of floats or, where its rows have scales, of 16-bit integers: half the bytes to read. */
static inline __attribute__((always_inline)) void weigh(const float *inputs, const void *matrix, const float *scales,
                                                        float *outputs, Py_ssize_t rows, Py_ssize_t inner,
                                                        Py_ssize_t stride, Py_ssize_t width) {
    const float *floats = matrix;
    const int16_t *integers = matrix;
    for (Py_ssize_t i = 0; i < inner; i += 4) {
        const Py_ssize_t parts = inner - i < 4 ? inner - i : 4;
        float by[ROWS_AT_ONCE][4] = {{0}};
        for (Py_ssize_t row = 0; row < rows; row++)
            for (Py_ssize_t part = 0; part < parts; part++)
                by[row][part] = inputs[row * inner + i + part] * (scales ? scales[i + part] : 1);
        /* What stands in for rows past the end is multiplied by zero. */
        const Py_ssize_t at[4] = {i * stride, (i + (parts > 1)) * stride, (i + 2 * (parts > 2)) * stride,
                                  (i + 3 * (parts > 3)) * stride};
        Py_ssize_t j = 0;
        /* Integers by 16 would pass through general registers where vectors have 32 bytes. */
        for (; scales && !WIDE && j + 8 <= width; j += 8) {
            Eight m[4];
            for (int part = 0; part < 4; part++) {
                EightShort read;
                memcpy(&read, integers + at[part] + j, sizeof read);
                m[part] = __builtin_convertvector(__builtin_convertvector(read, EightBits), Eight);
                if (i + AHEAD + 4 <= inner)
                    __builtin_prefetch(integers + at[part] + AHEAD * stride + j, 0, 2);
            }
            ADD_PRODUCTS
        }
        for (; j + 16 <= width; j += 16) {
            Sixteen m[4];
            for (int part = 0; part < 4; part++)
                if (scales) {
                    SixteenShort read;
                    memcpy(&read, integers + at[part] + j, sizeof read);
                    m[part] = __builtin_convertvector(__builtin_convertvector(read, SixteenBits), Sixteen);
                    if (i + AHEAD + 4 <= inner) /* two rows share a cache line's turn */
                        __builtin_prefetch(integers + at[part] + AHEAD * stride + j, 0, 2);
                } else
                    memcpy(&m[part], floats + at[part] + j, sizeof m[part]);
            ADD_PRODUCTS
        }
        for (; j < width; j++) {
            float m[4];
            for (int part = 0; part < 4; part++)
                m[part] = scales ? (float)integers[at[part] + j] : floats[at[part] + j];
            ADD_PRODUCTS
        }
    }
}

VECTORIZED static void weigh_floats(const float *inputs, const float *matrix, float *outputs, Py_ssize_t rows,
                                    Py_ssize_t inner, Py_ssize_t stride, Py_ssize_t width) {
    weigh(inputs, matrix, NULL, outputs, rows, inner, stride, width);
}

VECTORIZED static void weigh_integers(const float *inputs, const int16_t *matrix, const float *scales, float *outputs,
                                      Py_ssize_t rows, Py_ssize_t inner, Py_ssize_t width) {
    weigh(inputs, matrix, scales, outputs, rows, inner, inner, width);
}

static PyObject *multiply(PyObject *module, PyObject *args) {
    Py_buffer inputs, matrix, outputs;
    Py_ssize_t inner, stride, width;
    if (!PyArg_ParseTuple(args, "y*y*w*nnn", &inputs, &matrix, &outputs, &inner, &stride, &width))
        return NULL;
    PyObject *result = NULL;
    const Py_ssize_t size = (Py_ssize_t)sizeof(float);
    if (inner < 1 || width < 1 || stride < width || matrix.len / size / stride < inner || inputs.len % (inner * size) ||
        outputs.len % (width * size) || inputs.len / (inner * size) != outputs.len / (width * size)) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit each other");
    } else {
        const Py_ssize_t rows = inputs.len / (inner * size);
        memset(outputs.buf, 0, (size_t)outputs.len);
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t row = 0; row < rows; row += ROWS_AT_ONCE)
            weigh_floats((const float *)inputs.buf + row * inner, matrix.buf, (float *)outputs.buf + row * width,
                         rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE, inner, stride, width);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&inputs);
    PyBuffer_Release(&matrix);
    PyBuffer_Release(&outputs);
    return result;
}

/* Rows in the transform's basis without what their tokens predict; which of them lie within the limit. */
static void transform(const float *inputs, Py_ssize_t rows, Py_ssize_t inner, const int16_t *matrix,
                      const float *scales, const int8_t *predicted, const float *predicted_scale, float limit,
                      float *outputs, Py_ssize_t width, uint8_t *ordinary) {
    memset(outputs, 0, (size_t)(rows * width) * sizeof *outputs);
    for (Py_ssize_t row = 0; row < rows; row += ROWS_AT_ONCE)
        weigh_integers(inputs + row * inner, matrix, scales, outputs + row * width,
                       rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE, inner, width);
    for (Py_ssize_t row = 0; row < rows; row++) {
        const int8_t *from = predicted + row * inner;
        float *output = outputs + row * width;
        double squares = 0;
        for (Py_ssize_t j = 0; j < width; j++) {
            output[j] -= (float)from[j] * predicted_scale[j];
            squares += (double)output[j] * output[j];
        }
        ordinary[row] = squares <= (double)limit * limit; /* not what overflowed */
    }
}

/* How fine a row's steps are to be: its product with the importance, rounded. */
static int fineness_of(const float *input, const float *importance, float bias, Py_ssize_t inner) {
    Sixteen sums = {0};
    float fineness = bias;
    Py_ssize_t i = 0;
    for (; i + 16 <= inner; i += 16) {
        Sixteen value, weight;
        memcpy(&value, input + i, sizeof value);
        memcpy(&weight, importance + i, sizeof weight);
        sums += value * weight;
    }
    for (int lane = 0; lane < 16; lane++)
        fineness += sums[lane];
    for (; i < inner; i++)
        fineness += input[i] * importance[i];
    fineness = rintf(fineness);
    return !(fineness > 0) ? 0 : fineness > FINENESSES - 1 ? FINENESSES - 1 : (int)fineness;
}

/* Transform, path and code of a frame's ordinary rows, in one call, for one token is all that a step of a decode
   sends. Their gains and finenesses begin what is for them, their coded rows end the output; the result is where these
   begin, its length if no row is ordinary. The coder begins with the first one's id and fineness. */
static PyObject *encode_hidden(PyObject *module, PyObject *args) {
    Py_buffer hidden, ids, ordinary, gains, finenesses, output, matrix, scales, predicted, predicted_scale, importance,
        steps, contexts, cumulative, points, costs;
    float bias, limit, bit;
    unsigned int seed;
    if (!PyArg_ParseTuple(args, "y*y*y*w*w*w*w*y*y*y*y*ffy*y*y*y*y*fI", &hidden, &ids, &predicted, &ordinary, &gains,
                          &finenesses, &output, &matrix, &scales, &predicted_scale, &importance, &bias, &limit, &steps,
                          &contexts, &cumulative, &points, &costs, &bit, &seed))
        return NULL;
    PyObject *result = NULL;
    const Py_ssize_t size = (Py_ssize_t)sizeof(float), inner = scales.len / size, rows = ordinary.len;
    Model model;
    if (gains.len == rows)
        memset(gains.buf, 0, (size_t)rows);
    if (read_model(&model, &contexts, &cumulative, 2) < 0 || read_gains(&model, &gains, rows) < 0) {
        /* the error is set */
    } else if (!inner || model.width > inner || scales.len != inner * size || predicted_scale.len != inner * size ||
               matrix.len != inner * inner * (Py_ssize_t)sizeof(int16_t) || hidden.len != rows * inner * size ||
               ids.len != rows * (Py_ssize_t)sizeof(int64_t) || predicted.len != rows * inner ||
               finenesses.len != rows || importance.len != inner * size || steps.len != FINENESSES * size ||
               !fits(&model, &points) || !fits(&model, &costs) || seed >= LOW ||
               largest(contexts.buf, model.width) + GAINS > model.tables) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit each other");
    } else {
        const int64_t *id = ids.buf;
        const Py_ssize_t width = model.width;
        int known = 1;
        for (Py_ssize_t row = 0; row < rows; row++)
            known &= id[row] >= 0 && id[row] < (int64_t)((LOW - seed) / FINENESSES);
        float *values = malloc((size_t)(rows * width + 1) * sizeof *values);
        int32_t *indices = malloc((size_t)(rows * width + 1) * sizeof *indices);
        if (!known) {
            PyErr_SetString(PyExc_ValueError, "an id that the coder cannot begin with");
        } else if (!values || !indices) {
            PyErr_NoMemory();
        } else {
            Py_ssize_t coded = 0, start = output.len;
            Py_BEGIN_ALLOW_THREADS
            uint32_t first = 0;
            transform(hidden.buf, rows, inner, matrix.buf, scales.buf, predicted.buf, predicted_scale.buf, limit,
                      values, width, ordinary.buf);
            for (Py_ssize_t row = 0; row < rows; row++)
                if (((const uint8_t *)ordinary.buf)[row]) {
                    const int fineness =
                        fineness_of((const float *)hidden.buf + row * inner, importance.buf, bias, inner);
                    const float per_step = 1 / ((const float *)steps.buf)[fineness];
                    const float *from = values + row * width;
                    float *to = values + coded * width;
                    for (Py_ssize_t i = 0; i < width; i++)
                        to[i] = from[i] * per_step;
                    if (!coded)
                        first = FINENESSES * (uint32_t)id[row] + (uint32_t)fineness;
                    ((uint8_t *)gains.buf)[coded] = (uint8_t)gain_of(to, &model);
                    ((uint8_t *)finenesses.buf)[coded] = (uint8_t)fineness;
                    coded++;
                }
            if (coded && search_rows(values, coded, &model, points.buf, costs.buf, bit, indices) < 0)
                start = -2;
            else if (coded)
                start = put_rows(indices, coded, &model, seed + first, &output);
            Py_END_ALLOW_THREADS
            result = offset_in_output(start);
        }
        free(values);
        free(indices);
    }
    PyBuffer_Release(&hidden);
    PyBuffer_Release(&ids);
    PyBuffer_Release(&ordinary);
    PyBuffer_Release(&gains);
    PyBuffer_Release(&finenesses);
    PyBuffer_Release(&output);
    PyBuffer_Release(&matrix);
    PyBuffer_Release(&scales);
    PyBuffer_Release(&predicted);
    PyBuffer_Release(&predicted_scale);
    PyBuffer_Release(&importance);
    PyBuffer_Release(&steps);
    PyBuffer_Release(&contexts);
    PyBuffer_Release(&cumulative);
    PyBuffer_Release(&points);
    PyBuffer_Release(&costs);
    return result;
}

static PyMethodDef METHODS[] = {
    {"quantize", quantize, METH_VARARGS,
     "quantize(values, contexts, cumulative, gains, points, costs, bit, indices): the trellis path of least cost"},
    {"encode", encode, METH_VARARGS,
     "encode(indices, contexts, cumulative, gains, seed, output, trellis) -> offset in output"},
    {"decode", decode, METH_VARARGS,
     "decode(payload, contexts, cumulative, gains, points, values, trellis) -> seed or -1"},
    {"count", count, METH_VARARGS, "count(values, indices, contexts, gains, counts, sums): adds to counts and sums"},
    {"gains", gains, METH_VARARGS, "gains(values, contexts, found): of each row"},
    {"multiply", multiply, METH_VARARGS, "multiply(inputs, matrix, outputs, inner, stride, width)"},
    {"encode_hidden", encode_hidden, METH_VARARGS,
     "encode_hidden(hidden, ids, predicted, ordinary, gains, finenesses, output, matrix, scales, predicted_scale, "
     "importance, bias, limit, steps, contexts, cumulative, points, costs, bit, seed) -> offset in output"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_native", .m_doc = NULL, .m_size = 0, .m_methods = METHODS};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&MODULE); }
