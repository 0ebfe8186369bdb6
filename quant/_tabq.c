/* TS and TAB-Q as isthmus.quant.tabq describes them, in one call for a frame: a step of a decode sends one token, whose
   arrays are so small that NumPy's calls would be what it costs.

   Every function takes arrays through the buffer protocol and checks their sizes. `decode` believes nothing of a
   payload before its length is checked, and allocates in proportion to the hidden states that the caller asks for. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif

#define RAW 0
#define MIN_WIDTH 2
#define MAX_WIDTH 8
#define MAX_OUTLIERS 255
#define TOKEN_BYTES 5 /* width, outliers, zero point, bfloat16 scale */
#define MAX_SCALE 0x7AFF
#define LANES 16                /* partial sums, so that compilers may vectorize without changing the result */
#define TO_INTEGER 12582912.0f /* 1.5 * 2**23: adding and subtracting it rounds as rint does, below 2**22 */

static const float HUGE_MAGNITUDE = 0x1p119f, SMALLEST_RANGE = 0x1p-118f;

typedef struct {
    float threshold; /* of outliers; below 0: take `outliers` of them instead */
    int outliers, narrowest, widest;
    float tolerance; /* squared */
} Options;

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The largest magnitude of a row that is no outlier: that of this rank from above, counted from 0. */
static float cutoff_of(const float *row, Py_ssize_t width, int rank) {
    float largest[MAX_OUTLIERS + 1]; /* falling */
    int known = 0;
    if (rank >= width)
        return -1;
    for (Py_ssize_t i = 0; i < width; i++) {
        const float magnitude = fabsf(row[i]);
        if (known > rank && magnitude <= largest[rank])
            continue;
        int at = known > rank ? rank : known++;
        for (; at > 0 && largest[at - 1] < magnitude; at--)
            largest[at] = largest[at - 1];
        largest[at] = magnitude;
    }
    return largest[rank] < HUGE_MAGNITUDE ? largest[rank] : HUGE_MAGNITUDE;
}

/* A row without its outliers, filled up with zeros to whole lanes; how many outliers it has. */
VECTORIZED static Py_ssize_t split_row(const float *restrict row, Py_ssize_t width, float cutoff, float *restrict rest,
                                       uint8_t *restrict dense, float *lowest, float *highest) {
    Py_ssize_t outliers = 0;
    float low[LANES] = {0}, high[LANES] = {0};
    for (Py_ssize_t i = 0; i < width; i++) {
        dense[i] = fabsf(row[i]) <= cutoff;
        outliers += !dense[i];
        rest[i] = dense[i] ? row[i] : 0;
    }
    for (Py_ssize_t i = width; i % LANES; i++)
        rest[i] = 0;
    for (Py_ssize_t i = 0; i < width; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            const float value = rest[i + lane];
            low[lane] = value < low[lane] ? value : low[lane];
            high[lane] = value > high[lane] ? value : high[lane];
        }
    *lowest = low[0], *highest = SMALLEST_RANGE;
    for (int lane = 0; lane < LANES; lane++) {
        *lowest = low[lane] < *lowest ? low[lane] : *lowest;
        *highest = high[lane] > *highest ? high[lane] : *highest;
    }
    return outliers;
}

/* Whether a scale keeps the tolerance. In steps no square overflows or vanishes; a code that will be clipped lies half
   way between two, and errs alike. */
VECTORIZED static int within(const float *restrict rest, Py_ssize_t padded, float scale, float tolerance) {
    float error[LANES] = {0}, size[LANES] = {0};
    for (Py_ssize_t i = 0; i < padded; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            const float step = rest[i + lane] / scale, off = step - ((step + TO_INTEGER) - TO_INTEGER);
            error[lane] += off * off;
            size[lane] += step * step;
        }
    for (int lane = 1; lane < LANES; lane++)
        error[0] += error[lane], size[0] += size[lane];
    return error[0] <= size[0] * tolerance;
}

