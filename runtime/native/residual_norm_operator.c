/* gemma_export.ResidualNorm, which a graph defines by standard operators for whoever does not have this. */
#include "operator.h"

#include <stdlib.h>
#include <string.h>

#include "residual_norm.h"

#define MOST_DIMENSIONS 8

enum { STREAM, ADDED, GAIN, INPUTS };
enum { SUM, NORMED, OUTPUTS };

static OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
    (void)op;
    float epsilon;
    CHECK(api->KernelInfoGetAttribute_float(info, "epsilon", &epsilon));
    ResidualNorm *kernel = calloc(1, sizeof *kernel);
    if (!kernel) return api->CreateStatus(ORT_OUT_OF_MEMORY, "ResidualNorm: no memory.");
    kernel->epsilon = epsilon;
    *out = kernel;
    return NULL;
}

static void destroy_kernel(void *kernel) { free(kernel); }

static OrtStatus *compute(void *data, OrtKernelContext *context) {
    const OrtApi *api = interface;
    ResidualNorm r = *(const ResidualNorm *)data;
    int64_t shapes[INPUTS][MOST_DIMENSIONS];
    size_t ranks[INPUTS], tokens = 1;
    void *contents[INPUTS], *made[OUTPUTS];
    for (size_t i = 0; i < INPUTS; i++) {
        const OrtValue *input;
        CHECK(api->KernelContext_GetInput(context, i, &input));
        CHECK(api->GetTensorMutableData(input, &contents[i]));
        CHECK(shape_of(api, input, MOST_DIMENSIONS, shapes[i], &ranks[i]));
    }
    const size_t rank = ranks[STREAM];
    if (rank == 0 || ranks[ADDED] != rank || memcmp(shapes[STREAM], shapes[ADDED], rank * sizeof **shapes) ||
        ranks[GAIN] != 1 || shapes[GAIN][0] != shapes[STREAM][rank - 1])
        return refuse(api, "ResidualNorm: the shapes do not fit each other.");
    for (size_t i = 0; i + 1 < rank; i++) tokens *= (size_t)shapes[STREAM][i];
    for (size_t i = 0; i < OUTPUTS; i++) {
        OrtValue *output;
        CHECK(api->KernelContext_GetOutput(context, i, shapes[STREAM], rank, &output));
        CHECK(api->GetTensorMutableData(output, &made[i]));
    }
    r.stream = contents[STREAM], r.added = contents[ADDED], r.gain = contents[GAIN];
    r.channels = (size_t)shapes[GAIN][0], r.sum = made[SUM], r.normed = made[NORMED];
    if (tokens == 0 || r.channels == 0) return NULL;
    Threads threads = {api, context, NULL};
    const Pool pool = {&threads, parallel_for};
    residual_norm(&r, tokens, &pool);
    return threads.status;
}

static const char *get_name(const OrtCustomOp *op) { return (void)op, "ResidualNorm"; }
static size_t get_input_count(const OrtCustomOp *op) { return (void)op, INPUTS; }
static size_t get_output_count(const OrtCustomOp *op) { return (void)op, OUTPUTS; }

const OrtCustomOp residual_norm_operator = {
    SHARED_BY_OPERATORS,
    .GetInputType = get_float,
    .GetInputTypeCount = get_input_count,
    .GetInputCharacteristic = get_required,
    .GetOutputTypeCount = get_output_count,
};
