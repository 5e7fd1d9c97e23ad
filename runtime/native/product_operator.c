/* com.microsoft.MatMulNBits: it reads the weight where it lies, which is the bundle's file, and copies nothing of it. */
#include "operator.h"

#include <stdlib.h>
#include <string.h>

#include "product.h"

#define MOST_DIMENSIONS 8
#define ROUNDS_X 4 /* The accuracy level that means this arithmetic. */

typedef struct {
    const Kernels *kernels;
    Weight weight; /* Without codes and scales, which come with each run. */
    void *compact; /* The memory of scales in fewer bytes, or NULL. */
} Kernel;

enum { X, CODES, SCALES, INPUTS };

/* Scales come in fp32 and one for every block, as the operator wants them. What they were before that, a scale of a row
 * or bfloat16, takes less time to read with every token. */
static void compact_scales(Kernel *kernel, const float *scales) {
    Weight *w = &kernel->weight;
    const size_t count = w->rows * w->blocks;
    int by_row = w->blocks > 1, by_halves = 1;
    for (size_t i = 0; i < count && (by_row || by_halves); i++) {
        uint32_t bits;
        memcpy(&bits, scales + i, sizeof bits);
        by_row = by_row && memcmp(scales + i, scales + i / w->blocks * w->blocks, sizeof *scales) == 0;
        by_halves = by_halves && (bits & 0xffff) == 0;
    }
    if (!by_row && !by_halves) return;
    kernel->compact = malloc(by_row ? w->rows * sizeof(float) : count * sizeof(uint16_t));
    if (!kernel->compact) return; /* They are read as they came. */
    if (by_row) {
        float *out = kernel->compact;
        for (size_t n = 0; n < w->rows; n++) out[n] = scales[n * w->blocks];
        w->row_scales = out;
    } else {
        uint16_t *out = kernel->compact;
        for (size_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, scales + i, sizeof bits);
            out[i] = (uint16_t)(bits >> 16);
        }
        w->upper_halves = out;
    }
}

static OrtStatus *check_elements(const OrtApi *api, const OrtValue *value, size_t wanted) {
    int64_t dimensions[MOST_DIMENSIONS];
    size_t count, elements = 1;
    CHECK(shape_of(api, value, MOST_DIMENSIONS, dimensions, &count));
    for (size_t i = 0; i < count; i++) elements *= (size_t)dimensions[i];
    return elements == wanted ? NULL : refuse(api, "MatMulNBits: a weight's codes or scales have another shape.");
}

static OrtStatus *look_at_scales(const OrtApi *api, const OrtKernelInfo *info, Kernel *kernel) {
    const size_t from = kernel->kernels->compact_from;
    if (from == 0 || block_bytes(&kernel->weight) < from) return NULL;
    int are_constant;
    const OrtValue *value;
    void *scales;
    CHECK(api->KernelInfoGetConstantInput_tensor(info, SCALES, &are_constant, &value));
    if (!are_constant) return NULL;
    CHECK(check_elements(api, value, kernel->weight.rows * kernel->weight.blocks));
    CHECK(api->GetTensorMutableData(value, &scales));
    compact_scales(kernel, scales);
    return NULL;
}

static void destroy_kernel(void *data) {
    Kernel *kernel = data;
    free(kernel->compact);
    free(kernel);
}

static OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
    (void)op;
    int64_t columns, rows, bits, block, level = 0;
    CHECK(api->KernelInfoGetAttribute_int64(info, "K", &columns));
    CHECK(api->KernelInfoGetAttribute_int64(info, "N", &rows));
    CHECK(api->KernelInfoGetAttribute_int64(info, "bits", &bits));
    CHECK(api->KernelInfoGetAttribute_int64(info, "block_size", &block));
    CHECK(api->KernelInfoGetAttribute_int64(info, "accuracy_level", &level));
    if (bits != 4 && bits != 8) return refuse(api, "MatMulNBits: a weight has 4 or 8 bits here.");
    if (block < 16 || block > LARGEST_BLOCK || (block & (block - 1)) || columns <= 0 || rows <= 0 || columns % block)
        return refuse(api, "MatMulNBits: blocks have 16 to 256 columns here, and divide the rows.");
    if (level != ROUNDS_X) return refuse(api, "MatMulNBits: the accuracy level is 4 here.");
    const Kernels *kernels = chosen_kernels();
    if (!kernels) return refuse(api, "MatMulNBits: no kernels for this processor; check GEMMA_EXPORT_KERNELS.");
    Kernel *kernel = malloc(sizeof *kernel);
    if (!kernel) return api->CreateStatus(ORT_OUT_OF_MEMORY, "MatMulNBits: no memory.");
    *kernel = (Kernel){kernels,
                       {.rows = (size_t)rows,
                        .columns = (size_t)columns,
                        .block = (size_t)block,
                        .blocks = (size_t)(columns / block),
                        .bits = (int)bits},
                       NULL};
    OrtStatus *status = look_at_scales(api, info, kernel);
    if (status)
        destroy_kernel(kernel);
    else
        *out = kernel;
    return status;
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
    const Kernel *kernel = data;
    const OrtApi *api = interface;
    Weight weight = kernel->weight;
    const OrtValue *inputs[INPUTS];
    void *contents[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) {
        CHECK(api->KernelContext_GetInput(context, i, &inputs[i]));
        CHECK(api->GetTensorMutableData(inputs[i], &contents[i]));
    }
    CHECK(check_elements(api, inputs[CODES], weight.rows * row_bytes(&weight)));
    CHECK(check_elements(api, inputs[SCALES], weight.rows * weight.blocks));
    weight.codes = contents[CODES];
    weight.scales = contents[SCALES];

    int64_t dimensions[MOST_DIMENSIONS];
    size_t count, tokens = 1;
    CHECK(shape_of(api, inputs[X], MOST_DIMENSIONS, dimensions, &count));
    if (count == 0 || (size_t)dimensions[count - 1] != weight.columns)
        return refuse(api, "MatMulNBits: x has another number of columns than the weight.");
    for (size_t i = 0; i + 1 < count; i++) tokens *= (size_t)dimensions[i];
    dimensions[count - 1] = (int64_t)weight.rows;
    OrtValue *output;
    void *y;
    CHECK(api->KernelContext_GetOutput(context, 0, dimensions, count, &output));
    CHECK(api->GetTensorMutableData(output, &y));

    Threads threads = {api, context, NULL};
    const Pool pool = {&threads, parallel_for};
    if (multiply(kernel->kernels, &weight, contents[X], tokens, y, &pool))
        return api->CreateStatus(ORT_OUT_OF_MEMORY, "MatMulNBits: no memory for the rounded activations.");
    return threads.status;
}

static const char *get_name(const OrtCustomOp *op) { return (void)op, "MatMulNBits"; }
static int get_input_type(const OrtCustomOp *op, size_t index) {
    return (void)op, index == CODES ? ORT_TENSOR_UINT8 : ORT_TENSOR_FLOAT;
}
static size_t get_input_count(const OrtCustomOp *op) { return (void)op, INPUTS; }
static size_t get_output_count(const OrtCustomOp *op) { return (void)op, 1; }

const OrtCustomOp matmul_nbits = {
    SHARED_BY_OPERATORS,
    .GetInputType = get_input_type,
    .GetInputTypeCount = get_input_count,
    .GetInputCharacteristic = get_required,
    .GetOutputTypeCount = get_output_count,
};