VECTORIZED static void code_row(const float *restrict rest, Py_ssize_t width, float scale, float zero, float level,
                                uint8_t *restrict codes) {
    for (Py_ssize_t i = 0; i < width; i++) {
        const float code = ((rest[i] / scale + TO_INTEGER) - TO_INTEGER) - zero;
        codes[i] = (uint8_t)(int)(code < level ? code : level);
    }
}

/* One token: its entry in the table, its codes, and which of its values are coded. `rest` holds `padded` numbers. */
static void quantize_row(const float *row, Py_ssize_t width, const Options *options, float *rest, Py_ssize_t padded,
                         uint8_t *head, uint8_t *codes, uint8_t *dense) {
    float low, high;
    const float cutoff = options->threshold < 0 ? cutoff_of(row, width, options->outliers) : options->threshold;
    const Py_ssize_t outliers = split_row(row, width, cutoff, rest, dense, &low, &high);
    if (outliers <= MAX_OUTLIERS)
        for (int bits = options->narrowest; bits <= options->widest; bits++) {
            const float level = (float)((1 << bits) - 1);
            const uint32_t rounded = (bits_of((high - low) / level) + 0xFFFF) & 0xFFFF0000; /* up, to a bfloat16 */
            const float scale = float_of(rounded);
            if (!within(rest, padded, scale, options->tolerance))
                continue;
            /* Rounded as the values are, so that no code falls below 0. */
            const float zero = (low / scale + TO_INTEGER) - TO_INTEGER;
            code_row(rest, width, scale, zero, level, codes);
            head[0] = (uint8_t)bits;
            head[1] = (uint8_t)outliers;
            head[2] = (uint8_t)-zero;
            head[3] = (uint8_t)(rounded >> 16);
            head[4] = (uint8_t)(rounded >> 24);
            return;
        }
    memset(head, 0, TOKEN_BYTES);
    memset(codes, 0, (size_t)width);
    memset(dense, 0, (size_t)width);
}

static int bit_width(uint32_t value) {
    int bits = 0;
    while (value >> bits)
        bits++;
    return bits;
}

static Py_ssize_t packed_bytes(Py_ssize_t count, int width) { return (count * width + 7) / 8; }

/* Codes bit plane by bit plane, as isthmus.quant.bitpack has them; the bytes are zero before. */
#define DEFINE_PLANES(type)                                                                                            \
    static void pack_##type(const type *codes, Py_ssize_t count, int width, uint8_t *out) {                            \
        Py_ssize_t bit = 0;                                                                                            \
        for (int plane = 0; plane < width; plane++)                                                                    \
            for (Py_ssize_t i = 0; i < count; i++, bit++)                                                              \
                out[bit >> 3] |= (uint8_t)((codes[i] >> plane & 1) << (7 - (bit & 7)));                                \
    }                                                                                                                  \
    /* False if the padding is not zero. */                                                                            \
    static int unpack_##type(const uint8_t *in, Py_ssize_t count, int width, type *codes) {                            \
        Py_ssize_t bit = 0;                                                                                            \
        memset(codes, 0, (size_t)count * sizeof *codes);                                                               \
        for (int plane = 0; plane < width; plane++)                                                                    \
            for (Py_ssize_t i = 0; i < count; i++, bit++)                                                              \
                codes[i] |= (type)((type)(in[bit >> 3] >> (7 - (bit & 7)) & 1) << plane);                              \
        return !(bit & 7) || !(in[bit >> 3] & ((1 << (8 - (bit & 7))) - 1));                                           \
    }
DEFINE_PLANES(uint8_t)
DEFINE_PLANES(uint16_t)

static uint8_t *put_float(uint8_t *out, float value) {
    const uint32_t bits = bits_of(value);
    for (int byte = 0; byte < 4; byte++)
        out[byte] = (uint8_t)(bits >> (8 * byte));
    return out + 4;
}

