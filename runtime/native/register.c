/* Where onnxruntime enters this library. */
#include "attention.h"
#include "operator.h"
#include "product.h"

#define EXPORT __attribute__((visibility("default")))

const OrtApi *_Atomic interface;

/* A domain with some of the operators. It is made once and lasts as long as the library, since sessions point to it. */
typedef struct {
    const char *name;
    const OrtCustomOp *operators[2];
    OrtCustomOpDomain *_Atomic made;
} Domain;

static Domain products = {"com.microsoft", {&matmul_nbits}, NULL};
static Domain products_and_attention = {"com.microsoft", {&matmul_nbits, &group_query_attention}, NULL};
static Domain functions = {"gemma_export", {&gated_gelu_operator, &residual_norm_operator}, NULL};

static OrtStatus *make(const OrtApi *api, Domain *domain) {
    OrtCustomOpDomain *made, *none = NULL;
    CHECK(api->CreateCustomOpDomain(domain->name, &made));
    for (size_t i = 0; i < 2 && domain->operators[i]; i++) {
        OrtStatus *status = api->CustomOpDomain_Add(made, domain->operators[i]);
        if (status) {
            api->ReleaseCustomOpDomain(made);
            return status;
        }
    }
    /* Another thread may have been first. */
    if (!atomic_compare_exchange_strong(&domain->made, &none, made)) api->ReleaseCustomOpDomain(made);
    return NULL;
}

static OrtStatus *add(const OrtApi *api, OrtSessionOptions *options, Domain *domain) {
    if (!domain->made) CHECK(make(api, domain));
    return api->AddCustomOpDomain(options, domain->made);
}

/* What onnxruntime calls when a session is to use this library. A session may have one domain of a name, and what of it
 * is wanted stands in the session's configuration: attention is for a cache of fp32 numbers. */
EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *api = base->GetApi(ORT_INTERFACE_VERSION);
    if (!api) return NULL; /* Older than the interface: nothing can be said, and its own kernels run. */
    interface = api;
    int with_attention = 0;
    CHECK(api->HasSessionConfigEntry(options, "gemma_export.attention", &with_attention));
    CHECK(add(api, options, with_attention && chosen_attention() ? &products_and_attention : &products));
    return add(api, options, &functions);
}

/* The name of the kernels that would run; NULL where onnxruntime's own do. */
EXPORT const char *gemma_export_kernels(void) {
    const Kernels *kernels = chosen_kernels();
    return kernels ? kernels->name : NULL;
}
