/* com.microsoft.MatMulNBits: it reads the weight where it lies, which is the bundle's file, and copies nothing of it. */
#include "operator.h"

#include <stdlib.h>

#include "product.h"

#define MOST_DIMENSIONS 8
#define ROUNDS_X 4 /* The accuracy level that means this arithmetic. */

typedef struct {
    const Kernels *kernels;
    Weight weight; /* Without codes and scales, which come with each run. */
} Kernel;

enum { X, CODES, SCALES, INPUTS };

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
                        .bits = (int)bits}};
    *out = kernel;
    return NULL;
}

static void destroy_kernel(void *kernel) { free(kernel); }

static OrtStatus *check_elements(const OrtApi *api, const OrtValue *value, size_t wanted) {
    int64_t dimensions[MOST_DIMENSIONS];
    size_t count, elements = 1;
    CHECK(shape_of(api, value, MOST_DIMENSIONS, dimensions, &count));
    for (size_t i = 0; i < count; i++) elements *= (size_t)dimensions[i];
    return elements == wanted ? NULL : refuse(api, "MatMulNBits: a weight's codes or scales have another shape.");
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