static float get_float(const uint8_t *in) {
    return float_of((uint32_t)in[0] | (uint32_t)in[1] << 8 | (uint32_t)in[2] << 16 | (uint32_t)in[3] << 24);
}

/* Rows of a frame, and room for one row's remainder and one width's codes. */
typedef struct {
    const float *hidden;
    Py_ssize_t rows, width, padded;
    uint8_t *head, *codes, *dense;
} Quantized;

static int quantize_rows(Quantized *q, const Options *options) {
    float *rest = PyMem_Malloc((size_t)q->padded * sizeof *rest);
    if (!rest) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t row = 0; row < q->rows; row++)
        quantize_row(q->hidden + row * q->width, q->width, options, rest, q->padded, q->head + row * TOKEN_BYTES,
                     q->codes + row * q->width, q->dense + row * q->width);
    PyMem_Free(rest);
    return 0;
}

static Py_ssize_t padded_width(Py_ssize_t width) { return (width + LANES - 1) / LANES * LANES; }

static PyObject *quantize(PyObject *module, PyObject *args) {
    Py_buffer hidden, head, codes, dense;
    Py_ssize_t width;
    Options options;
    if (!PyArg_ParseTuple(args, "y*nfifiiw*w*w*", &hidden, &width, &options.threshold, &options.outliers,
                          &options.tolerance, &options.narrowest, &options.widest, &head, &codes, &dense))
        return NULL;
    PyObject *result = NULL;
    const Py_ssize_t rows = head.len / TOKEN_BYTES;
    if (width < 1 || width > 1 << 16 || head.len != rows * TOKEN_BYTES || codes.len != rows * width ||
        dense.len != codes.len || hidden.len != codes.len * (Py_ssize_t)sizeof(float)) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit each other");
    } else {
        Quantized q = {hidden.buf, rows, width, padded_width(width), head.buf, codes.buf, dense.buf};
        if (quantize_rows(&q, &options) == 0)
            result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&hidden);
    PyBuffer_Release(&head);
    PyBuffer_Release(&codes);
    PyBuffer_Release(&dense);
    return result;
}

/* Whether all values are finite. One that is not exceeds every cutoff, so that it is not coded. */
static int all_finite(const Quantized *q) {
    for (Py_ssize_t i = 0; i < q->rows * q->width; i++)
        if (!q->dense[i] && !isfinite(q->hidden[i]))
            return 0;
    return 1;
}

/* The payload of a quantized frame. `scratch` has room for a 16-bit index of each value. */
static PyObject *payload_of(const Quantized *q, void *scratch) {
    const int index_bits = bit_width((uint32_t)(q->width - 1));
    Py_ssize_t outliers = 0, raw = 0, coded[MAX_WIDTH + 1] = {0};
    for (Py_ssize_t row = 0; row < q->rows; row++) {
        const uint8_t *head = q->head + row * TOKEN_BYTES;
        outliers += head[1];
        raw += head[0] == RAW;
        coded[head[0]] += q->width - head[1];
    }
    const Py_ssize_t indices_bytes = packed_bytes(outliers, index_bits);
    Py_ssize_t size = q->rows * TOKEN_BYTES + indices_bytes + 4 * (outliers + raw * q->width);
    for (int width = MIN_WIDTH; width <= MAX_WIDTH; width++)
        size += packed_bytes(coded[width], width);
    PyObject *payload = PyBytes_FromStringAndSize(NULL, size);
    if (!payload)
        return NULL;
    uint8_t *out = (uint8_t *)PyBytes_AsString(payload);
    memcpy(out, q->head, (size_t)(q->rows * TOKEN_BYTES));
    memset(out + q->rows * TOKEN_BYTES, 0, (size_t)(size - q->rows * TOKEN_BYTES));
    uint8_t *planes = out + q->rows * TOKEN_BYTES, *floats = planes + indices_bytes;
    uint16_t *indices = scratch;
    for (Py_ssize_t row = 0; row < q->rows; row++)
        for (Py_ssize_t i = row * q->width; i < (row + 1) * q->width; i++)
            if (!q->dense[i] && q->head[row * TOKEN_BYTES] != RAW) {
                *indices++ = (uint16_t)(i - row * q->width);
                floats = put_float(floats, q->hidden[i]);
            }
    pack_uint16_t(scratch, outliers, index_bits, planes);
    for (Py_ssize_t row = 0; row < q->rows; row++)
        if (q->head[row * TOKEN_BYTES] == RAW)
            for (Py_ssize_t i = row * q->width; i < (row + 1) * q->width; i++)
                floats = put_float(floats, q->hidden[i]);
    planes = floats;
    for (int width = MIN_WIDTH; width <= MAX_WIDTH; width++) {
        uint8_t *codes = scratch;
        for (Py_ssize_t row = 0; row < q->rows; row++)
            if (q->head[row * TOKEN_BYTES] == width)
                for (Py_ssize_t i = row * q->width; i < (row + 1) * q->width; i++) {
                    *codes = q->codes[i];
                    codes += q->dense[i];
                }
        pack_uint8_t(scratch, coded[width], width, planes);
        planes += packed_bytes(coded[width], width);
    }
    return payload;
}

