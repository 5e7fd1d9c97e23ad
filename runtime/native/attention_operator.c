/* com.microsoft.GroupQueryAttention, for a cache of fp32 numbers that is written in place. */
#include "operator.h"

#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "vectors.h"

typedef struct {
    const AttentionKernels *kernels;
    Attention attention; /* What attributes say; the rest comes with each run. */
} Kernel;

enum { QKV, KEY, VALUE, PAST_KEYS, PAST_VALUES, LAST, LONGEST, COSINES, SINES, INPUTS };
enum { Y, KEYS, VALUES, OUTPUTS };

static int64_t integer_or(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t otherwise) {
    int64_t value;
    OrtStatus *status = api->KernelInfoGetAttribute_int64(info, name, &value);
    if (status) api->ReleaseStatus(status);
    return status ? otherwise : value;
}

static float number_or(const OrtApi *api, const OrtKernelInfo *info, const char *name, float otherwise) {
    float value;
    OrtStatus *status = api->KernelInfoGetAttribute_float(info, name, &value);
    if (status) api->ReleaseStatus(status);
    return status ? otherwise : value;
}

static OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
    (void)op;
    const int64_t query_heads = integer_or(api, info, "num_heads", 0);
    const int64_t key_heads = integer_or(api, info, "kv_num_heads", 0);
    const int64_t window = integer_or(api, info, "local_window_size", -1);
    const float scale = number_or(api, info, "scale", 0.0f);
    if (query_heads < 1 || key_heads < 1 || query_heads % key_heads || scale <= 0)
        return refuse(api, "GroupQueryAttention: heads and scale have to be given.");
    if (integer_or(api, info, "do_rotary", 0) != 1 || integer_or(api, info, "rotary_interleaved", 0) != 0)
        return refuse(api, "GroupQueryAttention: queries and keys are rotated here, by halves.");
    if (integer_or(api, info, "smooth_softmax", 0) > 0)
        return refuse(api, "GroupQueryAttention: the softmax is the usual one here.");
    const AttentionKernels *kernels = chosen_attention();
    if (!kernels) return refuse(api, "GroupQueryAttention: no kernels; check GEMMA_EXPORT_KERNELS.");
    Kernel *kernel = malloc(sizeof *kernel);
    if (!kernel) return api->CreateStatus(ORT_OUT_OF_MEMORY, "GroupQueryAttention: no memory.");
    *kernel = (Kernel){kernels,
                       {.query_heads = (size_t)query_heads,
                        .key_heads = (size_t)key_heads,
                        .scale = scale,
                        .softcap = number_or(api, info, "softcap", 0.0f),
                        .window = window > 0 ? (size_t)window : 0}};
    *out = kernel;
    return NULL;
}

static void destroy_kernel(void *kernel) { free(kernel); }

/* The shape of an input that has to have so many dimensions. */
static OrtStatus *shape_with(const OrtApi *api, const OrtValue *value, size_t wanted, int64_t *dimensions) {
    size_t count;
    CHECK(shape_of(api, value, wanted, dimensions, &count));
    return count == wanted ? NULL : refuse(api, "GroupQueryAttention: an input has another rank.");
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
    const Kernel *kernel = data;
    const OrtApi *api = interface;
    Attention a = kernel->attention;
    const OrtValue *inputs[INPUTS];
    void *contents[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) {
        CHECK(api->KernelContext_GetInput(context, i, &inputs[i]));
        if (i == KEY || i == VALUE) {
            if (inputs[i]) return refuse(api, "GroupQueryAttention: keys and values come with the queries here.");
            continue;
        }
        if (!inputs[i]) return refuse(api, "GroupQueryAttention: the cache and the rotations are inputs here.");
        CHECK(api->GetTensorMutableData(inputs[i], &contents[i]));
    }
    int64_t qkv[3], cache[4], values[4], table[2];
    CHECK(shape_with(api, inputs[QKV], 3, qkv));
    CHECK(shape_with(api, inputs[PAST_KEYS], 4, cache));
    CHECK(shape_with(api, inputs[PAST_VALUES], 4, values));
    CHECK(shape_with(api, inputs[COSINES], 2, table));
    a.batch = (size_t)qkv[0], a.tokens = (size_t)qkv[1], a.slots = (size_t)cache[2], a.head = (size_t)cache[3];
    if (memcmp(cache, values, sizeof cache) || cache[0] != qkv[0] || (size_t)cache[1] != a.key_heads ||
        (size_t)qkv[2] != (a.query_heads + 2 * a.key_heads) * a.head || (size_t)table[1] * 2 != a.head)
        return refuse(api, "GroupQueryAttention: the shapes do not fit each other.");
    if (a.head % LANES || a.head > LARGEST_HEAD)
        return refuse(api, "GroupQueryAttention: a head has 16, 32, ... 256 numbers here.");
    a.qkv = contents[QKV], a.past_keys = contents[PAST_KEYS], a.past_values = contents[PAST_VALUES];
    a.last = contents[LAST], a.cosines = contents[COSINES], a.sines = contents[SINES];
    for (size_t row = 0; row < a.batch; row++)
        if (a.last[row] < 0 || (size_t)a.last[row] + 1 < a.tokens || (size_t)a.last[row] >= a.slots ||
            a.last[row] >= table[0])
            return refuse(api, "GroupQueryAttention: a token is beyond the cache.");

    const int64_t shape[3] = {qkv[0], qkv[1], (int64_t)(a.query_heads * a.head)};
    OrtValue *outputs[OUTPUTS];
    void *made[OUTPUTS];
    for (size_t i = 0; i < OUTPUTS; i++) {
        CHECK(api->KernelContext_GetOutput(context, i, i == Y ? shape : cache, i == Y ? 3 : 4, &outputs[i]));
        CHECK(api->GetTensorMutableData(outputs[i], &made[i]));
    }
    a.y = made[Y], a.keys = made[KEYS], a.values = made[VALUES];
    if (a.batch == 0 || a.tokens == 0) return NULL;
    const size_t bytes = a.batch * a.key_heads * a.slots * a.head * sizeof(float);
    if (a.keys != a.past_keys) memcpy(a.keys, a.past_keys, bytes);
    if (a.values != a.past_values) memcpy(a.values, a.past_values, bytes);
    Threads threads = {api, context, NULL};
    const Pool pool = {&threads, parallel_for};
    if (attend(kernel->kernels, &a, &pool))
        return api->CreateStatus(ORT_OUT_OF_MEMORY, "GroupQueryAttention: no memory.");
    return threads.status;
}

static const char *get_name(const OrtCustomOp *op) { return (void)op, "GroupQueryAttention"; }
static int get_input_type(const OrtCustomOp *op, size_t index) {
    return (void)op, index == LAST || index == LONGEST ? ORT_TENSOR_INT32 : ORT_TENSOR_FLOAT;
}
static int get_input_characteristic(const OrtCustomOp *op, size_t index) {
    return (void)op, index == KEY || index == VALUE ? ORT_OPTIONAL : ORT_REQUIRED;
}
static size_t get_input_count(const OrtCustomOp *op) { return (void)op, INPUTS; }
static size_t get_output_count(const OrtCustomOp *op) { return (void)op, OUTPUTS; }

const OrtCustomOp group_query_attention = {
    SHARED_BY_OPERATORS,
    .GetInputType = get_input_type,
    .GetInputTypeCount = get_input_count,
    .GetInputCharacteristic = get_input_characteristic,
    .GetOutputTypeCount = get_output_count,
};
