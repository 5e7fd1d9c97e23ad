/* What the custom operators share: onnxruntime takes one that has a built-in operator's name and domain in the
 * built-in's place, and one that a graph defines as a function in the place of what the function is made of. */
#ifndef GEMMA_EXPORT_OPERATOR_H
#define GEMMA_EXPORT_OPERATOR_H

#include <stdatomic.h>

#include "onnxruntime_abi.h"

#define CHECK(call)                  \
    do {                             \
        OrtStatus *status_ = (call); \
        if (status_) return status_; \
    } while (0)

extern const OrtApi *_Atomic interface; /* Set before the first operator is made. */

static inline OrtStatus *refuse(const OrtApi *api, const char *why) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, why);
}

/* onnxruntime's threads, for one run of a kernel. */
typedef struct {
    const OrtApi *api;
    OrtKernelContext *context;
    OrtStatus *status; /* What went wrong, if something did. */
} Threads;

static inline void parallel_for(void *context, void (*function)(void *, size_t), size_t total, void *data) {
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

/* The shape of an input, which has at most so many dimensions. */
static inline OrtStatus *shape_of(const OrtApi *api, const OrtValue *value, size_t most, int64_t *dimensions,
                                  size_t *count) {
    OrtShapeInfo *info;
    CHECK(api->GetTensorTypeAndShape(value, &info));
    OrtStatus *status = api->GetDimensionsCount(info, count);
    if (!status && *count > most) status = refuse(api, "An input has too many dimensions.");
    if (!status) status = api->GetDimensions(info, dimensions, *count);
    api->ReleaseTensorTypeAndShapeInfo(info);
    return status;
}

static inline const char *get_provider(const OrtCustomOp *op) { return (void)op, NULL; } /* The CPU's. */
static inline int get_float(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_TENSOR_FLOAT; }
static inline int get_required(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_REQUIRED; }
static inline int get_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_MEMORY_DEFAULT; }
static inline int get_one(const OrtCustomOp *op) { return (void)op, 1; }
static inline int get_last_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

/* What every operator here says of itself; its file defines the functions that are named here. */
#define SHARED_BY_OPERATORS                                                                                        \
    .version = ORT_INTERFACE_VERSION, .GetName = get_name, .CreateKernelV2 = create_kernel,                        \
    .KernelComputeV2 = compute, .KernelDestroy = destroy_kernel, .GetExecutionProviderType = get_provider,         \
    .GetOutputType = get_float, .GetOutputCharacteristic = get_required, .GetInputMemoryType = get_memory,         \
    .GetVariadicInputMinArity = get_one, .GetVariadicInputHomogeneity = get_one,                                   \
    .GetVariadicOutputMinArity = get_one, .GetVariadicOutputHomogeneity = get_one, .GetStartVersion = get_one,     \
    .GetEndVersion = get_last_version

extern const OrtCustomOp matmul_nbits, group_query_attention, gated_gelu_operator, residual_norm_operator;

#endif