static PyObject *encode(PyObject *module, PyObject *args) {
    Py_buffer hidden;
    Py_ssize_t width;
    Options options;
    if (!PyArg_ParseTuple(args, "y*nfifii", &hidden, &width, &options.threshold, &options.outliers, &options.tolerance,
                          &options.narrowest, &options.widest))
        return NULL;
    PyObject *result = NULL;
    const Py_ssize_t size = (Py_ssize_t)sizeof(float), rows = width > 0 ? hidden.len / size / width : 0;
    if (width < 1 || width > 1 << 16 || hidden.len != rows * width * size) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit each other");
    } else {
        uint8_t *room = PyMem_Malloc((size_t)(rows * (4 * width + TOKEN_BYTES) + 2));
        if (room) {
            uint16_t *scratch = (uint16_t *)room; /* first, where it is aligned */
            uint8_t *codes = room + 2 * rows * width;
            Quantized q = {hidden.buf,         rows, width, padded_width(width), codes + 2 * rows * width, codes,
                           codes + rows * width};
            if (quantize_rows(&q, &options) == 0)
                result = all_finite(&q) ? payload_of(&q, scratch) : Py_NewRef(Py_None);
            PyMem_Free(room);
        } else
            PyErr_NoMemory();
    }
    PyBuffer_Release(&hidden);
    return result;
}

