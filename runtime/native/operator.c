/* com.microsoft.MatMulNBits as a custom operator: onnxruntime takes one that has a built-in operator's name and domain
 * in the built-in's place. It reads the weight where it lies, which is the bundle's file, and copies nothing of it. */
#include <stdatomic.h>
#include <stdlib.h>

#include "onnxruntime_abi.h"
#include "product.h"

#define EXPORT __attribute__((visibility("default")))
#define MOST_DIMENSIONS 8
#define ROUNDS_X 4 /* The accuracy level that means this arithmetic. */

static const OrtApi *_Atomic interface;

typedef struct {
    const Kernels *kernels;
    Weight weight; /* Without codes and scales, which come with each run. */
} Kernel;

enum { X, CODES, SCALES, INPUTS };

static OrtStatus *refuse(const OrtApi *api, const char *why) { return api->CreateStatus(ORT_INVALID_ARGUMENT, why); }

#define CHECK(call)                   \
    do {                              \
        OrtStatus *status_ = (call);  \
        if (status_) return status_;  \
    } while (0)

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

/* The shape of an input: at most MOST_DIMENSIONS. */
static OrtStatus *shape_of(const OrtApi *api, const OrtValue *value, int64_t *dimensions, size_t *count) {
    OrtShapeInfo *info;
    CHECK(api->GetTensorTypeAndShape(value, &info));
    OrtStatus *status = api->GetDimensionsCount(info, count);
    if (!status && *count > MOST_DIMENSIONS) status = refuse(api, "MatMulNBits: an input has too many dimensions.");
    if (!status) status = api->GetDimensions(info, dimensions, *count);
    api->ReleaseTensorTypeAndShapeInfo(info);
    return status;
}

static OrtStatus *check_elements(const OrtApi *api, const OrtValue *value, size_t wanted) {
    int64_t dimensions[MOST_DIMENSIONS];
    size_t count, elements = 1;
    CHECK(shape_of(api, value, dimensions, &count));
    for (size_t i = 0; i < count; i++) elements *= (size_t)dimensions[i];
    return elements == wanted ? NULL : refuse(api, "MatMulNBits: a weight's codes or scales have another shape.");
}

typedef struct {
    const OrtApi *api;
    OrtKernelContext *context;
    OrtStatus *status;
} Threads;

static void parallel_for(void *context, void (*function)(void *, size_t), size_t total, void *data) {
    Threads *threads = context;
    if (total == 1) {
        function(data, 0);
        return;
    }
    /* As many batches as indices: whichever thread is free takes the next. */
    OrtStatus *status = threads->api->KernelContext_ParallelFor(threads->context, function, total, total, data);
    if (status && threads->status)
        threads->api->ReleaseStatus(status);
    else if (status)
        threads->status = status;
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
    CHECK(shape_of(api, inputs[X], dimensions, &count));
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
static const char *get_provider(const OrtCustomOp *op) { return (void)op, NULL; } /* The CPU's. */
static int get_input_type(const OrtCustomOp *op, size_t index) {
    return (void)op, index == CODES ? ORT_TENSOR_UINT8 : ORT_TENSOR_FLOAT;
}
static size_t get_input_count(const OrtCustomOp *op) { return (void)op, INPUTS; }
static int get_output_type(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_TENSOR_FLOAT; }
static size_t get_output_count(const OrtCustomOp *op) { return (void)op, 1; }
static int get_characteristic(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, 0; } /* Required. */
static int get_memory(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_MEMORY_DEFAULT; }
static int get_one(const OrtCustomOp *op) { return (void)op, 1; }
static int get_last_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

static const OrtCustomOp matmul_nbits = {
    .version = ORT_INTERFACE_VERSION,
    .GetName = get_name,
    .GetExecutionProviderType = get_provider,
    .GetInputType = get_input_type,
    .GetInputTypeCount = get_input_count,
    .GetOutputType = get_output_type,
    .GetOutputTypeCount = get_output_count,
    .KernelDestroy = destroy_kernel,
    .GetInputCharacteristic = get_characteristic,
    .GetOutputCharacteristic = get_characteristic,
    .GetInputMemoryType = get_memory,
    .GetVariadicInputMinArity = get_one,
    .GetVariadicInputHomogeneity = get_one,
    .GetVariadicOutputMinArity = get_one,
    .GetVariadicOutputHomogeneity = get_one,
    .CreateKernelV2 = create_kernel,
    .KernelComputeV2 = compute,
    .GetStartVersion = get_one,
    .GetEndVersion = get_last_version,
};

/* What onnxruntime calls when a session is to use this library. The domain is made once and lasts as long as the
 * library, since sessions point to it. */
EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static OrtCustomOpDomain *_Atomic domain;
    const OrtApi *api = base->GetApi(ORT_INTERFACE_VERSION);
    if (!api) return NULL; /* Older than the interface: nothing can be said, and its own kernels run. */
    interface = api;
    OrtCustomOpDomain *found = domain;
    if (!found) {
        OrtCustomOpDomain *made;
        CHECK(api->CreateCustomOpDomain("com.microsoft", &made));
        OrtStatus *status = api->CustomOpDomain_Add(made, &matmul_nbits);
        if (status) {
            api->ReleaseCustomOpDomain(made);
            return status;
        }
        if (atomic_compare_exchange_strong(&domain, &found, made))
            found = made;
        else
            api->ReleaseCustomOpDomain(made);
    }
    return api->AddCustomOpDomain(options, found);
}

/* The name of the kernels that would run; NULL where onnxruntime's own do. */
EXPORT const char *gemma_export_kernels(void) {
    const Kernels *kernels = chosen_kernels();
    return kernels ? kernels->name : NULL;
}
