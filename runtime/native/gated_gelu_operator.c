/* gemma_export.GatedGelu, which a graph defines by standard operators for whoever does not have this. */
#include "gated_gelu.h"
#include "operator.h"

#include <stdlib.h>

#define MOST_DIMENSIONS 8

/* It has nothing to keep from one run to the next. */
static OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
    static char kernel;
    (void)op, (void)api, (void)info;
    *out = &kernel;
    return NULL;
}

static void destroy_kernel(void *kernel) { (void)kernel; }

static OrtStatus *compute(void *data, OrtKernelContext *context) {
    (void)data;
    const OrtApi *api = interface;
    const OrtValue *input;
    OrtValue *output;
    void *x, *y;
    CHECK(api->KernelContext_GetInput(context, 0, &input));
    CHECK(api->GetTensorMutableData(input, &x));
    int64_t dimensions[MOST_DIMENSIONS];
    size_t count, tokens = 1;
    CHECK(shape_of(api, input, MOST_DIMENSIONS, dimensions, &count));
    if (count == 0 || dimensions[count - 1] % 2)
        return refuse(api, "GatedGelu: a row of x has two halves.");
    for (size_t i = 0; i + 1 < count; i++) tokens *= (size_t)dimensions[i];
    dimensions[count - 1] /= 2;
    CHECK(api->KernelContext_GetOutput(context, 0, dimensions, count, &output));
    CHECK(api->GetTensorMutableData(output, &y));
    const size_t columns = (size_t)dimensions[count - 1];
    if (tokens == 0 || columns == 0) return NULL;
    Threads threads = {api, context, NULL};
    const Pool pool = {&threads, parallel_for};
    gated_gelu(x, tokens, columns, y, &pool);
    return threads.status;
}

static const char *get_name(const OrtCustomOp *op) { return (void)op, "GatedGelu"; }
static size_t get_count(const OrtCustomOp *op) { return (void)op, 1; }

const OrtCustomOp gated_gelu_operator = {
    SHARED_BY_OPERATORS,
    .GetInputType = get_float,
    .GetInputTypeCount = get_count,
    .GetInputCharacteristic = get_required,
    .GetOutputTypeCount = get_count,
};