/* Checks a payload and reads it into hidden states; false if it is not what `encode` writes. */
static int read_payload(const uint8_t *in, Py_ssize_t length, Py_ssize_t rows, Py_ssize_t d_model, uint16_t *indices,
                        uint8_t *codes, float *hidden) {
    const int index_bits = bit_width((uint32_t)(d_model - 1));
    Py_ssize_t outliers = 0, raw = 0, coded[MAX_WIDTH + 1] = {0};
    if (length / TOKEN_BYTES < rows)
        return 0;
    for (Py_ssize_t row = 0; row < rows; row++) {
        const uint8_t *head = in + row * TOKEN_BYTES;
        const int width = head[0], scale = head[3] | head[4] << 8;
        if (width == RAW ? head[1] || head[2] || scale
                         : width < MIN_WIDTH || width > MAX_WIDTH || head[1] > d_model || head[2] >> width ||
                               scale > MAX_SCALE)
            return 0;
        outliers += head[1];
        raw += width == RAW;
        coded[width] += d_model - head[1];
    }
    const Py_ssize_t indices_bytes = packed_bytes(outliers, index_bits), values_bytes = 4 * outliers,
                     raw_bytes = 4 * raw * d_model;
    Py_ssize_t size = rows * TOKEN_BYTES + indices_bytes + values_bytes + raw_bytes;
    for (int width = MIN_WIDTH; width <= MAX_WIDTH; width++)
        size += packed_bytes(coded[width], width);
    if (size != length)
        return 0;
    const uint8_t *planes = in + rows * TOKEN_BYTES, *values = planes + indices_bytes, *raws = values + values_bytes,
                  *packed = raws + raw_bytes;
    if (!unpack_uint16_t(planes, outliers, index_bits, indices))
        return 0;

    const uint8_t *next[MAX_WIDTH + 1];
    for (int width = MIN_WIDTH; width <= MAX_WIDTH; width++) {
        next[width] = codes;
        if (!unpack_uint8_t(packed, coded[width], width, codes))
            return 0;
        codes += coded[width];
        packed += packed_bytes(coded[width], width);
    }
    for (Py_ssize_t row = 0; row < rows; row++, hidden += d_model) {
        const uint8_t *head = in + row * TOKEN_BYTES;
        if (head[0] == RAW) {
            for (Py_ssize_t i = 0; i < d_model; i++, raws += 4)
                hidden[i] = get_float(raws);
        } else {
            const float zero = head[2], scale = float_of((uint32_t)(head[3] | head[4] << 8) << 16);
            const uint8_t *code = next[head[0]];
            Py_ssize_t i = 0;
            for (int outlier = 0; outlier <= head[1]; outlier++, i++) {
                const Py_ssize_t stop = outlier < head[1] ? indices[outlier] : d_model;
                if (stop < i || stop > d_model - (outlier < head[1]))
                    return 0;
                for (; i < stop; i++)
                    hidden[i] = ((float)*code++ - zero) * scale;
                if (outlier < head[1]) {
                    hidden[i] = get_float(values);
                    values += 4;
                }
            }
            next[head[0]] = code;
            indices += head[1];
        }
        for (Py_ssize_t i = 0; i < d_model; i++)
            if (!isfinite(hidden[i]))
                return 0;
    }
    return 1;
}

static PyObject *decode(PyObject *module, PyObject *args) {
    Py_buffer payload, hidden;
    Py_ssize_t rows;
    if (!PyArg_ParseTuple(args, "y*nw*", &payload, &rows, &hidden))
        return NULL;
    PyObject *result = NULL;
    const Py_ssize_t values = hidden.len / (Py_ssize_t)sizeof(float), width = rows > 0 ? values / rows : 0;
    if (width < 1 || width > 1 << 16 || hidden.len != rows * width * (Py_ssize_t)sizeof(float)) {
        PyErr_SetString(PyExc_ValueError, "arrays that do not fit each other");
    } else {
        uint8_t *room = PyMem_Malloc((size_t)(3 * values)); /* an index and a code for each value */
        if (room)
            result = PyBool_FromLong(read_payload(payload.buf, payload.len, rows, width, (uint16_t *)room,
                                                  room + 2 * values, hidden.buf));
        else
            PyErr_NoMemory();
        PyMem_Free(room);
    }
    PyBuffer_Release(&payload);
    PyBuffer_Release(&hidden);
    return result;
}

static PyMethodDef METHODS[] = {
    {"quantize", quantize, METH_VARARGS,
     "quantize(hidden, d_model, threshold, outliers, tolerance, q_min, q_max, head, codes, coded)"},
    {"encode", encode, METH_VARARGS,
     "encode(hidden, d_model, threshold, outliers, tolerance, q_min, q_max) -> payload, or None if a value is not finite"},
    {"decode", decode, METH_VARARGS, "decode(payload, tokens, hidden) -> whether it is a payload"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_tabq", .m_doc = NULL, .m_size = 0, .m_methods = METHODS};

PyMODINIT_FUNC PyInit__tabq(void) { return PyModule_Create(&MODULE); }
